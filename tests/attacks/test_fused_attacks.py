"""Fused files whose graph or metadata was damaged or changed: an error of ours at opening or at the call, and never another one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from common import Attack
from tiny_onnx import CLASSES, fused_bytes, metadata

import fusenms
from fusenms import contract
from fusenms.artifacts.fused import load_fused
from fusenms.errors import FusenmsError, RunError, SourceError
from fusenms.limits import Limits

METADATA, GRAPH, OUTPUTS, BYTES = "metadata", "damaged graph", "outputs that the file does not promise", "damaged bytes"
IMAGE = np.random.default_rng(3).integers(0, 256, (48, 64, 3), np.uint8)
Edit = Callable[[onnx.ModelProto], Any]


def model() -> onnx.ModelProto:
    return onnx.ModelProto.FromString(fused_bytes())


def edited(edit: Edit) -> Callable[[], bytes]:
    def make() -> bytes:
        changed = model()
        data = edit(changed)
        return data if isinstance(data, bytes) else changed.SerializeToString()

    return make


def meta(key: str, value: str) -> Edit:
    return lambda m: metadata(m, **{key.replace(".", "__"): value})


def without(key: str) -> Edit:
    def edit(changed: onnx.ModelProto) -> None:
        changed.metadata_props.remove(next(entry for entry in changed.metadata_props if entry.key == key))

    return edit


def field(key: str, *path: str, value: Any) -> Edit:
    """One value within the JSON of an entry."""

    def edit(changed: onnx.ModelProto) -> None:
        values = json.loads(next(entry.value for entry in changed.metadata_props if entry.key == key))
        inner = values
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value
        metadata(changed, **{key.replace(".", "__"): json.dumps(values)})

    return edit


def weights(value: float) -> Edit:
    """Every float of the file."""

    def edit(changed: onnx.ModelProto) -> None:
        for item in changed.graph.initializer:
            if item.data_type == TensorProto.FLOAT:
                item.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(item), value), item.name))

    return edit


def every_int(value: int) -> Edit:
    def edit(changed: onnx.ModelProto) -> None:
        for item in changed.graph.initializer:
            if item.data_type in (TensorProto.INT32, TensorProto.INT64):
                item.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(item), value), item.name))

    return edit


def output(name: str, values: np.ndarray | None = None, op: str = "", **attributes: Any) -> Edit:
    """The output is a constant for a batch of one, or what an operator makes of it; what the file declares stays."""

    def edit(changed: onnx.ModelProto) -> None:
        maker = next(node for node in changed.graph.node if name in node.output)
        maker.output[list(maker.output).index(name)] = f"{name}_before"
        if values is None:
            changed.graph.node.append(helper.make_node(op, [f"{name}_before"], [name], **attributes))
        else:
            changed.graph.node.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values)))

    return edit


def node(index: int, change: Callable[[onnx.NodeProto], Any]) -> Edit:
    return lambda m: change(m.graph.node[index])


def no_stop(changed: onnx.ModelProto) -> None:
    value = helper.make_tensor_value_info
    go, x = value("go", TensorProto.BOOL, []), value("x", TensorProto.FLOAT, None)
    body = helper.make_graph([], "body", [value("i", TensorProto.INT64, []), go, x], [go, x])
    changed.graph.initializer.append(numpy_helper.from_array(np.array(2**62), "rounds"))
    changed.graph.initializer.append(numpy_helper.from_array(np.array(True), "start"))
    output(contract.SCORES, op="Loop", body=body)(changed)
    changed.graph.node[-1].input[:] = ["rounds", "start", f"{contract.SCORES}_before"]


def bomb(changed: onnx.ModelProto) -> None:
    changed.graph.initializer.append(numpy_helper.from_array(np.array([10**7, 300]), "n"))
    changed.graph.node.append(helper.make_node("ConstantOfShape", ["n"], ["large"]))
    changed.graph.node.append(helper.make_node("ReduceMax", ["large"], ["largest"], keepdims=0))
    output(contract.SCORES, op="Add")(changed)
    changed.graph.node[-1].input.append("largest")


def flipped(seed: int) -> Callable[[], bytes]:
    """Three bytes anywhere are others."""

    def make() -> bytes:
        rng, data = np.random.default_rng(seed), bytearray(fused_bytes())
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(0, 256)
        return bytes(data)

    return make


def flipped_late(seed: int) -> Callable[[], bytes]:
    """One byte of the last tenth, where names and metadata stand."""

    def make() -> bytes:
        rng, data = np.random.default_rng(seed), bytearray(fused_bytes())
        data[rng.integers(len(data) * 9 // 10, len(data))] ^= 1 << int(rng.integers(0, 8))
        return bytes(data)

    return make


K = 300
JSON = {
    "100,000 brackets deep": "[" * 100_000,
    "100,000 objects deep": '{"a":' * 100_000,
    "no JSON": "{",
    "nothing": "",
    "null": "null",
    "a number": "5",
    "a list": "[1, 2]",
    "a text": '"a"',
    "NaN": "NaN",
    "a number of ten thousand digits": "9" * 10_000,
    "1e999": "1e999",
}
KEYS = (contract.KEY_LAYOUT, contract.KEY_CONFIG, contract.KEY_IMAGE, contract.KEY_NOTES)
VALUES = {
    "null": None,
    "a text": "x",
    "a list": [[]],
    "an object": {},
    "-1": -1,
    "10^30": 10**30,
    "NaN": float("nan"),
    "true": True,
}
FIELDS = {
    contract.KEY_IMAGE: [
        ("tensor",),
        ("height",),
        ("width",),
        ("stride",),
        ("dynamic_size",),
        ("independent",),
        ("stretch",),
    ],
    contract.KEY_CONFIG: [
        ("score_threshold",),
        ("max_detections",),
        ("max_candidates",),
        ("names",),
        ("masks",),
        ("rounds",),
        ("indices",),
    ],
    contract.KEY_LAYOUT: [
        ("family",),
        ("boxes",),
        ("boxes", "tensor"),
        ("boxes", "stop"),
        ("classes", "channel_axis"),
        ("activation",),
        ("decode",),
        ("decode", "kind"),
        ("joins",),
        ("suppress",),
        ("masks",),
        ("keypoints",),
        ("angle",),
        ("labels",),
    ],
}
SMALL = {
    "names": "{" * 50_000,
    "names unhashable": "{[]: 1}",
    "names escape": "['\\x1b[0m']",
    "names many": str(["a"] * 20_001),
    "names none": "7",
}
ODD_OUTPUTS = {
    "more detections than rows": output(contract.NUM_DETECTIONS, np.array([[K + 1]], np.int32)),
    "2^31 - 1 detections": output(contract.NUM_DETECTIONS, np.array([[2**31 - 1]], np.int32)),
    "-1 detections": output(contract.NUM_DETECTIONS, np.array([[-1]], np.int32)),
    "counts of no shape": output(contract.NUM_DETECTIONS, np.array(3, np.int32)),
    "counts for three images": output(contract.NUM_DETECTIONS, np.array([[1], [1], [1]], np.int32)),
    "no counts": output(contract.NUM_DETECTIONS, np.zeros((0, 1), np.int32)),
    "counts as floats": output(contract.NUM_DETECTIONS, op="Cast", to=TensorProto.FLOAT),
    "boxes as doubles": output(contract.BOXES, op="Cast", to=TensorProto.DOUBLE),
    "boxes as texts": output(contract.BOXES, op="Cast", to=TensorProto.STRING),
    "boxes of three numbers": output(contract.BOXES, np.zeros((1, K, 3), np.float32)),
    "fewer boxes": output(contract.BOXES, np.zeros((1, 2, 4), np.float32)),
    "boxes without an axis": output(contract.BOXES, np.zeros((K, 4), np.float32)),
    "labels of no row": output(contract.LABELS, np.zeros((1, 0), np.int32)),
    "scores as a sequence": output(contract.SCORES, op="SequenceConstruct"),
    "a loop that cannot be stopped": no_stop,
    "a tensor of 3 * 10^9": bomb,
}
GRAPHS = {
    "weights NaN": weights(float("nan")),
    "weights infinite": weights(float("inf")),
    "weights 3e38": weights(3e38),
    "weights 0": weights(0.0),
    "whole numbers -1": every_int(-1),
    "whole numbers 2^31 - 1": every_int(2**31 - 1),
    "whole numbers 0": every_int(0),
    "an operator of another name": node(3, lambda n: setattr(n, "op_type", "Relu")),
    "no nodes": lambda m: m.graph.ClearField("node"),
    "a node less": lambda m: m.graph.node.pop(20),
    "the last node less": lambda m: m.graph.node.pop(),
    "no attributes": lambda m: [n.ClearField("attribute") for n in m.graph.node] and None,
    "no initializers": lambda m: m.graph.ClearField("initializer"),
    "an output less": lambda m: m.graph.output.pop(),
    "an output of another name": lambda m: setattr(m.graph.output[0], "name", "count"),
    "the input of another name": lambda m: setattr(m.graph.input[0], "name", "image"),
    "the input of another type": lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 11),
    "a second input": lambda m: m.graph.input.append(helper.make_tensor_value_info("more", 1, [1])),
    "a negative size": lambda m: m.graph.initializer[0].dims.append(-1),
    "3 bytes": lambda m: setattr(m.graph.initializer[0], "raw_data", b"abc"),
    "opset 1": lambda m: setattr(m.opset_import[0], "version", 1),
    "another domain": node(2, lambda n: setattr(n, "domain", "com.nobody")),
}
ATTACKS = (
    *(Attack(METADATA, f"{key} is {name}", edited(meta(key, text))) for key in KEYS for name, text in JSON.items()),
    *(Attack(METADATA, f"no {key}", edited(without(key))) for key in (*KEYS, contract.KEY_BACKEND, contract.KEY_TASK, contract.KEY_NAMES)),
    *(Attack(METADATA, name, edited(meta("names", text))) for name, text in SMALL.items()),
    *(
        Attack(METADATA, f"{key} {'.'.join(path)} is {name}", edited(field(key, *path, value=value)))
        for key, paths in FIELDS.items() for path in paths for name, value in VALUES.items()
    ),
    Attack(METADATA, "another backend", edited(meta(contract.KEY_BACKEND, "nobody's"))),
    Attack(METADATA, "another task", edited(meta(contract.KEY_TASK, "pose"))),
    *(Attack(GRAPH, name, edited(edit)) for name, edit in GRAPHS.items()),
    *(Attack(OUTPUTS, name, edited(edit)) for name, edit in ODD_OUTPUTS.items()),
    *(Attack(BYTES, f"three bytes, {seed}", flipped(seed)) for seed in range(60)),
    *(Attack(BYTES, f"one bit of the metadata, {seed}", flipped_late(seed)) for seed in range(60)),
    *(Attack(BYTES, f"cut to {part} of 10", lambda part=part: fused_bytes()[: len(fused_bytes()) * part // 10]) for part in range(10)),
)  # fmt: skip


@pytest.mark.covering(quick=0)
@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_fused_file_works_or_ends_in_one_of_our_errors_when_it_is(attack, tmp_path):
    path = tmp_path / "fused.onnx"
    path.write_bytes(attack.make())
    try:
        with fusenms.Detector(path, limits=Limits(max_run_seconds=2.0)) as detect:
            found = detect([IMAGE, IMAGE])
    except FusenmsError:
        return
    assert attack.kind != OUTPUTS
    assert all(np.isfinite(one.boxes).all() for one in found)


def test_sound_file_finds_something(tmp_path):
    (tmp_path / "fused.onnx").write_bytes(fused_bytes())
    with fusenms.Detector(tmp_path / "fused.onnx") as detect:
        assert detect.class_names == tuple(f"class {i}" for i in range(CLASSES)) and len(detect([IMAGE])) == 1


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (ODD_OUTPUTS["more detections than rows"], r"gives \[301\] detections; expected 0 to 300"),
        (ODD_OUTPUTS["boxes of three numbers"], r"gives boxes float32\[1, 300, 3\]; expected float32\[1, 300, 4\]"),
        (output(contract.BOXES, np.full((1, K, 4), np.nan, np.float32)), "not finite"),
    ],
)
def test_call_says_what_is_wrong_when_outputs_break_the_contract(edit, words, tmp_path):
    changed = model()
    edit(changed)
    if "finite" in words:
        output(contract.NUM_DETECTIONS, np.array([[2]], np.int32))(changed)
    (tmp_path / "fused.onnx").write_bytes(changed.SerializeToString())
    with pytest.raises((RunError, SourceError), match=words), fusenms.Detector(tmp_path / "fused.onnx") as detect:
        detect([IMAGE])


def test_verification_of_damaged_weights_ends_in_a_report_or_an_error_of_ours(tmp_path):
    (tmp_path / "fused.onnx").write_bytes(edited(weights(float("nan")))())
    try:
        report = fusenms.verify(load_fused(tmp_path / "fused.onnx"), batches=(1,))
    except FusenmsError:
        return
    assert not report
