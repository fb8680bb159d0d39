"""Files with more outputs, parts of files, changed nodes, and metadata that another tool lost."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from onnx import helper
from raw_heads import LAYOUTS, SIZE, fused_model

import fusenms
from fusenms import Detector, edit, expose, extract, inspect, load_fused, restamp, verify
from fusenms.cli import main
from fusenms.errors import ConfigError, SourceError, VerificationError
from fusenms.fusion.backends import BACKENDS
from fusenms.graph.editing import Op
from fusenms.onnx_reading.files import read_metadata


@pytest.fixture
def fused(tmp_path):
    """A fused file; its head are the tensors `dist` and `logits`."""
    model = fused_model(LAYOUTS["distances"](3))
    return model.proven(verify(model)).save(tmp_path / "f.onnx")


def run(path, **inputs):
    session = onnxruntime.InferenceSession(path)
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


IMAGE = np.random.default_rng(0).random((2, 3, SIZE, SIZE), dtype=np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_file_with_further_outputs_is_verified(tmp_path, backend):
    path = fused_model(LAYOUTS["distances"](3), backend).save(tmp_path / "f.onnx", unverified=True)
    shown = expose(path, ["logits", "dist"], tmp_path / "shown.onnx")
    assert verify(load_fused(shown))
    outputs = {tensor.name: tensor for tensor in inspect(shown).outputs}
    assert (outputs["logits"].dtype, outputs["logits"].shape[1:]) == ("float32", (3, 84))


def test_detector_runs_a_file_with_further_outputs(fused, tmp_path):
    image = (IMAGE[0].transpose(1, 2, 0) * 255).astype(np.uint8)
    shown = expose(fused, ["logits"], tmp_path / "shown.onnx")
    with Detector(fused) as plain, Detector(shown) as more:
        np.testing.assert_array_equal(plain([image])[0].boxes, more([image])[0].boxes)
    assert read_metadata(onnx.load(shown)) == read_metadata(onnx.load(fused))


def test_part_gives_what_the_whole_gives(fused, tmp_path):
    shown = run(expose(fused, ["logits", "dist"], tmp_path / "shown.onnx"), images=IMAGE)
    network = extract(fused, ["images"], ["logits", "dist"], tmp_path / "network.onnx")
    found = run(network, images=IMAGE)
    assert list(found) == ["logits", "dist"]
    tail = extract(fused, ["dist", "logits"], ["boxes", "scores"], tmp_path / "tail.onnx")
    ends = run(tail, dist=found["dist"], logits=found["logits"])
    for name, value in {**found, **ends}.items():
        np.testing.assert_array_equal(value, shown[name])
    kept = read_metadata(onnx.load(network))
    assert kept["task"] == "detect"
    assert not [key for key in kept if key.startswith("fusenms.")]


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (["images"], ["logit"], r"there is no tensor 'logit' in the graph; did you mean 'logits'"),
        (["logits"], ["boxes"], "outputs depend on images too; add it to inputs"),
        (["images", "boxes"], ["logits"], "inputs boxes play no part in logits"),
        (["images"], [], "outputs is empty"),
    ],
)
def test_error_when_there_is_no_such_part(fused, tmp_path, inputs, outputs, message):
    with pytest.raises(ConfigError, match=message):
        extract(fused, inputs, outputs, tmp_path / "part.onnx")
    assert not (tmp_path / "part.onnx").exists()


def test_layout_follows_renamed_tensors(fused, tmp_path):
    edited = edit(fused, tmp_path / "e.onnx", rename={"logits": "classes", "images": "pixels"})
    model = load_fused(edited)
    assert (model.layout.classes.tensor, model.image.tensor) == ("classes", "pixels")
    assert inspect(edited).verification == "unverified"
    assert verify(model)


def test_output_of_the_contract_cannot_be_renamed_away(fused, tmp_path):
    edited = edit(fused, tmp_path / "e.onnx", rename={"scores": "points"})
    with pytest.raises(SourceError, match=r"its metadata says scores .* but the graph has nothing of that name"):
        load_fused(edited)


def test_change_behind_the_head_is_seen_by_verify(fused, tmp_path):
    assert verify(load_fused(edit(fused, tmp_path / "e.onnx", insert={"boxes": Op("Identity")})))
    assert not verify(load_fused(edit(fused, tmp_path / "w.onnx", insert={"boxes": Op("Mul", (0.5,))})))


def small(tmp_path, text, name="s.onnx"):
    onnx.save(onnx.parser.parse_model(text), tmp_path / name)
    return tmp_path / name


CHAIN = """<ir_version: 8, opset_import: ["" : 17]> g (float[b, 4] x) => (float[b, 4] y) {
  [first] a = Relu (x)
  [second] c = LeakyRelu <alpha = 0.5> (a)
  [third] y = Neg (c)
}"""
X = np.array([[-1.0, 2.0, -3.0, 4.0]], np.float32)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"remove": ["first"]}, -np.where(X > 0, X, 0.5 * X)),
        ({"remove": ["third"]}, np.maximum(X, 0)),
        ({"remove": ["first", "second"]}, -X),
        ({"attributes": {("second", "alpha"): 0.25}, "remove": ["first"]}, -np.where(X > 0, X, 0.25 * X)),
        ({"attributes": {("c", "alpha"): None}, "remove": ["first"]}, -np.where(X > 0, X, 0.01 * X)),
        ({"insert": {"x": Op("Neg")}}, -np.maximum(-X, 0)),
        ({"insert": {"y": Op("Add", ([1.0, 2.0, 3.0, 4.0],))}}, [1, 2, 3, 4] - np.maximum(X, 0)),
        ({"insert": {"a": Op("Sub", ("x",))}, "remove": ["second"]}, -(np.maximum(X, 0) - X)),
        ({"replace": {"third": Op("Clip", (1.0, 3.0))}}, np.maximum(X, 0).clip(1, 3)),
        ({"replace": {"second": Op("Elu", attributes={"alpha": 2.0})}, "remove": ["first"]}, -np.where(X > 0, X, 2 * np.expm1(X))),
        ({"rename": {"x": "in", "c": "kept"}, "remove": ["third"]}, np.maximum(X, 0)),
    ],
)  # fmt: skip
def test_edited_file_computes_what_was_asked_for(tmp_path, changes, expected):
    path = edit(small(tmp_path, CHAIN), tmp_path / "e.onnx", **changes)
    name = onnx.load(path).graph.input[0].name
    np.testing.assert_allclose(run(path, **{name: X})["y"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remove": ["forth"]}, "there is no node 'forth' in the graph"),
        ({"remove": ["thrid"]}, "did you mean 'third'"),
        ({"rename": {"a": "c"}}, "another tensor has that name"),
        ({"rename": {"a": ""}}, "the name is empty"),
        ({"rename": {"a": "n", "c": "n"}}, "gives two tensors the same name"),
        ({"insert": {"a": Op("Sub", ("z",))}}, "there is no tensor 'z' in the graph"),
        ({"insert": {"a": Op("Relux")}}, "the edited graph is no valid model"),
    ],
)
def test_error_when_an_edit_makes_no_sense(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        edit(small(tmp_path, CHAIN), tmp_path / "e.onnx", **changes)
    assert not (tmp_path / "e.onnx").exists()


@pytest.mark.parametrize("op", ["", "a::", "::Relu", None])
def test_error_when_an_operator_has_no_type(op):
    with pytest.raises(ConfigError, match="expected the type of an operator"):
        Op(op)


def test_operator_of_another_domain_is_carried(tmp_path):
    path = edit(small(tmp_path, CHAIN), tmp_path / "e.onnx", replace={"second": Op("com.example::Fold")})
    model = onnx.load(path)
    assert [(node.domain, node.op_type) for node in model.graph.node][1] == ("com.example", "Fold")
    assert {entry.domain for entry in model.opset_import} == {"", "com.example"}


def lost(fused, path, change=lambda graph: None):
    """The file as onnx-graphsurgeon writes it: without its metadata."""
    graph = gs.import_onnx(onnx.load(fused))
    change(graph)
    onnx.save(gs.export_onnx(graph), path)
    return path


def test_lost_metadata_is_restored(fused, tmp_path):
    path = lost(fused, tmp_path / "lost.onnx")
    assert inspect(path).kind == "onnx"
    again = restamp(path, fused, tmp_path / "again.onnx")
    old, new = (read_metadata(onnx.load(one)) for one in (fused, again))
    assert new == old
    assert verify(load_fused(again))


def _wrong_threshold(graph):
    node = next(node for node in graph.nodes if node.op == "NonMaxSuppression")
    node.inputs[3] = gs.Constant("lower", np.array([0.1], np.float32))


def _wrong_class(graph):
    next(tensor for tensor in graph.outputs if tensor.name == "labels").name = "label"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_wrong_threshold, VerificationError, "again.onnx was not written: .* differs from the reference"),
        (_wrong_class, SourceError, "its metadata says labels .* but the graph has nothing of that name"),
    ],
)
def test_error_when_the_graph_is_not_what_the_metadata_says(fused, tmp_path, change, error, message):
    path = lost(fused, tmp_path / "lost.onnx", change)
    with pytest.raises(error, match=message):
        restamp(path, fused, tmp_path / "again.onnx")
    assert not (tmp_path / "again.onnx").exists()


def test_command_line_does_the_same(fused, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["expose", "f.onnx", "logits"]) == 0
    assert "wrote     f.exposed.onnx" in capsys.readouterr().out
    assert main(["verify", "f.exposed.onnx"]) == 0
    assert main(["extract", "f.onnx", "--inputs", "images", "--outputs", "logits", "dist", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.rpartition("\n{")[2].join(["{", ""]))["file"] == "f.part.onnx"
    half = '{"op": "Mul", "inputs": [0.5]}'
    assert main(["edit", "f.onnx", "--rename", "logits=classes", "--insert", f"images={half}"]) == 0
    assert main(["verify", "f.edited.onnx"]) == 0
    lost(fused, "lost.onnx")
    assert main(["restamp", "lost.onnx", "--like", "f.onnx"]) == 0
    assert main(["verify", "lost.restamped.onnx"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rename", "logits"], "found --rename logits; expected OLD=NEW"),
        (["--set-attribute", "alpha=1"], "expected NODE:NAME=JSON"),
        (["--set-attribute", "n:alpha=[1"], "expected JSON, as 0.5"),
        (["--insert", 'images={"type": "Mul"}'], "expected an object with op"),
    ],
)
def test_error_when_flags_make_no_sense(fused, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["edit", "f.onnx", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_source_is_not_overwritten(fused):
    with pytest.raises(SourceError, match=r"choose another output path|would overwrite"):
        expose(fused, ["logits"], fused)
    assert "expose" in dir(fusenms)


# Models above 2 GB, whose weights are in other files and stay there.


def large(folder, megabytes):
    """A model whose weights are external: a small one that is used first, and sparse ones of so many MB together."""
    folder.mkdir()
    rows, wide = megabytes * 2**20 // 4 // 1024 // 4, [f"wide{i}" for i in range(4)]
    first = [helper.make_node("MatMul", ["x", "small"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    behind = [helper.make_node("MatMul", ["b", name], [f"c{name}"]) for name in wide]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", side])]
        for name, side in (("x", 4), ("y", rows))
    )
    nodes = [*first, *behind, helper.make_node("Sum", [f"c{name}" for name in wide], ["y"])]
    sizes = {"small": (4, 1024), **dict.fromkeys(wide, (1024, rows))}
    tensors, offset = [], 0
    for name, dims in sizes.items():
        tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=dims)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        size = 4 * dims[0] * dims[1]
        for key, value in (("location", "weights.bin"), ("offset", offset), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        offset += size
        tensors.append(tensor)
    with (folder / "weights.bin").open("wb") as file:
        file.write(np.arange(4096, dtype=np.float32).tobytes())
        file.truncate(offset)
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "large.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(params=["small", pytest.param("above 2 GB", marks=pytest.mark.thorough)])
def large_model(request, tmp_path, monkeypatch):
    if request.param == "small":
        monkeypatch.setattr(fusenms.onnx_reading, "MOST_PROTOBUF_BYTES", 2**20)
    return large(tmp_path / "there", 4 if request.param == "small" else 2100)


def test_weights_of_a_large_model_stay_where_they_are(large_model):
    folder = large_model.parent
    before = (folder / "weights.bin").stat()
    shown = expose(large_model, ["b"], folder / "shown.onnx")
    assert [entry.name for entry in onnx.load(shown, load_external_data=False).graph.output] == ["y", "b"]
    part = extract(large_model, ["x"], ["b"], folder / "part.onnx")
    x = np.ones((1, 4), np.float32)
    expected = x @ np.arange(4096, dtype=np.float32).reshape(4, 1024)
    np.testing.assert_allclose(run(part, x=x)["b"], expected)
    edited = edit(large_model, folder / "edited.onnx", rename={"x": "rows"}, insert={"a": Op("Mul", (2.0,))})
    assert run(extract(edited, ["rows"], ["b"], folder / "again.onnx"), rows=x)["b"].max() == 2 * expected.max()
    assert all(path.stat().st_size < 20_000 for path in folder.glob("*.onnx"))
    after = (folder / "weights.bin").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_weights_of_a_large_model_come_along(large_model, tmp_path):
    part = extract(large_model, ["x"], ["b"], tmp_path / "part.onnx")
    copied = tmp_path / "weights.bin"
    assert copied.stat().st_size == (large_model.parent / "weights.bin").stat().st_size
    assert run(part, x=np.ones((1, 4), np.float32))["b"].shape == (1, 1024)
    with pytest.raises(SourceError, match=r"is there already, and .* would replace it; choose another folder"):
        expose(large_model, ["b"], tmp_path / "shown.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.onnx", "there", "weights.bin"]


def test_error_when_weights_of_a_large_model_are_cut_short(large_model, tmp_path):
    weights = large_model.parent / "weights.bin"
    with weights.open("rb+") as file:
        file.truncate(5000)
    with pytest.raises(SourceError, match="spans bytes 0 to 16384, but its file has 5000 bytes"):
        expose(large_model, ["b"], tmp_path / "shown.onnx")
    weights.unlink()
    with pytest.raises(SourceError, match=r"cannot be read .* copy it beside the model"):
        expose(large_model, ["b"], tmp_path / "shown.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_large_model_is_no_fused_one(large_model, tmp_path):
    with pytest.raises(SourceError, match=r"not a fused model|bytes of external data"):
        load_fused(large_model)


@pytest.mark.parametrize("tensor", ["x", "y"])
def test_operators_are_inserted_twice_behind_a_tensor(tmp_path, tensor):
    path = small(tmp_path, CHAIN.replace("LeakyRelu <alpha = 0.5>", "Relu"))
    for i, factor in enumerate((2.0, 3.0, 5.0)):
        path = edit(path, tmp_path / f"{i}.onnx", insert={tensor: Op("Mul", (factor,))})
    np.testing.assert_allclose(run(path, x=X)["y"], -30 * np.maximum(X, 0))
