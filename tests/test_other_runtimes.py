"""Ties in any order: what a runtime may do that does not keep them, and what it still may not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from other_runtimes import ties_in_any_order, verify_on
from raw_heads import LAYOUTS, fused_model

from fusenms.graph.model import sorted_model
from fusenms.graph.session import OnnxRuntimeRunner

Change = Callable[[dict[str, np.ndarray]], None]


def higher_index_first(model: onnx.ModelProto) -> onnx.ModelProto:
    """TopK as no standard has it: of equal values the one with the higher index comes first."""
    turned = onnx.ModelProto()
    turned.CopyFrom(model)
    for name, value in (("back", [-1]), ("all", [-(2**31)]), ("one", [1])):
        turned.graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), f"turned/{name}"))
    for i, node in enumerate([node for node in turned.graph.node if node.op_type == "TopK"]):
        values, places = node.input[0], node.output[1]
        mine = f"turned/{i}"
        node.input[0], node.output[1] = f"{mine}/values", f"{mine}/places"
        turned.graph.node.extend([
            helper.make_node("Slice", [values, "turned/back", "turned/all", "turned/back", "turned/back"], [f"{mine}/values"]),
            helper.make_node("Shape", [values], [f"{mine}/shape"]),
            helper.make_node("Gather", [f"{mine}/shape", "turned/back"], [f"{mine}/count"]),
            helper.make_node("Sub", [f"{mine}/count", "turned/one"], [f"{mine}/last"]),
            helper.make_node("Sub", [f"{mine}/last", f"{mine}/places"], [places]),
        ])  # fmt: skip
    return sorted_model(turned)


class Turned:
    """A model with such a TopK, whose outputs are changed before anybody sees them."""

    def __init__(self, model: onnx.ModelProto, change: Change = lambda outputs: None) -> None:
        self._runner, self._change = OnnxRuntimeRunner(higher_index_first(model)), change
        self.inputs, self.outputs = self._runner.inputs, self._runner.outputs

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = {name: values.copy() for name, values in self._runner.run(inputs).items()}
        self._change(outputs)
        return outputs

    def close(self) -> None:
        self._runner.close()


@pytest.mark.parametrize("backend", ["ort", "portable"])
@pytest.mark.parametrize("layout", ["distances", "decoded", "end_to_end"])
def test_ties_in_another_order_are_accepted_where_asked_only(layout, backend):
    fused = fused_model(LAYOUTS[layout](), backend)
    assert not verify_on(fused, Turned)
    with ties_in_any_order():
        report = verify_on(fused, Turned)
    assert report, str(report)


def swap_first_rows(outputs: dict[str, np.ndarray]) -> None:
    for name in ("boxes", "scores", "labels"):
        outputs[name][:, [0, 1]] = outputs[name][:, [1, 0]]


def drop_last_row(outputs: dict[str, np.ndarray]) -> None:
    for i, (count,) in enumerate(outputs["num_detections"]):
        if count:
            outputs["num_detections"][i] -= 1
            outputs["boxes"][i, count - 1], outputs["scores"][i, count - 1], outputs["labels"][i, count - 1] = 0, 0, -1


def move_a_late_box(outputs: dict[str, np.ndarray]) -> None:
    """Behind the first three rows, which are all that a message shows."""
    outputs["boxes"][outputs["num_detections"][:, 0] > 6, 6, 0] += 3


def wrong_late_label(outputs: dict[str, np.ndarray]) -> None:
    outputs["labels"][outputs["num_detections"][:, 0] > 6, 6] ^= 1


@pytest.mark.parametrize("change", [swap_first_rows, drop_last_row, move_a_late_box, wrong_late_label])
def test_what_is_no_tie_is_still_seen(change):
    fused = fused_model(LAYOUTS["distances"](), "ort")
    with ties_in_any_order():
        assert not verify_on(fused, lambda model: Turned(model, change))
