"""Reference and backends against the second oracle (`oracle.py`), on hostile numbers: ties, NaN, infinities, denormals, no area."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from kernels import KernelRunner, library, on_cpu
from oracle import Row, Scene
from raw_heads import LAYOUTS, SIZE, TASK_LAYOUTS, candidates_of, fused_model, shapes_of
from test_extreme_numbers import stub

from fusenms import PostprocessConfig, reference
from fusenms.fusion import candidates as graph_candidates
from fusenms.fusion.backends import BACKENDS, get_backend, portable
from fusenms.fusion.decoding import order_corners
from fusenms.graph.model import cut_before
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.layout import Activation, BoxFormat, Decoded, Distances, Layout
from fusenms.pipeline import fuse
from fusenms.verification.checks import verify

Tensors = dict[str, np.ndarray]
Rng = np.random.Generator

HEADS: dict[str, Callable[..., Layout]] = {
    **{name: make for name, make in LAYOUTS.items() if make not in TASK_LAYOUTS or name.startswith("oriented")},
    "class_alone": lambda classes: replace(LAYOUTS["weighted"](classes), objectness_weight=0.0),
    "root_of_product": lambda classes: replace(LAYOUTS["pixel_distances"](classes), objectness_weight=0.5),
    "objectness_alone": lambda classes: replace(LAYOUTS["weighted"](classes), objectness_weight=1.0),
}
"""Masks and keypoints have no part in what is selected."""
SETTINGS = {
    "default": {},
    "agnostic": {"class_agnostic": True, "iou_threshold": 0.3},
    "multi_label": {"multi_label": True, "score_threshold": 0.4},
    "halves": {"score_threshold": 0.5, "iou_threshold": 0.5},
    "everything": {"score_threshold": 0.0, "iou_threshold": 1.0},
    "touching": {"iou_threshold": 0.0},
    "few": {"max_detections": 3, "max_candidates": 9},
    "few_of_all": {"max_detections": 20, "max_candidates": 20, "multi_label": True, "class_agnostic": True},
}
CLASSES = 3
SCENES = 4  # one of each kind
HOSTILE = np.array(
    [np.nan, np.inf, -np.inf, 1e-45, -1e-45, 1e-39, 1e-20, 0.0, -0.0, 1e9, -1e9, 1e20, -1e20, 3e38, -3e38]
)


# Scenes: the head of one image each.


def plain(layout: Layout, config: PostprocessConfig, rng: Rng) -> Tensors:
    """Numbers without ties."""
    count = candidates_of(layout)
    scores = rng.normal(0, 2.5, (count, layout.classes.channels))
    values = {layout.classes: scores if layout.activation is not Activation.NONE else 1 / (1 + np.exp(-scores))}
    for tap in (layout.objectness, layout.background):
        if tap is not None:
            raw = rng.normal(1, 2, (count, 1))
            values[tap] = 1 / (1 + np.exp(-raw)) if layout.activation is Activation.NONE else raw
    if layout.labels is not None:
        values[layout.labels] = rng.integers(4, size=(count, 1))
    if layout.angle is not None:
        values[layout.angle.value] = rng.normal(0, 2, (count, 1))
    return tensors(layout, values | {layout.boxes: box_terms(layout, rng.normal(0, 1, (count, 4)))})


def ties(layout: Layout, config: PostprocessConfig, rng: Rng) -> Tensors:
    """Few different numbers, among them the threshold and its neighbors. Boxes lie on a grid of pixels, many are equal, some empty."""
    count, t = candidates_of(layout), np.float32(config.score_threshold)
    if layout.activation is Activation.NONE:
        few = [t, np.nextafter(t, np.float32(2)), 0.5, 0.75, 1.0, 0.0]
    else:
        at = np.float32(np.log(t / (1 - t)) if 0 < t < 1 else 0)
        few = [at, np.nextafter(at, np.float32(9)), np.nextafter(at, np.float32(-9)), 0.0, 1.0, -4.0]
    values = {layout.classes: rng.choice(few, (count, layout.classes.channels))}
    for tap in (layout.objectness, layout.background):
        if tap is not None:
            values[tap] = rng.choice([0.5, 1.0] if layout.activation is Activation.NONE else [0.0, 20.0], (count, 1))
    if layout.labels is not None:
        values[layout.labels] = rng.integers(2, size=(count, 1))
    if layout.angle is not None:
        values[layout.angle.value] = rng.choice([0.0, 0.25, np.pi / 2], (count, 1))
    return tensors(layout, values | {layout.boxes: box_terms(layout, rng.integers(-2, 4, (count, 4)) / 2, even=True)})


def hostile(layout: Layout, config: PostprocessConfig, rng: Rng) -> Tensors:
    """Any channel may hold what is not finite, or is tiny, or huge; in some candidates, all class values are the same such number."""
    head = (ties if rng.random() < 0.5 else plain)(layout, config, rng)
    labels = layout.labels
    for name, values in head.items():
        wild = rng.random(values.shape) < rng.choice([0.01, 0.04])
        if labels is not None and labels.tensor == name:
            wild[:, labels.start] = False  # a class number is a number
        values[wild] = rng.choice(HOSTILE, wild.sum())
    values = head[layout.classes.tensor]
    rows = values.T if layout.classes.channel_axis == 1 else values
    rows[rng.integers(len(rows), size=4), layout.classes.start : layout.classes.stop] = rng.choice(HOSTILE, (4, 1))
    return head


def lost_corners(layout: Layout, config: PostprocessConfig, rng: Rng) -> Tensors:
    """Box terms of -infinity in a fifth of the candidates: the order of corners must not hide them."""
    head = plain(layout, config, rng)
    values = head[layout.boxes.tensor]
    rows = values.T if layout.boxes.channel_axis == 1 else values
    lost = rng.random(len(rows)) < 0.2
    rows[lost, rng.integers(layout.boxes.start, layout.boxes.stop, lost.sum())] = -np.inf
    return head


KINDS = (plain, ties, hostile, lost_corners)


def box_terms(layout: Layout, numbers: np.ndarray, even: bool = False) -> np.ndarray:
    """Terms of boxes from ``[N, 4]`` numbers of about -2 to 2. ``even``: of few and whole pixels, as far as the decode can say it."""
    decode, count = layout.decode, len(numbers)
    if isinstance(decode, Distances):
        spread = np.abs(numbers) * (1.0 if even else 2.0)
        if decode.bins == 1:
            return spread - (0.5 if even else 0.2)  # some of negative size
        peak = np.floor(spread)[..., None] if even else spread[..., None]
        return (-(1000.0 if even else 3.0) * (np.arange(decode.bins) - peak) ** 2).reshape(count, -1)
    if not isinstance(decode, Decoded):
        return numbers
    low = (numbers[:, :2] + 2) * 12
    size = numbers[:, 2:] * 8 + 12
    if even:
        low, size = np.round(low / 4) * 4, np.round(size / 2) * 2
    pair = (low + size / 2, size) if decode.format is BoxFormat.CXCYWH else (low, low + size)
    return np.concatenate(pair, 1) / (SIZE if decode.normalized else 1)


def tensors(layout: Layout, values: dict) -> Tensors:
    made = {name: np.zeros(shape, np.float32) for name, shape in shapes_of(layout).items()}
    for tap, columns in values.items():
        rows = made[tap.tensor].T if tap.channel_axis == 1 else made[tap.tensor]
        rows[:, tap.start : tap.stop] = columns
    return made


def scenes(layout: Layout, config: PostprocessConfig, seed: int, count: int = SCENES) -> list[Tensors]:
    return [KINDS[i % len(KINDS)](layout, config, np.random.default_rng([seed, i])) for i in range(count)]


def at_a_limit(scene: Scene) -> bool:
    """Whether candidates that nobody has to count could take the place of others."""
    passing = sum(c.key > c.threshold for c in scene.candidates)
    return passing + scene.undefined > scene.most


# The reference.


def rows_of_reference(head: Tensors, layout: Layout, config: PostprocessConfig) -> list[Row]:
    batch = {name: values[None] for name, values in head.items()}
    with np.errstate(all="ignore"):
        found = reference.postprocess(reference.candidates(batch, 0, layout, (SIZE, SIZE)), config)
    values = zip(found.indices, found.rows.labels, found.rows.scores, found.rows.boxes, strict=True)
    return [Row(int(i), int(label), float(score), tuple(map(float, box))) for i, label, score, box in values]


def faults_of_reference(layout: Layout, config: PostprocessConfig, seed: int) -> list[str]:
    faults = []
    for i, head in enumerate(scenes(layout, config, seed)):
        scene, kind = Scene(head, layout, config, (SIZE, SIZE)), KINDS[i % len(KINDS)]
        rows = rows_of_reference(head, layout, config)
        products = layout.objectness is not None or layout.activation is Activation.SOFTMAX
        exact = kind is plain or not products
        faults += [f"scene {i} ({kind.__name__}): {fault}" for fault in scene.faults(rows, exact)]
        if exact and not (scene.undefined and at_a_limit(scene)):
            got, wanted = ([(row.index, row.label) for row in found] for found in (rows, scene.greedy()))
            if got != wanted:
                faults.append(f"scene {i} ({kind.__name__}): rows {got}, expected {wanted}")
    return faults


@pytest.mark.covering(default=1, quick=0)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("layout", HEADS)
def test_reference_equals_the_oracle(layout, settings):
    assert not faults_of_reference(HEADS[layout](CLASSES), PostprocessConfig(**SETTINGS[settings]), seed=1)


# The backends.

MakeRunner = Callable[[onnx.ModelProto], Any]


def rows_of_backend(
    layout: Layout, backend: str, config: PostprocessConfig, heads: list[Tensors], runner: MakeRunner | None = None
) -> list[list[Row]]:
    """Rows of a batch of heads. ``runner`` opens the tail; default: in ONNX Runtime."""
    batch = {name: np.stack([head[name] for head in heads]) for name in heads[0]}
    fused = fuse(stub(layout, shapes_of(layout)), layout=layout, config=config, backend=backend, unverified=True)
    names = dict(zip(layout.tensors, fused.layout.tensors, strict=True))
    tail = cut_before(fused.model, {names[name]: value.shape[1:] for name, value in batch.items()})
    opened = OnnxRuntimeRunner(get_backend(backend).to_standard(tail, fused)) if runner is None else runner(tail)
    with np.errstate(all="ignore"):
        outputs = opened.run({names[name]: value for name, value in batch.items()})
    found = []
    for i in range(len(heads)):
        counts, boxes, scores, labels, indices = (
            outputs[name][i] for name in ("num_detections", "boxes", "scores", "labels", "indices")
        )
        n = int(counts[0])
        assert not boxes[n:].any() and not scores[n:].any() and (labels[n:] == -1).all() and (indices[n:] == -1).all()
        found.append(
            [Row(int(indices[k]), int(labels[k]), float(scores[k]), tuple(map(float, boxes[k]))) for k in range(n)]
        )
    return found


def judged(
    layout: Layout, backend: str, settings: dict, seed: int, count: int = SCENES, runner: MakeRunner | None = None
) -> list[str]:
    """What the oracle finds wrong with a backend's rows."""
    config, faults = PostprocessConfig(**settings, indices=True), []
    heads = scenes(layout, config, seed, count)
    for i, rows in enumerate(rows_of_backend(layout, backend, config, heads, runner)):
        found = Scene(heads[i], layout, config, (SIZE, SIZE)).faults(rows)
        faults += [f"scene {i} ({KINDS[i % len(KINDS)].__name__}): {fault}" for fault in found]
    return faults


