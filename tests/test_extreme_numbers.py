"""Numbers at the ends of what float32 and the settings allow: equal to the reference on every backend, or one clear refusal."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from raw_heads import ANCHORS, LAYOUTS, SIZE, STRIDES, candidates_of, shapes_of

from fusenms import PostprocessConfig, RawModel
from fusenms.artifacts.fused import FusedModel
from fusenms.artifacts.preprocessing import Pixels
from fusenms.artifacts.raw import ImageInput
from fusenms.errors import ConfigError, SourceError
from fusenms.fusion.backends import BACKENDS, get_backend
from fusenms.graph.model import cut_before
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.layout import AnchorBoxes, Distances, GridOffsets, Join, Layout, TanhOffsets, Tap
from fusenms.pipeline import fuse
from fusenms.reference import Rows, candidates, matches, postprocess
from fusenms.transforms.half_precision import to_half
from fusenms.verification.checks import verify

TINY, SMALLEST = np.float32(1e-40), np.float32(1e-45)  # denormal: below 1.2e-38
Tensors = dict[str, np.ndarray]


def stub(layout: Layout, shapes: dict[str, tuple[int, ...]]) -> RawModel:
    """A raw model whose head tensors have these shapes; what they hold does not matter, since the tail alone is run."""
    nodes = [helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=0)]
    weights = []
    for name, shape in shapes.items():
        weights.append(numpy_helper.from_array(np.array([1] * len(shape) + [-1], np.int64), f"{name}_column"))
        weights.append(numpy_helper.from_array(np.array([*shape, 1], np.int64), f"{name}_shape"))
        nodes.append(helper.make_node("Reshape", ["mean", f"{name}_column"], [f"{name}_flat"]))
        nodes.append(helper.make_node("Expand", [f"{name}_flat", f"{name}_shape"], [f"{name}_last"]))
        order = [len(shape), *range(len(shape))]
        nodes.append(helper.make_node("Transpose", [f"{name}_last"], [name], perm=order))
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", *shape]) for n, shape in shapes.items()]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])
    graph = helper.make_graph(nodes, "stub", [images], outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return RawModel(
        model=model,
        image=ImageInput("images", SIZE, SIZE, 32),
        class_names=(),
        task="detect",
        source="stub.onnx",
        layout=layout,
        pixels=Pixels(),
    )


def rows_of(layout: Layout, backend: str, head: Tensors, **settings: object) -> list[Rows]:
    """What the backend finds in head tensors ``[B, …]``; the test fails where the reference finds anything else."""
    config = PostprocessConfig.from_dict(dict(settings))
    shapes = {name: value.shape[1:] for name, value in head.items()}
    fused = fuse(stub(layout, shapes), layout=layout, config=config, backend=backend, unverified=True)
    names = dict(zip(layout.tensors, fused.layout.tensors, strict=True))
    head = {names[name]: value for name, value in head.items()}
    tail = cut_before(fused.model, {name: value.shape[1:] for name, value in head.items()})
    outputs = OnnxRuntimeRunner(get_backend(backend).to_standard(tail, fused)).run(head)
    return [_compared(fused, head, outputs, i) for i in range(len(next(iter(head.values()))))]


def _compared(fused: FusedModel, head: Tensors, outputs: Tensors, image: int) -> Rows:
    counts, boxes, scores, labels = (outputs[name] for name in fused.config.output_names)
    count = int(counts[image, 0])
    observed = Rows(boxes[image, :count].astype(np.float64), scores[image, :count].astype(float), labels[image, :count])
    found = candidates(head, image, fused.layout, (SIZE, SIZE))
    expected = postprocess(found, fused.config, observed).rows
    assert count == len(expected)
    for row in range(count):
        box, score, label = expected.boxes[row], expected.scores[row], int(expected.labels[row])
        assert matches(observed, row, box, score, label), f"row {row}: {observed.boxes[row]} instead of {box}"
    assert not boxes[image, count:].any() and not scores[image, count:].any() and (labels[image, count:] == -1).all()
    return observed


def decoded(count: int = 12, classes: int = 3, box: tuple[float, ...] = (8, 8, 4, 4), apart: float = 0) -> Tensors:
    """A head of `LAYOUTS["decoded"]` (cxcywh, pixels) with scores 0; boxes are `apart` pixels from each other along x."""
    head = np.zeros((1, 4 + classes, count), np.float32)
    head[0, :4] = np.array(box, np.float32)[:, None]
    head[0, 0] += np.arange(count, dtype=np.float32) * np.float32(apart)
    return {"output0": head}


def logits(layout: Layout, value: float = -20.0) -> Tensors:
    """Head tensors of a layout, all of one value."""
    return {name: np.full((1, *shape), value, np.float32) for name, shape in shapes_of(layout).items()}


every_backend = pytest.mark.parametrize("backend", BACKENDS)


# Scores.


@every_backend
def test_denormal_scores_are_above_threshold_zero(backend):
    head = decoded(apart=10)
    head["output0"][0, 4, :3] = [TINY, SMALLEST, 0]
    (rows,) = rows_of(LAYOUTS["decoded"](3), backend, head, score_threshold=0.0)
    assert rows.scores.tolist() == [TINY, SMALLEST]


@every_backend
def test_score_equal_to_a_denormal_threshold_is_dropped(backend):
    head = decoded(apart=10)
    head["output0"][0, 4, :3] = [TINY, np.nextafter(TINY, np.float32(1)), SMALLEST]
    (rows,) = rows_of(LAYOUTS["decoded"](3), backend, head, score_threshold=float(TINY))
    assert len(rows) == 1


@every_backend
def test_score_of_one_is_above_every_threshold_but_one(backend):
    head = decoded(apart=10)
    head["output0"][0, 4, :2] = [1, np.nextafter(np.float32(1), np.float32(0))]
    assert [len(rows_of(LAYOUTS["decoded"](3), backend, head, score_threshold=t)[0]) for t in (0.0, 0.99, 1.0)] == [
        2,
        2,
        0,
    ]


@pytest.mark.covering(quick=1)
@every_backend
@pytest.mark.parametrize("value", [88.0, 1000.0, 3.4e38])
def test_largest_logits_win(backend, value):
    layout = LAYOUTS["distances"](3)
    head = logits(layout)
    head["logits"][0, 1, 5] = value
    (rows,) = rows_of(layout, backend, head, score_threshold=0.999)
    assert rows.scores.tolist() == [1.0]


@pytest.mark.covering(default=1, quick=0)
@every_backend
@pytest.mark.parametrize("layout", ["distances", "anchor_boxes", "queries", "decoded", "weighted", "oriented"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_no_value_that_is_not_finite_wins(backend, layout, multi_label):
    """Three images where all of the head is one such value, as of a network that overflows; three where one class score is."""
    layout, values = LAYOUTS[layout](3), (np.nan, np.inf, -np.inf)
    sound = logits(layout, 0.3)
    head = {
        name: np.concatenate([np.full_like(tensor, value) for value in values] + [tensor] * 3)
        for name, tensor in sound.items()
    }
    tap = layout.classes
    scores = head[tap.tensor] if tap.channel_axis == 1 else head[tap.tensor].swapaxes(1, 2)
    scores[3:, tap.start, 3] = values
    found = rows_of(layout, backend, head, score_threshold=0.0, multi_label=multi_label, max_detections=50)
    assert [len(rows) for rows in found[:3]] == [0, 0, 0]
    assert all(len(rows) and np.isfinite(rows.scores).all() for rows in found[3:])


@pytest.mark.covering(default=1, quick=0)
@every_backend
@pytest.mark.parametrize("layout", ["distances", "decoded", "anchor_boxes", "end_to_end"])
def test_all_scores_equal_are_in_the_order_of_the_candidates(backend, layout):
    layout = LAYOUTS[layout](3)
    head = logits(layout, 0.5)
    (rows,) = rows_of(layout, backend, head, iou_threshold=1.0, max_detections=300)
    assert len(set(rows.scores.tolist())) == 1
    assert len(rows) == candidates_of(layout) * (3 if layout.every_class else 1)
    size = (SIZE, SIZE)
    first = candidates(head, 0, layout, size).boxes[: len(rows)]
    if not layout.every_class:
        np.testing.assert_allclose(rows.boxes, first, atol=1e-3)


@every_backend
def test_equal_boxes_with_equal_scores_leave_the_first(backend):
    head = decoded(count=500)
    head["output0"][0, 4:] = 0.5
    (rows,) = rows_of(LAYOUTS["decoded"](3), backend, head, iou_threshold=0.0)
    assert rows.labels.tolist() == [0]


# Boxes.


@pytest.mark.covering(quick=1)
@every_backend
@pytest.mark.parametrize("side", [1e6, 1e-6])
@pytest.mark.parametrize("layout", ["decoded", "corners_rows"])
def test_boxes_of_a_million_pixels_and_of_a_millionth(backend, side, layout):
    """Four equal ones and one beside them leave two."""
    centers = np.array([0, 0, 0, 0, 3 * side], np.float32)
    boxes = np.stack((centers, centers, np.full(5, side), np.full(5, side)), 1).astype(np.float32)
    scores = np.linspace(0.9, 0.5, 5, dtype=np.float32)[:, None]
    if layout == "decoded":
        head = {"output0": np.concatenate((boxes, scores), 1).T[None].copy()}
    else:
        low = boxes[:, :2] - boxes[:, 2:] / 2
        head = {"boxes": np.concatenate((low, low + boxes[:, 2:]), 1)[None], "scores": scores[None]}
    (rows,) = rows_of(LAYOUTS[layout](1), backend, head, iou_threshold=0.5)
    assert rows.scores.tolist() == scores[[0, 4], 0].tolist()


@every_backend
@pytest.mark.parametrize("layout", ["oriented_decoded", "oriented"])
def test_oriented_boxes_of_extreme_size(backend, layout):
    layout = LAYOUTS[layout](1)
    head = logits(layout, 0.0)
    if "output0" in head:
        rows = head["output0"][0]
        rows[:, :6] = np.array(
            [[0, 0, 1e6, 1e6, 0.9, 0.3], [0, 0, 1e6, 1e6, 0.8, 0.3], [0, 0, 1e-6, 1e-6, 0.7, 1], [0, 0, 1e-6, 1e-6, 0.6, 1],
             [0, 0, 1e6, 1e-6, 0.5, 0], [9e7, 0, 1, 1, 0.4, 0]], np.float32).T  # fmt: skip
    else:
        head["dist"][:] = 1e6
    rows_of(layout, backend, head)


@pytest.mark.covering(default=1, quick=0)
@every_backend
@pytest.mark.parametrize("value", [1e30, -1e30, 3.4e38])
@pytest.mark.parametrize(
    "layout", ["distances", "end_to_end", "anchor_boxes", "grid_offsets", "weighted", "decoded", "queries"]
)
def test_box_terms_near_the_end_of_float32(backend, value, layout):
    layout = LAYOUTS[layout](3)
    head = logits(layout, 0.3)
    tap = layout.boxes
    rows = head[tap.tensor][0]
    (rows if tap.channel_axis == 1 else rows.T)[tap.start : tap.stop, ::2] = value
    rows_of(layout, backend, head, score_threshold=0.01)


@every_backend
def test_iou_threshold_zero_drops_what_touches_and_one_drops_nothing(backend):
    head = decoded(count=6, apart=3)  # 4 wide, 3 apart: each shares a pixel's width with the next
    head["output0"][0, 4] = np.linspace(0.9, 0.4, 6)
    counts = [len(rows_of(LAYOUTS["decoded"](3), backend, head, iou_threshold=t)[0]) for t in (0.0, 1.0)]
    assert counts == [3, 6]


@every_backend
def test_degenerate_boxes_overlap_nothing_at_threshold_zero(backend):
    head = decoded(count=8, box=(8, 8, 0, 4))
    head["output0"][0, 4] = 0.9
    (rows,) = rows_of(LAYOUTS["decoded"](3), backend, head, iou_threshold=0.0)
    assert len(rows) == 8


# Counts.


@pytest.mark.slow
@pytest.mark.covering(default=1, quick=1)
@every_backend
@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("classes", [1, 5000])
def test_one_class_and_five_thousand(backend, classes, multi_label):
    head = decoded(count=64, classes=classes, apart=2)
    rng = np.random.default_rng(0)
    head["output0"][0, 4 + rng.integers(classes, size=64), np.arange(64)] = rng.uniform(0.3, 1, 64)
    head["output0"][0, -1, 7] = 1.0
    (rows,) = rows_of(LAYOUTS["decoded"](classes), backend, head, multi_label=multi_label)
    assert rows.labels[0] == classes - 1


@every_backend
@pytest.mark.parametrize("score", [0.0, 0.9])
def test_one_candidate(backend, score):
    head = decoded(count=1)
    head["output0"][0, 5] = score
    (rows,) = rows_of(LAYOUTS["decoded"](3), backend, head)
    assert rows.labels.tolist() == ([1] if score else [])


@pytest.mark.slow
@every_backend
def test_two_hundred_thousand_candidates(backend):
    head = decoded(count=200_000, classes=1, apart=0.001)
    scores = head["output0"][0, 4]
    scores[:] = np.random.default_rng(0).permutation(200_000) / 400_000 + 0.3
    scores[[0, 199_999]] = 0.99
    (rows,) = rows_of(LAYOUTS["decoded"](1), backend, head, max_candidates=500)
    assert (rows.boxes[:2, 0].tolist()) == pytest.approx([6, 206], abs=0.01)


@every_backend
def test_one_row_and_more_rows_than_candidates(backend):
    head = decoded(count=6, apart=10)
    head["output0"][0, 4] = np.linspace(0.9, 0.4, 6)
    counts = [len(rows_of(LAYOUTS["decoded"](3), backend, head, max_detections=k)[0]) for k in (1, 3000)]
    assert counts == [1, 6]


# Float16.


@pytest.mark.slow
@every_backend
def test_overflow_of_a_half_precision_network_is_no_detection(backend):
    """The logit of one cell is above what float16 holds, so it is infinite, and that never wins; the others are as in float32."""
    layout = LAYOUTS["distances"](3)
    nodes, weights = [], []
    for tensor, (width, count) in shapes_of(layout).items():
        kernel = np.zeros((width, 3, 1, 1), np.float32)
        kernel[:, 0] = 1.0
        weights.append(numpy_helper.from_array(kernel, f"{tensor}_w"))
        weights.append(numpy_helper.from_array(np.array([0, width, -1], np.int64), f"{tensor}_shape"))
        nodes.append(helper.make_node("Conv", ["images", f"{tensor}_w"], [f"{tensor}_conv"]))
        nodes.append(helper.make_node("Reshape", [f"{tensor}_conv", f"{tensor}_shape"], [f"{tensor}_flat"]))
        ends = {"starts": [0], "ends": [count], "axes": [2]}
        for end, value in ends.items():
            weights.append(numpy_helper.from_array(np.array(value, np.int64), f"{tensor}_{end}"))
        nodes.append(helper.make_node("Slice", [f"{tensor}_flat", *(f"{tensor}_{end}" for end in ends)], [tensor]))
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", *s]) for n, s in shapes_of(layout).items()]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])
    graph = helper.make_graph(nodes, "raw", [images], outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    raw = RawModel(
        model=model,
        image=ImageInput("images", SIZE, SIZE, 32),
        class_names=(),
        task="detect",
        source="half.onnx",
        layout=layout,
        pixels=Pixels(mean=(0.5, 0.5, 0.5)),  # logits of both signs
    )
    fused = fuse(to_half(raw, layout), layout=layout, config=PostprocessConfig(), backend=backend, unverified=True)
    batch = np.full((1, 3, SIZE, SIZE), -9, np.float32)
    batch[0, 0, 0, :2] = [65000.0, 70000.0]
    runner = OnnxRuntimeRunner(get_backend(backend).to_standard(get_backend(backend).in_float(fused.model), fused))
    assert runner.infer(batch)["num_detections"].tolist() == [[1]]
    assert verify(fused, images=batch)


# What a layout or a setting cannot be.

BOXES, CLASSES = Tap("b", 1, 0, 4), Tap("c", 1, 0, 3)
HUGE = 10**400


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *((lambda kind=kind, s=s: kind(s), "strides is .*expected whole numbers of pixels from 1 to 65536")
          for kind in (GridOffsets, TanhOffsets, lambda s: Distances(s, 16), lambda s: AnchorBoxes(s, ANCHORS))
          for s in ((), (0, 16), (-8, 16), (8.0, 16), (True, 16), (float("nan"),), (HUGE,), 8, "8", None, [8, 16])),
        *((lambda a=a: AnchorBoxes(STRIDES, a), "anchors is .*; expected for each of 3 strides the same number of")
          for a in ((), ANCHORS[:2], None, ((),) * 3, (*ANCHORS[:2], ANCHORS[2][:1]), ((1.0, 2.0),) * 3,
                    ((("1", "2"),),) * 3, (((None, 30.0),),) * 3)),
        *((lambda v=v: AnchorBoxes(STRIDES, (*ANCHORS[:2], ((v, 30.0), (24.0, 40.0)))), "expected .* finite and above 0")
          for v in (0.0, -10.0, float("nan"), float("inf"), 1e39, HUGE, True, 1e-46)),
        *((lambda v=v: Distances(STRIDES, 2, values=(0.0, v)), "values is .*expected finite numbers")
          for v in (float("nan"), float("inf"), -float("inf"), 1e39, HUGE, None, "1")),
        *((lambda v=v: Distances(STRIDES, v), "bins is .*; expected a whole number from 1") for v in (0, -1, 1.5, True, None, HUGE)),
        *((lambda v=v: Distances(STRIDES, 16, point=v), "point is .*expected a finite number") for v in (float("nan"), None, HUGE)),
        *((lambda v=v: Tap(v, 1, 0, 4), "expected the name of a tensor") for v in ("", None, 3, ["b"])),
        *((lambda v=v: Tap("b", *v), "expected axis 1 or 2, and") for v in
          ((1.0, 0, 4), (1, 0, HUGE), (1, 0, 4.0), (1, None, 4), (True, 0, 4), (1, False, 4), (1, "0", 4))),
        *((lambda v=v: Join(*v), "join of .*; expected") for v in
          (("t", (), 1, 4), ("t", ("a",), 3, 4), ("t", ("a",), 1, 0), ("t", ("a", None), 1, 4), (None, ("a",), 1, 4), ("t", "ab", 1, 4),
           ("t", ("a",), 1, HUGE))),
        *((lambda v=v: replace(LAYOUTS["weighted"](), objectness_weight=v), "objectness_weight is .*expected a number from 0 to 1")
          for v in (-0.1, 1.1, float("nan"), "1", True, HUGE)),
        (lambda: replace(LAYOUTS["distances"](), objectness_weight=0.5), "objectness_weight requires objectness"),
        (lambda: replace(LAYOUTS["distances"](), suppress="no"), "suppress is 'no'; expected True or False"),
        (lambda: replace(LAYOUTS["distances"](), family=None), "family is None; expected a name"),
        (lambda: replace(LAYOUTS["distances"](), joins=(1,)), "joins is .*; expected a tuple of Join"),
    ],
)  # fmt: skip
def test_error_when_a_layout_has_numbers_that_mean_nothing(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("layout", "path", "value"),
    [
        ("anchor_boxes", ("decode", "anchors", 0, 0, 0), float("nan")),
        ("anchor_boxes", ("decode", "strides", 0), 0),
        ("distances", ("decode", "bins"), HUGE),
        ("distances", ("boxes", "stop"), float("inf")),
        ("distances", ("suppress",), 1),
        ("weighted", ("objectness_weight",), float("nan")),
    ],
)
def test_error_when_a_stored_layout_has_numbers_that_mean_nothing(layout, path, value):
    values = json.loads(json.dumps(LAYOUTS[layout]().to_dict()))
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(SourceError, match="the layout stored in the file is unreadable"):
        Layout.from_dict(values)


@pytest.mark.parametrize("name", ["score_threshold", "iou_threshold"])
@pytest.mark.parametrize(
    "value", [-0.0001, 1.0001, float("nan"), float("inf"), -float("inf"), HUGE, -HUGE, "0.5", None, [0.5]]
)
def test_error_when_a_threshold_is_out_of_range(name, value):
    with pytest.raises(ConfigError, match=f"{name} is .*; expected a number from 0 to 1"):
        PostprocessConfig(**{name: value})


@pytest.mark.parametrize("name", ["max_detections", "max_candidates", "rounds"])
@pytest.mark.parametrize("value", [0, -1, 2**24 + 1, HUGE, 1.5, float("nan"), True, "3", [3]])
def test_error_when_a_count_is_out_of_range(name, value):
    with pytest.raises(ConfigError, match=f"{name} is .*; expected a whole number from 1 to 16777216"):
        PostprocessConfig(**{name: value})


@pytest.mark.parametrize("name", ["masks", "output_preset"])
@pytest.mark.parametrize("value", ["", "other", None, 1, [], {}])
def test_error_when_a_choice_is_unknown(name, value):
    with pytest.raises(ConfigError, match=f"{name} is .*; expected one of"):
        PostprocessConfig(**{name: value})
