"""A file that takes one image ``[3, height, width]``, as torchvision's detectors do, takes a batch of one instead."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fusenms.conversion.branches import rename

IMAGE, FIRST = "fusenms/one_image", "fusenms/first_image"


def with_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model whose image input is ``[1, 3, height, width]``, if its only input is ``[3, height, width]``; else the model itself."""
    stored = {item.name for item in model.graph.initializer}
    inputs = [entry for entry in model.graph.input if entry.name not in stored]
    dims = inputs[0].type.tensor_type.shape.dim if len(inputs) == 1 else []
    if len(dims) != 3 or dims[0].dim_value != 3:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    entry = next(entry for entry in graph.input if entry.name == inputs[0].name)
    for node in graph.node:
        rename(node, {entry.name: IMAGE})
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), FIRST))
    graph.node.insert(0, helper.make_node("Gather", [entry.name, FIRST], [IMAGE], name=IMAGE, axis=0))
    shape = entry.type.tensor_type.shape
    shape.dim.insert(0, onnx.TensorShapeProto.Dimension(dim_value=1))
    return copy
