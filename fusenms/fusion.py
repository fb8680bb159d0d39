"""Fuse the post-processing behind a raw head: choose candidates, decode those, suppress, select.

The semantics are those of `reference.py`, which shares no code with this.
"""

from __future__ import annotations

import math

import numpy as np

from fusenms import contract
from fusenms.artifacts import FusedModel, RawModel
from fusenms.backends import get_backend
from fusenms.backends.base import Chosen
from fusenms.config import PostprocessConfig
from fusenms.decoding import decode_boxes
from fusenms.errors import SourceError
from fusenms.graph import INT32, Graph, Tensor, declared_shape
from fusenms.layout import Activation, Layout, Tap


def fuse_head(raw: RawModel, layout: Layout, config: PostprocessConfig, backend: str) -> FusedModel:
    """Return the model with the outputs of the contract. It is not verified yet.

    Raises:
        ConfigError: no backend of that name.
        UnsupportedByBackendError: the backend cannot express the settings.
        SourceError: a tensor of the layout is not in the model.
    """
    emitter = get_backend(backend)
    g = Graph(raw.model)
    _check_taps(raw, layout)
    total = _count_candidates(raw, layout)
    layout = _rename_taps(g, layout, config)
    chosen = _choose(g, raw, layout, config, total)
    outputs = emitter.suppress(g, chosen, config)
    g.set_outputs(
        [
            (tensor, name, spec.dtype, spec.shape_for("batch", config.max_detections))
            for tensor, name, spec in zip(outputs, config.output_names, contract.OUTPUTS, strict=True)
        ]
    )
    names = raw.names or tuple(f"class{i}" for i in range(layout.num_classes))
    return FusedModel(g.to_model(), raw.image, names, raw.task, raw.source, layout, config, backend, None, raw.notes)


def strict_threshold(score_threshold: float, activation: Activation) -> np.float32:
    """The float32 t for which ``x > t`` says of every float32 score that it is above the threshold.

    With a sigmoid, scores are logits and the threshold is its logit: the largest float32 not above it.
    """
    value = float(np.float32(score_threshold))
    if activation is Activation.SIGMOID:
        if value <= 0 or value >= 1:
            return np.float32(-np.inf if value <= 0 else np.inf)
        value = math.log(value) - math.log1p(-value)
    near = np.float32(value)
    return near if float(near) <= value else np.nextafter(near, np.float32(-np.inf))


def _check_taps(raw: RawModel, layout: Layout) -> None:
    outputs = [entry.name for entry in raw.model.graph.output]
    if lost := [name for name in layout.tensors if name not in outputs]:
        raise SourceError(
            f"{raw.source}: the layout names {', '.join(lost)}, which the model does not give; its outputs are {', '.join(outputs)}"
        )


def _rename_taps(g: Graph, layout: Layout, config: PostprocessConfig) -> Layout:
    """Give inner tensors that have the names of outputs-to-be other names; the layout follows."""
    renamed = {}
    for name in config.output_names:
        if name in g.names:
            new = f"head_{name}"
            while new in g.names:
                new = f"{new}_"
            g.rename(name, new)
            renamed[name] = new
    values = layout.to_dict()
    for tap in ("boxes", "classes", "objectness"):
        if values[tap]:
            values[tap]["tensor"] = renamed.get(values[tap]["tensor"], values[tap]["tensor"])
    return Layout.from_dict(values)


def _count_candidates(raw: RawModel, layout: Layout) -> int | None:
    """Candidates per image where the size is fixed, as ONNX Runtime finds them; None where it is open."""
    if raw.image.dynamic_size:
        return None
    tap = layout.classes
    count = declared_shape(raw.model, tap.tensor)
    known = count[3 - tap.channel_axis] if len(count) == 3 else None
    if known is not None:
        return known
    from fusenms.heads.evidence import Evidence

    sample = next(s for s in Evidence(raw).samples if s.tensor == tap.tensor)
    return int(sample.value.shape[3 - tap.channel_axis])


