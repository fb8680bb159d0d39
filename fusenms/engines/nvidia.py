"""Builds engines with TensorRT (8.5 and later) and TensorRT-RTX, with the same code.

TensorRT-RTX has the interface of TensorRT 11 (strong typing only), so builds with it in CI run the same code as builds with TensorRT.
Features that only some versions have are looked up by name (`Library`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from fusenms import contract
from fusenms.artifacts.fused import load_fused, refuse_frames
from fusenms.engines.base import Engine, EngineSettings, Sizes, describe
from fusenms.engines.plugin import carried, load_plugin_library
from fusenms.errors import ConfigError, EngineBuildError, SourceError, UnsupportedByBackendError
from fusenms.fusion.backends.plugin import PLUGIN
from fusenms.graph.defaults import with_defaults
from fusenms.limits import DEFAULT_LIMITS
from fusenms.onnx_reading.files import read_metadata, read_onnx
from fusenms.safety.files import read_regular, write_atomically
from fusenms.verification.checks import OnProgress

HALF = onnx.TensorProto.FLOAT16


@dataclass(frozen=True)
class Library:
    """The installed TensorRT or TensorRT-RTX.

    Attributes:
        module: the module `tensorrt` or `tensorrt_rtx`.
        title: name of the library, for messages.
        cures: operator that the parser refuses to the advice for the user.
    """

    module: Any
    title: str
    cures: Mapping[str, str]

    @property
    def name(self) -> str:
        return f"{self.title} {self.module.__version__}"

    @property
    def strongly_typed(self) -> bool:
        """Whether networks can be strongly typed, and so compute in the types of their graph: TensorRT 10 and later, TensorRT-RTX."""
        return hasattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")

    def network_flags(self) -> int:
        """Flags for creating a network: strongly typed if supported, else explicit batch."""
        flags = self.module.NetworkDefinitionCreationFlag
        return 1 << int(flags.STRONGLY_TYPED if self.strongly_typed else flags.EXPLICIT_BATCH)

    def flag(self, name: str, what: str) -> Any:
        """A flag of the builder.

        Args:
            name: name of the flag.
            what: its feature, for the message.

        Raises:
            ConfigError: this version has no such flag.
        """
        found = getattr(self.module.BuilderFlag, name, None)
        if found is None:
            raise ConfigError(f"{self.name} has no {what}; leave it out, or use a newer version")
        return found

    def plugins(self) -> set[str]:
        """Names of the plugins of the library. TensorRT-RTX has hardly any."""
        if not hasattr(self.module, "init_libnvinfer_plugins"):
            return set()
        self.module.init_libnvinfer_plugins(None, "")
        registry = self.module.get_plugin_registry()
        creators = getattr(registry, "all_creators", None) or registry.plugin_creator_list
        return {creator.name for creator in creators}


def build(library: Library, path: str, settings: EngineSettings, progress: OnProgress | None = None) -> Engine:
    """Build an engine from an ONNX file.

    Raises:
        UnsupportedByBackendError: the library refuses an operator or lacks a plugin. The message names the node and what to do.
        EngineBuildError: the library cannot build the network. The message includes its own.
        ConfigError: the library does not have a setting, or a setting gives a size that is fixed in the file.
        SourceError: the file cannot be read, or has a dynamic dimension that no setting gives a size.
    """
    trt, model = library.module, read_onnx(Path(path))
    if contract.KEY_BACKEND in read_metadata(model):
        refuse_frames(path, load_fused(path).image, "an engine")
    if settings.plugin_library is not None:
        load_plugin_library(settings.plugin_library)
    whole = with_own_plugin(library, path, model)
    carries, whole = whole is not model, with_defaults(whole)
    _check_plugins(library, path, whole)
    logger = make_logger(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # the TensorRT binding raises this without a GPU
        raise EngineBuildError(
            f"{path}: {library.name} does not start ({logger.text}); it needs an NVIDIA GPU with its driver"
        ) from error
    network = builder.create_network(library.network_flags())
    parse(library, network, logger, whole, path)
    config = builder.create_builder_config()
    configure(library, config, settings, model, progress)
    profile, inputs = builder.create_optimization_profile(), {}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        inputs[tensor.name] = shapes = _profile_shapes(path, tensor.name, tuple(tensor.shape), settings, model)
        profile.set_shape(tensor.name, *shapes)
    if any(-1 in tuple(network.get_input(i).shape) for i in range(network.num_inputs)):
        config.add_optimization_profile(profile)
    cache = _timing_cache(library, config, settings)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        cure = next((f". {cure}" for operator, cure in library.cures.items() if operator in logger.text), "")
        if "current" in settings.compute_capabilities:
            cure += '. The compute capability "current" needs a GPU in this machine'
        raise EngineBuildError(f"{path}: {library.name} cannot build the engine: {logger.text}{cure}")
    if cache is not None and settings.timing_cache is not None:
        write_atomically(settings.timing_cache, bytes(cache.serialize()))
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    info = describe(
        Path(path), model, bytes(plan),
        {
            "name": library.title, "version": trt.__version__, "layers": network.num_layers, "strongly_typed": library.strongly_typed,
            "compute_capabilities": list(dict.fromkeys(settings.compute_capabilities)) or "the builder's choice",
            "version_compatible": settings.version_compatible, "hardware_compatible": settings.hardware_compatible,
            **({"carries": PLUGIN} if carries else {}),
        },
        {
            "inputs": {name: {"min": least, "opt": usual, "max": most} for name, (least, usual, most) in inputs.items()},
            "outputs": {t.name: {"dtype": t.dtype.name.lower(), "shape": list(t.shape)} for t in outputs},
        },
    )  # fmt: skip
    return Engine(bytes(plan), info, _inspect(trt, bytes(plan)))


def with_own_plugin(library: Library, path: str, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model for the build. If it has a `FusedNMS` node and no library with this plugin is open, the engine will include the plugin.

    Raises:
        UnsupportedByBackendError: this version cannot include plugins in engines.
    """
    if all(node.op_type != PLUGIN for node in model.graph.node) or PLUGIN in library.plugins():
        return model
    return carried(library.module, library.name, path, model)


