"""Frames as the input: uint8 ``[B, height, width, 3]`` are letterboxed or stretched in the graph, and results are in pixels of the frame.

`with_frames` puts standard operators before and after a fused model and changes nothing between them. `without_frames` takes the model
out again, so that it is proven as any other; `parts` gives what was put around it.

Sizes are those of `fusenms.runtime.placement`. For one size they are constants. For any size the graph computes them, in float64 and in
the same order, so that they are rounded alike; ONNX rounds halves to even, as Python does. Resize has the half-pixel centers of OpenCV's
``INTER_LINEAR`` and no antialiasing. It works in float32, because runtimes differ in how they round a resized uint8; Round follows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from fusenms import contract
from fusenms.artifacts.fused import FusedModel
from fusenms.artifacts.raw import Frames, ImageInput
from fusenms.config import PostprocessConfig
from fusenms.contract import ONE_TENSOR
from fusenms.errors import ConfigError, SourceError, UnsupportedByBackendError
from fusenms.graph.builder import DOUBLE, FLOAT, INT64, Graph, Tensor
from fusenms.graph.editing import extracted, renamed
from fusenms.graph.model import declare_optional_inputs
from fusenms.layout import Layout

DYNAMIC = "dynamic"
BACKENDS = ("ort", "portable")
"""Backends of standard operators. The others compute the suppression in a plugin of TensorRT, which is given images."""
GREY, FULL = 114, 255
"""Color around a letterboxed frame, and the highest value of a color."""


def frames_from(
    frames: str | tuple[int, int] | None, channels: str, backend: str, config: PostprocessConfig
) -> Frames | None:
    """The frames that arguments of `fusenms.fuse` describe: height and width, ``dynamic``, or None.

    Raises:
        ConfigError: they are neither, or the outputs are one tensor of rows, whose readers map boxes themselves.
        UnsupportedByBackendError: the backend takes no frames.
    """
    if channels not in ("rgb", "bgr"):
        raise ConfigError(f"frame_channels is {channels!r}; expected 'rgb' or 'bgr'")
    if frames is None:
        if channels != "rgb":
            raise ConfigError(
                f"frame_channels is {channels!r}, but the model takes no frames; give frames, or leave it out"
            )
        return None
    pair = (
        isinstance(frames, (tuple, list))
        and len(frames) == 2
        and all(type(side) is int and side > 0 for side in frames)
    )
    if frames != DYNAMIC and not pair:
        raise ConfigError(f"frames is {frames!r}; expected (height, width) in pixels, or {DYNAMIC!r}")
    if config.output_preset == ONE_TENSOR:
        raise ConfigError(
            f"found frames with output_preset {ONE_TENSOR!r}, whose readers letterbox images themselves; leave one of them out"
        )
    if backend not in BACKENDS:
        raise UnsupportedByBackendError(
            f"backend {backend} takes no frames; leave frames out, or use backend='ort' or backend='portable'"
        )
    return Frames(channels=channels) if frames == DYNAMIC else Frames(int(frames[0]), int(frames[1]), channels)


def check_frames(source: str, layout: Layout, frames: Frames, most: int) -> None:
    """Refuse frames for a head whose outputs would stay in pixels of its own input, and frames above ``most`` pixels a side.

    Raises:
        UnsupportedByBackendError: the head has masks.
        ConfigError: frames are too large.
    """
    if layout.masks is not None:
        raise UnsupportedByBackendError(
            f"{source}: is a model of task {layout.task!r}, whose masks lie in its own input and not in frames; leave frames out"
        )
    if frames.size is not None and max(frames.size) > most:
        raise ConfigError(
            f"frames is {frames.height}x{frames.width}; expected at most {most} pixels a side (max_image_side)"
        )


def with_frames(fused: FusedModel, frames: Frames) -> FusedModel:
    """Return the model with frames as its input, and boxes and keypoints in pixels of the frame. A dynamic size becomes the default one.

    Raises:
        ConfigError, UnsupportedByBackendError: those of `check_frames`.
    """
    check_frames(fused.source, fused.layout, frames, fused.limits.max_image_side)
    g, image = Graph(fused.model), fused.image
    while frames.tensor in g.names:
        frames = replace(frames, tensor=f"{frames.tensor}_")
    image = replace(image, dynamic_size=False, frames=frames)
    places: list[_Place] = []

    def make(given: Tensor) -> Tensor:
        places.append(_fixed(g, image, *frames.size) if frames.size else _computed(g, image, given))
        return _to_images(g, image, frames, given, places[0])

    height, width = frames.size or ("frame_height", "frame_width")
    batch = image.batch or "batch"
    g.compute_input(image.tensor, frames.tensor, np.uint8, (batch, height, width, 3), make)
    count = g.tensor(fused.config.output_names[0])
    valid = g.op("Less", g.const(np.arange(fused.config.max_detections), np.int32), count)
    mapped = {}
    for name in _mapped(fused):
        g.rename(name, of_input(name))
        value = g.tensor(of_input(name))
        mapped[name] = _to_frame(g, fused.layout, places[0], value, valid, name == contract.KEYPOINTS)
    g.set_outputs(
        [
            (
                mapped[name] if name in mapped else g.tensor(name),
                name,
                output.dtype,
                output.shape_for(batch, fused.config.max_detections),
            )
            for name, output in fused.layout.outputs(fused.config)
        ]
    )
    model = g.to_model()
    declare_optional_inputs(model, fused.model)
    way = "stretched" if image.stretch else "letterboxed"
    note = f"takes {frames}, {way} inside to {image.height}x{image.width}"
    return replace(fused, model=model, image=image, report=None, notes=(*fused.notes, note))


def of_input(name: str) -> str:
    """Name of the tensor that an output, in pixels of the frame, is computed from, in pixels of the model's input."""
    return f"fusenms/{name}/of_input"