@pytest.mark.covering(default=1, quick=0)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("layout", HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_equals_the_oracle(backend, layout, settings):
    """In ONNX Runtime, where the graph of `ort` (oriented boxes: `portable`) stands in for the plugin."""
    assert not judged(HEADS[layout](CLASSES), backend, SETTINGS[settings], seed=2)


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["ort", "portable", "trt"])
@pytest.mark.parametrize("layout", HEADS)
def test_backend_equals_the_oracle_on_many_scenes(backend, layout):
    for seed, settings in enumerate(SETTINGS.values(), 10):
        assert not judged(HEADS[layout](CLASSES), backend, settings, seed, count=60)


@pytest.mark.slow
@pytest.mark.covering(default=0)
@pytest.mark.parametrize("settings", [*SETTINGS])
@pytest.mark.parametrize("layout", [name for name in HEADS if HEADS[name](CLASSES).suppress])
def test_kernels_of_the_plugin_equal_the_oracle(layout, settings):
    """Run on this CPU, from their own source."""
    library()
    layout, settings = HEADS[layout](CLASSES), SETTINGS[settings]
    assert not judged(layout, "plugin", settings, seed=3, runner=lambda tail: KernelRunner(tail, on_cpu(7)))


@pytest.mark.slow
def test_zeros_of_both_signs_are_equal_to_the_kernels():
    library()
    layout = HEADS["distances"](CLASSES)
    head = plain(layout, PostprocessConfig(), np.random.default_rng(0))
    head["logits"][:] = -20
    head["logits"][0, :40] = np.tile([0.0, -0.0], 20)
    config = PostprocessConfig(indices=True, iou_threshold=1.0)
    (rows,) = rows_of_backend(layout, "plugin", config, [head], lambda tail: KernelRunner(tail, on_cpu(7)))
    assert [row.index for row in rows] == list(range(40))


