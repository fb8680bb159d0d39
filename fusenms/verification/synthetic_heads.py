"""Synthetic head tensors for verification: random, dense, empty, tied, at the thresholds, crowded, unusable values."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from fusenms.artifacts.raw import ImageInput
from fusenms.config import PostprocessConfig, Thresholds
from fusenms.fusion.thresholds import strict_threshold
from fusenms.layout import (
    Activation,
    BoxFormat,
    Decoded,
    Distances,
    Layout,
    PointOffsets,
    Tap,
    candidates_per_level,
)

LOW = -9.0  # logit of a candidate without an object


@dataclass(frozen=True)
class Stage:
    """What synthetic heads are made for: layout, settings, image input, number of candidates, and the thresholds of the run."""

    layout: Layout
    config: PostprocessConfig
    image: ImageInput
    count: int
    thresholds: Thresholds | None = None

    @property
    def score_thresholds(self) -> tuple[float, ...]:
        """One for all classes, or one for each."""
        return (self.thresholds or Thresholds.of(self.config)).score

    @property
    def iou_threshold(self) -> float:
        return (self.thresholds or Thresholds.of(self.config)).iou


@dataclass
class SyntheticHead:
    """One image's head: class logits ``[N, C]``, objectness logits ``[N]``, box terms ``[N, channels]``."""

    classes: np.ndarray
    objectness: np.ndarray
    boxes: np.ndarray


def random(stage: Stage, rng: np.random.Generator) -> SyntheticHead:
    """Up to 250 objects at random candidates."""
    head = empty(stage, rng)
    _raise_some(stage, head, rng, min(stage.count, 250), -3.0, 5.0)
    return head


