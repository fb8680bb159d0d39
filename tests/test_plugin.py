"""The plugin: its kernels, run on this CPU from their own source (tests/emulation), against the reference; how it gets into engines."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from conftest import SHAPES, write_segmenter
from kernels import SOURCE, KernelRunner, library, on_cpu
from raw_heads import LAYOUTS, SIZE, STRIDES, candidates_of, fused_model, raw_model, shapes_of

from fusenms import PostprocessConfig, fuse
from fusenms.artifacts.raw import ImageInput
from fusenms.cli import main
from fusenms.engines.plugin import _register, baked_source, carried, compile_ptx, load_plugin_library, split
from fusenms.engines.trt_check import check_trt_graph
from fusenms.errors import EngineBuildError, SourceError, UnsupportedByBackendError
from fusenms.fusion.backends import BACKENDS
from fusenms.fusion.backends.plugin import INPUTS, OUTPUTS, PLUGGED, PLUGIN, Settings, _in_kernels, settings_of
from fusenms.fusion.candidates import Head
from fusenms.fusion.tail import fuse_head
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.heads import raw_head
from fusenms.layout import Activation, AnchorBoxes, BoxFormat, Decoded, Distances, Layout, Tap
from fusenms.reference import Rows, candidates, postprocess
from fusenms.runtime.images import read_image
from fusenms.runtime.placement import letterbox, to_tensor
from fusenms.transforms.half_precision import to_half
from fusenms.verification import checks as verification
from fusenms.verification.synthetic_heads import Stage, heads

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_exports")]

SUPPRESSED = [name for name in LAYOUTS if LAYOUTS[name]().suppress]
SETTINGS = [
    {"max_detections": 20},
    {"multi_label": True, "score_threshold": 0.01},
    {"class_agnostic": True, "indices": True, "iou_threshold": 0.7, "max_candidates": 5000},
    {"max_candidates": 13, "max_detections": 5, "multi_label": True, "class_agnostic": True, "score_threshold": 0.0},
]
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")


@pytest.fixture
def by_kernels(monkeypatch):
    """`verify` runs plugin files by their kernels, not by standard operators in the plugin's place."""
    library()
    plain = verification.OnnxRuntimeRunner

    def runner(model, **settings):
        plugged = any(node.op_type == PLUGIN for node in model.graph.node)
        return KernelRunner(model, on_cpu(seed=5)) if plugged else plain(model, **settings)

    monkeypatch.setitem(BACKENDS, "plugin", replace(PLUGGED, to_standard=lambda model, _: model))
    monkeypatch.setattr(verification, "OnnxRuntimeRunner", runner)


def node_of(model):
    return next(node for node in model.graph.node if node.op_type == PLUGIN)


@pytest.mark.covering(default=1, quick=0)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("layout", SUPPRESSED)
def test_kernels_equal_the_reference(by_kernels, layout, settings):
    report = verification.verify(fused_model(LAYOUTS[layout](), "plugin", **settings))
    assert report, str(report)
    assert report.detections > 100


@pytest.mark.covering(default=0, quick=0)
@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("classes", [79, 81, 200])
def test_more_classes_and_bins_than_are_loaded_at_once(by_kernels, classes, multi_label):
    boxes, scores = Tap("dist", 1, 0, 4 * 35), Tap("logits", 1, 0, classes)
    layout = Layout("yolov8", boxes, scores, None, Activation.SIGMOID, Distances(STRIDES, 35))
    report = verification.verify(fused_model(layout, "plugin", multi_label=multi_label, score_threshold=0.1))
    assert report, str(report)


@pytest.mark.covering(default=0)
@pytest.mark.parametrize("layout", SUPPRESSED)
def test_standard_operators_in_the_place_of_the_plugin_equal_the_reference(layout):
    report = verification.verify(fused_model(LAYOUTS[layout](), "plugin", indices=True, max_candidates=5000))
    assert report, str(report)


