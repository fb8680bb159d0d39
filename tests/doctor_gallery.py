"""Small broken modules, one for each trap of an export. The line that the doctor has to name ends in ``# <- kind``."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    """A convolution, which each trap comes behind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)


class BranchOnValues(Net):
    def forward(self, x):
        y = self.conv(x)
        if x.mean() > 0.3:  # <- control-flow
            y = y * 2
        return y


class BranchThatNoImageTakes(Net):
    def forward(self, x):
        if x.max() > 1e6:  # <- control-flow
            x = x / 255
        return self.conv(x)


class BranchOnSize(Net):
    def forward(self, x):
        y = self.conv(x)
        if y.shape[2] > 35:  # <- control-flow
            y = y * 2
        return y


class BranchOnBatch(Net):
    def forward(self, x):
        y = self.conv(x)
        if x.shape[0] == 1:  # <- control-flow
            y = y.flip(3)
        return y


class LoopOverSize(Net):
    def forward(self, x):
        y = self.conv(x)
        for _ in range(x.shape[2] // 16):  # <- control-flow
            y = y + 1
        return y


class WhileOnValues(Net):
    def forward(self, x):
        y = x.abs().amax()
        while y > 0.5:  # <- control-flow
            y = y / 2
        return self.conv(x) * y


class LoopOverImages(Net):
    def forward(self, x):
        found = []
        for image in x:  # <- control-flow
            found.append(self.conv(image[None]))
        return torch.cat(found)


class SizeAsInt(Net):
    def forward(self, x):
        y = self.conv(x)
        cells = int(y.shape[2] * y.shape[3])  # <- baked-constant
        return y.reshape(y.shape[0], 8, cells)


class SizeByMath(Net):
    def forward(self, x):
        y = self.conv(x)
        side = math.ceil(x.shape[3] / 2)  # <- baked-constant
        return nn.functional.interpolate(y, size=(side, side))


class SizeByNumpy(Net):
    def forward(self, x):
        y = self.conv(x)
        sides = np.array(y.shape[2:])  # <- baked-constant
        return y / float(sides.prod())


class LengthOfBatch(Net):
    def forward(self, x):
        return self.conv(x) / len(x)  # <- baked-constant


class SizeAsTensor(Net):
    def forward(self, x):
        y = self.conv(x)
        scale = torch.tensor([x.shape[2], x.shape[3]], dtype=torch.float32)  # <- baked-constant
        return y.mean((2, 3)) * scale[0]


class ValueByItem(Net):
    def forward(self, x):
        return self.conv(x) * x[0].mean().item()  # <- detached-data


class ValueByFloat(Net):
    def forward(self, x):
        scale = float(x[0].amax())  # <- detached-data
        return self.conv(x) / scale


class ValueByNumpy(Net):
    def forward(self, x):
        y = self.conv(x)
        mean = torch.from_numpy(x.detach().numpy().mean((1, 2, 3)))  # <- detached-data
        return y + mean[:, None, None, None]


class ValueByData(Net):
    def forward(self, x):
        y = self.conv(x)
        return y + x.data.mean((1, 2, 3), keepdim=True)  # <- detached-data


class ValueByList(Net):
    def forward(self, x):
        y = self.conv(x)
        means = torch.tensor(x.mean((1, 2, 3)).tolist())  # <- detached-data
        return y * means[:, None, None, None]


class SizeChangedInPlace(Net):
    def forward(self, x):
        y = self.conv(x)
        height = y.shape[2]
        half = height
        half //= 2  # <- shape-arithmetic
        return y[:, :, :half] + y[:, :, height - half :]


class FixedGrid(Net):
    def forward(self, x):
        y = self.conv(x)
        grid = torch.arange(32.0)
        return y + grid  # <- fixed-size


class FixedBatch(Net):
    def forward(self, x):
        y = self.conv(x)
        return y.reshape(2, 8, -1)  # <- fixed-size


class KeysLost(Net):
    def forward(self, x):
        y = self.conv(x)
        return {"scores": y.sigmoid(), "boxes": y}  # <- output-structure


class ListsInLists(Net):
    def forward(self, x):
        y = self.conv(x)
        return y, [y + 1, y + 2]  # <- output-structure


class TextLeftOut(Net):
    def forward(self, x):
        y = self.conv(x)
        return y, "detector"  # <- output-structure


class DropoutLeftOn(Net):  # <- training-mode
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.train()

    def forward(self, x):
        return self.drop(self.conv(x))


class Noise(Net):
    def forward(self, x):
        return self.conv(x) + torch.rand(1)  # <- randomness


class DropoutByFunction(Net):
    def forward(self, x):
        return nn.functional.dropout(self.conv(x), 0.5)  # <- randomness


class MeanOverBatch(Net):
    def forward(self, x):  # <- batch-mixing
        y = self.conv(x)
        return y - y.mean()


class BatchStatistics(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y)  # <- batch-mixing


class NoOperator(Net):
    def forward(self, x):
        y = self.conv(x)
        return torch.linalg.svdvals(y)  # <- unsupported-operator


class OwnSuppression(Net):
    def forward(self, x):
        y = self.conv(x)
        return y + torch.ops.gallery.nms_of_ours(y)  # <- nms-inside


@torch.library.custom_op("gallery::nms_of_ours", mutates_args=())
def nms_of_ours(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


class OnAnotherDevice(Net):  # <- device
    def __init__(self) -> None:
        super().__init__()
        self.conv = self.conv.to("meta")

    def forward(self, x):
        return self.conv(x)


HEALTHY: list[type[nn.Module]] = []


def healthy(kind: type[nn.Module]) -> type[nn.Module]:
    HEALTHY.append(kind)
    return kind


@healthy
class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1))

    def forward(self, x):
        return self.layers(x)


