"""More of the networks of `third_party`: heads given level by level, or with several candidates a cell, undecoded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from third_party import CLASSES, SIZE, Stranger, YoloNas, YoloxRaw, flat
from torch import Tensor, nn


def around(module: Stranger, distance: Tensor, point: float, in_pixels: bool) -> Tensor:
    """Corners ``[B, N, 4]`` from distances to left, top, right, bottom."""
    center = (module.cells + point) * module.steps
    distance = distance if in_pixels else distance * module.steps
    return torch.cat((center - distance[..., :2], center + distance[..., 2:]), -1)


class YoloxLevels(YoloxRaw):
    """Box, objectness and classes of each level apart, all raw."""

    bare = True

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(part for m in self.maps(images) for part in (m[:, :4], m[:, 4:5], m[:, 5:]))


class YoloxLevelsInProbabilities(YoloxRaw):
    """The same with the sigmoids in the file."""

    bare = True

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(part for m in self.maps(images) for part in (m[:, :4], m[:, 4:5].sigmoid(), m[:, 5:].sigmoid()))


class ModelOnly(Stranger):
    """One output a level: classes, then distances in strides."""

    family = "levels"
    bare = True

    def __init__(self) -> None:
        super().__init__()
        for conv in self.levels:
            conv.bias.data[:4] += 1

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.cat((m[:, 4:], m[:, :4].relu()), 1) for m in self.maps(images))

    def truth(self, images: Tensor) -> tuple[Tensor, Tensor]:
        rows = flat(self.maps(images))
        return around(self, rows[..., :4].relu(), 0.5, False), rows[..., 4:].sigmoid()


class ModelOnlyOfManyClasses(ModelOnly):
    """The same, wide enough for 64 channels of bins and 10 classes too."""

    classes = 70
    channels = 4 + classes

    def __init__(self) -> None:
        super().__init__()
        for conv in self.levels:
            conv.bias.data[4 + CLASSES :] -= 5


class RtmDet(Stranger):
    """Distances in pixels, from the low corner of the cell."""

    family = "rtmdet"
    bare = True

    def distances(self, images: Tensor) -> list[Tensor]:
        return [m[:, :4].exp() * s for m, s in zip(self.maps(images), self.strides, strict=True)]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (*(m[:, 4:] for m in self.maps(images)), *self.distances(images))

    def truth(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return around(self, flat(self.distances(images)), 0.0, True), flat(self.maps(images))[..., 4:].sigmoid()


class Fcos(RtmDet):
    """FCOS as its authors have it: a centerness, the square root of whose product with the class is the score."""

    family = "fcos"
    channels = 5 + CLASSES
    first_class = 5
    point = 0.5
    in_pixels = True

    def distances(self, images: Tensor) -> list[Tensor]:
        maps = self.maps(images)
        return [m[:, :4].exp() * (s if self.in_pixels else 1) for m, s in zip(maps, self.strides, strict=True)]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.maps(images)
        return (*(m[:, 5:] for m in maps), *self.distances(images), *(m[:, 4:5] for m in maps))

    def score(self, rows: Tensor) -> Tensor:
        return (rows[..., 5:].sigmoid() * rows[..., 4:5].sigmoid()).sqrt()

    def truth(self, images: Tensor) -> tuple[Tensor, Tensor]:
        boxes = around(self, flat(self.distances(images)), self.point, self.in_pixels)
        return boxes, self.score(flat(self.maps(images)))


class FcosMmdet(Fcos):
    """As mmdetection has it: the product."""

    family = "fcos-mmdet"

    def score(self, rows: Tensor) -> Tensor:
        return rows[..., 5:].sigmoid() * rows[..., 4:5].sigmoid()


class FcosTorchvision(Fcos):
    """Distances in strides, from the low corner."""

    family = "fcos-torchvision"
    point = 0.0
    in_pixels = False


class Scrfd(Stranger):
    """Two candidates a cell; scores, distances and landmarks as rows, the candidates of a cell side by side."""

    family = "scrfd"
    bare = True
    first_class = 0
    channels = 2 * 15

    def __init__(self) -> None:
        super().__init__()
        for conv in self.levels:
            conv.bias.data[:2] -= 4
            conv.bias.data[2:10] += 1.2

    def parts(self, images: Tensor) -> list[tuple[Tensor, ...]]:
        return [(m[:, :2], m[:, 2:10], m[:, 10:]) for m in self.maps(images)]

    def rows(self, part: Tensor) -> Tensor:
        return part.permute(0, 2, 3, 1).unflatten(-1, (2, -1)).flatten(1, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        parts = self.parts(images)
        scores = [self.rows(level[0]).sigmoid() for level in parts]
        return (*scores, *(self.rows(level[1]) for level in parts), *(self.rows(level[2]) for level in parts))

    def by_anchor(self, images: Tensor, index: int) -> Tensor:
        """Rows ``[B, N, C]`` by level, candidate of the cell, row, column."""
        maps = [level[index] for level in self.parts(images)]
        return torch.cat([flat([some]) for m in maps for some in m.chunk(2, 1)], 1)

    def twice(self, cells: Tensor) -> Tensor:
        """What cells have, for each of their candidates."""
        counts = [(SIZE // stride) ** 2 for stride in self.strides]
        return torch.cat([part for level in cells.split(counts) for part in (level, level)])

    def truth(self, images: Tensor) -> tuple[Tensor, Tensor]:
        center, steps = self.twice(self.cells * self.steps), self.twice(self.steps)
        distance = self.by_anchor(images, 1) * steps
        boxes = torch.cat((center - distance[..., :2], center + distance[..., 2:]), -1)
        return torch.cat((boxes[..., :2], boxes[..., 2:].maximum(boxes[..., :2])), -1), self.by_anchor(
            images, 0
        ).sigmoid()

    def landmarks(self, images: Tensor) -> Tensor:
        """Five points of each candidate, ``[B, N, 5, 2]``."""
        center, steps = self.twice(self.cells * self.steps), self.twice(self.steps)
        return (self.by_anchor(images, 2) * steps).unflatten(-1, (5, 2)) + center[:, None]


class ScrfdFlat(Scrfd):
    """Without a batch axis, as InsightFace's own files are."""

    def rows(self, part: Tensor) -> Tensor:
        return part.permute(2, 3, 0, 1).reshape(-1, part.shape[1] // 2)


class BlazeFace(Stranger):
    """Two candidates in a cell of the finer level, six in one of the coarser, side by side; six landmarks."""

    family = "blazeface"
    bare = True
    strides = (8, 16)
    anchors = (2, 6)
    first_class = 0
    channels = 6 * 17

    def __init__(self) -> None:
        super().__init__()
        for conv in self.levels:
            conv.weight.data *= 8
            conv.bias.data += 20
            for first in range(0, self.channels, 17):
                conv.bias.data[first] = -2

    def rows(self, images: Tensor) -> Tensor:
        rows = []
        for m, count in zip(self.maps(images), self.anchors, strict=True):
            rows.append(m[:, : 17 * count].permute(0, 2, 3, 1).unflatten(-1, (count, 17)).flatten(1, 3))
        return torch.cat(rows, 1)

    def centers(self) -> Tensor:
        """Center of the cell of each candidate, in pixels."""
        points = ((self.cells + 0.5) * self.steps).split([(SIZE // stride) ** 2 for stride in self.strides])
        return torch.cat([p.repeat_interleave(count, 0) for p, count in zip(points, self.anchors, strict=True)])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        rows = self.rows(images)
        return rows[..., 1:], rows[..., :1]

    def truth(self, images: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.rows(images)
        center, half = rows[..., 1:3] + self.centers(), rows[..., 3:5] / 2
        low, high = center - half, center + half
        return torch.cat((low, high.maximum(low)), -1), rows[..., :1].sigmoid()

    def landmarks(self, images: Tensor) -> Tensor:
        """Six points of each candidate, ``[B, N, 6, 2]``."""
        return self.rows(images)[..., 5:].unflatten(-1, (6, 2)) + self.centers()[:, None]


class BestClass(YoloNas):
    """The best class of each candidate, not suppressed; one output."""

    family = "best_class"

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        boxes, scores = self.truth(images)
        best, label = scores.max(-1, keepdim=True)
        return torch.cat((boxes, best, label.to(boxes.dtype)), -1)


class BestClassApart(BestClass):
    """Three outputs."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        boxes, scores = self.truth(images)
        best, label = scores.max(-1, keepdim=True)
        return boxes, best, label.to(boxes.dtype)


class BestClassTimesObjectness(BestClass):
    """The best class times an objectness, as of YOLOv5 and YOLOX."""

    def objectness(self, images: Tensor) -> Tensor:
        return flat(self.maps(images))[..., :1].sigmoid()

    def forward(self, images: Tensor) -> Tensor:
        boxes, scores = super().truth(images)
        best, label = scores.max(-1, keepdim=True)
        return torch.cat((boxes, best * self.objectness(images), label.to(boxes.dtype)), -1)

    def truth(self, images: Tensor) -> tuple[Tensor, Tensor]:
        boxes, scores = super().truth(images)
        return boxes, scores * self.objectness(images)


class OneClass(Stranger):
    """Distances and the logits of one class for each level; with ``sums``, probabilities and their sums (RKNN's exports)."""

    family = "levels"
    bare = True
    classes = 1
    channels = 5
    sums = False

    def __init__(self) -> None:
        super().__init__()
        for conv in self.levels:
            conv.bias.data[:4] += 1
            conv.bias.data[4] -= 4

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.maps(images)
        if not self.sums:
            return tuple(part for m in maps for part in (m[:, :4].relu(), m[:, 4:]))
        scores = [m[:, 4:].sigmoid() for m in maps]
        sums = [score.sum(1, keepdim=True).clamp(0, 1) for score in scores]
        return tuple(
            part for m, one, total in zip(maps, scores, sums, strict=True) for part in (m[:, :4].relu(), one, total)
        )

    def truth(self, images: Tensor) -> tuple[Tensor, Tensor]:
        rows = flat(self.maps(images))
        return around(self, rows[..., :4].relu(), 0.5, False), rows[..., 4:].sigmoid()


class OneClassOnFourLevels(OneClass):
    """Eight outputs, four of them with one channel."""

    strides = (4, 8, 16, 32)


class OneClassWithSums(OneClass):
    """Nine outputs, six of them with one channel."""

    sums = True


class PicoDet(nn.Module):
    """Four flat levels of class probabilities and eight bins a side, from the center of the cell."""

    size = 128
    strides = (8, 16, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.levels = nn.ModuleList(nn.Conv2d(3, CLASSES + 32, 1) for _ in self.strides)
        for conv in self.levels:
            conv.bias.data[:CLASSES] -= 5

    def rows(self, images: Tensor) -> list[Tensor]:
        pooled = [nn.functional.avg_pool2d(images, s) for s in self.strides]
        return [conv(x).flatten(2).transpose(1, 2) for conv, x in zip(self.levels, pooled, strict=True)]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        rows = self.rows(images)
        return (*(r[..., :CLASSES].sigmoid() for r in rows), *(r[..., CLASSES:] for r in rows))

    def truth(self, images: Tensor) -> tuple[Tensor, Tensor]:
        boxes, scores = [], []
        for rows, stride in zip(self.rows(images), self.strides, strict=True):
            distance = (rows[..., CLASSES:].unflatten(-1, (4, 8)).softmax(-1) * torch.arange(8.0)).sum(-1) * stride
            cell = torch.arange(rows.shape[1])
            columns = self.size // stride
            center = (torch.stack((cell % columns, cell // columns), -1) + 0.5) * stride
            boxes.append(torch.cat((center - distance[..., :2], center + distance[..., 2:]), -1))
            scores.append(rows[..., :CLASSES].sigmoid())
        return torch.cat(boxes, 1), torch.cat(scores, 1)


class AnchorLevels(nn.Module):
    """YOLOv5 before its decode: per level ``[B, 3 * (5 + C), rows, columns]``, or ``[B, 3, rows, columns, 5 + C]``."""

    anchors = (((10, 13), (16, 30), (33, 23)), ((30, 61), (62, 45), (59, 119)), ((116, 90), (156, 198), (373, 326)))

    def __init__(self, apart: bool = False, probabilities: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.apart, self.probabilities = apart, probabilities
        self.levels = nn.ModuleList(nn.Conv2d(3, 3 * (5 + CLASSES), s, s) for s in (8, 16, 32))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = [level(images).sigmoid() if self.probabilities else level(images) for level in self.levels]
        return tuple(m.unflatten(1, (3, -1)).permute(0, 1, 3, 4, 2) if self.apart else m for m in maps)

    def truth(self, images: Tensor) -> tuple[Tensor, Tensor]:
        boxes, scores = [], []
        for level, stride, anchors in zip(self.levels, (8, 16, 32), self.anchors, strict=True):
            for i, (wide, tall) in enumerate(anchors):
                t = level(images)[0].unflatten(0, (3, -1))[i].sigmoid()
                for row in range(SIZE // stride):
                    for column in range(SIZE // stride):
                        cell = t[:, row, column]
                        x, y = (2 * cell[0] - 0.5 + column) * stride, (2 * cell[1] - 0.5 + row) * stride
                        w, h = (2 * cell[2]) ** 2 * wide, (2 * cell[3]) ** 2 * tall
                        boxes.append(torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2)))
                        scores.append(cell[4] * cell[5:])
        return torch.stack(boxes)[None], torch.stack(scores)[None]


class Deltas(nn.Module):
    """RetinaNet or EfficientDet: five levels, nine anchors a cell, side by side; or by level, as maps."""

    size = 128
    strides = (8, 16, 32, 64, 128)

    def __init__(self, point: float, y_first: bool, by_level: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.point, self.y_first, self.by_level = point, y_first, by_level
        self.boxes = nn.ModuleList(nn.Conv2d(3, 36, 1) for _ in self.strides)
        self.classes = nn.ModuleList(nn.Conv2d(3, 9 * CLASSES, 1) for _ in self.strides)
        for conv in self.classes:
            conv.bias.data -= 5

    def maps(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        pooled = [nn.functional.avg_pool2d(images, s) for s in self.strides]
        return [(b(x), c(x)) for x, b, c in zip(pooled, self.boxes, self.classes, strict=True)]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.maps(images)
        if self.by_level:
            return tuple(m for pair in maps for m in pair)
        rows = [[m.unflatten(1, (9, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in pair] for pair in maps]
        return torch.cat([pair[0] for pair in rows], 1), torch.cat([pair[1] for pair in rows], 1)

    def truth(
        self, images: Tensor, sides: Callable[[int, int], tuple[float, float]]
    ) -> dict[tuple[float, ...], Tensor]:
        """Box of each candidate, by the center of its cell, its level and its anchor. ``sides(level, anchor)`` are width and height."""
        found = {}
        for level, ((deltas, _), stride) in enumerate(zip(self.maps(images), self.strides, strict=True)):
            for anchor in range(9):
                wide, tall = sides(level, anchor)
                for row in range(self.size // stride):
                    for column in range(self.size // stride):
                        t = deltas[0].unflatten(0, (9, 4))[anchor, :, row, column]
                        x, y, w, h = t[[1, 0, 3, 2]] if self.y_first else t
                        x, y = x * wide + (column + self.point) * stride, y * tall + (row + self.point) * stride
                        w, h = w.exp() * wide, h.exp() * tall
                        found[level, row, column, anchor] = torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
        return found


LEVEL_STRANGERS: tuple[type[Stranger], ...] = (
    YoloxLevels, YoloxLevelsInProbabilities, ModelOnly, ModelOnlyOfManyClasses, RtmDet, Scrfd, BlazeFace, BestClass, BestClassApart,
    BestClassTimesObjectness, OneClass, OneClassOnFourLevels, OneClassWithSums,
)  # fmt: skip
AMBIGUOUS: tuple[type[Stranger], ...] = (Fcos, FcosMmdet, FcosTorchvision)
"""Nothing in these files shows which one they are."""
