"""Stand-ins for the heads of the other tasks: instance masks, keypoints, oriented boxes.

Each is a detection head with one more branch. The taps of this branch come after those of boxes and classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusenms.sources.torch_modules import fields
from fusenms.sources.torch_modules.blocks import Block
from fusenms.sources.torch_modules.fields import Field
from fusenms.sources.torch_modules.layers import AnchorDetect, AnchorFreeDetect


class Proto(Block):
    """Prototypes of masks ``[B, M, 2 h, 2 w]``, from the finest level (YOLACT, 2019)."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1", "upsample", "cv2", "cv3"})

    def forward(self, levels: list[Tensor]) -> Tensor:
        return self.cv3(self.cv2(self.upsample(self.cv1(self._image(levels)))))

    def _image(self, levels: list[Tensor]) -> Tensor:
        return levels[0]


class Proto26(Proto):
    """Prototypes from all levels. The coarser levels are upsampled and added to the finest one (YOLO26)."""

    parts = Proto.parts | {"feat_refine", "feat_fuse", "semseg"}

    def _image(self, levels: list[Tensor]) -> Tensor:
        finest, *coarser = levels
        for i, (refine, level) in enumerate(zip(self.feat_refine, coarser, strict=True)):
            finest = finest + functional.interpolate(refine(level), scale_factor=2 ** (i + 1), mode="nearest")
        return self.feat_fuse(finest)


class RealNVP(Block):
    """The normalizing flow for the training of keypoints in YOLO26. It is not run."""

    parts: ClassVar[frozenset[str]] = frozenset({"s", "t"})
    tensors: ClassVar[frozenset[str]] = frozenset({"loc", "cov", "mask"})


class ExtraBranch(AnchorFreeDetect):
    """A detection head with one more branch, `cv4`, which has convolutions for each level."""

    parts = AnchorFreeDetect.parts | {"cv4", "one2one_cv4"}
    cv4: nn.ModuleList
    one2one_cv4: nn.ModuleList

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, ...]:
        """Return box distances and class logits as in `AnchorFreeDetect`, and the channels of the branch ``[B, channels, N]``."""
        return (*super().forward(levels), torch.cat([self.extra(i, x).flatten(2) for i, x in enumerate(levels)], 2))

    def extra(self, level: int, x: Tensor) -> Tensor:
        """The channels of the branch ``[B, channels, height, width]`` at one level."""
        return self.branch("cv4")[level](x)

    def branch(self, name: str) -> Any:
        """The convolutions with this name: the one-to-one ones if `one_to_one` is set, else the one-to-many ones."""
        return getattr(self, f"one2one_{name}" if self.one_to_one else name)


class AnchorFreeSegment(ExtraBranch):
    """Masks of YOLOv8, YOLOv9, YOLO11 and YOLO26. The last two taps are coefficients ``[B, M, N]`` and prototypes ``[B, M, h, w]``."""

    parts = ExtraBranch.parts | {"proto"}
    attributes: ClassVar[Mapping[str, Field]] = {**ExtraBranch.attributes, "nm": fields.channels}
    nm: int
    proto: nn.Module

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, ...]:
        return (*super().forward(levels), self.proto(levels))


class AnchorFreePose(ExtraBranch):
    """Keypoints of YOLOv8 and YOLO11: position = (2 t + cell) * stride, in pixels."""

    attributes: ClassVar[Mapping[str, Field]] = {**ExtraBranch.attributes, "kpt_shape": fields.several_channels}
    kpt_shape: list[int]
    factor, point = 2.0, 0.0


class AnchorFreePose26(AnchorFreePose):
    """Keypoints of YOLO26, relative to the center of the cell. The parts for sigma and the flow are used in training only."""

    parts = AnchorFreePose.parts | {
        *("cv4_kpts", "cv4_sigma", "one2one_cv4_kpts", "one2one_cv4_sigma", "flow_model"),
    }
    factor, point = 1.0, 0.5

    def extra(self, level: int, x: Tensor) -> Tensor:
        return self.branch("cv4_kpts")[level](super().extra(level, x))


class AnchorFreeOriented(ExtraBranch):
    """Angles of oriented boxes in YOLOv8 and YOLO11, before the sigmoid."""

    sigmoid = True


class AnchorFreeOriented26(AnchorFreeOriented):
    """Angles of oriented boxes in YOLO26, in radians."""

    sigmoid = False


class AnchorSegment(AnchorDetect):
    """Masks of YOLOv5. The last channels of each anchor are the coefficients. Prototypes are ``[B, M, h, w]``."""

    parts = AnchorDetect.parts | {"proto"}
    attributes: ClassVar[Mapping[str, Field]] = {**AnchorDetect.attributes, "nm": fields.channels}
    nm: int
    proto: nn.Module

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, ...]:
        """Return boxes, objectness and classes as in `AnchorDetect`, coefficients ``[B, M, N]`` and prototypes."""
        (rows,) = super().forward(levels)
        return *rows.split((rows.shape[1] - self.nm, self.nm), 1), self.proto(levels)


HEADS = {
    "Segment": AnchorFreeSegment,
    "Segment26": AnchorFreeSegment,
    "Pose": AnchorFreePose,
    "Pose26": AnchorFreePose26,
    "OBB": AnchorFreeOriented,
    "OBB26": AnchorFreeOriented26,
}
"""Heads by their names in checkpoints of Ultralytics."""
BLOCKS: tuple[type[nn.Module], ...] = (Proto, Proto26, RealNVP)
