"""Run a built engine on a GPU, by cuda-python alone, and compare it with the ONNX file that it was built of."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from fusenms.artifacts.fused import load_fused
from fusenms.engines.base import Engine, load_engine
from fusenms.engines.nvidia import Library, make_logger
from fusenms.engines.rtx import load_rtx
from fusenms.engines.tensorrt import load_tensorrt
from fusenms.errors import BackendUnavailableError, SourceError
from fusenms.heads.probe import probe_image
from fusenms.verification.agreement import Agreement, agreement_of

ENGINES = (".engine", ".plan", ".rtx", ".trt")
LIBRARIES = {"TensorRT": load_tensorrt, "TensorRT-RTX": load_rtx}


class EngineRunner:
    """An engine, open on the GPU. Not safe to call from several threads at once."""

    def __init__(self, engine: Engine, library: Library) -> None:
        """Open the engine.

        Raises:
            BackendUnavailableError: there is no GPU, cuda-python is not installed, or the engine is of another version or GPU.
        """
        self._trt, self._cuda = library.module, _cuda()
        self._check("cudaSetDevice", 0)
        logger = make_logger(self._trt)
        self._runtime = self._trt.Runtime(logger)
        self._engine = self._runtime.deserialize_cuda_engine(engine.data)
        if self._engine is None:
            raise BackendUnavailableError(f"{library.name} does not open the engine here: {logger.text}")
        self._context = self._engine.create_execution_context()
        self._stream = self._check("cudaStreamCreate")
        self._buffers: dict[str, tuple[int, int]] = {}

    def infer(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Images ``[B, 3, height, width]`` float32 to outputs by name."""
        cuda, engine, context = self._cuda, self._engine, self._context
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        given = [name for name in names if engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT]
        images = np.ascontiguousarray(images, np.float32)
        context.set_input_shape(given[0], images.shape)
        outputs = {}
        for name in names:
            shape = images.shape if name in given else tuple(context.get_tensor_shape(name))
            dtype = np.dtype(self._trt.nptype(engine.get_tensor_dtype(name)))
            array = images if name in given else np.empty(shape, dtype)
            address = self._buffer(name, max(array.nbytes, 1))
            context.set_tensor_address(name, address)
            if name in given:
                kind = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
                self._check("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)
            else:
                outputs[name] = array
        if not context.execute_async_v3(self._stream):
            raise SourceError("the engine does not run on these images; is their number within its profile?")
        for name, array in outputs.items():
            kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
            self._check("cudaMemcpyAsync", array.ctypes.data, self._buffers[name][0], array.nbytes, kind, self._stream)
        self._check("cudaStreamSynchronize", self._stream)
        return outputs

    def close(self) -> None:
        for address, _ in self._buffers.values():
            self._check("cudaFree", address)
        self._buffers.clear()

    def _buffer(self, name: str, size: int) -> int:
        """The address of at least so many bytes on the GPU, kept from run to run."""
        address, there = self._buffers.get(name, (0, 0))
        if there < size:
            if there:
                self._check("cudaFree", address)
            address = self._check("cudaMalloc", size)
            self._buffers[name] = (address, size)
        return address

    def _check(self, function: str, *args: Any) -> Any:
        """Call CUDA; its result without the error code."""
        error, *result = getattr(self._cuda, function)(*args)
        if int(error) != 0:
            raise BackendUnavailableError(f"CUDA: {function} fails ({error}); is there an NVIDIA GPU with its driver?")
        return result[0] if result else None


def _cuda() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError:
        try:
            from cuda import cudart as runtime  # cuda-python before 12.6
        except ImportError as error:
            raise BackendUnavailableError(
                f"cuda-python is not installed ({error}); install it with: pip install cuda-python, on a machine with an NVIDIA GPU"
            ) from error
    return runtime


def compare_engine(
    path: Path, source: Path | None = None, images: np.ndarray | None = None
) -> list[tuple[int, Agreement]]:
    """Run an engine at its least, usual, most and an odd batch, beside its ONNX file in ONNX Runtime: batch size and what differs.

    Args:
        path: an engine with its sidecar.
        source: the fused ONNX file that it was built of; default: the one that the sidecar names, beside the engine.
        images: ``[n, 3, height, width]`` float32, RGB, 0 to 1; default: a made-up one.

    Raises:
        SourceError: engine, sidecar or ONNX file are missing, or do not belong together.
        BackendUnavailableError: it cannot be run here.
    """
    engine = load_engine(path)
    info = engine.info
    if info["builder"]["name"] not in LIBRARIES:
        raise SourceError(f"{path}: was built by {info['builder']['name']}; expected {' or '.join(LIBRARIES)}")
    onnx_file = source or path.with_name(info["source"]["file"])
    if not onnx_file.is_file() or hashlib.sha256(onnx_file.read_bytes()).hexdigest() != info["source"]["sha256"]:
        raise SourceError(
            f"{path}: was built of {info['source']['file']}, which is not at {onnx_file} as it was; it is needed"
        )
    fused = load_fused(onnx_file)
    runner = EngineRunner(engine, LIBRARIES[info["builder"]["name"]]())
    height, width = info["inputs"][fused.image.tensor]["opt"][2:]
    images = probe_image(height, width) if images is None else images
    least, usual, most = (info["inputs"][fused.image.tensor][key][0] for key in ("min", "opt", "max"))
    odd = next((b for b in range(most, least - 1, -1) if b % 2 and b not in (least, usual, most)), most)
    found = []
    for batch in dict.fromkeys((least, usual, odd, most)):
        filled = images[np.arange(batch) % len(images)]
        found.append((batch, agreement_of(fused, filled, fused, runner.infer(filled))))
    runner.close()
    return found
