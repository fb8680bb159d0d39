"""Whether decoded boxes move with the image, as those of a detector do: evidence for a layout without any object in the image.

A window slides over a larger image by one step of the coarsest level, in both axes. Away from the edges, each candidate must come back at
the cell that is one step on, with its center moved by just that and its size unchanged. Centers read as corners, pixels read as
normalized, levels in the wrong order and wrong anchors or strides do not. A constant offset, such as half a cell, cannot be seen this way.

Coarse levels see the edges of the image and change with them. They are not judged, unless a head has no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fusenms.artifacts.raw import RawModel
from fusenms.artifacts.raw_head import RawHead
from fusenms.heads.probe import USUAL_STRIDES, Probe, cell_centers, channels_of, probe_image
from fusenms.layout import (
    Activation,
    BoxFormat,
    Decoded,
    Distances,
    Gridded,
    Layout,
    PointOffsets,
    anchors_per_cell,
    cells_along,
    has_anchors_last,
    turned_around,
)
from fusenms.reference import candidates

MOST_CENTER = 0.25
"""Limit on the median error of a center, in strides of its level."""
MOST_SIZE = 0.5
"""Limit on the median change of a size, in steps of the window."""
MUCH_BETTER = 0.5
"""Another order of the levels counts if the scores that it finds again differ by less than this part of what the layout's own leaves."""
FAR_FROM_EDGES = 100
"""Pixels. Nearer cells of trained networks see the edge of the image (YOLO11n at 256 x 256: 0.41 strides off), and contradict a layout only
if another one fits far better."""
FAR_BETTER = 4.0
STILL = 1e-3
"""Box channels that change by less than this, of their spread, are independent of the place in the image."""
FOLLOWS = 0.9
"""Correlation with the cells from which on box channels hold positions."""

Head = dict[str, np.ndarray]
Pair = tuple[np.ndarray, np.ndarray]
"""Values before and after the window has moved."""


@dataclass(frozen=True, kw_only=True)
class LevelMotion:
    """One level.

    ``center`` is the median error of the centers, in strides, and ``size`` the median change of the sizes, in steps of the window, of the
    worse axis. Boxes that are decoded from cells have no wrong format, so their sizes are not judged (None). ``scores`` is the difference
    of scores that should be the same, relative to the difference of any two.
    """

    stride: int
    center: float
    size: float | None
    scores: float

    @property
    def follows(self) -> bool:
        return self.center <= MOST_CENTER and (self.size is None or self.size <= MOST_SIZE)

    def __str__(self) -> str:
        sizes = "" if self.size is None else f", sizes {self.size:.2g} steps off"
        return f"stride {self.stride}: centers {self.center:.2g} strides off{sizes}"


@dataclass(frozen=True, kw_only=True)
class Motion:
    """What the sliding window showed.

    Attributes:
        levels: the judged levels; empty if nothing could be judged.
        reason: why nothing could be judged.
        fitting: other readings of the box channels that fit, if the layout's own does not, or fits clearly worse.
        grid: the cells of the candidates; None if there are none, or nothing could be judged.
    """

    levels: tuple[LevelMotion, ...] = ()
    reason: str = ""
    fitting: tuple[str, ...] = ()
    grid: Grid | None = None

    @property
    def scores(self) -> float:
        """Mean of the levels' ``scores``."""
        return float(np.mean([level.scores for level in self.levels])) if self.levels else 0.0

    @property
    def worst(self) -> float:
        """The largest error of the levels, as a multiple of its limit."""
        return max(
            (max(level.center / MOST_CENTER, (level.size or 0) / MOST_SIZE) for level in self.levels), default=0.0
        )

    @property
    def follows(self) -> bool:
        """Whether every judged level moves with the image."""
        return bool(self.levels) and all(level.follows for level in self.levels)

    @property
    def contradicted(self) -> bool:
        """Whether a judged level does not move with the image, or another reading fits clearly better."""
        return bool(self.levels) and (not self.follows or bool(self.fitting))

    @property
    def shown(self) -> bool:
        return bool(self.levels) and not self.contradicted


