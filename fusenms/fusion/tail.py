"""Fuse the post-processing after a raw head: choose candidates, decode them, suppress, select.

The semantics are those of `reference.py`, which shares no code with this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fusenms import contract
from fusenms.artifacts import one_tensor
from fusenms.artifacts.frames import Tiles
from fusenms.artifacts.fused import FusedModel
from fusenms.artifacts.preprocessing import Pixels
from fusenms.artifacts.raw import ImageInput, RawModel
from fusenms.artifacts.raw_head import RawHead
from fusenms.config import PostprocessConfig
from fusenms.errors import ConfigError
from fusenms.fusion.backends import get_backend
from fusenms.fusion.backends.base import Backend, DetectionTensors, by_candidates, select
from fusenms.fusion.backends.portable import PORTABLE
from fusenms.fusion.candidates import Head
from fusenms.fusion.decoding import assemble_masks, decode_keypoints
from fusenms.fusion.thresholds import declare_inputs
from fusenms.fusion.tiles import TiledCandidates, joined
from fusenms.graph.builder import FLOAT, Graph, Tensor
from fusenms.graph.model import declared_type
from fusenms.layout import KeypointTerms, Layout, Tap
from fusenms.onnx_reading import untrusted

NO_SUPPRESSION = "no suppression"


def fuse_head(
    raw: RawModel, head: RawHead, config: PostprocessConfig, backend: str, tiles: Tiles | None = None
) -> FusedModel:
    """Return the model with the outputs of the contract, for images in RGB from 0 to 1. It is not verified yet.

    With ``tiles``, its images are those of the tiles of frames, its outputs are those of the frames, and it has another input,
    `fusenms.transforms.tiles.PLACES`, until `fusenms.transforms.frames.with_frames` computes both from frames.

    Raises:
        ConfigError: there is no backend of that name, or a setting does not apply to the backend or the head.
        UnsupportedByBackendError: the backend cannot express the settings.
    """
    emitter = get_backend(backend, config)
    with untrusted(raw.source, "fusing", trusted=raw.layout is not None):
        return _fuse(raw, head, config, backend, emitter, tiles)


def _fuse(
    raw: RawModel, head: RawHead, config: PostprocessConfig, backend: str, emitter: Backend, tiles: Tiles | None
) -> FusedModel:
    layout, pixels = head.layout, head.pixels
    suppress = layout.suppress or tiles is not None
    if config.rounds is not None and not suppress:
        raise ConfigError(f"rounds is {config.rounds}, but this head needs no suppression; leave it out")
    if config.masks == "prototype" and layout.masks is None:
        raise ConfigError(f"masks is {config.masks!r}, but a model of task {layout.task!r} has none; leave it out")
    g = Graph(raw.model)
    _check_joins(g, layout, config)
    total = None if raw.image.dynamic_size else head.candidates(layout.classes)
    types = [declared_type(raw.model, part) for join in layout.joins for part in join.parts]
    _feed_pixels(g, raw.image, pixels)
    taps, sides = layout.taps, None
    if layout.masks is not None and not raw.image.dynamic_size:
        sides = head.shapes[layout.masks.prototypes][1:]
    layout, image = _free_names(g, layout, raw.image, config)
    image = replace(image, stretch=head.stretch)
    widths = {new.tensor: head.channels(old) for old, new in zip(taps, layout.taps, strict=True)}
    _join(g, layout, types)
    layout = replace(layout, joins=())
    declare_inputs(g, layout, config)
    # NMS operators: upright boxes only, and of a known number of classes.
    known = (layout.angle is None or emitter.knows_oriented) and layout.labels is None
    suppressor = emitter if known else PORTABLE
    find, by = suppressor.find, suppressor.suppresses_by
    if not suppress:
        find, by = by_candidates(select, adaptive=False), NO_SUPPRESSION
    seen = Head(layout, image, widths, total)
    if tiles is not None:
        assert total is not None
        tiled = TiledCandidates(tiles.count, total)
        whole, channels = joined(g, layout, widths, tiled)
        seen = Head(whole, image, channels, total * tiles.count, tiled)
    tail = _Tail(g, seen, config, sides, emitter.adaptive)
    outputs = tail.outputs(find(g, seen, config))
    batch, (height, width) = image.batch or "batch", sides or ("h", "w")
    if one_tensor.has_one_tensor(config):
        shape: tuple[str | int, ...] = (batch, config.max_detections, one_tensor.width(layout))
        g.set_outputs([(_rows(g, outputs, layout, config), one_tensor.ROWS, np.dtype(np.float32), shape)])
        if layout.masks is not None:
            shape = (batch, layout.masks.coefficients.channels, height, width)
            g.add_output(outputs[contract.PROTOTYPES], one_tensor.PROTOTYPES, np.dtype(np.float32), shape)
        model = one_tensor.with_contract(g.to_model(), layout, config)
    else:
        g.set_outputs(
            [
                (
                    outputs[output.name],
                    name,
                    output.dtype,
                    output.shape_for(batch, config.max_detections, height, width),
                )
                for name, output in layout.outputs(config)
            ]
        )
        model = g.to_model()
    names = raw.class_names or tuple(f"class{i}" for i in range(layout.num_classes))
    notes = raw.notes if pixels == Pixels() else (*raw.notes, f"takes RGB from 0 to 1; converted inside to {pixels}")
    if idle := _idle_settings(layout, config, suppress):
        notes = (*notes, f"{NO_SUPPRESSION}: {' and '.join(idle)} mean{'s' * (len(idle) == 1)} nothing to this head")
    return FusedModel(
        model=model,
        image=image,
        class_names=names,
        task=layout.task,
        source=raw.source,
        layout=layout,
        config=config,
        backend=backend,
        suppressed_by=by,
        precision=raw.precision,
        notes=notes,
        limits=raw.limits,
    )


@dataclass(frozen=True)
class _Tail:
    """Emits what comes after suppression.

    ``sides`` are the prototypes' height and width, if they are fixed. ``adaptive``: shapes may depend on the data.
    """

    g: Graph
    head: Head
    config: PostprocessConfig
    sides: tuple[int, ...] | None
    adaptive: bool

    def outputs(self, found: DetectionTensors) -> dict[str, Tensor]:
        """The outputs of the contract by the names of fusenms. Task outputs are gathered for each row."""
        g, layout, valid = self.g, self.head.layout, found.valid
        made = {
            contract.NUM_DETECTIONS: found.count,
            contract.BOXES: found.boxes,
            contract.SCORES: found.scores,
            contract.LABELS: found.labels,
            contract.INDICES: found.indices,
        }
        if found.converged is not None:
            made[contract.CONVERGED] = found.converged
        numbers = g.where(valid, found.indices, g.ints(0))
        if layout.masks is not None:
            coefficients = self._channels(layout.masks.coefficients, numbers, valid)
            made |= self._masks(coefficients, g.tensor(layout.masks.prototypes), made[contract.BOXES], valid)
        if layout.keypoints is not None:
            points = self._keypoints(layout.keypoints, numbers, valid)
            made[contract.KEYPOINTS] = g.where(g.unsqueeze(g.unsqueeze(valid, 2), 3), points, g.floats(0.0))
        return made

    def _keypoints(self, keypoints: KeypointTerms, numbers: Tensor, valid: Tensor) -> Tensor:
        g, head = self.g, self.head
        terms = self._channels(keypoints.values, numbers, valid)
        if head.tiled is None:
            return decode_keypoints(g, head.layout, head.image, terms, numbers)
        tile, number = head.tiled.split(g, numbers)
        return head.tiled.points_to_frame(
            g, decode_keypoints(g, head.layout, head.image, terms, number), tile, keypoints.dims
        )

    def _masks(self, coefficients: Tensor, prototypes: Tensor, boxes: Tensor, valid: Tensor) -> dict[str, Tensor]:
        g, config = self.g, self.config
        if config.masks == "coefficients":
            return {contract.MASK_COEFFICIENTS: coefficients, contract.PROTOTYPES: g.op("Identity", prototypes)}
        rows, branches = config.max_detections, config.rounds is None
        masks = assemble_masks(
            g, self.head.image, coefficients, prototypes, boxes, valid, rows, self.sides, self.adaptive, branches
        )
        return {contract.MASKS: masks}

    def _channels(self, tap: Tap, numbers: Tensor, valid: Tensor) -> Tensor:
        """The channels of a tap for the candidates ``[B, K]``: ``[B, K, channels]``; zeros in rows that are not valid."""
        g, tensor = self.g, self.g.tensor(tap.tensor)
        whole = (tap.start, tap.stop) == (0, self.head.widths[tap.tensor])
        part = tensor if whole else g.slice(tensor, tap.channel_axis, tap.start, tap.stop)
        rows = g.take_rows(part, numbers, tap.candidate_axis, tap.channels)
        return g.where(g.unsqueeze(valid, 2), rows, g.floats(0.0))


def _rows(g: Graph, outputs: Mapping[str, Tensor], layout: Layout, config: PostprocessConfig) -> Tensor:
    """Emit all rows as one tensor; see `fusenms.artifacts.one_tensor`. Rows past the detections have score 0 and label -1."""
    boxes, scores, labels = (outputs[name] for name in (contract.BOXES, contract.SCORES, contract.LABELS))
    used = g.op("Less", g.const([range(config.max_detections)], np.int32), outputs[contract.NUM_DETECTIONS])
    scores = g.where(used, scores, g.floats(0.0))
    labels = g.cast(g.where(used, labels, g.ints(contract.NO_LABEL)), FLOAT)
    upright = boxes if layout.angle is None else g.slice(boxes, 2, 0, 4)
    parts = [upright, g.unsqueeze(scores, 2), g.unsqueeze(labels, 2)]
    if layout.angle is not None:
        parts.append(g.slice(boxes, 2, 4, 5))
    if layout.masks is not None:
        parts.append(outputs[contract.MASK_COEFFICIENTS])
    if layout.keypoints is not None:
        parts.append(g.reshape(outputs[contract.KEYPOINTS], 0, 0, -1))
    return g.concat(parts, 2)


def _idle_settings(layout: Layout, config: PostprocessConfig, suppress: bool) -> list[str]:
    """Settings that differ from the default but have no effect on this head, because it needs no suppression."""
    names = [] if suppress else ["iou_threshold", "max_candidates", "class_agnostic"]
    if layout.labels is not None:
        names.append("multi_label")
    usual = PostprocessConfig()
    return [name for name in names if getattr(config, name) != getattr(usual, name)]


def _check_joins(g: Graph, layout: Layout, config: PostprocessConfig) -> None:
    """Refuse a join whose tensor has a name that is taken.

    Raises:
        ConfigError: a tensor of the model, or an output or optional input of the fused model, has the name.
    """
    taken = g.names | set(_names_of(layout, config))
    if bad := [join.tensor for join in layout.joins if join.tensor in taken]:
        raise ConfigError(
            f"join into {bad[0]!r}: an output, an optional input or another tensor has that name; expected its own, as 'joined_{bad[0]}'"
        )


def _names_of(layout: Layout, config: PostprocessConfig) -> list[str]:
    """Names of the outputs and of the optional inputs of the fused model."""
    own = list(one_tensor.tensors(layout)) if one_tensor.has_one_tensor(config) else []
    return own + [name for name, _ in layout.outputs(config)] + [given.name for given in layout.runtime_inputs(config)]


def _free_names(g: Graph, layout: Layout, image: ImageInput, config: PostprocessConfig) -> tuple[Layout, ImageInput]:
    """Rename tensors that have the name of an output or an optional input of the fused model. Return layout and image input with the new
    names."""
    renamed = {}
    for name in _names_of(layout, config):
        if name in g.names:
            new = f"head_{name}"
            while new in g.names:
                new = f"{new}_"
            g.rename(name, new)
            renamed[name] = new
    return layout.renamed(renamed), replace(image, tensor=renamed.get(image.tensor, image.tensor))


def _feed_pixels(g: Graph, image: ImageInput, pixels: Pixels) -> None:
    """Emit the conversion of images in RGB from 0 to 1 to the network's pixel format, if it is another one."""
    if pixels == Pixels():
        return
    factor, offset = (g.const(values, np.float32) for values in pixels.terms)

    def make(value: Tensor) -> Tensor:
        if pixels.channels == "bgr":
            value = g.op("Gather", value, g.const([2, 1, 0], np.int64), axis=1)
        scaled = g.op("Mul", value, factor)
        return g.op("Add", scaled, offset) if any(pixels.mean) else scaled

    g.feed(image.tensor, make)


def _join(g: Graph, layout: Layout, types: list[int]) -> None:
    """Emit the head tensors that the model has in parts. ``types`` are the element types of the parts, in order; 0 if not declared."""
    kinds = iter(types)
    for join in layout.joins:
        parts = []
        for part in join.parts:
            whole = g.tensor(part) if next(kinds) in (0, FLOAT) else g.cast(g.tensor(part), FLOAT)
            if join.anchors > 1:
                whole = g.op("Transpose", g.reshape(whole, 0, join.anchors, join.channels, -1), perm=[0, 1, 3, 2])
            parts.append(g.reshape(whole, *join.part_shape))
        g.name(g.concat(parts, join.candidate_axis), join.tensor)
