"""Third-party ONNX files that are damaged, lie, or cost too much. Each ends in one of our errors, or is a sound file after all."""

from __future__ import annotations

import os
import struct
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from common import Attack
from tiny_onnx import metadata, third_party

import fusenms
from fusenms.errors import FusenmsError, SourceError
from fusenms.limits import Limits

LIMITS = Limits(max_run_seconds=1.0)
MOST_SECONDS = 20.0
TENSOR, SHAPE, TEXT, METADATA, FUNCTIONS, LOOPS, COST, EXTERNAL, DEPTH, GRAPH, FILES = (
    "sizes of tensors that lie", "sizes and types of inputs", "text", "metadata", "functions", "loops without end", "single large tensors",
    "external data", "depth and number", "graphs that are none", "special files",
)  # fmt: skip
Edit = Callable[[onnx.ModelProto], Any]


def edited(edit: Edit) -> Callable[[Path], Path]:
    """The sound file after an edit, which gives bytes where the file is not the edited model."""

    def make(folder: Path) -> Path:
        model, path = third_party(), folder / "model.onnx"
        data = edit(model)
        path.write_bytes(data if isinstance(data, bytes) else model.SerializeToString())
        return path

    return make


def first(model: onnx.ModelProto, name: str = "w8") -> onnx.TensorProto:
    return next(item for item in model.graph.initializer if item.name == name)


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(item for item in model.graph.node if item.name == name)


def constant(name: str, values: np.ndarray) -> Edit:
    return lambda m: first(m, name).CopyFrom(numpy_helper.from_array(values, name))


def side(value: int, axis: int = 2) -> Edit:
    return lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[axis], "dim_value", value)


def dims(*values: int) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        first(model).dims[:] = values

    return edit


def typed(model: onnx.ModelProto) -> None:
    """Elements as entries rather than bytes, one too few."""
    item = first(model, "steps")
    values = numpy_helper.to_array(item).ravel()
    item.ClearField("raw_data")
    item.float_data.extend(values[:-1].tolist())


def both(model: onnx.ModelProto) -> None:
    item = first(model, "parts")
    item.int64_data.extend(numpy_helper.to_array(item).tolist())


def sparse(model: onnx.ModelProto) -> None:
    values, indices = helper.make_tensor("s", 1, [1], [1.0]), helper.make_tensor("i", 7, [1], [5])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [1 << 40]))


def strings(model: onnx.ModelProto) -> None:
    first(model).CopyFrom(helper.make_tensor("w8", TensorProto.STRING, [2], [b"a", b"b"]))


def nan(model: onnx.ModelProto) -> None:
    first(model).CopyFrom(numpy_helper.from_array(np.full((7, 3, 8, 8), np.nan, np.float32), "w8"))


def replaced(old: bytes, new: bytes) -> Edit:
    return lambda m: m.SerializeToString().replace(old, new)


def rename(node_name: str, new: str) -> Edit:
    return lambda m: setattr(node(m, node_name), "name", new)


def meta(**values: str) -> Edit:
    return lambda m: metadata(m, **values)


def twice(model: onnx.ModelProto) -> None:
    model.metadata_props.add(key="names", value="['x']")


def many_entries(model: onnx.ModelProto) -> bytes:
    """Two bytes each in the file."""
    return model.SerializeToString() + bytes([0x72, 0]) * 6_000_000


def empty_nodes(model: onnx.ModelProto) -> bytes:
    body = bytes([0x0A, 0]) * 6_000_000
    return model.SerializeToString() + b"\x3a" + varint(len(body)) + body


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def function(name: str, nodes: list[onnx.NodeProto]) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, ["x"], ["y"], nodes, opsets)


def with_functions(*functions: onnx.FunctionProto) -> Edit:
    """The input goes through the first of these."""

    def edit(model: onnx.ModelProto) -> None:
        model.opset_import.append(helper.make_opsetid("own", 1))
        model.functions.extend(functions)
        node(model, "tanh").CopyFrom(helper.make_node(functions[0].name, ["xy"], ["xy1"], name="tanh", domain="own"))

    return edit


def call(name: str, given: str = "x", made: str = "y") -> onnx.NodeProto:
    return helper.make_node(name, [given], [made], domain="own")


