"""Reads ONNX files of unknown origin, in five steps. Each step refuses what the next step cannot handle.

1. Open the file. It must be a regular file within the size limit.
2. Scan the encoded message before it is parsed, to bound the depth and the size of its parse (`wire`).
3. Parse it, and read external data, only from files in the model's own folder (`external`).
4. Check every field of the parsed message (`structure`).
5. Once the size of the input is known, check that no tensor and no operator exceeds the limits (`cost`).
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
"""The largest message that protobuf can encode, in bytes. Sessions are made from encoded models."""


def read_model(path: Path, limits: Limits = DEFAULT_LIMITS, *, keep_large: bool = False) -> onnx.ModelProto:
    """Read and check an ONNX file with its external data.

    Args:
        keep_large: leave external data where it is if it is larger than protobuf can encode, instead of refusing it.

    Raises:
        SourceError: the file is missing, damaged, not ONNX, or exceeds a limit.
    """
    return parse_model(read_regular(path, limits.max_file_bytes), path, limits, keep_large=keep_large)


def parse_model(
    data: bytes, path: Path, limits: Limits = DEFAULT_LIMITS, *, keep_large: bool = False
) -> onnx.ModelProto:
    """Like `read_model`, from the content of the file.

    Args:
        path: path of the file, for messages. External data is read from its folder.

    Raises:
        SourceError: the content is damaged, not ONNX, or exceeds a limit.
    """
    import onnx
    from google.protobuf.message import DecodeError

    from fusenms.onnx_reading.external import external_bytes, external_files, load_external_data
    from fusenms.onnx_reading.structure import check_structure
    from fusenms.onnx_reading.wire import scan

    hint = "it is damaged, cut short, or of another kind"
    if len(data) > MOST_PROTOBUF_BYTES:
        raise SourceError(
            f"{path}: has {len(data)} bytes; expected at most {MOST_PROTOBUF_BYTES}, the limit of protobuf; "
            "store the weights as external data"
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
        large = keep_large and external_bytes(model, limits) > MOST_PROTOBUF_BYTES
        if large:
            external_files(model, path, limits)
        else:
            load_external_data(model, path, limits)
        check_structure(model, limits, external=large)
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: holds text that is not UTF-8 ({error.reason}); {hint}") from error
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from error
    return model


@contextmanager
def untrusted(source: str | os.PathLike[str], stage: str, *, trusted: bool = False) -> Iterator[None]:
    """Convert all errors of a stage that works on a graph of unknown origin to `SourceError`, with their cause.

    Args:
        source: name of the file, for the message.
        stage: name of the stage, for the message.
        trusted: whether fusenms exported the graph. Errors then pass unchanged, because they are bugs of fusenms.

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
            f"{source}: {stage} failed ({type(error).__name__}: {first_line(error)}); the file is damaged or of an unknown kind. "
            "If it runs elsewhere, please report it"
        ) from error
