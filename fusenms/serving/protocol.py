"""Messages of the Open Inference Protocol (KServe v2, REST): between the bytes of a body and NumPy arrays.

A body is JSON. With the binary extension, the JSON is its first part, whose length is in the header `HEADER`, and the bytes of tensors
follow in their order, little-endian.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np

from fusenms.errors import InputError, first_line
from fusenms.runtime.tensors import OPEN, Tensor
from fusenms.safety.text import printable

HEADER: Final = "Inference-Header-Content-Length"
VERSION: Final = "1"
"""Of every model: a file has no others."""
DATATYPES: Final = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8", "INT16": "int16",
    "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float32", "FP64": "float64",
}  # fmt: skip
"""NumPy's types by the names of the protocol."""
_NAMES = {name: datatype for datatype, name in DATATYPES.items()}
MOST_SIGNS = {b"{": 1000, b'"': 10_000, b"[": 2_000_000}
"""Objects, strings and lists of a request: each costs much more memory than it has bytes, and only data have many lists."""
MOST_NUMBERS = 2**21
"""Of an output in JSON."""
MOST_TENSORS = 64
"""Inputs or outputs that a request may name."""


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """A request, taken apart.

    Attributes:
        id: what the client calls it; None: nothing.
        tensors: its inputs by name.
        outputs: the outputs that it asks for, and whether each in binary; empty: all of them, as ``binary`` says.
        binary: whether outputs are binary, unless one says otherwise.
    """

    id: str | None
    tensors: Mapping[str, np.ndarray]
    outputs: Mapping[str, bool]
    binary: bool


def parse_request(body: bytes, header_length: str | None, inputs: Sequence[Tensor]) -> InferRequest:
    """Take a request apart. Tensors share the memory of ``body``. Names and types are checked, shapes only against the data.

    Args:
        header_length: value of `HEADER`; None: there is none.
        inputs: those of the model.

    Raises:
        InputError: it is no such request.
    """
    try:
        return _parsed(body, header_length, inputs)
    except InputError as error:
        message = str(error)
    raise InputError(message)  # a new one: the other's traceback holds what was read, which may be much


def _parsed(body: bytes, header_length: str | None, inputs: Sequence[Tensor]) -> InferRequest:
    text, data = _parts(body, header_length)
    for sign, most in MOST_SIGNS.items():
        if text.count(sign) > most:
            raise InputError(
                f"found JSON with more than {most} times {sign.decode()}; expected a few objects, and numbers"
            )
    try:
        message = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"found a body that is not JSON ({first_line(error)}); expected a request of v2") from None
    entries = _field(message, "inputs", list, "the request")
    if not 1 <= len(entries) <= MOST_TENSORS:
        raise InputError(f"found {len(entries)} inputs; expected 1 to {MOST_TENSORS}")
    known = {tensor.name: tensor for tensor in inputs}
    tensors: dict[str, np.ndarray] = {}
    rest = memoryview(data)
    for entry in entries:
        name = _field(entry, "name", str, "an input")
        if name not in known or name in tensors:
            raise InputError(
                f"found the input {_shown(name)}{' twice' if name in tensors else ''}; expected {', '.join(map(str, inputs))}"
            )
        tensors[name], rest = _tensor(entry, known[name], rest)
    if len(rest):
        raise InputError(f"found {len(rest)} bytes more than the inputs say (binary_data_size)")
    parameters = _optional(message, "parameters", dict, "the request")
    binary = bool(_optional(parameters, "binary_data_output", bool, "parameters"))
    outputs: dict[str, bool] = {}
    asked = _optional(message, "outputs", list, "the request") or []
    if len(asked) > MOST_TENSORS:
        raise InputError(f"found {len(asked)} outputs; expected at most {MOST_TENSORS}")
    for entry in asked:
        own = _optional(entry, "parameters", dict, "an output")
        if own and own.get("classification"):
            raise InputError("found an output with classification, which this server does not have")
        _refuse_shared_memory(own)
        wanted = _optional(own, "binary_data", bool, "parameters of an output")
        outputs[_field(entry, "name", str, "an output")] = binary if wanted is None else wanted
    return InferRequest(
        id=_optional(message, "id", str, "the request"), tensors=tensors, outputs=outputs, binary=binary
    )


