"""Tiles of frames in the graph: against tiles cut by hand, on every head, and sabotaged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from conftest import SHAPES
from onnx import numpy_helper
from raw_heads import LAYOUTS, SIZE, raw_model

import fusenms
from fusenms import Detector, FusedModel, Tiles, fuse, load_fused, verify
from fusenms.artifacts.frames import Frames
from fusenms.boxes import pairwise_iou
from fusenms.cli import main
from fusenms.errors import ConfigError, SourceError, UnsupportedByBackendError
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.runtime.images import read_image
from fusenms.runtime.placement import letterbox, to_tensor
from fusenms.transforms.frames import parts
from fusenms.transforms.tiles import PLACES

pytestmark = [pytest.mark.usefixtures("shared_exports"), pytest.mark.slow]
IMAGE = SHAPES / "shapes0.jpg"
FOUR = Tiles(2, 2)


def tiled(kind: str = "distances", tiles: Tiles = FOUR, frames=(70, 90), **settings) -> FusedModel:
    """A tiny model of 64 x 64 that cuts frames."""
    settings = {"score_threshold": 0.0, "max_detections": 20, "unverified": True} | settings
    return fuse(raw_model(LAYOUTS[kind]()), layout=LAYOUTS[kind](), frames=frames, tiles=tiles, **settings)


def noise(height: int, width: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)


def problems(report: fusenms.Report) -> str:
    return "\n".join(problem for check in report.checks for problem in check.problems)


@pytest.fixture(scope="module")
def shapes(shapes_raw) -> FusedModel:
    return fuse(shapes_raw, tiles=Tiles(2, 3, whole=True), unverified=True)


# What tiles are.


@pytest.mark.parametrize(
    ("side", "count", "overlap", "length", "starts"),
    [
        (100, 1, 0.2, 100, [0]),
        (100, 2, 0.0, 50, [0, 50]),
        (180, 2, 0.2, 100, [0, 80]),
        (100, 3, 0.2, 39, [0, 30, 61]),
        (1, 4, 0.5, 1, [0, 0, 0, 0]),
    ],
)
def test_tiles_cover_the_frame_evenly(side, count, overlap, length, starts):
    """Each tile of a frame of one column is known by its colors, which count the rows."""
    rows = np.arange(side, dtype=np.uint8).reshape(1, -1, 1, 1)
    frames = np.broadcast_to(rows, (1, side, length, 3)).copy()
    many = Tiles(count, 1, overlap, whole=True) if count > 1 else Tiles(1, 2, 0.0)
    for size in ((side, length), "dynamic"):
        images = OnnxRuntimeRunner(parts(tiled(tiles=many, frames=size)).before).run({"frames": frames})["images"]
        if count == 1:
            assert len(images) == 2
            continue
        for image, start in zip(images, starts, strict=False):
            cut = frames[0, start : start + length]
            np.testing.assert_allclose(image * 255, to_tensor([letterbox(cut, SIZE, SIZE)[0]])[0] * 255, atol=1.01)
        assert len(images) == count + 1


@pytest.mark.parametrize("values", [(1, 1), (0, 2), (2.0, 2), (40, 40), (2, 2, 1.0), (2, 2, -0.1), (2, 2, 0.2, 1)])
def test_wrong_tiles_are_refused(values):
    with pytest.raises(ValueError, match="expected"):
        Tiles(*values)


# Results.

USUAL = [("distances", "ort", True), ("oriented", "portable", True), ("keypoints", "ort", False)]
USUAL += [("end_to_end", "ort", True), ("finished_rows", "ort", False)]
KINDS = [kind for kind in LAYOUTS if "masks" not in kind]
ALL = [(kind, backend, whole) for kind in KINDS for backend in ("ort", "portable") for whole in (True, False)]


@pytest.mark.parametrize(
    ("kind", "backend", "whole"),
    [*USUAL, *(pytest.param(*one, marks=pytest.mark.thorough) for one in ALL if one not in USUAL)],
)
def test_every_head_is_proven(kind, backend, whole):
    for frames in ((70, 90), "dynamic"):
        report = verify(tiled(kind, Tiles(2, 3, whole=whole), frames, backend=backend), batches=(2,))
        assert report, problems(report)
        assert sum(check.detections for check in report.checks) > 50


@pytest.mark.parametrize("backend", ["ort", "portable"])
def test_rows_are_those_of_tiles_by_hand(shapes_raw, backend):
    """The model without tiles runs on each tile; its boxes are moved and suppressed here, in Python."""
    settings = {"score_threshold": 0.3, "backend": backend, "unverified": True}
    with Detector(fuse(shapes_raw, tiles=Tiles(2, 2, 0.25), **settings)) as detect:
        (found,) = detect(IMAGE)
    image, rows = read_image(IMAGE), []
    plain = OnnxRuntimeRunner(fuse(shapes_raw, iou_threshold=1.0, max_detections=1000, **settings).model)
    height, width = (-(-side * 4 // 7) for side in image.shape[:2])
    for top in (0, image.shape[0] - height):
        for left in (0, image.shape[1] - width):
            fitted, place = letterbox(np.ascontiguousarray(image[top : top + height, left : left + width]), SIZE, SIZE)
            count, boxes, scores, labels = (values[0] for values in plain.infer(to_tensor([fitted])).values())
            scale = np.array([width / place.inner_width, height / place.inner_height] * 2)
            moved = (boxes - np.array([place.left, place.top] * 2)) * scale + np.array([left, top] * 2)
            rows += list(zip(scores.tolist(), labels.tolist(), moved, strict=True))[: count[0]]
    kept: list[tuple[float, int, np.ndarray]] = []
    for score, label, box in sorted(rows, key=lambda row: -row[0]):
        rivals = np.array([other for _, own, other in kept if own == label]).reshape(-1, 4)
        if not (pairwise_iou(box[None], rivals) > 0.45).any():
            kept.append((score, label, box))
    assert len(found) == len(kept) > 10 and found.labels.tolist() == [label for _, label, _ in kept]
    clipped = np.array([box for *_, box in kept]).clip(0, [*image.shape[1::-1]] * 2)
    iou = pairwise_iou(found.boxes.astype(float), clipped)
    assert iou.diagonal().min() > 0.98  # OpenCV rounds some colors differently


def test_frames_of_a_batch_do_not_mix(shapes):
    frames = np.stack([read_image(IMAGE), noise(*read_image(IMAGE).shape[:2])[0], read_image(IMAGE)[:, ::-1]])
    run = OnnxRuntimeRunner(shapes.model)
    whole = run.infer(np.ascontiguousarray(frames))
    for i in range(3):
        alone = run.infer(np.ascontiguousarray(frames[i : i + 1]))
        for name, value in alone.items():
            np.testing.assert_allclose(whole[name][i], value[0], atol=1e-3)
    assert whole["num_detections"][0, 0] > 10


def test_openvino_gives_the_same(shapes):
    pytest.importorskip("openvino")
    with Detector(shapes, runtime="openvino") as there, Detector(shapes) as here:
        for one, two in zip(there([IMAGE]), here([IMAGE]), strict=True):
            np.testing.assert_allclose(one.boxes, two.boxes, atol=1)


def test_thresholds_at_run_time(shapes_raw):
    fused = fuse(shapes_raw, tiles=(2, 2), runtime_thresholds=True, frames=(240, 320))
    assert fused.report.settings and not fused.report.unshown
    with Detector(fused) as detect:
        many, few = (len(detect(noise(240, 320)[0], score_threshold=score)[0]) for score in (0.0, 1.0))
    assert many > few == 0


def test_half_precision_is_compared_image_by_image(shapes_raw):
    fused = fuse(shapes_raw, tiles=(2, 2), frames=(120, 160), precision="fp16")
    assert fused.report and any("float16" in note or "half" in note for note in fused.notes), fused.notes


def test_rounds_are_unrolled():
    fused = tiled(backend="portable", rounds=16)
    assert verify(fused, batches=(1,)) and "Loop" not in {node.op_type for node in fused.model.graph.node}


# Files.


def test_file_says_how_it_cuts(shapes, tmp_path, capsys):
    path = shapes.save(tmp_path / "m.onnx", unverified=True)
    again = load_fused(path)
    assert again.image.frames == Frames(tiles=Tiles(2, 3, 0.2, True))
    assert main(["inspect", str(path)]) == 0
    assert "cut into 2x3 tiles that overlap by 0.2, and the whole frame" in capsys.readouterr().out


def test_saved_file_is_verified_again(tmp_path):
    path = tiled(frames="dynamic").save(tmp_path / "m.onnx", unverified=True)
    assert verify(path, batches=(1,))


@pytest.mark.parametrize("tiles", [7, [2, 2], {"rows": 2}, {"rows": 1, "columns": 1}, {"rows": 2, "columns": 10**9}])
def test_damaged_metadata_is_refused(tiles):
    with pytest.raises((TypeError, ValueError)):
        Frames.from_dict({"tiles": tiles})


def test_metadata_of_other_tiles_are_refused(shapes):
    wrong = replace(shapes.image, frames=replace(shapes.image.frames, tiles=Tiles(3, 2, whole=True)))
    assert not verify(replace(shapes, image=wrong), batches=(1,))


def test_metadata_of_tiles_that_the_graph_has_not_are_refused(shapes, shapes_raw):
    plain = fuse(shapes_raw, frames="dynamic", unverified=True)
    with pytest.raises(SourceError, match="its graph is not as fusenms makes it"):
        verify(replace(plain, image=shapes.image), batches=(1,))


# Sabotage.


def sabotaged(change, frames=(70, 90)) -> str:
    """What the verification says to a changed graph."""
    fused = tiled(tiles=Tiles(2, 2, whole=True), frames=frames)
    assert verify(fused, batches=(2,))
    model = onnx.ModelProto()
    model.CopyFrom(fused.model)
    change(model)
    report = verify(replace(fused, model=model), batches=(2,))
    assert not report
    return problems(report)


def behind(model: onnx.ModelProto, op: str, name: str) -> onnx.NodeProto:
    """The last node of an operator that reads a tensor."""
    return [node for node in model.graph.node if node.op_type == op and name in node.input][-1]


def writer(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if name in node.output)


def put_before(model: onnx.ModelProto, reader: onnx.NodeProto, made: onnx.NodeProto, **constants: np.ndarray) -> None:
    """Insert a node before another one."""
    at = [list(node.output) for node in model.graph.node].index(list(reader.output))
    model.graph.node.insert(at, made)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())


def test_tiles_in_another_order_are_seen():
    def change(model):
        cut = next(
            node
            for node in model.graph.node
            if node.op_type == "Concat" and len(node.input) == 4 and node.attribute[0].i == 1
        )
        cut.input[0], cut.input[1] = cut.input[1], cut.input[0]

    assert "of 255" in sabotaged(change)


def test_shifted_places_are_seen():
    def change(model):
        places = writer(model, PLACES)
        shifted = onnx.helper.make_node("Add", [places.input[-1], "off"], ["shifted"])
        put_before(model, places, shifted, off=np.array([0, 0, 0, 1], np.float32))
        places.input[-1] = "shifted"

    assert "places of tiles differ" in sabotaged(change)


def test_boxes_of_another_tile_are_seen():
    def change(model):
        gather = behind(model, "Gather", PLACES)
        put_before(
            model,
            gather,
            onnx.helper.make_node("Mul", [gather.input[1], "none"], ["first"]),
            none=np.array(0, np.int32),
        )
        gather.input[1] = "first"

    assert "rows differ" in sabotaged(change)


def test_tiles_that_do_not_suppress_each_other_are_seen():
    def change(model):
        nms = next(node for node in model.graph.node if node.op_type == "NonMaxSuppression")
        model.graph.initializer.append(numpy_helper.from_array(np.array([1.0], np.float32), "never"))
        nms.input[3] = "never"

    assert "rows differ" in sabotaged(change)


def test_candidates_of_two_frames_that_mix_are_seen():
    """The head tensors are joined tile by tile, where they should be frame by frame."""

    def change(model):
        join = next(
            node
            for node in model.graph.node
            if node.op_type == "Transpose" and list(node.attribute[0].ints) == [0, 2, 1, 3]
        )
        shape = next(t for t in model.graph.initializer if t.name == writer(model, join.input[0]).input[1])
        tiles, *rest = numpy_helper.to_array(shape)[1:]
        shape.CopyFrom(numpy_helper.from_array(np.array([tiles, -1, *rest]), shape.name))
        del join.attribute[0].ints[:]
        join.attribute[0].ints.extend([1, 2, 0, 3])

    assert "row" in sabotaged(change)


# What is refused.


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tiles": 3}, ConfigError, r"tiles is 3; expected \(rows, columns\) or Tiles"),
        ({"tiles": (1, 1)}, ConfigError, "expected 2 to 1024 in all"),
        ({"tiles": (2, 2), "output_preset": "ultralytics"}, ConfigError, "readers letterbox images themselves"),
        ({"tiles": (2, 2), "backend": "trt"}, UnsupportedByBackendError, "backend trt takes no frames"),
    ],
)
def test_wrong_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        fuse(raw_model(LAYOUTS["distances"]()), layout=LAYOUTS["distances"](), **settings)


@pytest.mark.parametrize(
    ("kind", "image", "settings", "message"),
    [
        ("distances", {"batch": 3}, {}, "has a fixed batch of 3"),
        ("distances", {"dynamic_size": True}, {}, "is loaded for images of any size"),
        ("masks", {}, {}, "whose masks lie in its own input"),
        ("end_to_end", {}, {"runtime_thresholds": True}, "tiles need one; leave runtime_thresholds or tiles out"),
    ],
)
def test_networks_that_take_no_tiles_are_refused(kind, image, settings, message):
    raw = raw_model(LAYOUTS[kind]())
    raw = replace(raw, image=replace(raw.image, **image)) if "dynamic_size" in image else replace(raw, **image)
    with pytest.raises(UnsupportedByBackendError, match=message):
        fuse(raw, layout=LAYOUTS[kind](), tiles=(2, 2), **settings)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--overlap", "0.3"], "found --overlap or --and-whole without --tiles"),
        (["--tiles", "2x2", "--overlap", "1"], "overlap is 1.0; expected a number from 0 to below 1"),
        (["--tiles", "2x2", "--engine", "rtx"], "found --tiles and --engine rtx"),
        (["--tiles", "1x1"], "expected 2 to 1024 in all"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message, tmp_path, capsys):
    assert main(["m.pt", "-o", str(tmp_path / "m.onnx"), *flags]) == 1
    assert message in capsys.readouterr().err
