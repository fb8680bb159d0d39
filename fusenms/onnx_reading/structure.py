"""Checks the parsed message: every field that fusenms, onnx or ONNX Runtime uses must conform to the format.

The rules concern the file format, not detectors: sizes of tensors and of their data, names, types, attributes, graphs without cycles,
functions without recursion, loops that can be interrupted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from fusenms.limits import Limits
from fusenms.onnx_reading.loops import check_loops

if TYPE_CHECKING:
    import onnx

LONGEST_NAME = 4096
"""Maximum length of a name in a graph, in characters."""
LARGEST_SIZE = 2**31 - 1
"""Maximum size of a dimension."""
NAME_FIELDS = frozenset(
    ("name", "op_type", "domain", "overload", "input", "output", "dim_param", "ref_attr_name", "attribute", "key", "denotation")
)  # fmt: skip
"""Text fields that hold names. All other text fields (doc strings, values of metadata) may hold any text."""
STANDARD = ("", "ai.onnx")


def check_structure(model: onnx.ModelProto, limits: Limits, *, external: bool = False) -> None:
    """Check a parsed model after its external data was read, or, with ``external``, was left where it is.

    Raises:
        ValueError: a field does not conform to the format, or exceeds a limit.
        UnicodeDecodeError: a text is not UTF-8.
    """
    if model.training_info:
        raise ValueError("holds training information; expected a model for inference")
    if not 1 <= model.ir_version <= LARGEST_SIZE:
        raise ValueError(f"has the format version {model.ir_version}; expected 1 or higher")
    _check_metadata(model, limits)
    _check_messages(model, limits, external)
    versions = Counter(entry.domain if entry.domain not in STANDARD else "" for entry in model.opset_import)
    if twice := [domain for domain, count in versions.items() if count > 1]:
        raise ValueError(f"imports the operator set {twice[0]!r} twice; expected one version of each")
    _check_functions(model, limits)
    _check_graph(model.graph, {}, 0, limits)
    check_loops(model)


def name_of(tensor: onnx.TensorProto) -> str:
    """The name of a tensor, for messages."""
    return repr(tensor.name[:100]) if tensor.name else "a tensor without a name"


def elements_of(tensor: onnx.TensorProto, limits: Limits) -> int:
    """Number of elements, computed from the dimensions.

    Raises:
        ValueError: a dimension is negative, or there are too many elements.
    """
    dims = list(tensor.dims)
    if any(dim < 0 for dim in dims):
        raise ValueError(f"tensor {name_of(tensor)} has dimensions {dims[:8]}; expected none below 0")
    if len(dims) > 64 or (count := math.prod(dims)) > limits.max_tensor_elements:
        raise ValueError(
            f"tensor {name_of(tensor)} has dimensions {dims[:8]}; expected at most {limits.max_tensor_elements} elements "
            "(max_tensor_elements)"
        )
    return count


def bytes_of(tensor: onnx.TensorProto, limits: Limits) -> int:
    """Size of the raw data in bytes, computed from type and dimensions.

    Raises:
        ValueError: the type is unknown or has no raw data, or the dimensions are invalid.
    """
    bits = _bits().get(tensor.data_type)
    if bits is None:
        raise ValueError(
            f"tensor {name_of(tensor)} has the element type {type_name(tensor.data_type)}; expected one with a fixed size"
        )
    return -(-elements_of(tensor, limits) * bits // 8)


@cache
def _bits() -> dict[int, int]:
    """Bits per element in raw data, by element type."""
    import onnx

    wide = {
        8: ("UINT8", "INT8", "BOOL", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0"),
        16: ("UINT16", "INT16", "FLOAT16", "BFLOAT16"),
        32: ("FLOAT", "INT32", "UINT32"),
        64: ("INT64", "DOUBLE", "UINT64", "COMPLEX64"),
        128: ("COMPLEX128",),
        4: ("UINT4", "INT4", "FLOAT4E2M1"),
    }
    kinds = onnx.TensorProto.DataType
    return {kinds.Value(name): bits for bits, names in wide.items() for name in names if name in kinds.keys()}  # noqa: SIM118


@cache
def _typed_fields() -> dict[int, tuple[str, float]]:
    """The field that holds the elements of a tensor without raw data, and its entries per element, by element type."""
    import onnx

    fields = {
        "float_data": {"FLOAT": 1, "COMPLEX64": 2},
        "double_data": {"DOUBLE": 1, "COMPLEX128": 2},
        "int64_data": {"INT64": 1},
        "uint64_data": {"UINT32": 1, "UINT64": 1},
        "string_data": {"STRING": 1},
    }
    found = {
        onnx.TensorProto.DataType.Value(name): (field, count)
        for field, counts in fields.items()
        for name, count in counts.items()
    }
    return {kind: ("int32_data", 0.5 if bits == 4 else 1.0) for kind, bits in _bits().items()} | found


def type_name(kind: int) -> str:
    """Name of an element type, or its number if it is unknown."""
    import onnx

    values = onnx.TensorProto.DataType.DESCRIPTOR.values_by_number
    return values[kind].name if kind in values else str(kind)


def _check_tensor(tensor: onnx.TensorProto, limits: Limits, external: bool) -> None:
    """Check that the data of a tensor is in the field of its type only, and that its size matches the dimensions."""
    import onnx

    kind = tensor.data_type
    if kind != onnx.TensorProto.STRING:
        bytes_of(tensor, limits)  # raises if the type is unknown
    count = elements_of(tensor, limits)
    if external and tensor.data_location == onnx.TensorProto.EXTERNAL and not tensor.HasField("raw_data"):
        return
    if tensor.HasField("segment") or tensor.external_data or tensor.data_location != onnx.TensorProto.DEFAULT:
        raise ValueError(f"tensor {name_of(tensor)} is segmented or external; expected its data in place")
    field, each = _typed_fields()[kind]
    others = [
        name
        for name in ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
        if name != field
    ]
    if wrong := [name for name in others if len(getattr(tensor, name))]:
        raise ValueError(
            f"tensor {name_of(tensor)} of type {type_name(kind)} has {wrong[0]}; expected raw_data or {field}"
        )
    typed = len(getattr(tensor, field))
    if tensor.HasField("raw_data") and not (typed and not len(tensor.raw_data)):
        found, expected = len(tensor.raw_data), bytes_of(tensor, limits) if kind != onnx.TensorProto.STRING else 0
        if typed or kind == onnx.TensorProto.STRING:
            raise ValueError(
                f"tensor {name_of(tensor)} of type {type_name(kind)} has raw_data and {field}; expected one of them"
            )
        unit = "bytes"
    else:
        found, expected, unit = typed, math.ceil(count * each), f"entries of {field}"
    if found != expected:
        raise ValueError(
            f"tensor {name_of(tensor)} has {found} {unit}; expected {expected} for the type {type_name(kind)} and the dimensions "
            f"{list(tensor.dims)[:8]}"
        )


def _check_metadata(model: onnx.ModelProto, limits: Limits) -> None:
    size = sum(entry.ByteSize() for entry in model.metadata_props)
    if size > limits.max_metadata_bytes:
        raise ValueError(
            f"has {size} bytes of metadata; expected at most {limits.max_metadata_bytes} (max_metadata_bytes)"
        )
    keys = Counter(entry.key for entry in model.metadata_props)
    if twice := [key for key, count in keys.items() if count > 1]:
        raise ValueError(f"has the metadata {twice[0][:100]!r} twice; expected each key once")


def _check_messages(model: onnx.ModelProto, limits: Limits, external: bool) -> None:
    """Check all nested messages: text, tensors, types, dimensions."""
    import onnx

    tensor_name = onnx.TensorProto.DESCRIPTOR.full_name
    todo: list[Any] = [model]
    while todo:
        message = todo.pop()
        kind = message.DESCRIPTOR.full_name
        if kind == tensor_name:
            _check_name(message.name, "name")
            _ = message.doc_string
            _check_tensor(message, limits, external)
            todo += message.metadata_props
            continue
        if kind == "onnx.SparseTensorProto" or kind == "onnx.TypeProto.SparseTensor":
            raise ValueError("holds a sparse tensor; expected dense ones")
        if (
            kind == "onnx.TypeProto.Tensor"
            and message.elem_type not in (0, onnx.TensorProto.STRING)
            and message.elem_type not in _bits()
        ):
            raise ValueError(f"names the element type {type_name(message.elem_type)}; expected a known one")
        if kind == "onnx.TensorShapeProto.Dimension" and not 0 <= message.dim_value <= LARGEST_SIZE:
            raise ValueError(f"has a shape with the size {message.dim_value}; expected 0 to {LARGEST_SIZE}")
        for field, value in message.ListFields():
            if field.message_type is not None:
                todo += (value,) if hasattr(value, "ListFields") else value
            elif field.type == field.TYPE_STRING and field.name in NAME_FIELDS:
                for name in (value,) if isinstance(value, str) else value:
                    _check_name(name, field.name)


def _check_name(name: str, field: str) -> None:
    if len(name) > LONGEST_NAME:
        raise ValueError(f"has a text field {field!r} of {len(name)} characters; expected at most {LONGEST_NAME}")
    if not name.isprintable():
        raise ValueError(
            f"has the {field} {name[:100]!r} with characters that cannot be printed; expected no control characters"
        )


Functions = dict[tuple[str, str, str], "onnx.FunctionProto"]


def key_of(node: onnx.NodeProto) -> tuple[str, str, str]:
    """The key of the function that a node calls: domain, operator, overload."""
    return ("" if node.domain in STANDARD else node.domain, node.op_type, node.overload)


def functions_of(model: onnx.ModelProto) -> Functions:
    """The functions of a model, by key."""
    return {("" if f.domain in STANDARD else f.domain, f.name, f.overload): f for f in model.functions}


def _check_functions(model: onnx.ModelProto, limits: Limits) -> None:
    """Check that functions are not recursive. Count their nodes at each call."""
    functions = functions_of(model)
    if len(functions) != len(model.functions):
        raise ValueError("defines a function twice; expected each once")
    sizes: dict[tuple[str, str, str], int] = {}
    called: list[tuple[str, str, str]] = []

    def size(nodes: Iterable[onnx.NodeProto]) -> int:
        total = 0
        for node in nodes:
            total += 1
            if (key := key_of(node)) in functions:
                total += size_of_function(key)
            for graph in graphs_of(node):
                total += size(graph.node)
            if total > limits.max_nodes:
                raise ValueError(
                    f"has more than {limits.max_nodes} nodes with functions expanded; expected at most {limits.max_nodes} (max_nodes)"
                )
        return total

    def size_of_function(key: tuple[str, str, str]) -> int:
        if key not in sizes:
            if key in called:
                raise ValueError(f"has the function {key[1][:100]!r}, which calls itself; expected no recursion")
            if len(called) >= limits.max_nesting:
                raise ValueError(
                    f"has functions that call each other {len(called)} deep; expected at most {limits.max_nesting} (max_nesting)"
                )
            called.append(key)
            sizes[key] = size(functions[key].node)
            called.pop()
        return sizes[key]

    for key, function in functions.items():
        if not function.node or not key[0]:
            raise ValueError(
                f"has the function {key[1][:100]!r}, which has no nodes or replaces an ONNX operator; expected neither"
            )
        _check_nodes(function.node, f"function {key[1][:100]!r}", set(function.input), 0, limits, function=True)
        size_of_function(key)
    size(model.graph.node)


def graphs_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs inside a node: loop bodies and branches."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _check_graph(
    graph: onnx.GraphProto, outer: dict[str, str], depth: int, limits: Limits, *, function: bool = False
) -> None:
    if depth > limits.max_nesting:
        raise ValueError(f"has graphs nested {depth} deep; expected at most {limits.max_nesting} (max_nesting)")
    constants, inputs = [item.name for item in graph.initializer], [entry.name for entry in graph.input]
    where = "the graph" if depth == 0 else f"the inner graph {graph.name[:100]!r}"
    for kind, names in (
        ("initializer", constants),
        ("input", inputs),
        ("output", [entry.name for entry in graph.output]),
    ):
        if "" in names:
            raise ValueError(f"{where} has an {kind} without a name")
        if twice := [name for name, count in Counter(names).items() if count > 1 and (kind != "output" or depth == 0)]:
            raise ValueError(f"{where} has the {kind} {twice[0][:100]!r} twice; expected each name once")
    _check_nodes(graph.node, where, {*constants, *inputs}, depth, limits, function=function)


def _check_nodes(
    nodes: Iterable[onnx.NodeProto], where: str, given: set[str], depth: int, limits: Limits, *, function: bool = False
) -> None:
    nodes = list(nodes)
    made = dict[str, int]()
    for i, node in enumerate(nodes):
        _check_node(node, function)
        for name in filter(None, node.output):
            if name in made or name in given:
                raise ValueError(f"{where} makes the tensor {name[:100]!r} twice; expected each once")
            made[name] = i
        for inner in graphs_of(node):
            _check_graph(inner, {}, depth + 1, limits, function=function)
    _check_order(nodes, where, made)


def _check_order(nodes: list[onnx.NodeProto], where: str, made: dict[str, int]) -> None:
    """Check that the graph has no cycle."""
    waits = [{made[name] for name in _used(node) if name in made} for node in nodes]
    readers: list[list[int]] = [[] for _ in nodes]
    for i, before in enumerate(waits):
        for j in before:
            readers[j].append(i)
    missing = [len(before) for before in waits]
    ready = [i for i, count in enumerate(missing) if not count]
    done = 0
    while ready:
        done += 1
        for reader in readers[ready.pop()]:
            missing[reader] -= 1
            if not missing[reader]:
                ready.append(reader)
    if done < len(nodes):
        node = nodes[next(i for i, count in enumerate(missing) if count)]
        raise ValueError(f"{where} has a cycle through the node {node.name[:100]!r} ({node.op_type}); expected none")


def _used(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the tensors that a node reads, including those that its inner graphs read."""
    todo = [node]
    while todo:
        inner = todo.pop()
        yield from inner.input
        for graph in graphs_of(inner):
            yield from (entry.name for entry in graph.output)
            todo += graph.node