@dataclass(frozen=True)
class Parts:
    """What a model with frames consists of.

    Attributes:
        before: from frames to images.
        core: from images to outputs in pixels of the model's input. It is an ordinary fused model.
        after: from the number of detections and the outputs of ``core`` that have pixels, and the frames if they have any size, to
            outputs in pixels of the frame.
    """

    before: onnx.ModelProto
    core: FusedModel
    after: onnx.ModelProto


def parts(fused: FusedModel) -> Parts:
    """Take a model with frames apart. Outputs of ``core`` have their usual names.

    Raises:
        SourceError: the graph is not made of these parts.
    """
    image = fused.image
    assert image.frames is not None
    inner = {of_input(name): name for name in _mapped(fused)}
    names = [name for name, _ in fused.layout.outputs(fused.config)]
    own = [of_input(name) if name in inner.values() else name for name in names]
    given = [fused.config.output_names[0], *inner, *([image.frames.tensor] if image.frames.size is None else [])]
    model = _declared(fused)
    try:
        before = extracted(model, [image.frames.tensor], [image.tensor])
        core = renamed(extracted(model, [image.tensor], own), inner)
        after = extracted(model, given, list(inner.values()))
    except ConfigError as error:
        raise SourceError(
            f"{fused.source}: its metadata says that it takes frames, but its graph is not as fusenms makes it ({error}); fuse the weights "
            "again"
        ) from error
    return Parts(before, replace(fused, model=core, image=replace(image, frames=None), report=None), after)


def _declared(fused: FusedModel) -> onnx.ModelProto:
    """The model with the shapes of the tensors at which it is cut. ONNX does not infer those behind a loop."""
    image, batch, model = fused.image, fused.image.batch or "batch", onnx.ModelProto()
    model.CopyFrom(fused.model)
    outputs = dict(fused.layout.outputs(fused.config))
    shapes: dict[str, tuple[str | int, ...]] = {image.tensor: (batch, 3, image.height, image.width)}
    for name in _mapped(fused):
        shapes[of_input(name)] = outputs[name].shape_for(batch, fused.config.max_detections)
    kept = [entry for entry in model.graph.value_info if entry.name not in shapes]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    model.graph.value_info.extend(
        onnx.helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in shapes.items()
    )
    return model


def _mapped(fused: FusedModel) -> list[str]:
    """Names of the outputs that have pixels."""
    points = [contract.KEYPOINTS] if fused.layout.keypoints is not None else []
    return [fused.config.output_names[1], *points]


@dataclass(frozen=True)
class _Place:
    """Where frames lie in the model's input, as tensors. None: nothing to do.

    Attributes:
        inner: height and width of the scaled frame, ``[2]`` int64.
        pads: rows above, columns left, rows below, columns right, ``[2]`` int64 each pair.
        offset, gain: of x and y, ``[2]`` float32.
        limit: width and height of the frame, ``[2]`` float32.
    """

    inner: Tensor | None
    pads: tuple[Tensor, Tensor] | None
    offset: Tensor
    gain: Tensor
    limit: Tensor


def _fixed(g: Graph, image: ImageInput, height: int, width: int) -> _Place:
    """The place of frames of one size."""
    ratios = image.height / height, image.width / width
    target = np.array((image.height, image.width))
    scaled = np.array([max(1, round(side * min(ratios))) for side in (height, width)])
    inner = target if image.stretch else scaled
    start = np.array(
        [round((whole - part) / 2 - 0.1) for whole, part in zip(target.tolist(), inner.tolist(), strict=True)]
    )
    end = target - inner - start
    return _Place(
        None if tuple(inner) == (height, width) else g.const(inner, np.int64),
        (g.const(start, np.int64), g.const(end, np.int64)) if start.any() or end.any() else None,
        g.const(start[::-1], np.float32),
        g.const((inner / (height, width))[::-1], np.float32),
        g.const((width, height), np.float32),
    )


