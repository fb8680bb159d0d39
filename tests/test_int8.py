"""int8: the network up to its last convolutions in Q/DQ form, the rest in float32; what that changes is measured and bounded."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial

import cv2
import numpy as np
import onnx
import pytest
from conftest import ROOT, SHAPES
from onnx import numpy_helper
from raw_heads import LAYOUTS, raw_model

from fusenms import Detector, configure, convert, evaluate, fuse, load, load_fused, quantization, recognize, verify
from fusenms.cli import main
from fusenms.config import PostprocessConfig
from fusenms.errors import ConfigError, DriftError, InputError, UnsupportedByBackendError
from fusenms.events import QuantizedNetwork
from fusenms.fusion.backends import BACKENDS
from fusenms.fusion.tail import fuse_head
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.heads import raw_head
from fusenms.quantization import AUTO, HELD_OUT, Int8Settings, Quantized, _Work, quantize
from fusenms.runtime.image_set import ImageSet, listed
from fusenms.runtime.images import list_images
from fusenms.transforms.int8 import SCHEMES, calibrate, network_of, places, rank, to_int8
from fusenms.transforms.int8.places import BETWEEN
from fusenms.verification.agreement import Agreement

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_exports")]

SIZE = 128


@pytest.fixture(autouse=True)
def _short_calibration(request, monkeypatch):
    """Ranges of all values, which take a tenth of the time, but where the usual ones are meant."""
    if "usual_ranges" not in request.fixturenames:
        monkeypatch.setattr(quantization, "calibrate", partial(calibrate, method="minmax"))


@pytest.fixture
def usual_ranges() -> None:
    """Marks a test that takes the usual ranges."""


@pytest.fixture(scope="module")
def drawn() -> list[np.ndarray]:
    """Images of the embedded detector's shapes, ``[128, 128, 3]`` uint8."""
    sys.path.insert(0, str(ROOT / "models" / "shapes"))
    from images import draw_image

    rng = np.random.default_rng(3)
    return [draw_image(rng, SIZE, SIZE, radii=(10.0, 30.0), least=4, most=8)[0] for _ in range(22)]


@pytest.fixture(scope="module")
def small():
    """The embedded detector, its head and its network."""
    raw = load(SHAPES / "shapes.pt", size=SIZE)
    head = raw_head(raw, recognize(raw))
    return raw, head, network_of(raw, head.layout)


def work(small, images, **changes) -> Quantized:
    raw, head, _ = small
    settings = {"backend": "ort", "settings": Int8Settings(keep_float=0)} | changes
    return quantize(raw, head, ImageSet(images, (SIZE, SIZE), head.stretch), **settings)


def fused_int8(drawn, **changes):
    return fuse(
        SHAPES / "shapes.pt", **{"size": SIZE, "precision": "int8", "calibrate": drawn, "keep_float": 0} | changes
    )


def types_of(model: onnx.ModelProto, operator: str) -> set[int]:
    values = {item.name: item.data_type for item in model.graph.initializer}
    return {values[node.input[2]] for node in model.graph.node if node.op_type == operator}


@pytest.mark.covering(default=0)
@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_equals_reference_and_finds_nearly_the_same(backend, drawn, tmp_path, usual_ranges):
    found: list[Quantized] = []
    keep = lambda event: found.append(event.quantized) if isinstance(event, QuantizedNetwork) else None  # noqa: E731
    fused = fused_int8(drawn, backend=backend, on_event=keep)
    assert fused.report, fused.report
    drift = found[0].drift
    assert drift.before > 10
    assert drift.drift < 0.1
    assert 0 < drift.worst_score < 0.1  # 0: nothing is quantized
    read = load_fused(fused.save(tmp_path / "m.onnx"))
    assert read.precision == "int8"
    assert found[0].summary in read.notes
    assert types_of(read.model, "QuantizeLinear") == {
        onnx.TensorProto.UINT8 if backend == "ort" else onnx.TensorProto.INT8
    }


def test_images_of_a_batch_stay_independent(drawn):
    fused = fused_int8(drawn, unverified=True)
    images = ImageSet(drawn, (SIZE, SIZE), False)
    batch = np.stack([images[i] for i in range(3)])
    runner = OnnxRuntimeRunner(fused.model)
    together = runner.infer(batch)
    for i in range(3):
        alone = runner.infer(batch[i : i + 1])
        for name, value in alone.items():
            np.testing.assert_array_equal(together[name][i], value[0])


