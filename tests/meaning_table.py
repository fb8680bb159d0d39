"""Wrong readings of real files, and what tells them from the right one: `python tests/meaning_table.py`, for docs/concepts/meaning.md.

The files are those of ../shared/zoo.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from fusenms import load, recognize
from fusenms.artifacts.preprocessing import PIXELS
from fusenms.artifacts.raw import RawModel
from fusenms.artifacts.raw_head import RawHead
from fusenms.errors import FusenmsError, LayoutContradictedError
from fusenms.heads import raw_head
from fusenms.heads.meaning import check_meaning
from fusenms.heads.motion import measure_motion, other_readings, slide
from fusenms.layout import Activation, AnchorBoxes, Decoded, Distances, GridOffsets, Layout
from fusenms.runtime.example_images import example_images
from fusenms.runtime.images import read_image
from fusenms.runtime.placement import letterbox, to_tensor

ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"
FILES = (
    "derived/yolov8n.onnx", "derived/yolov5n.onnx", "yolox_nano_raw_416.onnx", "nanodet_m_416.onnx", "derived/yolo26n_e2e.onnx",
    "shapes/rtdetr-p.pt",
)  # fmt: skip


def wrong_layouts(layout: Layout) -> Iterator[tuple[str, Layout]]:
    """Wrong readings of a head, with what is wrong."""
    decode, classes = layout.decode, layout.classes
    yield from (
        ("format" if isinstance(decode, Decoded) else "order of levels", wrong) for _, wrong in other_readings(layout)
    )
    if isinstance(decode, Distances | AnchorBoxes | GridOffsets):
        yield "strides doubled", replace(layout, decode=replace(decode, strides=tuple(2 * s for s in decode.strides)))
        fewer = replace(
            decode,
            strides=decode.strides[1:],
            **({"anchors": decode.anchors[1:]} if isinstance(decode, AnchorBoxes) else {}),
        )
        yield "a level lost", replace(layout, decode=fewer)
    if isinstance(decode, Distances):
        yield "half a cell", replace(layout, decode=replace(decode, point=0.5 - decode.point))
    if isinstance(decode, AnchorBoxes):
        turned = tuple(tuple((h, w) for w, h in level) for level in decode.anchors)
        yield "anchors turned", replace(layout, decode=replace(decode, anchors=turned))
    if layout.activation is not Activation.NONE:
        yield "logits said probabilities", replace(layout, activation=Activation.NONE, background=None)
    elif layout.labels is None:
        yield "probabilities said logits", replace(layout, activation=Activation.SIGMOID)
    if layout.objectness is not None:
        yield "objectness left out", replace(layout, objectness=None, objectness_weight=None)
    if classes.channels > 1:
        yield "first class lost", replace(layout, classes=replace(classes, start=classes.start + 1))


def wrong_pixels(head: RawHead) -> Iterator[tuple[str, RawHead]]:
    """The right layout with wrong pixels."""
    for name in ("bgr255", "imagenet"):
        if PIXELS[name] != head.pixels:
            yield "pixels", replace(head, pixels=PIXELS[name])


def images_for(raw: RawModel) -> list[np.ndarray]:
    """The example images; for a detector of shapes some images of shapes, as a user would give."""
    size = raw.image.height, raw.image.width
    if raw.source != "rtdetr-p.pt":
        return [example_images(*size)]
    files = sorted((ZOO / "shapes" / "images").glob("val*.jpg"))[:4]
    return [to_tensor([letterbox(read_image(file), *size)[0]]) for file in files]


def verdict(raw: RawModel, head: RawHead) -> str:
    """What tells this reading from the right one."""
    try:
        lines = check_meaning(raw, head, images_for(raw))
    except LayoutContradictedError as error:
        if "mirror images" in str(error) or "see the same objects" in str(error):
            return "images"
        return "motion" if "do not move with the image" in str(error) else "values"
    except FusenmsError as error:
        return type(error).__name__
    return "said" if any(line.startswith("left over") for line in lines) else "not caught"


def main() -> int:
    caught: dict[str, Counter[str]] = {}
    print("| file | reading | levels |\n|---|---|---|")
    for name in FILES:
        raw = load(ZOO / name, make_dynamic=name.endswith(".onnx"))
        right = raw_head(raw, recognize(raw))
        readings = [("right", right)]
        readings += [(wrong, replace(right, layout=layout)) for wrong, layout in wrong_layouts(right.layout)]
        for wrong, head in readings + list(wrong_pixels(right)):
            found = verdict(raw, head)
            if wrong != "right":
                caught.setdefault(wrong, Counter())[found] += 1
            if found not in ("values", "images", "said"):
                motion = measure_motion(slide(raw, head))
                text = "; ".join(map(str, motion.levels)) or motion.reason
                print(f"| `{name}` | {wrong} | {text} |")
    print(
        "\n| wrong reading | caught by values | by motion | by images | said | not caught |\n|---|---|---|---|---|---|"
    )
    for wrong, counts in caught.items():
        print(
            f"| {wrong} | "
            + " | ".join(str(counts[kind]) for kind in ("values", "motion", "images", "said", "not caught"))
            + " |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
