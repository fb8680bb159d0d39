"""Checks a graph for TensorRT, without TensorRT and without a GPU.

TensorRT-RTX has the same ONNX parser as TensorRT, but no plugins. Therefore the check has three steps:

1. Remove the plugin node. Its inputs become outputs of the graph, and its outputs become inputs.
2. Parse the rest of the graph with TensorRT-RTX.
3. Compare the plugin node and its inputs with the published interface of the plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from fusenms.engines.nvidia import make_logger, parse
from fusenms.engines.rtx import load_rtx
from fusenms.errors import SourceError, UnsupportedByBackendError
from fusenms.fusion.backends.plugin import DOMAIN as OWN_DOMAIN
from fusenms.fusion.backends.plugin import INPUTS, OUTPUTS, VERSION, Settings
from fusenms.fusion.backends.plugin import PLUGIN as OWN_PLUGIN
from fusenms.fusion.backends.trt import DOMAIN, PLUGIN
from fusenms.onnx_reading.files import read_onnx

FLOAT_KIND, INT_KIND, STRING_KIND = onnx.AttributeProto.FLOAT, onnx.AttributeProto.INT, onnx.AttributeProto.STRING
ATTRIBUTES: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "score_threshold": (FLOAT_KIND, lambda x: x >= 0),
    "iou_threshold": (FLOAT_KIND, lambda x: 0 <= x <= 1.0001),  # a value above 1 disables suppression
    "max_output_boxes": (INT_KIND, lambda x: x > 0),
    "background_class": (INT_KIND, lambda x: x >= -1),
    "score_activation": (INT_KIND, lambda x: x in (0, 1)),
    "class_agnostic": (INT_KIND, lambda x: x in (0, 1)),
    "box_coding": (INT_KIND, lambda x: x in (0, 1)),
    "plugin_version": (STRING_KIND, lambda x: x == b"1"),
    "plugin_namespace": (STRING_KIND, lambda x: x == b""),
}
"""Type and range of the attributes of the plugin. Source: plugin/efficientNMSPlugin/README.md of NVIDIA/TensorRT."""

MOST_CLASSES = 4096


@dataclass(frozen=True)
class Checked:
    """The result of a check: the parser, the number of nodes that it accepted, and the plugin (None if there is none)."""

    parser: str
    nodes: int
    plugin: str | None

    @property
    def summary(self) -> str:
        beside = f" except {self.plugin}, which conforms to its published interface" if self.plugin else ""
        return f"the ONNX parser of {self.parser} accepts all {self.nodes} nodes{beside}"


@dataclass(frozen=True)
class _Interface:
    """The interface of a plugin.

    Attributes:
        rows: name of the attribute with the number of output rows ``K``.
        kinds: element types of the outputs.
        shapes: shapes of the outputs.
        check_node: checks a node of the plugin.
        check_inputs: checks the inputs of a node.
    """

    rows: str
    kinds: tuple[int, ...]
    shapes: tuple[tuple[Any, ...], ...]
    check_node: Callable[[str, onnx.NodeProto], None]
    check_inputs: Callable[[str, onnx.NodeProto, dict[str, Any]], None]


def check_trt_graph(path: str) -> Checked:
    """Check an ONNX file.

    Raises:
        BackendUnavailableError: TensorRT-RTX, whose parser is used, is not installed.
        UnsupportedByBackendError: the parser refuses a node, or the plugin node breaks the plugin's interface.
        SourceError: the file cannot be read, or has several plugin nodes.
    """
    library = load_rtx()
    rtx = library.module
    model = read_onnx(Path(path))
    plugins = [node for node in model.graph.node if node.op_type in PLUGINS]
    if len(plugins) > 1:
        raise SourceError(f"{path}: found {len(plugins)} plugin nodes; expected at most one")
    for node in plugins:
        PLUGINS[node.op_type].check_node(path, node)
        model = _opened(model, node)
    logger = make_logger(rtx)
    network = rtx.Builder(logger).create_network(library.network_flags())
    parse(library, network, logger, model, path)
    for node in plugins:
        ends = [network.get_output(i) for i in range(network.num_outputs)]
        starts = [network.get_input(i) for i in range(network.num_inputs)]
        PLUGINS[node.op_type].check_inputs(path, node, {tensor.name: tensor for tensor in (*starts, *ends)})
    return Checked(library.name, len(model.graph.node), plugins[0].op_type if plugins else None)


def _opened(model: onnx.ModelProto, plugin: onnx.NodeProto) -> onnx.ModelProto:
    """The model without the plugin node. Its inputs become outputs of the graph, and its outputs become inputs."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    graph, interface = opened.graph, PLUGINS[plugin.op_type]
    graph.node.remove(next(node for node in graph.node if node.op_type == plugin.op_type))
    sizes = {"K": next(a.i for a in plugin.attribute if a.name == interface.rows)}
    kept = [
        entry for entry in graph.output if entry.name not in plugin.output
    ]  # outputs of the plugin are not outputs of the rest
    del graph.output[:]
    graph.output.extend(kept)
    read = {name for node in graph.node for name in node.input}
    for name, kind, shape in zip(plugin.output, interface.kinds, interface.shapes, strict=True):
        if name in read:
            shape = tuple(sizes.get(size, size) for size in shape)
            graph.input.append(helper.make_tensor_value_info(name, kind, shape))
    present = {entry.name for entry in (*graph.input, *graph.output)}
    inputs = [name for name in dict.fromkeys(plugin.input) if name not in present]
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs)
    return opened