def check_outputs(request: InferRequest, outputs: Sequence[Tensor]) -> None:
    """Check that the model has the outputs that a request asks for.

    Raises:
        InputError: it has not.
    """
    names = [tensor.name for tensor in outputs]
    if unknown := [name for name in request.outputs if name not in names]:
        raise InputError(f"found the output {_shown(unknown[0])}; expected {', '.join(names)}")


def make_response(model: str, request: InferRequest, outputs: Mapping[str, np.ndarray]) -> tuple[bytes, int | None]:
    """Put an answer together.

    Returns:
        the body, and the length of its JSON if tensors in binary follow.

    Raises:
        InputError: an output was asked for in JSON that has numbers which JSON lacks (NaN, infinite), or too many.
    """
    entries, data = [], []
    for name, binary in (request.outputs or dict.fromkeys(outputs, request.binary)).items():
        array = outputs[name]
        entry: dict[str, Any] = {
            "name": name,
            "datatype": _NAMES[array.dtype.name],
            "shape": list(array.shape),
        }
        if binary:
            raw = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
            entry["parameters"] = {"binary_data_size": len(raw)}
            data.append(raw)
        elif array.size > MOST_NUMBERS:
            raise InputError(
                f"{name} has {array.size} numbers; expected at most {MOST_NUMBERS} in JSON: ask for binary_data"
            )
        else:
            entry["data"] = array.ravel().tolist()
        entries.append(entry)
    message = {"model_name": model, "model_version": VERSION, "outputs": entries}
    if request.id is not None:
        message["id"] = request.id
    try:
        head = json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
    except ValueError as error:
        raise InputError(
            "the outputs have numbers that are not finite, which JSON lacks; ask for binary_data"
        ) from error
    return (b"".join((head, *data)), len(head)) if data else (head, None)


