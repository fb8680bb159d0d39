"""Modules of the YOLO families that replace the classes named in a checkpoint (stand-ins).

A checkpoint of Ultralytics or YOLOv5 is a pickled tree of modules. Loading rebuilds that tree from these classes (`checkpoint.py`), so
their attribute names are those found in such files. The constructors exist to build and train the networks of fusenms (`models/shapes`).

Each class declares the parts, attributes and tensors that it uses (`StandIn`). The loader refuses a layer that has others, because the
computation would ignore them.

The heads return their *taps*, not boxes: the tensors before any decoding. Decoding happens once, in the fused graph, and only for the
best candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fusenms.sources.torch_modules import fields
from fusenms.sources.torch_modules.fields import Field


class StandIn(nn.Module):
    """A module that replaces a class named in checkpoints.

    Attributes:
        parts: names of its children.
        attributes: attributes that the computation uses, each with the check of its value.
        tensors: names of its own parameters and buffers.
    """

    parts: ClassVar[frozenset[str]] = frozenset()
    attributes: ClassVar[Mapping[str, Field]] = {}
    tensors: ClassVar[frozenset[str]] = frozenset()


class Conv(StandIn):
    """Convolution, batch normalization and activation (SiLU unless the checkpoint has another one)."""

    parts: ClassVar[frozenset[str]] = frozenset({"conv", "bn", "act"})

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, padding: int | None = None) -> None:
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn: nn.BatchNorm2d | None = nn.BatchNorm2d(c_out, eps=1e-3, momentum=0.03)
        self.act: nn.Module = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x, bn = self.conv(x), self._modules.get("bn")  # missing if it was folded
        return self.act(x if bn is None else bn(x))

    def fold(self) -> None:
        """Fold the batch normalization into the convolution, computed in float64. For evaluation mode only."""
        bn: Any = self._modules.get("bn")
        if bn is not None:
            weight = self.conv.weight.double()
            bias = torch.zeros(len(weight), dtype=torch.float64) if self.conv.bias is None else self.conv.bias.double()
            scale = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
            shift = bn.bias.double() + (bias - bn.running_mean.double()) * scale
            self.conv.weight = nn.Parameter((weight * scale[:, None, None, None]).float(), requires_grad=False)
            self.conv.bias = nn.Parameter(shift.float(), requires_grad=False)
        self.bn = None


class Bottleneck(StandIn):
    """Two convolutions with a residual connection, if `add` is set."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1", "cv2"})
    attributes: ClassVar[Mapping[str, Field]] = {"add": fields.flag}

    def __init__(self, c_in: int, c_out: int, shortcut: bool = True, kernels: tuple[int, int] = (3, 3)) -> None:
        super().__init__()
        self.cv1 = Conv(c_in, c_out, kernels[0])
        self.cv2 = Conv(c_out, c_out, kernels[1])
        self.add = shortcut and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class C2f(StandIn):
    """Cross-stage block of YOLOv8: concatenates the outputs of all bottlenecks."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1", "cv2", "m"})

    def __init__(self, c_in: int, c_out: int, repeats: int = 1, shortcut: bool = False) -> None:
        super().__init__()
        self.c = c_out // 2
        self.cv1 = Conv(c_in, 2 * self.c)
        self.cv2 = Conv((2 + repeats) * self.c, c_out)
        self.m = nn.ModuleList(Bottleneck(self.c, self.c, shortcut) for _ in range(repeats))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class C3(StandIn):
    """Cross-stage block of YOLOv5: a chain of bottlenecks in parallel with a single convolution."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1", "cv2", "cv3", "m"})

    def __init__(self, c_in: int, c_out: int, repeats: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        hidden = c_out // 2
        self.cv1 = Conv(c_in, hidden)
        self.cv2 = Conv(c_in, hidden)
        self.cv3 = Conv(2 * hidden, c_out)
        self.m = nn.Sequential(*(Bottleneck(hidden, hidden, shortcut, (1, 3)) for _ in range(repeats)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class SPPF(StandIn):
    """Spatial pyramid pooling by `n` repeated max-poolings. `add` adds the input to the output."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1", "cv2", "m"})
    attributes: ClassVar[Mapping[str, Field]] = {"n": fields.repeats, "add": fields.flag}

    n = 3  # older checkpoints have neither n nor add
    add = False

    def __init__(self, c_in: int, c_out: int, kernel: int = 5) -> None:
        super().__init__()
        self.cv1 = Conv(c_in, c_in // 2)
        self.cv2 = Conv(c_in // 2 * 4, c_out)
        self.m = nn.MaxPool2d(kernel, 1, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(self.n):
            parts.append(self.m(parts[-1]))
        y = self.cv2(torch.cat(parts, 1))
        return x + y if self.add else y


class Concat(StandIn):
    """Concatenate feature maps along dimension `d`."""

    attributes: ClassVar[Mapping[str, Field]] = {"d": fields.index}

    def __init__(self, dimension: int = 1) -> None:
        super().__init__()
        self.d = dimension

    def forward(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, self.d)


class DFL(StandIn):
    """Holds the bin values of the distribution focal loss (0, 1, 2, …) in a checkpoint.

    The fused graph decodes the distribution with these values. Source: Li et al., "Generalized Focal Loss", 2020.
    """

    parts: ClassVar[frozenset[str]] = frozenset({"conv"})

    def __init__(self, bins: int = 16) -> None:
        super().__init__()
        self.c1 = bins
        self.conv = nn.Conv2d(bins, 1, 1, bias=False)
        self.conv.weight = nn.Parameter(torch.arange(bins, dtype=torch.float32).view(1, bins, 1, 1), False)


class AnchorFreeDetect(StandIn):
    """Head of the Ultralytics families: per level, distance bins (`cv2`) and class logits (`cv3`).

    Some heads also have a one-to-one branch, whose candidates need no suppression.
    """

    parts: ClassVar[frozenset[str]] = frozenset({"cv2", "cv3", "dfl", "one2one_cv2", "one2one_cv3"})
    attributes: ClassVar[Mapping[str, Field]] = {
        "nc": fields.channels,
        "reg_max": fields.repeats,
        "stride": fields.vector,
    }
    one_to_one = False  # selects the branch that runs, if there are two
    one2one_cv2: nn.ModuleList
    one2one_cv3: nn.ModuleList
    nc: int
    reg_max: int
    stride: Tensor

    def __init__(self, num_classes: int, channels: tuple[int, ...], strides: tuple[int, ...], bins: int = 16) -> None:
        super().__init__()
        self.nc, self.nl, self.reg_max = num_classes, len(channels), bins
        self.no = num_classes + 4 * bins
        self.stride = torch.tensor([float(s) for s in strides])
        c_box, c_class = max(16, channels[0] // 4, 4 * bins), max(channels[0], min(num_classes, 100))
        self.cv2 = nn.ModuleList(
            nn.Sequential(Conv(c, c_box, 3), Conv(c_box, c_box, 3), nn.Conv2d(c_box, 4 * bins, 1)) for c in channels
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(Conv(c, c_class, 3), Conv(c_class, c_class, 3), nn.Conv2d(c_class, num_classes, 1))
            for c in channels
        )
        self.dfl = DFL(bins)

    @property
    def bin_values(self) -> tuple[float, ...]:
        """The values of the bins of the box distribution: 0, 1, 2, … except in quantized weights."""
        return tuple(self.dfl.conv.weight.flatten().tolist()) if self.reg_max > 1 else (0.0,)

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, ...]:
        """Return box distances ``[B, 4 * bins, N]`` (left, top, right, bottom) and class logits ``[B, C, N]``."""
        branches = (self.one2one_cv2, self.one2one_cv3) if self.one_to_one else (self.cv2, self.cv3)
        boxes, classes = ([branch(x).flatten(2) for branch, x in zip(part, levels, strict=True)] for part in branches)
        return torch.cat(boxes, 2), torch.cat(classes, 2)


class AnchorDetect(StandIn):
    """Head of YOLOv5 and YOLOv7: per level, one convolution that returns box, objectness and classes of every anchor.

    YOLOv7 adds a learned summand before and a learned factor after each convolution (`ia`, `im`), and auxiliary levels that only training
    uses (`m2`).
    """

    parts: ClassVar[frozenset[str]] = frozenset({"m", "ia", "im", "m2"})
    attributes: ClassVar[Mapping[str, Field]] = {
        "nc": fields.channels, "na": fields.channels, "no": fields.channels, "stride": fields.vector,
    }  # fmt: skip
    tensors: ClassVar[frozenset[str]] = frozenset({"anchors", "anchor_grid"})

    m: nn.ModuleList
    nc: int
    na: int
    no: int
    anchors: Tensor  # [levels, anchors, 2], in units of the level's stride
    stride: Tensor

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, ...]:
        """Return ``[B, 5 + C, N]``: box terms, objectness logit, class logits; candidates by level, anchor, row, column."""
        rows = []
        before: Any = self._modules.get("ia")
        after: Any = self._modules.get("im")
        for i, (branch, x) in enumerate(zip(self.m, levels, strict="m2" not in self._modules)):
            y = branch(x if before is None else before[i](x))
            y = (y if after is None else after[i](y)).flatten(2).unflatten(1, (self.na, self.no))
            rows.append(y.transpose(1, 2).flatten(2))
        return (torch.cat(rows, 2),)


class DetectionModel(StandIn):
    """A list of modules. The attribute `f` of each names the layers that are its inputs (-1: the previous one)."""

    parts: ClassVar[frozenset[str]] = frozenset({"model"})
    attributes: ClassVar[Mapping[str, Field]] = {"save": fields.indices, "stride": fields.vector}
    model: nn.Sequential
    stride: Tensor  # only in checkpoints whose head has no stride

    def __init__(self, layers: list[nn.Module], sources: list[int | list[int]]) -> None:
        super().__init__()
        used: set[int] = set()
        for i, (layer, source) in enumerate(zip(layers, sources, strict=True)):
            layer.__dict__.update(i=i, f=source)
            used.update(f % i for f in ([source] if isinstance(source, int) else source) if f != -1)
        self.model = nn.Sequential(*layers)
        self.save = sorted(used)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run on images ``[B, 3, height, width]`` (RGB, 0 to 1) and return the head's taps."""
        kept: list[Tensor | None] = []
        for layer in self.model:
            source: Any = layer.f
            if source != -1:
                x = kept[source] if isinstance(source, int) else [x if f == -1 else kept[f] for f in source]  # type: ignore[assignment]
            x = layer(x)
            kept.append(x if layer.i in self.save else None)
        return x  # type: ignore[return-value]