def _check_plugins(library: Library, path: str, model: onnx.ModelProto) -> None:
    """Refuse nodes whose plugin the library does not have."""
    wanted = [node for node in model.graph.node if node.domain not in ("", "ai.onnx")]
    if not wanted:
        return
    present = library.plugins()
    if missing := [node for node in wanted if node.op_type not in present]:
        node = missing[0]
        raise UnsupportedByBackendError(
            f"{path}: {library.name} has no plugin {node.op_type} (node {node.name!r}); fuse the weights again with backend='portable', "
            "which needs no plugin"
        )


def configure(
    library: Library, config: Any, settings: EngineSettings, model: onnx.ModelProto, progress: OnProgress | None
) -> None:
    """Apply the settings to the config of a builder.

    Raises:
        ConfigError: this version does not have a setting.
    """
    trt = library.module
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace << 20)
    if settings.version_compatible:
        config.set_flag(library.flag("VERSION_COMPATIBLE", "version-compatible engines (since TensorRT 8.6)"))
    if settings.hardware_compatible:
        levels = getattr(trt, "HardwareCompatibilityLevel", None)
        if levels is None:
            raise ConfigError(
                f"{library.name} has no hardware-compatible engines (since TensorRT 8.6); leave it out, or use a newer version"
            )
        config.hardware_compatibility_level = levels.AMPERE_PLUS
    if settings.compute_capabilities:
        if not hasattr(config, "set_compute_capability"):
            raise ConfigError(f"{library.name} builds for the GPU that it runs on; leave the compute capability out")
        capabilities = _capabilities(library, settings.compute_capabilities)
        config.num_compute_capabilities = len(capabilities)
        for i, capability in enumerate(capabilities):
            config.set_compute_capability(capability, i)
    if not library.strongly_typed:  # weakly typed networks need a flag for each type that the builder may choose
        operators = {node.op_type for node in model.graph.node}
        if any(item.data_type == HALF for item in model.graph.initializer):
            config.set_flag(library.flag("FP16", "half precision"))
        if "QuantizeLinear" in operators:
            config.set_flag(library.flag("INT8", "int8"))
    if progress is not None and hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, progress)


def _timing_cache(library: Library, config: Any, settings: EngineSettings) -> Any:
    """The timing cache that the build fills, read from its file if it exists. None if no cache is set.

    Raises:
        SourceError: the file is not a timing cache for this library and GPU.
    """
    if settings.timing_cache is None:
        return None
    there = settings.timing_cache.is_file()
    old = read_regular(settings.timing_cache, DEFAULT_LIMITS.max_file_bytes) if there else b""
    cache = config.create_timing_cache(old)
    if cache is None or not config.set_timing_cache(cache, False):
        raise SourceError(
            f"{settings.timing_cache}: not a timing cache for {library.name} on this machine; choose another file"
        )
    return cache


