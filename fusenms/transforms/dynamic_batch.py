"""Decide the batch of a model: open a frozen one, fix a dynamic one, and measure whether the images of a batch stay independent.

The evidence covers the tensors that form the head. The part of the graph after them is not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fusenms.artifacts.raw import ImageInput, RawModel
from fusenms.errors import ConfigError, SourceError, first_line
from fusenms.graph.model import with_only_outputs
from fusenms.graph.session import Session
from fusenms.graph.unlike_images import ROUNDING, largest_difference, unlike_images
from fusenms.layout import Layout
from fusenms.onnx_reading import untrusted

CURE = "Export the model again with a dynamic batch"
ALONE = ("patches", "noise")
"""Kinds of the images that are also run alone. In a batch, a dark and a bright image are beside them."""

Run = Callable[[np.ndarray], list[np.ndarray]]
"""Runs a model on images ``[B, 3, height, width]`` and returns the head's tensors."""


def open_batch(raw: RawModel, layout: Layout) -> RawModel:
    """Return the model with the batch that ``raw.batch`` asks for, and with the evidence whether its images are independent.

    1. A frozen batch is opened. If this is not shown to be safe and ``raw.batch`` is None, the batch stays frozen, and a note says why.
    2. Unlike images are run alone and together. Only dynamic quantization may change their results, and a note then says how much.
    3. A batch of a fixed size becomes the size of the input.

    An export is not run again, because it was compared with PyTorch on images alone and together.

    Raises:
        SourceError: the batch cannot be opened, or the images of a batch change each other's results.
        ConfigError: a batch of that size exceeds the limits.
    """
    frozen, asked = raw.frozen_batch, raw.batch
    if frozen is not None and asked != frozen:
        try:
            with untrusted(raw.source, "opening its batch"):
                raw = _open(raw, layout, frozen)
        except SourceError as error:
            if asked is not None:
                raise
            reason = str(error).removeprefix(f"{raw.source}: ")
            raw = replace(raw, notes=(*raw.notes, f"batch stays {frozen}, as it is frozen in the file: {reason}"))
    opened = frozen is not None and raw.frozen_batch is None
    fixed = raw.frozen_batch or (asked if isinstance(asked, int) else None)
    if fixed is not None:
        _check_batch(raw, fixed)
    if raw.layout is None and not opened and fixed != 1 and not raw.not_run:
        with untrusted(raw.source, "running images alone and together"):
            raw = _measured(raw, layout, raw.frozen_batch)
    return raw if fixed is None else _fixed(raw, fixed)


def _open(raw: RawModel, layout: Layout, frozen: int) -> RawModel:
    """Open a frozen batch.

    Raises:
        SourceError: the opened graph does not run, gives other results than the file, or mixes the images of a batch.
    """
    failed, images = f"{raw.source}: the batch cannot be opened", _images(raw.image)
    model = _opened(raw.model, raw.image, frozen)
    run, run_frozen = _runner(raw, model, layout), _runner(raw, raw.model, layout)
    order = np.arange(frozen) % len(images)
    try:
        alone = run(images[:1])
        effect, kind, tensor = _effect(run, images, None, layout)
        if tensor is None:
            got, expected = run_frozen(images[order]), run(images[order]) if frozen > 1 else alone
        else:  # the ranges of a dynamic quantization are those of one image if all are copies of it
            got, expected = run_frozen(images[order * 0]), [value.repeat(frozen, 0) for value in alone]
        copies = run(images[[0, 0, 0]])
    except SourceError as error:
        message = f"the graph does not run at another batch size ({first_line(error)})"
        raise SourceError(f"{failed}, {message}. {CURE}") from error
    if effect == np.inf:
        raise SourceError(f"{failed}, tensor {tensor} keeps its shape at every batch size. {CURE}")
    if tensor is not None and not (_is_quantized(model) and _same(copies, [v.repeat(3, 0) for v in alone], layout)):
        raise SourceError(
            f"{failed}, images of one batch change each other's results: {tensor} of the {kind} image by {effect:.1%}. {CURE}"
        )
    if not _same(got, expected, layout):
        raise SourceError(f"{failed}, the opened graph gives other results than the file. {CURE}")
    said = f"batch opened (was {frozen})"
    note = (
        f"{said} · {len(images)} unlike images equal to running them alone"
        if tensor is None
        else f"{said}, but {_mixed(effect)}"
    )
    image = replace(raw.image, independent=tensor is None)
    return replace(raw, model=model, image=image, notes=(*raw.notes, note), frozen_batch=None)


