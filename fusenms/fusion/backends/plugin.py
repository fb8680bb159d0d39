"""Decoding and suppression by one node of the TensorRT plugin of fusenms, `FusedNMS`: from the raw head to the detections.

The node's attributes are the settings of the plugin's kernels (plugins/fused_nms.cu). docs/how-to/plugin.md describes the kernels, and how
to add the plugin to an engine.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from fusenms.artifacts.fused import FusedModel
from fusenms.artifacts.raw import ImageInput
from fusenms.boxes import MAX_REACH, MAX_REACH_ORIENTED
from fusenms.config import PostprocessConfig
from fusenms.errors import SourceError, UnsupportedByBackendError
from fusenms.fusion.backends.base import Backend, DetectionTensors
from fusenms.fusion.backends.iou import SLACK, farthest_overlapping
from fusenms.fusion.backends.ort import ORT
from fusenms.fusion.backends.portable import PORTABLE
from fusenms.fusion.candidates import Head
from fusenms.fusion.decoding import decode_boxes
from fusenms.fusion.thresholds import strict_threshold
from fusenms.graph.builder import FLOAT, INT32, Graph, Tensor
from fusenms.graph.model import sorted_model
from fusenms.layout import (
    Activation,
    AnchorBoxes,
    BoxFormat,
    Decoded,
    Distances,
    GridOffsets,
    Layout,
    TanhOffsets,
    Tap,
)

PLUGIN = "FusedNMS"
DOMAIN = "fusenms"
VERSION = "1"
INPUTS = ("image", "classes", "boxes", "objectness", "background", "angle")
"""Inputs of the node. `classes` is given again in place of an input that the head does not have, and of the image if its size is fixed."""
OUTPUTS = ("num_detections", "boxes", "scores", "labels", "indices")
BOXES = "fusenms/boxes"
"""Boxes of all candidates, decoded in the graph, for a head whose decode the kernels do not know."""
IN_HALF = "/float16"
"""Suffix of a head tensor's name: the same tensor as a half-precision network gives it, before the cast to float32."""

ACTIVATIONS = (Activation.NONE, Activation.SIGMOID, Activation.SOFTMAX)
DECODED = (BoxFormat.XYXY, BoxFormat.CXCYWH)
DECODES: tuple[type, ...] = (Decoded, Decoded, Distances, AnchorBoxes, GridOffsets, TanhOffsets)
"""In the order of the numbers that the kernels use."""
MOST_LEVELS, MOST_ANCHORS, MOST_BINS = 8, 32, 64