def test_standard_operators_take_no_name_of_the_graphs_within():
    fused = fused_model(LAYOUTS["masks"](), "plugin", masks="prototype", max_detections=32)
    before, after = (list(made_names(m.graph)) for m in (fused.model, PLUGGED.to_standard(fused.model, fused)))
    assert len(after) - len(set(after)) == len(before) - len(set(before))


def made_names(graph):
    yield from (item.name for item in graph.initializer)
    for node in graph.node:
        yield from node.output
        for attribute in node.attribute:
            yield from made_names(attribute.g)


@pytest.mark.parametrize(
    "weights",
    [
        "shapes/yolov8-p.pt",
        "shapes/yolov5u-p.pt",
        "shapes/yolo11-p-seg.pt",
        "shapes/yolov8-p-pose.pt",
        "shapes/yolo11-p-obb.pt",
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_kernels_equal_the_reference_on_trained_detectors(by_kernels, zoo, weights, dynamic):
    fused = fuse(zoo / weights, size=256, dynamic_size=dynamic, backend="plugin", indices=True, unverified=True)
    assert list(node_of(fused.model).input).count("images") == int(dynamic)
    report = verification.verify(fused)
    assert report, str(report)


@pytest.mark.covering(default=0)
@pytest.mark.parametrize("segment", [False, True])
def test_kernels_read_a_network_in_half_precision_without_casts(tmp_path, segment):
    weights = write_segmenter(tmp_path / "seg.pt") if segment else SHAPES / "shapes.pt"
    more = {"size": 64, "precision": "fp16", "score_threshold": 0.01, "indices": True, "multi_label": True}
    fused = fuse(weights, backend="plugin", **more)
    assert set(node_of(fused.model).input) == {"head_classes/float16", "head_boxes/float16"}
    images = to_tensor([letterbox(read_image(SHAPES / f"shapes{i}.jpg"), 64, 64)[0] for i in (0, 1)])
    outputs = KernelRunner(fused.model, on_cpu(3)).infer(images)
    expected = OnnxRuntimeRunner(PLUGGED.to_standard(fused.model, fused)).infer(images)
    assert list(outputs) == list(expected)
    assert outputs["num_detections"].min() > 10
    for name, values in expected.items():
        np.testing.assert_allclose(outputs[name], values, atol=1e-4, err_msg=name)


def test_tensor_that_is_not_what_the_plugin_reads_is_refused():
    fused = fuse(SHAPES / "shapes.pt", size=64, backend="plugin", precision="fp16", unverified=True)
    assert verification.verify(fused)
    swapped = onnx.helper.make_node("Cast", ["head_boxes/float16"], ["head_classes"], name="swapped", to=1)
    fused.model.graph.node.append(swapped)
    with pytest.raises(SourceError, match="'head_classes' is not what the plugin reads"):
        verification.verify(fused)


@pytest.mark.covering(default=0)
@pytest.mark.parametrize("name", SUPPRESSED)
def test_every_layout_is_read_in_half_precision(name):
    layout = LAYOUTS[name]()
    half = name != "oriented"  # a convolution into one channel, the angle's, stays float32
    half = half and _in_kernels(layout) is layout  # boxes that the graph decodes are float32
    config = PostprocessConfig(score_threshold=0.3, indices=True)
    raw = to_half(raw_model(layout, limited=False), layout)
    fused = fuse_head(raw, raw_head(raw, layout), config, "plugin")
    assert {name.endswith("/float16") for name in node_of(fused.model).input} == {half}
    report = verification.verify(fused)
    assert report, str(report)
    images = np.random.default_rng(0).random((3, 3, SIZE, SIZE), np.float32)
    outputs = KernelRunner(fused.model, on_cpu(3)).infer(images)
    expected = OnnxRuntimeRunner(PLUGGED.to_standard(fused.model, fused)).infer(images)
    assert outputs["num_detections"].min() > 3
    for name, values in expected.items():
        np.testing.assert_allclose(outputs[name], values, rtol=1e-5, atol=1e-3, err_msg=name)


def test_head_that_computes_after_the_network_stays_float32(zoo):
    """The angle is a sigmoid in the graph; all that the kernels read has to be of one type."""
    fused = fuse(zoo / "shapes/yolov8-p-obb.pt", size=64, backend="plugin", precision="fp16", unverified=True)
    assert set(node_of(fused.model).input) == {"head_classes", "head_boxes", "head_angle"}
    assert verification.verify(fused)


# ---- a head of real size


def big_layout(axis=1, classes=80):
    boxes, scores = Tap("dist", 1, 0, 64), Tap("logits", axis, 0, classes)
    return Layout("yolov8", boxes, scores, None, Activation.SIGMOID, Distances(STRIDES, 16))


def big_run(cases, layout, seed=0, half=False, schedule=0, side=640, **config):
    """Outputs of the kernels on made-up heads of a 640 pixel image, and the reference's detections of each image."""
    settings, count = PostprocessConfig(**config), sum((side // s) ** 2 for s in STRIDES)
    image = ImageInput("images", side, side, 32)
    axis, classes = layout.classes.channel_axis, layout.classes.channels
    shapes = {"dist": (64, count), "logits": (classes, count) if axis == 1 else (count, classes)}
    head = heads(Stage(layout, settings, image, count), cases, shapes, seed)
    if half:
        head = {name: values.astype(np.float16) for name, values in head.items()}
    s = settings_of(Head(layout, image, {"dist": 64, "logits": classes}, None), settings)
    given = dict.fromkeys(INPUTS, head["logits"]) | {"boxes": head["dist"]}
    return on_cpu(schedule)(s, given, (side, side)), head, settings


def assert_equal_to_reference(outputs, head, layout, settings, side=640):
    for i in range(len(head["logits"])):
        count = outputs["num_detections"][i, 0]
        rows = Rows(
            *(outputs[name][i, :count].astype(np.float64) for name in ("boxes", "scores")), outputs["labels"][i, :count]
        )
        expected = postprocess(candidates(head, i, layout, (side, side)), settings, rows)
        assert len(expected.rows) == count
        np.testing.assert_array_equal(outputs["indices"][i, :count], expected.indices)
        np.testing.assert_array_equal(rows.labels, expected.rows.labels)
        np.testing.assert_allclose(rows.boxes, expected.rows.boxes, atol=2e-3)
        np.testing.assert_allclose(rows.scores, expected.rows.scores, atol=1e-5)
        assert (outputs["indices"][i, count:] == -1).all()
        assert not outputs["boxes"][i, count:].any()


@pytest.mark.covering(default=0, quick=0)
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_candidates": 8400, "max_detections": 1000},
        {"max_candidates": 5000, "multi_label": True},
        {"class_agnostic": True, "iou_threshold": 0.2, "max_candidates": 8400, "max_detections": 3000},
    ],
    ids=str,
)
def test_kernels_equal_the_reference_at_640_pixels(axis, settings):
    layout = big_layout(axis)
    outputs, head, config = big_run(("crowded", "dense", "ties", "random", "empty"), layout, **settings)
    assert outputs["num_detections"][:, 0].tolist()[4] == 0 < outputs["num_detections"].max()
    assert_equal_to_reference(outputs, head, layout, config)


def test_every_class_of_every_candidate_passes():
    """More keys than are sorted at once, by far: they are found digit by digit, run after run."""
    layout = big_layout(classes=20)
    outputs, head, config = big_run(
        ("random", "ties"), layout, side=320, multi_label=True, score_threshold=0.0, class_agnostic=True, iou_threshold=0.2,
        max_candidates=9000, max_detections=2000,
    )  # fmt: skip
    assert outputs["num_detections"].max() < 2000
    assert_equal_to_reference(outputs, head, layout, config, side=320)


@pytest.mark.parametrize("spread", ["scores apart", "scores alike", "one score far away"])
def test_boxes_of_every_size_and_place(spread):
    """Wider than all cells of the index, far outside of the image, more rows than the index has; buckets of the sort even and uneven."""
    layout = LAYOUTS["decoded"](3)
    rng, count = np.random.default_rng(4), 3000
    sizes = np.exp(rng.uniform(0, np.log(30_000), (count, 2)))
    scores = {
        "scores apart": rng.permutation(np.linspace(0.3, 0.99, count)),
        "scores alike": rng.choice([0.5, 0.75], count),
        "one score far away": np.r_[1e30, rng.permutation(np.linspace(0.3, 0.31, count - 1))],
    }[spread]
    head = np.zeros((1, 7, count), np.float32)
    head[0, :4] = np.concatenate((rng.uniform(-60_000, 60_000, (count, 2)), sizes), 1).T
    head[0, 4 + rng.integers(3, size=count), np.arange(count)] = scores
    config = PostprocessConfig(iou_threshold=0.05, max_detections=1500)
    s = settings_of(Head(layout, ImageInput("images", 640, 640, 32), {"output0": 7}, None), config)
    outputs = on_cpu()(s, dict.fromkeys(INPUTS, head), (640, 640))
    found = outputs["num_detections"][0, 0]
    expected = postprocess(candidates({"output0": head}, 0, layout, (640, 640)), config)
    assert 600 < found == len(expected.rows)
    np.testing.assert_array_equal(outputs["indices"][0, :found], expected.indices)


def test_boxes_too_thin_to_overlap_are_all_kept():
    layout = LAYOUTS["oriented_decoded"]()
    boxes, classes, angle = layout.boxes, layout.classes, layout.angle.value
    head = np.full((1, max(tap.stop for tap in layout.taps), 84), -9.0, np.float32)
    for i, width in enumerate(
        (5e-4, 5e-4, 2e-3, 2e-3)
    ):  # two each, the same but for the width; a thousandth of a pixel is too thin
        head[0, boxes.start : boxes.stop, i] = 30, 30, width, 20
        head[0, angle.start, i] = 0.3
        head[0, classes.start, i] = 0.9
    assert {tap.tensor for tap in layout.taps} == {boxes.tensor}
    widths = {boxes.tensor: head.shape[1]}
    s = settings_of(Head(layout, ImageInput("images", 64, 64, 32), widths, None), PostprocessConfig())
    outputs = on_cpu()(s, dict.fromkeys(INPUTS, head), (64, 64))
    assert outputs["indices"][0, :4].tolist() == [0, 1, 2, -1]


def test_softmax_of_large_numbers():
    layout = LAYOUTS["background_first"]()
    conf = np.full((1, 6, 84), 300.0, np.float32)
    conf[0, 0], conf[0, 1, :3] = 400.0, (401.0, 399.5, 404.0)  # exponents that float32 does not hold
    boxes = np.random.default_rng(0).uniform(0, 1, (1, 84, 4)).astype(np.float32)
    head = {"conf": conf, "boxes": boxes}
    widths = {"conf": 6, "boxes": 4}
    s = settings_of(Head(layout, ImageInput("images", 64, 64, 32), widths, None), PostprocessConfig())
    outputs = on_cpu()(s, dict.fromkeys(INPUTS, conf) | {"boxes": boxes}, (64, 64))
    expected = postprocess(candidates(head, 0, layout, (64, 64)), PostprocessConfig())
    assert outputs["indices"][0, :4].tolist() == [*expected.indices, -1] == [2, 0, 1, -1]
    np.testing.assert_allclose(outputs["scores"][0, :3], expected.rows.scores, atol=1e-6)


def test_order_of_threads_and_blocks_changes_nothing():
    layout = big_layout()
    runs = [big_run(("crowded", "dense"), layout, schedule=seed, max_candidates=8000)[0] for seed in range(4)]
    for other in runs[1:]:
        for name in OUTPUTS:
            np.testing.assert_array_equal(other[name], runs[0][name], err_msg=name)


@pytest.mark.parametrize("axis", [1, 2])
def test_heads_in_half_precision_are_read_exactly(axis):
    layout = big_layout(axis)
    half, head, _ = big_run(("dense", "unusable"), layout, half=True)
    s = settings_of(
        Head(layout, ImageInput("images", 640, 640, 32), {"dist": 64, "logits": 80}, None), PostprocessConfig()
    )
    wide = {name: values.astype(np.float32) for name, values in head.items()}
    full = on_cpu()(s, dict.fromkeys(INPUTS, wide["logits"]) | {"boxes": wide["dist"]}, (640, 640))
    assert half["num_detections"].min() > 10
    for name in OUTPUTS:
        np.testing.assert_array_equal(half[name], full[name], err_msg=name)


# ---- settings and the node


def test_settings_are_those_of_the_kernels():
    lines = library().describe_settings().decode().split("\n")
    mirrored = []
    for name, kind in Settings._fields_:
        count, element = (kind._length_, kind._type_) if issubclass(kind, ctypes.Array) else (1, kind)
        types = {ctypes.c_int: "int", ctypes.c_float: "float"}
        mirrored.append(f"{name} {types[element]} {count} {getattr(Settings, name).offset}")
    assert lines[:-2] == mirrored
    assert lines[-2] == f"size {ctypes.sizeof(Settings)}"


def test_settings_survive_the_node():
    fused = fused_model(LAYOUTS["anchor_boxes"](), "plugin", score_threshold=0.3)
    settings = Settings.of_node(node_of(fused.model))
    assert settings.to_dict()["anchor_sizes"][:4] == [10.0, 13.0, 16.0, 30.0]
    assert bytes(Settings.of_dict(settings.to_dict())) == bytes(settings)


def change_attribute(model, name, value):
    node = node_of(model)
    node.attribute.remove(next(entry for entry in node.attribute if entry.name == name))
    if value is not None:
        node.attribute.append(onnx.helper.make_attribute(name, value))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bins", 8, r"contradicts the metadata \(bins\)"),
        ("overlap_limit", 0.5, r"contradicts the metadata \(overlap_limit\)"),
        ("classes", None, "classes is 'missing'"),
        ("strides", [8.5, 16.0], "strides is"),
    ],
)
def test_node_that_was_changed_is_refused(name, value, message):
    fused = fused_model(LAYOUTS["distances"](), "plugin")
    change_attribute(fused.model, name, value)
    with pytest.raises(SourceError, match=message):
        verification.verify(fused)