@dataclass(frozen=True)
class Grid:
    """Cells of a head's candidates: levels in order, with ``anchors`` per cell of each, which lie before the rows or after the columns."""

    strides: tuple[int, ...]
    anchors: tuple[int, ...]
    anchors_last: bool
    height: int
    width: int

    def levels(self, boxes: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Stride and boxes ``[anchors, rows, columns, 4]`` of each level."""
        start = 0
        for stride, anchors in zip(self.strides, self.anchors, strict=True):
            rows, columns = cells_along(self.height, stride), cells_along(self.width, stride)
            stop = start + anchors * rows * columns
            level = boxes[start:stop]
            if self.anchors_last:
                yield stride, level.reshape(rows, columns, anchors, -1).transpose(2, 0, 1, 3)
            else:
                yield stride, level.reshape(anchors, rows, columns, -1)
            start = stop


@dataclass(frozen=True, kw_only=True)
class Slide:
    """Values of a head's tensors ``[1, …]`` in two windows of an image, ``step`` pixels apart in both axes, and its possible grids.

    ``more`` are the values on other images.
    """

    probe: Probe
    head: RawHead
    grids: tuple[Grid, ...]
    step: int
    before: Head
    after: Head
    more: tuple[Head, ...] = ()

    @property
    def raw(self) -> RawModel:
        return self.probe.raw


def slide(raw: RawModel, head: RawHead, more: Sequence[np.ndarray] = ()) -> Slide:
    """Run a model on a window of an image before and after it moves by one step of the coarsest level.

    Args:
        more: other images ``[1, 3, height, width]`` float32 (RGB, 0 to 1) to run it on.

    Raises:
        SourceError: the model does not run.
    """
    image, probe = raw.image, Probe(raw)
    grids = tuple(_grids(probe, head.layout, head.candidates(head.layout.boxes)))
    step = max((max(grid.strides) for grid in grids), default=image.stride)
    canvas = probe_image(image.height + step, image.width + step)
    windows = canvas[:, :, step:, step:], canvas[:, :, :-step, :-step]
    before, after, *others = probe.heads_on([head.pixels.apply(one) for one in (*windows, *more)], head.layout)
    return Slide(probe=probe, head=head, grids=grids, step=step, before=before, after=after, more=tuple(others))


def measure_motion(found: Slide) -> Motion:
    """Measure how the decoded boxes of a head follow a window that moves."""
    layout, image, grids, step = found.head.layout, found.raw.image, found.grids, found.step
    before, after = found.before, found.after
    if all(np.array_equal(before[name], after[name]) for name in layout.tensors):
        return Motion(reason="the head does not depend on the image")
    if not grids:
        return Motion(reason="its candidates have no cells")
    was, now = (channels_of(values, layout.boxes) for values in (before, after))
    if isinstance(layout.decode, Decoded):
        grids = tuple(grid for grid in grids if _has_places(was, grid) and not _is_still(was, now, grid, step))
        if not grids:
            return Motion(reason="its boxes do not lie in cells")
    size = image.height, image.width
    own = _best(before, after, layout, size, grids, step)
    others = {name: _best(before, after, other, size, grids, step) for name, other in other_readings(layout)}
    better = (name for name, other in others.items() if other.follows and other.scores < MUCH_BETTER * own.scores)
    fitting = better if own.follows else (name for name, other in others.items() if other.follows)
    if not own.follows and _margin(own, grids, step) < FAR_FROM_EDGES:
        fitting = (name for name, other in others.items() if other.follows and other.worst < own.worst / FAR_BETTER)
        if not (named := tuple(fitting)):
            return Motion(reason="its cells see the edges of its images")
        return replace(own, fitting=named)
    return replace(own, fitting=tuple(fitting) if own.levels else ())


def _margin(motion: Motion, grids: Sequence[Grid], step: int) -> int:
    """Pixels between the edge of the image and the nearest cell that was judged."""
    strides = [level.stride for level in motion.levels]
    sides = {side for grid in grids for side in (grid.height, grid.width)}
    return min((_inset(cells_along(side, s), step // s) * s for s in strides for side in sides), default=0)


def other_readings(layout: Layout) -> Iterator[tuple[str, Layout]]:
    """Other readings of the same box channels, with what a layout calls them."""
    decode = layout.decode
    if isinstance(decode, Decoded) and layout.angle is None:
        for form in BoxFormat:
            for normalized in (False, True):
                if (form, normalized) != (decode.format, decode.normalized):
                    name = f"{form.value} {'normalized' if normalized else 'in pixels'}"
                    yield name, replace(layout, decode=replace(decode, format=form, normalized=normalized))
    elif not isinstance(decode, Decoded) and len(decode.strides) > 1:
        turned = turned_around(decode)
        yield f"strides {', '.join(map(str, turned.strides))}", replace(layout, decode=turned)


def _grids(probe: Probe, layout: Layout, count: int) -> Iterator[Grid]:
    """Grids that a head's candidates may have."""
    decode, image = layout.decode, probe.raw.image
    if not isinstance(decode, Decoded):
        yield grid_of(decode, image.height, image.width)
        return
    for anchors in (1, 2, 3):
        for strides in USUAL_STRIDES:
            if anchors * sum(probe.cells(strides)) == count:
                for last in (False, True)[: 1 + (anchors > 1)]:
                    yield Grid(strides, (anchors,) * len(strides), last, image.height, image.width)


def grid_of(decode: Gridded, height: int, width: int) -> Grid:
    """The cells that boxes are decoded from."""
    return Grid(decode.strides, anchors_per_cell(decode), has_anchors_last(decode), height, width)


def _has_places(terms: np.ndarray, grid: Grid) -> bool:
    """Whether two of the box channels ``[N, 4]``, or the means of both corners, rise with the cells of the grid."""
    channels, centers = [], []
    for stride, level in grid.levels(terms.astype(np.float64)):
        cells = cell_centers(grid.height, grid.width, stride).reshape(1, *level.shape[1:3], 2)
        channels.append(level.reshape(-1, 4))
        centers.append(np.broadcast_to(cells, (*level.shape[:3], 2)).reshape(-1, 2))
    boxes, cells = np.concatenate(channels), np.concatenate(centers)
    return bool(np.isfinite(boxes).all()) and any(
        all(places[:, i].std() > 0 and np.corrcoef(places[:, i], cells[:, i])[0, 1] > FOLLOWS for i in (0, 1))
        for places in (boxes[:, :2], (boxes[:, :2] + boxes[:, 2:]) / 2)
    )


def _is_still(before: np.ndarray, after: np.ndarray, grid: Grid, step: int) -> bool:
    """Whether the box channels of a shifted cell are those of the cell itself, so that they hold no places."""
    changes = [
        np.abs(b - a).max(-1).ravel()
        for a, b, _ in _shifted(before.astype(np.float64), after.astype(np.float64), grid, step)
    ]
    return bool(np.median(np.concatenate(changes)) < STILL * max(float(np.ptp(before)), 1e-12))


def _shifted(
    before: np.ndarray, after: np.ndarray, grid: Grid, step: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Boxes of the inner cells of each level, those one step on after the window has moved, and the stride."""
    for (stride, a), (_, b) in zip(grid.levels(before), grid.levels(after), strict=True):
        if step % stride:
            continue
        (rows, columns), on = a.shape[1:3], step // stride
        y, x = _inset(rows, on), _inset(columns, on)
        if min(rows - 2 * y, columns - 2 * x) <= on:
            continue
        old = a[:, y : rows - y - on, x : columns - x - on]
        new = b[:, y + on : rows - y, x + on : columns - x]
        yield old, new, stride


def _inset(cells: int, on: int) -> int:
    """Number of cells at each edge that are not judged: a quarter, or fewer if hardly any would be left to move ``on`` cells."""
    return max(0, min(cells // 4, (cells - on - 2) // 2))


def _best(before: Head, after: Head, layout: Layout, size: tuple[int, int], grids: Sequence[Grid], step: int) -> Motion:
    """The motion on the grid that it fits best."""
    channel = replace(
        layout.boxes, stop=layout.boxes.start + 1
    )  # instead of the classes, whose decode would only take time
    plain = replace(
        layout,
        classes=channel,
        objectness=None,
        activation=Activation.NONE,
        background=None,
        labels=None,
        objectness_weight=None,
    )
    boxes = candidates(before, 0, plain, size).boxes, candidates(after, 0, plain, size).boxes
    scores = channels_of(before, layout.classes), channels_of(after, layout.classes)
    decode = layout.decode
    if isinstance(decode, Decoded):
        found = [_motion(boxes, scores, grid, step, True) for grid in grids]
    else:
        # distances without bins may be corners or centers that are decoded already
        sized = isinstance(decode, PointOffsets) or (isinstance(decode, Distances) and decode.bins == 1)
        found = [_motion(boxes, scores, grid_of(decode, *size), step, sized)]
    return min(found, key=lambda motion: max((level.center for level in motion.levels), default=np.inf))


def _motion(boxes: Pair, found_scores: Pair, grid: Grid, step: int, judge_sizes: bool) -> Motion:
    levels = []
    scores = _shifted(*found_scores, grid, step)
    for (old, new, stride), (seen, again, _) in zip(_shifted(*boxes, grid, step), scores, strict=True):
        (was, extent), (now, later) = (_center_and_size(values) for values in (old, new))
        with np.errstate(invalid="ignore"):
            off = np.abs(now - was - step).reshape(-1, 2) / stride
            grown = (later - extent).reshape(-1, 2) / step
        if (
            len(grid.strides) > 1
        ):  # all sizes of a single, coarse level change with the edges, though not in one direction
            grown = np.abs(grown)
        center, change = (np.abs(np.median(np.nan_to_num(values, nan=np.inf), 0)).max() for values in (off, grown))
        rows = seen.reshape(-1, seen.shape[-1])
        any_two = np.abs(rows - np.roll(rows, 1 + len(rows) // 2, 0)).mean()
        unlike = np.abs(again - seen).mean() / max(any_two, 1e-30)
        size = float(change) if judge_sizes else None
        levels.append(LevelMotion(stride=stride, center=float(center), size=size, scores=float(unlike)))
    judged = [level for level in levels if level.stride < max(grid.strides)] or levels
    return Motion(levels=tuple(judged), reason="" if judged else "its levels have too few cells", grid=grid)


def _center_and_size(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centers and sizes of boxes ``[…, 4]`` xyxy, or of oriented ones ``[…, 5]``."""
    if boxes.shape[-1] == 5:
        return boxes[..., :2], boxes[..., 2:4]
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
