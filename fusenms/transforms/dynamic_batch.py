"""Open the batch of a model that was exported for a fixed number of images, and prove that its images stay independent.

The proof covers the tensors that form the head. The part of the graph after them is not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fusenms.artifacts.raw import ImageInput, RawModel
from fusenms.errors import SourceError, first_line
from fusenms.graph.model import with_only_outputs
from fusenms.graph.session import Session
from fusenms.layout import Layout
from fusenms.onnx_reading import untrusted

ROUNDING = 1e-4  # relative to the largest value of a tensor
CURE = "Export the model again with a dynamic batch"


def open_batch(raw: RawModel, layout: Layout) -> RawModel:
    """Return the model with a dynamic batch, up to the tensors that the layout names; unchanged if its batch is dynamic.

    Raises:
        SourceError: the opened graph does not run, or mixes the images of a batch.
    """
    if raw.frozen_batch is None:
        return raw
    frozen, tensors = raw.frozen_batch, layout.sources
    with untrusted(raw.source, "opening its batch"):
        opened = _opened(raw.model, raw.image, frozen)
        note, independent = _show_independence(
            raw, with_only_outputs(raw.model, tensors), with_only_outputs(opened, tensors), tensors
        )
    image = replace(raw.image, independent=independent)
    return replace(raw, model=opened, image=image, notes=(*raw.notes, note), frozen_batch=None)


def _opened(model: onnx.ModelProto, image: ImageInput, frozen: int) -> onnx.ModelProto:
    """Replace the frozen batch size in the inputs, outputs, reshapes and resizes."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    graph = opened.graph
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    from_image, nodes = {image.tensor}, list(graph.node)
    del graph.node[:]
    for i, node in enumerate(nodes):
        if not from_image.isdisjoint(node.input):  # what is computed from constants stays unchanged
            from_image.update(node.output)
            shape = constants.get(node.input[1]) if node.op_type == "Reshape" else None
            if shape is not None and shape.size > 1 and (first := _open_first(shape, frozen)) != shape[0]:
                name = f"{node.input[1]}_batch{i}"
                graph.initializer.append(numpy_helper.from_array(np.array([first, *shape[1:]], np.int64), name))
                node.input[1] = name
            sizes = constants.get(node.input[3]) if node.op_type == "Resize" and len(node.input) > 3 else None
            if sizes is not None and sizes.size > 2:
                graph.node.extend(_open_sizes(graph, node, sizes, f"{node.input[3]}_batch{i}"))
        graph.node.append(node)
    del graph.value_info[:]
    for entry in (*graph.input, *graph.output):
        dims = entry.type.tensor_type.shape.dim
        if dims and dims[0].dim_value == frozen:
            dims[0].dim_param = "batch"
    return opened


def _open_first(shape: np.ndarray, frozen: int) -> int:
    """Opened first number of a reshape: -1 (inferred) if all numbers are fixed, 0 (copied) if it is the batch, else unchanged."""
    if (shape > 0).all():
        return -1
    return 0 if shape[0] == frozen else int(shape[0])


def _open_sizes(graph: onnx.GraphProto, node: onnx.NodeProto, sizes: np.ndarray, name: str) -> list[onnx.NodeProto]:
    """Make nodes that compute the sizes of a resize, with batch and channels taken from its input."""
    for end, values in (("from", [0]), ("to", [2]), ("sides", sizes[2:])):
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), f"{name}_{end}"))
    made = [
        helper.make_node("Shape", [node.input[0]], [f"{name}_shape"]),
        helper.make_node("Slice", [f"{name}_shape", f"{name}_from", f"{name}_to"], [f"{name}_start"]),
        helper.make_node("Concat", [f"{name}_start", f"{name}_sides"], [name], axis=0),
    ]
    node.input[3] = name
    return made


def _show_independence(
    raw: RawModel, model: onnx.ModelProto, opened: onnx.ModelProto, tensors: Sequence[str]
) -> tuple[str, bool]:
    """Run both models. Return the result as a note, and whether each image's tensors are those of the original model.

    Dynamic quantization takes its ranges over the batch. In that case, copies of an image must give the same result as the image.

    Raises:
        SourceError: the opened graph does not run, or mixes images for another reason.
    """
    frozen, image, failed = raw.frozen_batch or 1, raw.image, f"{raw.source}: the batch cannot be opened"
    images = np.random.default_rng(0).random((3 * frozen, 3, image.height, image.width), dtype=np.float32)
    try:
        alone = [
            np.concatenate(parts) for parts in zip(*(_run(model, raw, p) for p in np.split(images, 3)), strict=True)
        ]
        together = _run(opened, raw, images)
        copies = _run(opened, raw, np.tile(images[:frozen], (3, 1, 1, 1)))
    except SourceError as error:
        message = f"the graph does not run at batch {len(images)} ({first_line(error)})"
        raise SourceError(f"{failed}, {message}. {CURE}") from error
    for name, got, expected in zip(tensors, together, alone, strict=True):
        if got.shape != expected.shape:
            message = f"tensor {name} keeps the shape {list(got.shape)} at batch {len(images)}"
            raise SourceError(f"{failed}, {message}. {CURE}")
    drift = _worst(together, alone)
    if drift <= ROUNDING:
        return f"batch opened (was {frozen}) · 3 images equal to running them alone", True
    quantized = any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.node)
    if not quantized or _worst(copies, [np.concatenate([part[:frozen]] * 3) for part in alone]) > ROUNDING:
        raise SourceError(f"{failed}, images of one batch change each other's results. {CURE}")
    return (
        f"batch opened (was {frozen}), but images are not independent: dynamic quantization takes its ranges over the "
        f"batch, which changes the head by up to {drift:.1%} of full scale. Run it at batch 1 if that matters; the Detector does"
    ), False


def _run(model: onnx.ModelProto, raw: RawModel, images: np.ndarray) -> list[np.ndarray]:
    session = Session(model, source=raw.source, max_seconds=raw.limits.max_run_seconds)
    return session.run({raw.image.tensor: images})


def _worst(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Largest difference, relative to the largest value of its output."""
    if any(a.shape != b.shape for a, b in zip(got, expected, strict=True)):
        return float("inf")
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-9)) for a, b in zip(got, expected, strict=True))