def parse(library: Library, network: Any, logger: Any, model: onnx.ModelProto, path: str) -> None:
    """Parse the model into the network.

    Raises:
        UnsupportedByBackendError: the parser refuses a node.
    """
    parser = library.module.OnnxParser(network, logger)
    if parser.parse(model.SerializeToString()):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    nodes = [named for error in errors if (named := _node_of(error, model)) is not None]
    if not nodes:
        said = errors[0].desc() if errors else logger.text
        raise UnsupportedByBackendError(f"{path}: {library.name} cannot read the file: {said}")
    operators = Counter(operator for operator, _ in nodes)
    cures = list(dict.fromkeys(library.cures[operator] for operator in operators if operator in library.cures))
    first = ", ".join(f"{operator} (node {name!r})" for operator, name in nodes[:3])
    more = f" and {len(nodes) - 3} more nodes ({', '.join(operators)})" if len(nodes) > 3 else ""
    cure = "; ".join(cures) or f"its message: {errors[0].desc()}"
    raise UnsupportedByBackendError(f"{path}: {library.name} does not support {first}{more}; {cure}")


def _node_of(error: Any, model: onnx.ModelProto) -> tuple[str, str] | None:
    """Operator and name of the node of an error: from the error itself, or in TensorRT 8 from the index of the node."""
    if hasattr(error, "node_operator"):
        return (error.node_operator(), error.node_name()) if error.node_operator() else None
    place = error.node()
    if not 0 <= place < len(model.graph.node):
        return None
    return model.graph.node[place].op_type, model.graph.node[place].name


def _profile_shapes(
    path: str, name: str, shape: tuple[int, ...], settings: EngineSettings, model: onnx.ModelProto
) -> tuple[list[int], ...]:
    """Minimum, optimum and maximum shape of an input ``[batch, channels, height, width]``.

    Raises:
        ConfigError: a setting gives a size that is fixed in the file.
        SourceError: a dimension other than batch, height and width is dynamic.
    """
    usual = json.loads(read_metadata(model).get(contract.KEY_IMAGE, "{}"))
    height, width = ((usual.get(side, 640),) * 3 for side in ("height", "width"))
    named: dict[int, Sizes] = {
        0: settings.batch or (1, 8, 32),
        2: settings.height or height,
        3: settings.width or width,
    }
    asked = {0: ("batch", settings.batch), 2: ("height", settings.height), 3: ("width", settings.width)}
    for axis, (what, sizes) in asked.items():
        if sizes is not None and len(shape) == 4 and shape[axis] >= 0 and set(sizes) != {shape[axis]}:
            raise ConfigError(
                f"{path}: {what} is {','.join(map(str, sizes))}, but it is fixed at {shape[axis]} in the file; leave it out, or fuse the "
                "weights again with a dynamic one"
            )
    if any(size < 0 and (axis not in named or (axis > 0 and len(shape) != 4)) for axis, size in enumerate(shape)):
        raise SourceError(
            f"{path}: input {name!r} has the shape {list(shape)} (-1: dynamic); expected only batch, height and width to be dynamic"
        )
    return tuple([size if size >= 0 else named[axis][i] for axis, size in enumerate(shape)] for i in range(3))


def _capabilities(library: Library, names: tuple[str, ...]) -> list[Any]:
    capability = library.module.ComputeCapability
    known = {
        f"{name[2:-1]}.{name[-1]}": value for name, value in capability.__members__.items() if name.startswith("SM")
    }
    known["current"] = capability.CURRENT
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"compute capability is {', '.join(unknown)}; {library.name} builds for {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def make_logger(trt: Any) -> Any:
    """A logger that keeps the errors of the builder, as ``text``."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the errors of the builder, for our error messages."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(text)

        @property
        def text(self) -> str:
            return " ".join(self.errors[-2:])[:600] or "without a message"

    return Logger()


def _monitor(trt: Any, progress: OnProgress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the phases of the build."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.steps[name] = steps
            progress(name, 0, steps)

        def step_complete(self, name: str, step: int) -> bool:
            progress(name, step + 1, self.steps.get(name, step + 1))
            return True

        def phase_finish(self, name: str) -> None:
            steps = self.steps.pop(name, 1)
            progress(name, steps, steps)

    return Monitor()


def _inspect(trt: Any, plan: bytes) -> str | None:
    """Report of the engine inspector on the layers. None if there is no GPU to open the engine on."""
    runtime = trt.Runtime(make_logger(trt))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return None
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
