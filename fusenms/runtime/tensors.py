"""The inputs and outputs of a fused file, and the check of tensors that are fed to it as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusenms.artifacts.fused import FusedModel
from fusenms.errors import InputError
from fusenms.limits import Limits
from fusenms.safety.text import printable

OPEN = -1
"""A size that each run may choose."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output of a fused file.

    Attributes:
        name: its name in the graph.
        dtype: NumPy's type.
        shape: its sizes; -1: each run may choose it.
        lengths: of an optional input, which is a vector that a run may leave out: the lengths that it may have. Else empty.
    """

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    lengths: tuple[int, ...] = ()

    @property
    def optional(self) -> bool:
        return bool(self.lengths)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


def inputs_of(fused: FusedModel) -> tuple[Tensor, ...]:
    """The inputs of a fused file, that of the images first. They come from its metadata: in an engine or in ncnn there is no graph."""
    image = fused.image
    batch = image.batch or OPEN
    if image.frames is not None:
        sizes = [size or OPEN for size in image.frames.shape(*(image.frames.size or (0, 0)))]
        first = Tensor(name=image.frames.tensor, dtype=np.dtype(np.uint8), shape=(batch, *sizes))
    else:
        sides = (OPEN, OPEN) if image.dynamic_size else (image.height, image.width)
        first = Tensor(name=image.tensor, dtype=np.dtype(np.float32), shape=(batch, 3, *sides))
    given = (
        Tensor(
            name=each.name,
            dtype=each.dtype,
            shape=tuple(size if isinstance(size, int) else OPEN for size in each.shape),
            lengths=each.lengths,
        )
        for each in fused.layout.runtime_inputs(fused.config)
    )
    return (first, *given)


def outputs_of(fused: FusedModel) -> tuple[Tensor, ...]:
    """The outputs of a fused file: those of its graph, further ones too; without a graph, those of the contract."""
    import onnx

    if fused.model.graph.output:
        return tuple(
            Tensor(
                name=entry.name,
                dtype=np.dtype(onnx.helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)),
                shape=tuple(size.dim_value or OPEN for size in entry.type.tensor_type.shape.dim),
            )
            for entry in fused.model.graph.output
        )
    batch, rows = fused.image.batch or OPEN, fused.config.max_detections
    return tuple(
        Tensor(name=name, dtype=output.dtype, shape=tuple(map(int, output.shape_for(batch, rows, OPEN, OPEN))))
        for name, output in fused.layout.outputs(fused.config)
    )


def check_tensors(given: Mapping[str, np.ndarray], wanted: Sequence[Tensor], fused_stride: int, limits: Limits) -> None:
    """Check tensors that are to be fed to a fused file, that of the images first in ``wanted``.

    Raises:
        InputError: one is missing or unknown, or has another type or shape than its input; or images or frames of any size are too large,
            or their sides are no multiples of the stride.
    """
    names = {tensor.name for tensor in wanted}
    if unknown := [name for name in given if name not in names]:
        raise InputError(
            f"found the input {printable(repr(unknown[0]))[:200]}; expected one of {', '.join(map(str, wanted))}"
        )
    for tensor in wanted:
        if tensor.name not in given:
            if tensor.optional:
                continue
            raise InputError(f"found no input {tensor}; expected it")
        array = given[tensor.name]
        fits = array.ndim == len(tensor.shape) and all(
            size > 0 and expected in (OPEN, size) for size, expected in zip(array.shape, tensor.shape, strict=True)
        )
        if not fits or array.dtype != tensor.dtype or (tensor.optional and array.size not in tensor.lengths):
            raise InputError(f"found {tensor.name} {array.dtype}{list(array.shape)}; expected {tensor}{_open(tensor)}")
    first = wanted[0]
    sides = given[first.name].shape[2:] if first.dtype == np.float32 else given[first.name].shape[1:3]
    if OPEN in first.shape[1:] and (sides[0] * sides[1] > limits.max_pixels or max(sides) > limits.max_image_side):
        raise InputError(
            f"found images of {sides[0]}x{sides[1]} (height x width); expected sides of at most {limits.max_image_side} (max_image_side) "
            f"and at most {limits.max_pixels} pixels (max_pixels)"
        )
    if OPEN in first.shape[1:] and first.dtype == np.float32 and any(side % fused_stride for side in sides):
        raise InputError(f"found images of {sides[0]}x{sides[1]}; expected sides that are multiples of {fused_stride}")


def _open(tensor: Tensor) -> str:
    """What an open size may be, for the end of a message."""
    if tensor.optional:
        return f" of length {' or '.join(map(str, dict.fromkeys(tensor.lengths)))}"
    return " (-1: any)" if OPEN in tensor.shape else ""