def _check_attributes(path: str, plugin: onnx.NodeProto) -> None:
    found = {attribute.name: attribute for attribute in plugin.attribute}
    problems = [f"{name} is missing" for name in ATTRIBUTES if name not in found]
    for name, attribute in found.items():
        if name not in ATTRIBUTES:
            problems.append(f"{name} is not an attribute of the plugin")
            continue
        kind, allowed = ATTRIBUTES[name]
        value = helper.get_attribute_value(attribute)
        if attribute.type != kind or not allowed(value):
            problems.append(f"{name} is {value!r}")
    if plugin.domain != DOMAIN:
        problems.append(f"its domain is {plugin.domain!r}, not {DOMAIN!r}")
    if (len(plugin.input), len(plugin.output)) != (2, 4):
        problems.append(
            f"it has {len(plugin.input)} inputs and {len(plugin.output)} outputs, not 2 (boxes, scores) and 4"
        )
    _refuse(path, plugin, problems)


def _check_inputs(path: str, plugin: onnx.NodeProto, tensors: dict[str, Any]) -> None:
    boxes, scores = (tensors[name] for name in plugin.input)
    shapes = [tuple(boxes.shape), tuple(scores.shape)]
    problems = [f"{t.name} is {t.dtype.name}" for t in (boxes, scores) if t.dtype.name not in ("FLOAT", "HALF")]
    if len(shapes[0]) != 3 or shapes[0][2] != 4:
        problems.append(f"boxes are {list(shapes[0])}, not [batch, candidates, 4]")
    if plugin.input[0] == plugin.input[1]:
        problems.append(f"{plugin.input[0]} is used for both boxes and scores")
    background = next(a.i for a in plugin.attribute if a.name == "background_class")
    if len(shapes[1]) == 3 and background >= shapes[1][2]:
        problems.append(f"background_class is {background}, but there are {shapes[1][2]} classes")
    if len(shapes[1]) != 3 or shapes[1][1] != shapes[0][1] or not 0 < shapes[1][2] <= MOST_CLASSES:
        problems.append(f"scores are {list(shapes[1])}, not [batch, {shapes[0][1]}, classes]")
    _refuse(path, plugin, problems)


def _check_fused(path: str, plugin: onnx.NodeProto) -> None:
    try:
        Settings.of_node(plugin)
    except SourceError as error:
        raise UnsupportedByBackendError(f"{path}: {error}") from error
    own = {a.name: helper.get_attribute_value(a) for a in plugin.attribute if a.name.startswith("plugin_")}
    problems = [] if plugin.domain == OWN_DOMAIN else [f"its domain is {plugin.domain!r}, not {OWN_DOMAIN!r}"]
    if own != {"plugin_version": VERSION.encode(), "plugin_namespace": OWN_DOMAIN.encode()}:
        problems.append(f"its version and namespace are {own}")
    if (len(plugin.input), len(plugin.output)) != (len(INPUTS), len(OUTPUTS)):
        problems.append(
            f"it has {len(plugin.input)} inputs and {len(plugin.output)} outputs, not {INPUTS} and {OUTPUTS}"
        )
    _refuse(path, plugin, problems)


def _check_fused_inputs(path: str, plugin: onnx.NodeProto, tensors: dict[str, Any]) -> None:
    settings, problems = Settings.of_node(plugin), []
    given = {name: tensors[tensor] for name, tensor in zip(INPUTS, plugin.input, strict=True)}
    for name in INPUTS[1:]:
        axis, width, start = getattr(settings, name)
        tensor, shape = given[name], tuple(given[name].shape)
        if axis and (len(shape) != 3 or shape[axis] != width or start >= width):
            problems.append(f"{name} is {list(shape)}, not three sizes with {width} channels on axis {axis}")
        if tensor.dtype.name not in ("FLOAT", "HALF") or tensor.dtype != given["classes"].dtype:
            problems.append(f"{name} is {tensor.dtype.name}, and classes {given['classes'].dtype.name}")
    _refuse(path, plugin, problems)


def _refuse(path: str, plugin: onnx.NodeProto, problems: list[str]) -> None:
    if problems:
        raise UnsupportedByBackendError(
            f"{path}: node {plugin.name!r} does not conform to the interface of {plugin.op_type}: {'; '.join(problems)}. "
            "Fuse the weights again"
        )


PLUGINS = {
    PLUGIN: _Interface(
        "max_output_boxes",
        (TensorProto.INT32, TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT32),
        (("batch", 1), ("batch", "K", 4), ("batch", "K"), ("batch", "K")),
        _check_attributes,
        _check_inputs,
    ),
    OWN_PLUGIN: _Interface(
        "max_detections",
        (TensorProto.INT32, TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT32),
        (("batch", 1), ("batch", "K", None), ("batch", "K"), ("batch", "K"), ("batch", "K")),
        _check_fused,
        _check_fused_inputs,
    ),
}
"""Interfaces by operator."""
