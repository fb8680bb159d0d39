"""Engines of TensorRT-RTX (`pip install tensorrt-rtx`). Building needs no GPU; running one does.

TensorRT-RTX has no plugins and no kernel for `NonMaxSuppression`, so the files it takes are those of backend ``portable`` and
models that need no suppression. Its networks are strongly typed: an engine computes in the types of its graph.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from fusenms import contract
from fusenms.artifacts import read_metadata, read_onnx
from fusenms.engines.base import Engine, EngineSettings, Sizes, describe
from fusenms.errors import (
    BackendUnavailableError,
    ConfigError,
    EngineBuildError,
    SourceError,
    UnsupportedByBackendError,
)
from fusenms.verification import Progress

CURES = {
    "NonMaxSuppression": "fuse the weights again with --backend portable",
    "NonZero": "fuse the weights again with --backend portable",
    "EfficientNMS_TRT": "fuse the weights again with --backend portable",
    "DynamicQuantizeLinear": "dynamic int8 files are for CPUs: take the float file that this one was made from",
    "ConvInteger": "dynamic int8 files are for CPUs: take the float file that this one was made from",
    "TopK": "TensorRT's TopK takes a fixed number of at most 3840: lower --max-candidates",
}
"""What to do about an operator that the parser refuses."""


def build_rtx(path: str, settings: EngineSettings, progress: Progress | None = None) -> Engine:
    """Build an engine of an ONNX file.

    Raises:
        BackendUnavailableError: TensorRT-RTX is not installed.
        UnsupportedByBackendError: it refuses an operator; the message names the node, and what to do.
        EngineBuildError: it cannot build the network; the message has its words.
        ConfigError: a compute capability is not one that it builds for, or a size is asked for that the file does not leave open.
        SourceError: the file cannot be read, or has an input that no setting gives a size.
    """
    rtx = load_rtx()
    model = read_onnx(Path(path))
    refuse_nms(path, model, rtx.__version__)
    capabilities = _capabilities(rtx, settings.compute_capabilities)
    logger = make_logger(rtx)
    builder = rtx.Builder(logger)
    network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parse(rtx, network, logger, model, path)
    config = builder.create_builder_config()
    config.profiling_verbosity = rtx.ProfilingVerbosity.DETAILED
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for i, capability in enumerate(capabilities):
            config.set_compute_capability(capability, i)
    if progress is not None:
        config.progress_monitor = _monitor(rtx, progress)
    profile, inputs = builder.create_optimization_profile(), {}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        inputs[tensor.name] = shapes = _profile_shapes(path, tensor.name, tuple(tensor.shape), settings, model)
        profile.set_shape(tensor.name, *shapes)
    if any(-1 in tuple(network.get_input(i).shape) for i in range(network.num_inputs)):
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        cure = next((f". {cure}" for operator, cure in CURES.items() if operator in logger.text), "")
        if "current" in settings.compute_capabilities:
            cure += '. Compute capability "current" is that of this machine\'s GPU: is there one?'
        raise EngineBuildError(f"{path}: TensorRT-RTX {rtx.__version__} cannot build the engine: {logger.text}{cure}")
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    info = describe(
        Path(path), model, bytes(plan),
        {
            "name": "TensorRT-RTX", "version": rtx.__version__, "layers": network.num_layers,
            "compute_capabilities": list(dict.fromkeys(settings.compute_capabilities)) or "the builder's choice",
        },
        {
            "inputs": {name: {"min": least, "opt": usual, "max": most} for name, (least, usual, most) in inputs.items()},
            "outputs": {t.name: {"dtype": t.dtype.name.lower(), "shape": list(t.shape)} for t in outputs},
        },
    )  # fmt: skip
    return Engine(bytes(plan), info, _inspect(rtx, bytes(plan)))


def refuse_nms(path: str, model: onnx.ModelProto, version: str) -> None:
    """Refuse what the parser takes and the builder does not: it has no kernel for the operator.

    Raises:
        UnsupportedByBackendError: the graph has a `NonMaxSuppression` node.
    """
    if node := next((node for node in model.graph.node if node.op_type == "NonMaxSuppression"), None):
        raise UnsupportedByBackendError(
            f"{path}: TensorRT-RTX {version} has no kernel for NonMaxSuppression (node {node.name!r}); {CURES['NonMaxSuppression']}"
        )


def load_rtx() -> Any:
    """The package `tensorrt_rtx`.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise BackendUnavailableError(
            f"TensorRT-RTX is not installed ({error}); install it with: pip install 'fusenms[rtx]'"
        ) from error
    return tensorrt_rtx


