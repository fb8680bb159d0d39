"""Verifies fused models in other runtimes: `fusenms.verify` with something else in the place of ONNX Runtime on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import onnx

from fusenms import reference
from fusenms.artifacts.fused import FusedModel
from fusenms.artifacts.report import Report
from fusenms.fusion.backends import BACKENDS
from fusenms.verification import checks as verification

BATCHES = (1, 2, 7, 8)
"""Minimum, two between of which one is odd, maximum."""
TIED = 1e-300
"""Marks keys that are exact, of which equal ones may come in any order."""


@contextlib.contextmanager
def verified_on(backend: str, opened: Callable[[onnx.ModelProto], Any]) -> Iterator[None]:
    """The verification runs files of this backend as they are, by ``opened``."""
    as_it_is = replace(BACKENDS[backend], to_standard=lambda model, _: model)
    with (
        mock.patch.dict(BACKENDS, {backend: as_it_is}),
        mock.patch.object(verification, "OnnxRuntimeRunner", lambda model, **_: opened(model)),
    ):
        yield


def verify_on(fused: FusedModel, opened: Callable[[onnx.ModelProto], Any], images: np.ndarray | None = None) -> Report:
    """`fusenms.verify` with all of the model's runs by ``opened``."""
    with verified_on(fused.backend, opened):
        return verification.verify(fused, images=images, batches=BATCHES if fused.image.batch is None else None)


@contextlib.contextmanager
def ties_in_any_order() -> Iterator[None]:
    """The reference follows the observed order of candidates with the very same key, and nothing else is looser.

    ONNX Runtime's TopK on CUDA does not put the lower index first. A key that is exactly the threshold, which only a logit of 0 can be, may
    then count or not.
    """
    decoded, rounding = reference.candidates, reference._key_rounding

    def tied(*arguments: Any) -> reference.Candidates:
        found = decoded(*arguments)
        return found if found.rounding else replace(found, rounding=TIED)

    def exact(key: float, relative: float) -> float:
        return 0.0 if relative == TIED else rounding(key, relative)

    with mock.patch.object(reference, "candidates", tied), mock.patch.object(reference, "_key_rounding", exact):
        yield
