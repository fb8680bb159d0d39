"""Stand-ins for modules that only the original repositories of YOLOv5, YOLOv7 and YOLOv9 have. Their parts come from the checkpoint."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fusenms.sources.torch_modules.blocks import Block
from fusenms.sources.torch_modules.layers import C3, AnchorFreeDetect


class MP(Block):
    """Max-pooling (YOLOv7)."""

    parts: ClassVar[frozenset[str]] = frozenset({"m"})

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)


class SP(MP):
    """Max-pooling that keeps the size (YOLOv7)."""


class ReOrg(Block):
    """Space to depth: half the size, four times the channels (YOLOv7-W6)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)], 1)


class Focus(Block):
    """Space to depth before a convolution (YOLOv5 before release 6)."""

    parts: ClassVar[frozenset[str]] = frozenset({"conv"})

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.cat([x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)], 1))


class Shortcut(Block):
    """The sum of two maps (YOLOv7)."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        return maps[0] + maps[1]


class DownC(Block):
    """Downsampling by 2: concatenates a convolution branch and a pooling branch (YOLOv7-E6)."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1", "cv2", "cv3", "mp"})

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.cv2(self.cv1(x)), self.cv3(self.mp(x))), 1)


class SPPCSPC(Block):
    """Spatial pyramid pooling in parallel with one convolution (YOLOv7)."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1", "cv2", "cv3", "cv4", "cv5", "cv6", "cv7", "m"})

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv4(self.cv3(self.cv1(x)))
        y = self.cv6(self.cv5(torch.cat([y, *(pool(y) for pool in self.m)], 1)))
        return self.cv7(torch.cat((y, self.cv2(x)), 1))


class BottleneckCSP(Block):
    """Cross-stage block with one normalization for both branches (YOLOv5 before release 4)."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1", "cv2", "cv3", "cv4", "bn", "act", "m"})

    def forward(self, x: Tensor) -> Tensor:
        return self.cv4(self.act(self.bn(torch.cat((self.cv3(self.m(self.cv1(x))), self.cv2(x)), 1))))


class RepConv(Block):
    """`fusenms.sources.torch_modules.blocks.RepConv` with the attribute names of YOLOv7."""

    parts: ClassVar[frozenset[str]] = frozenset({"rbr_dense", "rbr_1x1", "rbr_identity", "rbr_reparam", "act"})

    def forward(self, x: Tensor) -> Tensor:
        if "rbr_reparam" in self._modules:
            return self.act(self.rbr_reparam(x))
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        identity = self._modules.get("rbr_identity")
        return self.act(y if identity is None else y + identity(x))


class ImplicitA(Block):
    """A learned summand for each channel (YOLOR)."""

    tensors: ClassVar[frozenset[str]] = frozenset({"implicit"})
    implicit: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.implicit + x


class ImplicitM(Block):
    """A learned factor for each channel (YOLOR)."""

    tensors: ClassVar[frozenset[str]] = frozenset({"implicit"})
    implicit: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.implicit * x


class RepNCSP(C3):
    """A `C3` of `RepBottleneck` (YOLOv9)."""


class AuxiliaryDetect(AnchorFreeDetect):
    """Head of YOLOv9 with its auxiliary branches (`DualDDetect`, `TripleDDetect`). Only the last branch is used."""

    parts = AnchorFreeDetect.parts | {"cv4", "cv5", "cv6", "cv7", "dfl2", "dfl3"}

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        last = ("cv6", "cv7") if "cv6" in self._modules else ("cv4", "cv5")
        boxes, classes = (self._branch(getattr(self, name), levels) for name in last)
        return torch.cat(boxes, 2), torch.cat(classes, 2)

    def _branch(self, convolutions: nn.ModuleList, levels: list[Tensor]) -> list[Tensor]:
        """Run the convolutions on the last levels. Each output is ``[B, channels, cells]``."""
        own = levels[-len(convolutions) :]
        return [convolution(x).flatten(2) for convolution, x in zip(convolutions, own, strict=True)]


MODULES: tuple[type[nn.Module], ...] = (
    MP, SP, ReOrg, Focus, Shortcut, DownC, SPPCSPC, BottleneckCSP, RepConv, ImplicitA, ImplicitM, RepNCSP, AuxiliaryDetect,
)  # fmt: skip