def doubling(levels: int) -> list[onnx.FunctionProto]:
    last = function(f"f{levels}", [helper.make_node("Tanh", ["x"], ["y"])])
    return [*(function(f"f{i}", [call(f"f{i + 1}", "x", "z"), call(f"f{i + 1}", "z")]) for i in range(levels)), last]


def chained(levels: int) -> list[onnx.FunctionProto]:
    last = function(f"f{levels}", [helper.make_node("Tanh", ["x"], ["y"])])
    return [*(function(f"f{i}", [call(f"f{i + 1}")]) for i in range(levels)), last]


def standard_function(model: onnx.ModelProto) -> None:
    made = [helper.make_node("Neg", ["x"], ["y"])]
    model.functions.append(helper.make_function("", "Sigmoid", ["x"], ["y"], made, [helper.make_opsetid("", 17)]))


def body(nodes: list[onnx.NodeProto], go: str = "go", state: str = "after") -> onnx.GraphProto:
    value = helper.make_tensor_value_info
    before = [value("number", 7, []), value("go", 9, []), value("before", 1, None)]
    return helper.make_graph(nodes, "body", before, [value(go, 9, []), value(state, 1, None)])


def looped(make_body: Callable[[], onnx.GraphProto], rounds: int | None = 2**62) -> Edit:
    """The scores go through a loop."""

    def edit(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "start"))
        if rounds is not None:
            model.graph.initializer.append(numpy_helper.from_array(np.array(rounds, np.int64), "rounds"))
        inputs = ["" if rounds is None else "rounds", "start", "logits"]
        at = list(model.graph.node).index(node(model, "sigmoid"))
        model.graph.node.insert(at, helper.make_node("Loop", inputs, ["looped"], name="loop", body=make_body()))
        node(model, "sigmoid").input[0] = "looped"

    return edit


