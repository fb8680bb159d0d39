"""An ONNX file of unknown origin is read here, in five steps. Each refuses what the next one cannot handle.

1. Only a regular file within the size limit is opened.
2. `wire`: the encoded message is scanned before it is parsed: how deep and how large its parse would be.
3. It is parsed, and external data is read: `external`, only from files in the model's own folder.
4. `structure`: every field of the parsed message is checked.
5. `cost`, once the size of the input is known: no tensor and no operator is larger than the limits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fusenms.errors import FusenmsError, SourceError, first_line
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.safety.files import read_regular

if TYPE_CHECKING:
    import onnx

MOST_PROTOBUF_BYTES = 2**31 - 1
"""What protobuf encodes at most; sessions are made from encoded models."""


def read_model(path: Path, limits: Limits = DEFAULT_LIMITS) -> onnx.ModelProto:
    """Read and check an ONNX file, with its external data.

    Raises:
        SourceError: it is missing, damaged, not ONNX, or exceeds a limit.
    """
    return parse_model(read_regular(path, limits.max_file_bytes), path, limits)


def parse_model(data: bytes, path: Path, limits: Limits = DEFAULT_LIMITS) -> onnx.ModelProto:
    """The same from the file's bytes. ``path`` stands in messages; its folder is where external data is looked for.

    Raises:
        SourceError: it is damaged, not ONNX, or exceeds a limit.
    """
    import onnx
    from google.protobuf.message import DecodeError

    from fusenms.onnx_reading.external import load_external_data
    from fusenms.onnx_reading.structure import check_structure
    from fusenms.onnx_reading.wire import scan

    hint = "it is damaged, cut short, or of another kind"
    if len(data) > MOST_PROTOBUF_BYTES:
        raise SourceError(
            f"{path}: has {len(data)} bytes; expected at most {MOST_PROTOBUF_BYTES}, as protobuf allows: keep the weights in external data"
        )
    try:
        scan(data, limits)
    except ValueError as error:
        raise SourceError(f"{path}: not a readable ONNX file ({error}); {hint}") from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except (DecodeError, ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not a readable ONNX file ({error}); {hint}") from error
    if not model.graph.node or not model.opset_import:
        raise SourceError(f"{path}: not a readable ONNX file (it has no nodes or no opset); {hint}")
    try:
        load_external_data(model, path, limits)
        check_structure(model, limits)
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: holds text that is not UTF-8 ({error.reason}); {hint}") from error
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from error
    return model


@contextmanager
def untrusted(source: str | os.PathLike[str], stage: str, *, trusted: bool = False) -> Iterator[None]:
    """The boundary of a stage that works on a graph of unknown origin: whatever is raised inside is our error, with its cause.

    Args:
        source: name of the file, for the message.
        stage: what is done with it, for the message.
        trusted: whether the graph is our own export; errors then pass as they are, since they are bugs of ours.

    Raises:
        SourceError: in place of any error that is not a `FusenmsError`.
    """
    try:
        yield
    except FusenmsError:
        raise
    except Exception as error:
        if trusted:
            raise
        raise SourceError(
            f"{source}: {stage} fails on what the file holds ({type(error).__name__}: {first_line(error)}); it is damaged, or of a kind "
            "that is not known. If it runs elsewhere, please report it"
        ) from error
