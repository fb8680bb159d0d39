"""Scans the encoded message before it is parsed.

An empty message takes two bytes in a file and about a hundred bytes once parsed, so a small file can fill the memory. The scan walks the
encoding (tag, length, value) without building objects, and stops when a limit is exceeded. Tensor data is skipped in one step.
Packed integers take one byte in a file and eight once parsed, so their bytes are counted.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from fusenms.limits import Limits

FIELDS_PER_NODE = 50
"""Maximum number of fields for each node that the limits allow. Exporters write 10 to 30 per node, attributes included."""
MESSAGES_PER_LEVEL = 3
"""Nested messages for each level of graphs: graph, node, attribute."""

Schema = dict[int, Any]
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PACKED: Schema = {}
"""Marks a field of packed integers in a schema."""


def scan(data: bytes, limits: Limits) -> None:
    """Check the encoding of a ModelProto.

    Raises:
        ValueError: the data is not such a message, or has more fields or deeper messages than the limits allow.
    """
    most_fields, most_levels = limits.max_nodes * FIELDS_PER_NODE, limits.max_nesting * MESSAGES_PER_LEVEL
    fields = packed = 0
    open_messages: list[tuple[int, int, Schema]] = [(0, len(data), _model_schema())]
    while open_messages:
        at, end, schema = open_messages.pop()
        while at < end:
            fields += 1
            if fields > most_fields:
                raise ValueError(
                    f"it has more than {most_fields} fields, for at most {limits.max_nodes} nodes (max_nodes)"
                )
            key, at = _varint(data, at, end)
            kind = key & 7
            if kind == _VARINT:
                _, at = _varint(data, at, end)
            elif kind == _FIXED64:
                at += 8
            elif kind == _FIXED32:
                at += 4
            elif kind == _BYTES:
                size, at = _varint(data, at, end)
                if size > end - at:
                    raise ValueError(f"a field at byte {at} has {size} bytes, but its message ends after {end - at}")
                inner = schema.get(key >> 3)
                if inner is _PACKED:
                    packed += size
                    if packed > limits.max_tensor_elements:
                        raise ValueError(
                            f"it has more than {limits.max_tensor_elements} packed numbers (max_tensor_elements)"
                        )
                    at += size
                elif inner is not None and size:
                    open_messages.append((at + size, end, schema))  # the scan continues here after the inner message
                    if len(open_messages) > most_levels:
                        raise ValueError(f"graphs are nested more than {limits.max_nesting} deep (max_nesting)")
                    end, schema = at + size, inner
                else:
                    at += size
            else:
                raise ValueError(f"a field at byte {at} is of the unknown kind {kind}")
            if at > end:
                raise ValueError(f"a field at byte {at} goes past the end of its message")


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Read a base-128 varint. Return its value and the position after it."""
    number = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
        if shift > 63:
            break
    raise ValueError(f"a number at byte {at} has no end")


@cache
def _model_schema() -> Schema:
    """The fields of a ModelProto that are messages: field number to the schema of that message."""
    import onnx

    known: dict[str, Schema] = {}

    def schema_of(descriptor: Any) -> Schema:
        if descriptor.full_name not in known:
            own = known[descriptor.full_name] = {}
            for field in descriptor.fields:
                if field.message_type is not None:
                    own[field.number] = schema_of(field.message_type)
                elif field.type in (field.TYPE_INT32, field.TYPE_INT64, field.TYPE_UINT64, field.TYPE_ENUM):
                    own[field.number] = _PACKED  # a single number has the kind VARINT instead
        return known[descriptor.full_name]

    return schema_of(onnx.ModelProto.DESCRIPTOR)
