"""Fuse the post-processing behind a raw head: choose candidates, decode those, suppress, select.

The semantics are those of `reference.py`, which shares no code with this.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fusenms.artifacts import FusedModel, ImageInput, Pixels, RawModel
from fusenms.backends import get_backend
from fusenms.backends.base import select
from fusenms.choosing import choose
from fusenms.config import PostprocessConfig
from fusenms.errors import ConfigError, SourceError
from fusenms.graph import FLOAT, Graph, Tensor, declared_shape, declared_type
from fusenms.heads import spec_of
from fusenms.heads.evidence import Evidence
from fusenms.layout import Layout


def fuse_head(raw: RawModel, layout: Layout, config: PostprocessConfig, backend: str) -> FusedModel:
    """Return the model with the outputs of the contract, for pictures in RGB from 0 to 1. It is not verified yet.

    Raises:
        ConfigError: no backend of that name, or a setting that it does not have.
        UnsupportedByBackendError: the backend cannot express the settings.
        SourceError: a tensor of the layout is not in the model.
    """
    emitter = get_backend(backend, config)
    if config.rounds is not None and not layout.suppress:
        raise ConfigError(f"rounds is {config.rounds}, but this head needs no suppression; leave it out")
    g = Graph(raw.model)
    _check_taps(raw, layout)
    shapes = _head_shapes(raw, layout)
    total = None if raw.image.dynamic_size else shapes[layout.classes.tensor][2 - layout.classes.channel_axis]
    spec, types = spec_of(layout), [declared_type(raw.model, part) for join in layout.joins for part in join.parts]
    pixels = spec.pixels if raw.pixels is None else raw.pixels
    _feed_pixels(g, raw.image, pixels)
    tensors, (layout, image) = layout.tensors, _free_names(g, layout, raw.image, config)
    image = replace(image, stretch=spec.stretch if raw.stretch is None else raw.stretch)
    widths = {new: shapes[old][layout.channel_axis(new) - 1] for old, new in zip(tensors, layout.tensors, strict=True)}
    _join(g, layout, types)
    layout = replace(layout, joins=())
    if layout.suppress:
        outputs = emitter.suppress(g, choose(g, layout, image, config, widths, total, emitter.adaptive), config)
    else:
        outputs = select(g, choose(g, layout, image, config, widths, total, adaptive=False), config)
    g.set_outputs(
        [
            (tensor, name, spec.dtype, spec.shape_for("batch", config.max_detections))
            for tensor, (name, spec) in zip(outputs, config.outputs, strict=True)
        ]
    )
    names = raw.names or tuple(f"class{i}" for i in range(layout.num_classes))
    notes = raw.notes if pixels == Pixels() else (*raw.notes, f"takes RGB from 0 to 1; inside made into {pixels}")
    return FusedModel(g.to_model(), image, names, raw.task, raw.source, layout, config, backend, None, notes)


def _check_taps(raw: RawModel, layout: Layout) -> None:
    made = {name for node in raw.model.graph.node for name in node.output}
    if lost := [name for name in layout.sources if name not in made]:
        outputs = ", ".join(entry.name for entry in raw.model.graph.output)
        raise SourceError(
            f"{raw.source}: the layout names {', '.join(lost)}, which is not in the model; its outputs are {outputs}"
        )


def _free_names(g: Graph, layout: Layout, image: ImageInput, config: PostprocessConfig) -> tuple[Layout, ImageInput]:
    """Give tensors that have the names of outputs-to-be other names; layout and input follow."""
    renamed = {}
    for name, _ in config.outputs:
        if name in g.names:
            new = f"head_{name}"
            while new in g.names:
                new = f"{new}_"
            g.rename(name, new)
            renamed[name] = new
    values = layout.to_dict()
    for tap in filter(None, (values["boxes"], values["classes"], values["objectness"])):
        tap["tensor"] = renamed.get(tap["tensor"], tap["tensor"])
    for join in values["joins"]:
        join["parts"] = [renamed.get(part, part) for part in join["parts"]]
    return Layout.from_dict(values), replace(image, tensor=renamed.get(image.tensor, image.tensor))


def _feed_pixels(g: Graph, image: ImageInput, pixels: Pixels) -> None:
    """Emit what makes the network's own pixels of a picture in RGB from 0 to 1; nothing where it takes those."""
    if pixels == Pixels():
        return
    factor, offset = (g.const(values, np.float32) for values in pixels.terms)

    def make(picture: Tensor) -> Tensor:
        if pixels.channels == "bgr":
            picture = g.op("Gather", picture, g.const([2, 1, 0], np.int64), axis=1)
        scaled = g.op("Mul", picture, factor)
        return g.op("Add", scaled, offset) if any(pixels.mean) else scaled

    g.feed(image.tensor, make)


def _join(g: Graph, layout: Layout, types: list[int]) -> None:
    """Emit the head tensors that the model has in parts. ``types`` are those of the parts, in order, 0 where it declares none."""
    kinds = iter(types)
    for join in layout.joins:
        parts = []
        for part in join.parts:
            whole = g.tensor(part) if next(kinds) in (0, FLOAT) else g.cast(g.tensor(part), FLOAT)
            parts.append(g.reshape(whole, *join.part_shape))
        g.name(g.concat(parts, 3 - join.channel_axis), join.tensor)


def _head_shapes(raw: RawModel, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Shape of each head tensor, without the batch: as declared, or as ONNX Runtime finds it at the default size."""
    declared = {name: declared_shape(raw.model, name) for name in layout.tensors}
    if all(declared.values()):
        return declared
    return {name: value.shape[1:] for name, value in Evidence(raw).head(layout).items() if name in layout.tensors}