def copying() -> onnx.GraphProto:
    nodes = [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Neg", ["before"], ["after"])]
    return body(nodes, "go_on")


def nested() -> onnx.GraphProto:
    inner = copying()
    for item in (*inner.input, *inner.output):
        item.name = f"inner_{item.name}"
    for item in inner.node:
        item.input[:], item.output[:] = ([f"inner_{name}" for name in names] for names in (item.input, item.output))
    return body([helper.make_node("Loop", ["rounds", "start", "before"], ["after"], body=inner)])


def folded() -> onnx.GraphProto:
    constant = helper.make_node("Constant", [], ["one"], value=helper.make_tensor("one", 1, [], [1.0]))
    return body([constant, helper.make_node("Add", ["one", "one"], ["after"])])


def dead() -> onnx.GraphProto:
    return body([helper.make_node("Shape", ["before"], ["nobody"])], state="before")


def added(*nodes: onnx.NodeProto, **constants: Any) -> Edit:
    """Nodes whose result ``big`` goes into the scores by its maximum."""

    def edit(model: onnx.ModelProto) -> None:
        for name, values in constants.items():
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
        at = list(model.graph.node).index(node(model, "sigmoid"))
        more = [
            *nodes,
            helper.make_node("Cast", ["big"], ["big_float"], to=1),
            helper.make_node("ReduceMin", ["big_float"], ["least"], keepdims=0),
            helper.make_node("Sub", ["logits", "least"], ["less"]),
        ]
        for i, item in enumerate(more):
            model.graph.node.insert(at + i, item)
        node(model, "sigmoid").input[0] = "less"

    return edit


make_node = helper.make_node
LARGE = 10**12


def joins(count: int) -> Edit:
    nodes = [make_node("Shape", ["logits"], ["join0"])]
    nodes += [make_node("Concat", [f"join{i}"] * 2, [f"join{i + 1}"], axis=0) for i in range(count)]
    nodes[-1].output[0] = "big"
    return added(*nodes)


def products(model: onnx.ModelProto) -> None:
    nodes = [make_node("ConstantOfShape", ["n"], ["product0"])]
    nodes += [make_node("MatMul", [f"product{i}", "product0"], [f"product{i + 1}"]) for i in range(9)]
    nodes[-1].output[0] = "big"
    added(*nodes, n=np.array([14_000, 14_000]))(model)


def computed(model: onnx.ModelProto) -> None:
    nodes = [
        make_node("Shape", ["logits"], ["s"]),
        make_node("Mul", ["s", "n"], ["t"]),
        make_node("Expand", ["logits", "t"], ["big"]),
    ]
    added(*nodes, n=np.array([1, 1, 10**10]))(model)


def claimed(model: onnx.ModelProto) -> None:
    added(make_node("ConstantOfShape", ["n"], ["big"]), n=np.array([LARGE]))(model)
    model.graph.value_info.append(helper.make_tensor_value_info("big", 1, [1]))


def within_function(model: onnx.ModelProto) -> None:
    nodes = [
        make_node("Constant", [], ["n"], value=helper.make_tensor("n", 7, [1], [LARGE])),
        make_node("ConstantOfShape", ["n"], ["b"]),
        make_node("ReduceMax", ["b"], ["c"], keepdims=0),
        make_node("Add", ["x", "c"], ["y"]),
    ]
    with_functions(function("f", nodes))(model)


def counted(stop: int, step: str) -> Edit:
    node = make_node("Range", ["zero", "stop", step], ["big"])
    return added(node, zero=np.int64(0), one=np.int64(1), stop=np.int64(stop))


def doubled(model: onnx.ModelProto) -> None:
    """A tensor joined with itself again and again."""
    nodes = [make_node("Concat", [f"twice{i}"] * 2, [f"twice{i + 1}"], axis=1) for i in range(30)]
    nodes[0].input[:] = ["logits"] * 2
    nodes[-1].output[0] = "big"
    added(*nodes)(model)


def external(
    location: str,
    *,
    offset: str | None = None,
    length: str | None = None,
    prepare: Callable[[Path], Any] = lambda _: None,
) -> Callable[[Path], Path]:
    """The first kernel lies elsewhere."""

    def make(folder: Path) -> Path:
        model, inside = third_party(), folder / "models"
        inside.mkdir()
        item = first(model)
        (folder / "outside.bin").write_bytes(item.raw_data)
        (inside / "short.bin").write_bytes(b"1234")
        prepare(inside)
        item.ClearField("raw_data")
        item.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            if value is not None:
                item.external_data.add(key=key, value=value)
        path = inside / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return make


def hole(path: Path, size: int) -> None:
    """A file of a size, without content."""
    with path.open("wb") as file:
        file.truncate(size)


def repeated_external(folder: Path) -> Path:
    """Many tensors of the same bytes."""
    path = external("hole.bin", prepare=lambda inside: hole(inside / "hole.bin", 2**30))(folder)
    model = onnx.ModelProto.FromString(path.read_bytes())
    for i in range(40):
        item = model.graph.initializer.add(name=f"more{i}", data_type=1, dims=[150_000_000], data_location=1)
        item.external_data.add(key="location", value="hole.bin")
    path.write_bytes(model.SerializeToString())
    return path


def external_in_function(folder: Path) -> Path:
    """Data of a constant within a function, which onnx.load leaves where it is."""
    item = TensorProto(name="k", data_type=1, dims=[4], data_location=1)
    item.external_data.add(key="location", value="../outside.bin")
    constant = make_node("Constant", [], ["k"], value=item)
    model, inside = third_party(), folder / "models"
    inside.mkdir()
    (folder / "outside.bin").write_bytes(b"secret")
    with_functions(function("f", [constant, make_node("Tanh", ["x"], ["y"])]))(model)
    (inside / "model.onnx").write_bytes(model.SerializeToString())
    return inside / "model.onnx"


def deep(levels: int) -> Edit:
    """Graphs within attributes within nodes within graphs, encoded by hand: protobuf itself builds 33 at most."""

    def edit(model: onnx.ModelProto) -> bytes:
        encoded = helper.make_graph([make_node("Neg", ["logits"], ["leaf"])], "g", [], []).SerializeToString()
        for i in range(levels):
            branch = b"\x0a\x01b\xa0\x01\x05\x32" + varint(len(encoded)) + encoded
            node = (
                b"\x0a\x05start\x12"
                + varint(len(f"i{i}"))
                + f"i{i}".encode()
                + b"\x22\x02If\x2a"
                + varint(len(branch))
                + branch
            )
            encoded = b"\x0a" + varint(len(node)) + node
        return model.SerializeToString() + b"\x3a" + varint(len(encoded)) + encoded

    return edit


def branches(model: onnx.ModelProto) -> None:
    """20 of them, which is deep but sound."""
    name, inner = "leaf", make_node("Neg", ["logits"], ["leaf"])
    for i in range(20):
        graph = helper.make_graph([inner], f"g{i}", [], [helper.make_tensor_value_info(name, 1, None)])
        name = f"if{i}"
        inner = make_node("If", ["start"], [name], then_branch=graph, else_branch=empty(name))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "start"))
    model.graph.node.insert(list(model.graph.node).index(node(model, "sigmoid")), inner)
    node(model, "sigmoid").input[0] = name