def dense(stage: Stage, rng: np.random.Generator) -> SyntheticHead:
    """Clusters of neighboring candidates that overlap strongly, of few classes."""
    head = empty(stage, rng)
    middle = rng.integers(stage.count, size=24)
    rows = np.unique((middle[:, None] + np.arange(-20, 20)[None]).clip(0, stage.count - 1))
    label = (rows // 160) % min(3, stage.layout.classes.channels)
    head.classes[rows, label] = rng.uniform(-1, 5, len(rows))
    head.objectness[rows] = rng.uniform(0, 4, len(rows))
    return head


def empty(stage: Stage, rng: np.random.Generator) -> SyntheticHead:
    """No score above any usual threshold."""
    classes = LOW + 0.5 * rng.standard_normal((stage.count, stage.layout.classes.channels), np.float32)
    return SyntheticHead(classes, rng.normal(LOW, 0.5, stage.count), _random_boxes(stage, rng))


def ties(stage: Stage, rng: np.random.Generator) -> SyntheticHead:
    """Many equal scores, also among the classes of a box, and equal boxes."""
    head = SyntheticHead(
        np.full((stage.count, stage.layout.classes.channels), LOW), np.full(stage.count, 3.0), _even_boxes(stage)
    )
    rows = rng.choice(stage.count, min(stage.count, 400), replace=False)
    head.classes[rows] = rng.choice([LOW, 1.0, 2.0], (len(rows), stage.layout.classes.channels), p=[0.9, 0.05, 0.05])
    return head


def thresholds(stage: Stage, rng: np.random.Generator) -> SyntheticHead:
    """Scores at the threshold and one float to either side; pairs of boxes with IoU exactly at the threshold, if that is possible."""
    head = empty(stage, rng)
    head.boxes = _even_boxes(stage)
    rows = rng.choice(stage.count, min(stage.count, 60), replace=False)
    classes = rng.integers(stage.layout.classes.channels, size=len(rows))
    each = [strict_threshold(value, Activation.SIGMOID) for value in stage.score_thresholds]
    at = np.resize(np.array(each, np.float32), stage.layout.classes.channels)[classes]
    sides = np.stack((at, np.nextafter(at, np.float32(np.inf)), np.nextafter(at, np.float32(-np.inf))))
    head.classes[rows, classes] = np.clip(sides[np.arange(len(rows)) % 3, np.arange(len(rows))], -80, 80)
    head.objectness[rows] = 40.0
    _place_pairs(stage, head)
    return head


def crowded(stage: Stage, rng: np.random.Generator) -> SyntheticHead:
    """Every candidate above the threshold: more than `max_candidates`, if the head has that many."""
    head = empty(stage, rng)
    _raise_some(stage, head, rng, stage.count, 1.0, 6.0)
    return head


def unusable(stage: Stage, rng: np.random.Generator) -> SyntheticHead:
    """NaN and infinities among class scores and boxes, so few that they take no place from other candidates (see `reference`)."""
    head = empty(stage, rng)
    _raise_some(stage, head, rng, min(stage.count, 250, stage.config.max_candidates), -3.0, 5.0)
    for value in (np.nan, np.inf, -np.inf):
        rows = rng.choice(stage.count, min(stage.count, 40), replace=False)
        head.classes[rows, rng.integers(stage.layout.classes.channels, size=len(rows))] = value
    for value in (np.nan, np.inf, -np.inf):
        rows = rng.choice(stage.count, min(stage.count, 20), replace=False)
        head.boxes[rows, rng.integers(head.boxes.shape[1], size=len(rows))] = value
    return head


SYNTHETIC_HEADS: dict[str, Callable[[Stage, np.random.Generator], SyntheticHead]] = {
    head.__name__: head for head in (random, dense, empty, ties, thresholds, crowded, unusable)
}


def heads(stage: Stage, names: tuple[str, ...], shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Return the head's tensors for a batch with one synthetic head per image.

    Args:
        shapes: shape of each head tensor, without the batch dimension.

    Returns:
        name to float32 ``[len(names), *shape]``.
    """
    layout = stage.layout
    tensors = {name: np.zeros((len(names), *shape), np.float32) for name, shape in shapes.items()}

    def fill(i: int, name: str) -> None:  # each image has random numbers of its own
        head = SYNTHETIC_HEADS[name](stage, np.random.default_rng([seed, i, list(SYNTHETIC_HEADS).index(name)]))
        activate = layout.activation is Activation.NONE
        parts = [(layout.boxes, head.boxes), (layout.classes, _squash(head.classes) if activate else head.classes)]
        if layout.objectness is not None:
            objectness = _squash(head.objectness) if activate else head.objectness
            parts.append((layout.objectness, objectness[:, None]))
        if layout.background is not None:
            parts.append((layout.background, np.zeros((stage.count, 1))))
        parts += _further(stage, np.random.default_rng([seed, i, 1]))
        if layout.masks is not None:
            shape = tensors[layout.masks.prototypes].shape[1:]
            tensors[layout.masks.prototypes][i] = np.random.default_rng([seed, i, 2]).normal(0, 1, shape)
        if layout.labels is not None:
            labels = np.random.default_rng([seed, i]).integers(80, size=(stage.count, 1))
            parts.append((layout.labels, labels))
        for tap, values in parts:
            target = tensors[tap.tensor][i]
            rows = target.T if tap.channel_axis == 1 else target
            rows[:, tap.start : tap.stop] = values

    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(len(names)), names))
    if layout.activation is Activation.NONE and layout.objectness is None:
        _exact_threshold(stage, names, tensors)
    return tensors


def _further(stage: Stage, rng: np.random.Generator) -> list[tuple[Tap, np.ndarray]]:
    """Random values for the task outputs of the candidates."""
    layout, parts = stage.layout, []
    if layout.masks is not None:
        tap = layout.masks.coefficients
        parts.append((tap, rng.normal(0, 1, (stage.count, tap.channels))))
    if layout.keypoints is not None:
        tap, sides = layout.keypoints.values, np.array([stage.image.width, stage.image.height])
        values = rng.normal(0, 2, (stage.count, layout.keypoints.count, layout.keypoints.dims))
        if layout.keypoints.factor is None:
            values = rng.random(values.shape)
            values[..., :2] *= sides
        parts.append((tap, values.reshape(stage.count, -1)))
    if layout.angle is not None:
        parts.append((layout.angle.value, rng.normal(0, 1.5, (stage.count, 1))))
    return parts


def _exact_threshold(stage: Stage, names: tuple[str, ...], tensors: dict[str, np.ndarray]) -> None:
    """Set probabilities within 1e-7 of the threshold to the threshold. Finished probabilities can equal it exactly."""
    tap = stage.layout.classes
    threshold = np.resize(np.array(stage.score_thresholds, np.float32), tap.channels)
    for i in (i for i, name in enumerate(names) if name == "thresholds"):
        values = tensors[tap.tensor][i]
        rows = (values.T if tap.channel_axis == 1 else values)[:, tap.start : tap.stop]
        np.copyto(rows, threshold, where=np.abs(rows - threshold) <= 1e-7)


def _squash(logits: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.where(logits == np.inf, np.inf, 1 / (1 + np.exp(-logits)))


def _raise_some(
    stage: Stage, head: SyntheticHead, rng: np.random.Generator, count: int, low: float, high: float
) -> None:
    rows = rng.choice(stage.count, count, replace=False)
    head.classes[rows, rng.integers(stage.layout.classes.channels, size=count)] = rng.uniform(low, high, count)
    head.objectness[rows] = rng.uniform(0, 5, count)


def _random_boxes(stage: Stage, rng: np.random.Generator) -> np.ndarray:
    layout, count = stage.layout, stage.count
    if isinstance(layout.decode, Distances) and layout.decode.bins == 1:
        return rng.uniform(-0.5, 6, (count, 4)) * _unit(stage)  # some of negative size
    if isinstance(layout.decode, PointOffsets):
        return np.concatenate((rng.normal(0, 1, (count, 2)), rng.uniform(-0.5, 6, (count, 2))), 1) * _unit(stage)
    if isinstance(layout.decode, Distances):
        bins = layout.decode.bins
        peak = rng.uniform(0, min(6, bins - 1), (count, 4, 1))
        return (-((np.arange(bins) - peak) ** 2) + 0.3 * rng.standard_normal((count, 4, bins), np.float32)).reshape(
            count, -1
        )
    if not isinstance(layout.decode, Decoded):
        return rng.normal(0, 1, (count, 4))
    sides = np.array([stage.image.width, stage.image.height])
    center, size = (
        rng.uniform(0, 1, (count, 2)) * sides,
        np.exp(rng.uniform(np.log(6), np.log(0.4 * sides.min()), (count, 2))),
    )
    size[::97] *= -1  # some of negative size
    return _as_format(stage, center - size / 2, center + size / 2)


def _even_boxes(stage: Stage) -> np.ndarray:
    """Boxes whose coordinates are exact in float32. Many decoded boxes are equal."""
    layout, count = stage.layout, stage.count
    if isinstance(layout.decode, Distances) and layout.decode.bins == 1:
        return np.full((count, 4), 2.0) * _unit(stage)
    if isinstance(layout.decode, PointOffsets):
        return np.repeat([[0.0, 0.0, 4.0, 4.0]], count, 0) * _unit(stage)
    if isinstance(layout.decode, Distances):
        terms = np.zeros((count, 4, layout.decode.bins))
        terms[:, :, min(2, layout.decode.bins - 1)] = 1000.0  # all weight on one bin
        return terms.reshape(count, -1)
    if not isinstance(layout.decode, Decoded):
        return np.zeros((count, 4))
    corner = np.stack((np.arange(count) % 13 * 16.0, np.arange(count) % 7 * 16.0), 1)
    return _as_format(stage, corner, corner + 32.0)


def _unit(stage: Stage) -> np.ndarray:
    """What box terms are given in, for each candidate ``[N, 1]``: its stride if they are in pixels, 1 if they are in strides."""
    decode = stage.layout.decode
    if not isinstance(decode, PointOffsets) and not (isinstance(decode, Distances) and decode.pixels):
        return np.ones((stage.count, 1))
    counts = candidates_per_level(decode, stage.image.height, stage.image.width)
    return np.repeat(np.array(decode.strides, np.float64), counts)[:, None]


def _as_format(stage: Stage, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    decode = stage.layout.decode
    assert isinstance(decode, Decoded)
    if decode.normalized:
        sides = np.array([stage.image.width, stage.image.height])
        low, high = low / sides, high / sides
    if decode.format is BoxFormat.CXCYWH:
        return np.concatenate(((low + high) / 2, high - low), 1)
    return np.concatenate((low, high), 1)


def _place_pairs(stage: Stage, head: SyntheticHead) -> None:
    """Put pairs into the first candidates: the second box lies in the first and has exactly `iou_threshold` of its area.

    The threshold is read as a fraction, such as 9 / 20. No pair is placed if the head cannot express sides in that ratio.
    """
    if stage.layout.angle is not None:  # the probabilistic IoU is not a fraction
        return
    decode, most = stage.layout.decode, 28
    share = Fraction(stage.iou_threshold).limit_denominator(most)
    if float(share) != stage.iou_threshold or not 0 < share < 1 or stage.count < 16:
        return
    if not isinstance(decode, (Decoded, Distances)) or (isinstance(decode, Distances) and 1 < decode.bins < 16):
        return
    if isinstance(decode, Decoded) and decode.normalized:
        return
    times = most // share.denominator
    wide, narrow = share.denominator * times, share.numerator * times
    for big, small in ((0, 1), (8, 9)):
        if isinstance(decode, Distances):
            right = min(narrow // 2, wide // 2 - 1)
            for row, ends in ((big, (wide - wide // 2, 2, wide // 2, 2)), (small, (narrow - right, 2, right, 2))):
                terms = np.zeros((4, decode.bins))
                if decode.bins == 1:
                    terms[:, 0] = np.array(ends) * _unit(stage)[row]
                else:
                    terms[np.arange(4), ends] = 1000.0
                head.boxes[row] = terms.ravel()
        else:
            low = np.array([[64.0 * big, 0.0]] * 2)
            head.boxes[[big, small]] = _as_format(
                stage, low, low + np.array([[8.0 * wide, 16.0], [8.0 * narrow, 16.0]])
            )
        head.classes[[big, small]] = (
            LOW  # no other pair has the same class or score: where scores are rounded, it could take its place
        )
        label = min(big // 8, head.classes.shape[1] - 1)
        head.classes[big, label], head.classes[small, label] = 4.0 - label / 2, 3.0 - label / 2
        head.objectness[[big, small]] = 40.0
