"""What building with TensorRT, from 8.5 on, and with TensorRT-RTX have in common: one way, which asks the library what it can do.

TensorRT-RTX has the interface of TensorRT 11 (strong typing only), so what is built with it in CI goes the way that TensorRT goes. What
older versions have besides, or have not yet, is asked by name: `Library`.
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
from fusenms.engines.base import Engine, EngineSettings, Sizes, describe
from fusenms.engines.plugin import carried, load_plugin_library
from fusenms.errors import ConfigError, EngineBuildError, SourceError, UnsupportedByBackendError
from fusenms.fusion.backends.plugin import PLUGIN
from fusenms.limits import DEFAULT_LIMITS
from fusenms.onnx_reading.files import read_metadata, read_onnx
from fusenms.safety.files import read_regular, write_atomically
from fusenms.verification.checks import OnProgress

HALF = onnx.TensorProto.FLOAT16


@dataclass(frozen=True)
class Library:
    """TensorRT or TensorRT-RTX, as it is installed.

    Attributes:
        module: `tensorrt` or `tensorrt_rtx`.
        title: its name, for people.
        cures: what to do about an operator that it refuses.
    """

    module: Any
    title: str
    cures: Mapping[str, str]

    @property
    def name(self) -> str:
        return f"{self.title} {self.module.__version__}"

    @property
    def strongly_typed(self) -> bool:
        """Whether networks can compute in the types of their graph: TensorRT from 10 on, TensorRT-RTX."""
        return hasattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")

    def network_flags(self) -> int:
        """Flags of a network: strongly typed where that can be; before, an explicit batch."""
        flags = self.module.NetworkDefinitionCreationFlag
        return 1 << int(flags.STRONGLY_TYPED if self.strongly_typed else flags.EXPLICIT_BATCH)

    def flag(self, name: str, what: str) -> Any:
        """A builder's flag.

        Raises:
            ConfigError: this version has none of that name.
        """
        found = getattr(self.module.BuilderFlag, name, None)
        if found is None:
            raise ConfigError(f"{self.name} has no {what}; leave it out, or take a newer version")
        return found

    def plugins(self) -> set[str]:
        """Names of the plugins that it has; TensorRT-RTX has hardly any."""
        if not hasattr(self.module, "init_libnvinfer_plugins"):
            return set()
        self.module.init_libnvinfer_plugins(None, "")
        registry = self.module.get_plugin_registry()
        creators = getattr(registry, "all_creators", None) or registry.plugin_creator_list
        return {creator.name for creator in creators}


def build(library: Library, path: str, settings: EngineSettings, progress: OnProgress | None = None) -> Engine:
    """Build an engine of an ONNX file.

    Raises:
        UnsupportedByBackendError: it refuses an operator, or lacks a plugin; the message names the node, and what to do.
        EngineBuildError: it cannot build the network; the message has its words.
        ConfigError: a setting is not one that it has, or a size is asked for that the file does not leave open.
        SourceError: the file cannot be read, or has an input that no setting gives a size.
    """
    trt, model = library.module, read_onnx(Path(path))
    if settings.plugin_library is not None:
        load_plugin_library(settings.plugin_library)
    whole = with_own_plugin(library, path, model)
    _check_plugins(library, path, whole)
    logger = make_logger(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # how TensorRT's binding says that there is no GPU
        raise EngineBuildError(
            f"{path}: {library.name} does not start ({logger.text}); it builds on a machine with an NVIDIA GPU and its driver"
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
            cure += '. Compute capability "current" is that of this machine\'s GPU: is there one?'
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
            **({} if whole is model else {"carries": PLUGIN}),
        },
        {
            "inputs": {name: {"min": least, "opt": usual, "max": most} for name, (least, usual, most) in inputs.items()},
            "outputs": {t.name: {"dtype": t.dtype.name.lower(), "shape": list(t.shape)} for t in outputs},
        },
    )  # fmt: skip
    return Engine(bytes(plan), info, _inspect(trt, bytes(plan)))


def with_own_plugin(library: Library, path: str, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, as it is or, where it has a `FusedNMS` node and no library with that plugin is open, for an engine that carries it.

    Raises:
        UnsupportedByBackendError: this version does not carry plugins in engines.
    """
    if all(node.op_type != PLUGIN for node in model.graph.node) or PLUGIN in library.plugins():
        return model
    return carried(library.module, library.name, path, model)