def empty(name: str) -> onnx.GraphProto:
    other = make_node("Neg", ["logits"], [f"{name}_other"])
    return helper.make_graph([other], "other", [], [helper.make_tensor_value_info(f"{name}_other", 1, None)])


def long_chain(model: onnx.ModelProto) -> None:
    for i in range(100_001):
        model.graph.node.add(op_type="Neg", input=["head"], output=[f"n{i}"])


def cycle(model: onnx.ModelProto) -> None:
    node(model, "join").input[0] = "joined_again"
    model.graph.node.append(make_node("Identity", ["head"], ["joined_again"]))


def identity_cycle(model: onnx.ModelProto) -> None:
    """The output comes from itself, by what only moves values."""
    node(model, "output").CopyFrom(make_node("Identity", ["turn"], ["output0"], name="output"))
    model.graph.node.append(make_node("Identity", ["output0"], ["turn"]))


def attribute(node_name: str, **fields: Any) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        changed = node(model, node_name).attribute[0]
        for name, value in fields.items():
            setattr(changed, name, value)

    return edit


def wrong_attribute(node_name: str, name: str, value: Any) -> Edit:
    """The attribute with a value of another type."""

    def edit(model: onnx.ModelProto) -> None:
        changed = node(model, node_name)
        del changed.attribute[:]
        changed.attribute.append(helper.make_attribute(name, value))

    return edit


def bare_constant(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, make_node("Constant", [], ["nothing"]))


def output_of(op: str, kind: int, **attributes: Any) -> Edit:
    """A further output that is no tensor of numbers."""

    def edit(model: onnx.ModelProto) -> None:
        model.graph.node.append(make_node(op, ["scores"], ["odd"], **attributes))
        model.graph.output.append(helper.make_empty_tensor_value_info("odd"))
        if kind:
            model.graph.output[-1].type.tensor_type.elem_type = kind

    return edit


def another_opset(version: int) -> Edit:
    return lambda m: setattr(m.opset_import[0], "version", version)


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "model.onnx")
    return folder / "model.onnx"


def device(folder: Path) -> Path:
    (folder / "model.onnx").symlink_to("/dev/zero")
    return folder / "model.onnx"


def too_large(folder: Path) -> Path:
    hole(folder / "model.onnx", 2**33)
    return folder / "model.onnx"


def only(data: bytes) -> Callable[[Path], Path]:
    return edited(lambda _: data)


