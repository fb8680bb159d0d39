"""Raw ONNX files as other programs export them: the embedded detector with its decode in the graph, and look-alikes."""

from __future__ import annotations

import copy
import hashlib
import io
import math
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import onnx
import sharing
import torch
from conftest import SHAPES
from torch import Tensor, nn

from fusenms.sources.checkpoint import load_checkpoint

SIZE = 64


@cache
def embedded() -> nn.Module:
    return load_checkpoint(SHAPES / "shapes.pt").module


class Decoded(nn.Module):
    """YOLOv8's decoded output ``[B, 4 + C, N]``, or transposed."""

    def __init__(self, transposed: bool = False, objectness: bool = False) -> None:
        super().__init__()
        self.network = copy.deepcopy(embedded())
        self.transposed, self.objectness = transposed, objectness
        centers, strides = [], []
        for stride in (8, 16, 32):
            ticks = torch.arange(SIZE // stride) + 0.5
            y, x = torch.meshgrid(ticks, ticks, indexing="ij")
            centers.append(torch.stack((x, y)).flatten(1))
            strides.append(torch.full((1, ticks.numel() ** 2), float(stride)))
        self.centers, self.strides = torch.cat(centers, 1), torch.cat(strides, 1)

    def forward(self, images: Tensor) -> Tensor:
        boxes, logits = self.network(images)
        distance = (boxes.unflatten(1, (4, 16)).softmax(2) * torch.arange(16.0)[:, None]).sum(2)
        low, high = self.centers - distance[:, :2], self.centers + distance[:, 2:]
        decoded = torch.cat(((low + high) / 2, high - low), 1) * self.strides
        scores = logits.sigmoid()
        parts = [decoded, scores[:, :1] * 0 + 0.98, scores] if self.objectness else [decoded, scores]
        joined = torch.cat(parts, 1)
        return joined.transpose(1, 2) if self.transposed else joined


class Further(Decoded):
    """The same with more than boxes, by further convolutions with random weights: as Ultralytics decodes and joins them.

    ``segment``: 6 coefficients, and prototypes as a second output; ``pose``: 4 keypoints; ``obb``: boxes turned by an angle.
    """

    CHANNELS: ClassVar[dict[str, int]] = {"segment": 6, "pose": 12, "obb": 1}

    def __init__(self, task: str, transposed: bool = False) -> None:
        super().__init__(transposed)
        torch.manual_seed(0)
        self.task = task
        self.levels = nn.ModuleList(nn.Conv2d(3, self.CHANNELS[task], s, s) for s in (8, 16, 32))
        self.prototypes = nn.Conv2d(3, 6, 4, 4)

    def forward(self, images: Tensor) -> Any:
        joined = self.joined(images)
        joined = joined.transpose(1, 2) if self.transposed else joined
        return (joined, self.prototypes(images)) if self.task == "segment" else joined

    def joined(self, images: Tensor) -> Tensor:
        boxes, logits = self.network(images)
        distance = (boxes.unflatten(1, (4, 16)).softmax(2) * torch.arange(16.0)[:, None]).sum(2)
        terms = torch.cat([level(images).flatten(2) for level in self.levels], 2)
        low, high = self.centers - distance[:, :2], self.centers + distance[:, 2:]
        center, size = (low + high) / 2, high - low
        if self.task == "obb":
            terms = (terms.sigmoid() - 0.25) * math.pi
            x, y = ((distance[:, 2:] - distance[:, :2]) / 2).split(1, 1)
            turned = (x * terms.cos() - y * terms.sin(), x * terms.sin() + y * terms.cos())
            center, size = torch.cat(turned, 1) + self.centers, distance[:, 2:] + distance[:, :2]
        if self.task == "pose":
            points = terms.unflatten(1, (4, 3))
            places = (points[:, :, :2] * 2.0 + (self.centers - 0.5)) * self.strides
            terms = torch.cat((places, points[:, :, 2:].sigmoid()), 2).flatten(1, 2)
        decoded = torch.cat((center, size), 1) * self.strides
        return torch.cat((torch.cat((decoded, logits.sigmoid()), 1), terms), 1)


class FurtherRows(Further):
    """The same as finished rows: box, score, class, then the rest, the best 20 by score."""

    def forward(self, images: Tensor) -> Any:
        rows = self.joined(images).transpose(1, 2)
        scores, labels = rows[..., 4:7].max(2)
        best, index = scores.topk(20, 1)
        rows = rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))
        boxes = rows[..., :4]
        if self.task != "obb":
            boxes = torch.cat((boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2), 2)
        finished = torch.cat((boxes, best[..., None], labels.gather(1, index)[..., None].float(), rows[..., 7:]), 2)
        return (finished, self.prototypes(images)) if self.task == "segment" else finished


