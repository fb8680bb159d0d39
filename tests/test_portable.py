"""Suppression from plain tensor operators equals greedy suppression, whatever the case; with rounds, it says where it does not."""

from __future__ import annotations

import logging
from fractions import Fraction

import numpy as np
import pytest
from conftest import SHAPES
from hypothesis import given
from hypothesis import strategies as st
from onnx import parser

from fusenms import Detector, PostprocessConfig, RawModel, fuse
from fusenms.artifacts.raw import ImageInput
from fusenms.fusion.backends import BACKENDS, get_backend, portable
from fusenms.graph.model import cut_before
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.layout import Activation, BoxFormat, Decoded, Layout, Tap
from fusenms.reference import Rows, candidates, matches, postprocess

pytestmark = pytest.mark.usefixtures("shared_exports")

CLASSES = 3
PLAIN = {
    "Abs", "Add", "And", "ArgMax", "Cast", "Concat", "Equal", "Expand", "Gather", "GatherElements", "Greater", "Less", "Max",
    "Min", "Mul", "Not", "Pad", "ReduceMax", "ReduceMin", "ReduceSum", "Relu", "Reshape", "Slice", "Split", "Sub", "TopK", "Transpose",
    "Unsqueeze", "Where",
}  # fmt: skip


def layout(classes: int = CLASSES) -> Layout:
    return Layout(
        "any", Tap("boxes", 2, 0, 4), Tap("scores", 2, 0, classes), None, Activation.NONE, Decoded(BoxFormat.XYXY)
    )