# Single decisions, on every backend and in the reference.


def corners(boxes: list[list[float]], scores: list[list[float]]) -> Tensors:
    """A head of `LAYOUTS["corners_rows"]` that holds these and nothing else."""
    layout = LAYOUTS["corners_rows"](CLASSES)
    head = {name: np.zeros(shape, np.float32) for name, shape in shapes_of(layout).items()}
    head["boxes"][: len(boxes)], head["scores"][: len(scores)] = boxes, scores
    return head


def indices_of(layout: Layout, backend: str, head: Tensors, **settings: object) -> list[int]:
    """Candidate numbers of the rows, which the oracle has judged, and which are those of the reference."""
    config = PostprocessConfig.from_dict(settings | {"indices": True})
    (rows,) = rows_of_backend(layout, backend, config, [head])
    assert not Scene(head, layout, config, (SIZE, SIZE)).faults(rows)
    assert [row.index for row in rows] == [row.index for row in rows_of_reference(head, layout, config)]
    return [row.index for row in rows]


@pytest.mark.covering(default=1, quick=0)
@pytest.mark.parametrize("corner", range(4))
@pytest.mark.parametrize("backend", BACKENDS)
def test_box_with_a_corner_at_minus_infinity_never_wins(backend, corner):
    lost = [8.0, 8.0, 24.0, 24.0]
    lost[corner] = -np.inf
    head = corners([[0, 0, 16, 16], lost, [40, 0, 16, 16]], [[0.9, 0, 0], [0.8, 0, 0], [0.7, 0, 0]])
    assert indices_of(LAYOUTS["corners_rows"](CLASSES), backend, head) == [0, 2]  # a negative size is no reason