class AnchorDecoded(nn.Module):
    """YOLOv5's decoded output ``[B, N, 5 + C]`` with random weights; with ``masks``, their coefficients behind it, and prototypes."""

    def __init__(self, classes: int = 1, masks: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.outputs, self.masks = 5 + classes + masks, masks
        self.prototypes = nn.Conv2d(3, max(masks, 1), 4, 4)
        self.levels = nn.ModuleList(nn.Conv2d(3, 3 * self.outputs, s, s) for s in (8, 16, 32))

    def forward(self, images: Tensor) -> Any:
        rows = []
        for level, stride in zip(self.levels, (8, 16, 32), strict=True):
            raw = level(images).unflatten(1, (3, self.outputs)).permute(0, 1, 3, 4, 2)
            t, coefficients = raw[..., : self.outputs - self.masks].sigmoid(), raw[..., self.outputs - self.masks :]
            ticks = torch.arange(SIZE // stride, dtype=torch.float32)
            y, x = torch.meshgrid(ticks, ticks, indexing="ij")
            center = (t[..., :2] * 2 - 0.5 + torch.stack((x, y), -1)) * stride
            size = (t[..., 2:4] * 2) ** 2 * torch.tensor([1.0, 1.5, 2.0])[:, None, None, None] * stride
            parts = (center, size, t[..., 4:], coefficients) if self.masks else (center, size, t[..., 4:])
            rows.append(torch.cat(parts, -1).flatten(1, 3))
        return (torch.cat(rows, 1), self.prototypes(images)) if self.masks else torch.cat(rows, 1)


def exported(module: nn.Module, dynamic: bool) -> bytes:
    outputs = ["out", "prototypes"] if isinstance(module.eval()(torch.zeros(1, 3, SIZE, SIZE)), tuple) else ["out"]
    axes = {name: {0: "batch"} for name in ("images", *outputs)} if dynamic else {}
    file = io.BytesIO()
    torch.onnx.export(
        module.eval(), (torch.zeros(1, 3, SIZE, SIZE),), file, dynamo=False, opset_version=17,
        input_names=["images"], output_names=outputs, dynamic_axes=axes,
    )  # fmt: skip
    return file.getvalue()


def key_of(module: nn.Module, dynamic: bool) -> str:
    """The same of modules that are exported to the same: their classes, weights, and all other attributes."""
    parts: list[object] = [dynamic]
    for name, part in module.named_modules():
        parts += [name, type(part).__module__, type(part).__qualname__]
        for attribute, value in (
            *vars(part).items(),
            *part.named_parameters(recurse=False),
            *part.named_buffers(recurse=False),
        ):
            if isinstance(value, Tensor):
                value = hashlib.sha256(value.detach().numpy().tobytes()).hexdigest()
            if attribute not in ("_parameters", "_buffers", "_modules"):
                parts += [attribute, value]
    return repr(parts)


def write(
    module: nn.Module,
    path: Path,
    *,
    dynamic: bool = True,
    metadata: dict[str, str] | None = None,
    shuffle: bool = False,
) -> Path:
    """Export to a file; with ``shuffle`` every node and inner tensor gets a meaningless name."""
    model = onnx.ModelProto.FromString(sharing.once(key_of(module, dynamic), lambda: exported(module, dynamic)))
    onnx.helper.set_model_props(model, metadata or {})
    if shuffle:
        table: dict[str, str] = {}

        def rename(name: str) -> str:
            return table.setdefault(name, f"t{len(table) * 7919 % 100003}") if name else name

        for node in model.graph.node:
            node.name = f"n{len(table)}"
            node.input[:] = map(rename, node.input)
            node.output[:] = map(rename, node.output)
        for entry in (*model.graph.input, *model.graph.output, *model.graph.initializer):
            entry.name = rename(entry.name)
    onnx.save(model, path)
    return path