def test_swapped_inputs_are_refused():
    fused = fused_model(LAYOUTS["corners_rows"](), "plugin")
    node = node_of(fused.model)
    node.input[1], node.input[2] = node.input[2], node.input[1]
    with pytest.raises(SourceError, match=r"contradicts the metadata \(inputs\)"):
        verification.verify(fused)


@pytest.mark.parametrize(
    ("decode", "channels", "message"),
    [
        (Distances((8, 16), 65), 260, "65 bins"),
        (Distances((2, 4, 8, 16, 32, 64, 128, 256, 512), 1), 4, "9 levels"),
        (AnchorBoxes((8,), (((1.0, 2.0),) * 33,)), 4, "33 anchor boxes"),
    ],
)
def test_head_with_more_than_the_kernels_have_room_for_is_refused(decode, channels, message):
    layout = Layout("t", Tap("b", 1, 0, channels), Tap("c", 1, 0, 3), None, Activation.SIGMOID, decode)
    head = Head(layout, ImageInput("images", 64, 64, 32), {"b": channels, "c": 3}, None)
    with pytest.raises(
        UnsupportedByBackendError, match=f"{message}, more than its kernels support; take backend portable"
    ):
        settings_of(head, PostprocessConfig())


def test_boxes_that_are_finished_need_no_image():
    layout = Layout("t", Tap("b", 2, 0, 4), Tap("c", 2, 0, 3), None, Activation.NONE, Decoded(BoxFormat.XYXY))
    settings = settings_of(
        Head(layout, ImageInput("x", 64, 96, 32, dynamic_size=True), {"b": 4, "c": 3}, None), PostprocessConfig()
    )
    assert (settings.height, settings.width) == (64, 96)


