"""YOLOv5 (original releases) and YOLOv7: three anchors per cell, with objectness.

One output ``[B, N, 5 + C]``: cx, cy, w, h in pixels of the input, objectness, then C class probabilities.
The score is objectness times class probability. With masks, mask coefficients follow, and a second output has the prototypes
``[B, M, h, w]``.
"""

from __future__ import annotations

from collections.abc import Sequence

from fusenms.heads.anchors import by_level
from fusenms.heads.base import HeadSpec, Mismatch
from fusenms.heads.late_decode import earliest_anchors
from fusenms.heads.level_outputs import STRIDES
from fusenms.heads.probe import Probe, box_format, hold_labels, producers_of
from fusenms.heads.task_outputs import task_channels, task_terms
from fusenms.layout import Activation, AnchorBoxes, Join, Layout, Tap, cells_along

NAME = "yolov5"
ANCHORS = 3
LEVELS = "fusenms/head"
COCO = 80
"""Classes of the data set that most files without class names were trained on."""
SHOWN = (1, COCO)
"""Numbers of channels after the objectness that are taken for classes without class names: a single one cannot be anything else."""


def match(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize the decoded output of an export of this family. Other outputs (raw levels) are ignored.

    With anchors, recognize its levels before the decode: ``[B, A * (5 + C), rows, columns]`` or ``[B, A, rows, columns, 5 + C]`` each.
    """
    if probe.anchors is not None:
        return _match_levels(probe, certain, probe.anchors)
    _, maps = probe.split_prototypes()
    maps = maps if len(maps) == 1 else []  # several are raw levels
    extra = task_channels(probe, maps)
    if isinstance(extra, Mismatch):
        return extra
    shapes = [list(sample.value.shape) for sample in probe.samples]
    for sample in probe.samples:
        shape = sample.value.shape
        grid = probe.grid(ANCHORS, shape[1]) if len(shape) == 3 and shape[2] > 5 + extra else None
        if grid is None:
            continue
        rows, names = sample.value[0], probe.raw.class_names
        classes = rows.shape[1] - 5 - extra
        if names and len(names) != classes:
            return Mismatch(
                f"found {classes} channels after box and objectness, but {len(names)} class names in the metadata"
            )
        values = rows[:, 4 : 5 + classes]
        if not ((values >= 0) & (values <= 1)).all():
            return Mismatch(f"found scores from {values.min():.3g} to {values.max():.3g}; expected probabilities")
        if hold_labels(rows[:, 5 : 5 + classes]):
            return Mismatch("a class channel holds whole numbers only, as the number of the best class does")
        decode = box_format(rows[:, :4], grid, probe.sides)
        if decode is None:
            return Mismatch("the first four channels are not boxes that follow the cells of the image")
        if certain and not names and classes not in SHOWN:
            return Mismatch(_unshown(classes))
        boxes, objectness, scores = (Tap(sample.tensor, 2, *span) for span in ((0, 4), (4, 5), (5, 5 + classes)))
        terms = task_terms(probe, Tap(sample.tensor, 2, 5 + classes, shape[2]) if extra else None, maps)
        decoded = Layout(NAME, boxes, scores, objectness, Activation.NONE, decode, **terms)
        return decoded if extra else earliest_anchors(probe, decoded, ANCHORS)
    return Mismatch(
        f"found outputs of shape {shapes}; expected [batch, candidates, 5 + classes] with three candidates "
        "per cell of levels with strides such as 8, 16, 32"
        if not _may_be_levels(probe)
        else f"found outputs of shape {shapes}, which may be the levels of an anchor head before its decode; a file does not show its "
        "anchors, so give them: anchors='yolov5', or widths and heights"
    )


def _unshown(classes: int) -> str:
    return (
        f"nothing shows that all {classes} channels after the objectness are classes, and not landmarks or masks (no class names in the "
        f"metadata, and not the {COCO} of COCO); if they are, say family={NAME!r}"
    )


def _before_sigmoid(probe: Probe) -> list[str]:
    """Names of the outputs, or of what they are the sigmoids of, as in exports for NPUs: the decode has a sigmoid of its own."""
    producers = producers_of(probe.raw.model.graph)
    nodes = [producers.get(sample.tensor) for sample in probe.samples]
    if all(node is not None and node.op_type == "Sigmoid" for node in nodes):
        return [node.input[0] for node in nodes if node is not None]
    return [sample.tensor for sample in probe.samples]


def _may_be_levels(probe: Probe) -> bool:
    """Whether each output may be a level with three anchors."""
    maps = [sample.value.shape for sample in probe.samples]
    strides = _strides(probe, maps)
    return len(strides) == len(maps) > 1 and all(_width(shape, ANCHORS) > 5 for shape in maps)


def _width(shape: tuple[int, ...], anchors: int) -> int:
    """Channels of an anchor in a level of this shape; 0 if it is none."""
    if len(shape) == 5:
        return shape[4] if shape[1] == anchors else 0
    return shape[1] // anchors if len(shape) == 4 and shape[1] % anchors == 0 else 0


def _strides(probe: Probe, shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """The stride of each level; those of shapes that are none are left out."""
    image, found = probe.raw.image, []
    for shape in shapes:
        rows = shape[2:4]
        found += [s for s in STRIDES if rows == (cells_along(image.height, s), cells_along(image.width, s))][:1]
    return found


def _match_levels(probe: Probe, certain: bool, anchors: tuple[float, ...]) -> Layout | Mismatch:
    shapes = [sample.value.shape for sample in probe.samples]
    if any(len(shape) == 3 and probe.grid(ANCHORS, shape[1]) is not None for shape in shapes):
        return Mismatch(
            f"found outputs of shape {list(map(list, shapes))}, which are decoded already; leave the anchors out"
        )
    strides = _strides(probe, shapes)
    sizes = by_level(anchors, len(shapes))
    if isinstance(sizes, str):
        return Mismatch(sizes)
    each = len(sizes[0])
    widths = {_width(shape, each) for shape in shapes}
    if (
        len(set(strides)) != len(shapes)
        or len(widths) != 1
        or min(widths) < 6
        or len({len(shape) for shape in shapes}) > 1
    ):
        return Mismatch(
            f"found outputs of shape {list(map(list, shapes))}; expected for each level [batch, {each} * (5 + classes), rows, columns] or "
            f"[batch, {each}, rows, columns, 5 + classes]"
        )
    (width,), names = widths, probe.raw.class_names
    if names and len(names) != width - 5:
        return Mismatch(
            f"found {width - 5} channels after box and objectness, but {len(names)} class names in the metadata"
        )
    if certain and not names and width - 5 not in SHOWN:
        return Mismatch(_unshown(width - 5))
    levels = sorted(zip(strides, _before_sigmoid(probe), strict=True))
    join = Join(LEVELS, tuple(name for _, name in levels), 2, width, each if len(shapes[0]) == 4 else 1)
    boxes, objectness, classes = (Tap(LEVELS, 2, *span) for span in ((0, 4), (4, 5), (5, width)))
    decode = AnchorBoxes(tuple(stride for stride, _ in levels), sizes)
    return Layout(NAME, boxes, classes, objectness, Activation.SIGMOID, decode, (join,))


YOLOV5 = HeadSpec(NAME, match, tasks=("detect", "segment"))