def _computed(g: Graph, image: ImageInput, frames: Tensor) -> _Place:
    """The place of frames of any size."""

    def number(*values: float) -> Tensor:
        return g.const(values, np.float64)

    def x_first(pair: Tensor) -> Tensor:
        return g.cast(g.op("Gather", pair, g.const([1, 0], np.int64), axis=0), FLOAT)

    sides = g.cast(g.slice(g.op("Shape", frames), 0, 1, 3), DOUBLE)
    target = number(image.height, image.width)
    if image.stretch:
        return _Place(g.cast(target, INT64), None, g.floats(0, 0), x_first(g.op("Div", target, sides)), x_first(sides))
    gain = g.reduce("ReduceMin", g.op("Div", target, sides), 0, keepdims=True)
    inner = g.op("Max", g.op("Round", g.op("Mul", sides, gain)), number(1))
    left_over = g.op("Sub", target, inner)
    start = g.op("Round", g.op("Sub", g.op("Mul", left_over, number(0.5)), number(0.1)))
    pads = g.cast(start, INT64), g.cast(g.op("Sub", left_over, start), INT64)
    return _Place(g.cast(inner, INT64), pads, x_first(start), x_first(g.op("Div", inner, sides)), x_first(sides))


def _to_images(g: Graph, image: ImageInput, frames: Frames, given: Tensor, place: _Place) -> Tensor:
    """Emit images ``[B, 3, height, width]`` float32, RGB, 0 to 1, from frames."""
    value: Tensor = g.cast(given, FLOAT)
    if place.inner is not None:
        batch = g.slice(g.op("Shape", given), 0, 0, 1)
        sizes = g.concat([batch, place.inner, g.const([3], np.int64)], 0)
        value = g.op("Round", _resize(g, value, sizes))
    value = g.op("Transpose", value, perm=[0, 3, 1, 2])
    if frames.channels == "bgr":
        value = g.op("Gather", value, g.const([2, 1, 0], np.int64), axis=1)
    if place.pads is not None:
        none = g.const([0, 0], np.int64)
        start, end = place.pads
        value = g.op("Pad", value, g.concat([none, start, none, end], 0), g.const(GREY, np.float32), mode="constant")
    whole = g.reshape(value, 0, 3, image.height, image.width)  # the network's shapes stay known
    return g.op("Div", whole, g.floats(FULL))


def _resize(g: Graph, value: Tensor, sizes: Tensor) -> Tensor:
    """Resize ``[B, height, width, 3]``. Before opset 13, a node that has sizes has empty inputs before them."""
    none: Any = None if g.opset >= 13 else g.const([], np.float32)
    return g.op("Resize", value, none, none, sizes, mode="linear", coordinate_transformation_mode="half_pixel")


def _to_frame(g: Graph, layout: Layout, place: _Place, value: Tensor, valid: Tensor, points: bool) -> Tensor:
    """Emit boxes or keypoints in pixels of the frame. Upright boxes and keypoints are clipped to it, and other rows stay zeros."""
    if points:
        assert layout.keypoints is not None
        place_of = g.op("Div", g.op("Sub", g.slice(value, 3, 0, 2), place.offset), place.gain)
        moved = _clipped(g, place_of, place.limit)
        if layout.keypoints.dims > 2:
            moved = g.concat([moved, g.slice(value, 3, 2, layout.keypoints.dims)], 3)
        return g.where(g.unsqueeze(g.unsqueeze(valid, 2), 3), moved, g.floats(0.0))
    if layout.angle is not None:
        none = g.floats(0.0, 0.0)
        offset = g.concat([place.offset, none, g.const([0], np.float32)], 0)
        gain = g.concat([place.gain, place.gain, g.const([1], np.float32)], 0)
        moved = g.op("Div", g.op("Sub", value, offset), gain)
    else:
        offset, gain, limit = (g.concat([pair, pair], 0) for pair in (place.offset, place.gain, place.limit))
        moved = _clipped(g, g.op("Div", g.op("Sub", value, offset), gain), limit)
    return g.where(g.unsqueeze(valid, 2), moved, g.floats(0.0))


def _clipped(g: Graph, value: Tensor, limit: Tensor) -> Tensor:
    return g.op("Min", g.op("Max", value, g.floats(0.0)), limit)
