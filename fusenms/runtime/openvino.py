"""Runs a fused model in OpenVINO, from the same `.onnx` file."""

from __future__ import annotations

import queue
from typing import Any

import numpy as np
import onnx

from fusenms.errors import BackendUnavailableError, InputError, RunError, SourceError, first_line
from fusenms.limits import DEFAULT_LIMITS


class OpenVinoRunner:
    """A fused model, open in OpenVINO. Safe to call from several threads."""

    def __init__(
        self,
        model: onnx.ModelProto,
        device: str = "cpu",
        threads: int | None = None,
        *,
        source: str = "the model",
        max_seconds: float = DEFAULT_LIMITS.max_run_seconds,
    ) -> None:
        """Open the model. It computes in float32.

        Args:
            device: a device of OpenVINO: ``cpu``, ``gpu``, ``gpu.1``, ``npu``, ``auto``.
            threads: number of threads of one run; default: chosen by OpenVINO.
            source: name of the file, for messages.
            max_seconds: time limit of one run.

        Raises:
            BackendUnavailableError: OpenVINO is not installed, or has no such device.
            SourceError: OpenVINO refuses the model.
        """
        try:
            import openvino
        except ImportError as error:
            raise BackendUnavailableError(
                f"OpenVINO is not installed ({first_line(error)}); install it with: pip install 'fusenms[openvino]'"
            ) from error
        core, name = openvino.Core(), device.upper()
        if name.split(".")[0] not in {"AUTO", *(found.split(".")[0] for found in core.available_devices)}:
            raise BackendUnavailableError(
                f"OpenVINO has no device {device}; it has {', '.join(core.available_devices).lower()} and auto"
            )
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            self._compiled = core.compile_model(core.read_model(model.SerializeToString()), name, settings)
        except Exception as error:  # OpenVINO raises RuntimeError, protobuf a ValueError beyond 2 GB
            raise SourceError(
                f"{source}: OpenVINO refuses the model ({_last_line(error)}); it is damaged, or too new for this version"
            ) from error
        self.outputs = [entry.name for entry in model.graph.output]
        self._image, self._source, self._milliseconds = model.graph.input[0].name, source, int(1000 * max_seconds)
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on inputs by name; return outputs by name.

        Raises:
            RunError: OpenVINO fails, or does not finish within the time limit.
            InputError: the model is closed.
        """
        compiled = self._compiled
        if compiled is None:
            raise InputError(f"{self._source}: is closed; open the file again")
        try:
            request = self._idle.get_nowait()
        except queue.Empty:
            request = compiled.create_infer_request()
        late = False
        try:
            request.start_async(inputs)
            late = not request.wait_for(self._milliseconds)
            if late:
                request.cancel()
            request.wait()
        except Exception as error:  # OpenVINO raises RuntimeError for all, a cancelled run too
            if not late:
                raise RunError(f"{self._source}: does not run in OpenVINO ({_last_line(error)})") from error
        if late:
            raise RunError(
                f"{self._source}: one run took longer than {self._milliseconds / 1000:g} s and was stopped (max_run_seconds); "
                "raise that limit only for a file that you trust"
            )
        outputs = {name: np.array(request.get_tensor(name).data) for name in self.outputs}
        self._idle.put(request)
        return outputs

    def infer(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Run on images ``[B, 3, height, width]`` float32; return outputs by name. Errors are those of `run`."""
        return self.run({self._image: images})

    def close(self) -> None:
        """Free the model."""
        self._compiled = None
        while not self._idle.empty():
            self._idle.get_nowait()


def _last_line(error: Exception) -> str:
    """What an error of OpenVINO says: the lines before the last name places in its code."""
    return first_line(Exception(str(error).strip().splitlines()[-1]))
