"""Runs the plugin's kernels for models with a `FusedNMS` node: on a CPU, compiled as C++ (tests/emulation), or on a GPU."""

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
import sharing
from driver import Gpu

from fusenms.engines.plugin import (
    SELECT_THREADS,
    SHAPE_NUMBERS,
    SUPPRESS_THREADS,
    TILE,
    baked_source,
    compile_ptx,
)
from fusenms.fusion.backends.plugin import IN_HALF, INPUTS, OUTPUTS, PLUGIN, Settings
from fusenms.graph.model import sorted_model, with_only_outputs
from fusenms.graph.session import OnnxRuntimeRunner

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "plugins" / "fused_nms.cu"
ARGUMENTS = ("classes", "objectness", "background", "boxes", "angle")  # inputs of the kernels, in order
GUARD = 64  # elements before and after every array, which the kernels must not write

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Settings, Arrays, tuple[int, int]], dict[str, np.ndarray]]
"""Runs a node: takes its settings, its inputs by name and (height, width) of the image; returns its outputs by name."""


def compiler() -> list[str] | None:
    """Command of a C++ compiler: an installed one, or that of the package `ziglang`. None if there is none."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return [name]
    return [sys.executable, "-m", "ziglang", "c++"] if importlib.util.find_spec("ziglang") else None


def compiled(command: list[str]) -> str:
    """The kernels as a library for this CPU."""
    made = sharing.folder / "kernels.so"
    source = HERE / "emulation" / "fused_nms_on_cpu.cpp"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    flags += ["-I", str(SOURCE.parent)]
    done = subprocess.run([*command, *flags, "-x", "c++", str(source), "-o", str(made)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(made)


@cache
def library() -> ctypes.CDLL:
    """The kernels compiled for this CPU. Skips the test if there is no C++ compiler."""
    command = compiler()
    if command is None:
        pytest.skip("no C++ compiler to run the kernels on this CPU; `pip install ziglang` gives one")
    loaded = ctypes.CDLL(sharing.once("kernels", lambda: compiled(command)))
    loaded.describe_settings.restype = ctypes.c_char_p
    return loaded


def on_cpu(seed: int = 0) -> Run:
    """Run the kernels on this CPU. The seed determines the order of threads and blocks."""

    def run(s: Settings, inputs: Arrays, size: tuple[int, int]) -> dict[str, np.ndarray]:
        given = {name: np.ascontiguousarray(inputs[name]) for name in ARGUMENTS}
        half = given["classes"].dtype == np.float16
        assert {array.dtype for array in given.values()} == {np.dtype(np.float16 if half else np.float32)}
        images, candidates = len(given["classes"]), given["classes"].shape[3 - s.classes[0]]
        each = s.num_classes if s.multi_label else 1
        tiles, rows, box = -(-candidates // TILE), s.max_detections, 5 if s.angle[0] else 4
        # Scratch memory and outputs hold nonzero values, because the kernels must not rely on zeros.
        scratch = [_guarded((images, candidates * each), np.int64), _guarded((images, tiles), np.int32)]
        scratch.append(_guarded((images, candidates, box), np.float32))
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


class OnGpu:
    """The kernels and their inputs on a GPU, compiled by NVRTC with the settings as constants, as in an engine."""

    def __init__(self, gpu: Gpu, s: Settings, inputs: Arrays, size: tuple[int, int], like: OnGpu | None = None) -> None:
        """Load kernels and inputs onto the GPU. ``like``: an object with the same settings, whose compiled code is reused."""
        classes = inputs["classes"]
        self.gpu, self.images, self.candidates = gpu, len(classes), classes.shape[3 - s.classes[0]]
        self.tiles, rows, box = -(-self.candidates // TILE), s.max_detections, 5 if s.angle[0] else 4
        each, images = s.num_classes if s.multi_label else 1, self.images
        self.shapes = ((images, 1), (images, rows, box), (images, rows), (images, rows), (images, rows))
        places = {id(array): gpu.upload(array) for array in inputs.values()}
        classes_at, objectness, background, boxes, angle = (places[id(inputs[name])] for name in ARGUMENTS)
        self._made = [gpu.allocate(4 * int(np.prod(shape))) for shape in self.shapes]
        keys, counts = gpu.allocate(8 * images * self.candidates * each), gpu.allocate(4 * images * self.tiles)
        decoded = gpu.allocate(4 * images * self.candidates * box)
        kept = gpu.allocate(4 * images * SHAPE_NUMBERS * rows)
        if like is None:
            ptx = compile_ptx(baked_source(s, classes.dtype == np.float16))
            self._kernels = gpu.kernels(ptx, "fused_nms_select", "fused_nms_suppress")
        else:
            self._kernels = like._kernels
        image = classes_at  # a placeholder, because the image is not read
        head = [classes_at, objectness, background, boxes, angle, image]
        self._select = head, [self.candidates, *size], [keys, counts, decoded]
        self._suppress = [keys, counts, decoded], [self.candidates], [*self._made, kept]

    def select(self) -> None:
        self.gpu.launch(self._kernels[0], (self.tiles, self.images), SELECT_THREADS, *self._select)

    def suppress(self) -> None:
        self.gpu.launch(self._kernels[1], (self.images, 1), SUPPRESS_THREADS, *self._suppress)

    def launch(self) -> None:
        self.select()
        self.suppress()

    def outputs(self) -> dict[str, np.ndarray]:
        """The node's outputs by name."""
        kinds = (np.int32, np.float32, np.float32, np.int32, np.int32)
        found = [self.gpu.download(*made) for made in zip(self._made, self.shapes, kinds, strict=True)]
        return dict(zip(OUTPUTS, found, strict=True))