@healthy
class Pyramid(Convolutions):
    def forward(self, x):
        y = self.layers(x)
        up = nn.functional.interpolate(y, scale_factor=2.0, mode="nearest")
        return up, y


@healthy
class Flattened(Convolutions):
    def forward(self, x):
        y = self.layers(x)
        batch, channels, height, width = y.shape
        return y.view(batch, channels, height * width).transpose(1, 2)


@healthy
class CheckedSize(Convolutions):
    def forward(self, x):
        assert x.shape[1] == 3, "three channels"
        if x.ndim != 4:
            raise ValueError("a batch")
        return self.layers(x)


@healthy
class Attention(Convolutions):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.layers(x)
        q = self.query(y).flatten(2)
        weights = (q.transpose(1, 2) @ q / 8**0.5).softmax(-1)
        return (y.flatten(2) @ weights.transpose(1, 2)).reshape_as(y)


@healthy
class ChosenByWhere(Convolutions):
    def forward(self, x):
        y = self.layers(x)
        return torch.where(y > 0, y, 0.1 * y)


@healthy
class GridOfCells(Convolutions):
    def forward(self, x):
        y = self.layers(x)
        rows = torch.arange(y.shape[2], dtype=y.dtype)
        columns = torch.arange(y.shape[3], dtype=y.dtype)
        return y + rows[:, None] + columns


@healthy
class BestOfEach(Convolutions):
    def forward(self, x):
        y = self.layers(x).flatten(2)
        best, place = y.max(1)
        return best, place.float(), y.topk(5, 2).values


@healthy
class AssignedByIndex(Convolutions):
    def forward(self, x):
        y = self.layers(x).clone()
        rows, columns = torch.tensor([0, 2]), torch.tensor([1, 3])
        y[:, :, rows, columns] = x[:, :1, rows, columns].expand(-1, 8, -1) * 0 + 1
        return y


def evaluated() -> nn.Module:
    """A healthy module, as the command line takes one."""
    return Convolutions().eval()


GALLERY = [
    kind
    for kind in list(globals().values())
    if isinstance(kind, type) and issubclass(kind, Net) and kind is not Net
]  # fmt: skip
