"""Tails of torchvision's one-stage detectors behind tiny networks, exported by torch.onnx as torchvision's are.

`batched_nms` is scripted as in torchvision, so that its suppression lies in a branch of an `If`. torchvision itself is not needed: its
operator is registered here under another name, with the same symbolic.
Written after pytorch/vision: `FCOS`, `SSD`, `GeneralizedRCNNTransform`.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.onnx import register_custom_op_symbolic
from torch.onnx.symbolic_helper import parse_args

SIZE, INNER = 64, 96
"""Side of the images, and that of those that the network resizes them to."""
CLASSES = 3
SCORE, IOU, ROWS, MOST = 0.3, 0.5, 40, 60
LIBRARY = torch.library.Library("torchvision_tails", "DEF")
LIBRARY.define("nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    order, kept = scores.argsort(descending=True).tolist(), list[int]()
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for i in order:
        low, high = torch.max(boxes[i, :2], boxes[kept, :2]), torch.min(boxes[i, 2:], boxes[kept, 2:])
        inter = (high - low).clamp(min=0).prod(1)
        if not (inter / (areas[i] + areas[kept] - inter) > iou_threshold).any():
            kept.append(i)
    return torch.tensor(kept, dtype=torch.int64)


LIBRARY.impl("nms", _nms, "CPU")


@parse_args("v", "v", "f")
def _symbolic(g, boxes, scores, iou_threshold):  # type: ignore[no-untyped-def]
    """As torchvision's, `torchvision/ops/_register_onnx_ops.py`."""
    boxes = g.op("Unsqueeze", boxes, g.op("Constant", value_t=torch.tensor([0])))
    for _ in range(2):
        scores = g.op("Unsqueeze", scores, g.op("Constant", value_t=torch.tensor([0])))
    most = g.op("Constant", value_t=torch.tensor([2**63 - 1]))
    iou = g.op("Constant", value_t=torch.tensor([iou_threshold], dtype=torch.float32))
    boxes, scores = (g.op("Cast", one, to_i=1) for one in (boxes, scores))
    picked = g.op("NonMaxSuppression", boxes, scores, most, iou)
    column = g.op("Gather", picked, g.op("Constant", value_t=torch.tensor([2])), axis_i=1)
    return g.op("Squeeze", column, g.op("Constant", value_t=torch.tensor([1])))