def _choose(g: Graph, raw: RawModel, layout: Layout, config: PostprocessConfig, total: int | None) -> Chosen:
    """Emit the choice of the best candidates above the threshold, and decode their boxes."""
    scores, activation = _candidate_scores(g, layout, config.multi_label)
    threshold = g.const(strict_threshold(config.score_threshold, activation), np.float32)
    passes = g.op("And", g.op("Greater", scores, threshold), g.op("Less", scores, g.floats(np.inf)))
    eligible = g.where(passes, scores, g.floats(-np.inf))
    if config.multi_label and total is not None:
        total *= layout.num_classes
    count = min(config.max_candidates, total) if total is not None else None
    raw_scores, index = g.top_k(eligible, _limit(g, eligible, config.max_candidates, count))
    valid = g.op("Greater", raw_scores, g.floats(-np.inf))
    if config.multi_label:
        classes = g.ints(layout.num_classes)
        anchor = g.op("Div", index, classes)
        labels = g.op("Sub", index, g.op("Mul", anchor, classes))
        terms = _take(g, layout, anchor, layout.boxes)
    else:
        anchor = index
        terms, class_scores = _take(g, layout, anchor, layout.boxes), _take(g, layout, anchor, layout.classes)
        labels = g.cast(g.op("ArgMax", class_scores, axis=2, keepdims=0), INT32)
        finite = g.cast(
            g.op("Less", class_scores, g.floats(np.inf)), INT32
        )  # a NaN may hide from the maximum: look at each
        valid = g.op("And", valid, g.op("Greater", g.reduce("ReduceMin", finite, 2), g.ints(0)))
    probabilities = g.op("Sigmoid", raw_scores) if activation is Activation.SIGMOID else raw_scores
    boxes = decode_boxes(g, layout, raw.image, terms, anchor)
    return Chosen(boxes, probabilities, labels, valid, count, layout.num_classes)


def _candidate_scores(g: Graph, layout: Layout, multi_label: bool) -> tuple[Tensor, Activation]:
    """Emit the score of every candidate and say what it still needs to be a probability.

    ``[B, N]``: the best class of each box; with ``multi_label`` ``[B, N * C]``, classes of a box side by side.
    """
    classes = _part(g, layout.classes)
    axis = layout.classes.channel_axis
    if multi_label:
        scores: Tensor = g.op("Transpose", classes, perm=[0, 2, 1]) if axis == 1 else classes
    else:
        scores = g.reduce("ReduceMax", classes, axis)
    activation = layout.activation
    if layout.objectness is not None:
        objectness: Tensor = g.reshape(_part(g, layout.objectness), 0, -1, *([1] if multi_label else []))
        if activation is Activation.SIGMOID:
            usable = g.op("Less", scores, g.floats(np.inf))  # false for NaN; the sigmoid would hide an infinity
            scores = g.where(usable, g.op("Sigmoid", scores), g.floats(0.0))
            objectness = g.op("Sigmoid", objectness)
        scores, activation = g.op("Mul", scores, objectness), Activation.NONE
    return (g.reshape(scores, 0, -1) if multi_label else scores), activation


def _part(g: Graph, tap: Tap) -> Tensor:
    """The channels of a tap, for all candidates."""
    return g.slice(g.tensor(tap.tensor), tap.channel_axis, tap.start, tap.stop)


def _take(g: Graph, layout: Layout, index: Tensor, tap: Tap) -> Tensor:
    """The channels of a tap, for the chosen candidates ``[B, k]``: ``[B, k, channels]``."""
    return g.take_rows(_part(g, tap), index, 3 - tap.channel_axis, tap.channels)


def _limit(g: Graph, scores: Tensor, most: int, count: int | None) -> Tensor:
    """How many candidates to keep, ``[1]`` int64."""
    if count is not None:
        return g.const([count], np.int64)
    here = g.slice(g.op("Shape", scores), 0, 1, 2)
    return g.where(g.op("Less", here, g.const([most], np.int64)), here, g.const([most], np.int64))