def test_weights_are_int8_by_channel_and_the_ends_are_float(small, drawn):
    _, head, network = small
    where = places(network)
    model = work(small, drawn).raw.model
    made = {name: node for node in model.graph.node for name in node.output}
    values = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    quantized = set()
    for node in model.graph.node:
        if node.op_type == "Conv" and (reader := made.get(node.input[1])) is not None:
            assert reader.op_type == "DequantizeLinear"
            weights, scale, zero = (values[name] for name in reader.input)
            assert weights.dtype == np.int8
            assert scale.shape == weights.shape[:1]
            assert not zero.any()
            quantized.add(node.name)
    assert quantized == {layer.name for layer in where.layers}
    assert not quantized & {layer.name for layer in (*where.first, *where.last)}
    assert len(where.first) == 1
    for name in head.layout.sources:  # from the head back to the last convolutions: nothing is rounded
        todo = [name]
        while todo:
            node = made.get(todo.pop())
            if node is not None and node.op_type != "Conv":
                assert node.op_type not in ("QuantizeLinear", "DequantizeLinear")
                todo += node.input


def test_what_tensorrt_takes(small, drawn):
    """Int8 around 0, biases in float32, and nothing rounded that no convolution reads."""
    model = work(small, drawn, backend="portable").raw.model
    values = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert values[node.input[2]].dtype == np.int8
            assert not values[node.input[2]].any()
        if node.op_type == "DequantizeLinear":
            assert "Conv" in readers[node.output[0]]
        if node.op_type == "Conv" and len(node.input) > 2:
            assert made.get(node.input[2], "Identity") == "Identity"


def test_drift_is_of_the_graph_that_is_written(small, drawn):
    """A scale that is wrong by a factor of four is seen."""
    raw, head, network = small
    where = places(network)
    images = ImageSet(drawn, (SIZE, SIZE), head.stretch)
    inputs = [image[None] for image in images]
    calibrated = calibrate(network, inputs, gates=where.gates, method="minmax")
    good = to_int8(raw, network, where, calibrated, scheme=SCHEMES["ort"])
    bad = onnx.ModelProto()
    bad.CopyFrom(good.model)
    changed = {node.input[1] for node in bad.graph.node if node.op_type == "QuantizeLinear"}
    for item in bad.graph.initializer:
        if item.name in changed:
            item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item) / 4, item.name))
    tried = _Work(raw, head, images[:2], SCHEMES["ort"], lambda *_: None)
    assert tried.drift(good, images).drift < 0.1
    assert tried.drift(replace(good, model=bad), images).drift > 0.3


def test_every_fourth_image_is_held_out(small, drawn, monkeypatch):
    seen = []
    real = quantization.calibrate
    monkeypatch.setattr(
        quantization, "calibrate", lambda net, images, **more: real(net, (seen.append(i) or i for i in images), **more)
    )
    found = work(small, drawn)
    every = ImageSet(drawn, (SIZE, SIZE), False)
    assert found.held_out
    assert len(seen) == len(drawn) - len(drawn) // HELD_OUT == 17
    assert found.drift.images == len(drawn) // HELD_OUT
    assert not any(np.array_equal(image[0], every[i]) for image in seen for i in range(3, len(drawn), 4))
    few = work(small, drawn[:16])
    assert not few.held_out
    assert few.drift.images == 16
    assert "calibrated images" in few.summary


def test_one_image_is_in_memory_at_a_time(small):
    alive = []

    class Watched(ImageSet):
        def __getitem__(self, index):
            alive.append(index)
            return super().__getitem__(index)

    _, _, network = small
    images = Watched(np.zeros((20, 3, SIZE, SIZE), np.float32), (SIZE, SIZE), False)
    order = []
    calibrate(
        network, (images[i][None] for i in range(20)), gates=frozenset(), method="minmax",
        progress=lambda done: order.append((done, len(alive))),
    )  # fmt: skip
    assert order == [(i, i) for i in range(1, 21)]


def test_gates_are_cut_where_silu_is_nearly_zero(small):
    _, _, network = small
    where = places(network)
    images = [np.random.default_rng(i).random((1, 3, SIZE, SIZE), np.float32) for i in range(2)]
    whole = calibrate(network, images, gates=frozenset(), method="minmax").ranges
    cut = calibrate(network, images, gates=where.gates, method="minmax").ranges
    lows = {name: [np.ravel(found[name].range_value[0])[0] for found in (whole, cut)] for name in where.gates}
    assert min(low for low, _ in lows.values()) < -4.5
    assert all(new == max(old, -4.0) for old, new in lows.values())


