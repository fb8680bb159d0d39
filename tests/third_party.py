"""Small networks with random weights whose heads look like those of well-known detectors, as their exporters write them.

Each says itself, in PyTorch, which boxes and scores its output means (`truth`): corners in pixels ``[B, N, 4]``, scores ``[B, N, C]``.
"""

from __future__ import annotations

import io
import random
from functools import cache
from pathlib import Path

import onnx
import torch
from onnx import helper
from torch import Tensor, nn

SIZE = 64
STRIDES = (8, 16, 32)
CLASSES = 3


def flat(maps: list[Tensor]) -> Tensor:
    """Levels ``[B, C, rows, columns]`` to ``[B, N, C]``."""
    return torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2)


class Stranger(nn.Module):
    """Convolutions of the image, one a level; class channels say "nothing" of most cells."""

    family = ""
    classes = CLASSES
    strides = STRIDES
    channels = 4 + CLASSES
    first_class = 4
    inputs = ("images",)
    bare = False
    """Whether nothing but objects in an image shows what the box terms are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(len(self.family))
        self.levels = nn.ModuleList(nn.Conv2d(3, self.channels, s, s) for s in self.strides)
        for stride, conv in zip(self.strides, self.levels, strict=True):
            nn.init.normal_(conv.weight, 0, 0.3 / stride)
            nn.init.normal_(conv.bias, 0, 0.1)
            conv.weight.data[self.first_class : self.first_class + CLASSES] *= 6
            conv.bias.data[self.first_class : self.first_class + CLASSES] -= 5
        cells, strides = [], []
        for stride in self.strides:
            ticks = torch.arange(SIZE // stride).float()
            y, x = torch.meshgrid(ticks, ticks, indexing="ij")
            cells.append(torch.stack((x, y), -1).reshape(-1, 2))
            strides.append(torch.full((ticks.numel() ** 2, 1), float(stride)))
        self.cells, self.steps = torch.cat(cells), torch.cat(strides)

    def maps(self, images: Tensor) -> list[Tensor]:
        return [conv(images) for conv in self.levels]

    def corners(self, t: Tensor) -> Tensor:
        """Boxes around the cells' centers, out of four channels, corners in pixels."""
        center, size = (
            (self.cells + 0.5 + 0.3 * t[..., :2].tanh()) * self.steps,
            (t[..., 2:4].tanh() * 0.5).exp() * self.steps,
        )
        return torch.cat((center - size / 2, center + size / 2), -1)

    def example(self, batch: int) -> tuple[Tensor, ...]:
        return (torch.rand(batch, 3, SIZE, SIZE),)


