"""What a detector finds in images of real objects, and finds again in their mirror images: evidence for a layout and for its pixels.

A trained detector that is read rightly finds a few objects, and finds them again, at the mirrored places, in the mirror image. With wrong
pixels or another box format it finds nothing, or much that is not there again. A constant offset of all boxes, such as half a cell, shows
as twice that offset. What is found in noise too is no object.

This needs a detector that knows something in the images. One that finds nothing there contradicts nothing: it is not shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fusenms.artifacts.preprocessing import PIXELS, Pixels
from fusenms.boxes import pairwise_iou, pairwise_probiou
from fusenms.config import PostprocessConfig
from fusenms.errors import LayoutContradictedError
from fusenms.heads.mirror_cells import compare_cells, mirror_boxes
from fusenms.heads.motion import Grid, Slide, grid_of, other_readings
from fusenms.heads.probe import probe_image
from fusenms.layout import Decoded, Layout, candidates_per_level
from fusenms.reference import Rows, candidates, keypoints, mask_coefficients, postprocess

CONFIG = PostprocessConfig(max_detections=100)
SAME_IOU = 0.5
"""Two boxes of one class with at least this IoU are the same object."""
STEADY, VERY_STEADY = 0.5, 0.75
"""Part of the detections that must be found again, of the layout and its pixels, and of others. Measured on 13 detectors: at least 0.59
with the right pixels; with values 255 times too large, at most 0.34."""
MOST_FOUND = 40
"""Detections of one image from which on they are no objects. Right readings find 3 to 21 in the example images."""
MOST_PASSING = 2000
"""Candidates above the threshold from which on they are no objects: right readings have 60 to 300 in the example images."""
FEWEST = 4
"""Objects found again without which nothing is contradicted."""
SMALLEST = 160
"""Pixels of the shorter side, below which nothing is contradicted: objects in the quarters of an image are too small then."""
CLASSES = 3
"""Classes of these objects without which other pixels are no better. Detectors of something else take a plate for a circle, say, and may do
so with the wrong pixels only."""
SURE = 0.4
"""Mean score of what is found again, without which nothing is contradicted."""
MOST_IN_NOISE = 1 / 3
"""Limit on the detections in noise, relative to those in the images."""
CLEARLY, MORE = 1.5, 1.0
"""Another reading is better if what it finds again has this many times the sum of scores, and this much more."""
MOST_OFFSET = 0.5
"""Limit on the median offset of what is found again, in strides of its level: an offset of half a cell gives 1."""

Head = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one reading of a head finds in some images.

    Attributes:
        found: detections, the mean of images and mirror images.
        again: detections that are found again.
        score: sum of the scores of those.
        classes: how many classes those have.
        offset: median offset of those to the right, in strides of their level; None if the candidates have no cells.
        images: how many images there are.
    """

    found: float
    again: int
    score: float
    classes: int
    offset: float | None
    images: int

    @property
    def worth(self) -> float:
        """The sum of scores, or 0 if too much is not found again, or too much is found."""
        return self.score if self._part(STEADY) else 0.0

    @property
    def convincing(self) -> bool:
        """Whether what is found again can contradict another reading."""
        return self.again >= FEWEST and self._part(VERY_STEADY) and self.score >= SURE * self.again

    def _part(self, least: float) -> bool:
        return self.again >= least * self.found and self.found <= MOST_FOUND * self.images

    def beats(self, other: Seen) -> bool:
        """Whether this reading is clearly the better one."""
        return self.convincing and self.score > max(CLEARLY * other.worth, other.worth + MORE)


@dataclass(frozen=True)
class Shown:
    """Result: a line for the user, and whether objects were found again."""

    line: str
    shown: bool