def model_metadata(name: str, platform: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> dict[str, Any]:
    """What `GET v2/models/NAME` answers. Optional inputs are marked in their parameters."""

    def described(tensor: Tensor) -> dict[str, Any]:
        values = {"name": tensor.name, "datatype": _NAMES[tensor.dtype.name], "shape": list(tensor.shape)}
        return values | ({"parameters": {"optional": True}} if tensor.optional else {})

    return {
        "name": name,
        "versions": [VERSION],
        "platform": platform,
        "inputs": list(map(described, inputs)),
        "outputs": list(map(described, outputs)),
    }


def model_config(
    name: str, platform: str, batch_size: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> dict[str, Any]:
    """What `GET v2/models/NAME/config` answers, Triton's extension. Dims are without the batch if that is open, as Triton has them."""
    batched = inputs[0].shape[0] == OPEN

    def described(tensor: Tensor) -> dict[str, Any]:
        dims = list(tensor.shape[1:] if batched and not tensor.optional else tensor.shape)
        values = {"name": tensor.name, "data_type": f"TYPE_{_NAMES[tensor.dtype.name]}", "dims": dims}
        return values | ({"optional": True} if tensor.optional else {})

    return {
        "name": name,
        "platform": platform,
        "max_batch_size": batch_size if batched else 0,
        "input": list(map(described, inputs)),
        "output": list(map(described, outputs)),
    }


def _parts(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    """The JSON, and the bytes behind it."""
    if header_length is None:
        return body, memoryview(b"")
    if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 20):
        raise InputError(f"found {HEADER} {_shown(header_length)}; expected a number of bytes")
    length = int(header_length)
    if length > len(body):
        raise InputError(f"found {HEADER} {length} and a body of {len(body)} bytes; expected at most as many")
    return body[:length], memoryview(body)[length:]


def _tensor(entry: Mapping[str, Any], tensor: Tensor, rest: memoryview) -> tuple[np.ndarray, memoryview]:
    """The array of an input, and the bytes behind it."""
    name, dtype = tensor.name, tensor.dtype
    datatype = _field(entry, "datatype", str, name)
    if datatype != _NAMES[dtype.name]:
        raise InputError(f"found {name} of datatype {_shown(datatype)}; expected {_NAMES[dtype.name]}")
    shape = _field(entry, "shape", list, name)
    if len(shape) > 8 or not all(type(size) is int and 0 < size < 2**40 for size in shape):
        raise InputError(f"found {name} with the shape {_shown(shape)}; expected up to 8 positive whole numbers")
    parameters = _optional(entry, "parameters", dict, name)
    _refuse_shared_memory(parameters)
    size = _optional(parameters, "binary_data_size", int, f"parameters of {name}")
    if (size is None) == ("data" not in entry):
        raise InputError(f"found {name} with {'both' if size is not None else 'neither of'} data and binary_data_size")
    if size is None:
        array = _from_json(entry["data"], name, dtype)
    else:
        if not 0 <= size <= len(rest):
            raise InputError(f"found {name} with binary_data_size {size}; expected 0 to {len(rest)}, which follow")
        if size % dtype.itemsize:
            raise InputError(f"found {name} with {size} bytes; expected a multiple of {dtype.itemsize}")
        array = np.frombuffer(rest[:size], dtype.newbyteorder("<")).astype(dtype, copy=False)
        if dtype == np.bool_:
            array = array.view(np.uint8) != 0  # other bytes than 0 and 1 are not defined as booleans
        rest = rest[size:]
    if array.size != prod(shape):
        raise InputError(
            f"found {name} with {array.size} numbers and the shape {_shown(shape)}; expected {prod(shape)}"
        )
    return array.reshape(shape), rest


def _from_json(data: Any, name: str, dtype: np.dtype[Any]) -> np.ndarray:
    """A list of numbers, nested or not."""
    wrong = f"found {name} with data that are no {_NAMES[dtype.name]}; expected a list of such numbers"
    if not isinstance(data, list):
        raise InputError(wrong)
    try:
        values = np.asarray(data)
    except (ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{wrong} ({first_line(error)})") from error
    if dtype.kind == "f" and values.dtype.kind in "iuf":
        with np.errstate(over="ignore"):
            return values.astype(dtype).ravel()
    if values.dtype.kind == dtype.kind == "b":
        return values.ravel()
    if dtype.kind in "iu" and values.dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if not values.size or (values.min() >= limits.min and values.max() <= limits.max):
            return values.astype(dtype).ravel()
    raise InputError(wrong)


def _refuse(name: str) -> Any:
    raise ValueError(f"it holds {name}")


def _refuse_shared_memory(parameters: Mapping[str, Any] | None) -> None:
    if parameters and any(key.startswith("shared_memory") for key in parameters):
        raise InputError("found a tensor in shared memory, which this server does not read; send it in the body")


def _field(values: Any, name: str, kind: type, of: str) -> Any:
    found = _optional(values, name, kind, of)
    if found is None:
        raise InputError(f"found {of} without {name}; expected it")
    return found


def _optional(values: Any, name: str, kind: type, of: str) -> Any:
    if values is None:
        return None
    if not isinstance(values, dict):
        raise InputError(f"found {_shown(values)} as {of}; expected an object")
    found = values.get(name)
    if found is not None and type(found) is not kind:
        raise InputError(f"found {name} {_shown(found)} of {of}; expected {_KINDS[kind]}")
    return found


_KINDS = {str: "a string", list: "a list", dict: "an object", int: "a whole number", bool: "true or false"}


def _shown(value: Any) -> str:
    """A value of a client, for a message: its beginning."""
    return printable(reprlib.repr(value))
