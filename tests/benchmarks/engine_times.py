"""Time ONNX files on a GPU, in turn, as TensorRT engines or in ONNX Runtime: the raw model, say, and the fused one.

    python tests/benchmarks/engine_times.py raw.onnx fused.onnx [--module tensorrt_rtx] [--batch 1 8] [--graph]

Needs TensorRT (8.5 or newer) or TensorRT-RTX, cuda-python and numpy, and nothing of fusenms: an old TensorRT has an old Python.
Engines are built anew for each batch size, from the files as they are, with one timing cache, so that layers that they share run the same
kernels; what is timed is the engine alone, without copies to and from the host. Inputs are random numbers from 0 to 1, or arrays by name.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import importlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

REPEAT = 16  # runs that are timed together


DTYPES = {"FLOAT": "f4", "HALF": "f2", "INT32": "i4", "INT64": "i8", "INT8": "i1", "UINT8": "u1", "BOOL": "?"}

Arrays = dict[str, np.ndarray]


def _filled(path: Path, name: str, shape: tuple, given: Arrays, rng: Any) -> np.ndarray:
    """An input: random numbers, or what was given, again and again until the batch is full."""
    if name not in given:
        return rng.random(shape)
    array = given[name]
    if array.shape[1:] != shape[1:]:
        raise SystemExit(f"{path}: input {name} is {shape}, given was {array.shape}")
    return np.ascontiguousarray(array[np.arange(shape[0]) % len(array)])


def call(function: Any, *arguments: Any) -> Any:
    error, *result = function(*arguments)
    if int(error):
        raise SystemExit(f"CUDA: {function.__name__} fails ({error}); is there an NVIDIA GPU with its driver?")
    return result[0] if result else None


class Timed:
    """An engine of a file, ready to run."""

    cache = b""  # of timings, for the next engine
    graph: Any = None

    def __init__(self, trt: Any, cuda: Any, path: Path, batch: int, given: Arrays, args: argparse.Namespace) -> None:
        start = time.perf_counter()
        logger = trt.Logger(trt.Logger.ERROR)
        if hasattr(trt, "init_libnvinfer_plugins"):
            trt.init_libnvinfer_plugins(logger, "")
        builder = trt.Builder(logger)
        explicit = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
        network = builder.create_network(0 if explicit is None else 1 << int(explicit))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(path)):
            raise SystemExit(f"{path}: {'; '.join(str(parser.get_error(i)) for i in range(parser.num_errors))}")
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        shapes = {}
        for i in range(network.num_inputs):
            entry = network.get_input(i)
            shapes[entry.name] = tuple(batch if side < 0 and at == 0 else side for at, side in enumerate(entry.shape))
            if min(shapes[entry.name]) < 0:
                raise SystemExit(f"{path}: input {entry.name} has open sides; fuse it at one size")
            profile.set_shape(entry.name, *[shapes[entry.name]] * 3)
        config.add_optimization_profile(profile)
        cache = config.create_timing_cache(Timed.cache)
        config.set_timing_cache(cache, False)
        if args.no_libraries and hasattr(trt, "TacticSource"):
            config.set_tactic_sources(0)  # nor with kernels that it compiles for each layer, which takes minutes
        for flag in (name for name in ("fp16", "int8") if getattr(args, name)):
            config.set_flag(getattr(trt.BuilderFlag, flag.upper()))
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise SystemExit(f"{path}: no engine is built of it")
        Timed.cache = bytes(cache.serialize())
        self.cuda, self.runtime = cuda, trt.Runtime(logger)
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise SystemExit(f"{path}: its engine does not open here; is there an NVIDIA GPU with its driver?")
        self.context, self.outputs = self.engine.create_execution_context(), {}
        self.stream = call(cuda.cudaStreamCreate)
        rng = np.random.default_rng(0)
        for i in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(i)
            dtype = np.dtype(DTYPES[self.engine.get_tensor_dtype(name).name])
            if name in shapes:
                self.context.set_input_shape(name, shapes[name])
                array = _filled(path, name, shapes[name], given, rng).astype(dtype)
            else:
                array = np.empty(tuple(self.context.get_tensor_shape(name)), dtype)
            place = call(cuda.cudaMalloc, max(array.nbytes, 1))
            if name in shapes:
                call(
                    cuda.cudaMemcpy, place, array.ctypes.data, array.nbytes, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
                )
            else:
                self.outputs[name] = (place, array)
            self.context.set_tensor_address(name, place)
        print(f"{path.name}, batch {batch}: built in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

    def captured(self) -> Timed:
        """The same engine, run as a CUDA graph."""
        cuda, twin = self.cuda, copy.copy(self)
        self.run()  # kernels that are loaded when they are first run
        call(cuda.cudaStreamSynchronize, self.stream)
        call(cuda.cudaStreamBeginCapture, self.stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        self.run()
        twin.graph = call(cuda.cudaGraphInstantiate, call(cuda.cudaStreamEndCapture, self.stream), 0)
        return twin

    def run(self) -> None:
        if self.graph is not None:
            call(self.cuda.cudaGraphLaunch, self.graph, self.stream)
        elif not self.context.execute_async_v3(self.stream):
            raise SystemExit("an engine does not run")

    def microseconds(self) -> float:
        """Of one run, on the GPU's own clock."""
        cuda = self.cuda
        start, end = call(cuda.cudaEventCreate), call(cuda.cudaEventCreate)
        call(cuda.cudaEventRecord, start, self.stream)
        for _ in range(REPEAT):
            self.run()
        call(cuda.cudaEventRecord, end, self.stream)
        call(cuda.cudaEventSynchronize, end)
        return 1e3 * call(cuda.cudaEventElapsedTime, start, end) / REPEAT

    def results(self) -> dict[str, np.ndarray]:
        self.run()
        call(self.cuda.cudaStreamSynchronize, self.stream)
        for place, array in self.outputs.values():
            kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
            call(self.cuda.cudaMemcpy, array.ctypes.data, place, array.nbytes, kind)
        return {name: array for name, (_, array) in self.outputs.items()}


