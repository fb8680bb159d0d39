"""Events that `fusenms.fuse` reports, one for each step. Every event except `Progress` has a one-line ``summary``, which is also logged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from fusenms.artifacts.fused import FusedModel
from fusenms.artifacts.raw import RawModel
from fusenms.artifacts.report import Report
from fusenms.layout import Layout
from fusenms.quantization import Quantized
from fusenms.verification.agreement import Agreement


@dataclass(frozen=True, kw_only=True)
class Recognized:
    """The weights are loaded, the head is recognized, and the batch is dynamic.

    ``meaning`` says what the network shows of the layout, and what is assumed; these lines also end the notes of ``raw``.
    """

    raw: RawModel
    layout: Layout
    meaning: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        layout = self.layout
        return f"{self.raw.source} · {layout.family} {layout.task} · {layout.num_classes} classes"


@dataclass(frozen=True, kw_only=True)
class Fused:
    """The post-processing is in the graph."""

    raw: RawModel
    model: FusedModel

    @property
    def summary(self) -> str:
        outputs = ", ".join(name for name, _ in self.model.layout.outputs(self.model.config))
        return f"{self.model.layout.decode_stage} decode · {self.model.suppressed_by} · {outputs}"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The half-precision model was compared with the float32 model. ``own_images``: on images that the caller gave."""

    agreement: Agreement
    own_images: bool

    @property
    def summary(self) -> str:
        return self.agreement.summary


@dataclass(frozen=True, kw_only=True)
class QuantizedNetwork:
    """The network is in int8, and its drift is measured."""

    quantized: Quantized

    @property
    def summary(self) -> str:
        return self.quantized.summary


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Part of a step is done: ``done`` of ``total`` units of ``what``."""

    what: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The model was compared with the reference. If the report has mismatches, a `VerificationError` follows."""

    report: Report

    @property
    def summary(self) -> str:
        return self.report.summary


Event: TypeAlias = Recognized | QuantizedNetwork | Fused | Compared | Progress | Verified
OnEvent: TypeAlias = Callable[[Event], None]