def _check_plugins(library: Library, path: str, model: onnx.ModelProto) -> None:
    """Refuse plugin nodes that the library has no plugin for."""
    wanted = [node for node in model.graph.node if node.domain not in ("", "ai.onnx")]
    if not wanted:
        return
    present = library.plugins()
    if missing := [node for node in wanted if node.op_type not in present]:
        node = missing[0]
        raise UnsupportedByBackendError(
            f"{path}: {library.name} has no plugin {node.op_type} (node {node.name!r}); fuse the weights again with backend='portable', "
            "which needs none"
        )


def configure(
    library: Library, config: Any, settings: EngineSettings, model: onnx.ModelProto, progress: OnProgress | None
) -> None:
    """Set a builder's config.

    Raises:
        ConfigError: this version has no such setting.
    """
    trt = library.module
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace << 20)
    if settings.version_compatible:
        config.set_flag(library.flag("VERSION_COMPATIBLE", "version-compatible engines (TensorRT 8.6 has)"))
    if settings.hardware_compatible:
        levels = getattr(trt, "HardwareCompatibilityLevel", None)
        if levels is None:
            raise ConfigError(
                f"{library.name} has no hardware-compatible engines (TensorRT 8.6 has); leave it out, or take a newer version"
            )
        config.hardware_compatibility_level = levels.AMPERE_PLUS
    if settings.compute_capabilities:
        if not hasattr(config, "set_compute_capability"):
            raise ConfigError(f"{library.name} builds for the GPU that it runs on; leave the compute capability out")
        capabilities = _capabilities(library, settings.compute_capabilities)
        config.num_compute_capabilities = len(capabilities)
        for i, capability in enumerate(capabilities):
            config.set_compute_capability(capability, i)
    if not library.strongly_typed:  # where types are the builder's to choose, it has to be let
        operators = {node.op_type for node in model.graph.node}
        if any(item.data_type == HALF for item in model.graph.initializer):
            config.set_flag(library.flag("FP16", "half precision"))
        if "QuantizeLinear" in operators:
            config.set_flag(library.flag("INT8", "int8"))
    if progress is not None and hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, progress)


def _timing_cache(library: Library, config: Any, settings: EngineSettings) -> Any:
    """The timing cache that the build fills, read from its file where there is one; None where none is asked for."""
    if settings.timing_cache is None:
        return None
    there = settings.timing_cache.is_file()
    old = read_regular(settings.timing_cache, DEFAULT_LIMITS.max_file_bytes) if there else b""
    cache = config.create_timing_cache(old)
    if cache is None or not config.set_timing_cache(cache, False):
        raise SourceError(
            f"{settings.timing_cache}: not a timing cache that {library.name} takes on this machine; name another file"
        )
    return cache


def parse(library: Library, network: Any, logger: Any, model: onnx.ModelProto, path: str) -> None:
    """Fill the network from the model.

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
    cure = "; ".join(cures) or f"it says: {errors[0].desc()}"
    raise UnsupportedByBackendError(f"{path}: {library.name} does not take {first}{more}; {cure}")


def _node_of(error: Any, model: onnx.ModelProto) -> tuple[str, str] | None:
    """Operator and name of the node that an error is about: as it says, or (TensorRT 8) by its number in the graph."""
    if hasattr(error, "node_operator"):
        return (error.node_operator(), error.node_name()) if error.node_operator() else None
    place = error.node()
    if not 0 <= place < len(model.graph.node):
        return None
    return model.graph.node[place].op_type, model.graph.node[place].name


def _profile_shapes(
    path: str, name: str, shape: tuple[int, ...], settings: EngineSettings, model: onnx.ModelProto
) -> tuple[list[int], ...]:
    """Least, usual and most shape of an input: its first size is the batch's, its third and fourth are an image's."""
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
                f"{path}: {what} is {','.join(map(str, sizes))}, but the file's is fixed at {shape[axis]}; leave it out, or fuse the "
                "weights again with an open one"
            )
    if any(size < 0 and (axis not in named or (axis > 0 and len(shape) != 4)) for axis, size in enumerate(shape)):
        raise SourceError(
            f"{path}: input {name!r} has the shape {list(shape)} (-1: open); expected an open batch, and open sides of an image at most"
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
    """A logger that keeps what the builder says, as ``text``."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps what the builder says, for the message of an error."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(text)

        @property
        def text(self) -> str:
            return " ".join(self.errors[-2:])[:600] or "it does not say why"

    return Logger()


def _monitor(trt: Any, progress: OnProgress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes the builder's phases on."""

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
    """What the engine inspector says of the layers; None without a GPU to open the engine on."""
    runtime = trt.Runtime(make_logger(trt))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return None
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
