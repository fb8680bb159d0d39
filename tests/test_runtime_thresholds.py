"""Thresholds and a class mask as optional inputs of the graph: against the reference, against other truths, and sabotaged."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal, localcontext
from itertools import product

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from raw_heads import LAYOUTS, SIZE, candidates_of, fused_model, raw_model, shapes_of, tail_of

import fusenms
from fusenms import EngineSettings, FusedModel, PostprocessConfig, fuse, load_fused, verify
from fusenms.config import Thresholds
from fusenms.errors import ConfigError, RunError, SourceError, UnsupportedByBackendError
from fusenms.graph.defaults import with_defaults
from fusenms.graph.model import optional_inputs, with_outputs
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.layout import Layout, Tap
from fusenms.reference import Rows, candidates, matches, postprocess
from fusenms.runtime.placement import load_tensor
from fusenms.verification.settings import Setting, settings
from fusenms.verification.synthetic_heads import Stage, heads

BACKENDS = ("ort", "portable")
SCORES, IOUS = (0.0, 0.1, 0.25, 0.5, 1.0), (0.0, 0.45, 0.7)
KINDS = {
    "distances": ("distances", {}),
    "multi_label": ("distances", {"multi_label": True}),
    "agnostic": ("distances", {"class_agnostic": True}),
    "few_candidates": ("decoded", {"max_candidates": 20, "max_detections": 9}),
    "objectness": ("anchor_boxes", {}),
    "decoded_objectness": ("decoded_objectness", {}),
    "softmax": ("background_first", {}),
    "weighted": ("weighted", {}),
    "oriented": ("oriented", {}),
    "end_to_end": ("end_to_end", {}),
    "queries": ("queries", {}),
    "finished_rows": ("finished_rows", {}),
    "masks": ("masks", {"masks": "prototype"}),
    "rounds": ("distances", {"rounds": 30}),
}

USUAL = ("distances", "multi_label", "oriented", "end_to_end")


def with_inputs(layout: Layout, backend: str = "ort", **config: object) -> FusedModel:
    return fused_model(layout, backend, runtime_thresholds=True, **config)


def masks_of(classes: int) -> list[tuple[bool, ...]]:
    return [(True,) * classes, tuple(i % 2 == 0 for i in range(classes))]


def observed(outputs: dict[str, np.ndarray], image: int) -> Rows:
    count, boxes, scores, labels = (outputs[name][image] for name in ("num_detections", "boxes", "scores", "labels"))
    n = int(count[0])
    return Rows(boxes[:n].astype(np.float64), scores[:n].astype(np.float64), labels[:n])


def differs(rows: Rows, expected: Rows) -> bool:
    pairs = zip(expected.boxes, expected.scores, expected.labels, strict=True)
    return len(rows) != len(expected) or not all(matches(rows, i, *pair) for i, pair in enumerate(pairs))


@pytest.mark.covering(default=1, quick=0)
@pytest.mark.parametrize(
    "kind", [kind if kind in USUAL else pytest.param(kind, marks=pytest.mark.thorough) for kind in KINDS]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_thirty_settings_equal_thirty_references(backend, kind):
    """5 score thresholds, 3 IoU thresholds, 2 masks; one file."""
    name, config = KINDS[kind]
    if kind == "rounds" and backend == "ort":
        pytest.skip("only backend portable has rounds")
    fused = with_inputs(LAYOUTS[name](), backend, **config)
    layout = fused.layout
    tail, shapes, counts = tail_of(fused), shapes_of(layout), set()
    for score, iou, mask in product(SCORES, IOUS, masks_of(layout.num_classes or 1)):
        setting = Setting("", Thresholds((score,), iou, mask if layout.num_classes else None))
        stage = Stage(layout, fused.config, fused.image, candidates_of(layout), setting.thresholds)
        head = heads(stage, ("dense", "thresholds"), shapes, seed=5)
        outputs = tail.run(head | setting.inputs(layout, fused.config))
        for i in range(2):
            rows = observed(outputs, i)
            expected = postprocess(candidates(head, i, layout, (SIZE, SIZE)), fused.config, rows, setting.thresholds)
            assert not differs(rows, expected.rows), (setting, i)
            counts.add((len(rows), setting.thresholds))
    assert len({count for count, _ in counts}) > 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_thirty_settings_of_a_checkpoint_equal_thirty_references(zoo, backend):
    images = load_tensor(zoo / "photos", 320, 320, False)[:4]
    fused = fuse(zoo / "derived" / "yolov8n.pt", size=320, backend=backend, runtime_thresholds=True)
    layout, seen = fused.layout, 0
    runner = OnnxRuntimeRunner(with_outputs(fused.model, layout.tensors))
    for score, iou, mask in product((0.01, 0.1, 0.25, 0.5, 0.8), (0.2, 0.45, 0.7), masks_of(layout.num_classes)):
        setting = Setting("", Thresholds((score,), iou, mask))
        outputs = runner.run({fused.image.tensor: images} | setting.inputs(layout, fused.config))
        for i in range(len(images)):
            rows = observed(outputs, i)
            found = candidates(outputs, i, layout, (320, 320))
            assert not differs(rows, postprocess(found, fused.config, rows, setting.thresholds).rows)
            seen += len(rows)
    assert seen > 300


@pytest.mark.parametrize(
    "kind", ["distances", "multi_label", "objectness", "softmax", "oriented", "end_to_end", "finished_rows"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_fed_is_as_without_inputs(backend, kind):
    name, config = KINDS[kind]
    layout, config = LAYOUTS[name](), config | {"score_threshold": 0.3, "iou_threshold": 0.6}
    plain, given = fused_model(layout, backend, **config), with_inputs(layout, backend, **config)
    assert plain.layout == given.layout
    stage = Stage(plain.layout, plain.config, plain.image, candidates_of(layout))
    head = heads(stage, ("random", "dense", "ties", "thresholds", "crowded"), shapes_of(plain.layout), seed=2)
    plain, given = tail_of(plain).run(head), tail_of(given).run(head)
    assert plain["num_detections"].any()
    for name, value in plain.items():
        np.testing.assert_array_equal(given[name], value)


def exact_logit_is_below(threshold: float, logit: float) -> bool:
    """Whether the sigmoid of a logit is above the threshold, in sixty digits."""
    with localcontext() as context:
        context.prec = 60
        p = Decimal(threshold)
        return p == 0 or (p < 1 and (p / (1 - p)).ln() < Decimal(logit))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["distances", "end_to_end"])
def test_scores_beside_the_threshold_are_decided_exactly(backend, layout):
    """Logits one float32 to either side of where a sigmoid is the threshold."""
    layout = LAYOUTS[layout](1)
    tail, shape = tail_of(with_inputs(layout, backend)), shapes_of(layout)
    thresholds = [0.0, 1.0, 0.5, 0.25, 0.9, 1e-6, 1e-30, 0.49999725818634033, 0.5 + 2**-24, 1 - 2**-24]
    thresholds += np.random.default_rng(0).uniform(0, 1, 60).tolist()
    for threshold in np.array(thresholds, np.float32):
        wide = np.float64(threshold)
        with np.errstate(divide="ignore"):
            at = np.float32(np.log(wide) - np.log1p(-wide)).clip(-80, 80)
        sides = [
            at,
            np.nextafter(at, np.float32(99)),
            np.nextafter(at, np.float32(-99)),
            np.float32(-3.4e38),
            np.float32(88),
        ]
        head = {name: np.full((1, *size), -np.inf, np.float32) for name, size in shape.items()}
        head["dist"][:] = 0.0
        head["logits"][0, 0, : len(sides)] = sides
        fed = {"score_threshold": threshold[None]} | ({"iou_threshold": np.float32([1])} if layout.suppress else {})
        found = tail.run(head | fed)["num_detections"][0, 0]
        assert found == sum(exact_logit_is_below(float(threshold), float(x)) for x in sides), threshold


@pytest.mark.parametrize("backend", BACKENDS)
def test_threshold_of_its_best_class_decides(backend):
    """The second candidate is above the threshold of its second class, but not of its best one."""
    layout = LAYOUTS["corners_rows"](3)
    head = {f"head_{name}": np.zeros((1, *size), np.float32) for name, size in shapes_of(layout).items()}
    head["head_boxes"][0, :3] = [[0, 0, 8, 8], [16, 16, 24, 24], [32, 32, 40, 40]]
    head["head_scores"][0, :3] = [[0.6, 0, 0], [0.4, 0.3, 0.4], [0, 0.2, 0]]
    found = tail_of(with_inputs(layout, backend)).run(head | {"score_threshold": np.array([0.5, 0.1, 0.1], np.float32)})
    assert found["labels"][0, :3].tolist() == [0, 1, -1]
    each = tail_of(with_inputs(layout, backend, multi_label=True))
    found = each.run(head | {"score_threshold": np.array([0.5, 0.1, 0.1], np.float32)})
    assert sorted(found["labels"][0, :5].tolist()) == [-1, 0, 1, 1, 2]


@pytest.mark.parametrize("kind", ["distances", "multi_label", "objectness", "end_to_end"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_classes_are_as_if_the_network_did_not_know_them(backend, kind):
    """The same head without their channels."""
    name, config = KINDS[kind]
    layout, keep = LAYOUTS[name](5), [0, 2, 3]
    stage = Stage(layout, PostprocessConfig(**config), raw_model(layout).image, candidates_of(layout))
    head = heads(stage, ("random", "dense", "ties", "crowded"), shapes_of(layout), seed=4)
    mask = np.isin(np.arange(5), keep)
    got = tail_of(with_inputs(layout, backend, **config)).run(head | {"class_mask": mask})
    few, tap = LAYOUTS[name](3), layout.classes
    fewer = dict(head)
    values = np.moveaxis(head[tap.tensor], tap.channel_axis, -1)
    chosen = [*range(tap.start), *(tap.start + i for i in keep), *range(tap.stop, values.shape[-1])]
    fewer[tap.tensor] = np.ascontiguousarray(np.moveaxis(values[..., chosen], -1, tap.channel_axis))
    expected = tail_of(fused_model(few, "ort", **config)).run(fewer)
    names = np.array([*keep, -1])
    np.testing.assert_array_equal(got["labels"], names[expected["labels"]])
    np.testing.assert_allclose(got["boxes"], expected["boxes"], atol=1e-4)
    assert expected["num_detections"].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_class_counts(backend):
    layout = LAYOUTS["weighted"]()
    stage = Stage(layout, PostprocessConfig(), raw_model(layout).image, candidates_of(layout))
    head = heads(stage, ("crowded",), shapes_of(layout), seed=4)
    tail = tail_of(with_inputs(layout, backend))
    assert tail.run(head)["num_detections"].any()
    assert not tail.run(head | {"class_mask": np.zeros(5, bool)})["num_detections"].any()


# The inputs.


def test_inputs_are_optional_and_have_the_defaults_of_the_settings():
    model = with_inputs(LAYOUTS["distances"](), score_threshold=0.4, iou_threshold=0.3).model
    onnx.checker.check_model(model, full_check=True)
    declared = {
        e.name: [d.dim_value or d.dim_param for d in e.type.tensor_type.shape.dim] for e in optional_inputs(model)
    }
    assert declared == {"score_threshold": ["score_threshold_length"], "iou_threshold": [1], "class_mask": [5]}
    defaults = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer if item.name in declared}
    assert defaults["score_threshold"] == np.float32(0.4)
    assert defaults["iou_threshold"] == np.float32(0.3)
    assert defaults["class_mask"].all()


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("end_to_end", ["score_threshold", "class_mask"]),
        ("finished_rows", ["score_threshold"]),
        ("oriented", ["score_threshold", "iou_threshold", "class_mask"]),
    ],
)
def test_a_head_has_the_inputs_that_mean_something_to_it(layout, names):
    layout = LAYOUTS[layout]()
    assert [given.name for given in layout.runtime_inputs(PostprocessConfig(runtime_thresholds=True))] == names
    assert [entry.name for entry in optional_inputs(with_inputs(layout).model)] == names
    assert layout.runtime_inputs(PostprocessConfig()) == ()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("length", "runs"), [(1, True), (5, True), (3, False), (0, False)])
def test_score_threshold_has_one_value_or_one_for_each_class(backend, length, runs):
    layout = LAYOUTS["distances"](5)
    tail = tail_of(with_inputs(layout, backend))
    head = {name: np.zeros((2, *size), np.float32) for name, size in shapes_of(layout).items()}
    fed = head | {"score_threshold": np.full(length, 0.2, np.float32)}
    if runs:
        assert tail.run(fed)["num_detections"].shape == (2, 1)
    else:
        with pytest.raises(RunError):
            tail.run(fed)


@pytest.mark.parametrize("backend", ["trt", "plugin"])
def test_error_at_once_when_the_backend_has_no_inputs(backend):
    with pytest.raises(UnsupportedByBackendError, match=rf"backend {backend}: .* take backend ort or portable"):
        fuse("there-is-no-such-file.pt", backend=backend, runtime_thresholds=True)


def test_error_when_the_setting_is_no_bool():
    with pytest.raises(ConfigError, match="runtime_thresholds is 1; expected True or False"):
        PostprocessConfig(runtime_thresholds=1)  # type: ignore[arg-type]


def test_tensor_of_the_same_name_gets_another_one():
    layout = LAYOUTS["corners_rows"]()
    taken = replace(layout, classes=Tap("score_threshold", 2, 0, 5))
    assert verify(with_inputs(taken), batches=(1,))


# Verification.


@pytest.mark.covering(default=0, quick=0)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_every_head_are_proven(backend, layout):
    report = verify(with_inputs(LAYOUTS[layout](), backend), batches=(2,))
    assert report, report
    assert report.settings >= 3
    assert not report.unshown


def bypass(name: str):
    """The input is there, and what used it uses a constant of the same value."""

    def change(fused: FusedModel) -> None:
        graph = fused.model.graph
        item = next(item for item in graph.initializer if item.name == name)
        graph.initializer.add().CopyFrom(item)
        graph.initializer[-1].name = f"{name}_baked"
        for node in graph.node:
            node.input[:] = [f"{name}_baked" if given == name else given for given in node.input]

    return change


def shift_classes(fused: FusedModel) -> None:
    """The threshold of the next class."""
    gather = next(node for node in fused.model.graph.node if node.op_type == "Where" and "class_mask" in node.input[:1])
    inner = gather.input[1]
    fused.model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2, 3, 4, 0]), "turned"))
    fused.model.graph.initializer.append(numpy_helper.from_array(np.array([5]), "five"))
    fused.model.graph.node.insert(
        list(fused.model.graph.node).index(gather), onnx.helper.make_node("Gather", ["wide", "turned"], ["moved"])
    )
    fused.model.graph.node.insert(
        list(fused.model.graph.node).index(gather), onnx.helper.make_node("Expand", [inner, "five"], ["wide"])
    )
    gather.input[1] = "moved"


def ignore_mask_for_labels(fused: FusedModel) -> None:
    """A class that does not count gets no detections, but is still taken for the best one."""
    node = next(node for node in fused.model.graph.node if node.op_type == "ArgMax")
    where = next(one for one in fused.model.graph.node if node.input[0] in one.output)
    node.input[0] = where.input[1]


@pytest.mark.covering(default=1, quick=0)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["distances", "oriented", "multi_label"])
@pytest.mark.parametrize("name", ["score_threshold", "iou_threshold", "class_mask"])
def test_input_without_effect_is_found(backend, layout, name):
    head, config = KINDS[layout]
    fused = with_inputs(LAYOUTS[head](), backend, **config)
    bypass(name)(fused)
    report = verify(fused, batches=(1,))
    assert not report
    assert not any(check.problems for check in report.checks if not check.setting), "it is seen only if it is fed"
    assert f"the input {name} has no effect" in str(report) or name == "class_mask"


@pytest.mark.covering(default=1, quick=0)
@pytest.mark.parametrize("sabotage", [shift_classes, ignore_mask_for_labels])
@pytest.mark.parametrize("backend", BACKENDS)
def test_input_with_a_wrong_effect_is_found(backend, sabotage):
    fused = with_inputs(LAYOUTS["distances"](), backend)
    sabotage(fused)
    report = verify(fused, batches=(1,))
    assert not report
    assert not any(check.problems for check in report.checks if not check.setting)


def test_report_says_which_input_changed_nothing():
    """The best detection is the same at every IoU threshold."""
    report = verify(with_inputs(LAYOUTS["distances"](), max_detections=1), batches=(1,))
    assert report
    assert report.unshown == ("iou_threshold",)
    assert "iou_threshold changed nothing" in report.summary
    assert report.to_dict()["unshown"] == ["iou_threshold"]


def test_each_input_is_fed_alone_and_with_others():
    ways = settings(with_inputs(LAYOUTS["distances"]()))
    fed = [Thresholds.of(PostprocessConfig()) != way.thresholds for way in ways]
    assert all(fed) and len({way.name for way in ways}) == len(ways) == 9
    assert not settings(fused_model(LAYOUTS["distances"]()))


# Files.


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    fused = with_inputs(LAYOUTS["distances"]())
    return fused.proven(verify(fused, batches=(1,))).save(tmp_path_factory.mktemp("fused") / "a.ort.onnx")


def test_file_is_read_back(path):
    fused = load_fused(path)
    assert fused.config.runtime_thresholds
    assert "thresholds fed 9 ways" in fusenms.inspect(path).verification
    assert [tensor.name for tensor in fusenms.inspect(path).inputs] == [
        "images",
        "score_threshold",
        "iou_threshold",
        "class_mask",
    ]
    assert verify(fused)


@pytest.mark.thorough
def test_edited_files_keep_the_inputs(path, tmp_path):
    names = ["score_threshold", "iou_threshold", "class_mask"]
    shown = fusenms.expose(path, load_fused(path).layout.tensors, tmp_path / "shown.onnx")
    edited = fusenms.edit(path, tmp_path / "edited.onnx", rename={"images": "pixels"})
    for each in (shown, edited):
        assert [entry.name for entry in optional_inputs(onnx.load(each))] == names
        assert verify(each, batches=(1,))
    part = fusenms.extract(path, ["dist", "logits"], ["boxes", "scores"], tmp_path / "part.onnx")
    assert [entry.name for entry in optional_inputs(onnx.load(part))] == names
    lost = onnx.load(path)
    del lost.metadata_props[:]
    onnx.save(lost, tmp_path / "lost.onnx")
    again = fusenms.restamp(tmp_path / "lost.onnx", path, tmp_path / "again.onnx")  # verifies
    assert len(fusenms.inspect(again).inputs) == 4


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("layout", ["distances", "oriented", "end_to_end", "multi_label"])
def test_defaults_become_constants(layout, threshold):
    """For runtimes without optional inputs and without float64."""
    name, config = KINDS[layout]
    fused = with_inputs(LAYOUTS[name](), "portable", score_threshold=threshold, **config)
    model = with_defaults(fused.model)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.name for entry in model.graph.input] == ["images"]
    assert not any(item.data_type == onnx.TensorProto.DOUBLE for item in model.graph.initializer)
    assert not any(node.op_type == "Log" for node in model.graph.node)
    images = np.random.default_rng(0).random((3, 3, SIZE, SIZE), np.float32)
    before, after = (OnnxRuntimeRunner(each).infer(images) for each in (fused.model, model))
    assert before["num_detections"].any()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["distances", "oriented"])
def test_tensorrt_rtx_builds_with_the_defaults(tmp_path, layout):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from fusenms.engines.rtx import build_rtx

    path = with_inputs(LAYOUTS[layout](), "portable", max_candidates=64, max_detections=32).save(
        tmp_path / "x.portable.onnx", unverified=True
    )
    engine = build_rtx(str(path), EngineSettings(batch=(1, 2, 4)))
    assert list(engine.info["inputs"]) == ["images"]


def lose_input(model: onnx.ModelProto) -> None:
    model.graph.input.remove(next(entry for entry in model.graph.input if entry.name == "iou_threshold"))


def change_default(model: onnx.ModelProto) -> None:
    item = next(item for item in model.graph.initializer if item.name == "score_threshold")
    item.CopyFrom(numpy_helper.from_array(np.array([0.9], np.float32), "score_threshold"))


def lose_default(model: onnx.ModelProto) -> None:
    model.graph.initializer.remove(next(item for item in model.graph.initializer if item.name == "class_mask"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_input, r"says iou_threshold \[1\] .* the graph has nothing of that name"),
        (
            change_default,
            r"score_threshold is an input with the default float32\[1\] 0.25, but the graph has another default",
        ),
        (lose_default, "class_mask is an input with the default .* but the graph has none"),
    ],
)
def test_error_when_the_file_lacks_what_its_metadata_say(path, tmp_path, change, message):
    model = onnx.load(path)
    change(model)
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(SourceError, match=message):
        load_fused(tmp_path / "changed.onnx")


@pytest.mark.thorough
@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"backend": "portable", "precision": "fp16"}])
def test_half_precision_has_the_inputs(shapes_raw, options):
    fused = fuse(shapes_raw, runtime_thresholds=True, **options)
    assert fused.report.settings == 9
    assert len(optional_inputs(fused.model)) == 3


@pytest.mark.thorough
def test_opened_batch_has_the_inputs():
    raw = raw_model(LAYOUTS["decoded"]())
    for entry in (*raw.model.graph.input, *raw.model.graph.output):
        entry.type.tensor_type.shape.dim[0].dim_value = 1
    fused = fuse(replace(raw, frozen_batch=1), layout=raw.layout, runtime_thresholds=True)
    assert fused.report and fused.report.settings == 9
