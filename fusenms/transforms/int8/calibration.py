"""The range of each tensor of a network, measured on images by ONNX Runtime's calibrators, one image at a time."""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from fusenms.errors import RunError, first_line

METHODS = {"minmax": {}, "percentile": {"percentile": 99.99}, "entropy": {}}
"""How a range is chosen, and its settings: all values; without the 0.01 % farthest; that which loses the least information."""
METHOD = "entropy"
"""The one that was measured best (docs/how-to/quantization.md)."""
LEAST_GATE = -4.0
"""Lower end of a range whose values go through a SiLU: below it, SiLU is within 0.072 of zero, and a finer step is worth more."""


@dataclass(frozen=True)
class Calibrated:
    """Ranges of tensors by name, as ONNX Runtime's quantizer takes them, and the number of images that they come from."""

    ranges: Any
    images: int


def calibrate(
    model: onnx.ModelProto,
    images: Iterable[np.ndarray],
    *,
    gates: frozenset[str],
    symmetric: bool = False,
    method: str = METHOD,
    progress: Callable[[int], None] = lambda _: None,
) -> Calibrated:
    """Run a float32 network on images, and measure the range of every tensor that may be quantized.

    Args:
        images: inputs of the network ``[B, 3, height, width]`` float32, as it expects them; one is in memory at a time.
        gates: tensors that a SiLU is computed of.
        symmetric: make ranges symmetric around 0.
        method: one of `METHODS`.
        progress: called with the number of images done.

    Raises:
        RunError: the network does not run.
    """
    name, done = model.graph.input[0].name, 0
    with tempfile.TemporaryDirectory() as folder, quiet():
        calibrator = _calibrator(model, Path(folder), method, symmetric)
        for image in images:
            try:
                calibrator.collect_data(_One({name: image}))
            except Exception as error:  # ONNX Runtime raises its own exception types
                raise RunError(f"the network does not run on a calibration image ({first_line(error)})") from error
            done += 1
            progress(done)
        ranges = calibrator.compute_data()
    if not symmetric:
        for tensor in gates:
            if tensor in ranges.data:
                lowest, _ = ranges[tensor].range_value
                ranges[tensor].lowest = np.maximum(lowest, np.asarray(LEAST_GATE, lowest.dtype))
    return Calibrated(ranges, done)


def _calibrator(model: onnx.ModelProto, folder: Path, method: str, symmetric: bool) -> Any:
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    kinds = {
        "minmax": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
    }
    onnx.save(model, folder / "network.onnx")
    options: Mapping[str, Any] = {**METHODS[method], "symmetric": symmetric}
    return create_calibrator(
        folder / "network.onnx", None, augmented_model_path=str(folder / "observed.onnx"), calibrate_method=kinds[method],
        extra_options=dict(options),
    )  # fmt: skip


class _One:
    """A reader of one input, as the calibrators ask for it."""

    def __init__(self, inputs: Mapping[str, np.ndarray]) -> None:
        self._inputs: Mapping[str, np.ndarray] | None = inputs

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        inputs, self._inputs = self._inputs, None
        return inputs


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what ONNX Runtime's quantization prints and logs away from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
