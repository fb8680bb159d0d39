"""Runs a built engine on a GPU with cuda-python, and compares it with the ONNX file from which it was built."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusenms.artifacts import one_tensor
from fusenms.artifacts.fused import FusedModel, load_fused
from fusenms.engines.base import Engine, load_engine
from fusenms.engines.nvidia import Library, make_logger
from fusenms.engines.rtx import load_rtx
from fusenms.engines.tensorrt import load_tensorrt
from fusenms.errors import BackendUnavailableError, SourceError
from fusenms.heads.probe import probe_image
from fusenms.verification.agreement import Agreement, agreement_of

ENGINES = (".engine", ".plan", ".rtx", ".trt")
DTYPES = {
    "FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32, "INT8": np.int8, "UINT8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
"""NumPy's types by TensorRT's names. `nptype` of TensorRT 8.5 fails with NumPy 1.24 to 1.26."""
LIBRARIES = {"TensorRT": load_tensorrt, "TensorRT-RTX": load_rtx}


class EngineRunner:
    """An engine that is open on the GPU. It is not thread-safe."""

    def __init__(self, engine: Engine, library: Library) -> None:
        """Open the engine.

        Raises:
            BackendUnavailableError: there is no GPU, cuda-python is not installed, or the engine is for another version or GPU.
        """
        self._trt, self._cuda = library.module, _cuda()
        self._check("cudaSetDevice", 0)
        logger = make_logger(self._trt)
        self._runtime = self._trt.Runtime(logger)
        self._engine = self._runtime.deserialize_cuda_engine(engine.data)
        if self._engine is None:
            raise BackendUnavailableError(f"{library.name} cannot open the engine on this machine: {logger.text}")
        self._context = self._engine.create_execution_context()
        self._stream = self._check("cudaStreamCreate")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._image = next(name for name in names if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT)
        self._buffers: dict[str, tuple[int, int]] = {}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on inputs by name, in the engine's types, and return the outputs by name.

        Raises:
            SourceError: the engine does not run at these shapes.
            BackendUnavailableError: a call to CUDA failed.
        """
        cuda, engine, context = self._cuda, self._engine, self._context
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        arrays = {name: np.ascontiguousarray(inputs[name]) for name in names if name in inputs}
        for name, array in arrays.items():
            if not context.set_input_shape(name, array.shape):
                raise SourceError(
                    f"the engine does not run at {list(array.shape)} of {name}; expected a shape within its profile"
                )
        for name in names:
            if name not in inputs:
                dtype = DTYPES[engine.get_tensor_dtype(name).name]
                arrays[name] = np.empty(tuple(context.get_tensor_shape(name)), dtype)
            array = arrays[name]
            address = self._buffer(name, max(array.nbytes, 1))
            context.set_tensor_address(name, address)
            if name in inputs:
                kind = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
                self._check("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)
        if not context.execute_async_v3(self._stream):
            raise SourceError("the engine does not run on these inputs; expected shapes within its profile")
        outputs = {name: array for name, array in arrays.items() if name not in inputs}
        for name, array in outputs.items():
            kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
            self._check("cudaMemcpyAsync", array.ctypes.data, self._buffers[name][0], array.nbytes, kind, self._stream)
        self._check("cudaStreamSynchronize", self._stream)
        return outputs

    def infer(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Run images ``[B, 3, height, width]`` float32 and return the outputs by name. Errors are those of `run`."""
        return self.run({self._image: np.asarray(images, np.float32)})

    def close(self) -> None:
        for address, _ in self._buffers.values():
            self._check("cudaFree", address)
        self._buffers.clear()

    def _buffer(self, name: str, size: int) -> int:
        """The address of a buffer on the GPU with at least ``size`` bytes. Buffers are reused between runs."""
        address, there = self._buffers.get(name, (0, 0))
        if there < size:
            if there:
                self._check("cudaFree", address)
            address = self._check("cudaMalloc", size)
            self._buffers[name] = (address, size)
        return address

    def _check(self, function: str, *args: Any) -> Any:
        """Call a function of CUDA and return its result without the error code.

        Raises:
            BackendUnavailableError: the call failed.
        """
        error, *result = getattr(self._cuda, function)(*args)
        if int(error) != 0:
            raise BackendUnavailableError(f"CUDA: {function} failed ({error}); expected an NVIDIA GPU with its driver")
        return result[0] if result else None


def contract_outputs(outputs: dict[str, np.ndarray], fused: FusedModel) -> dict[str, np.ndarray]:
    """The outputs of the contract, of those of an engine, which is built from the file and may have all rows in one tensor."""
    if not one_tensor.has_one_tensor(fused.config):
        return outputs
    return one_tensor.taken_apart(outputs, fused.layout, fused.config)


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
    """Compare an engine with its ONNX file in ONNX Runtime, at the minimum, optimum and maximum batch size and at an odd one.

    Args:
        path: the engine, with its sidecar.
        source: the fused ONNX file from which it was built; default: the file that the sidecar names, in the folder of the engine.
        images: ``[n, 3, height, width]`` float32, RGB, 0 to 1; default: one synthetic image.

    Returns:
        each batch size with its agreement.

    Raises:
        SourceError: engine, sidecar or ONNX file are missing, or do not match.
        BackendUnavailableError: the engine cannot run on this machine.
    """
    engine = load_engine(path)
    info = engine.info
    if info["builder"]["name"] not in LIBRARIES:
        raise SourceError(f"{path}: was built by {info['builder']['name']}; expected {' or '.join(LIBRARIES)}")
    onnx_file = source or path.with_name(info["source"]["file"])
    if not onnx_file.is_file() or hashlib.sha256(onnx_file.read_bytes()).hexdigest() != info["source"]["sha256"]:
        raise SourceError(
            f"{path}: was built from {info['source']['file']}, but {onnx_file} is missing or was changed; build the engine again"
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
        found.append((batch, agreement_of(fused, filled, fused, contract_outputs(runner.infer(filled), fused))))
    runner.close()
    return found
