"""Reads a raw `.onnx`, from fusenms or a third party."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from fusenms import contract
from fusenms.artifacts.preprocessing import PIXELS
from fusenms.artifacts.raw import ImageInput, RawModel
from fusenms.errors import AlreadyFusedError, ConfigError, SourceError
from fusenms.graph.float_tensors import IMAGE_TYPES, has_channels_last, with_float_images, with_float_outputs
from fusenms.graph.model import with_only_outputs
from fusenms.graph.newer_opset import OLDEST, opset_of, to_newer_opset
from fusenms.limits import Limits
from fusenms.onnx_reading import untrusted
from fusenms.onnx_reading.files import read_metadata, read_onnx, refuse_cost
from fusenms.onnx_reading.metadata import check_names, parse_literal, parse_names
from fusenms.onnx_reading.structure import type_name
from fusenms.sources.extra_inputs import fill_extra_inputs
from fusenms.sources.options import LoadOptions

NMS_OPS = ("NonMaxSuppression", "EfficientNMS", "BatchedNMS", "NMS_TRT", "NMSRotated", "RotatedNMS", "TRTBatchedNMS")
DEFAULT_SIZE = 640
DEFAULT_STRIDE = 32
MIN_OPSET = 11


def load_onnx(path: Path, options: LoadOptions) -> RawModel:
    """Read a raw detector from an ONNX file of unknown origin.

    The batch of the model may be frozen. `fusenms.transforms.dynamic_batch` makes it dynamic once the head is known.

    Raises:
        AlreadyFusedError: the graph already has a non-maximum suppression.
        SourceError: the file is unreadable, exceeds a limit, or has other inputs than one batch of images.
        ConfigError: the size contradicts the file.
    """
    model = read_onnx(path, options.limits)
    with untrusted(path, "reading"):
        _refuse_fused(path, model, read_metadata(model))
        return load_model(path, model, options)


def load_any_onnx(path: Path, options: LoadOptions) -> RawModel:
    """Read an ONNX file like `load_onnx`, also one that holds a non-maximum suppression. It is for running, not for fusing.

    Raises:
        SourceError: the file is unreadable, exceeds a limit, or has other inputs than one batch of images.
        ConfigError: the size contradicts the file.
    """
    model = read_onnx(path, options.limits)
    with untrusted(path, "reading"):
        return load_model(path, model, options)


def load_model(path: Path, model: onnx.ModelProto, options: LoadOptions) -> RawModel:
    """Make a raw model of an ONNX model that was read from ``path``, or of a part of it. Errors are those of `load_any_onnx`."""
    limits, dynamic_size = options.limits, options.dynamic_size
    metadata = read_metadata(model)
    model = _without_outputs(path, model, options.ignore)
    opset = opset_of(model)
    if opset < OLDEST:
        raise SourceError(f"{path}: opset {opset}; expected at least {OLDEST}. Export again with a newer opset")
    _refuse_nan(path, model)
    model, changes, takes_bytes = _with_floats(path, model)
    entry = _image_input(path, model)
    dims = entry.type.tensor_type.shape.dim
    frozen = [dim.dim_value or None for dim in dims]
    image = _image(path, entry.name, (frozen[2], frozen[3]), metadata, options.sides, dynamic_size, limits)
    shape = (frozen[0] or 1, 3, image.height, image.width)
    if math.prod(shape) > limits.max_tensor_elements:
        raise SourceError(
            f"{path}: takes images {list(shape)}; expected at most {limits.max_tensor_elements} numbers (max_tensor_elements)"
        )
    refuse_cost(path, model, {entry.name: shape}, limits)
    if dynamic_size and len(_inputs(model)) > 1:
        raise ConfigError(
            f"{path}: has the size of the images as an input, which becomes a constant; leave dynamic_size out"
        )
    notes, asks_for_size = fill_extra_inputs(
        path, model, entry.name, (frozen[0] or 1, image.height, image.width), limits
    )
    notes += changes
    if opset < MIN_OPSET:
        model, note = to_newer_opset(path.name, model, entry.name, shape, limits)
        notes.append(note)
    dims = _image_input(path, model).type.tensor_type.shape.dim
    if not image.dynamic_size:
        dims[2].dim_value, dims[3].dim_value = image.height, image.width
    sides = "height,width" if image.dynamic_size else f"{image.height},{image.width}"
    notes.insert(0, f"{image.tensor}[{frozen[0] or 'batch'},3,{sides}] · opset {opset} · {len(model.graph.node)} nodes")
    try:
        names = parse_names(metadata.get(contract.KEY_NAMES, ""), limits)
        (task,) = check_names([metadata.get(contract.KEY_TASK, "detect")], limits)
    except ValueError as error:
        raise SourceError(f"{path}: {error}; correct its metadata") from error
    stretch = (
        True if asks_for_size else None
    )  # a model that scales boxes to the original image expects images stretched to its input
    return RawModel(
        model=model,
        image=image,
        class_names=names,
        task=task,
        source=path.name,
        notes=tuple(notes),
        pixels=PIXELS["rgb255"] if takes_bytes else None,
        stretch=stretch,
        frozen_batch=frozen[0],
        limits=limits,
    )


def _refuse_fused(path: Path, model: onnx.ModelProto, metadata: dict[str, str]) -> None:
    if contract.KEY_BACKEND in metadata:
        raise AlreadyFusedError(
            f"{path}: is a fused model already (backend {metadata[contract.KEY_BACKEND][:40]!r}); expected raw weights. "
            f"Run it with: python -m fusenms detect {path} IMAGE, check it with: python -m fusenms verify {path}, "
            f"or fuse it for another backend with: python -m fusenms convert {path}"
        )
    if (node := _suppressing(model.graph)) is not None:
        raise AlreadyFusedError(
            f"{path}: already holds a non-maximum suppression ({node.op_type} node {node.name!r}); "
            f"expected the raw head. Cut it out with: python -m fusenms convert {path}, or export the model again without NMS"
        )


def _suppressing(graph: onnx.GraphProto) -> onnx.NodeProto | None:
    """The first node that suppresses, in the graph or in one of its subgraphs, as torchvision's `batched_nms` is exported."""
    todo = [graph]
    for one in todo:
        for node in one.node:
            if any(word in node.op_type for word in NMS_OPS):
                return node
            todo += [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    return None


def _without_outputs(path: Path, model: onnx.ModelProto, ignored: Sequence[str]) -> onnx.ModelProto:
    outputs = [entry.name for entry in model.graph.output]
    if unknown := [name for name in ignored if name not in outputs]:
        raise ConfigError(
            f"{path}: ignore names {', '.join(unknown)}; expected some of its outputs: {', '.join(outputs)}"
        )
    kept = [name for name in outputs if name not in ignored]
    if not kept:
        raise ConfigError(f"{path}: ignore names every output; expected at least one that is left")
    return with_only_outputs(model, kept) if ignored else model


def _with_floats(path: Path, model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str], bool]:
    """The model with float32 images and outputs, what was changed, and whether the network takes uint8."""
    entry = _image_input(path, model)
    takes_bytes = entry.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    model, inputs = with_float_images(model, entry)
    model, outputs = with_float_outputs(model)
    return model, [text for text in (inputs, outputs) if text], takes_bytes