TABLE: dict[str, dict[str, Callable[[Path], Path]]] = {
    TENSOR: {
        "more elements than data": edited(dims(10**6)),
        "no elements": edited(dims(0)),
        "a negative size": edited(dims(-7, 3, 8, 8)),
        "sizes whose product is the data's by overflow": edited(dims(2**32, 2**32, 1344)),
        "two negative sizes whose product fits": edited(dims(-7, -3, 8, 8)),
        "a thousand sizes": edited(dims(*[1] * 1000)),
        "3 bytes": edited(lambda m: setattr(first(m), "raw_data", b"abc")),
        "no bytes": edited(lambda m: setattr(first(m), "raw_data", b"")),
        "no data field": edited(lambda m: first(m).ClearField("raw_data")),
        "an entry too few": edited(typed),
        "bytes and entries": edited(both),
        "an unknown type": edited(lambda m: setattr(first(m), "data_type", 77)),
        "no type": edited(lambda m: setattr(first(m), "data_type", 0)),
        "another type of other size": edited(lambda m: setattr(first(m), "data_type", TensorProto.DOUBLE)),
        "another type of the same size": edited(lambda m: setattr(first(m), "data_type", TensorProto.INT32)),
        "four bits": edited(lambda m: setattr(first(m), "data_type", TensorProto.INT4)),
        "texts": edited(strings),
        "sparse": edited(sparse),
        "segments": edited(lambda m: setattr(first(m).segment, "end", 5)),
        "NaN": edited(nan),
        "a name twice": edited(lambda m: m.graph.initializer.append(first(m))),
        "no name": edited(lambda m: setattr(first(m), "name", "")),
    },
    SHAPE: {
        "height -1": edited(side(-1)),
        "height 2^62": edited(side(2**62)),
        "height 100000": edited(side(100_000)),
        "width 1": edited(side(1, 3)),
        "batch 10^9": edited(side(10**9, 0)),
        "5 channels": edited(side(5, 1)),
        "element type 77": edited(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 77)),
        "texts": edited(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 8)),
        "no type": edited(lambda m: m.graph.input[0].ClearField("type")),
        "a sequence": edited(lambda m: m.graph.input[0].type.sequence_type.elem_type.tensor_type.SetInParent()),
        "an output of size -5": edited(
            lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", -5)
        ),
        "no inputs": edited(lambda m: m.graph.ClearField("input")),
        "no outputs": edited(lambda m: m.graph.ClearField("output")),
        "an input twice": edited(lambda m: m.graph.input.append(m.graph.input[0])),
        "an output twice": edited(lambda m: m.graph.output.append(m.graph.output[0])),
        "an output that nothing makes": edited(lambda m: setattr(m.graph.output[0], "name", "nobody")),
        "a sparse input": edited(lambda m: m.graph.input[0].type.sparse_tensor_type.SetInParent()),
    },
    TEXT: {
        "a node's name is no UTF-8": edited(replaced(b"sigmoid", b"\xff" * 7)),
        "an operator is no UTF-8": edited(replaced(b"Sigmoid", b"\xc3\x28" + b"a" * 5)),
        "metadata is no UTF-8": edited(replaced(b"class 0", b"\xed\xa0\x80aaaa")),
        "a tensor's name is no UTF-8": edited(replaced(b"centers", b"\xfe" * 7)),
        "a name with an escape sequence": edited(rename("tanh", "\x1b[2Jgone")),
        "a name with a NUL": edited(rename("tanh", "a\0b")),
        "a name that turns the line around": edited(rename("tanh", "a\u202eb")),
        "a name of a million characters": edited(rename("tanh", "a" * 10**6)),
        "a class name with an escape sequence": edited(meta(names="{0: '\\x1b[31mred', 1: 'b', 2: 'c'}")),
        "a class name with a line end": edited(meta(names=str({0: "a\nb", 1: "b", 2: "c"}))),
        "a task with an escape sequence": edited(meta(task="\x1b]0;x\x07")),
    },
    METADATA: {
        "names with a key that has no hash": edited(meta(names="{[]: 1}")),
        "names are a number": edited(meta(names="5")),
        "names 100,000 brackets deep": edited(meta(names="[" * 100_000)),
        "names 100,000 signs deep": edited(meta(names="-" * 100_000 + "1")),
        "names that are a call": edited(meta(names="__import__('os').system('true')")),
        "a million names": edited(meta(names=str(list(range(150_000))))),
        "one name of a million characters": edited(meta(names=str({0: "a" * 10**6, 1: "b", 2: "c"}))),
        "names with keys that are no numbers": edited(meta(names="{'a': 'b', None: 'c', 1.5: 'd'}")),
        "names that are huge numbers": edited(meta(names=f"[{'9' * 10_000}, 1, 2]")),
        "size 100,000 brackets deep": edited(lambda m: (meta(imgsz="[" * 100_000)(m), open_sides(m))),
        "size of infinity": edited(lambda m: (meta(imgsz="[1e999, 1e999]")(m), open_sides(m))),
        "size of 10^9": edited(lambda m: (meta(imgsz="[1000000000, 1000000000]")(m), open_sides(m))),
        "size of texts": edited(lambda m: (meta(imgsz="['a', 'b']")(m), open_sides(m))),
        "size of lists": edited(lambda m: (meta(imgsz="[[1], [2]]")(m), open_sides(m))),
        "stride 1e308": edited(meta(stride="1e308")),
        "stride NaN": edited(meta(stride="nan")),
        "stride infinity": edited(meta(stride="inf")),
        "stride -5": edited(meta(stride="-5")),
        "stride of ten thousand digits": edited(meta(stride="9" * 10_000)),
        "keypoints of a huge shape": edited(meta(task="pose", kpt_shape="[1000000000000, 3]")),
        "keypoints 100,000 brackets deep": edited(meta(task="pose", kpt_shape="(" * 100_000)),
        "a task of a million characters": edited(meta(task="a" * 10**6)),
        "an unknown task": edited(meta(task="segment anything")),
        "a key twice": edited(twice),
        "9 MB": edited(meta(other="a" * 9 * 2**20)),
        "six million entries of two bytes": edited(many_entries),
        "claims to be fused": edited(meta(fusenms__backend="\x1b[31m")),
    },
    FUNCTIONS: {
        "calls itself": edited(with_functions(function("f", [call("f")]))),
        "two that call each other": edited(with_functions(function("f", [call("g")]), function("g", [call("f")]))),
        "2^40 calls": edited(with_functions(*doubling(40))),
        "a hundred deep": edited(with_functions(*chained(100))),
        "without nodes": edited(with_functions(function("f", []))),
        "defined twice": edited(with_functions(*[function("f", [make_node("Tanh", ["x"], ["y"])])] * 2)),
        "in place of an operator": edited(standard_function),
        "refers to an attribute of its own": edited(with_functions(function("f", [make_node("Tanh", ["y"], ["y"])]))),
        "that is not there": edited(lambda m: setattr(node(m, "tanh"), "domain", "own")),
    },
    LOOPS: {
        "2^62 rounds": edited(looped(copying)),
        "no number of rounds": edited(looped(copying, None)),
        "2^62 rounds within 2^62 rounds": edited(looped(nested)),
        "an empty body": edited(looped(lambda: body([], state="before"))),
        "a body that is folded away": edited(looped(folded)),
        "a body that nobody needs": edited(looped(dead)),
        "-1 rounds": edited(looped(copying, -1)),
    },
    COST: {
        "ConstantOfShape": edited(added(make_node("ConstantOfShape", ["n"], ["big"]), n=np.array([LARGE]))),
        "Expand": edited(added(make_node("Expand", ["one", "n"], ["big"]), one=np.float32([1]), n=np.array([LARGE]))),
        "Tile": edited(added(make_node("Tile", ["one", "n"], ["big"]), one=np.float32([1]), n=np.array([LARGE]))),
        "Range": edited(counted(LARGE, "one")),
        "Range by 0": edited(counted(5, "zero")),
        "Pad": edited(added(make_node("Pad", ["one", "n"], ["big"]), one=np.float32([1]), n=np.array([0, LARGE]))),
        "Resize": edited(
            added(
                make_node("Resize", ["one", "", "", "n"], ["big"]),
                one=np.ones((1, 1), np.float32),
                n=np.array([1, LARGE]),
            )
        ),
        "a size by computing": edited(computed),
        "a claimed shape hides it": edited(claimed),
        "in a function": edited(within_function),
        "a shape joined with itself": edited(joins(40)),
        "a tensor joined with itself": edited(doubled),
        "matrix products of 10^13 operations": edited(products),
    },
    EXTERNAL: {
        "in the folder above": external("../outside.bin"),
        "by an absolute path": external("/etc/passwd"),
        "by a link out of the folder": external(
            "link.bin", prepare=lambda f: (f / "link.bin").symlink_to("../outside.bin")
        ),
        "by a linked folder": external("up/outside.bin", prepare=lambda f: (f / "up").symlink_to("..")),
        "in a device": external("zero", prepare=lambda f: (f / "zero").symlink_to("/dev/zero")),
        "in a FIFO": external("fifo", prepare=lambda f: os.mkfifo(f / "fifo")),
        "in a directory": external("folder", prepare=lambda f: (f / "folder").mkdir()),
        "in a link to itself": external("link", prepare=lambda f: (f / "link").symlink_to("link")),
        "in no file": external("gone.bin"),
        "without a place": external(""),
        "in a name with a NUL": external("a\0b"),
        "in memory, as ONNX Runtime's own tag": external("*/_ORT_MEM_ADDR_/*", offset="4096"),
        "in a file that is too short": external("short.bin"),
        "behind the end": external("short.bin", offset="1000000000000"),
        "at a negative place": external("short.bin", offset="-4"),
        "of a negative size": external("short.bin", length="-1"),
        "of another size than the tensor's": external("short.bin", length="4"),
        "at a place of a thousand digits": external("short.bin", offset="9" * 1000),
        "in a sparse file over the limit": external("hole.bin", prepare=lambda f: hole(f / "hole.bin", 2**40)),
        "of a file that is read 40 times": repeated_external,
        "of a function": external_in_function,
    },
    DEPTH: {
        "20 branches deep": edited(branches),
        "70 branches deep": edited(deep(70)),
        "40 branches deep": edited(deep(40)),
        "2,000 branches deep": edited(deep(2000)),
        "100,000 nodes": edited(long_chain),
        "six million empty nodes": edited(empty_nodes),
        "messages 100,000 deep": only(
            b"\x3a" + varint(400_000) + b"".join(b"\x0a" + varint(400_000) for _ in range(100_000))
        ),
        "packed numbers": only(
            b"\x3a" + varint(2**28 + 20) + b"\x2a" + varint(2**28 + 10) + b"\x3a" + varint(2**28) + b"\0" * 2**28
        ),
    },
    GRAPH: {
        "nothing": only(b""),
        "zeros": only(b"\0" * 1000),
        "text": only(b"not a model" * 100),
        "an image": only(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20),
        "cut in half": edited(lambda m: m.SerializeToString()[:60_000]),
        "a number without end": only(b"\x3a" + b"\xff" * 20),
        "a size behind the end": only(b"\x3a" + struct.pack("<B", 0x7F)),
        "a cycle": edited(cycle),
        "an output that comes from itself": edited(identity_cycle),
        "a tensor made twice": edited(lambda m: m.graph.node.append(node(m, "tanh"))),
        "an unknown operator": edited(lambda m: setattr(node(m, "tanh"), "op_type", "Nothing")),
        "no operator": edited(lambda m: setattr(node(m, "tanh"), "op_type", "")),
        "an input of a node that is not there": edited(lambda m: node(m, "tanh").input.__setitem__(0, "nobody")),
        "no inputs of a node": edited(lambda m: node(m, "split").ClearField("input")),
        "no outputs of a node": edited(lambda m: node(m, "tanh").ClearField("output")),
        "an attribute of an unknown type": edited(attribute("join", type=11)),
        "an attribute with two values": edited(attribute("join", f=1.0)),
        "an attribute whose type lies": edited(attribute("join", type=onnx.AttributeProto.GRAPH)),
        "an axis that is a text": edited(wrong_attribute("output", "axis", "one")),
        "an axis that is a float": edited(wrong_attribute("output", "axis", 1.0)),
        "an axis out of range": edited(attribute("output", i=2**62)),
        "an attribute twice": edited(lambda m: node(m, "output").attribute.append(node(m, "output").attribute[0])),
        "an attribute without a name": edited(attribute("output", name="")),
        "an attribute of a function, in none": edited(attribute("output", ref_attr_name="axis")),
        "a constant without a value": edited(bare_constant),
        "texts as an output": edited(output_of("Cast", TensorProto.STRING, to=TensorProto.STRING)),
        "a sequence as an output": edited(output_of("SequenceConstruct", 0)),
        "opset 9999": edited(another_opset(9999)),
        "opset -1": edited(another_opset(-1)),
        "opset 2^62": edited(another_opset(2**62)),
        "opsets twice": edited(lambda m: m.opset_import.append(m.opset_import[0])),
        "no opset": edited(lambda m: m.ClearField("opset_import")),
        "a version of 2^62": edited(lambda m: setattr(m, "ir_version", 2**62)),
        "a version of -1": edited(lambda m: setattr(m, "ir_version", -1)),
        "no nodes": edited(lambda m: m.graph.ClearField("node")),
        "training": edited(lambda m: m.training_info.add()),
        "a reshape to nothing": edited(constant("flat", np.array([0, 0, 0]))),
        "a reshape to -5": edited(constant("flat", np.array([-5, 7, -1]))),
        "a split into less than there is": edited(constant("parts", np.array([2, 2, 1]))),
        "a kernel of another size": edited(constant("w8", np.ones((7, 5, 8, 8), np.float32))),
    },
    FILES: {"a FIFO": fifo, "a device": device, "a sparse file of 8 GB": too_large},
}


