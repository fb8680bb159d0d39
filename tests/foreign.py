"""Raw ONNX files as other programs export them: the embedded detector with its decode in the graph, and look-alikes."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from conftest import SHAPES
from torch import Tensor, nn

from fusenms.sources.checkpoint import load_checkpoint

SIZE = 64


class Decoded(nn.Module):
    """YOLOv8's decoded output ``[B, 4 + C, N]``, or transposed."""

    def __init__(self, transposed: bool = False, objectness: bool = False) -> None:
        super().__init__()
        self.network = load_checkpoint(SHAPES / "shapes.pt").module
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
        parts = [decoded, scores[:, :1] * 0 + 1, scores] if self.objectness else [decoded, scores]
        joined = torch.cat(parts, 1)
        return joined.transpose(1, 2) if self.transposed else joined


class AnchorDecoded(nn.Module):
    """YOLOv5's decoded output ``[B, N, 5 + C]`` with random weights."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.outputs = 5 + classes
        self.levels = nn.ModuleList(nn.Conv2d(3, 3 * self.outputs, s, s) for s in (8, 16, 32))

    def forward(self, images: Tensor) -> Tensor:
        rows = []
        for level, stride in zip(self.levels, (8, 16, 32), strict=True):
            t = level(images).unflatten(1, (3, self.outputs)).permute(0, 1, 3, 4, 2).sigmoid()
            ticks = torch.arange(SIZE // stride, dtype=torch.float32)
            y, x = torch.meshgrid(ticks, ticks, indexing="ij")
            center = (t[..., :2] * 2 - 0.5 + torch.stack((x, y), -1)) * stride
            size = (t[..., 2:4] * 2) ** 2 * torch.tensor([1.0, 1.5, 2.0])[:, None, None, None] * stride
            rows.append(torch.cat((center, size, t[..., 4:]), -1).flatten(1, 3))
        return torch.cat(rows, 1)


def write(
    module: nn.Module,
    path: Path,
    *,
    dynamic: bool = True,
    metadata: dict[str, str] | None = None,
    shuffle: bool = False,
) -> Path:
    """Export to a file; with ``shuffle`` every node and inner tensor gets a meaningless name."""
    axes = {"images": {0: "batch"}, "out": {0: "batch"}} if dynamic else {}
    torch.onnx.export(
        module.eval(), (torch.zeros(1, 3, SIZE, SIZE),), path, dynamo=False, opset_version=17,
        input_names=["images"], output_names=["out"], dynamic_axes=axes,
    )  # fmt: skip
    model = onnx.load(path)
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
