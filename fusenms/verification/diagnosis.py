"""Name the cause of detections that differ from the reference: try common mistakes and find the one that explains them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import numpy as np

from fusenms.boxes import cxcywh_to_xyxy
from fusenms.config import PostprocessConfig
from fusenms.contract import CLASS_MASK, IOU_THRESHOLD, SCORE_THRESHOLD
from fusenms.reference import SCORE_TOLERANCE, Candidates, Rows, matches, postprocess
from fusenms.verification.settings import Setting


def explain(
    observed: Rows,
    expected: Rows,
    found: Candidates,
    config: PostprocessConfig,
    first_image: Rows | None,
    fed: Setting | None,
) -> str:
    """Return the mistake that turns ``expected`` into ``observed``, or "" if no common mistake does.

    Args:
        first_image: the observed rows of the first image of the batch, for the images after it.
        fed: what the optional inputs were fed, if anything.
    """
    for name, rows in chain(
        () if fed is None else _input_mistakes(observed, found, config, fed),
        _mistakes(observed, expected, found, config, first_image),
    ):
        if len(rows) and _equal(observed, rows) and not _equal(expected, rows):
            return name
    if len(observed) == 0 and first_image is not None and len(first_image):
        return "only the first image of the batch has detections: the batch is frozen"
    return ""


def _mistakes(
    observed: Rows, expected: Rows, found: Candidates, config: PostprocessConfig, first_image: Rows | None
) -> Iterator[tuple[str, Rows]]:
    count = min(len(observed), len(expected))
    if first_image is not None:
        yield "the rows are those of the first image of the batch: the batch is frozen", first_image
    if len(observed) == len(expected):
        yield "the rows are right but not sorted by score", _sorted_as(expected, observed)
        moved = np.median(np.asarray(observed.boxes, np.float64) - expected.boxes, 0) if count else np.zeros(4)
        shift = np.round(moved, 3) + 0.0
        yield (
            f"the boxes are shifted by ({', '.join(f'{v:+.3g}' for v in shift)}) {'px' if len(shift) == 4 else 'px, and rad'}",
            replace(expected, boxes=expected.boxes + shift),
        )
        yield from _upright_mistakes(expected) if len(shift) == 4 else _oriented_mistakes(expected)
        yield from _label_mistakes(observed, expected)
    for name in ("score_threshold", "iou_threshold"):
        below = float(np.nextafter(np.float32(getattr(config, name)), np.float32(-np.inf)))
        if below >= 0:
            loose = PostprocessConfig.from_dict(config.to_dict() | {name: below})
            yield (
                f"{name}: equal values are treated as above it (>= where > is expected)",
                postprocess(found, loose, observed).rows,
            )
    swapped = replace(config, score_threshold=config.iou_threshold, iou_threshold=config.score_threshold)
    yield "score_threshold and iou_threshold are swapped", postprocess(found, swapped, observed).rows
    agnostic = replace(config, class_agnostic=not config.class_agnostic)
    yield (
        f"class_agnostic is {agnostic.class_agnostic}, expected {config.class_agnostic}",
        postprocess(found, agnostic, observed).rows,
    )
    unsuppressed = replace(config, iou_threshold=1.0)
    yield "nothing was suppressed", postprocess(found, unsuppressed, observed).rows


def _input_mistakes(
    observed: Rows, found: Candidates, config: PostprocessConfig, fed: Setting
) -> Iterator[tuple[str, Rows]]:
    for name in (SCORE_THRESHOLD, IOU_THRESHOLD, CLASS_MASK):
        yield f"the input {name} has no effect", postprocess(found, config, observed, fed.without(name, config)).rows
    yield "the optional inputs have no effect", postprocess(found, config, observed).rows


def _upright_mistakes(expected: Rows) -> Iterator[tuple[str, Rows]]:
    yield "the boxes are cx, cy, w, h taken as corners", _back(expected)
    yield "corners were taken as cx, cy, w, h", replace(expected, boxes=cxcywh_to_xyxy(expected.boxes))


def _oriented_mistakes(expected: Rows) -> Iterator[tuple[str, Rows]]:
    """Boxes are cx, cy, w, h, angle."""
    angles = (
        ("the angles turn the other way", -expected.boxes[:, 4]),
        ("the angles are in degrees", np.degrees(expected.boxes[:, 4])),
    )
    for name, values in angles:
        yield name, replace(expected, boxes=np.concatenate((expected.boxes[:, :4], values[:, None]), 1))
    yield "width and height are swapped", replace(expected, boxes=expected.boxes[:, [0, 1, 3, 2, 4]])


def _label_mistakes(observed: Rows, expected: Rows) -> Iterator[tuple[str, Rows]]:
    offset = np.unique(np.asarray(observed.labels, np.int64) - expected.labels)
    if len(offset) == 1:
        yield f"the labels are off by {offset[0]:+d}", replace(expected, labels=expected.labels + offset[0])
    table: dict[int, int] = {}
    for was, now in zip(expected.labels.tolist(), np.asarray(observed.labels).tolist(), strict=True):
        table.setdefault(was, now)
    moved = ", ".join(f"{was} as {now}" for was, now in sorted(table.items()) if was != now)
    mapped = np.array([table[label] for label in expected.labels.tolist()], np.int64)
    yield f"labels are swapped ({moved})", replace(expected, labels=mapped)


def _equal(observed: Rows, rows: Rows) -> bool:
    return len(observed) == len(rows) and all(
        matches(observed, i, np.asarray(rows.boxes[i], np.float64), float(rows.scores[i]), int(rows.labels[i]))
        for i in range(len(rows))
    )


def _sorted_as(expected: Rows, observed: Rows) -> Rows:
    """The expected rows in the order of the observed ones; unchanged if an observed row is not among them."""
    left = list(range(len(expected)))
    order = []
    for row in range(len(observed)):
        near = (i for i in left if abs(expected.scores[i] - observed.scores[row]) <= SCORE_TOLERANCE)
        hit = next(
            (i for i in near if matches(observed, row, expected.boxes[i], expected.scores[i], expected.labels[i])), None
        )
        if hit is None:
            return expected
        left.remove(hit)
        order.append(hit)
    return Rows(expected.boxes[order], expected.scores[order], expected.labels[order])


def _back(expected: Rows) -> Rows:
    boxes = expected.boxes
    center, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    return replace(expected, boxes=np.concatenate((center, size), 1))
