"""Frames as the input: uint8 ``[B, height, width, 3]`` are letterboxed or stretched in the graph, and results are in pixels of the frame.

`with_frames` puts standard operators before and after a fused model and changes nothing between them. `parts` takes the model out again,
so that it is proven as any other, and gives what was put around it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx

from fusenms import contract
from fusenms.artifacts.frames import CHANNELS, Frames, Tiles
from fusenms.artifacts.fused import FusedModel
from fusenms.artifacts.raw import RawModel
from fusenms.config import PostprocessConfig
from fusenms.contract import ONE_TENSOR
from fusenms.errors import ConfigError, SourceError, UnsupportedByBackendError
from fusenms.graph.builder import FLOAT, Graph, Tensor
from fusenms.graph.editing import extracted, renamed
from fusenms.graph.model import declare_optional_inputs
from fusenms.layout import Layout
from fusenms.transforms.letterboxing import Place, computed_place, fixed_place, in_colors, sides_of, to_images
from fusenms.transforms.tiles import PLACES, cuts, places, tile_images

DYNAMIC = "dynamic"
BACKENDS = ("ort", "portable")
"""Backends of standard operators. The others compute the suppression in a plugin of TensorRT, which is given images."""


def frames_from(
    frames: str | tuple[int, int] | None, channels: str, backend: str, config: PostprocessConfig,
    tiles: Tiles | tuple[int, int] | None = None,
) -> Frames | None:  # fmt: skip
    """The frames that arguments of `fusenms.fuse` describe: height and width, ``dynamic``, or None. With tiles, None is ``dynamic``.

    Raises:
        ConfigError: they are neither, or the outputs are one tensor of rows, whose readers map boxes themselves.
        UnsupportedByBackendError: the backend takes no frames.
    """
    if channels not in CHANNELS:
        raise ConfigError(f"frame_channels is {channels!r}; expected one of {', '.join(map(repr, CHANNELS))}")
    cut = _tiles_from(tiles)
    if frames is None and cut is not None:
        frames = DYNAMIC
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
    height, width = (None, None) if frames == DYNAMIC else (int(frames[0]), int(frames[1]))
    try:
        return Frames(height, width, channels, tiles=cut)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _tiles_from(tiles: Tiles | tuple[int, int] | None) -> Tiles | None:
    if tiles is None or isinstance(tiles, Tiles):
        return tiles
    try:
        return Tiles(*tiles)
    except (TypeError, ValueError) as error:
        reason = error if isinstance(error, ValueError) else f"tiles is {tiles!r}; expected (rows, columns) or Tiles"
        raise ConfigError(str(reason)) from error


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


def check_tiles(raw: RawModel, layout: Layout, config: PostprocessConfig) -> None:
    """Refuse tiles for a network that cannot see them as one batch of images of one size.

    Raises:
        UnsupportedByBackendError: it has a fixed batch, or is loaded for any size; or its head, which needs no suppression for an image,
            is to take thresholds at run time.
    """
    if config.runtime_thresholds and not layout.suppress:
        raise UnsupportedByBackendError(
            f"{raw.source}: is end-to-end, so that its thresholds at run time have no IoU threshold, but tiles need one; leave "
            "runtime_thresholds or tiles out"
        )
    if raw.image.batch is not None:
        raise UnsupportedByBackendError(
            f"{raw.source}: has a fixed batch of {raw.image.batch}, but tiles are a batch of their own; leave batch or tiles out"
        )
    if raw.image.dynamic_size:
        raise UnsupportedByBackendError(
            f"{raw.source}: is loaded for images of any size, but tiles are all made to one; leave dynamic_size or tiles out"
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
    placed: list[Place] = []

    def make(frame: Tensor) -> dict[str, Tensor]:
        given = in_colors(g, frames, frame)
        if frames.tiles is not None:
            made = cuts(g, image, frames, given)
            placed.append(
                replace(made.whole, offset=g.floats(0, 0), gain=g.floats(1, 1))
            )  # they are in the frame already
            images = tile_images(g, image, frames, given, made)
            return {image.tensor: images, PLACES: places(g, frames.tiles, made)}
        placed.append(
            fixed_place(g, image, *frames.size) if frames.size else computed_place(g, image, sides_of(g, given))
        )
        return {image.tensor: to_images(g, image, frames.channels, given, placed[0])}

    height, width = frames.size or ("frame_height", "frame_width")
    batch = image.batch or "batch"
    g.compute_inputs(frames.tensor, np.uint8, (batch, *frames.shape(height, width)), make)
    count = g.tensor(fused.config.output_names[0])
    valid = g.op("Less", g.const(np.arange(fused.config.max_detections), np.int32), count)
    mapped = {}
    for name in _mapped(fused):
        g.rename(name, of_input(name))
        value = g.tensor(of_input(name))
        mapped[name] = _to_frame(g, fused.layout, placed[0], value, valid, name == contract.KEYPOINTS)
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
        before: from frames to images, and the places of tiles.
        core: from images to outputs in pixels of the model's input. It is an ordinary fused model. With tiles, it is from the images of
            tiles and their places to outputs in pixels of the frame.
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
    given = [fused.config.output_names[0], *inner]
    if image.frames.size is None and (image.frames.tiles is None or fused.layout.angle is None):
        given.append(image.frames.tensor)  # oriented boxes of tiles are in the frame already, and are not clipped to it
    images = [image.tensor] if image.frames.tiles is None else [image.tensor, PLACES]
    model = _declared(fused)
    try:
        before = extracted(model, [image.frames.tensor], images)
        core = renamed(extracted(model, images, own), inner)
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
    tiles = None if image.frames is None else image.frames.tiles
    images = batch if tiles is None else "images"
    shapes: dict[str, tuple[str | int, ...]] = {image.tensor: (images, 3, image.height, image.width)}
    if tiles is not None:
        shapes[PLACES] = (tiles.count, 4)
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


def _to_frame(g: Graph, layout: Layout, place: Place, value: Tensor, valid: Tensor, points: bool) -> Tensor:
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
