"""`TensorInfo`: what a graph declares of an input or output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """An input or output: its name, its NumPy dtype name, and its sizes. An open size is a name or ``?``."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(map(str, self.shape))}]"


def tensor_info(entry: onnx.ValueInfoProto) -> TensorInfo:
    """What an entry of a graph declares."""
    import onnx

    kind = entry.type.tensor_type
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).name
    except KeyError:
        dtype = "unknown"
    return TensorInfo(
        name=entry.name, dtype=dtype, shape=tuple(d.dim_value or d.dim_param or "?" for d in kind.shape.dim)
    )


def needed_inputs(model: onnx.ModelProto) -> tuple[TensorInfo, ...]:
    """Inputs without a default. Old files also list initializers as inputs."""
    constants = {item.name for item in model.graph.initializer}
    return tuple(tensor_info(entry) for entry in model.graph.input if entry.name not in constants)