def open_sides(model: onnx.ModelProto) -> None:
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "side"


ATTACKS = tuple(Attack(kind, name, make) for kind, attacks in TABLE.items() for name, make in attacks.items())
SOUND = {"stride NaN", "stride -5", "stride infinity", "stride of ten thousand digits", "20 branches deep", "-1 rounds"}
"""Attacks after which the file may still be a detector: what it says in vain is left aside."""


@pytest.mark.covering(quick=0)
@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_third_party_file_ends_in_one_of_our_errors_when_it_is(attack, tmp_path, monkeypatch):
    path = attack.make(tmp_path)
    monkeypatch.chdir(tmp_path)  # where relative places of external data would be looked for
    start, failed = time.process_time(), None
    try:
        fusenms.fuse(path, unverified=True, limits=LIMITS)
    except FusenmsError as error:
        failed = error
    assert time.process_time() - start < MOST_SECONDS
    assert failed is not None or attack.name in SOUND
    if failed is not None:
        assert len(str(failed)) < 20_000 and not set(map(ord, str(failed))) & {0, 7, 13, 27, 0x202E}


@pytest.mark.slow
def test_sound_file_is_fused_and_proven(tmp_path):
    assert fusenms.fuse(edited(lambda _: None)(tmp_path)).report


def test_external_data_beside_the_model_is_read(tmp_path):
    path = external("w.bin", prepare=lambda f: (f / "w.bin").write_bytes((f.parent / "outside.bin").read_bytes()))(
        tmp_path
    )
    assert fusenms.fuse(path, unverified=True).layout.family == "yolov8"