def _apart(boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    if boxes.numel() == 0:
        return torch.empty((0,), dtype=torch.int64, device=boxes.device)
    offsets = labels.to(boxes) * (boxes.max() + torch.tensor(1).to(boxes))
    return torch.ops.torchvision_tails.nms(boxes + offsets[:, None], scores, 0.5)


class Network(nn.Module):
    """Normalizes and resizes an image inside, as `GeneralizedRCNNTransform`, and has two levels of 3 boxes a cell.

    ``kind`` says what a selection is of: a ``level`` (FCOS), a ``class`` (SSD), or the ``image``.
    """

    def __init__(self, kind: str, most: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.kind, self.most, width = kind, most, CLASSES + (kind == "class")
        self.levels = nn.ModuleList(nn.Conv2d(3, 3 * (4 + width), s, s) for s in (8, 16))
        for conv in self.levels:
            nn.init.normal_(conv.weight, 0, 0.02)
            nn.init.normal_(conv.bias, 0, 0.1)
        anchors = []
        for stride in (8, 16):
            ticks = torch.arange(INNER // stride) * float(stride)
            y, x = torch.meshgrid(ticks, ticks, indexing="ij")
            points = torch.stack((x, y, x, y), -1).reshape(-1, 1, 4)
            half = torch.tensor([1.0, 1.1, 2.5]).reshape(1, 3, 1) * stride
            anchors.append((points + half * torch.tensor([-1.0, -1.0, 1.0, 1.0])).reshape(-1, 4))
        self.anchors, self.width = anchors, width
        self.apart = torch.jit.script(_apart)

    def terms(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        mean, std = torch.tensor([0.48, 0.45, 0.4]), torch.tensor([0.22, 0.22, 0.22])
        image = (image - mean[:, None, None]) / std[:, None, None]
        image = nn.functional.interpolate(image[None], (INNER, INNER), mode="bilinear", align_corners=False)
        maps = [conv(image) for conv in self.levels]
        rows = [m.view(1, 3, 4 + self.width, -1).permute(0, 3, 1, 2).reshape(-1, 4 + self.width) for m in maps]
        logits = [row[:, 4:].reshape(-1, 3, self.width) for row in rows]
        alike = [
            (one + 3 * one.mean(1, keepdim=True)).reshape(-1, self.width) for one in logits
        ]  # so that neighbors suppress each other
        return [row[:, :4] for row in rows], alike

    def decoded(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        size, center = anchors[:, 2:] - anchors[:, :2], (anchors[:, :2] + anchors[:, 2:]) / 2
        center, size = center + deltas[:, :2] * size, size * deltas[:, 2:].clamp(max=4.0).exp()
        return torch.cat((center - size / 2, center + size / 2), 1).clamp(0, INNER)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        deltas, logits = self.terms(image)
        select = {"level": self.by_level, "class": self.by_class, "image": self.by_image}[self.kind]
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*select(deltas, logits), strict=True))
        kept = self.apart(boxes, scores, labels)[:ROWS]
        scale = torch.tensor(SIZE / INNER)
        x1, y1, x2, y2 = boxes[kept].unbind(1)
        return torch.stack((x1 * scale, y1 * scale, x2 * scale, y2 * scale), 1), scores[kept], labels[kept]

    def by_level(self, deltas: list[Tensor], logits: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        rows = []
        for terms, classes, anchors in zip(deltas, logits, self.anchors, strict=True):
            scores = torch.sigmoid(classes).flatten()
            above = scores > SCORE
            places = torch.where(above)[0]
            scores, best = scores[above].topk(self.lower(places))
            places = places[best]
            cells = torch.div(places, CLASSES, rounding_mode="floor")
            rows.append((self.decoded(terms[cells], anchors[cells]), scores, places % CLASSES))
        return rows

    def by_class(self, deltas: list[Tensor], logits: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        boxes, every = self.decoded(torch.cat(deltas), torch.cat(self.anchors)), torch.cat(logits).softmax(-1)
        rows = []
        for label in range(1, 1 + CLASSES):
            scores = every[:, label]
            above = scores > SCORE
            scores, some = scores[above], boxes[above]
            scores, best = scores.topk(self.lower(scores))
            rows.append((some[best], scores, torch.full_like(scores, fill_value=label, dtype=torch.int64)))
        return rows

    def by_image(self, deltas: list[Tensor], logits: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The best class of each box, as others write it with torchvision's `batched_nms`."""
        boxes = self.decoded(torch.cat(deltas), torch.cat(self.anchors))
        scores, labels = torch.cat(logits).sigmoid().max(1)
        above = scores > SCORE
        return [(boxes[above], scores[above], labels[above])]

    def lower(self, rows: Tensor) -> Tensor:
        """The number of rows, or that of the best ones that are taken if it is lower, in the graph as torchvision's `_topk_min` has it."""
        return torch.min(torch.cat((torch.tensor([self.most]), torch._shape_as_tensor(rows)[:1]), 0)).to(torch.int64)


def export(path: Path, *, kind: str = "level", batched: bool = False, most: int = MOST) -> Path:
    """Write the file; ``batched`` for images ``[1, 3, height, width]`` instead of one ``[3, height, width]``."""
    network = Network(kind, most).eval()
    if batched:
        network.forward_one, network.forward = network.forward, lambda images: network.forward_one(images[0])
    shape = (1, 3, SIZE, SIZE) if batched else (3, SIZE, SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        register_custom_op_symbolic("torchvision_tails::nms", _symbolic, 17)
        torch.onnx.export(network, (torch.rand(shape),), str(path), opset_version=17, dynamo=False)
    return path
