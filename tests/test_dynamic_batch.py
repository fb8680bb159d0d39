"""The batch of a file: opened where that is shown to be safe, kept or refused where it is not, fixed on request."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from third_party_exports import SIZE, AnchorDecoded, Decoded, write
from torch import nn

from fusenms import Detector, fuse, inspect, load, load_fused, recognize, verify
from fusenms.errors import ConfigError, InputError, SourceError
from fusenms.fusion.backends import BACKENDS
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.heads.probe import first_copy
from fusenms.transforms import dynamic_batch
from fusenms.verification.agreement import agreement

pytestmark = pytest.mark.slow

PHOTOS = [np.random.default_rng(i).integers(0, 256, (SIZE, SIZE, 3), np.uint8) for i in range(5)]


class Before(nn.Module):
    """`Decoded` with a layer before it that works on the whole batch."""

    def __init__(self, layer):
        super().__init__()
        self.inner, self.layer = Decoded(), layer

    def forward(self, images):
        return self.inner(self.layer(images))


def centered(images):
    return images - images.mean(0, keepdim=True) / 2


def by_place(images):
    return images * torch.linspace(0.5, 1, len(images))[:, None, None, None]


def inferred(images):
    return images.view(len(images), -1, SIZE * SIZE).view(len(images), -1, SIZE, SIZE)


def reshaped(images):
    return images.reshape(len(images), 3, SIZE * SIZE).reshape(len(images), 3, SIZE, SIZE)


def with_constant(images):
    """Of no meaning for the result, but joined with a constant of the batch that no other batch fits."""
    return torch.cat((images, torch.zeros(len(images), 1, SIZE, SIZE)), 1)[:, :3]


def with_scalars(images):
    """Reads the batch: scalars and vectors without a batch are values of the graph."""
    return images * images.new_tensor(float(len(images))) / len(images)


def exported(module: nn.Module, path: Path, batch: int, dynamic: bool = False) -> Path:
    """Export as `export(batch=N)` of other packages does: the batch becomes constants of reshapes."""
    torch.onnx.export(
        module.eval(), (torch.rand(batch, 3, SIZE, SIZE),), path, input_names=["images"], output_names=["output0"],
        dynamic_axes={"images": {0: "batch"}, "output0": {0: "batch"}} if dynamic else None, opset_version=13, dynamo=False,
    )  # fmt: skip
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "batch"), [(Decoded, 1), (Decoded, 2), (Decoded, 8), (AnchorDecoded, 4), (lambda: Before(inferred), 4)]
)
def test_frozen_batch_is_opened_and_says_so(tmp_path, module, batch):
    path = exported(module(), tmp_path / "m.onnx", batch)
    fused = fuse(path)
    assert f"batch opened (was {batch}) · 4 unlike images equal to running them alone" in fused.notes
    assert fused.report.batches == (1, 2, 7)
    assert fused.layout.decode_stage == "late"
    assert fuse(path, make_dynamic=True, unverified=True).notes == fused.notes


def test_scalars_and_constants_are_no_batches(tmp_path):
    path = exported(Before(with_scalars), tmp_path / "m.onnx", 4)
    model = onnx.load(path)
    names = ["number", "rows", "equal"]
    values = [np.float32(4), np.arange(8, dtype=np.float32), np.zeros((4, 2), np.float32)]
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(v), n) for n, v in zip(names, values, strict=True)
    )
    for name in names:
        model.graph.node.append(onnx.helper.make_node("Identity", [name], [f"{name}_out"]))
    onnx.save(model, path)
    raw = load(path)
    assert recognize(raw).family == "yolov8"
    assert fuse(path).report


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (np.float32(3), ()),
        (np.zeros((0, 2)), (0, 2)),
        (np.arange(8), (8,)),
        (np.arange(6), (6,)),
        (np.tile(np.arange(3.0), (4, 1)), (1, 3)),
        (np.tile([np.nan, np.inf], (4, 1)), (1, 2)),
        (np.tile(np.arange(3.0), 4), (3,)),
    ],
)
def test_first_copy_is_cut_only_where_all_copies_are_the_same(value, shape):
    assert first_copy(np.asarray(value), 4).shape == shape


@pytest.mark.slow
def test_batch_that_cannot_be_opened_stays_and_says_why(tmp_path):
    path = exported(Before(with_constant), tmp_path / "m.onnx", 4)
    fused = fuse(path, score_threshold=0.05)
    assert "batch stays 4, as it is frozen in the file: the batch cannot be opened" in "\n".join(fused.notes)
    assert (fused.image.batch, fused.image.independent, fused.report.batches) == (4, True, (4,))
    with pytest.raises(SourceError, match="the batch cannot be opened, the graph does not run at another batch size"):
        fuse(path, batch="dynamic")
    with pytest.raises(SourceError, match="the batch cannot be opened"):
        fuse(path, batch=2)
    assert fuse(path, batch=4, score_threshold=0.05).report.summary == fused.report.summary


@pytest.mark.parametrize("batch", [1, 2])
def test_opened_graph_gives_what_the_file_gives(tmp_path, monkeypatch, batch):
    real = dynamic_batch._opened

    def spoiled(*args):
        model = real(*args)
        weight = next(item for item in model.graph.initializer if len(item.dims) == 4)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
        return model

    monkeypatch.setattr(dynamic_batch, "_opened", spoiled)
    with pytest.raises(
        SourceError, match="the batch cannot be opened, the opened graph gives other results than the file"
    ):
        fuse(exported(Decoded(), tmp_path / "m.onnx", batch), batch="dynamic")


def test_mixed_batch_of_one_is_kept(tmp_path):
    """Alone, an image has nothing to be mixed with."""
    path = exported(Before(centered), tmp_path / "m.onnx", 1)
    fused = fuse(path)
    assert "images of one batch change each other's results: " in "\n".join(fused.notes)
    assert fused.report.batches == (1,)
    with pytest.raises(SourceError, match=r"change each other's results: .* of the \w+ image by \d+"):
        fuse(path, batch="dynamic")


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("layer", [centered, by_place])
def test_images_that_change_each_other_are_refused(tmp_path, layer, batch):
    with pytest.raises(
        SourceError,
        match=r"change each other's results: \S+ of the \w+ image differs by \d+\.\d% of its largest value",
    ):
        fuse(exported(Before(layer), tmp_path / "m.onnx", 2), batch=batch)


@pytest.mark.slow
def test_dynamic_batch_is_tried_too(tmp_path):
    path = exported(Before(centered), tmp_path / "m.onnx", 2, dynamic=True)
    for batch in (None, "dynamic", 2, 3):
        with pytest.raises(SourceError, match="change each other's results"):
            fuse(path, batch=batch)
    assert fuse(path, batch=1).report.batches == (1,)


def test_batch_that_is_dynamic_only_by_name_is_refused(tmp_path):
    path = exported(Before(reshaped), tmp_path / "m.onnx", 1)
    model = onnx.load(path)
    for entry in (*model.graph.input, *model.graph.output):
        entry.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, path)
    with pytest.raises(SourceError, match=r"does not run on 4 images, though its batch is dynamic .* with batch=1"):
        fuse(path)
    assert fuse(path, batch=1).report


@pytest.mark.slow
@pytest.mark.parametrize("batch", [None, "dynamic"])
def test_dynamic_quantization_is_noted_with_its_effect(tmp_path, batch):
    from onnxruntime.quantization import quantize_dynamic

    for frozen in (False, True):
        path = exported(Decoded(), tmp_path / "m.onnx", 1, dynamic=not frozen)
        quantize_dynamic(path, tmp_path / "q.onnx")
        fused = fuse(tmp_path / "q.onnx", unverified=True, batch=batch)
        assert not fused.image.independent
        assert "dynamic quantization takes its ranges over the batch, which changes the head by up to" in "\n".join(
            fused.notes
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_fixed_batch_equals_reference_at_that_size(tmp_path, shapes_raw, backend):
    from dataclasses import replace

    fused = fuse(replace(shapes_raw, batch=3), backend=backend)
    assert fused.report.batches == (3,)
    graph = fused.model.graph
    assert {entry.type.tensor_type.shape.dim[0].dim_value for entry in (*graph.input, *graph.output)} == {3}
    path = fused.save(tmp_path / "f.onnx")
    assert load_fused(path).image.batch == 3
    assert verify(path).batches == (3,)
    with pytest.raises(InputError, match=r"batches are \[1, 3\], but the model has a fixed batch of 3"):
        verify(path, batches=(1, 3))


@pytest.mark.slow
def test_detector_fills_a_fixed_batch(tmp_path):
    path = write(Decoded(), tmp_path / "m.onnx")
    three = fuse(path, batch=3, score_threshold=0.05)
    dynamic = fuse(path, score_threshold=0.05)
    with Detector(three.save(tmp_path / "3.onnx")) as fixed, Detector(dynamic.save(tmp_path / "d.onnx")) as free:
        for some in (PHOTOS, PHOTOS[:3], PHOTOS[:1], []):
            for got, expected in zip(fixed(some), free(some), strict=True):
                np.testing.assert_array_equal(got.labels, expected.labels)
                np.testing.assert_allclose(got.boxes, expected.boxes, atol=1e-3)
    images = np.random.default_rng(0).random((2, 3, SIZE, SIZE), np.float32)
    found = agreement(three, dynamic, images)
    assert found.before == found.after == found.same > 0


def test_file_that_says_another_batch_than_its_graph_is_refused(tmp_path):
    path = fuse(write(Decoded(), tmp_path / "m.onnx"), batch=3).save(tmp_path / "f.onnx")
    model = onnx.load(path)
    for item in model.metadata_props:
        item.value = item.value.replace('"batch": 3', '"batch": 2')
    onnx.save(model, path)
    with pytest.raises(SourceError, match=r"its metadata says images \[2, 3, 64, 64\]"):
        load_fused(path)


def test_half_precision_at_a_fixed_batch(tmp_path):
    fused = fuse(write(Decoded(), tmp_path / "m.onnx"), batch=2, precision="fp16", score_threshold=0.05)
    assert fused.report.batches == (2,)
    assert OnnxRuntimeRunner(fused.model).infer(np.zeros((2, 3, SIZE, SIZE), np.float32))["boxes"].shape[0] == 2


@pytest.mark.parametrize("batch", [0, -1, True, 1.5, "two"])
def test_error_when_the_batch_is_no_number_of_images(batch):
    with pytest.raises(ConfigError, match=r"batch is .*; expected 'dynamic', or a fixed number"):
        load("m.onnx", batch=batch)


def test_error_when_the_batch_is_asked_twice():
    with pytest.raises(ConfigError, match="batch is 4, but make_dynamic is set"):
        load("m.onnx", batch=4, make_dynamic=True)


def test_error_when_the_batch_exceeds_the_limits(tmp_path):
    with pytest.raises(ConfigError, match=r"batch is 100000, of images of 64x64; .* \(max_tensor_elements\)"):
        fuse(write(Decoded(), tmp_path / "m.onnx"), batch=100_000)


def test_inspect_says_whether_the_batch_opens(tmp_path):
    found = inspect(exported(Before(with_constant), tmp_path / "m.onnx", 4))
    assert (found.frozen_batch, found.opened[:15]) == (4, "batch stays 4, ")
    assert "batch opened (was 1)" in inspect(exported(Decoded(), tmp_path / "m.onnx", 1)).opened