# ---- compiled


@pytest.mark.covering(default=0)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles_the_kernels(architecture):
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-python (pip install 'fusenms[plugin]')")
    ptx = compile_ptx(SOURCE.read_text(), f"compute_{architecture}").decode()
    assert f".target sm_{architecture}" in ptx
    entries = {line.split("(")[0].split()[-1] for line in ptx.splitlines() if ".visible .entry" in line}
    assert entries == {
        *(f"fused_nms_select_{kind}" for kind in ("float", "half")),
        *(f"fused_nms_suppress_{kind}" for kind in ("upright", "oriented")),
    }


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvcc_compiles_the_kernels(tmp_path, architecture):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on this machine")
    out = tmp_path / "kernels.cubin"
    command = [
        "nvcc",
        "-cubin",
        f"-arch=sm_{architecture}",
        "-Xptxas",
        "-v",
        "-Werror",
        "all-warnings",
        str(SOURCE),
        "-o",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" 0 bytes spill stores, 0 bytes spill loads") == done.stderr.count("spill stores") >= 4
    shared = [int(word.split()[0]) for word in done.stderr.split(", ") if word.split("\n")[0].endswith("bytes smem")]
    assert max(shared) <= 48 << 10  # what a launch gets without asking for more


@pytest.mark.thorough
@pytest.mark.covering(default=1, quick=0)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("layout", ["distances", "oriented", "anchor_boxes"])
def test_kernels_with_their_settings_built_in_compile(layout, half):
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-python (pip install 'fusenms[plugin]')")
    for threshold in (0.0, 0.25, 1.0):  # of logits: infinite, finite
        model = fused_model(LAYOUTS[layout](), "plugin", score_threshold=threshold).model
        ptx = compile_ptx(baked_source(Settings.of_node(node_of(model)), half)).decode()
        assert ptx.count(".visible .entry") == 2