def _measured(raw: RawModel, layout: Layout, batch: int | None) -> RawModel:
    """Return the model with the evidence whether its images are independent, in batches of its frozen size or, for None, of any size.

    Raises:
        SourceError: the model does not run on several images, or mixes them for another reason than dynamic quantization.
    """
    images, run = _images(raw.image), _runner(raw, raw.model, layout)
    try:
        effect, kind, tensor = _effect(run, images, batch, layout)
    except SourceError as error:
        raise SourceError(
            f"{raw.source}: does not run on {batch or len(images)} images, though its batch is {batch or 'dynamic'} ({first_line(error)}). "
            f"{CURE}, or fix the batch with batch=1"
        ) from error
    if tensor is None:
        return raw
    if effect == np.inf:
        raise SourceError(
            f"{raw.source}: tensor {tensor} keeps its shape at every batch size; expected the batch first. {CURE}"
        )
    if not _is_quantized(raw.model):
        raise SourceError(
            f"{raw.source}: images of one batch change each other's results: {tensor} of the {kind} image differs by {effect:.1%} of its "
            f"largest value from running it alone; expected rounding ({ROUNDING:.0e}). Export the model in evaluation mode, without "
            "operators over the batch"
        )
    return replace(raw, image=replace(raw.image, independent=False), notes=(*raw.notes, _mixed(effect)))


def _mixed(effect: float) -> str:
    return (
        "images are not independent: dynamic quantization takes its ranges over the batch, which changes the head by up to "
        f"{effect:.1%} of full scale. Run it at batch 1 if that matters; the Detector does"
    )


def _check_batch(raw: RawModel, batch: int) -> None:
    """Refuse a batch whose images exceed the limits."""
    image, most = raw.image, raw.limits.max_tensor_elements
    if batch * 3 * image.height * image.width > most:
        raise ConfigError(
            f"batch is {batch}, of images of {image.height}x{image.width}; expected at most {most} numbers in all (max_tensor_elements)"
        )


def _fixed(raw: RawModel, batch: int) -> RawModel:
    """Return the model with a batch of this size."""
    image, model = raw.image, onnx.ModelProto()
    model.CopyFrom(raw.model)
    for entry in model.graph.input:
        if entry.name == image.tensor:
            entry.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]
    for entry in model.graph.output:
        dims = entry.type.tensor_type.shape.dim
        if dims and not dims[0].dim_value:
            dims[0].dim_value = batch
    notes = raw.notes if raw.frozen_batch is not None else (*raw.notes, f"batch fixed at {batch}")
    return replace(raw, model=model, image=replace(image, batch=batch), notes=notes, frozen_batch=batch)


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


def _images(image: ImageInput) -> np.ndarray:
    return np.stack(list(unlike_images(image.height, image.width).values()))


def _runner(raw: RawModel, model: onnx.ModelProto, layout: Layout) -> Run:
    names = layout.sources
    session = Session(with_only_outputs(model, names), source=raw.source, max_seconds=raw.limits.max_run_seconds)
    return lambda images: session.run({raw.image.tensor: images}, names)


def _effect(run: Run, images: np.ndarray, batch: int | None, layout: Layout) -> tuple[float, str, str | None]:
    """Run unlike images alone and together. Return how far the results are apart: the largest effect, and its image and tensor.

    The effect is relative to the largest value of a tensor. The tensor is None if the effect is within rounding. With a fixed batch,
    an image counts as alone if the batch consists of copies of it.

    Raises:
        SourceError: a run fails.
    """
    kinds, size = list(unlike_images(1, 1)), batch or len(images)
    starts = range(0, len(images), size)
    order = np.arange(len(starts) * size) % len(images)
    together = [run(images[order[start : start + size]]) for start in starts]
    worst: tuple[float, str, str | None] = (0.0, "", None)
    for kind in ALONE:
        number = kinds.index(kind)
        alone = run(images[[number] * (batch or 1)])
        for name, one, some in zip(layout.sources, alone, together[0], strict=True):
            if one.shape[:1] != (batch or 1,) or some.shape[:1] != (size,):
                return np.inf, kind, name
        places = [(alone, i) for i in range(1, batch or 1)] + [(together[number // size], number % size)]
        for values, i in places:
            got, expected = [value[i : i + 1] for value in values], [value[:1] for value in alone]
            found = largest_difference(got, expected, layout.ordered_axes)
            if found.share > max(worst[0], ROUNDING):
                worst = (found.share, kind, layout.sources[found.tensor])
    return worst


def _is_quantized(model: onnx.ModelProto) -> bool:
    return any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.node)


def _same(got: list[np.ndarray], expected: list[np.ndarray], layout: Layout) -> bool:
    return largest_difference(got, expected, layout.ordered_axes).share <= ROUNDING