@pytest.mark.thorough
def test_ranking_names_the_convolution_that_is_made_dear(small, drawn):
    """A convolution whose weights in one channel span a factor of 1000 more than they need loses the most."""
    raw, head, network = small
    where = places(network)
    dear = where.layers[len(where.layers) // 2].name
    spoiled = onnx.ModelProto()
    spoiled.CopyFrom(network)
    node = next(node for node in spoiled.graph.node if node.name == dear)
    for item in spoiled.graph.initializer:
        if item.name == node.input[1]:
            weights = numpy_helper.to_array(item).copy()
            weights[:, 0, 0, 0] = 1000 * np.abs(weights).max()
            item.CopyFrom(numpy_helper.from_array(weights, item.name))
    images = [ImageSet(drawn, (SIZE, SIZE), False)[i][None] for i in range(2)]
    calibrated = calibrate(spoiled, images, gates=where.gates, method="minmax")
    costs = rank(raw, head.layout, spoiled, where, calibrated=calibrated, scheme=SCHEMES["ort"], images=images[:1])
    assert {cost.layer for cost in costs} == {layer.name for layer in where.layers}
    assert costs[0].layer == dear
    assert costs[0].error > 2 * costs[1].error


@pytest.mark.thorough
def test_dearest_convolutions_stay_float(small, drawn):
    found = work(small, drawn, settings=Int8Settings(keep_float=3))
    assert found.kept == tuple(cost.layer for cost in found.costs[:3])
    made = {name: node for node in found.raw.model.graph.node for name in node.output}
    for node in found.raw.model.graph.node:
        if node.name in found.kept:
            assert node.input[1] not in made


@pytest.mark.thorough
def test_auto_takes_what_drifts_least(small, drawn, monkeypatch):
    tried = []

    def drift(self, quantized, images):
        tried.append(quantized)
        return Agreement(1, 100, 100, 90 + min(len(tried), 3), 0.0, 0.0)

    monkeypatch.setattr(_Work, "drift", drift)
    found = work(small, drawn, settings=Int8Settings(keep_float=AUTO))
    step = len(places(small[2]).layers) // 4 // 4
    assert len(tried) > 4
    assert found.kept == tuple(cost.layer for cost in found.costs[: 2 * step])  # the third try: none after it is better


def test_attention_stays_float(zoo):
    raw = load(zoo / "shapes/rtdetr-p.pt", size=SIZE)
    where = places(network_of(raw, recognize(raw)))
    kinds = {node.name: node.op_type for node in network_of(raw, recognize(raw)).graph.node}
    assert "MatMul" in kinds.values()
    assert {kinds[name] for name in where.between} <= set(BETWEEN)
    assert {kinds[layer.name] for layer in where.layers} == {"Conv"}


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["ort", "portable"])
@pytest.mark.parametrize("weights", ["yolov8-p-seg", "yolo11-p-pose", "yolo26-p-obb", "yolo12-p", "rtdetr-p"])
def test_every_task_and_family(zoo, weights, backend):
    images = list_images(zoo / "shapes/images")
    fused = fuse(
        zoo / f"shapes/{weights}.pt", size=256, precision="int8", calibrate=images, backend=backend, max_drift=0.3
    )
    assert fused.report, fused.report
    assert fused.precision == "int8"


@pytest.mark.parametrize(
    "more",
    [
        {"runtime_thresholds": True},
        {"output_preset": "ultralytics"},
        {"dynamic_size": True},
        {"batch": 2},
    ],
    ids=lambda more: next(iter(more)),
)
@pytest.mark.thorough
def test_with_other_settings(more, drawn, tmp_path):
    fused = fused_int8(drawn, **more)
    assert fused.report, fused.report
    again = load_fused(fused.save(tmp_path / "m.onnx"))
    assert again.precision == "int8"
    assert verify(again)


def test_typed_graph_builds(small, drawn, tmp_path):
    """TensorRT-RTX is strongly typed: it takes int8 with zero point 0, and refuses the graph for ONNX Runtime."""
    rtx = pytest.importorskip("fusenms.engines.rtx")
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX (pip install 'fusenms[rtx]')")
    from fusenms.engines.base import EngineSettings

    _, head, _ = small
    for backend, builds in (("portable", True), ("ort", False)):
        quantized = work(small, drawn, backend=backend).raw
        fused = fuse_head(quantized, head, PostprocessConfig(), "portable")
        path = str(fused.save(tmp_path / f"{backend}.onnx", unverified=True))
        if builds:
            assert len(rtx.build_rtx(path, EngineSettings(batch=(1, 2, 8))).data) > 100_000
        else:
            with pytest.raises(UnsupportedByBackendError):
                rtx.build_rtx(path, EngineSettings(batch=(1, 2, 8)))


