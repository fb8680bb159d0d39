"""int8 from end to end: split the images, calibrate, quantize, keep the dearest convolutions in float32, and measure the drift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fusenms.artifacts.raw import RawModel
from fusenms.artifacts.raw_head import RawHead
from fusenms.artifacts.report import counted
from fusenms.config import PostprocessConfig
from fusenms.errors import ConfigError, DriftError, InputError
from fusenms.fusion.tail import fuse_head
from fusenms.runtime.image_set import ImageSet
from fusenms.transforms.int8 import (
    SCHEMES,
    Calibrated,
    Cost,
    Places,
    Scheme,
    calibrate,
    network_of,
    places,
    rank,
    to_int8,
)
from fusenms.verification.agreement import Agreement, agreement

LEAST_IMAGES, ADVISED_IMAGES = 16, 100
HELD_OUT = 4
"""Every fourth image is not calibrated on, if enough are left; the drift is measured on these."""
MOST_COMPARED = 64
"""Images that the drift is measured on, at most."""
LOOKED_AT, RANKED_ON = 16, 4
"""Calibrated images on which it is decided how much stays float32, and on which convolutions are ranked."""
AIM = 0.05
"""With ``auto``, convolutions go back to float32 until the drift on calibrated images is at most this."""
MOST_KEPT = 4
"""With ``auto``, at most every fourth convolution goes back."""
AUTO = "auto"

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Int8Settings:
    """How a network is quantized.

    Attributes:
        keep_float: convolutions that stay float32 beside the first and the last: a number of the dearest, or ``auto``.
        max_drift: largest share of the detections that may differ from those of float32.

    Raises:
        ConfigError: a value is out of its range.
    """

    keep_float: int | str = AUTO
    max_drift: float = 0.1

    def __post_init__(self) -> None:
        whole = isinstance(self.keep_float, int) and not isinstance(self.keep_float, bool) and self.keep_float >= 0
        if self.keep_float != AUTO and not whole:
            raise ConfigError(f"keep_float is {self.keep_float!r}; expected {AUTO!r} or a number of convolutions")
        if not isinstance(self.max_drift, (int, float)) or not 0 <= self.max_drift <= 1:
            raise ConfigError(f"max_drift is {self.max_drift!r}; expected a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A raw model in int8, and what that changed.

    Attributes:
        raw: the model. Its notes say how it was made, and how far its detections drift.
        drift: its detections beside those of float32, at the default settings of the post-processing.
        held_out: whether the drift was measured on images that were not calibrated on.
        kept: names of the convolutions that stay float32 beside the first and the last.
        costs: what each convolution costs, the dearest first; empty if that was not asked for.
    """

    raw: RawModel
    drift: Agreement
    held_out: bool
    kept: tuple[str, ...] = ()
    costs: tuple[Cost, ...] = field(default=(), repr=False)

    @property
    def summary(self) -> str:
        where = "held-out" if self.held_out else "calibrated"
        return f"drift {self.drift.drift:.1%} on {where} images · {self.drift.summary}"


def check_count(images: int) -> None:
    """Refuse to calibrate on too few images.

    Raises:
        InputError: there are fewer than `LEAST_IMAGES`.
    """
    if images < LEAST_IMAGES:
        raise InputError(
            f"found {counted(images, 'image')} to calibrate on; expected at least {LEAST_IMAGES}, better {ADVISED_IMAGES}, as the model "
            "sees them in use"
        )


