"""`fuse`: the whole line in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fusenms.artifacts.fused import FusedModel
from fusenms.artifacts.preprocessing import Pixels
from fusenms.artifacts.raw import RawModel
from fusenms.config import PostprocessConfig
from fusenms.errors import ConfigError, VerificationError
from fusenms.fusion.backends import get_backend
from fusenms.fusion.tail import fuse_head
from fusenms.heads import recognize
from fusenms.layout import Layout
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.sources import load
from fusenms.transforms.dynamic_batch import open_batch
from fusenms.transforms.half_precision import PRECISIONS, to_half
from fusenms.verification.agreement import drift
from fusenms.verification.checks import pictures_for, verify


def fuse(
    weights: Any,
    *,
    backend: str = "ort",
    size: int | tuple[int, int] | None = None,
    dynamic_size: bool = False,
    opset: int | None = None,
    make_dynamic: bool = False,
    one_to_many: bool = False,
    pixels: str | Pixels | None = None,
    stretch: bool | None = None,
    example: Any = None,
    layout: Layout | None = None,
    class_names: Sequence[str] = (),
    family: str | None = None,
    images: np.ndarray | None = None,
    unverified: bool = False,
    precision: str = "fp32",
    limits: Limits = DEFAULT_LIMITS,
    isolate: bool = False,
    **config: Any,
) -> FusedModel:
    """Load weights, recognize the head, fuse the post-processing and prove the result.

    Args:
        weights: a checkpoint (`.pt`), a raw `.onnx`, a directory of a Hugging Face detector, an `nn.Module`, or a loaded `RawModel`.
        backend: ``ort``, ``trt``, ``portable`` or ``plugin``.
        size, dynamic_size, opset, make_dynamic, one_to_many, pixels, stretch, example, layout: as `fusenms.load` takes them.
        isolate: the same.
        class_names: of an `nn.Module`, its classes.
        family: name of the detector family, where the file leaves more than one open.
        images: pictures to verify on, ``[n, 3, height, width]`` float32 (RGB, 0 to 1).
        unverified: leave the verification out; the result can then be saved with ``unverified=True`` only.
        precision: ``fp32``, or ``fp16`` for a network in half precision; a note then says what that changes on the pictures.
        limits: bounds of files of unknown origin, and of each run of their graphs; a loaded `RawModel` has its own.
        **config: fields of `PostprocessConfig`.

    Returns:
        the fused model with its report.

    Raises:
        FusenmsError: as each stage says; VerificationError where the result differs from the reference.
    """
    settings = PostprocessConfig.from_dict(config)
    get_backend(backend, settings)
    loading = {
        "size": size, "dynamic_size": dynamic_size, "opset": opset, "make_dynamic": make_dynamic, "one_to_many": one_to_many,
        "pixels": pixels, "stretch": stretch, "example": example, "layout": layout, "names": class_names,
    }  # fmt: skip
    if isinstance(weights, RawModel):
        if given := [
            name for name, value in loading.items() if value is not None and value is not False and value != ()
        ]:
            raise ConfigError(
                f"{', '.join(given)}: for loading, but these weights are loaded already: give them to fusenms.load"
            )
        raw = weights
    else:
        raw = load(weights, limits=limits, isolate=isolate, **loading)
    found = recognize(raw, family)
    raw = open_batch(raw, found)
    fused = fuse_head(raw, found, settings, backend)
    if precision != "fp32":
        full, fused = fused, fuse_head(in_precision(raw, found, precision), found, settings, backend)
        fused = replace(fused, notes=(*fused.notes, drift(full, fused, pictures_for(fused, images)).summary))
    return fused if unverified else prove(fused, verify(fused, images=images))


def in_precision(raw: RawModel, layout: Layout, precision: str) -> RawModel:
    """The network in that precision.

    Raises:
        ConfigError: there is none of that name, or the network cannot be had in it.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    return raw if precision == raw.precision else to_half(raw, layout)


def prove(fused: FusedModel, report: Any) -> FusedModel:
    """The model with its report.

    Raises:
        VerificationError: the report has a difference.
    """
    if not report:
        raise VerificationError(f"the fused model could not be proven equal to the reference\n{report}", report)
    return fused.proven(report)