class Tail:
    """The fused tail of a head of finished boxes ``[B, N, 4]`` and scores ``[B, N, C]``, and the reference."""

    def __init__(self, count: int, classes: int = CLASSES, backend: str = "portable", **config: object) -> None:
        self.layout, self.config = layout(classes), PostprocessConfig.from_dict(config)
        model = parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
          raw (float[batch, 3, 32, 32] images) => (float[batch, {count}, 4] boxes, float[batch, {count}, {classes}] scores) {{
            mean = ReduceMean <axes = [1, 2, 3], keepdims = 1> (images)
            one = Constant <value = int64[3] {{0, 1, 1}}> ()
            flat = Reshape (mean, one)
            box_shape = Constant <value = int64[3] {{1, {count}, 4}}> ()
            score_shape = Constant <value = int64[3] {{1, {count}, {classes}}}> ()
            boxes = Expand (flat, box_shape)
            scores = Expand (flat, score_shape)
          }}""")
        raw = RawModel(
            model=model,
            image=ImageInput("images", 32, 32, 32),
            class_names=(),
            task="detect",
            source="any.onnx",
            layout=self.layout,
        )
        self.fused = fuse(raw, layout=self.layout, config=self.config, backend=backend, unverified=True)
        standard = get_backend(backend).to_standard(self.fused.model, self.fused)
        tail = cut_before(standard, {"head_boxes": (count, 4), "head_scores": (count, classes)})
        self.runner = OnnxRuntimeRunner(tail)

    def run(self, boxes: np.ndarray, scores: np.ndarray) -> dict[str, np.ndarray]:
        return self.runner.run({"head_boxes": boxes.astype(np.float32), "head_scores": scores.astype(np.float32)})

    def compare(self, boxes: np.ndarray, scores: np.ndarray, excuse: bool = False) -> dict[str, np.ndarray]:
        """Run and compare every row; ``excuse`` what is below the rounding of float32, where boxes are not whole numbers."""
        got = self.run(boxes, scores)
        head = {"boxes": boxes.astype(np.float32), "scores": scores.astype(np.float32)}
        for i in range(len(boxes)):
            n = int(got["num_detections"][i, 0])
            rows = Rows(got["boxes"][i, :n].astype(float), got["scores"][i, :n].astype(float), got["labels"][i, :n])
            found = candidates(head, i, self.layout, (32, 32))
            expected = postprocess(found, self.config, rows if excuse else None).rows
            assert n == len(expected)
            for row in range(n):
                label = int(expected.labels[row])
                assert matches(rows, row, expected.boxes[row], expected.scores[row], label), (i, row)
            assert not got["scores"][i, n:].any()
        return got


def random_case(rng, count):
    low = rng.uniform(0, 300, (count, 2))
    return np.hstack((low, low + rng.uniform(1, 120, (count, 2)))), rng.uniform(0, 1, (count, CLASSES))


def dense_case(rng, count):
    center = rng.uniform(50, 250, (12, 2))[rng.integers(12, size=count)] + rng.normal(0, 4, (count, 2))
    size = rng.uniform(30, 60, (count, 2))
    return np.hstack((center - size / 2, center + size / 2)), rng.uniform(0.2, 1, (count, CLASSES))


def chain_case(rng, count):
    """Each box overlaps the next one enough, and no other; the best is at one end, so that every second one stays."""
    start = 8.0 * np.arange(count)
    boxes = np.stack((start, np.zeros(count), start + 32, np.full(count, 16.0)), 1)
    scores = np.zeros((count, CLASSES))
    scores[:, rng.integers(CLASSES)] = np.linspace(0.9, 0.3, count)
    order = rng.permutation(count)
    return boxes[order], scores[order]


def tied_case(rng, count):
    boxes = rng.integers(0, 12, (count, 2)) * 8.0
    return np.hstack((boxes, boxes + 24)), rng.choice([0.0, 0.5, 0.75], (count, CLASSES))


def threshold_case(rng, count):
    """Boxes in pairs; the small one lies in the big one and has exactly half of its area."""
    corner = np.stack((64.0 * (np.arange(count) // 2), np.zeros(count)), 1)
    size = np.where(np.arange(count)[:, None] % 2 == 0, [32.0, 16.0], [16.0, 16.0])
    scores = np.zeros((count, CLASSES))
    scores[:, 0] = rng.uniform(0.3, 1, count)
    return np.hstack((corner, corner + size)), scores


def quiet_case(rng, count):
    boxes, scores = random_case(rng, count)
    scores[rng.integers(2) :] = 0.0  # one candidate, or none
    return boxes, scores


def flat_case(rng, count):
    """Boxes without area, and points."""
    boxes, scores = random_case(rng, count)
    boxes[:, 2] = np.where(rng.random(count) < 0.5, boxes[:, 0], boxes[:, 2])
    boxes[:, 3] = np.where(rng.random(count) < 0.3, boxes[:, 1] - 5, boxes[:, 3])
    return boxes, scores


CASES = (random_case, dense_case, chain_case, tied_case, threshold_case, quiet_case, flat_case)


@pytest.mark.slow
@pytest.mark.covering(default=1, quick=0)
@pytest.mark.parametrize("seed", [5, 6, 7, 8])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"class_agnostic": True},
        {"iou_threshold": 0.5, "max_detections": 31},
        {"max_candidates": 129, "max_detections": 128},
        {"multi_label": True},
        {"rounds": 140, "max_detections": 300},
    ],
    ids=str,
)
def test_no_row_differs_in_a_thousand_cases(config, seed):
    rng = np.random.default_rng(seed)
    tail, done = Tail(140, **config), 0
    while done < 50:
        batch = int(rng.integers(1, 17))
        pairs = [CASES[(done + i) % len(CASES)](rng, 140) for i in range(batch)]
        tail.compare(np.stack([b for b, _ in pairs]), np.stack([s for _, s in pairs]), excuse=True)
        done += batch


@pytest.mark.parametrize("size", [1, 7, 64, 500])
def test_the_size_of_a_block_changes_nothing(monkeypatch, size):
    monkeypatch.setattr(portable, "BLOCK", size)
    rng = np.random.default_rng(6)
    tail = Tail(100)
    pairs = [case(rng, 100) for case in CASES]
    tail.compare(np.stack([b for b, _ in pairs]), np.stack([s for _, s in pairs]), excuse=True)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 129])
def test_any_number_of_candidates(count):
    rng = np.random.default_rng(count)
    tail = Tail(count, max_detections=64)
    for case in CASES:
        boxes, scores = case(rng, count)
        tail.compare(boxes[None], scores[None], excuse=True)


@pytest.mark.slow
def test_blocks_end_where_the_candidates_end():
    """Boxes apart from each other, one more in each image: every one is found, in however many blocks they lie."""
    boxes, scores = np.zeros((131, 130, 4)), np.zeros((131, 130, CLASSES))
    start = 16.0 * np.arange(130)
    boxes[:] = np.stack((start, 0 * start, start + 8, 0 * start + 8), 1)
    scores[np.tri(131, 130, -1, dtype=bool)] = 0.5
    tail = Tail(130)
    together = tail.compare(boxes, scores)["num_detections"][:, 0].tolist()
    alone = [int(tail.run(boxes[i : i + 1], scores[i : i + 1])["num_detections"][0, 0]) for i in range(131)]
    assert together == alone == list(range(131))


def test_one_class():
    rng = np.random.default_rng(8)
    boxes, scores = dense_case(rng, 90)
    Tail(90, classes=1).compare(boxes[None], scores[None, :, :1], excuse=True)


SMALL = 12
whole = st.integers(0, 6)
box = st.tuples(whole, whole, whole, whole).map(lambda b: [b[0] * 8, b[1] * 8, (b[0] + b[2]) * 8, (b[1] + b[3]) * 8])
score = st.sampled_from([0.0, 0.25, 0.26, 0.5, 0.75, 1.0])
image = st.tuples(
    st.lists(box, min_size=SMALL, max_size=SMALL), st.lists(st.tuples(score, score, score), min_size=SMALL, max_size=SMALL)
)  # fmt: skip
TAILS: dict[tuple[str, float, bool], Tail] = {}
THRESHOLDS = [0.0, 0.1, 0.2, 0.25, 1 / 3, 0.4, 0.45, 0.5, 0.6, 0.65, 0.7, 0.75, 0.9, 1.0]


@pytest.mark.parametrize("backend", BACKENDS)
@given(st.lists(image, min_size=1, max_size=4), st.sampled_from(THRESHOLDS), st.booleans())
def test_search_finds_no_difference(backend, images, iou_threshold, class_agnostic):
    """Of whole numbers every area is exact in float32, so nothing is excused: an IoU of 9 / 20 is not above 0.45."""
    key = (backend, iou_threshold, class_agnostic)
    if key not in TAILS:
        portable_block, portable.BLOCK = portable.BLOCK, 5
        config = {"iou_threshold": iou_threshold, "class_agnostic": class_agnostic, "max_detections": 7}
        TAILS[key] = Tail(SMALL, backend=backend, **config)
        portable.BLOCK = portable_block
    TAILS[key].compare(np.array([b for b, _ in images], float), np.array([s for _, s in images], float))


@pytest.mark.covering(quick=1)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "share", ["1/10", "1/5", "1/4", "3/10", "1/3", "9/20", "1/2", "7/12", "13/22", "3/5", "13/20", "7/10", "9/10"]
)
def test_pair_at_the_threshold_is_kept_and_one_above_it_is_not(backend, share):
    """Nested boxes of whole pixels, of many sizes, whose IoU is the threshold; then one pixel row more."""
    part = Fraction(share)
    sizes = [part.denominator * k for k in (1, 2, 3, 5, 7, 11, 16, 20)]
    boxes, scores = np.zeros((len(sizes), 2, 4)), np.zeros((len(sizes), 2, CLASSES))
    for i, size in enumerate(sizes):
        left = 13.0 * i
        boxes[i] = [[left, 5, left + 31, 5 + size], [left, 5, left + 31, 5 + int(size * part)]]
    scores[:, :, 1] = [0.9, 0.8]
    tail = Tail(2, backend=backend, iou_threshold=float(part), max_detections=2)
    assert tail.compare(boxes, scores)["num_detections"][:, 0].tolist() == [2] * len(sizes)
    boxes[:, 1, 3] += 1
    assert tail.compare(boxes, scores)["num_detections"][:, 0].tolist() == [1] * len(sizes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_box_that_is_not_finite_never_wins(backend, value):
    boxes = np.array([[0, 0, 8, 8], [0, 0, 8, 8], [16, 0, 24, 8]], float)
    boxes[0, 2] = value
    tail = Tail(3, backend=backend, max_detections=3)
    got = tail.compare(boxes[None], np.array([[[0, 0.9, 0], [0, 0.8, 0], [0, 0.7, 0]]]))
    assert got["num_detections"].tolist() == [[2]]
    np.testing.assert_allclose(got["scores"][0], [0.8, 0.7, 0])


@pytest.mark.parametrize("rounds", [1, 2, 5, 30])
def test_rounds_say_which_images_settled(rounds):
    """A chain of n candidates takes n rounds, and one more to see that it is done."""
    lengths = [1, 2, 4, 5, 29, 30]
    boxes, scores = np.zeros((len(lengths), 40, 4)), np.zeros((len(lengths), 40, CLASSES))
    for i, length in enumerate(lengths):
        boxes[i, :length], scores[i, :length] = chain_case(np.random.default_rng(i), length)
    tail = Tail(40, rounds=rounds, max_detections=40)
    got = tail.run(boxes, scores)
    converged = got["converged"][:, 0].astype(bool)
    assert got["converged"].dtype == np.int32
    assert converged.tolist() == [length <= rounds for length in lengths]
    tail.compare(boxes[converged], scores[converged])


def test_graph_has_plain_operators_only():
    nodes = list(Tail(300).fused.model.graph.node)
    bodies = [a.g for node in nodes for a in node.attribute if a.HasField("g")]
    inner = [a.g for body in bodies for node in body.node for a in node.attribute if a.HasField("g")]
    assert (len(bodies), len(inner)) == (1, 1)  # over blocks, over rounds
    kinds = {node.op_type for part in (*bodies, *inner) for node in part.node} | {
        node.op_type for node in nodes if node.name.startswith("fusenms")
    }
    assert kinds <= PLAIN | {"Loop"}
    unrolled = {node.op_type for node in Tail(300, rounds=4).fused.model.graph.node if node.name.startswith("fusenms")}
    assert unrolled <= PLAIN


@pytest.mark.slow
def test_detector_warns_when_rounds_are_too_few(tmp_path, caplog):
    settings = {"size": 128, "backend": "portable", "score_threshold": 0.01, "unverified": True}
    for rounds, warned in ((1, True), (64, False)):
        path = fuse(SHAPES / "shapes.pt", rounds=rounds, **settings).save(tmp_path / "m.onnx", unverified=True)
        caplog.clear()
        with caplog.at_level(logging.WARNING), Detector(path) as detect:
            assert len(detect(SHAPES / "shapes0.jpg")[0])
        assert ("more rounds" in caplog.text) == warned