class InOnnxRuntime:
    """A file in ONNX Runtime on CUDA, with inputs and outputs bound on the GPU."""

    def __init__(self, path: Path, batch: int, given: Arrays, args: argparse.Namespace) -> None:
        import onnxruntime as ort

        options = {
            "use_tf32": "1", "cudnn_conv_algo_search": "EXHAUSTIVE", "enable_cuda_graph": str(int(args.graph)),
        }  # fmt: skip
        self.session = ort.InferenceSession(
            str(path), providers=[("CUDAExecutionProvider", options), "CPUExecutionProvider"]
        )
        if self.session.get_providers()[0] != "CUDAExecutionProvider":
            raise SystemExit("ONNX Runtime does not run on CUDA here; onnxruntime-gpu and an NVIDIA GPU are needed")
        self.binding, rng = self.session.io_binding(), np.random.default_rng(0)
        for entry in self.session.get_inputs():
            shape = tuple(
                batch if at == 0 and not isinstance(side, int) else side for at, side in enumerate(entry.shape)
            )
            kind = {"tensor(float16)": np.float16, "tensor(float)": np.float32}[entry.type]
            array = _filled(path, entry.name, shape, given, rng).astype(kind)
            self.binding.bind_ortvalue_input(entry.name, ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
        for entry in self.session.get_outputs():
            shape = tuple(batch if at == 0 else side for at, side in enumerate(entry.shape))
            if args.graph:  # which writes to the places that it was captured with
                kind = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}[entry.type]
                there = ort.OrtValue.ortvalue_from_shape_and_type(shape, kind, "cuda", 0)
                self.binding.bind_ortvalue_output(entry.name, there)
            else:
                self.binding.bind_output(entry.name, "cuda", 0)
        self.microseconds()

    def microseconds(self) -> float:
        """Of one run, on the host's clock, since ONNX Runtime has streams of its own."""
        self.binding.synchronize_outputs()
        start = time.perf_counter()
        for _ in range(REPEAT):
            self.session.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()
        return 1e6 * (time.perf_counter() - start) / REPEAT

    def results(self) -> Arrays:
        self.session.run_with_iobinding(self.binding)
        names = [entry.name for entry in self.session.get_outputs()]
        return dict(zip(names, self.binding.copy_outputs_to_cpu(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--module", default="tensorrt", help="tensorrt, tensorrt_rtx or onnxruntime")
    parser.add_argument("--fp16", action="store_true", help="TensorRT may compute in float16 (before strong typing)")
    parser.add_argument("--int8", action="store_true", help="TensorRT may compute in int8 (before strong typing)")
    parser.add_argument("--graph", action="store_true", help="run as a CUDA graph too (ONNX Runtime: instead)")
    parser.add_argument("--plugin-library", type=Path, nargs="*", default=[], help="opened before anything is built")
    parser.add_argument("--no-libraries", action="store_true", help="TensorRT 8 does without cuBLAS and cuDNN")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--inputs", type=Path, help=".npz with the inputs by name, repeated to fill the batch")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--save", type=Path, help="folder for what each engine gives: NAME.BATCH.npz")
    parser.add_argument("--json", action="store_true", help="all of the last batch size, in one line")
    args = parser.parse_args()
    given = dict(np.load(args.inputs)) if args.inputs else {}
    module = importlib.import_module(args.module)
    for plugins in args.plugin_library:
        ctypes.CDLL(str(plugins.resolve()), mode=ctypes.RTLD_GLOBAL)
    library = f"{args.module} {module.__version__}"
    if args.module != "onnxruntime":
        try:
            from cuda.bindings import runtime as cuda
        except ImportError:
            from cuda import cudart as cuda  # cuda-python before 12.6
        call(cuda.cudaSetDevice, 0)
    for batch in args.batch:
        engines: dict[str, Any] = {}
        for path in args.files:
            if args.module == "onnxruntime":
                engines[path.name] = InOnnxRuntime(path, batch, given, args)
            else:
                engines[path.name] = Timed(module, cuda, path, batch, given, args)
                if args.graph:
                    engines[f"{path.name} (CUDA graph)"] = engines[path.name].captured()
        Timed.cache = b""
        if args.save:
            args.save.mkdir(parents=True, exist_ok=True)
            for name, engine in engines.items():
                results = {key: value for key, value in engine.results().items() if value.nbytes <= 1 << 20}
                np.savez_compressed(
                    args.save / f"{name.replace(' ', '_').strip(')').replace('(', '')}.{batch}.npz", **results
                )
        times: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(args.runs):
            for name, engine in engines.items():
                engine.microseconds()
                times[name].append(engine.microseconds())
        if not args.json:
            first = statistics.median(next(iter(times.values())))
            for name, values in times.items():
                middle = statistics.median(values)
                print(f"{library}, batch {batch}: {name} {middle:.1f} us ({middle / first:.3f})", flush=True)
            continue
        small = {
            name: {key: value.tolist() for key, value in engine.results().items() if value.size <= 100}
            for name, engine in engines.items()
        }
        files = {name: {"microseconds": values, "outputs": small[name]} for name, values in times.items()}
        print(json.dumps({"library": library, "batch": batch, "files": files}))


if __name__ == "__main__":
    main()
