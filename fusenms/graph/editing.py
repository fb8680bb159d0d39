"""Edit a model as a value: take a part, show inner tensors, rename, change, remove, insert and replace nodes.

Each function takes a model and returns another one. Metadata, opset imports and functions stay; unused nodes go.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from fusenms.errors import ConfigError
from fusenms.graph.custom_ops import KNOWN_DOMAINS
from fusenms.graph.model import declare_optional_inputs


@dataclass(frozen=True)
class Op:
    """An operator for `insert` and `replace`.

    Attributes:
        op: its type, as ``Clip``, or with a domain, as ``com.example::Fold``.
        inputs: further inputs behind the first one: names of tensors, or numbers and lists of numbers, which become float32 constants.
        attributes: its attributes.
    """

    op: str
    inputs: tuple[Any, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        domain, _, name = self.op.rpartition("::") if isinstance(self.op, str) else ("", "", "")
        if not name or not (domain or "::" not in self.op):
            raise ConfigError(f"op is {self.op!r}; expected the type of an operator, as 'Clip' or 'com.example::Fold'")


def exposed(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """Return the model with inner tensors as further outputs, with the types and shapes that ONNX infers.

    Raises:
        ConfigError: there is no such tensor outside of subgraphs.
    """
    known = _tensor_names(model)
    inferred = {entry.name: entry for entry in _inferred(model).graph.value_info}
    copy = _copy(model)
    present = {entry.name for entry in copy.graph.output}
    inputs = {entry.name: entry for entry in copy.graph.input}
    for name in dict.fromkeys(tensors):
        if name not in known:
            raise ConfigError(_unknown("tensor", name, known))
        if name not in present:
            entry = inferred.get(name) or inputs.get(name) or onnx.helper.make_empty_tensor_value_info(name)
            copy.graph.output.append(entry)
    return copy


def extracted(model: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """Return the part of a model from some tensors to others.

    Raises:
        ConfigError: there is no such tensor, no output, or the outputs depend on an input of the model that is not among ``inputs``.
    """
    if not outputs:
        raise ConfigError("outputs is empty; expected names of tensors")
    known = _tensor_names(model)
    for name in (*inputs, *outputs):
        if name not in known:
            raise ConfigError(_unknown("tensor", name, known))
    graph = gs.import_onnx(_inferred(model))
    tensors = graph.tensors()
    own = [tensor.name for tensor in graph.inputs]
    for name in inputs:
        _detach(tensors[name])
    graph.inputs = [tensors[name] for name in dict.fromkeys([*inputs, *own])]
    graph.outputs = [tensors[name] for name in dict.fromkeys(outputs)]
    graph.cleanup(
        recurse_subgraphs=False, remove_unused_graph_inputs=True
    ).toposort()  # a loop has inputs that its body may not use
    left = {tensor.name for tensor in graph.inputs}
    if missing := [name for name in own if name in left and name not in inputs]:
        raise ConfigError(f"outputs depend on {', '.join(missing)} too; add it to inputs, or choose inputs behind it")
    if idle := [name for name in inputs if name not in left]:
        raise ConfigError(f"inputs {', '.join(idle)} play no part in {', '.join(outputs)}; leave them out")
    return _exported(graph, model)


def renamed(model: onnx.ModelProto, names: Mapping[str, str]) -> onnx.ModelProto:
    """Return the model with tensors renamed: old name to new one.

    Raises:
        ConfigError: there is no such tensor, or the new name is taken or empty.
    """
    known = _tensor_names(model)
    graph = gs.import_onnx(model)
    tensors = graph.tensors()
    for old, new in names.items():
        if old not in known:
            raise ConfigError(_unknown("tensor", old, known))
        if not new or (new in known and new not in names):
            raise ConfigError(
                f"rename of {old!r} to {new!r}: {'another tensor has that name' if new else 'the name is empty'}"
            )
    if len(set(names.values())) < len(names):
        raise ConfigError("rename gives two tensors the same name")
    for old, new in names.items():
        tensors[old].name = new
    return _exported(graph, model)


def with_attributes(model: onnx.ModelProto, attributes: Mapping[tuple[str, str], Any]) -> onnx.ModelProto:
    """Return the model with attributes of nodes set: (node, attribute) to a value; None removes it.

    Raises:
        ConfigError: there is no such node.
    """
    graph = gs.import_onnx(model)
    for (node, name), value in attributes.items():
        found = _node(graph, node)
        if value is None:
            found.attrs.pop(name, None)
        else:
            found.attrs[name] = _value(value)
    return _exported(graph, model)


def without_nodes(model: onnx.ModelProto, nodes: Iterable[str]) -> onnx.ModelProto:
    """Return the model without some nodes: what read their output reads their first input.

    Raises:
        ConfigError: there is no such node, or it has no input, or several outputs that are used.
    """
    graph = gs.import_onnx(model)
    for name in nodes:
        node = _node(graph, name)
        used = [t for t in node.outputs if t.outputs or any(t is output for output in graph.outputs)]
        if not node.inputs or node.inputs[0].is_empty() or len(used) > 1:
            raise ConfigError(f"node {name!r} cannot be removed: expected a first input, and one output that is used")
        for tensor in used:
            if any(tensor is output for output in graph.outputs) or _in_subgraphs(graph, tensor):
                node.op, node.domain, node.attrs, node.inputs = "Identity", None, {}, [node.inputs[0]]
                continue
            for reader in list(tensor.outputs):
                reader.inputs = [node.inputs[0] if one is tensor else one for one in reader.inputs]
            node.outputs.clear()
    return _exported(graph, model)


def with_inserted(model: onnx.ModelProto, inserted: Mapping[str, Op]) -> onnx.ModelProto:
    """Return the model with operators inserted behind tensors: what read the tensor reads the operator's result.

    An output of the model keeps its name; the tensor before the operator is then ``NAME/before``.

    Raises:
        ConfigError: there is no such tensor.
    """
    known = _tensor_names(model)
    graph = gs.import_onnx(model)
    for name, op in inserted.items():
        if name not in known:
            raise ConfigError(_unknown("tensor", name, known))
        tensors = graph.tensors()
        tensor = tensors[name]
        made = gs.Variable(_free(f"{name}/{op.op.rpartition('::')[2]}", tensors), dtype=tensor.dtype, shape=None)
        for reader in list(tensor.outputs):
            reader.inputs = [made if one is tensor else one for one in reader.inputs]
        if any(tensor is output for output in graph.outputs):
            graph.outputs = [made if output is tensor else output for output in graph.outputs]
            tensor.name, made.name, made.shape = _free(f"{name}/before", tensors), name, tensor.shape
        graph.nodes.append(_made(graph, op, tensor, [made]))
    return _exported(graph, model)


def with_replaced(model: onnx.ModelProto, replaced: Mapping[str, Op]) -> onnx.ModelProto:
    """Return the model with other operators in place of nodes: with the node's first input and its outputs.

    Raises:
        ConfigError: there is no such node.
    """
    graph = gs.import_onnx(model)
    for name, op in replaced.items():
        node = _node(graph, name)
        first, outputs = node.inputs[0] if node.inputs else None, list(node.outputs)
        node.outputs.clear()
        node.inputs.clear()
        graph.nodes.remove(node)
        graph.nodes.append(_made(graph, op, first, outputs, name=node.name))
    return _exported(graph, model)


def _free(name: str, taken: Iterable[str]) -> str:
    """The name, or, if it is taken, with the first number that is free."""
    names = set(taken)
    numbered = (f"{name}_{n}" for n in itertools.count(2))
    return name if name not in names else next(one for one in numbered if one not in names)


def _made(graph: gs.Graph, op: Op, first: gs.Tensor | None, outputs: list[gs.Tensor], name: str = "") -> gs.Node:
    domain, _, kind = op.op.rpartition("::")
    tensors, inputs = graph.tensors(), [] if first is None else [first]
    for i, value in enumerate(op.inputs):
        if isinstance(value, str):
            if value not in tensors:
                raise ConfigError(_unknown("tensor", value, tensors))
            inputs.append(tensors[value])
        else:
            inputs.append(gs.Constant(_free(f"{outputs[0].name}/{kind}/{i}", tensors), np.asarray(value, np.float32)))
    attributes = {key: _value(value) for key, value in op.attributes.items()}
    if domain and domain not in {one.domain for one in graph.import_domains or ()}:
        graph.import_domains = [*(graph.import_domains or ()), onnx.helper.make_opsetid(domain, 1)]
    name = name or _free(f"{outputs[0].name}/{kind}", {node.name for node in graph.nodes})
    return gs.Node(kind, name, attributes, inputs, outputs, domain=domain or None)


def _value(value: Any) -> Any:
    """Attributes from JSON: a list of whole numbers and fractions is one of fractions."""
    if isinstance(value, list) and any(isinstance(one, float) for one in value):
        return [float(one) for one in value]
    return value


def _node(graph: gs.Graph, name: str) -> gs.Node:
    """The node of this name, or the one that makes a tensor of this name."""
    by_name = [node for node in graph.nodes if node.name == name] or [
        node for node in graph.nodes if any(tensor.name == name for tensor in node.outputs)
    ]
    if len(by_name) != 1:
        known = [node.name for node in graph.nodes if node.name] + [
            t.name for node in graph.nodes for t in node.outputs
        ]
        found = f"{len(by_name)} nodes are called {name!r}; name a tensor that it makes" if by_name else None
        raise ConfigError(found or _unknown("node", name, known))
    return by_name[0]


def _in_subgraphs(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether a subgraph of a node uses a tensor."""
    inner = [value for node in graph.nodes for value in node.attrs.values() if isinstance(value, gs.Graph)]
    return any(
        any(one.name == tensor.name for node in sub.nodes for one in node.inputs)
        or any(one.name == tensor.name for one in sub.outputs)
        or _in_subgraphs(sub, tensor)
        for sub in inner
    )