@pytest.mark.covering(quick=0)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (edited(looped(copying)), "longer than 1 s and was stopped .max_run_seconds."),
        (edited(looped(nested)), "longer than 1 s and was stopped .max_run_seconds."),
        (edited(looped(folded)), "could not be stopped"),
        (edited(added(make_node("ConstantOfShape", ["n"], ["big"]), n=np.array([LARGE]))), "max_tensor_elements"),
        (edited(dims(-7, 3, 8, 8)), "expected none below 0"),
        (external("../outside.bin"), "in the model's own folder"),
        (edited(cycle), "cycle"),
        (edited(with_functions(*doubling(40))), "max_nodes"),
        (edited(deep(70)), "max_nesting"),
        (edited(empty_nodes), "max_nodes"),
    ],
)
def test_error_says_which_bound_when_one_is_exceeded(make, words, tmp_path):
    with pytest.raises(SourceError, match=words) as error:
        fusenms.fuse(make(tmp_path), unverified=True, limits=LIMITS)
    assert "model.onnx" in str(error.value)


@pytest.mark.parametrize("stage", ["recognize", "open_batch", "fuse_head"])
def test_stage_wraps_what_a_graph_makes_it_raise(stage, tmp_path, monkeypatch):
    places = {
        "recognize": "fusenms.heads.families.yolov8.earliest_distances",
        "open_batch": "fusenms.transforms.dynamic_batch._opened",
    }
    module = places.get(stage, "fusenms.fusion.tail._join")
    broken = partial(exec, "raise KeyError('what the file made happen')")
    monkeypatch.setattr(module, lambda *_: broken())
    model = third_party(batch=2)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(SourceError, match="KeyError: 'what the file made happen'") as error:
        fusenms.fuse(tmp_path / "model.onnx", batch="dynamic", unverified=True)
    assert isinstance(error.value.__cause__, KeyError)
