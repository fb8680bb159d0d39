"""Reads external data: tensor values in other files, which must be regular files in the model's own folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fusenms.errors import SourceError
from fusenms.limits import Limits
from fusenms.onnx_reading.structure import bytes_of, name_of
from fusenms.safety.files import open_regular

if TYPE_CHECKING:
    import onnx

MOST_BYTES = 2**31 - 1
"""Maximum size of all external data, in bytes. Sessions are made from encoded models, and protobuf encodes no more."""
KEYS = ("location", "offset", "length", "checksum")


def load_external_data(model: onnx.ModelProto, path: Path, limits: Limits) -> None:
    """Read the external data of all initializers and attributes into the model, in place.

    Raises:
        ValueError: the data is outside the model's folder, or its size does not match the tensor's dimensions.
        SourceError: a file with the data cannot be read, or is too large.
    """
    import onnx

    found = _external(model)
    total = external_bytes(model, limits)
    if total > min(limits.max_file_bytes, MOST_BYTES):
        raise ValueError(
            f"has {total} bytes of external data; expected at most {min(limits.max_file_bytes, MOST_BYTES)}"
        )
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for tensor in found:
            where, location, offset, size = _described(tensor, limits)
            if location not in files:
                files[location] = stack.enter_context(
                    open_regular(_inside(where, path, location), limits.max_file_bytes)
                )
            tensor.raw_data = _read(where, files[location], offset, size)
            del tensor.external_data[:]
            tensor.data_location = onnx.TensorProto.DEFAULT


def external_files(model: onnx.ModelProto, path: Path, limits: Limits) -> dict[str, Path]:
    """Check the external data of a model and leave it where it is. Return its files: the location in the model to the path.

    Raises:
        ValueError, SourceError: as in `load_external_data`.
    """
    files = dict[str, Path]()
    for tensor in _external(model):
        where, location, offset, size = _described(tensor, limits)
        if location not in files:
            files[location] = _inside(where, path, location)
            open_regular(files[location], limits.max_file_bytes).close()
        there = files[location].stat().st_size
        if offset + size > there:
            raise ValueError(f"{where} spans bytes {offset} to {offset + size}, but its file has {there} bytes")
    return files


def external_bytes(model: onnx.ModelProto, limits: Limits) -> int:
    """Size of all external data, in bytes."""
    return sum(bytes_of(tensor, limits) for tensor in _external(model))


def _external(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    import onnx

    return [
        tensor
        for tensor in tensors_of(model)
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data
    ]


def _described(tensor: onnx.TensorProto, limits: Limits) -> tuple[str, str, int, int]:
    """What a tensor says of its external data: a name for messages, the location, and offset and size in bytes."""
    import onnx

    entries = {entry.key: entry.value for entry in tensor.external_data}
    where = f"external data of {name_of(tensor)}"
    if tensor.data_location != onnx.TensorProto.EXTERNAL or len(entries) != len(tensor.external_data):
        raise ValueError(f"{where} is described twice, or the tensor is not marked as external; expected neither")
    if unknown := sorted(set(entries) - set(KEYS)):
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; expected {', '.join(KEYS)}")
    size = bytes_of(tensor, limits)
    offset, length = _number(where, entries, "offset", 0), _number(where, entries, "length", size)
    if length != size:
        raise ValueError(f"{where} has {length} bytes; expected {size}, by its type and dimensions {list(tensor.dims)}")
    return where, entries.get("location", ""), offset, size


def tensors_of(message: Any) -> Iterator[onnx.TensorProto]:
    """Yield every TensorProto in a message, at any depth, also in subgraphs, functions and sparse tensors."""
    import onnx

    todo = [message]
    while todo:
        for field, value in todo.pop().ListFields():
            if field.message_type is None:
                continue
            many = (value,) if hasattr(value, "ListFields") else value
            if field.message_type.full_name == onnx.TensorProto.DESCRIPTOR.full_name:
                yield from many
            else:
                todo += many


def _inside(where: str, path: Path, location: str) -> Path:
    """The path of the file at a location. Links to places outside the model's folder are refused."""
    parts = Path(location).parts
    if (
        not location
        or "\0" in location
        or "\\" in location
        or os.path.isabs(location)
        or ".." in parts
        or ":" in location
    ):
        raise ValueError(f"{where} is in {location!r}; expected the name of a file in the model's own folder")
    folder = path.parent.resolve()
    try:
        target = (folder / location).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise SourceError(
            f"{path}: {where} is in {location!r}, which cannot be read ({getattr(error, 'strerror', None) or error}); "
            "copy it beside the model"
        ) from error
    if not target.is_relative_to(folder):
        raise ValueError(
            f"{where} is in {location!r}, a link to a place outside the model's folder; expected a file in it"
        )
    return target


def _number(where: str, entries: dict[str, str], key: str, default: int) -> int:
    text = entries.get(key, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"{where} has the {key} {text[:40]!r}; expected a number of bytes")
    return int(text)


def _read(where: str, file: BinaryIO, offset: int, size: int) -> bytes:
    there = os.fstat(file.fileno()).st_size
    if offset + size > there:
        raise ValueError(f"{where} spans bytes {offset} to {offset + size}, but its file has {there} bytes")
    try:
        file.seek(offset)
        data = file.read(size)
    except OSError as error:
        raise ValueError(f"{where} cannot be read ({error.strerror or error})") from error
    if len(data) != size:
        raise ValueError(f"{where} was cut short while it was read")
    return data