class YoloxRaw(Stranger):
    family = "yolox"
    channels = 5 + CLASSES
    first_class = 5

    def __init__(self) -> None:
        super().__init__()
        for conv in self.levels:
            conv.bias.data[:2] += 0.5

    def rows(self, images: Tensor) -> Tensor:
        return flat([torch.cat((m[:, :4], m[:, 4:5].sigmoid(), m[:, 5:].sigmoid()), 1) for m in self.maps(images)])

    def forward(self, images: Tensor) -> Tensor:
        return self.rows(images)

    def decoded(self, images: Tensor) -> Tensor:
        rows = self.rows(images)
        return torch.cat(
            ((rows[..., :2] + self.cells) * self.steps, rows[..., 2:4].exp() * self.steps, rows[..., 4:]), -1
        )

    def truth(self, images: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.decoded(images)
        half = rows[..., 2:4] / 2
        return torch.cat((rows[..., :2] - half, rows[..., :2] + half), -1), rows[..., 4:5] * rows[..., 5:]


class YoloxDecoded(YoloxRaw):
    def forward(self, images: Tensor) -> Tensor:
        return self.decoded(images)


class YoloNas(Stranger):
    family = "corners"

    def truth(self, images: Tensor) -> tuple[Tensor, Tensor]:
        rows = flat(self.maps(images))
        return self.corners(rows), rows[..., 4:].sigmoid()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.truth(images)


class PpYoloe(YoloNas):
    """Scores by class first; boxes are divided by the factor that the image was scaled by."""

    inputs = ("images", "scale_factor")

    def forward(self, images: Tensor, scale_factor: Tensor) -> tuple[Tensor, ...]:
        boxes, scores = self.truth(images)
        factor = scale_factor.flip(1).repeat(1, 2)[:, None]
        return boxes / factor, scores.transpose(1, 2)

    def example(self, batch: int) -> tuple[Tensor, ...]:
        return (*super().example(batch), torch.ones(batch, 2))


class Ssd(Stranger):
    family = "ssd"
    channels = 5 + CLASSES
    first_class = 5

    def probabilities(self, images: Tensor) -> tuple[Tensor, Tensor]:
        rows = flat(self.maps(images))
        return self.corners(rows), rows[..., 4:].softmax(-1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        boxes, shares = self.probabilities(images)
        return boxes / SIZE, shares

    def truth(self, images: Tensor) -> tuple[Tensor, Tensor]:
        boxes, shares = self.probabilities(images)
        return boxes, shares[..., 1:]


class Detr(Stranger):
    """Logits with "no object" last, normalized centers and sizes."""

    family = "detr"
    channels = 5 + CLASSES

    def __init__(self) -> None:
        super().__init__()
        for conv in self.levels:
            conv.bias.data[-1] += 3

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        rows = flat(self.maps(images))
        return rows[..., 4:], rows[..., :4].sigmoid()

    def truth(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits, boxes = self(images)
        center, half = boxes[..., :2] * SIZE, boxes[..., 2:] * SIZE / 2
        return torch.cat((center - half, center + half), -1), logits.softmax(-1)[..., :-1]


class RtDetr(Stranger):
    """Logits without a class for nothing."""

    family = "rtdetr"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        rows = flat(self.maps(images))
        return rows[..., 4:], rows[..., :4].sigmoid()

    def truth(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits, boxes = RtDetr.forward(self, images)
        center, half = boxes[..., :2] * SIZE, boxes[..., 2:] * SIZE / 2
        return torch.cat((center - half, center + half), -1), logits.sigmoid()


class RtDetrJoined(RtDetr):
    """Both in one output, as Ultralytics has it."""

    def forward(self, images: Tensor) -> Tensor:
        logits, boxes = super().forward(images)
        return torch.cat((boxes, logits.sigmoid()), -1)


class Rows(YoloNas):
    """End-to-end: the best 20 of all classes of all cells."""

    family = "rows"

    def best(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores = self.truth(images)
        values, index = scores.flatten(1).topk(20, 1)
        picked = boxes.gather(1, (index // scores.shape[2]).unsqueeze(2).expand(-1, -1, 4))
        return picked, values, index % scores.shape[2]

    def forward(self, images: Tensor) -> Tensor:
        boxes, scores, labels = self.best(images)
        return torch.cat((boxes, scores[..., None], labels[..., None].float()), -1)


class RowsApart(Rows):
    """Three outputs; boxes are scaled by the images' size, width first."""

    inputs = ("images", "orig_target_sizes")

    def forward(self, images: Tensor, orig_target_sizes: Tensor) -> tuple[Tensor, ...]:
        boxes, scores, labels = self.best(images)
        return labels, boxes / SIZE * orig_target_sizes.repeat(1, 2)[:, None].float(), scores

    def example(self, batch: int) -> tuple[Tensor, ...]:
        return (*super().example(batch), torch.full((batch, 2), SIZE))


class LevelsApart(Stranger):
    """For NPUs: two outputs a level, logits of distances and of classes."""

    family = "levels"
    bins = 16
    first_class = 64
    channels = 64 + CLASSES

    def distances(self, rows: Tensor) -> Tensor:
        spread = rows.unflatten(-1, (4, self.bins)).softmax(-1)
        return (spread * torch.arange(float(self.bins))).sum(-1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(part for m in self.maps(images) for part in (m[:, :64], m[:, 64:]))

    def truth(self, images: Tensor) -> tuple[Tensor, Tensor]:
        rows = flat(self.maps(images))
        distance, center = self.distances(rows[..., :64]), self.cells + 0.5
        boxes = torch.cat((center - distance[..., :2], center + distance[..., 2:]), -1) * self.steps
        return boxes, rows[..., 64:].sigmoid()


class LevelsJoined(LevelsApart):
    """One output a level."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.cat((m[:, :64], m[:, 64:]), 1) for m in self.maps(images))


class NanoDet(LevelsApart):
    """NanoDet-m: flat levels, eight bins, class probabilities."""

    family = "nanodet"
    bins = 8
    first_class = 0
    channels = CLASSES + 32
    point = 0.5

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = [m.flatten(2).transpose(1, 2) for m in self.maps(images)]
        return tuple(m[..., :CLASSES].sigmoid() for m in maps) + tuple(m[..., CLASSES:] for m in maps)

    def truth(self, images: Tensor) -> tuple[Tensor, Tensor]:
        rows = flat(self.maps(images))
        distance, center = self.distances(rows[..., CLASSES:]), self.cells + self.point
        boxes = torch.cat((center - distance[..., :2], center + distance[..., 2:]), -1) * self.steps
        return boxes, rows[..., :CLASSES].sigmoid()


class NanoDetPlus(NanoDet):
    """All in one output, distances from the low corner of the cell."""

    point = 0.0

    def forward(self, images: Tensor) -> Tensor:
        maps = self.maps(images)
        return torch.cat((flat([m[:, :CLASSES] for m in maps]).sigmoid(), flat([m[:, CLASSES:] for m in maps])), -1)


class FastestDet(Stranger):
    family = "fastestdet"
    strides = (16,)
    channels = 5 + CLASSES
    first_class = 5

    def __init__(self) -> None:
        super().__init__()
        self.levels[0].bias.data[0] -= 3

    def forward(self, images: Tensor) -> Tensor:
        m = self.maps(images)[0]
        return torch.cat((m[:, :1].sigmoid(), m[:, 1:5], m[:, 5:].softmax(1)), 1)

    def truth(self, images: Tensor) -> tuple[Tensor, Tensor]:
        rows = flat([self(images)])
        center, half = (rows[..., 1:3].tanh() + self.cells) * self.steps, rows[..., 3:5].sigmoid() * SIZE / 2
        return torch.cat((center - half, center + half), -1), rows[..., :1] ** 0.6 * rows[..., 5:] ** 0.4


class Yolov8(LevelsApart):
    family = "yolov8"

    def forward(self, images: Tensor) -> Tensor:
        boxes, scores = self.truth(images)
        joined = torch.cat(((boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]), -1)
        return torch.cat((joined.transpose(1, 2), scores.transpose(1, 2)), 1)


class Yolov4(Stranger):
    """Three anchors a cell; corners with a dimension of one, in units of the input."""

    family = "yolov4"
    channels = 3 * (4 + CLASSES)

    def anchors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = [m.unflatten(1, (3, 4 + CLASSES)).permute(0, 1, 3, 4, 2).flatten(1, 3) for m in self.maps(images)]
        rows, start, boxes = torch.cat(maps, 1), 0, []
        for stride in self.strides:
            count = (SIZE // stride) ** 2
            cells, steps = (t[start : start + count].repeat(3, 1) for t in (self.cells, self.steps))
            t = rows[:, 3 * start : 3 * (start + count)]
            center, size = (cells + t[..., :2].sigmoid()) * steps, (t[..., 2:4].tanh() * 0.5).exp() * steps
            boxes.append(torch.cat((center - size / 2, center + size / 2), -1))
            start += count
        return torch.cat(boxes, 1), (rows[..., 4:] - 3).sigmoid()

    def truth(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.anchors(images)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        boxes, scores = self.anchors(images)
        return (boxes / SIZE).unsqueeze(2), scores


STRANGERS: tuple[type[Stranger], ...] = (
    Yolov8, Yolov4, YoloxRaw, YoloxDecoded, YoloNas, PpYoloe, Ssd, Detr, RtDetr, RtDetrJoined, Rows, RowsApart, LevelsApart, LevelsJoined,
    NanoDet, NanoDetPlus, FastestDet,
)  # fmt: skip


@cache
def exported(kind: type[Stranger], dynamic: bool) -> bytes:
    """A network of this class as ONNX; its weights are always the same."""
    module, file = kind().eval(), io.BytesIO()
    example = module.example(2 if dynamic else 1)
    outputs = module(*example)
    names = [f"output{i}" for i in range(1 if isinstance(outputs, Tensor) else len(outputs))]
    torch.onnx.export(
        module, example, file, dynamo=False, opset_version=17, input_names=list(module.inputs), output_names=names,
        dynamic_axes={name: {0: "batch"} for name in (*module.inputs, *names)} if dynamic else {},
    )  # fmt: skip
    return file.getvalue()


def write(
    module: Stranger, path: Path, *, seed: int | None = None, metadata: dict[str, str] | None = None, dynamic: bool = True
) -> Path:  # fmt: skip
    """Export; with a ``seed`` every name means nothing, and nodes, outputs and inputs stand in another order."""
    model = onnx.ModelProto.FromString(exported(type(module), dynamic))
    helper.set_model_props(model, metadata or {})
    if seed is not None:
        shuffle(model, random.Random(seed))
        onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def shuffle(model: onnx.ModelProto, rng: random.Random) -> None:
    """Rename everything; put inputs, outputs and initializers in any order, and nodes in any that runs."""
    graph, table = model.graph, dict[str, str]()

    def rename(name: str) -> str:
        return table.setdefault(name, f"x{rng.getrandbits(48):x}") if name else name

    for node in graph.node:
        node.name = f"n{rng.getrandbits(48):x}"
        node.input[:] = map(rename, node.input)
        node.output[:] = map(rename, node.output)
    for entry in (*graph.input, *graph.output, *graph.initializer):
        entry.name = rename(entry.name)
    del graph.value_info[:]
    for entries in (graph.input, graph.output, graph.initializer):
        some = list(entries)
        rng.shuffle(some)
        del entries[:]
        entries.extend(some)
    made = {entry.name for entry in (*graph.input, *graph.initializer)} | {""}
    waiting, ordered = list(graph.node), []
    while waiting:
        ready = [i for i, node in enumerate(waiting) if made.issuperset(node.input)]
        node = waiting.pop(rng.choice(ready))
        made.update(node.output)
        ordered.append(node)
    del graph.node[:]
    graph.node.extend(ordered)