@pytest.mark.covering(quick=0)
@pytest.mark.parametrize("backend", BACKENDS)
def test_class_values_whose_sum_exceeds_float32_are_usable(backend):
    head = corners([[0, 0, 8, 8], [16, 0, 24, 8], [32, 0, 40, 8]], [[3e38, 3e38, 3e38], [np.nan, 1, 1], [np.inf, 1, 1]])
    assert indices_of(LAYOUTS["corners_rows"](CLASSES), backend, head) == [0]


@pytest.mark.covering(quick=0)
@pytest.mark.parametrize("backend", BACKENDS)
def test_score_above_float32_never_wins(backend):
    layout = LAYOUTS["decoded_objectness"](CLASSES)
    head = {"output0": np.zeros(shapes_of(layout)["output0"], np.float32)}
    head["output0"][:2] = [[8, 8, 8, 8, 3.0, 3e38, 0, 0], [32, 8, 8, 8, 0.5, 3e38, 0, 0]]
    assert indices_of(layout, backend, head) == [1]


@pytest.mark.covering(quick=0)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["sigmoid_queries", "distances"])
def test_every_finite_logit_passes_a_threshold_of_zero(layout, backend):
    layout = HEADS[layout](CLASSES)
    head = plain(layout, PostprocessConfig(), np.random.default_rng(0))
    values = head[layout.classes.tensor]
    rows = values.T if layout.classes.channel_axis == 1 else values
    logits = rows[:, layout.classes.start : layout.classes.stop]
    logits[:] = -np.inf
    logits[:4, 0] = [-1e20, -3e38, -3.2e38, np.finfo(np.float32).min]
    assert indices_of(layout, backend, head, score_threshold=0.0, iou_threshold=1.0, max_detections=8) == [0, 1, 2, 3]


