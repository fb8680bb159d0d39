"""The plugin `FusedNMS` for TensorRT: compiles its kernels for one node and includes them in the engine.

TensorRT 10.9 and later store the kernel of a plugin in the engine (quickly deployable plugins, ahead of time), so the engine runs without
a plugin library. Such a plugin is a single kernel, so the node is split into two plugins. If a library with the plugin is open (`make
plugin`), the library is used and the node is not split.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import struct
from pathlib import Path
from types import GenericAlias
from typing import Any

import onnx

from fusenms.errors import BackendUnavailableError, EngineBuildError, SourceError, UnsupportedByBackendError
from fusenms.fusion.backends.plugin import DOMAIN, INPUTS, PLUGIN, VERSION, Settings

SELECT, SUPPRESS = f"{PLUGIN}_select", f"{PLUGIN}_suppress"
SELECT_INPUTS = ("classes", "objectness", "background", "boxes", "angle", "image")
TILE, SELECT_THREADS, SUPPRESS_THREADS, SHAPE_NUMBERS = 64, 256, 1024, 7
"""Constants of plugins/fused_nms.cu, which must have the same values."""
ARCHITECTURE = "compute_75"
"""The oldest architecture for which current compilers make PTX. All newer GPUs run it."""


def kernel_source() -> str:
    """The CUDA source of the kernels.

    Raises:
        SourceError: the file is missing from the installation.
    """
    here = Path(__file__).resolve().parent.parent
    for path in (here / "_plugins" / "fused_nms.cu", here.parent / "plugins" / "fused_nms.cu"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise SourceError("the plugin's kernels are missing from this installation; install fusenms again")


def baked_source(settings: Settings, half: bool) -> str:
    """CUDA source of the kernels `fused_nms_select` and `fused_nms_suppress`, with the settings as constants.

    Args:
        settings: settings of the node.
        half: whether the head is in float16; otherwise it is in float32.
    """

    definitions = {
        "FUSENMS_BAKED": ", ".join(map(str, struct.unpack(f"{ctypes.sizeof(settings) // 4}i", settings))),
        "FUSENMS_ELEMENT": "fusenms::Half" if half else "float",
        "FUSENMS_KIND": "Oriented" if settings.angle[0] else "Upright",
    }
    return "".join(f"#define {name} {value}\n" for name, value in definitions.items()) + kernel_source()


def compile_ptx(source: str, architecture: str = ARCHITECTURE) -> bytes:
    """Compile CUDA source to PTX with NVRTC. This needs no GPU.

    Raises:
        BackendUnavailableError: cuda-python or NVRTC is not installed.
        EngineBuildError: the source does not compile.
    """
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise BackendUnavailableError(
            f"the plugin's kernels cannot be compiled: {error}; install NVRTC with: pip install 'fusenms[plugin]'"
        ) from error
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"fused_nms.cu", 0, [], [])
    # NVRTC 13.0 takes a lambda of a device function for a host function without the last option.
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17", b"--device-as-default-execution-space"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    kind = "ProgramLog" if int(status) else "PTX"
    size = getattr(nvrtc, f"nvrtcGet{kind}Size")(program)[1]
    text = b" " * size
    getattr(nvrtc, f"nvrtcGet{kind}")(program, text)
    nvrtc.nvrtcDestroyProgram(program)
    if int(status):
        raise EngineBuildError(f"NVRTC cannot compile the plugin's kernels: {text.decode().strip()[:600]}")
    return text


def load_plugin_library(path: Path) -> None:
    """Open a library with the plugin, which registers it with TensorRT. A library is code, so open only your own.

    Raises:
        SourceError: the library cannot be opened.
    """
    try:
        ctypes.CDLL(str(path.resolve()), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise SourceError(
            f"{path}: cannot be opened as a plugin library ({error}); make one with: make plugin"
        ) from error


def carried(trt: Any, name: str, path: str, model: onnx.ModelProto) -> onnx.ModelProto:
    """Split the `FusedNMS` node of a model into the two plugins that an engine includes, and register them.

    Raises:
        UnsupportedByBackendError: this version cannot include plugins in engines.
    """
    try:
        plugins = importlib.import_module(f"{trt.__name__}.plugin")
        plugins.aot_impl  # noqa: B018 - TensorRT 10.8 has the module, but not this function
    except (ImportError, AttributeError) as error:
        raise UnsupportedByBackendError(
            f"{path}: {name} has no plugin {PLUGIN}, and cannot include plugins in engines (TensorRT 10.9 can); open a library with "
            "plugin_library (make plugin), or fuse the weights again with backend='portable', which needs no plugin"
        ) from error
    if not hasattr(plugins.op, DOMAIN):
        _register(trt, plugins)
    return split(model)


def split(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model, and replace its `FusedNMS` node by two nodes, one for each kernel. Their settings are one JSON attribute."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    place, node = next((i, node) for i, node in enumerate(whole.graph.node) if node.op_type == PLUGIN)
    given = dict(zip(INPUTS, node.input, strict=True))
    keys, counts, decoded, kept = (f"{node.name}/{part}" for part in ("keys", "counts", "decoded", "kept"))
    common: dict[str, Any] = {
        "domain": DOMAIN, "plugin_version": VERSION, "plugin_namespace": DOMAIN, "aot": 1,
        "settings": json.dumps(Settings.of_node(node).to_dict()),
    }  # fmt: skip
    parts = (
        onnx.helper.make_node(
            SELECT, [given[name] for name in SELECT_INPUTS], [keys, counts, decoded],
            name=f"{node.name}/select", **common,
        ),
        onnx.helper.make_node(
            SUPPRESS, [keys, counts, decoded], [*node.output, kept],
            name=f"{node.name}/suppress", **common,
        ),
    )  # fmt: skip
    nodes = [*whole.graph.node[:place], *parts, *whole.graph.node[place + 1 :]]
    del whole.graph.node[:]
    whole.graph.node.extend(nodes)
    return whole


def _register(trt: Any, plugins: Any) -> None:
    """Register the two plugins. TensorRT reads the annotations of their functions, which must be classes, not strings."""
    tensor = plugins.TensorDesc

    def read(settings: str) -> Settings:
        return Settings.of_dict(json.loads(settings))

    def made(dtype: Any, *shape: Any) -> Any:
        return plugins.from_shape_expr(shape, dtype=dtype)

    def kernel(
        kind: str, s: Settings, half: bool, grid: tuple[Any, Any], threads: int, numbers: tuple[Any, ...]
    ) -> Any:
        launch = plugins.KernelLaunchParams()
        launch.grid_x, launch.grid_y = grid
        launch.block_x = threads
        arguments = plugins.SymIntExprs.from_tuple([plugins.SymInt32(number) for number in numbers])
        return f"fused_nms_{kind}", compile_ptx(baked_source(s, half)), launch, arguments

    def select(classes, objectness, background, boxes, angle, image, settings):  # type: ignore[no-untyped-def]
        s = read(settings)
        images, candidates = classes.shape_expr[0], classes.shape_expr[3 - s.classes[0]]
        each = 2 * (s.num_classes if s.multi_label else 1)  # a key is two int32
        return (
            made(trt.int32, images, candidates * each), made(trt.int32, images, plugins.cdiv(candidates, TILE)),
            made(trt.float32, images, candidates, 5 if s.angle[0] else 4),
        )  # fmt: skip

    def select_kernel(classes, objectness, background, boxes, angle, image, settings, outputs, tactic):  # type: ignore[no-untyped-def]
        s = read(settings)
        candidates = classes.shape_expr[3 - s.classes[0]]
        size = (s.height, s.width) if s.height else (image.shape_expr[2], image.shape_expr[3])
        grid = (plugins.cdiv(candidates, TILE), classes.shape_expr[0])
        return kernel("select", s, classes.dtype == trt.float16, grid, SELECT_THREADS, (candidates, *size))

    def suppress(keys, counts, decoded, settings):  # type: ignore[no-untyped-def]
        s, images = read(settings), decoded.shape_expr[0]
        rows = s.max_detections
        return (
            made(trt.int32, images, 1), made(trt.float32, images, rows, 5 if s.angle[0] else 4), made(trt.float32, images, rows),
            made(trt.int32, images, rows), made(trt.int32, images, rows), made(trt.float32, images, SHAPE_NUMBERS, rows),
        )  # fmt: skip

    def suppress_kernel(keys, counts, decoded, settings, outputs, tactic):  # type: ignore[no-untyped-def]
        grid = (decoded.shape_expr[0], 1)
        return kernel("suppress", read(settings), False, grid, SUPPRESS_THREADS, (decoded.shape_expr[1],))

    for name, describe, compiled, inputs, outputs in (
        (SELECT, select, select_kernel, SELECT_INPUTS, 3),
        (SUPPRESS, suppress, suppress_kernel, ("keys", "counts", "decoded"), 6),
    ):
        result = (str, bytes, plugins.KernelLaunchParams, plugins.SymExprs)
        compiled.__annotations__ = {"return": GenericAlias(tuple, result)}
        describe.__annotations__ = dict.fromkeys(inputs, tensor) | {
            "settings": str,
            "return": GenericAlias(tuple, (tensor,) * outputs),
        }
        plugins.register(f"{DOMAIN}::{name}")(describe)
        plugins.aot_impl(f"{DOMAIN}::{name}")(compiled)
