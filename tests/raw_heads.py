"""Tiny raw models, one for each layout. Every head tensor is made by one convolution of the image for each level.

To set exact boxes and scores, a test cuts the fused model before the head (`tail_of`) and feeds head tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fusenms import PostprocessConfig, RawModel
from fusenms.artifacts.fused import FusedModel
from fusenms.artifacts.preprocessing import Pixels
from fusenms.artifacts.raw import ImageInput
from fusenms.fusion.backends import get_backend
from fusenms.graph.model import cut_before
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.layout import (
    Activation,
    AnchorBoxes,
    AnchorDeltas,
    AngleTerm,
    BoxFormat,
    Decoded,
    Distances,
    GridOffsets,
    KeypointTerms,
    Layout,
    MaskTerms,
    PointOffsets,
    TanhOffsets,
    Tap,
    anchors_per_cell,
    has_anchors_last,
)
from fusenms.pipeline import fuse

SIZE = 64
STRIDES = (8, 16, 32)
CELLS = sum((SIZE // s) ** 2 for s in STRIDES)
ANCHORS = (((10.0, 13.0), (16.0, 30.0)), ((30.0, 20.0), (24.0, 40.0)), ((50.0, 50.0), (20.0, 60.0)))


def distances(classes: int = 5) -> Layout:
    """YOLOv8 at its earliest tap."""
    boxes, scores = Tap("dist", 1, 0, 64), Tap("logits", 1, 0, classes)
    return Layout("yolov8", boxes, scores, None, Activation.SIGMOID, Distances(STRIDES, 16))


def end_to_end(classes: int = 5) -> Layout:
    """YOLO26's one-to-one head: plain distances, no suppression."""
    boxes, scores = Tap("dist", 1, 0, 4), Tap("logits", 1, 0, classes)
    return Layout("yolov8", boxes, scores, None, Activation.SIGMOID, Distances(STRIDES, 1), suppress=False)


def anchor_boxes(classes: int = 5) -> Layout:
    """YOLOv5 at its earliest tap."""
    taps = (Tap("head", 1, 0, 4), Tap("head", 1, 5, 5 + classes), Tap("head", 1, 4, 5))
    return Layout("yolov5", *taps, Activation.SIGMOID, AnchorBoxes(STRIDES, ANCHORS))


def decoded(classes: int = 5) -> Layout:
    """YOLOv8 as exported by third parties, decoded."""
    boxes, scores = Tap("output0", 1, 0, 4), Tap("output0", 1, 4, 4 + classes)
    return Layout("yolov8", boxes, scores, None, Activation.NONE, Decoded(BoxFormat.CXCYWH))


def decoded_objectness(classes: int = 5) -> Layout:
    """YOLOv5 as exported by third parties, decoded, with objectness."""
    taps = (Tap("output0", 2, 0, 4), Tap("output0", 2, 5, 5 + classes), Tap("output0", 2, 4, 5))
    return Layout("yolov5", *taps, Activation.NONE, Decoded(BoxFormat.CXCYWH))


def corners_rows(classes: int = 5) -> Layout:
    """Boxes (xyxy) and scores as two outputs, candidates before channels."""
    boxes, scores = Tap("boxes", 2, 0, 4), Tap("scores", 2, 0, classes)
    return Layout("two-outputs", boxes, scores, None, Activation.NONE, Decoded(BoxFormat.XYXY))


def queries(classes: int = 5) -> Layout:
    """DETR: a softmax with "no object" as its last class, normalized boxes, no suppression."""
    logits = [Tap("logits", 2, *span) for span in ((0, classes), (classes, classes + 1))]
    decode = Decoded(BoxFormat.CXCYWH, normalized=True)
    return Layout(
        "detr",
        Tap("pred_boxes", 2, 0, 4),
        logits[0],
        None,
        Activation.SOFTMAX,
        decode,
        suppress=False,
        background=logits[1],
    )


def sigmoid_queries(classes: int = 5) -> Layout:
    """RT-DETR: a sigmoid for every class of a query."""
    boxes, logits = Tap("pred_boxes", 2, 0, 4), Tap("logits", 2, 0, classes)
    decode = Decoded(BoxFormat.CXCYWH, normalized=True)
    return Layout("rtdetr", boxes, logits, None, Activation.SIGMOID, decode, suppress=False)