def quantize(
    raw: RawModel,
    head: RawHead,
    images: ImageSet,
    *,
    backend: str,
    settings: Int8Settings,
    compared: Sequence[np.ndarray] | np.ndarray | None = None,
    progress: OnProgress = lambda *_: None,
) -> Quantized:
    """Quantize a network, and measure what that changes.

    Args:
        images: images to calibrate on. Every fourth is held out to measure the drift, if `LEAST_IMAGES` are left.
        compared: images ``[3, height, width]`` float32 to measure the drift on, instead of held-out ones.
        progress: called with what is done, how many units are done, and how many there are.

    Raises:
        InputError: too few images, or none shows an object to the float32 model.
        ConfigError: the network cannot be quantized.
        DriftError: the drift is above the limit.
    """
    check_count(len(images))
    seen, unseen = images.split(HELD_OUT)
    held_out = compared is not None or len(seen) >= LEAST_IMAGES
    if len(seen) < LEAST_IMAGES:
        seen = unseen = images
    work = _Work(raw, head, seen, SCHEMES["ort" if backend == "ort" else "tensorrt"], progress)
    kept, costs = work.choose(settings.keep_float)
    quantized, measured = work.quantized(kept), unseen[:MOST_COMPARED] if compared is None else compared
    progress("drift", 0, 1)
    drift = work.drift(quantized, measured)
    found = Quantized(raw=quantized, drift=drift, held_out=held_out, kept=kept, costs=costs)
    if not drift.before:
        raise InputError(
            f"{raw.source}: finds nothing in the {counted(drift.images, 'image')} that the drift is measured on, in float32 (score > "
            f"{work.config.score_threshold:g}); expected images of objects that it knows"
        )
    if drift.drift > settings.max_drift:
        raise DriftError(
            f"{raw.source}: int8 changes {drift.drift:.1%} of the detections ({drift.summary}); expected at most {settings.max_drift:.1%} "
            f"(max_drift). Calibrate on more images (found {len(images)}) that look as in use, keep more convolutions in float32 "
            "(keep_float), or take precision fp16",
            drift.drift,
        )
    return replace(found, raw=replace(quantized, notes=(*quantized.notes, found.summary)))


class _Work:
    """One network, calibrated once, and quantized in several ways."""

    config = PostprocessConfig()

    def __init__(self, raw: RawModel, head: RawHead, seen: ImageSet, scheme: Scheme, progress: OnProgress) -> None:
        self._raw, self._head, self._seen, self._scheme, self._progress = raw, head, seen, scheme, progress
        self._network = network_of(raw, head.layout)
        self._where: Places = places(self._network)
        if not self._where.layers:
            self._calibrated = Calibrated(None, 0)
            self.quantized(())  # raises
        self._calibrated = calibrate(
            self._network,
            (self._input(image) for image in seen),
            gates=self._where.gates,
            symmetric=scheme.signed,
            progress=lambda done: progress("calibration", done, len(seen)),
        )
        self._full = fuse_head(raw, head, self.config, "ort")

    def _input(self, image: np.ndarray) -> np.ndarray:
        """An image as the network takes it; as many copies of it as its batch, if that is fixed."""
        batch = self._head.pixels.apply(image[None]).astype(np.float32)
        return np.repeat(batch, self._raw.image.batch or 1, 0)

    def quantized(self, kept: Sequence[str]) -> RawModel:
        return to_int8(
            self._raw, self._network, self._where, self._calibrated, scheme=self._scheme, keep_float=frozenset(kept)
        )

    def drift(self, quantized: RawModel, images: Sequence[np.ndarray] | np.ndarray) -> Agreement:
        return agreement(self._full, fuse_head(quantized, self._head, self.config, "ort"), images)

    def choose(self, keep_float: int | str) -> tuple[tuple[str, ...], tuple[Cost, ...]]:
        """Names of the convolutions that stay float32, and what each costs, if that was needed.

        With ``auto``, the dearest go back a few at a time, until the drift is small or every fourth went back; the best choice counts.
        """
        if keep_float == 0:
            return (), ()
        looked_at = self._seen[:LOOKED_AT]
        best, kept = 0.0, tuple[str, ...]()
        if keep_float == AUTO and (best := self.drift(self.quantized(()), looked_at).drift) <= AIM:
            return (), ()
        costs = self._costs()
        names = [cost.layer for cost in costs]
        if isinstance(keep_float, int):
            if keep_float >= len(names):
                raise ConfigError(
                    f"keep_float is {keep_float}, but {self._raw.source} has {len(names)} convolutions to quantize; expected fewer"
                )
            return tuple(names[:keep_float]), costs
        most = len(names) // MOST_KEPT
        step = max(1, most // 4)
        for count in range(step, most + 1, step):
            self._progress("keeping convolutions in float32", count, most)
            drift = self.drift(self.quantized(names[:count]), looked_at).drift
            if drift < best:
                best, kept = drift, tuple(names[:count])
            if best <= AIM:
                break
        return kept, costs

    def _costs(self) -> tuple[Cost, ...]:
        return tuple(
            rank(
                self._raw,
                self._head.layout,
                self._network,
                self._where,
                calibrated=self._calibrated,
                scheme=self._scheme,
                images=[self._input(image) for image in self._seen[:RANKED_ON]],
                progress=lambda done, total: self._progress("ranking convolutions", done, total),
            )
        )