def mirrored(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Each image, and its mirror image."""
    return [side for image in images for side in (image, np.ascontiguousarray(image[..., ::-1]))]


def check_mirror(
    found: Slide, images: Sequence[np.ndarray], contradict: bool = True, grid: Grid | None = None
) -> Shown:
    """Compare a layout and its pixels with what the network finds in images and in their mirror images.

    Args:
        found: values of the head, as ``more`` those on each image of `mirrored`.
        images: ``[1, 3, height, width]`` float32 each, RGB, 0 to 1, of the model's size.
        contradict: also look for what contradicts the layout, not only for objects that are found again.
        grid: the cells of candidates that are decoded already, if they have some.

    Raises:
        LayoutContradictedError: another box format, or other pixels, find clearly more objects again, or boxes have a constant offset.
        SourceError: the model does not run.
    """
    raw, head = found.raw, found.head
    look, pairs = Look(found, head.layout, head.pixels), _two_by_two(found.more)
    own = look.judge(pairs)
    if contradict and (reason := _contradiction(found, look, images, own, pairs, grid)):
        raise LayoutContradictedError(f"{raw.source}: read as {head.layout.family}, but {reason}")
    if own.again and own.worth and not look.imagines(own):
        return Shown(f"shown on images: {own.again} objects found again in mirror images", True)
    many = (
        f"{own.found:g} detections, {own.again} of them found again in mirror images" if own.found else "no detections"
    )
    return Shown(f"not shown on images: {many}", False)


def _contradiction(
    found: Slide,
    look: Look,
    images: Sequence[np.ndarray],
    own: Seen,
    pairs: list[tuple[Head, Head]],
    grid: Grid | None,
) -> str | None:
    """How what is found contradicts the layout or its pixels, as a clause; None if it does not."""
    raw, head = found.raw, found.head
    offset = abs(own.offset or 0.0)
    if own.again >= FEWEST and own.worth >= SURE * own.again and offset > MOST_OFFSET and not look.imagines(own):
        return (
            f"what it finds lies {offset:.2g} cells beside what it finds in mirror images, so that its boxes are measured from another "
            "point of the cell; give another family, or a layout that says so"
        )
    if isinstance(head.layout.decode, Decoded):
        for name, layout in other_readings(head.layout):
            reading = Look(found, layout, head.pixels)
            other = reading.judge(pairs)
            if other.beats(own) and not reading.imagines(other):
                return (
                    f"it finds objects again in mirror images only if its boxes are {name}; give another family, or a layout that "
                    "says so"
                )
    if (swapped := objectness_last(head.layout)) is not None:
        reading = Look(found, swapped, head.pixels)
        other = reading.judge(pairs)
        if other.convincing and other.classes >= CLASSES and other.score > own.worth and not reading.imagines(other):
            return (
                f"with the last channel as the objectness, behind the classes, it finds {other.again} objects of {other.classes} classes "
                "again in mirror images, with better scores than as it is read; give a layout that says so"
            )
    doubtful = (
        raw.layout is None or not own.worth
    )  # a checkpoint's pixels are those of its training, if it finds anything
    if raw.pixels is None and doubtful and (better := _better_pixels(found, images, own)):
        return (
            f"with {head.pixels}, assumed for that family, it finds {own.again} of {own.found:g} objects again in mirror images, and with "
            f"pixels {' or '.join(better)} clearly more; give pixels={better[0]!r}, or those that it was trained with"
        )
    if not isinstance(head.layout.decode, Decoded):
        grid = grid_of(head.layout.decode, raw.image.height, raw.image.width)
    return None if grid is None else _unlike_cells(found, look, own, pairs, grid)


def objectness_last(layout: Layout) -> Layout | None:
    """The layout with the last class as the objectness, if the objectness lies before the classes."""
    there, classes = layout.objectness, layout.classes
    if there is None or classes.channels < 2 or (there.tensor, there.stop) != (classes.tensor, classes.start):
        return None
    last = classes.stop - 1
    return replace(
        layout, classes=replace(classes, start=there.start, stop=last), objectness=replace(classes, start=last)
    )


def _unlike_cells(found: Slide, look: Look, own: Seen, pairs: list[tuple[Head, Head]], grid: Grid) -> str | None:
    """How the boxes of cells that see the same in the mirror image contradict the layout, as a clause; None if they do not."""
    cells = compare_cells(pairs, found.head.layout, grid, CONFIG.score_threshold)
    if not cells.unlike or not (cells.symmetric or not look.imagines(own)):
        return None
    return (
        f"{cells.cells} cells see the same in mirror images, but not with mirrored boxes (IoU {cells.iou:.2f}), so that the box channels "
        "mean something else (in another order or format, or decoded already) or the pixels are wrong; give another family, a layout, or "
        "the pixels"
    )


def _better_pixels(found: Slide, images: Sequence[np.ndarray], own: Seen) -> list[str]:
    """Names of other pixels that find clearly more, the best first.

    Detectors find nearly the same with red and blue exchanged, so pixels are told apart by their range alone: one of each range is tried.
    """
    ranges: dict[int, list[str]] = {}
    for name, pixels in PIXELS.items():
        ranges.setdefault(_range(pixels), []).append(name)
    ranges.pop(_range(found.head.pixels), None)
    better = {}
    for names in ranges.values():
        looks = {name: Look(found, found.head.layout, PIXELS[name]) for name in names}
        if looks[names[0]].most(images) <= max(CLEARLY * own.worth, own.worth + MORE):
            continue  # cannot be better, whatever the mirror images show
        for name, look in looks.items():
            other = look.judge(_two_by_two(look.values(mirrored(images))))
            if other.beats(own) and other.classes >= CLASSES and not look.imagines(other):
                better[name] = other.score
    return sorted(better, key=better.__getitem__, reverse=True)


def _range(pixels: Pixels) -> int:
    """A number for pixels of about the same range of values."""
    factor, _ = pixels.terms
    return round(float(np.log2(factor.mean())))


def _two_by_two(heads: Sequence[Head]) -> list[tuple[Head, Head]]:
    return list(zip(heads[::2], heads[1::2], strict=True))


class Look:
    """One reading of a head, with some pixels."""

    def __init__(self, found: Slide, layout: Layout, pixels: Pixels) -> None:
        self._found, self._layout, self._pixels = found, layout, pixels
        self._size = found.raw.image.height, found.raw.image.width

    def values(self, images: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Values of the head on images ``[1, 3, height, width]`` (RGB, 0 to 1)."""
        return self._found.probe.heads_on([self._pixels.apply(image) for image in images], self._layout)

    def judge(self, pairs: Iterable[tuple[Head, Head]]) -> Seen:
        """What is found in those images where enough is found again in the mirror image; in all of them if there is none."""
        each = [self._compared(self.rows(plain), self.rows(mirror)[0]) for plain, mirror in pairs]
        each = [one for one in each if one[0].worth] or each
        seen = [one for one, _, _ in each]
        offsets = [offset for _, some, _ in each for offset in some]
        return Seen(
            found=sum(one.found for one in seen),
            again=sum(one.again for one in seen),
            score=sum(one.score for one in seen),
            classes=len(set().union(*(labels for _, _, labels in each))),
            offset=None if isinstance(self._layout.decode, Decoded) or not offsets else float(np.median(offsets)),
            images=len(seen),
        )

    def _compared(self, found: tuple[Rows, np.ndarray], two: Rows) -> tuple[Seen, list[float], set[int]]:
        """One image and its mirror image; and offsets and classes of what is found again."""
        one, places = found
        back = mirror_boxes(two.boxes, self._size[1])
        score, offsets, labels = 0.0, [], set()
        for i, j in _pairs(one, two, back):
            labels.add(int(one.labels[i]))
            score += float(min(one.scores[i], two.scores[j]))
            stride = _stride(self._layout, self._size, int(places[i]))
            offsets.append((_middle(back[j]) - _middle(one.boxes[i])) / stride)
        found_here = (len(one) + len(two)) / 2
        seen = Seen(found=found_here, again=len(offsets), score=score, classes=len(labels), offset=None, images=1)
        return seen, offsets, labels

    def imagines(self, seen: Seen) -> bool:
        """Whether noise and a plain image both hold nearly as much as the images do, on average, so that what is found are no objects.

        Noise alone does not tell: it is made of patches, which may be objects to a detector of shapes.
        """
        most = MOST_IN_NOISE * seen.found / seen.images
        plain = np.random.default_rng(0).normal(0.45, 0.02, (1, 3, *self._size)).astype(np.float32)
        return all(len(self.rows(*self.values([image]))[0]) > most for image in (probe_image(*self._size), plain))

    def most(self, images: Sequence[np.ndarray]) -> float:
        """Sum of the scores in some images, without those that hold so much that it is no objects."""
        total = 0.0
        for values in self.values(images):
            scores = candidates(values, 0, self._layout, self._size).scores
            if (scores.max(1) > CONFIG.score_threshold).sum() <= MOST_PASSING:
                total += float(self.rows(values)[0].scores.sum())
        return total

    def keypoints(self, values: Head) -> tuple[Rows, np.ndarray]:
        """Rows, and the keypoints ``[n, keypoints, 2 or 3]`` of each."""
        rows, numbers = self.rows(values)
        return rows, np.asarray(keypoints(values, 0, self._layout, self._size, numbers))

    def masks(self, values: Head) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes ``[n, 4]`` xyxy in cells of the prototypes, scores ``[n]``, and masks ``[n, h, w]`` that are not cut at the boxes."""
        assert self._layout.masks is not None
        rows, numbers = self.rows(values)
        prototypes = values[self._layout.masks.prototypes][0].astype(np.float64)
        with np.errstate(all="ignore"):  # a file may hold any number
            logits = np.tensordot(mask_coefficients(values, 0, self._layout, numbers), prototypes, 1)
        cells = np.array(logits.shape[:0:-1]) / self._size[::-1]
        return rows.boxes * np.tile(cells, 2), rows.scores, logits > 0

    def rows(self, values: Head) -> tuple[Rows, np.ndarray]:
        """Rows by the reference, and the numbers of their candidates."""
        expected = postprocess(candidates(values, 0, self._layout, self._size), CONFIG)
        return expected.rows, expected.indices


def _pairs(one: Rows, two: Rows, back: np.ndarray) -> Iterable[tuple[int, int]]:
    """Pairs of one class, the best first; each row is in one at most."""
    if not len(one) or not len(two):
        return
    iou = (pairwise_probiou if back.shape[1] == 5 else pairwise_iou)(one.boxes, back)
    iou = np.where(one.labels[:, None] == two.labels, iou, 0.0)
    while iou.max() > SAME_IOU:
        i, j = np.unravel_index(iou.argmax(), iou.shape)
        iou[i], iou[:, j] = 0.0, 0.0
        yield int(i), int(j)


def _middle(box: np.ndarray) -> float:
    return float(box[0] if len(box) == 5 else (box[0] + box[2]) / 2)


def _stride(layout: Layout, size: tuple[int, int], candidate: int) -> float:
    """Stride of the level of a candidate; 1 if candidates have no cells."""
    decode = layout.decode
    if isinstance(decode, Decoded):
        return 1.0
    ends = np.cumsum(candidates_per_level(decode, *size))
    return float(decode.strides[int(np.searchsorted(ends, candidate, side="right"))])