def test_source_that_nvrtc_refuses_is_an_error():
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-python (pip install 'fusenms[plugin]')")
    with pytest.raises(EngineBuildError, match=r"NVRTC cannot compile the plugin's kernels: .*static assertion failed"):
        compile_ptx(
            "#define FUSENMS_BAKED 1, 2\n#define FUSENMS_ELEMENT float\n#define FUSENMS_KIND Upright\n"
            + SOURCE.read_text()
        )


# ---- into engines


def test_node_is_split_into_one_for_each_kernel():
    fused = fused_model(LAYOUTS["masks"](), "plugin", indices=True)
    node, whole = node_of(fused.model), split(fused.model)
    select, suppress = (node for node in whole.graph.node if node.op_type.startswith(PLUGIN))
    assert list(suppress.input) == list(select.output)
    assert list(suppress.output[:5]) == list(node.output)
    assert [entry.name for entry in whole.graph.output] == [entry.name for entry in fused.model.graph.output]
    made = {name for node in whole.graph.node for name in node.output} | {entry.name for entry in whole.graph.input}
    assert {name for node in whole.graph.node for name in node.input} <= made | {
        item.name for item in whole.graph.initializer
    } | {""}
    given = {entry.name: onnx.helper.get_attribute_value(entry) for entry in select.attribute}
    assert (given["plugin_namespace"], given["aot"]) == (b"fusenms", 1)


