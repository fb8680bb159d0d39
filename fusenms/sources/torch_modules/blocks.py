"""Stand-ins for the building blocks of the later YOLO families (v6 to v12, 26).

Like those in `layers.py`, they have the attribute names found in checkpoints. They have no constructors, because their parts come from
the checkpoint. Each docstring names the paper or the family of its block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusenms.sources.torch_modules import fields
from fusenms.sources.torch_modules.fields import Field
from fusenms.sources.torch_modules.layers import C3, Bottleneck, C2f, Conv, StandIn


class Block(StandIn):
    """A module whose parts come from the checkpoint."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class DWConv(Conv):
    """A depthwise `Conv`. The checkpoint's convolution has the number of groups."""


class C3k(C3):
    """A `C3` whose bottlenecks have another kernel size (YOLO11)."""


class C3k2(C2f):
    """A `C2f` of bottlenecks, `C3k` or bottlenecks with attention (YOLO11, YOLO26)."""


class RepConv(Block):
    """Sum of a 3 x 3 and a 1 x 1 convolution and, if present, the normalized input (RepVGG, 2021).

    After training, the checkpoint can have one fused convolution instead.
    """

    parts: ClassVar[frozenset[str]] = frozenset({"conv", "conv1", "conv2", "bn", "act"})

    def forward(self, x: Tensor) -> Tensor:
        if "conv" in self._modules:
            return self.act(self.conv(x))
        y = self.conv1(x) + self.conv2(x)
        bn = self._modules.get("bn")
        return self.act(y if bn is None else y + bn(x))


class RepBottleneck(Bottleneck):
    """A bottleneck whose first convolution is a `RepConv` (YOLOv9)."""


class RepCSP(C3):
    """A `C3` of `RepBottleneck` (YOLOv9)."""


class RepNCSPELAN4(Block):
    """Concatenates the outputs of all stages (ELAN of YOLOv7 with the stages of YOLOv9)."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1", "cv2", "cv3", "cv4"})

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for stage in (self.cv2, self.cv3):
            parts.append(stage(parts[-1]))
        return self.cv4(torch.cat(parts, 1))


class ELAN1(RepNCSPELAN4):
    """A `RepNCSPELAN4` with plain convolutions as stages (YOLOv9)."""


class SPPELAN(Block):
    """Spatial pyramid pooling that concatenates all levels (YOLOv9)."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1", "cv2", "cv3", "cv4", "cv5"})

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for pool in (self.cv2, self.cv3, self.cv4):
            parts.append(pool(parts[-1]))
        return self.cv5(torch.cat(parts, 1))


class AConv(Block):
    """Downsampling by 2: average pooling, then a convolution with stride 2 (YOLOv9)."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1"})

    def forward(self, x: Tensor) -> Tensor:
        return self.cv1(functional.avg_pool2d(x, 2, 1, 0))


class ADown(Block):
    """Downsampling by 2: one half of the channels as in `AConv`, the other half by max-pooling (YOLOv9)."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1", "cv2"})

    def forward(self, x: Tensor) -> Tensor:
        left, right = functional.avg_pool2d(x, 2, 1, 0).chunk(2, 1)
        return torch.cat((self.cv1(left), self.cv2(functional.max_pool2d(right, 3, 2, 1))), 1)


class CBLinear(Block):
    """One convolution whose output is split into several tensors by channels (YOLOv9-E)."""

    parts: ClassVar[frozenset[str]] = frozenset({"conv"})
    attributes: ClassVar[Mapping[str, Field]] = {"c2s": fields.several_channels}
    c2s: list[int]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.conv(x).split(self.c2s, 1)


class CBFuse(Block):
    """Sum of the last map and one split (`idx`) of each other map, resized to the last map (YOLOv9-E)."""

    attributes: ClassVar[Mapping[str, Field]] = {"idx": fields.indices}
    idx: list[int]

    def forward(self, maps: list[Tensor]) -> Tensor:
        *cuts, last = maps
        for cut, i in zip(cuts, self.idx, strict=True):
            last = last + functional.interpolate(cut[i], size=maps[-1].shape[2:], mode="nearest")
        return last


class Silence(Block):
    """Identity (YOLOv9-E)."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class SCDown(Block):
    """Downsampling by 2: a convolution that changes the channels, then one that halves the size (YOLOv10)."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1", "cv2"})

    def forward(self, x: Tensor) -> Tensor:
        return self.cv2(self.cv1(x))


class RepVGGDW(Block):
    """Sum of a 7 x 7 and, if present, a 3 x 3 depthwise convolution (YOLOv10)."""

    parts: ClassVar[frozenset[str]] = frozenset({"conv", "conv1", "act"})

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if "conv1" in self._modules:
            y = y + self.conv1(x)
        return self.act(y)


