"""Detector families, one file each, and `recognize`, which finds the layout of a raw model's head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from fusenms.artifacts.raw import RawModel
from fusenms.artifacts.raw_head import RawHead
from fusenms.errors import AmbiguousHeadError, ConfigError, HeadNotRecognizedError, SourceError, first_line
from fusenms.graph.model import declared_shape
from fusenms.heads.accounting import left_over
from fusenms.heads.anchors import Anchors, flat_anchors
from fusenms.heads.base import HeadSpec, Mismatch
from fusenms.heads.families.best_class import BEST_CLASS
from fusenms.heads.families.blazeface import BLAZEFACE
from fusenms.heads.families.corners import CORNERS
from fusenms.heads.families.detr import DETR
from fusenms.heads.families.fastestdet import FASTESTDET
from fusenms.heads.families.fcos import FCOS, FCOS_MMDET, FCOS_TORCHVISION
from fusenms.heads.families.levels import GFL, LEVELS
from fusenms.heads.families.nanodet import NANODET, PICODET
from fusenms.heads.families.retinanet import EFFICIENTDET, RETINANET
from fusenms.heads.families.rows import ROWS
from fusenms.heads.families.rtdetr import RFDETR, RTDETR
from fusenms.heads.families.rtmdet import RTMDET
from fusenms.heads.families.scrfd import SCRFD
from fusenms.heads.families.ssd import SSD, ULTRAFACE
from fusenms.heads.families.yolov4 import YOLOV4
from fusenms.heads.families.yolov5 import YOLOV5
from fusenms.heads.families.yolov8 import YOLOV8
from fusenms.heads.families.yolox import YOLOV6, YOLOX
from fusenms.heads.families.yunet import YUNET
from fusenms.heads.probe import Probe
from fusenms.layout import AnchorBoxes, AnchorDeltas, Layout
from fusenms.onnx_reading import untrusted

HEADS: tuple[HeadSpec, ...] = (
    YOLOV8, YOLOV5, YOLOV4, YOLOV6, YOLOX, CORNERS, BEST_CLASS, SSD, ULTRAFACE, DETR, RTDETR, RFDETR, ROWS, LEVELS, GFL, RTMDET, NANODET,
    PICODET, FCOS, FCOS_TORCHVISION, FCOS_MMDET, FASTESTDET, YUNET, SCRFD, BLAZEFACE, RETINANET, EFFICIENTDET,
)  # fmt: skip

__all__ = [
    "ENTRY_POINTS",
    "HEADS",
    "Anchors",
    "HeadSpec",
    "Mismatch",
    "Probe",
    "check_tensors",
    "installed_heads",
    "known_heads",
    "raw_head",
    "recognize",
]


ENTRY_POINTS = "fusenms.heads"
"""Entry point group for families of other packages. Each entry point is a `HeadSpec`."""


def known_heads(heads: Sequence[HeadSpec] = ()) -> tuple[HeadSpec, ...]:
    """Return the families of fusenms, those of installed packages (entry point group `ENTRY_POINTS`), and ``heads``.

    Raises:
        ConfigError: a family is not a `HeadSpec`, cannot be imported, or has the name of another one.
    """
    known: dict[str, HeadSpec] = {}
    own, given = [("fusenms", head) for head in HEADS], [("heads", head) for head in heads]
    for where, head in (*own, *installed_heads(), *given):
        if not isinstance(head, HeadSpec):
            raise ConfigError(f"{where}: is a {type(head).__name__}; expected a fusenms.heads.HeadSpec")
        if known.setdefault(head.name, head) is not head:
            raise ConfigError(f"{where}: the family name {head.name!r} is already taken; give it another name")
    return tuple(known.values())


@cache
def installed_heads() -> tuple[tuple[str, Any], ...]:
    """Return what installed packages give as families: the entry point in words, and its object.

    Raises:
        ConfigError: an entry point cannot be imported.
    """
    found = []
    for entry in entry_points(group=ENTRY_POINTS):
        where = f"entry point {entry.name} = {entry.value}"
        try:
            found.append((where, entry.load()))
        except Exception as error:  # any error of the package
            raise ConfigError(
                f"{where}: cannot be imported ({first_line(error)}); repair or uninstall its package"
            ) from error
    return tuple(found)


def recognize(
    raw: RawModel, family: str | None = None, *, heads: Sequence[HeadSpec] = (), anchors: Anchors | None = None
) -> Layout:
    """Find the layout of a raw model's head.

    Args:
        family: name of a family, to choose one if the probe fits more than one.
        heads: families to try in addition to those of fusenms and of installed packages.
        anchors: anchor boxes of a head that is not decoded: widths and heights in pixels, the finest level first, or the name of a set of
            `fusenms.heads.anchors.SETS` (``yolov5``, ``yolov7``, ``retinanet``, ``efficientdet``).

    Raises:
        SourceError: the model does not run, or exceeds its time limit.
        HeadNotRecognizedError: no family fits; the message lists the reason of each.
        AmbiguousHeadError: more than one family fits.
        ConfigError: there is no family of that name, no set of anchors of that name, or ``raw`` has a layout and needs no anchors.

    Example:
        >>> import fusenms
        >>> layout = fusenms.recognize(fusenms.load("yolov8n.pt", size=64))
        >>> layout.family, layout.decode_stage
        ('yolov8', 'late')
    """
    specs = known_heads(heads)
    known = [head.name for head in specs]
    if family is not None and family not in known:
        raise ConfigError(f"family is {family!r}; expected one of {', '.join(known)}")
    given = None if anchors is None else flat_anchors(anchors)
    if raw.layout is not None:
        if given is not None:
            raise ConfigError(f"{raw.source}: its layout is known, so that anchors mean nothing; leave them out")
        if family not in (None, raw.layout.family):
            raise ConfigError(
                f"{raw.source}: its layout is of family {raw.layout.family}, but family is {family!r}; leave the family out"
            )
        return raw.layout
    probe = Probe(raw, given)
    with untrusted(raw.source, "recognizing its head"):
        found = {
            head.name: _match(head, probe, family is None)
            if raw.task in head.tasks
            else Mismatch(f"the file says that its task is {raw.task!r}; expected {' or '.join(map(repr, head.tasks))}")
            for head in specs
            if family in (None, head.name)
        }
    layouts = {name: result for name, result in found.items() if isinstance(result, Layout)}
    if len(layouts) == 1:
        return next(iter(layouts.values()))
    if layouts:
        raise AmbiguousHeadError(f"{raw.source}: fits {' and '.join(layouts)}; choose one with family=NAME")
    with untrusted(raw.source, "recognizing its head"):
        outputs = ", ".join(f"{sample.tensor} {list(sample.value.shape)}" for sample in probe.samples)
    reasons = {name: result.reason for name, result in found.items() if isinstance(result, Mismatch)}
    raise HeadNotRecognizedError(f"{raw.source}: no known detector head fits its outputs {outputs}:{_listed(reasons)}")


_OTHER_OUTPUTS = re.compile(r"found (?:an |\d+ )?outputs?\b[^;]*; (expected .*)", re.DOTALL)


def _listed(reasons: dict[str, str]) -> str:
    """The reasons, a line each: first of the families that have such outputs, then what outputs the others have."""
    other = {name: match[1] for name, reason in reasons.items() if (match := _OTHER_OUTPUTS.fullmatch(reason))}
    near = {name: reason for name, reason in reasons.items() if name not in other}
    lines = [f"\n  {name}: {reason}" for name, reason in (near | other).items()]
    return "".join(lines) + "\n  none of them: describe it by a layout"


def _match(head: HeadSpec, probe: Probe, certain: bool) -> Layout | Mismatch:
    """Match one family. Its layout must account for everything that the model gives, and use the anchors that are given."""
    result = head.match(probe, certain)
    if (
        isinstance(result, Layout)
        and probe.anchors is not None
        and not isinstance(result.decode, (AnchorBoxes, AnchorDeltas))
    ):
        return Mismatch("its boxes need no anchors; leave them out")
    reason = left_over(probe, result) if isinstance(result, Layout) else None
    return Mismatch(reason) if reason else result


def check_tensors(raw: RawModel, layout: Layout) -> None:
    """Check that the tensors of a layout are in the model.

    Raises:
        SourceError: one is not.
    """
    made = {name for node in raw.model.graph.node for name in node.output}
    if lost := [name for name in layout.sources if name not in made]:
        outputs = ", ".join(entry.name for entry in raw.model.graph.output)
        raise SourceError(
            f"{raw.source}: the layout names {', '.join(lost)}, which is not in the model; its outputs are {outputs}"
        )


def raw_head(raw: RawModel, layout: Layout, heads: Sequence[HeadSpec] = ()) -> RawHead:
    """Return what fusing needs to know about a head: its layout, its shapes, and its pixel format and stretching.

    Pixel format and stretching are those of the family if the model does not state them. Shapes are those that the model declares, or
    those that ONNX Runtime computes at the default image size.

    Raises:
        SourceError: a tensor of the layout is not in the model, or the model does not run.
    """
    check_tensors(raw, layout)
    unknown = HeadSpec(layout.family, lambda *_: Mismatch("written by hand"))  # a handwritten layout may name any
    spec = next((head for head in known_heads(heads) if head.name == layout.family), unknown)
    shapes = {name: declared_shape(raw.model, name) for name in layout.tensors}
    if not all(shapes.values()):
        with untrusted(raw.source, "finding the shapes of its head", trusted=raw.layout is not None):
            values = Probe(raw).head(layout)
        shapes = {name: values[name].shape[1:] for name in layout.tensors}
    return RawHead(
        layout=layout,
        pixels=spec.pixels if raw.pixels is None else raw.pixels,
        stretch=spec.stretch if raw.stretch is None else raw.stretch,
        shapes=shapes,
    )
