"""`fuse`: the whole line in one call."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from fusenms.artifacts import FusedModel, RawModel
from fusenms.backends import get_backend
from fusenms.batch import open_batch
from fusenms.config import PostprocessConfig
from fusenms.errors import ConfigError, VerificationError
from fusenms.fusion import fuse_head
from fusenms.heads import recognize
from fusenms.sources import load
from fusenms.verification import verify


def fuse(
    weights: str | os.PathLike[str] | RawModel,
    *,
    backend: str = "ort",
    size: int | tuple[int, int] | None = None,
    dynamic_size: bool = False,
    opset: int | None = None,
    make_dynamic: bool = False,
    one_to_many: bool = False,
    family: str | None = None,
    images: np.ndarray | None = None,
    unverified: bool = False,
    **config: Any,
) -> FusedModel:
    """Load weights, recognize the head, fuse the post-processing and prove the result.

    Args:
        weights: a checkpoint (`.pt`), a raw `.onnx`, or a loaded `RawModel`.
        backend: ``ort``, ``trt`` or ``portable``.
        size, dynamic_size, opset, make_dynamic, one_to_many: as `fusenms.load` takes them.
        family: name of the detector family, where the file leaves more than one open.
        images: pictures to verify on, ``[n, 3, height, width]`` float32 (RGB, 0 to 1).
        unverified: leave the verification out; the result can then be saved with ``unverified=True`` only.
        **config: fields of `PostprocessConfig`.

    Returns:
        the fused model with its report.

    Raises:
        FusenmsError: as each stage says; VerificationError where the result differs from the reference.
    """
    settings = PostprocessConfig.from_dict(config)
    get_backend(backend, settings)
    if isinstance(weights, RawModel) and (
        size is not None or dynamic_size or opset is not None or make_dynamic or one_to_many
    ):
        raise ConfigError(
            "size, dynamic_size, opset, make_dynamic and one_to_many are for loading; "
            "these weights are loaded already: give them to fusenms.load"
        )
    raw = weights if isinstance(weights, RawModel) else load(
        weights, size=size, dynamic_size=dynamic_size, opset=opset, make_dynamic=make_dynamic, one_to_many=one_to_many
    )  # fmt: skip
    layout = recognize(raw, family)
    fused = fuse_head(open_batch(raw, layout), layout, settings, backend)
    return fused if unverified else prove(fused, verify(fused, images=images))


def prove(fused: FusedModel, report: Any) -> FusedModel:
    """The model with its report.

    Raises:
        VerificationError: the report has a difference.
    """
    if not report:
        raise VerificationError(f"the fused model could not be proven equal to the reference\n{report}", report)
    return fused.proven(report)