def background_first(classes: int = 5) -> Layout:
    """SSD before its softmax, channels first."""
    boxes, decode = Tap("boxes", 2, 0, 4), Decoded(BoxFormat.XYXY, normalized=True)
    scores, background = Tap("conf", 1, 1, 1 + classes), Tap("conf", 1, 0, 1)
    return Layout("ssd", boxes, scores, None, Activation.SOFTMAX, decode, background=background)


def grid_offsets(classes: int = 5) -> Layout:
    """YOLOX as exported without its decode."""
    taps = (Tap("output", 2, 0, 4), Tap("output", 2, 5, 5 + classes), Tap("output", 2, 4, 5))
    return Layout("yolox", *taps, Activation.NONE, GridOffsets(STRIDES))


def weighted(classes: int = 5) -> Layout:
    """FastestDet: the score is a weighted mean of objectness and class."""
    taps = (Tap("output", 1, 1, 5), Tap("output", 1, 5, 5 + classes), Tap("output", 1, 0, 1))
    return Layout("fastestdet", *taps, Activation.NONE, TanhOffsets(STRIDES), objectness_weight=0.6)


def low_corners(classes: int = 5) -> Layout:
    """NanoDet-Plus: distances from the low corner of each cell."""
    scores, boxes = Tap("output", 2, 0, classes), Tap("output", 2, classes, classes + 32)
    return Layout("nanodet", boxes, scores, None, Activation.NONE, Distances(STRIDES, 8, point=0.0))


def finished_rows(classes: int = 5) -> Layout:
    """Rows of box, score and class, as in end-to-end exports."""
    taps = (Tap("rows", 2, 0, 4), Tap("rows", 2, 4, 5))
    decode = Decoded(BoxFormat.XYXY)
    return Layout("rows", *taps, None, Activation.NONE, decode, suppress=False, labels=Tap("rows", 2, 5, 6))


UNEVEN = (((12.0, 12.0), (20.0, 10.0)), ((24.0, 24.0),), ((40.0, 56.0), (48.0, 24.0), (64.0, 64.0)))


def pixel_distances(classes: int = 5) -> Layout:
    """FCOS: distances in pixels, and a centerness."""
    taps = (Tap("dist", 1, 0, 4), Tap("logits", 1, 0, classes), Tap("centerness", 1, 0, 1))
    return Layout("fcos", *taps, Activation.SIGMOID, Distances(STRIDES, 1, pixels=True))


def anchored_distances(classes: int = 5) -> Layout:
    """SCRFD: two candidates for each low corner of a cell, side by side, with keypoints."""
    boxes, scores = Tap("dist", 2, 0, 4), Tap("scores", 2, 0, classes)
    decode = Distances(STRIDES, 1, point=0.0, anchors=2, anchors_last=True)
    terms = KeypointTerms(Tap("points", 2, 0, 10), 2, factor=1.0)
    return Layout("scrfd", boxes, scores, None, Activation.NONE, decode, keypoints=terms)


def anchor_deltas(classes: int = 5) -> Layout:
    """RetinaNet, with another number of anchors for each level."""
    boxes, logits = Tap("deltas", 2, 0, 4), Tap("logits", 2, 0, classes)
    return Layout(
        "retinanet", boxes, logits, None, Activation.SIGMOID, AnchorDeltas(STRIDES, UNEVEN, point=0.0, log_limit=1.5)
    )


def anchor_deltas_y_first(classes: int = 5) -> Layout:
    """EfficientDet, with variances."""
    boxes, logits = Tap("deltas", 1, 0, 4), Tap("logits", 1, 0, classes)
    decode = AnchorDeltas(STRIDES, ANCHORS, variances=(0.1, 0.2), anchors_last=False, y_first=True)
    return Layout("efficientdet", boxes, logits, None, Activation.SIGMOID, decode)


def point_offsets(classes: int = 5) -> Layout:
    """BlazeFace: offsets in pixels, with keypoints."""
    taps = (Tap("raw", 2, 0, 4), Tap("logits", 2, 0, classes))
    terms = KeypointTerms(Tap("raw", 2, 4, 16), 2, factor=1.0, point=0.5, pixels=True)
    return Layout("blazeface", *taps, None, Activation.SIGMOID, PointOffsets(STRIDES, (2, 1, 3)), keypoints=terms)


PROTOTYPES = 6
MASKS = MaskTerms(Tap("coefficients", 1, 0, PROTOTYPES), "protos")


def masks(classes: int = 5) -> Layout:
    """YOLOv8-seg at its earliest tap."""
    return replace(distances(classes), masks=MASKS)


def masks_end_to_end(classes: int = 5) -> Layout:
    """YOLO26-seg's one-to-one head."""
    return replace(end_to_end(classes), masks=MASKS)


