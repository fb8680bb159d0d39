"""The plugin's kernels, run for models with a `FusedNMS` node: on a CPU, compiled as C++ (tests/emulation), or on a GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fusenms.backends.base import OnnxRuntimeRunner
from fusenms.backends.plugin import INPUTS, OUTPUTS, PLUGIN, Settings
from fusenms.engines.plugin import baked_source, compile_ptx
from fusenms.graph import sorted_model, with_only_outputs

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "plugins" / "fused_nms.cu"
TILE, SHAPE_NUMBERS = 64, 7  # as fused_nms.cu has them
ARGUMENTS = ("classes", "objectness", "background", "boxes", "angle")  # of the two kernels, in order
GUARD = 64  # elements before and after every array, which nothing may write to

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Settings, Arrays, tuple[int, int]], dict[str, np.ndarray]]
"""Settings, the node's inputs by name, and (height, width) of the picture to the node's outputs by name."""


def compiler() -> list[str] | None:
    """A C++ compiler: this machine's, or that of the package `ziglang`."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return [name]
    return [sys.executable, "-m", "ziglang", "c++"] if importlib.util.find_spec("ziglang") else None


@cache
def library() -> ctypes.CDLL:
    """The kernels for this CPU; skips the test where there is no C++ compiler."""
    command = compiler()
    if command is None:
        pytest.skip("no C++ compiler to run the kernels on this CPU; `pip install ziglang` gives one")
    import tempfile

    made = Path(tempfile.mkdtemp()) / "kernels.so"
    source = HERE / "emulation" / "fused_nms_on_cpu.cpp"
    flags = [
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-shared",
        "-fPIC",
        "-I",
        str(SOURCE.parent),
    ]
    done = subprocess.run([*command, *flags, "-x", "c++", str(source), "-o", str(made)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(made))
    loaded.describe_settings.restype = ctypes.c_char_p
    return loaded


def on_cpu(seed: int = 0) -> Run:
    """Run the kernels on this CPU. The seed draws the order of threads and blocks."""

    def run(s: Settings, inputs: Arrays, size: tuple[int, int]) -> dict[str, np.ndarray]:
        given = {name: np.ascontiguousarray(inputs[name]) for name in ARGUMENTS}
        half = given["classes"].dtype == np.float16
        assert {array.dtype for array in given.values()} == {np.dtype(np.float16 if half else np.float32)}
        images, candidates = len(given["classes"]), given["classes"].shape[3 - s.classes[0]]
        each = s.num_classes if s.multi_label else 1
        tiles, rows, box = -(-candidates // TILE), s.max_detections, 5 if s.angle[0] else 4
        # What the kernels need not have zeroed has anything in it.
        scratch = [_guarded((images, candidates * each), np.int64), _guarded((images, tiles), np.int32)]
        shapes = ((images, 1), (images, rows, box), (images, rows), (images, rows), (images, rows))
        kinds = (np.int32, np.float32, np.float32, np.int32, np.int32)
        outputs = [_guarded(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
        kept = _guarded((images, SHAPE_NUMBERS, rows), np.float32)
        arrays = [*given.values(), *(view for _, view in (*scratch, *outputs, kept))]
        entry = getattr(library(), f"run_{'oriented' if s.angle[0] else 'upright'}_{'half' if half else 'float'}")
        entry(
            ctypes.byref(s),
            seed,
            images,
            candidates,
            *size,
            *(array.ctypes.data_as(ctypes.c_void_p) for array in arrays),
        )
        for whole, view in (*scratch, *outputs, kept):
            ends = np.concatenate((whole[: GUARD * view.itemsize], whole[-GUARD * view.itemsize :]))
            assert (ends == 0xA5).all(), "a kernel wrote beside its array"
        return dict(zip(OUTPUTS, (view for _, view in outputs), strict=True))

    return run


def on_gpu() -> Run:
    """Run the kernels on the first GPU, compiled by NVRTC with their settings built in, as an engine carries them."""
    from cuda.bindings import driver

    def call(function: str, *arguments: Any) -> Any:
        error, *result = getattr(driver, function)(*arguments)
        assert int(error) == 0, f"{function}: {error}"
        return result[0] if result else None

    call("cuInit", 0)
    call("cuCtxSetCurrent", call("cuDevicePrimaryCtxRetain", call("cuDeviceGet", 0)))

    def run(s: Settings, inputs: Arrays, size: tuple[int, int]) -> dict[str, np.ndarray]:
        given = [np.ascontiguousarray(inputs[name]) for name in ARGUMENTS]
        classes = given[0]
        images, candidates = len(classes), classes.shape[3 - s.classes[0]]
        tiles, rows, box = -(-candidates // TILE), s.max_detections, 5 if s.angle[0] else 4
        each = s.num_classes if s.multi_label else 1
        shapes = ((images, 1), (images, rows, box), (images, rows), (images, rows), (images, rows))
        kinds = (np.int32, np.float32, np.float32, np.int32, np.int32)
        outputs = [np.empty(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
        scratch = (8 * images * candidates * each, 4 * images * tiles, 4 * images * SHAPE_NUMBERS * rows)
        sizes = [*(array.nbytes for array in (*given, *outputs)), *scratch]
        places = [call("cuMemAlloc", max(bytes_, 1)) for bytes_ in sizes]
        for place, bytes_ in zip(places, sizes, strict=True):
            call("cuMemsetD8", place, 0xA5, bytes_)
        for place, array in zip(places, given, strict=False):
            call("cuMemcpyHtoD", place, array.ctypes.data, array.nbytes)
        classes_at, objectness, background, boxes, angle, *made, keys, counts, kept = (int(place) for place in places)
        module = call("cuModuleLoadData", compile_ptx(baked_source(s, classes.dtype == np.float16)))

        def launch(
            name: str, grid: tuple[int, int], threads: int, before: list[int], numbers: list[int], after: list[int]
        ) -> None:
            kernel = call("cuModuleGetFunction", module, name.encode())
            types = [ctypes.c_void_p] * len(before) + [ctypes.c_int] * len(numbers) + [ctypes.c_void_p] * len(after)
            arguments = ((*before, *numbers, *after), tuple(types))
            call("cuLaunchKernel", kernel, *grid, 1, threads, 1, 1, 0, 0, arguments, 0)

        launch(
            "fused_nms_select", (tiles, images), 256, [classes_at, objectness, background], [candidates], [keys, counts]
        )
        heads = [keys, counts, boxes, angle, classes_at]  # the last stands for the picture, which is not read
        launch("fused_nms_suppress", (images, 1), 1024, heads, [candidates, *size], [*made, kept])
        call("cuCtxSynchronize")
        for array, place in zip(outputs, made, strict=True):
            call("cuMemcpyDtoH", array.ctypes.data, place, array.nbytes)
        for place in places:
            call("cuMemFree", place)
        call("cuModuleUnload", module)
        return dict(zip(OUTPUTS, outputs, strict=True))

    return run


def _guarded(shape: tuple[int, ...], kind: type) -> tuple[np.ndarray, np.ndarray]:
    """Bytes, all the same, and an array in the middle of them."""
    size = np.dtype(kind).itemsize
    whole = np.full((int(np.prod(shape)) + 2 * GUARD) * size, 0xA5, np.uint8)
    return whole, whole[GUARD * size : -GUARD * size].view(kind).reshape(shape)


class KernelRunner:
    """Runs a model with a `FusedNMS` node: the node by its kernels, what is before and after it by ONNX Runtime."""

    def __init__(self, model: onnx.ModelProto, run: Run) -> None:
        self.node = next(node for node in model.graph.node if node.op_type == PLUGIN)
        self.settings, self._run = Settings.of_node(self.node), run
        self.inputs = [entry.name for entry in model.graph.input]
        self.outputs = [entry.name for entry in model.graph.output]
        made = [name for name in dict.fromkeys(self.node.input) if name not in self.inputs]
        self._before = OnnxRuntimeRunner(sorted_model(with_only_outputs(model, made))) if made else None
        after = onnx.ModelProto()
        after.CopyFrom(model)
        after.graph.node.remove(next(node for node in after.graph.node if node.op_type == PLUGIN))
        kinds = dict(zip(self.node.output, (6, 1, 1, 6, 6), strict=True))
        own = [name for name in kinds if name in self.outputs]
        kept = [entry for entry in after.graph.output if entry.name not in own]
        del after.graph.output[:]
        after.graph.output.extend(kept)
        after.graph.input.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items())
        self._after = OnnxRuntimeRunner(sorted_model(after)) if kept else None

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        known: dict[str, Any] = dict(inputs)
        if self._before is not None:
            known |= self._before.run({name: inputs[name] for name in self._before.inputs})
        given = dict(zip(INPUTS, (known[name] for name in self.node.input), strict=True))
        size = (self.settings.height, self.settings.width) if self.settings.height else given["picture"].shape[2:]
        known |= dict(zip(self.node.output, self._run(self.settings, given, size).values(), strict=True))
        if self._after is not None:
            known |= self._after.run({name: known[name] for name in self._after.inputs})
        return {name: known[name] for name in self.outputs}

    def infer(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return self.run({self.inputs[0]: images})

    def close(self) -> None:
        pass
