"""Find the suppression of a third-party file, and read what it does.

| operator | made by |
|---|---|
| `EfficientNMS_TRT` | YOLOv7 ``--end2end``, YOLOv8-TensorRT, TensorRT-YOLO, NVIDIA's samples |
| `EfficientNMSX_TRT`, `EfficientIdxNMS_TRT` | forks of Ultralytics for DeepStream, TensorRT-YOLO |
| `BatchedNMS_TRT`, `BatchedNMSDynamic_TRT` | yolort, older TensorRT samples |
| `TRTBatchedNMS` | mmdeploy |
| `NonMaxSuppression` | Ultralytics ``nms=True``, YOLOv7 ``--end2end`` for ONNX Runtime, super-gradients, mmdeploy, PINTO's model zoo |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from fusenms.conversion.branches import inner_types
from fusenms.conversion.semantics import Semantics
from fusenms.errors import SuppressionError
from fusenms.graph.model import captured
from fusenms.sources.onnx_file import NMS_OPS

STANDARD = "NonMaxSuppression"
EFFICIENT = "EfficientNMS_TRT"
WITH_INDICES = ("EfficientNMSX_TRT", "EfficientIdxNMS_TRT")
"""The same plugin with the numbers of the boxes that it keeps as a fifth output."""
BATCHED = ("BatchedNMS_TRT", "BatchedNMSDynamic_TRT", "TRTBatchedNMS")
ORIENTED = {
    "NMSRotated": "the IoU of polygons",
    "TRTBatchedRotatedNMS": "the IoU of polygons",
    "EfficientRotatedNMS_TRT": "the IoU of polygons or the probabilistic one, which depends on the version of the plugin",
}
"""Operators for oriented boxes (mmcv, mmdeploy, TensorRT-YOLO), and the overlap by which they suppress."""
PLUGINS = (EFFICIENT, *WITH_INDICES, *BATCHED)
TWO_STAGE = ("RoiAlign", "MaxRoiPool", "ROIAlign_TRT", "PyramidROIAlign_TRT", "MMCVRoiAlign", "MMCVMultiLevelRoiAlign")
"""Operators that look at the network's own boxes again."""


@dataclass(frozen=True)
class Found:
    """The suppression of a file: its nodes, all of one operator, in the order of the graph.

    Attributes:
        operator: their type.
        nodes: one for each image of a batch or each class, or a single one.
        boxes, scores: the tensors that the nodes read.
    """

    operator: str
    nodes: tuple[onnx.NodeProto, ...]

    @property
    def boxes(self) -> tuple[str, ...]:
        return tuple(node.input[0] for node in self.nodes)

    @property
    def scores(self) -> tuple[str, ...]:
        return tuple(node.input[1] for node in self.nodes)

    @property
    def is_plugin(self) -> bool:
        """Whether it is a plugin of TensorRT."""
        return self.operator in PLUGINS


def find_suppression(source: str, model: onnx.ModelProto) -> Found | None:
    """Return the suppression of a file; None if there is none.

    Raises:
        SuppressionError: it is of an unknown kind, or a part of a detector with two stages.
    """
    nodes = [node for node in model.graph.node if any(word in node.op_type for word in NMS_OPS)]
    if not nodes:
        if holder := next((node for node in model.graph.node if set(NMS_OPS) & inner_types(node)), None):
            raise SuppressionError(
                f"{source}: suppresses inside of the subgraphs of its {holder.op_type} node {holder.name!r}; expected a suppression "
                "outside of subgraphs, or in one branch of an If whose other branch gives no rows: such a file cannot be converted. "
                "Export the model again without its suppression"
            )
        return None
    if pool := next((node for node in model.graph.node if node.op_type in TWO_STAGE), None):
        raise SuppressionError(
            f"{source}: has {len(nodes)} suppressions and a {pool.op_type} node {pool.name!r}, so that it is a detector of two stages, "
            "whose second one looks at boxes that the first one keeps; expected one stage: such a file cannot be converted. Run it as it "
            "is in ONNX Runtime, or convert a detector of one stage (YOLO, FCOS, RetinaNet, SSD)"
        )
    kinds = sorted({node.op_type for node in nodes})
    if oriented := next((node for node in nodes if node.op_type in ORIENTED), None):
        raise SuppressionError(
            f"{source}: suppresses oriented boxes by {oriented.op_type} (node {oriented.name!r}), whose overlap is "
            f"{ORIENTED[oriented.op_type]}; expected the probabilistic IoU, as fusenms takes it: other boxes would be kept, so that such a "
            "file cannot be converted. Export the model without its suppression, and fuse that"
        )
    if len(kinds) > 1 or kinds[0] not in (STANDARD, *PLUGINS):
        raise SuppressionError(
            f"{source}: suppresses by {', '.join(kinds)} (node {nodes[0].name!r}); expected one of {', '.join((STANDARD, *PLUGINS))}"
        )
    if kinds[0] in PLUGINS and len(nodes) > 1:
        raise SuppressionError(f"{source}: has {len(nodes)} nodes {kinds[0]}; expected one for the whole batch")
    producers = producers_of(model)
    behind = ancestors(producers, [name for node in nodes for name in node.input[:2]])
    outputs = {name: node for node in nodes for name in node.output}
    if nested := next((node for name, node in outputs.items() if name in behind), None):
        raise SuppressionError(
            f"{source}: what its suppression node {nested.name!r} keeps is suppressed again; expected one stage: such a file cannot be "
            "converted"
        )
    return Found(kinds[0], tuple(nodes))