class CIB(Block):
    """Compact inverted block (YOLOv10)."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1"})
    attributes: ClassVar[Mapping[str, Field]] = {"add": fields.flag}
    add: bool

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x)
        return x + y if self.add else y


class C2fCIB(C2f):
    """A `C2f` of `CIB` (YOLOv10)."""


class Attention(Block):
    """Self-attention over all cells, with a convolution as positional encoding (YOLOv10)."""

    parts: ClassVar[frozenset[str]] = frozenset({"qkv", "proj", "pe"})
    attributes: ClassVar[Mapping[str, Field]] = {
        "num_heads": fields.channels, "head_dim": fields.channels, "key_dim": fields.channels, "scale": fields.real,
    }  # fmt: skip
    num_heads: int
    head_dim: int
    key_dim: int
    scale: float

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        split = self.qkv(x).flatten(2).unflatten(1, (self.num_heads, 2 * self.key_dim + self.head_dim))
        query, key, value = split.split((self.key_dim, self.key_dim, self.head_dim), 2)
        weight = (query.transpose(2, 3) @ key * self.scale).softmax(3)
        mixed = (value @ weight.transpose(2, 3)).reshape(batch, channels, height, width)
        return self.proj(mixed + self.pe(value.reshape(batch, channels, height, width)))


class PSABlock(Block):
    """Self-attention, then a feed-forward network, each with a residual connection if `add` is set (YOLO11)."""

    parts: ClassVar[frozenset[str]] = frozenset({"attn", "ffn"})
    attributes: ClassVar[Mapping[str, Field]] = {"add": fields.flag}
    add: bool

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x) if self.add else self.attn(x)
        return x + self.ffn(x) if self.add else self.ffn(x)


class PSA(Block):
    """Self-attention on half of the channels (YOLOv10)."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1", "cv2", "attn", "ffn"})

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.cv1(x).chunk(2, 1)
        right = right + self.attn(right)
        right = right + self.ffn(right)
        return self.cv2(torch.cat((left, right), 1))


class C2PSA(Block):
    """Blocks of self-attention on half of the channels (YOLO11)."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1", "cv2", "m"})

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.cv1(x).chunk(2, 1)
        return self.cv2(torch.cat((left, self.m(right)), 1))


class AAttn(Block):
    """Self-attention within each of `area` strips of the map, with a convolution as positional encoding (YOLO12)."""

    parts: ClassVar[frozenset[str]] = frozenset({"qkv", "proj", "pe"})
    attributes: ClassVar[Mapping[str, Field]] = {
        "area": fields.channels,
        "num_heads": fields.channels,
        "head_dim": fields.channels,
    }
    area: int
    num_heads: int
    head_dim: int

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        rows = self.qkv(x).flatten(2).transpose(1, 2)
        rows = rows.reshape(batch * self.area, -1, self.num_heads, 3 * self.head_dim).transpose(1, 2)
        query, key, value = rows.split(self.head_dim, 3)
        weight = (query @ key.transpose(2, 3) * self.head_dim**-0.5).softmax(3)

        def as_map(rows: Tensor) -> Tensor:
            joined = rows.transpose(1, 2).reshape(batch, -1, self.num_heads * self.head_dim)
            return joined.transpose(1, 2).reshape(batch, self.num_heads * self.head_dim, height, width)

        return self.proj(as_map(weight @ value) + self.pe(as_map(value)))


class ABlock(Block):
    """Area attention, then a feed-forward network, each with a residual connection (YOLO12)."""

    parts: ClassVar[frozenset[str]] = frozenset({"attn", "mlp"})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class A2C2f(Block):
    """Concatenates stages of area attention or `C3k`. With `gamma`, there is a scaled residual connection (YOLO12)."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1", "cv2", "m"})
    tensors: ClassVar[frozenset[str]] = frozenset({"gamma"})
    gamma: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for stage in self.m:
            parts.append(stage(parts[-1]))
        y = self.cv2(torch.cat(parts, 1))
        return y if self.gamma is None else x + self.gamma.view(1, -1, 1, 1) * y


class C2(Block):
    """A chain of bottlenecks on half of the channels (YOLOv8-P6)."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1", "cv2", "m"})

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.cv1(x).chunk(2, 1)
        return self.cv2(torch.cat((self.m(left), right), 1))


class SPP(Block):
    """Spatial pyramid pooling (YOLOv3-SPP, YOLOv5 before release 6)."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1", "cv2", "m"})

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv2(torch.cat([x, *(pool(x) for pool in self.m)], 1))


class GhostConv(Block):
    """Half of the channels from a convolution, the other half from a cheap operation on the first half (GhostNet, 2020)."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1", "cv2"})

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x)
        return torch.cat((y, self.cv2(y)), 1)


class GhostBottleneck(Block):
    """A bottleneck of `GhostConv`."""

    parts: ClassVar[frozenset[str]] = frozenset({"conv", "shortcut"})

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.shortcut(x)


class C3Ghost(C3):
    """A `C3` of `GhostBottleneck`."""


class C3x(C3):
    """A `C3` of bottlenecks with 1 x k and k x 1 kernels."""


BLOCKS: tuple[type[nn.Module], ...] = (
    DWConv, C3k, C3k2, RepConv, RepBottleneck, RepCSP, RepNCSPELAN4, ELAN1, SPPELAN, AConv, ADown, CBLinear, CBFuse, Silence, SCDown,
    RepVGGDW, CIB, C2fCIB, Attention, PSABlock, PSA, C2PSA, AAttn, ABlock, A2C2f,
    C2, SPP, GhostConv, GhostBottleneck, C3Ghost, C3x,
)  # fmt: skip