def on_gpu() -> Run:
    """Run the kernels on the first GPU."""
    gpu = Gpu()

    def run(s: Settings, inputs: Arrays, size: tuple[int, int]) -> dict[str, np.ndarray]:
        kernels = OnGpu(gpu, s, inputs, size)
        kernels.launch()
        outputs = kernels.outputs()
        gpu.close()
        return outputs

    return run


def _guarded(shape: tuple[int, ...], kind: type) -> tuple[np.ndarray, np.ndarray]:
    """A buffer of equal bytes, and an array inside it with guard elements on both sides."""
    size = np.dtype(kind).itemsize
    whole = np.full((int(np.prod(shape)) + 2 * GUARD) * size, 0xA5, np.uint8)
    return whole, whole[GUARD * size : -GUARD * size].view(kind).reshape(shape)


class KernelRunner:
    """Runs a model with a `FusedNMS` node: the node with its kernels, the graph before and after it with ONNX Runtime."""

    def __init__(self, model: onnx.ModelProto, run: Run) -> None:
        self.node = next(node for node in model.graph.node if node.op_type == PLUGIN)
        self.settings, self._run = Settings.of_node(self.node), run
        self.inputs = [entry.name for entry in model.graph.input]
        self.outputs = [entry.name for entry in model.graph.output]
        made = [name for name in dict.fromkeys(self.node.input) if name not in self.inputs]
        before = with_only_outputs(model, made)
        for entry in before.graph.output:
            if entry.name.endswith(IN_HALF):
                entry.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
        self._before = OnnxRuntimeRunner(sorted_model(before)) if made else None
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
        size = (self.settings.height, self.settings.width) if self.settings.height else given["image"].shape[2:]
        known |= dict(zip(self.node.output, self._run(self.settings, given, size).values(), strict=True))
        if self._after is not None:
            known |= self._after.run({name: known[name] for name in self._after.inputs})
        return {name: known[name] for name in self.outputs}

    def infer(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return self.run({self.inputs[0]: images})

    def close(self) -> None:
        pass