def masks_decoded(classes: int = 5) -> Layout:
    """YOLOv8-seg as exported by third parties: coefficients after the classes."""
    terms = MaskTerms(Tap("output0", 1, 4 + classes, 4 + classes + PROTOTYPES), "output1")
    return replace(decoded(classes), masks=terms)


def masks_anchor_boxes(classes: int = 5) -> Layout:
    """YOLOv5-seg: with objectness and several anchors for each cell."""
    terms = MaskTerms(Tap("head", 1, 5 + classes, 5 + classes + PROTOTYPES), "protos")
    return replace(anchor_boxes(classes), masks=terms)


def keypoints(classes: int = 5) -> Layout:
    """YOLOv8-pose at its earliest tap."""
    return replace(distances(classes), keypoints=KeypointTerms(Tap("points", 1, 0, 12), 3, factor=2.0))


def keypoints_end_to_end(classes: int = 5) -> Layout:
    """YOLO26-pose's one-to-one head, without visibility."""
    terms = KeypointTerms(Tap("points", 1, 0, 6), 2, factor=1.0, point=0.5)
    return replace(end_to_end(classes), keypoints=terms)


def keypoints_decoded(classes: int = 5) -> Layout:
    """YOLOv8-pose as exported by third parties, decoded."""
    return replace(decoded(classes), keypoints=KeypointTerms(Tap("output0", 1, 4 + classes, 16 + classes), 3))


def masks_and_keypoints(classes: int = 5) -> Layout:
    """YOLOv8 with masks and keypoints."""
    return replace(keypoints(classes), masks=MASKS)


def oriented(classes: int = 5) -> Layout:
    """YOLOv8-obb at its earliest tap."""
    return replace(distances(classes), angle=AngleTerm(Tap("angle", 1, 0, 1), sigmoid=True))


def oriented_end_to_end(classes: int = 5) -> Layout:
    """YOLO26-obb's one-to-one head."""
    return replace(end_to_end(classes), angle=AngleTerm(Tap("angle", 1, 0, 1)))


def oriented_decoded(classes: int = 5) -> Layout:
    """YOLOv8-obb as exported by third parties, decoded."""
    return replace(decoded(classes), angle=AngleTerm(Tap("output0", 1, 4 + classes, 5 + classes)))


TASK_LAYOUTS = (
    *(masks, masks_end_to_end, masks_decoded, masks_anchor_boxes, keypoints, keypoints_end_to_end, keypoints_decoded),
    *(masks_and_keypoints, oriented, oriented_end_to_end, oriented_decoded),
    *(anchored_distances, point_offsets),
)
"""Heads with task outputs."""

LAYOUTS: dict[str, Callable[..., Layout]] = {
    f.__name__: f
    for f in (
        *(distances, end_to_end, anchor_boxes, decoded, decoded_objectness, corners_rows, queries, sigmoid_queries),
        *(background_first, grid_offsets, weighted, low_corners, finished_rows),
        *(pixel_distances, anchor_deltas, anchor_deltas_y_first),
        *TASK_LAYOUTS,
    )
}


