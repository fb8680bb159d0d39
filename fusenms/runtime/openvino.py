"""Runs a fused model in OpenVINO, from the same `.onnx` file, or from the folder that `fusenms.deploy` made of it.

Such a folder holds `IR` and `IR_WEIGHTS`, OpenVINO's own form, and `IR_METADATA`: the metadata of the fused file and the SHA-256 of both.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from fusenms.artifacts.fused import FusedModel, from_metadata
from fusenms.errors import BackendUnavailableError, InputError, RunError, SourceError, first_line
from fusenms.graph.model import optional_inputs
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.onnx_reading import untrusted
from fusenms.onnx_reading.metadata import read_json
from fusenms.safety.files import read_regular, sha256

IR, IR_WEIGHTS, IR_METADATA = "model.xml", "model.bin", "metadata.json"
_SHA256 = "sha256"


def ir_metadata(fused: FusedModel, files: Mapping[str, bytes]) -> bytes:
    """The content of `IR_METADATA`."""
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return (json.dumps({_SHA256: sums, "metadata": fused.metadata}, indent=2) + "\n").encode()


def load_ir(folder: str | os.PathLike[str], limits: Limits) -> FusedModel:
    """Read a folder that `fusenms.deploy` wrote for OpenVINO. The graph of the model is empty.

    Raises:
        SourceError: a file is missing, damaged, of another export, or exceeds a limit.
    """
    place = Path(folder)
    text = read_regular(place / IR_METADATA, limits.max_metadata_bytes)
    with untrusted(folder, "reading its metadata"):
        try:
            found = read_json(text.decode(), limits)
            fused, sums = from_metadata(onnx.ModelProto(), dict(found["metadata"]), limits), dict(found[_SHA256])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, SourceError) as error:
            raise SourceError(
                f"{folder}: its metadata is damaged ({first_line(error)}); deploy the model again"
            ) from error
    for name in (IR, IR_WEIGHTS):
        if sha256(place / name, limits.max_file_bytes) != sums.get(name):
            raise SourceError(
                f"{folder}: {name} is not the one that {IR_METADATA} was written with; deploy the model again"
            )
    return fused


class OpenVinoRunner:
    """A fused model, open in OpenVINO. Safe to call from several threads."""

    def __init__(
        self,
        model: onnx.ModelProto | Path,
        device: str = "cpu",
        threads: int | None = None,
        *,
        fused: FusedModel | None = None,
        source: str = "the model",
        max_seconds: float = DEFAULT_LIMITS.max_run_seconds,
    ) -> None:
        """Open the model. It computes in float32.

        Args:
            model: the model; or a folder that was made of it, and ``fused`` what `load_ir` gave.
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
            if isinstance(model, Path):
                assert fused is not None
                image, given = fused.image, fused.layout.runtime_inputs(fused.config)
                self.outputs = [output for output, _ in fused.layout.outputs(fused.config)]
                self._image = image.tensor if image.frames is None else image.frames.tensor
                self._defaults = {each.name: each.default for each in given}
                read = core.read_model(model / IR, model / IR_WEIGHTS)
            else:
                model, self._defaults = without_defaults(model)
                self.outputs = [entry.name for entry in model.graph.output]
                self._image = model.graph.input[0].name
                read = core.read_model(model.SerializeToString())
            self._compiled = core.compile_model(read, name, settings)
        except Exception as error:  # OpenVINO raises RuntimeError, protobuf a ValueError beyond 2 GB
            raise SourceError(
                f"{source}: OpenVINO refuses the model ({_last_line(error)}); it is damaged, or too new for this version"
            ) from error
        self._source, self._milliseconds = source, int(1000 * max_seconds)
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

    def infer(self, images: np.ndarray, more: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Run on images ``[B, 3, height, width]`` float32 and optional inputs; return outputs by name. Errors are those of `run`."""
        return self.run({self._image: images, **self._defaults, **(more or {})})

    def close(self) -> None:
        """Free the model."""
        self._compiled = None
        while not self._idle.empty():
            self._idle.get_nowait()


def without_defaults(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """The model with its optional inputs as plain ones, and their defaults. OpenVINO takes an input with a default for a constant."""
    names = {entry.name for entry in optional_inputs(model)}
    defaults = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer if item.name in names}
    if not defaults:
        return model, {}
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    kept = [item for item in plain.graph.initializer if item.name not in defaults]
    del plain.graph.initializer[:]
    plain.graph.initializer.extend(kept)
    return plain, defaults


def _last_line(error: Exception) -> str:
    """What an error of OpenVINO says: the lines before the last name places in its code."""
    return first_line(Exception(str(error).strip().splitlines()[-1]))