def _refuse_nan(path: Path, model: onnx.ModelProto) -> None:
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    for item in model.graph.initializer:
        if item.data_type in kinds and np.isnan(numpy_helper.to_array(item)).any():
            raise SourceError(
                f"{path}: the weights of {item.name} are not finite (NaN); the training diverged or the file is damaged"
            )


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    constants = {item.name for item in model.graph.initializer}
    return [entry for entry in model.graph.input if entry.name not in constants]


def _image_input(path: Path, model: onnx.ModelProto) -> onnx.ValueInfoProto:
    """The input that takes images.

    Raises:
        SourceError: there is not exactly one, or its type or channels are not those of images.
    """
    inputs = _inputs(model)
    found = ", ".join(f"{entry.name} {_shape_text(entry)}" for entry in inputs) or "none"
    images = [entry for entry in inputs if len(entry.type.tensor_type.shape.dim) == 4]
    if len(images) != 1:
        raise SourceError(
            f"{path}: found {len(inputs)} inputs ({found}); expected one batch of images [batch, 3, height, width]"
        )
    tensor = images[0].type.tensor_type
    if tensor.elem_type not in IMAGE_TYPES:
        raise SourceError(
            f"{path}: input {found} is {type_name(tensor.elem_type)}; expected {', '.join(map(type_name, IMAGE_TYPES))}"
        )
    if (tensor.shape.dim[1].dim_value or 3) != 3 and not has_channels_last(images[0]):
        raise SourceError(f"{path}: input {found}; expected a batch of images [batch, 3, height, width]")
    return images[0]


def _shape_text(entry: onnx.ValueInfoProto) -> str:
    return "[" + ", ".join(str(d.dim_value or d.dim_param or "?") for d in entry.type.tensor_type.shape.dim) + "]"


def _image(
    path: Path,
    tensor: str,
    fixed: tuple[int | None, int | None],
    metadata: dict[str, str],
    size: tuple[int, int] | None,
    dynamic_size: bool,
    limits: Limits,
) -> ImageInput:
    stride, asked = _metadata_stride(metadata), _metadata_size(metadata)
    if max(stride, *(asked or ()), fixed[0] or 0, fixed[1] or 0) > limits.max_image_side:
        raise SourceError(
            f"{path}: takes images of {fixed[0] or asked}x{fixed[1] or asked}, stride {stride}; expected at most "
            f"{limits.max_image_side} pixels (max_image_side)"
        )
    if fixed[0] and fixed[1]:
        if size is not None and size != fixed:
            raise ConfigError(
                f"{path}: takes {fixed[0]}x{fixed[1]} images, but size is {size[0]}x{size[1]}; "
                "leave the size out, or export the model at that size"
            )
        if dynamic_size:
            raise ConfigError(
                f"{path}: height and width are frozen at {fixed[0]}x{fixed[1]}; "
                "leave dynamic_size out, or export the model with dynamic height and width"
            )
        return ImageInput(tensor, fixed[0], fixed[1], stride)
    height, width = size or asked or (DEFAULT_SIZE, DEFAULT_SIZE)
    if height % stride or width % stride:
        raise ConfigError(f"size is {height}x{width}; expected multiples of the stride {stride}")
    return ImageInput(tensor, fixed[0] or height, fixed[1] or width, stride, dynamic_size)


def _metadata_stride(metadata: dict[str, str]) -> int:
    try:
        return max(1, int(float(metadata[contract.KEY_STRIDE])))
    except (KeyError, ValueError, OverflowError):
        return DEFAULT_STRIDE


def _metadata_size(metadata: dict[str, str]) -> tuple[int, int] | None:
    found = parse_literal(metadata.get(contract.KEY_IMGSZ, ""))
    sides = found if isinstance(found, (list, tuple)) and len(found) == 2 else ()
    if not sides or any(type(side) not in (int, float) or not 1 <= side < 2**31 for side in sides):
        return None
    return int(sides[0]), int(sides[1])