def candidates_of(layout: Layout) -> int:
    if isinstance(layout.decode, Decoded):
        return CELLS
    return sum((SIZE // s) ** 2 * count for s, count in zip(STRIDES, anchors_per_cell(layout.decode), strict=True))


def shapes_of(layout: Layout) -> dict[str, tuple[int, int]]:
    """Shape of each head tensor, without the batch."""
    count, shapes = candidates_of(layout), {}
    for tensor in dict.fromkeys(tap.tensor for tap in layout.taps):
        width = max(tap.stop for tap in layout.taps if tap.tensor == tensor)
        shapes[tensor] = (width, count) if layout.channel_axis(tensor) == 1 else (count, width)
    if layout.masks is not None:
        shapes[layout.masks.prototypes] = (PROTOTYPES, SIZE // 4, SIZE // 4)
    return shapes


def limits_of(layout: Layout, tensor: str, width: int) -> np.ndarray:
    """For each channel of a head tensor, where its values end that begin at 0; 0 for a channel that takes any value."""
    limits = np.zeros(width)
    taps = [layout.classes, layout.objectness] if layout.activation is Activation.NONE else []
    given = [(tap, 1.0) for tap in taps if tap is not None]
    if isinstance(layout.decode, Decoded):
        given.append((layout.boxes, 1.0 if layout.decode.normalized else SIZE))
    elif isinstance(layout.decode, Distances) and layout.decode.bins == 1:
        given.append((layout.boxes, 4.0))
    for tap, limit in given:
        if tap.tensor == tensor:
            limits[tap.start : tap.stop] = limit
    return limits


def raw_model(layout: Layout, opset: int = 17, limited: bool = True) -> RawModel:
    """A raw model with the head of a layout. Unless ``limited``, its head is bare convolutions, whose values may contradict the layout."""
    rng = np.random.default_rng(1)
    nodes, weights = [], []
    if layout.masks is not None:
        weights.append(
            numpy_helper.from_array(rng.normal(0, 0.7, (PROTOTYPES, 3, 4, 4)).astype(np.float32), "protos_w")
        )
        nodes.append(helper.make_node("Conv", ["images", "protos_w"], [layout.masks.prototypes], strides=[4, 4]))
    for tensor in dict.fromkeys(tap.tensor for tap in layout.taps):
        width = max(tap.stop for tap in layout.taps if tap.tensor == tensor)
        decode, levels = layout.decode, []
        each = (1,) * len(STRIDES) if isinstance(decode, Decoded) else anchors_per_cell(decode)
        for stride, anchors in zip(STRIDES, each, strict=True):
            kernel = rng.normal(0, 3 / stride, (width * anchors, 3, stride, stride)).astype(np.float32)
            weights.append(numpy_helper.from_array(kernel, f"{tensor}_w{stride}"))
            conv, flat = f"{tensor}_conv{stride}", f"{tensor}_flat{stride}"
            nodes.append(helper.make_node("Conv", ["images", f"{tensor}_w{stride}"], [conv], strides=[stride] * 2))
            if anchors > 1 and not isinstance(decode, Decoded) and has_anchors_last(decode):
                apart, turned = f"{tensor}_apart{stride}", f"{tensor}_turned{stride}"
                weights.append(numpy_helper.from_array(np.array([0, width, anchors, -1], np.int64), f"{apart}_shape"))
                nodes.append(helper.make_node("Reshape", [conv, f"{apart}_shape"], [apart]))
                nodes.append(helper.make_node("Transpose", [apart], [turned], perm=[0, 1, 3, 2]))
                conv = turned
            nodes.append(helper.make_node("Reshape", [conv, f"{tensor}_shape"], [flat]))
            levels.append(flat)
        weights.append(numpy_helper.from_array(np.array([0, width, -1], np.int64), f"{tensor}_shape"))
        rows = tensor if layout.channel_axis(tensor) == 1 else f"{tensor}_joined"
        limits = limits_of(layout, tensor, width) * limited
        values = f"{tensor}_values" if limits.any() else rows
        nodes.append(helper.make_node("Concat", levels, [values], axis=2))
        if limits.any():
            for name, factors in (("limits", limits), ("unlimited", limits == 0)):
                weights.append(numpy_helper.from_array(factors.astype(np.float32)[:, None], f"{tensor}_{name}"))
            nodes += [
                helper.make_node("Sigmoid", [values], [f"{tensor}_part"]),
                helper.make_node("Mul", [f"{tensor}_part", f"{tensor}_limits"], [f"{tensor}_within"]),
                helper.make_node("Mul", [values, f"{tensor}_unlimited"], [f"{tensor}_free"]),
                helper.make_node("Add", [f"{tensor}_within", f"{tensor}_free"], [rows]),
            ]
        if rows != tensor:
            nodes.append(helper.make_node("Transpose", [rows], [tensor], perm=[0, 2, 1]))
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
        for name, shape in shapes_of(layout).items()
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])
    graph = helper.make_graph(nodes, "raw", [images], outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    return RawModel(
        model=model,
        image=ImageInput("images", SIZE, SIZE, 32),
        class_names=(),
        task="detect",
        source="tiny.onnx",
        layout=layout,
        pixels=Pixels(),
    )


def fused_model(layout: Layout, backend: str = "ort", opset: int = 17, **config: object) -> FusedModel:
    return fuse(
        raw_model(layout, opset),
        layout=layout,
        config=PostprocessConfig.from_dict(dict(config)),
        backend=backend,
        unverified=True,
    )


def tail_of(fused: FusedModel) -> OnnxRuntimeRunner:
    """The tail, open in ONNX Runtime. It takes head tensors and returns the outputs of the contract."""
    shapes = dict(zip(fused.layout.tensors, shapes_of(fused.layout).values(), strict=True))
    return OnnxRuntimeRunner(get_backend(fused.backend).to_standard(cut_before(fused.model, shapes), fused))