def test_error_when_the_drift_is_above_the_limit(small, drawn, tmp_path):
    noise = list(
        np.random.default_rng(0).integers(0, 3, (20, SIZE, SIZE, 3), np.uint8)
    )  # nearly black: ranges too small
    compared = np.stack([ImageSet(drawn, (SIZE, SIZE), False)[i] for i in range(6)])
    with pytest.raises(
        DriftError, match=r"int8 changes \d+\.\d% of the detections .*expected at most 10\.0%"
    ) as caught:
        work(small, noise, compared=compared)
    assert caught.value.drift > 0.1
    assert work(small, noise, compared=compared, settings=Int8Settings(keep_float=0, max_drift=1)).drift.drift > 0.1


def test_error_when_images_show_nothing(small):
    black = np.zeros((20, 3, SIZE, SIZE), np.float32)
    with pytest.raises(InputError, match="finds nothing in the 20 images that the drift is measured on, in float32"):
        work(small, black)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "int8"}, "no images to calibrate on; expected at least 16"),
        ({"calibrate": "photos"}, "found calibrate with precision fp32"),
        ({"keep_float": 2}, "found keep_float with precision fp32"),
        ({"max_drift": 0.2}, "found max_drift with precision fp32"),
        ({"precision": "int8", "calibrate": [], "keep_float": -1}, "keep_float is -1; expected 'auto' or a number"),
        ({"precision": "int8", "calibrate": [], "max_drift": 2}, "max_drift is 2; expected a share from 0 to 1"),
        ({"precision": "int8", "calibrate": []}, "found 0 images to calibrate on; expected at least 16, better 100"),
        ({"precision": "int8", "calibrate": ["a.jpg"] * 16, "frames": (96, 160)}, "found frames and precision int8"),
        ({"precision": "int8", "calibrate": 7}, "found int; expected a folder of images"),
    ],
)
def test_error_before_anything_is_loaded(settings, message):
    with pytest.raises((ConfigError, InputError), match=message):
        fuse("no such file.pt", **settings)


def test_error_when_quantized_half_or_old(zoo, small):
    raw = load(zoo / "yolo11n_dynint8_320.onnx")
    with pytest.raises(ConfigError, match=r"is quantized \(ConvInteger.*precision int8 is for float32 models"):
        network_of(raw, recognize(raw))
    raw, head, _ = small
    old = onnx.ModelProto()
    old.CopyFrom(raw.model)
    old.opset_import[0].version = 12
    with pytest.raises(ConfigError, match="opset 12; expected at least 13 for precision int8"):
        network_of(replace(raw, model=old), head.layout)


def test_error_when_nothing_can_be_quantized():
    layout = LAYOUTS["distances"]()
    raw = raw_model(layout)
    images = ImageSet(
        np.zeros((16, 3, raw.image.height, raw.image.width), np.float32), (raw.image.height, raw.image.width), False
    )
    with pytest.raises(ConfigError, match="has no convolutions to quantize"):
        quantize(raw, raw_head(raw, layout), images, backend="ort", settings=Int8Settings())


def test_error_when_more_is_kept_than_there_is(small, drawn):
    with pytest.raises(ConfigError, match=r"keep_float is 1000, but shapes\.pt has 52 convolutions"):
        work(small, drawn, settings=Int8Settings(keep_float=1000))


