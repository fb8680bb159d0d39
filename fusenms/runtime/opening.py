"""Opens a fused model in the runtime that runs it: ONNX Runtime, OpenVINO, ncnn, TensorRT or TensorRT-RTX."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from fusenms.artifacts.fused import FusedModel, from_metadata, load_fused
from fusenms.engines.base import Engine, load_engine
from fusenms.engines.running import ENGINES, LIBRARIES, EngineRunner, contract_outputs
from fusenms.errors import InputError, SourceError, UnsupportedByBackendError, first_line
from fusenms.fusion.backends import get_backend
from fusenms.graph.custom_ops import custom_ops as use_custom_ops
from fusenms.graph.session import OnnxRuntimeRunner, Provider
from fusenms.limits import Limits
from fusenms.onnx_reading import untrusted
from fusenms.runtime.ncnn import TAIL, NcnnRunner, load_ncnn
from fusenms.runtime.openvino import IR_METADATA, OpenVinoRunner, load_ir

AUTO, ONNXRUNTIME, OPENVINO, NCNN = "auto", "onnxruntime", "openvino", "ncnn"
ENGINE_RUNTIMES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
RUNTIMES = (AUTO, ONNXRUNTIME, OPENVINO, NCNN, *ENGINE_RUNTIMES)
DEVICES = {
    ONNXRUNTIME: r"cpu|cuda(:\d+)?",
    OPENVINO: r"cpu|gpu(\.\d+)?|npu|auto",
    NCNN: "cpu",
    **dict.fromkeys(ENGINE_RUNTIMES, "cuda|cpu"),  # an engine has no other place; cpu is the default
}
"""The devices of each runtime, as patterns."""
FOLDERS = {OPENVINO: IR_METADATA, NCNN: TAIL}
"""The file of a folder that `fusenms.deploy` wrote, by its runtime, which has the metadata and the SHA-256 of the others."""


class Runner(Protocol):
    """A model that is open in a runtime."""

    def infer(self, images: np.ndarray, more: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on images ``[B, 3, height, width]`` float32, or frames ``[B, height, width, 3]`` uint8, and optional inputs; return outputs
        by name."""

    def close(self) -> None:
        """Free the model."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How a model is opened. See the arguments of `fusenms.Detector`."""

    runtime: str = AUTO
    device: str = "cpu"
    providers: Sequence[Provider] | None = None
    session_options: Any = None
    threads: int | None = None
    custom_ops: Sequence[str | os.PathLike[str]] = ()


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model that is open, and what its metadata say.

    Attributes:
        fused: what the file says of itself. The graph of an engine is empty.
        runtime: its name.
        runner: the open model.
        batches: smallest and largest batch that it runs; None: any.
    """

    fused: FusedModel
    runtime: str
    runner: Runner
    batches: tuple[int, int] | None = None


def open_model(model: str | os.PathLike[str] | FusedModel, wanted: Wanted, limits: Limits) -> Opened:
    """Open a fused file, a folder for ncnn or OpenVINO, an engine, or a model in memory.

    Raises:
        InputError: the runtime does not run such a file, or an argument belongs to another runtime.
        SourceError: the file cannot be read, or is not a fused model.
        UnsupportedByBackendError: its backend does not run there.
        BackendUnavailableError: the runtime, a provider or a device is missing.
    """
    runtime = _runtime_for(model, wanted)
    if isinstance(model, FusedModel):
        return _open_onnx(model, "the model", runtime, wanted, limits)
    if runtime == OPENVINO and os.path.isdir(model):
        fused = load_ir(model, limits)
        runner = OpenVinoRunner(
            Path(model),
            wanted.device,
            wanted.threads,
            fused=fused,
            source=str(model),
            max_seconds=limits.max_run_seconds,
        )
        return Opened(fused=fused, runtime=runtime, runner=runner)
    if runtime == NCNN:
        fused = load_ncnn(model, limits)
        return Opened(fused=fused, runtime=runtime, runner=NcnnRunner(model, fused, wanted.threads))
    if runtime in ENGINE_RUNTIMES:
        return _open_engine(Path(model), runtime, limits)
    return _open_onnx(load_fused(model, limits=limits), str(model), runtime, wanted, limits)


def folder_runtime(folder: str | os.PathLike[str]) -> str:
    """The runtime that a folder was made for; ncnn if it has the files of none."""
    return next((name for name, file in FOLDERS.items() if os.path.isfile(os.path.join(folder, file))), NCNN)


def _runtime_for(model: Any, wanted: Wanted) -> str:
    """The runtime for a file; that which is wanted, if it runs such files."""
    if wanted.runtime not in RUNTIMES:
        raise InputError(f"runtime is {wanted.runtime!r}; expected one of {', '.join(RUNTIMES)}")
    if isinstance(model, (str, os.PathLike)) and os.path.isdir(model):
        fitting: tuple[str, ...] = (folder_runtime(model),)
    elif isinstance(model, (str, os.PathLike)) and Path(model).suffix.lower() in ENGINES:
        builder = load_engine(Path(model)).info["builder"]["name"]
        fitting = tuple(name for name, library in ENGINE_RUNTIMES.items() if library == builder)
        if not fitting:
            raise SourceError(f"{model}: was built by {builder}; expected {' or '.join(ENGINE_RUNTIMES.values())}")
    else:
        fitting = (ONNXRUNTIME, OPENVINO)
    runtime = fitting[0] if wanted.runtime == AUTO else wanted.runtime
    if runtime not in fitting:
        raise InputError(
            f"{'the model' if isinstance(model, FusedModel) else model}: runs in {' or '.join(fitting)}, not in {runtime}; leave runtime "
            "out, or make a file for it"
        )
    if not isinstance(wanted.device, str) or not re.fullmatch(DEVICES[runtime], wanted.device):
        choices = DEVICES[runtime].replace(r"(:\d+)?", ", cuda:N").replace(r"(\.\d+)?", ", gpu.N").replace("|", ", ")
        raise InputError(f"device is {wanted.device!r}; expected one that {runtime} has: {choices}")
    only = {
        "providers": wanted.providers,
        "session_options": wanted.session_options,
        "custom_ops": wanted.custom_ops or None,
    }
    if runtime != ONNXRUNTIME and (foreign := [name for name, value in only.items() if value is not None]):
        raise InputError(
            f"found {' and '.join(foreign)}, but {runtime} has none; leave them out, or use runtime='onnxruntime'"
        )
    if wanted.providers is not None and wanted.device != "cpu":
        raise InputError(f"found providers and device {wanted.device!r}; expected one of them")
    return runtime


def _open_onnx(fused: FusedModel, source: str, runtime: str, wanted: Wanted, limits: Limits) -> Opened:
    plugins = {node.domain for node in fused.model.graph.node} - {"", "ai.onnx"}
    if plugins and not get_backend(fused.backend).runs_on_onnxruntime:
        raise UnsupportedByBackendError(
            f"{source}: made for backend {fused.backend}, which does not run in ONNX Runtime; "
            "fuse the weights again with backend='ort', or build a TensorRT engine of this file (trtexec --onnx=FILE)"
        )
    seconds = limits.max_run_seconds
    if runtime == OPENVINO:
        runner: Runner = OpenVinoRunner(fused.model, wanted.device, wanted.threads, source=source, max_seconds=seconds)
        return Opened(fused=fused, runtime=runtime, runner=runner)
    with use_custom_ops(*wanted.custom_ops):
        runner = OnnxRuntimeRunner(
            fused.model,
            _providers(wanted),
            wanted.threads,
            source=source,
            max_seconds=seconds,
            spinning=True,
            options=wanted.session_options,
        )
    return Opened(fused=fused, runtime=runtime, runner=runner)


def _providers(wanted: Wanted) -> Sequence[Provider]:
    if wanted.providers is not None:
        return tuple(wanted.providers)
    if wanted.device == "cpu":
        return ("CPUExecutionProvider",)
    number = wanted.device.partition(":")[2] or "0"
    return (("CUDAExecutionProvider", {"device_id": number}), "CPUExecutionProvider")


@dataclass(frozen=True, kw_only=True)
class EngineFile:
    """An engine and what its sidecar says: the model it was built from, at the size it is made for, and the batches that it runs."""

    engine: Engine
    fused: FusedModel
    batches: tuple[int, int]


def read_engine(path: Path, limits: Limits) -> EngineFile:
    """Read an engine with its sidecar. Its model has an empty graph.

    Raises:
        SourceError: one of them is missing, damaged, or not of the other.
    """
    engine = load_engine(path)
    with untrusted(path, "reading its metadata"):
        try:
            fused = from_metadata(onnx.ModelProto(), engine.info["metadata"], limits)
            shapes = engine.info["inputs"][fused.image.tensor]
            least, most = int(shapes["min"][0]), int(shapes["max"][0])
            height, width = map(int, shapes["opt"][2:])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, SourceError) as error:
            raise SourceError(
                f"{path}: its sidecar is damaged ({first_line(error)}); build the engine again"
            ) from error
    image = replace(
        fused.image, height=height, width=width, dynamic_size=False
    )  # of the profile, the size it is made for
    config = replace(fused.config, runtime_thresholds=False)  # an engine has them as constants
    return EngineFile(engine=engine, fused=replace(fused, image=image, config=config), batches=(least, most))


def _open_engine(path: Path, runtime: str, limits: Limits) -> Opened:
    file = read_engine(path, limits)
    runner = _OneByOne(EngineRunner(file.engine, LIBRARIES[ENGINE_RUNTIMES[runtime]]()), file.fused)
    return Opened(fused=file.fused, runtime=runtime, runner=runner, batches=file.batches)


class _OneByOne:
    """An engine, whose buffers serve one run at a time."""

    def __init__(self, runner: EngineRunner, fused: FusedModel) -> None:
        self._runner, self._fused, self._running = runner, fused, threading.Lock()

    def infer(self, images: np.ndarray, more: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert not more  # an engine has its thresholds as constants
        with self._running:
            return contract_outputs(self._runner.infer(images), self._fused)

    def close(self) -> None:
        with self._running:
            self._runner.close()