@pytest.mark.covering(quick=0)
@pytest.mark.parametrize("backend", BACKENDS)
def test_unusable_class_is_not_hidden_by_a_weight_of_zero(backend):
    layout = HEADS["objectness_alone"](CLASSES)
    head = plain(layout, PostprocessConfig(), np.random.default_rng(0))
    head["output"][5, ::2] = np.nan
    assert indices_of(layout, backend, head, multi_label=True)


# The oracle can fail.


def faults_when_both_are_wrong(layout: Layout, backend: str, settings: dict) -> tuple[list[str], list[str]]:
    return faults_of_reference(layout, PostprocessConfig(**settings), seed=2), judged(layout, backend, settings, seed=2)


@pytest.mark.slow
def test_infinity_hidden_by_reference_and_graph_alike_is_found(monkeypatch):
    """As both did at first: corners were ordered before anyone asked whether they are finite. Verification sees no difference."""
    within_reach, decode_boxes = reference._within_reach, graph_candidates.decode_boxes
    monkeypatch.setattr(reference, "_within_reach", lambda boxes, reach: within_reach(reference.ordered(boxes), reach))
    monkeypatch.setattr(
        graph_candidates,
        "decode_boxes",
        lambda g, layout, *rest: order_corners(g, layout, decode_boxes(g, layout, *rest)),
    )
    layout = HEADS["corners_rows"](CLASSES)
    assert verify(fused_model(layout, "ort"))
    faults = faults_when_both_are_wrong(layout, "ort", {})
    assert all("box is not usable" in found[0] for found in faults)


@pytest.mark.slow
def test_areas_that_count_pixels_in_reference_and_graph_alike_are_found(monkeypatch):
    """A box from 0 to 9 is ten pixels wide, in other programs."""
    iou, overlap = reference.pairwise_iou, portable.overlap_upright
    one = np.array([0, 0, 1.0, 1.0])

    def wider(g, boxes, others, threshold):
        boxes, others = ((*b[:2], *(g.op("Add", x, g.floats(1.0)) for x in b[2:])) for b in (boxes, others))
        return overlap(g, boxes, others, threshold)

    monkeypatch.setattr(reference, "pairwise_iou", lambda a, b: iou(a + one, b + one))
    monkeypatch.setattr(portable, "overlap_upright", wider)
    layout = HEADS["corners_rows"](CLASSES)
    assert verify(fused_model(layout, "portable"))
    assert all(faults_when_both_are_wrong(layout, "portable", {}))


@pytest.mark.slow
def test_thresholds_that_are_not_strict_in_reference_and_graph_alike_are_found(monkeypatch):
    choose, strict = reference._choose, graph_candidates.strict_threshold

    def below(found, config, rounding, thresholds):
        loose = float(np.nextafter(np.float32(config.score_threshold), np.float32(0)))
        return choose(found, config, rounding, replace(thresholds, score=(loose,)))

    monkeypatch.setattr(reference, "_choose", below)
    monkeypatch.setattr(graph_candidates, "strict_threshold", lambda *a: np.nextafter(strict(*a), np.float32(-1)))
    layout = HEADS["corners_rows"](CLASSES)
    assert verify(fused_model(layout, "ort"))
    assert all(faults_when_both_are_wrong(layout, "ort", {}))


@pytest.mark.parametrize("layout", ["corners_rows", "finished_rows"])
def test_ties_to_the_higher_index_are_found(layout):
    """The candidates in the opposite order, and their numbers turned back: all is right but the ties."""
    layout, config, faults = HEADS[layout](CLASSES), PostprocessConfig(), []
    last = candidates_of(layout) - 1
    for head in scenes(layout, config, seed=2):
        rows = rows_of_reference({name: values[::-1] for name, values in head.items()}, layout, config)
        turned = [replace(row, index=last - row.index) for row in rows]
        faults += Scene(head, layout, config, (SIZE, SIZE)).faults(turned)
    assert faults and all("which is better" in fault or "missing" in fault for fault in faults)
