"""Which convolutions of a network are quantized, which stay float32, and which operators between them are quantized too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

CONVOLUTIONS = ("Conv", "ConvTranspose")
ACTIVATIONS = ("Sigmoid", "Mul", "Relu", "LeakyRelu", "Clip")
BETWEEN = (*ACTIVATIONS, "Add", "Concat", "MaxPool", "AveragePool", "Resize", "Split")
"""Operators that run in int8 if they lie between quantized convolutions, so that the values need no conversion on their way."""
FEATURE_MAP = 4
"""Rank of ``[B, channels, height, width]``."""


@dataclass(frozen=True)
class Layer:
    """A convolution and the activation that reads it, by the names of their nodes."""

    name: str
    activation: tuple[str, ...] = ()

    @property
    def nodes(self) -> tuple[str, ...]:
        return (self.name, *self.activation)


@dataclass(frozen=True)
class Places:
    """Where a network is quantized.

    Attributes:
        layers: the convolutions that can be quantized, in the order of the graph.
        first, last: convolutions that stay float32: those that read the image, and those from which no other is reached.
        between: nodes of `BETWEEN` on feature maps that lead to a convolution.
        gates: inputs of a sigmoid that its product with the sigmoid reads too (SiLU).
    """

    layers: tuple[Layer, ...]
    first: tuple[Layer, ...]
    last: tuple[Layer, ...]
    between: tuple[str, ...]
    gates: frozenset[str]


def places(model: onnx.ModelProto) -> Places:
    """Find where a network, from its image to its head, can be quantized.

    1. Convolutions that read the image stay float32: they have three channels, which int8 kernels do not speed up.
    2. Convolutions that lead to no other one stay float32: their values are the head's.
    3. Attention, normalization and all else that is no convolution stays float32, but `BETWEEN` on feature maps.

    Nodes have unique names, and are sorted.
    """
    graph = _Graph(model)
    after, before = graph.lead_to_convolution(), graph.follow_convolution()
    layers = {name: Layer(name, graph.activation(name)) for name in graph.convolutions}
    first = tuple(layer for name, layer in layers.items() if name not in before)
    last = tuple(layer for name, layer in layers.items() if name not in after and name in before)
    fixed = {name for layer in (*first, *last) for name in layer.nodes}
    between = tuple(
        node.name
        for node in model.graph.node
        if node.op_type in BETWEEN and node.name in after and node.name not in fixed and graph.is_of_feature_maps(node)
    )
    middle = tuple(layer for layer in layers.values() if layer.name not in fixed)
    return Places(middle, first, last, between, frozenset(graph.gates()))


class _Graph:
    """A model by the producers and readers of its tensors."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._nodes = list(model.graph.node)
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self._nodes:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self._constants = {item.name for item in model.graph.initializer}
        self._maps = {
            entry.name
            for entry in (*inferred.value_info, *inferred.output, *inferred.input)
            if entry.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
            and len(entry.type.tensor_type.shape.dim) == FEATURE_MAP
        }
        self.convolutions = [
            node.name
            for node in self._nodes
            if node.op_type in CONVOLUTIONS and node.input[1] in self._constants and node.output[0] in self._maps
        ]

    def lead_to_convolution(self) -> set[str]:
        """Names of the nodes from which a convolution is reached."""
        convolutions, found = set(self.convolutions), set[str]()
        for node in reversed(self._nodes):
            for reader in self._read_by(node):
                if reader.name in convolutions or reader.name in found:
                    found.add(node.name)
        return found

    def follow_convolution(self) -> set[str]:
        """Names of the nodes that are reached from a convolution."""
        convolutions, found = set(self.convolutions), set[str]()
        for node in self._nodes:
            if node.name in convolutions or node.name in found:
                found.update(reader.name for reader in self._read_by(node))
        return found

    def activation(self, convolution: str) -> tuple[str, ...]:
        """Names of the nodes that make the activation of a convolution."""
        node = next(node for node in self._nodes if node.name == convolution)
        inside, names = {node.output[0]}, list[str]()
        for reader in self._nodes:
            read = {name for name in reader.input if name and name not in self._constants}
            if reader.op_type in ACTIVATIONS and read and read <= inside:
                inside.add(reader.output[0])
                names.append(reader.name)
        return tuple(names)

    def is_of_feature_maps(self, node: onnx.NodeProto) -> bool:
        """Whether a node computes feature maps from feature maps alone; a constant may be a bound or a size, not an operand."""
        one = node.op_type in ("Clip", "Resize", "Split")
        read = list(node.input[:1] if one else node.input)
        return all(name in self._maps and name not in self._constants for name in (*read, *node.output))

    def gates(self) -> Iterator[str]:
        """Tensors of which a SiLU is computed."""
        for node in self._nodes:
            if node.op_type == "Sigmoid":
                pair = {node.input[0], node.output[0]}
                if any(reader.op_type == "Mul" and set(reader.input) == pair for reader in self._read_by(node)):
                    yield node.input[0]

    def _read_by(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        for name in node.output:
            yield from self._readers.get(name, ())