class Settings(ctypes.Structure):
    """Settings of the kernels, the same as `FUSENMS_SETTINGS` in plugins/fused_nms.cu, which documents each."""

    _fields_ = (
        ("classes", ctypes.c_int * 3),
        ("boxes", ctypes.c_int * 3),
        ("objectness", ctypes.c_int * 3),
        ("background", ctypes.c_int * 3),
        ("angle", ctypes.c_int * 3),
        ("num_classes", ctypes.c_int),
        ("activation", ctypes.c_int),
        ("multi_label", ctypes.c_int),
        ("score_threshold", ctypes.c_float),
        ("objectness_weight", ctypes.c_float),
        ("decode", ctypes.c_int),
        ("normalized", ctypes.c_int),
        ("bins", ctypes.c_int),
        ("values", ctypes.c_float * MOST_BINS),
        ("point", ctypes.c_float),
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("levels", ctypes.c_int),
        ("anchors", ctypes.c_int),
        ("strides", ctypes.c_int * MOST_LEVELS),
        ("anchor_sizes", ctypes.c_float * (2 * MOST_ANCHORS)),
        ("angle_sigmoid", ctypes.c_int),
        ("class_agnostic", ctypes.c_int),
        ("overlap_limit", ctypes.c_float),
        ("farthest", ctypes.c_float),
        ("max_candidates", ctypes.c_int),
        ("max_detections", ctypes.c_int),
    )

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes of a node: numbers, and lists of numbers."""
        named = {name: getattr(self, name) for name, _ in self._fields_}
        return {name: list(value) if isinstance(value, ctypes.Array) else value for name, value in named.items()}

    @classmethod
    def of_node(cls, node: onnx.NodeProto) -> Settings:
        """Read the settings from a node's attributes.

        Raises:
            SourceError: an attribute is missing or has a wrong type.
        """
        try:
            return cls.of_dict({entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute})
        except SourceError as error:
            raise SourceError(f"node {node.name!r}: {error}; fuse the weights again") from error

    @classmethod
    def of_dict(cls, given: Mapping[str, Any]) -> Settings:
        """Read the settings from numbers and lists by name.

        Raises:
            SourceError: a setting is missing or has a wrong type.
        """
        settings = cls()
        for name, kind in cls._fields_:
            try:
                value = given[name]
                setattr(settings, name, kind(*value) if issubclass(kind, ctypes.Array) else value)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise SourceError(
                    f"{name} is {given.get(name, 'missing')!r}; expected a value as fusenms writes it"
                ) from error
        return settings


def settings_of(head: Head, config: PostprocessConfig) -> Settings:
    """Return the settings of the kernels for a head.

    Raises:
        UnsupportedByBackendError: the head exceeds a fixed size of the kernels.
    """
    layout, decode, image = head.layout, head.layout.decode, head.image
    oriented, logits = layout.angle is not None, layout.activation is Activation.SIGMOID and layout.objectness is None
    sized = isinstance(decode, Decoded) and not decode.normalized
    s = Settings(
        num_classes=layout.num_classes,
        activation=ACTIVATIONS.index(layout.activation),
        multi_label=config.multi_label,
        score_threshold=strict_threshold(config.score_threshold, Activation.SIGMOID if logits else Activation.NONE),
        objectness_weight=-1.0 if layout.objectness_weight is None else layout.objectness_weight,
        decode=DECODED.index(decode.format) if isinstance(decode, Decoded) else DECODES.index(type(decode)),
        normalized=isinstance(decode, Decoded) and decode.normalized,
        height=0 if image.dynamic_size and not sized else image.height,
        width=0 if image.dynamic_size and not sized else image.width,
        angle_sigmoid=layout.angle is not None and layout.angle.sigmoid,
        class_agnostic=config.class_agnostic,
        overlap_limit=2 * farthest_overlapping(config.iou_threshold)
        if oriented
        else config.iou_threshold * (1 + SLACK),
        farthest=MAX_REACH_ORIENTED if oriented else MAX_REACH,
        max_candidates=config.max_candidates,
        max_detections=config.max_detections,
    )
    for name, tap in _taps(layout).items():
        if tap is not None:
            setattr(s, name, (tap.channel_axis, head.widths[tap.tensor], tap.start))
    if isinstance(decode, Distances):
        s.bins, s.point = decode.bins, decode.point
        _fill(s.values, decode.bin_values, f"{decode.bins} bins")
    if not isinstance(decode, Decoded):
        s.levels, s.anchors = len(decode.strides), 1
        _fill(s.strides, decode.strides, f"{len(decode.strides)} levels")
    if isinstance(decode, AnchorBoxes):
        s.anchors = len(decode.anchors[0])
        sizes = np.ravel(np.asarray(decode.anchors, np.float32)).tolist()
        _fill(s.anchor_sizes, sizes, f"{len(sizes) // 2} anchor boxes")
    return s


def _in_kernels(layout: Layout) -> Layout:
    """The layout as the kernels read it: unchanged, or with the decoded boxes `BOXES`."""
    decode = layout.decode
    if isinstance(decode, DECODES) and not (isinstance(decode, Distances) and (decode.pixels or decode.anchors > 1)):
        return layout
    return replace(layout, boxes=Tap(BOXES, 2, 0, 4), decode=Decoded(BoxFormat.XYXY), keypoints=None)


def _decode_all(g: Graph, head: Head) -> Head:
    """Emit what the kernels do not know: the decode of the boxes of all candidates. Return the head as they read it."""
    layout = _in_kernels(head.layout)
    if layout is head.layout:
        return head
    tap = head.layout.boxes
    terms: Tensor = g.slice(g.tensor(tap.tensor), tap.channel_axis, tap.start, tap.stop)
    terms = g.op("Transpose", terms, perm=[0, 2, 1]) if tap.channel_axis == 1 else terms
    if head.total is None:
        count = g.op("Gather", g.op("Shape", terms), g.const(1, np.int64), axis=0)
        numbers = g.cast(g.op("Range", g.const(0, np.int64), count, g.const(1, np.int64)), INT32)
        index: Tensor = g.reshape(numbers, 1, -1)
    else:
        index = g.const(np.arange(head.total)[None], np.int32)
    g.name(decode_boxes(g, head.layout, head.image, terms, index), BOXES)
    return replace(head, layout=layout, widths={**head.widths, BOXES: 4})


def _taps(layout: Layout) -> dict[str, Tap | None]:
    angle = None if layout.angle is None else layout.angle.value
    taps = (layout.classes, layout.boxes, layout.objectness, layout.background, angle)
    return dict(zip(INPUTS[1:], taps, strict=True))


def _fill(room: Any, values: Sequence[float], what: str) -> None:
    if len(values) > len(room):
        raise UnsupportedByBackendError(
            f"backend plugin: found {what}, more than its kernels support; take backend portable"
        )
    room[: len(values)] = list(values)


def _inputs(layout: Layout, settings: Settings, image: ImageInput) -> list[str]:
    names = {name: (tap or layout.classes).tensor for name, tap in _taps(layout).items()}
    return [layout.classes.tensor if settings.height else image.tensor, *names.values()]


def _take_half(g: Graph, layout: Layout) -> bool:
    """Let the node read the head's tensors in float16, without a cast, if every tensor that it reads was cast from float16.

    Other readers of these tensors get them cast to float32. Return whether this applied.
    """
    tensors = {tap.tensor: g.in_half(g.tensor(tap.tensor)) for tap in _taps(layout).values() if tap is not None}
    if any(half is None for half in tensors.values()):
        return False
    for name, half in tensors.items():
        given = g.op("Identity", half)
        g.name(given, f"{name}{IN_HALF}")
        g.rename(name, f"{name}/moved")
        g.name(g.cast(given, FLOAT), name)
    return True


def find(g: Graph, head: Head, config: PostprocessConfig) -> DetectionTensors:
    """Emit the plugin's node.

    Raises:
        UnsupportedByBackendError: the head exceeds a fixed size of the kernels.
    """
    head = _decode_all(g, head)
    settings = settings_of(head, config)
    g.import_domain(DOMAIN, 1)
    names = _inputs(head.layout, settings, head.image)
    if _take_half(g, head.layout):
        names = [f"{name}{IN_HALF}" if name in head.layout.tensors else name for name in names]
    count, boxes, scores, labels, indices = g.add(
        PLUGIN,
        [g.tensor(name) for name in names],
        len(OUTPUTS),
        domain=DOMAIN,
        plugin_version=VERSION,
        plugin_namespace=DOMAIN,
        **settings.to_dict(),
    )
    for tensor, dtype in (
        (count, np.int32),
        (boxes, np.float32),
        (scores, np.float32),
        (labels, np.int32),
        (indices, np.int32),
    ):
        tensor.dtype = dtype
    return DetectionTensors(g.op("Not", g.op("Less", indices, g.ints(0))), count, boxes, scores, labels, indices)


def in_float(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with a node that reads the head in float32, cast from the float16 that it reads in the file. For checking only.

    Raises:
        SourceError: a tensor in the file has the name of the cast one but is something else.
    """
    node = next((node for node in model.graph.node if node.op_type == PLUGIN), None)
    halves = [] if node is None else [name for name in dict.fromkeys(node.input) if name.endswith(IN_HALF)]
    if not halves:
        return model
    widened = onnx.ModelProto()
    widened.CopyFrom(model)
    makers = {name: node for node in widened.graph.node for name in node.output}
    for name in halves:
        wide = name.removesuffix(IN_HALF)
        maker = makers.get(wide)
        if maker is None:
            widened.graph.node.append(onnx.helper.make_node("Cast", [name], [wide], name=f"{PLUGIN}/{wide}", to=FLOAT))
        elif (maker.op_type, list(maker.input)) != ("Cast", [name]):
            raise SourceError(
                f"tensor {wide!r} is not what the plugin reads; the file was changed after it was written: fuse the weights again"
            )
    for node in widened.graph.node:
        if node.op_type == PLUGIN:
            node.input[:] = [name.removesuffix(IN_HALF) for name in node.input]
    return sorted_model(widened)