def _detach(tensor: gs.Tensor) -> None:
    """Let nothing make a tensor; a node with several outputs keeps their number."""
    for node in list(tensor.inputs):
        node.outputs[node.outputs.index(tensor)] = gs.Variable(f"{tensor.name}/cut")


def _tensor_names(model: onnx.ModelProto) -> set[str]:
    """Names of the tensors of a graph, without constants and those of subgraphs."""
    graph = model.graph
    constants = {item.name for item in graph.initializer}
    return ({entry.name for entry in graph.input} - constants) | {
        name for node in graph.node for name in node.output if name
    }


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    advice = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
    return f"there is no {kind} {name!r} in the graph{advice}"


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with what ONNX infers of types and shapes; unchanged where it cannot."""
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # an operator of another domain, a model above 2 GB
        return model


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _without_external_data(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with inputs instead of weights that are in other files, for the checker, which would look for these files."""
    outside = [one for one in model.graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL]
    if not outside:
        return model
    copy, names = _copy(model), {one.name for one in outside}
    kept = [one for one in copy.graph.initializer if one.name not in names]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    given = {entry.name for entry in copy.graph.input}
    copy.graph.input.extend(
        onnx.helper.make_tensor_value_info(one.name, one.data_type, one.dims)
        for one in outside
        if one.name not in given
    )
    return copy


def _exported(graph: gs.Graph, model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph as a model with the metadata of another one, and with new types and shapes of inner tensors."""
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    made = gs.export_onnx(graph, do_type_check=False)
    made.ir_version = model.ir_version
    declare_optional_inputs(made, model)
    foreign = {name for node in made.graph.node if node.domain not in KNOWN_DOMAINS for name in node.output}
    kept = [entry for entry in model.graph.value_info if entry.name in foreign]
    del made.graph.value_info[:]
    made.graph.value_info.extend(kept)
    del made.metadata_props[:]
    made.metadata_props.extend(model.metadata_props)
    made.producer_name, made.producer_version = model.producer_name, model.producer_version
    try:
        onnx.checker.check_model(_without_external_data(made))
    except onnx.checker.ValidationError as error:
        raise ConfigError(f"the edited graph is no valid model: {error}") from error
    return _inferred(made)