def parse(rtx: Any, network: Any, logger: Any, model: onnx.ModelProto, path: str) -> None:
    """Fill the network from the model.

    Raises:
        UnsupportedByBackendError: the parser refuses a node.
    """
    parser = rtx.OnnxParser(network, logger)
    if parser.parse(model.SerializeToString()):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    nodes = [(error.node_operator(), error.node_name()) for error in errors if error.node_operator()]
    if not nodes:
        said = errors[0].desc() if errors else logger.text
        raise UnsupportedByBackendError(f"{path}: TensorRT-RTX {rtx.__version__} cannot read the file: {said}")
    operators = Counter(operator for operator, _ in nodes)
    cures = list(dict.fromkeys(CURES[operator] for operator in operators if operator in CURES))
    first = ", ".join(f"{operator} (node {name!r})" for operator, name in nodes[:3])
    more = f" and {len(nodes) - 3} more nodes ({', '.join(operators)})" if len(nodes) > 3 else ""
    cure = "; ".join(cures) or f"it says: {errors[0].desc()}"
    raise UnsupportedByBackendError(f"{path}: TensorRT-RTX {rtx.__version__} does not take {first}{more}; {cure}")


def _profile_shapes(
    path: str, name: str, shape: tuple[int, ...], settings: EngineSettings, model: onnx.ModelProto
) -> tuple[list[int], ...]:
    """Least, usual and most shape of an input: its first size is the batch's, its third and fourth are a picture's."""
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
            f"{path}: input {name!r} has the shape {list(shape)} (-1: open); expected an open batch, and open sides of a picture at most"
        )
    return tuple([size if size >= 0 else named[axis][i] for axis, size in enumerate(shape)] for i in range(3))


def _capabilities(rtx: Any, names: tuple[str, ...]) -> list[Any]:
    known = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in rtx.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    known["current"] = rtx.ComputeCapability.CURRENT
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(
            f"compute capability is {', '.join(unknown)}; TensorRT-RTX {rtx.__version__} builds for {', '.join(known)}"
        )
    return [known[name] for name in dict.fromkeys(names)]


def make_logger(rtx: Any) -> Any:
    """A logger that keeps what the builder says, as ``text``."""

    class Logger(rtx.ILogger):  # type: ignore[misc]
        """Keeps what the builder says, for the message of an error."""

        def __init__(self) -> None:
            rtx.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= rtx.ILogger.ERROR:
                self.errors.append(text)

        @property
        def text(self) -> str:
            return " ".join(self.errors[-2:])[:600] or "it does not say why"

    return Logger()


def _monitor(rtx: Any, progress: Progress) -> Any:
    class Monitor(rtx.IProgressMonitor):  # type: ignore[misc]
        """Passes the builder's phases on."""

        def __init__(self) -> None:
            rtx.IProgressMonitor.__init__(self)
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


def _inspect(rtx: Any, plan: bytes) -> str | None:
    """What the engine inspector says of the layers; None without a GPU to open the engine on."""
    runtime = rtx.Runtime(make_logger(rtx))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return None
    return str(engine.create_engine_inspector().get_engine_information(rtx.LayerInformationFormat.JSON))
