"""Runs fused models on a GPU where the verification runs ONNX Runtime on the CPU, so that the same proof is about an engine.

    python tests/gpu/on_engines.py FUSED.onnx… [--on tensorrt|tensorrt_rtx|cuda] [--whole]

As a program it needs fusenms, ONNX Runtime and the library, not PyTorch or pytest: an old TensorRT has an old Python. With ``--whole`` an
engine is built as `fusenms engine` builds it, and compared with its file in ONNX Runtime on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from fusenms import load_fused
from fusenms.engines import nvidia
from fusenms.engines.base import EngineSettings
from fusenms.engines.nvidia import Library, build
from fusenms.engines.rtx import load_rtx
from fusenms.engines.running import DTYPES, EngineRunner, compare_engine
from fusenms.engines.tensorrt import load_tensorrt
from fusenms.graph.session import OnnxRuntimeRunner

sys.path.append(str(Path(__file__).resolve().parents[1]))

from other_runtimes import BATCHES, verify_on


class OnEngine:
    """Runs a model as an engine of TensorRT or TensorRT-RTX, with the interface of `OnnxRuntimeRunner`."""

    plugin_library: Path | None = None

    def __init__(self, model: onnx.ModelProto, library: Library) -> None:
        self.inputs = [entry.name for entry in model.graph.input]
        self.outputs = [entry.name for entry in model.graph.output]
        settings = EngineSettings(batch=(BATCHES[0], BATCHES[1], BATCHES[-1]), plugin_library=self.plugin_library)
        if library.title == "TensorRT-RTX":
            settings = replace(settings, compute_capabilities=("current",))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx.save(model, path)
            self._runner = EngineRunner(build(library, str(path), settings), library)

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self._runner.run(inputs)
        return {name: found[name] for name in self.outputs}

    def close(self) -> None:
        self._runner.close()


def on_library(library: Library) -> Callable[[onnx.ModelProto], Any]:
    """Open models as engines of a library."""
    return lambda model: OnEngine(model, library)


def on_cuda(model: onnx.ModelProto) -> Any:
    """Open a model in ONNX Runtime on CUDA."""
    return OnnxRuntimeRunner(model, ("CUDAExecutionProvider", "CPUExecutionProvider"))


def replayed(runner: EngineRunner, images: np.ndarray) -> dict[str, np.ndarray]:
    """Run images by a CUDA graph, captured while the engine ran on other images (all zero)."""
    runner.infer(np.zeros_like(images))  # sizes, buffers, and kernels that are made for the shapes
    cuda, stream = runner._cuda, runner._stream
    mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    runner._check("cudaStreamBeginCapture", stream, mode)
    assert runner._context.execute_async_v3(stream), "the engine does not run while a graph is captured"
    graph = runner._check("cudaStreamEndCapture", stream)
    made = runner._check("cudaGraphInstantiate", graph, 0)
    address, _ = runner._buffers[runner._image]
    images = np.ascontiguousarray(images, np.float32)
    kinds = cuda.cudaMemcpyKind
    runner._check("cudaMemcpy", address, images.ctypes.data, images.nbytes, kinds.cudaMemcpyHostToDevice)
    runner._check("cudaGraphLaunch", made, stream)
    runner._check("cudaStreamSynchronize", stream)
    outputs = {}
    for name in (n for n in runner._buffers if n != runner._image):
        dtype = DTYPES[runner._engine.get_tensor_dtype(name).name]
        array = np.empty(tuple(runner._context.get_tensor_shape(name)), dtype)
        runner._check(
            "cudaMemcpy", array.ctypes.data, runner._buffers[name][0], array.nbytes, kinds.cudaMemcpyDeviceToHost
        )
        outputs[name] = array
    return outputs


def compared(path: Path, library: Library, images: np.ndarray | None) -> tuple[str, bool]:
    """Build the engine of a file and compare the two at each batch size; what was found, and whether it is good."""
    settings = EngineSettings(batch=(BATCHES[0], BATCHES[1], BATCHES[-1]), plugin_library=OnEngine.plugin_library)
    with tempfile.TemporaryDirectory() as folder:
        engine = Path(folder) / f"{path.stem}.engine"
        build(library, str(path), settings).save(engine)
        found = compare_engine(engine, path, images)
    good = all(one.same >= 0.98 * one.before >= 2 * batch and one.worst_box < 2 for batch, one in found)
    return "; ".join(f"batch {batch}: {one.summary}" for batch, one in found), good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--on", choices=("tensorrt", "tensorrt_rtx", "cuda"), default="tensorrt")
    parser.add_argument("--images", type=Path, help=".npy of float32 [n, 3, height, width]")
    parser.add_argument("--no-libraries", action="store_true", help="TensorRT 8 does without cuBLAS and cuDNN")
    parser.add_argument("--plugin-library", type=Path, help="opened before anything is built")
    parser.add_argument("--whole", action="store_true", help="build the engine of the file, and compare the two")
    args = parser.parse_args()
    OnEngine.plugin_library = args.plugin_library
    if args.no_libraries:
        configure = nvidia.configure

        def without_libraries(library: Library, config: Any, *more: Any) -> None:
            configure(library, config, *more)
            config.set_tactic_sources(0)  # nor with kernels that it compiles for each layer, which takes minutes

        nvidia.configure = without_libraries
    opened = {
        "tensorrt": lambda model: OnEngine(model, load_tensorrt()),
        "tensorrt_rtx": lambda model: OnEngine(model, load_rtx()),
        "cuda": on_cuda,
    }[args.on]
    failed = 0
    for path in args.files:
        start = time.perf_counter()
        try:
            fused = load_fused(path)
            images = None if args.images is None else np.load(args.images)
            if images is not None and images.shape[2] != fused.image.height:
                images = None
            if args.whole:
                text, good = compared(path, load_rtx() if args.on == "tensorrt_rtx" else load_tensorrt(), images)
            else:
                report = verify_on(fused, opened, images)
                text, good = str(report), bool(report)
        except Exception as error:  # the other files are still of interest
            text, good = f"{type(error).__name__}: {error}", False
        failed += not good
        print(
            f"{'ok' if good else 'FAILED'} {args.on} {path.name} {time.perf_counter() - start:.1f} s: {text}",
            flush=True,
        )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