def test_list_of_images(tmp_path, drawn):
    for i in range(2):
        cv2.imwrite(str(tmp_path / f"{i}.png"), drawn[i][..., ::-1])
    (tmp_path / "list.txt").write_text("# two\n0.png\n\n1.png\n")
    images = ImageSet(listed(tmp_path / "list.txt"), (SIZE, SIZE), False)
    np.testing.assert_array_equal(images[1], drawn[1].transpose(2, 0, 1) / np.float32(255))
    assert len(images) == 2
    (tmp_path / "list.txt").write_text("0.png\nno.png\n")
    with pytest.raises(InputError, match=r"1 of 2 images are not there, the first is .*no\.png"):
        listed(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(InputError, match="names no images"):
        listed(tmp_path / "list.txt")
    with pytest.raises(InputError, match="is one image; expected a folder"):
        listed(tmp_path / "0.png")
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is no text"):
        listed(tmp_path / "list.txt")
    with pytest.raises(InputError, match=r"found images float64\[2, 3, 4, 4\]"):
        ImageSet(np.zeros((2, 3, 4, 4)), (SIZE, SIZE), False)


def test_command_line(tmp_path, monkeypatch, capsys, drawn):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(drawn):
        cv2.imwrite(str(tmp_path / "photos" / f"{i:02}.png"), image[..., ::-1])
    command = [str(SHAPES / "shapes.pt"), "--size", str(SIZE), "--precision", "int8", "--calibrate", "photos"]
    assert main([*command, "--keep-float", "1", "-o", "m.onnx", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["int8"]["drift"]["held_out"] is True
    assert said["int8"]["drift"]["share"] <= 0.1
    assert len(said["int8"]["kept"]) == 1
    assert len(said["int8"]["costs"]) == 52
    assert main([*command, "--keep-float", "0", "--max-drift", "0", "-o", "n.onnx"]) in (0, 1)
    said = capsys.readouterr()
    assert ("drift 0.0%" in said.out) == (tmp_path / "n.onnx").exists()
    assert main([*command[:-1], "photos/00.png", "-o", "n2.onnx"]) == 1
    assert "is one image" in capsys.readouterr().err
    assert not (tmp_path / "n2.onnx").exists()


@pytest.mark.thorough
def test_command_line_with_ground_truth(tmp_path, monkeypatch, capsys, drawn):
    pytest.importorskip("faster_coco_eval")
    monkeypatch.chdir(tmp_path)
    for name in ("images", "labels"):
        (tmp_path / "set" / name).mkdir(parents=True)
    detect = Detector(fuse(SHAPES / "shapes.pt", size=SIZE, unverified=True))
    for i, image in enumerate(drawn):  # the objects are what float32 finds
        cv2.imwrite(str(tmp_path / "set" / "images" / f"{i:02}.png"), image[..., ::-1])
        lines = [
            " ".join(map(str, (label, *cxcywh / np.array([image.shape[1], image.shape[0]] * 2))))
            for box, _, label in detect(np.ascontiguousarray(image))[0]
            for cxcywh in [np.concatenate(((box[:2] + box[2:]) / 2, box[2:] - box[:2]))]
        ]
        (tmp_path / "set" / "labels" / f"{i:02}.txt").write_text("\n".join(lines) + "\n")
    command = [str(SHAPES / "shapes.pt"), "--size", str(SIZE), "--yolo", "set"]
    quantized = [*command, "--precision", "int8", "--calibrate", "set/images", "--keep-float", "0"]
    assert main([*quantized, "-o", "m.onnx", "--json", "--max-drift", "1"]) == 0
    said = json.loads(capsys.readouterr().out)["int8"]["map"]
    assert said["images"] == len(drawn) <= said["objects"]
    before, after = said["map50_95"]
    assert before == pytest.approx(evaluate(SHAPES / "shapes.pt", yolo="set", size=SIZE).map50_95)
    own = configure("m.onnx", score_threshold=0.001, iou_threshold=0.7, multi_label=True)
    assert after == pytest.approx(evaluate(own.model, yolo="set").map50_95)
    assert 0 < after < before - 0.001
    note = load_fused("m.onnx").notes[-1]
    assert f"mAP50-95 {100 * said['map50_95'][0]:.2f} -> {100 * said['map50_95'][1]:.2f}" in note
    assert main([*command, "-o", "n.onnx"]) == 1
    assert "found --yolo with --precision fp32" in capsys.readouterr().err
    assert main([*quantized[:-1], "0", "--yolo", "nothing", "-o", "n.onnx"]) == 1
    assert "nothing" in capsys.readouterr().err and not (tmp_path / "n.onnx").exists()


def test_file_is_converted_only_where_its_form_is_known(drawn, tmp_path):
    """Settings and backends of the same form can change; another form of int8 needs the weights."""
    fused = fuse(SHAPES / "shapes.pt", size=SIZE, precision="int8", calibrate=drawn, keep_float=0, backend="portable")
    path = fused.save(tmp_path / "m.portable.onnx")
    made = convert(path, "trt", score_threshold=0.4)
    assert made.report and made.model.precision == "int8"
    assert configure(path, max_detections=50).report
    with pytest.raises(UnsupportedByBackendError, match="takes int8 in another form"):
        convert(path, "ort")