def producers_of(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Map each tensor to the node that computes it."""
    return {name: node for node in model.graph.node for name in node.output if name}


def ancestors(producers: Mapping[str, onnx.NodeProto], names: Iterable[str], stop: Iterable[str] = ()) -> set[str]:
    """Names of the tensors, and of all that they are computed from, not looking behind those of ``stop``."""
    found, todo, stopped = set[str](), list(names), set(stop)
    while todo:
        name = todo.pop()
        if name in found or not name:
            continue
        found.add(name)
        node = producers.get(name)
        if node is not None and name not in stopped:
            todo += [*node.input, *captured(node)]
    return found


def plugin_semantics(found: Found) -> Semantics:
    """What a plugin does, by its attributes and their published defaults."""
    (node,) = found.nodes
    given = attributes(node)
    if found.operator not in BATCHED:
        others = []
        if given.get("box_coding", 0) == 1:
            others.append("boxes as centers and sizes: read as such")
        if given.get("score_activation", 0):
            others.append("a sigmoid of the scores inside the plugin")
        if (background := given.get("background_class", -1)) >= 0:
            others.append(f"class {background} is the background, and never a row")
        if found.operator in WITH_INDICES:
            others.append("the numbers of the boxes that are kept, as an output: the setting indices gives them")
        return Semantics(
            operator=found.operator,
            score_threshold=float(given.get("score_threshold", 0.25)),
            iou_threshold=float(given.get("iou_threshold", 0.5)),
            max_detections=int(given.get("max_output_boxes", 100)),
            multi_label=True,
            class_agnostic=bool(given.get("class_agnostic", 0)),
            inclusive=True,
            others=tuple(others),
        )
    values = {name.replace("_", "").lower(): value for name, value in given.items()}
    others = [f"at most {values['topk']} candidates of each class"] if values.get("topk", -1) > 0 else []
    if values.get("clipboxes", 1):
        others.append("boxes clipped to 0 to 1")
    if (background := values.get("backgroundlabelid", -1)) >= 0:
        others.append(f"class {background} is the background, and never a row")
    return Semantics(
        operator=found.operator,
        score_threshold=float(values.get("scorethreshold", 0.0)),
        iou_threshold=float(values.get("iouthreshold", 0.5)),
        max_detections=int(values.get("keeptopk", 100)),
        multi_label=True,
        class_agnostic=False,
        others=tuple(others),
    )


def standard_semantics(found: Found, constants: Mapping[str, np.ndarray], context: ChainContext) -> Semantics:
    """What a chain around `NonMaxSuppression` does.

    Args:
        constants: values of the inputs that are no boxes or scores, and of what scores are compared with.
    """
    node = found.nodes[0]
    most, iou, score = (_scalar(node, place, constants) for place in (2, 3, 4))
    compared = [value for value in context.compared if 0 < value < 1]
    threshold = max([0.0 if score is None else score, *compared])
    others = []
    if context.offset:
        others.append("classes kept apart by an offset of their boxes, which rounds coordinates")
    rows = context.rows
    if most is not None and 0 < most < 2**31 - 1:
        if context.rows_of_suppression == 1:
            rows = int(most) if rows is None else min(rows, int(most))
        else:
            others.append(f"at most {int(most)} rows of each class")
    if context.selected_before is not None:
        others.append(f"at most {context.selected_before} boxes of each image enter suppression")
    return Semantics(
        operator=found.operator if len(found.nodes) == 1 else f"{len(found.nodes)} nodes {found.operator}",
        score_threshold=threshold,
        iou_threshold=0.0 if iou is None else iou,
        max_detections=rows,
        multi_label=context.rows_of_suppression > 1,
        class_agnostic=context.rows_of_suppression == 1 and not context.offset and context.classes > 1,
        others=tuple(others),
    )


@dataclass(frozen=True)
class ChainContext:
    """What is around a `NonMaxSuppression`.

    Attributes:
        rows_of_suppression: number of classes that the operator tells apart.
        classes: number of classes of the head.
        offset: whether class numbers are added to its boxes.
        compared: constants that scores are compared with before it.
        rows: rows of the file's output, if they are fixed.
        selected_before: number of boxes that a top-k leaves; None if there is none.
    """

    rows_of_suppression: int
    classes: int
    offset: bool
    compared: tuple[float, ...]
    rows: int | None
    selected_before: int | None = None


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a plugin's node by name. A list of one number is the number, as TensorRT reads it and YOLOv7 writes it."""
    values = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    return {name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in values.items()}


def _scalar(node: onnx.NodeProto, place: int, constants: Mapping[str, np.ndarray]) -> float | None:
    if len(node.input) <= place or node.input[place] not in constants:
        return None
    value = constants[node.input[place]]
    return float(value.reshape(-1)[0]) if value.size == 1 else None