@pytest.mark.parametrize("layout", ["distances", "oriented", "anchor_boxes"])
def test_carried_kernels_are_given_what_they_take(layout):
    """A stand-in for TensorRT's layer, which calls what is registered with it; NVIDIA's own was tried by hand."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-python (pip install 'fusenms[plugin]')")
    describe, launch = {}, {}
    plugins = SimpleNamespace(
        TensorDesc=object, KernelLaunchParams=SimpleNamespace, SymExprs=tuple, SymInt32=int,
        SymIntExprs=SimpleNamespace(from_tuple=tuple), cdiv=lambda a, b: -(-a // b),
        from_shape_expr=lambda shape, dtype: SimpleNamespace(shape_expr=shape, dtype=dtype),
        register=lambda name: partial(describe.setdefault, name), aot_impl=lambda name: partial(launch.setdefault, name),
    )  # fmt: skip
    _register(SimpleNamespace(int32="int32", float32="float32", float16="float16"), plugins)
    fused = fused_model(LAYOUTS[layout](), "plugin", max_detections=20)
    select, suppress = (node for node in split(fused.model).graph.node if node.op_type.startswith(PLUGIN))
    shapes = dict(zip(fused.layout.tensors, shapes_of(fused.layout).values(), strict=True))
    known = {name: plugins.from_shape_expr((2, *shape), "float32") for name, shape in shapes.items()}
    for node, grid, threads in ((select, (-(-candidates_of(fused.layout) // 64), 2), 256), (suppress, (2, 1), 1024)):
        given = [known[name] for name in node.input]
        settings = next(entry.s.decode() for entry in node.attribute if entry.name == "settings")
        made = describe[f"fusenms::{node.op_type}"](*given, settings)
        known |= dict(zip(node.output, made, strict=True))
        name, ptx, how, numbers = launch[f"fusenms::{node.op_type}"](*given, settings, made, None)
        parameters = ptx.decode().split(f".entry {name}(")[1].split(")")[0].count(".param")
        assert parameters == len(given) + len(numbers) + len(made)
        assert ((how.grid_x, how.grid_y), how.block_x) == (grid, threads)
    box = 5 if layout == "oriented" else 4
    assert [known[name].shape_expr for name in node_of(fused.model).output] == [
        (2, 1), (2, 20, box), (2, 20), (2, 20), (2, 20),
    ]  # fmt: skip


def test_version_that_carries_no_plugins_names_the_ways_out():
    model = fused_model(LAYOUTS["distances"](), "plugin").model
    with pytest.raises(
        UnsupportedByBackendError, match=r"plugin_library \(make plugin\), or fuse .* backend='portable'"
    ):
        carried(onnx, "TensorRT 8.5", "m.onnx", model)  # a module without plugins


@pytest.mark.parametrize("content", [None, b"no library"])
def test_plugin_library_that_is_none_is_an_error(tmp_path, content):
    path = tmp_path / "lib.so"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError, match="cannot be opened as a plugin library"):
        load_plugin_library(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rest_of_the_graph_passes_the_parser(tmp_path, layout):
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX (pip install 'fusenms[rtx]')")
    path = tmp_path / "m.onnx"
    onnx.save(fused_model(LAYOUTS[layout](), "plugin", indices=True).model, path)
    assert check_trt_graph(str(path)).plugin == (PLUGIN if LAYOUTS[layout]().suppress else None)


def test_graph_with_a_wrong_node_does_not_pass(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX (pip install 'fusenms[rtx]')")
    for name, value, message in (
        ("classes", [1, 7, 0], "not three sizes with 7 channels"),
        ("plugin_namespace", "", "version and namespace are"),
        ("bins", None, "missing"),
    ):
        model = fused_model(LAYOUTS["distances"](), "plugin").model
        change_attribute(model, name, value)
        onnx.save(model, tmp_path / "m.onnx")
        with pytest.raises(UnsupportedByBackendError, match=message):
            check_trt_graph(str(tmp_path / "m.onnx"))


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [str(SHAPES / "shapes.pt"), "--size", "64", "--backend", "plugin", "--max-candidates", "9000"]
    assert main([*command, "--engine", "none"]) == 0
    assert "FusedNMS" in capsys.readouterr().out
    assert main(["verify", "shapes.plugin.onnx"]) == 0
    assert main(["engine", "shapes.plugin.onnx", "--builder", "rtx"]) == 1
    assert "has no plugin FusedNMS" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.rtx*"))
