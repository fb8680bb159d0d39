"""Reads `.onnx` files from a path, and refuses those that would run too long."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fusenms.errors import SourceError, first_line
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.onnx_reading import read_model, untrusted

if TYPE_CHECKING:
    import onnx


def read_onnx(path: Path, limits: Limits = DEFAULT_LIMITS, *, keep_large: bool = False) -> onnx.ModelProto:
    """Read and check an ONNX file of unknown origin, with its external data.

    Args:
        keep_large: leave external data above 2 GB where it is, instead of refusing it.

    Raises:
        SourceError: the file is missing, empty, damaged, not ONNX, or exceeds a limit.
    """
    if path.is_dir():
        raise SourceError(f"{path}: is a directory; expected an .onnx file")
    if path.suffix in (".pt", ".pth"):
        raise SourceError(f"{path}: is a checkpoint; expected an .onnx file: make one with python -m fusenms {path}")
    with untrusted(path, "reading"):
        return read_model(path, limits, keep_large=keep_large)


def read_metadata(model: onnx.ModelProto) -> dict[str, str]:
    """The metadata of a model: key to text."""
    return {item.key: item.value for item in model.metadata_props}


def refuse_cost(
    path: str | os.PathLike[str], model: onnx.ModelProto, sizes: Mapping[str, tuple[int, ...]], limits: Limits
) -> None:
    """Refuse a graph if the known shapes show that one run would exceed the limits.

    Args:
        sizes: input name to the shape of that input.

    Raises:
        SourceError: a run would exceed a limit.
    """
    from fusenms.onnx_reading.cost import check_cost

    with untrusted(path, "finding the sizes of its tensors"):
        try:
            check_cost(model, sizes, limits)
        except ValueError as error:
            raise SourceError(f"{path}: {first_line(error)}") from error