@cache
def _value_fields() -> dict[int, str]:
    """The field that holds the value of an attribute, by attribute type."""
    import onnx

    fields = {
        "FLOAT": "f", "INT": "i", "STRING": "s", "TENSOR": "t", "GRAPH": "g", "FLOATS": "floats", "INTS": "ints", "STRINGS": "strings",
        "TENSORS": "tensors", "GRAPHS": "graphs", "TYPE_PROTO": "tp", "TYPE_PROTOS": "type_protos",
    }  # fmt: skip
    return {onnx.AttributeProto.AttributeType.Value(kind): field for kind, field in fields.items()}


def _check_node(node: onnx.NodeProto, function: bool) -> None:
    where = f"node {node.name[:100]!r} ({node.op_type[:100]})"
    if not node.op_type:
        raise ValueError(f"node {node.name[:100]!r} has no operator")
    names = [attribute.name for attribute in node.attribute]
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"{where} has attributes without a name or with the same name; expected unique names")
    for attribute in node.attribute:
        what = f"{where} has the attribute {attribute.name[:100]!r}"
        field = _value_fields().get(attribute.type)
        if field is None:
            raise ValueError(f"{what} of the unknown type {attribute.type}; expected a type of ONNX")
        filled = {f.name for f, _ in attribute.ListFields()} - {"name", "type", "doc_string", "ref_attr_name"}
        if attribute.ref_attr_name:
            if not function or filled:
                raise ValueError(f"{what}, which refers to an attribute of a function; expected a value")
            continue
        if filled - {field} or (field in ("t", "g", "tp") and field not in filled):
            found = ", ".join(sorted(filled)) or "no value"
            raise ValueError(f"{what} with {found}; expected {field} for its type")
        for text in (attribute.s,) if field == "s" else attribute.strings if field == "strings" else ():
            text.decode()
    if node.op_type == "Constant" and node.domain in STANDARD and (len(node.attribute) != 1 or len(node.output) != 1):
        raise ValueError(f"{where} has {len(node.attribute)} attributes; expected one, its value")