def to_standard(model: onnx.ModelProto, fused: FusedModel) -> onnx.ModelProto:
    """Return the model with standard operators in place of the node, so that ONNX Runtime can run it. For checking only.

    Raises:
        SourceError: the node contradicts the model's metadata.
    """
    model = in_float(model)
    node = next((node for node in model.graph.node if node.op_type == PLUGIN), None)
    if node is None:
        return model  # a head that needs no suppression
    layout, config, written = _in_kernels(fused.layout), fused.config, Settings.of_node(node)
    widths = {tap.tensor: getattr(written, name)[1] for name, tap in _taps(layout).items() if tap is not None}
    head = Head(layout, fused.image, widths, None)
    meant = settings_of(head, config)
    names = _inputs(layout, meant, fused.image)
    if bytes(written) != bytes(meant) or list(node.input) != names:
        wrong = [name for name, value in meant.to_dict().items() if value != written.to_dict()[name]]
        raise SourceError(
            f"node {node.name!r} contradicts the metadata ({', '.join(wrong) or 'inputs'}); the file was changed after it was "
            "written: fuse the weights again"
        )
    g, find_by = Graph(model), (ORT if layout.angle is None else PORTABLE).find

    def make() -> tuple[Tensor, ...]:
        found = find_by(g, head, config)
        return found.count, found.boxes, found.scores, found.labels, found.indices

    g.replace(PLUGIN, make)
    return g.to_model()


PLUGGED = Backend(
    "plugin",
    ".plugin.onnx",
    PLUGIN,
    find,
    to_standard,
    runs_on_onnxruntime=False,
    adaptive=False,
    knows_oriented=True,
    in_float=in_float,
)
