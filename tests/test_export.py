from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from conftest import SHAPES

from fusenms import fuse, load, verify
from fusenms.errors import ConfigError, SourceError
from fusenms.fusion.backends import BACKENDS
from fusenms.graph.model import with_outputs
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.graph.unlike_images import Difference
from fusenms.reference import Rows, candidates, postprocess
from fusenms.runtime.images import read_image
from fusenms.runtime.placement import to_tensor
from fusenms.sources import export as export_module
from fusenms.sources import parity

pytestmark = pytest.mark.slow


def dims(model):
    return [
        [d.dim_param or d.dim_value for d in e.type.tensor_type.shape.dim]
        for e in (*model.graph.input, *model.graph.output)
    ]


def test_batch_is_dynamic_and_opset_is_17_by_default(shapes_raw):
    assert dims(shapes_raw.model) == [["batch", 3, 64, 64], ["batch", 64, 84], ["batch", 3, 84]]
    assert [entry.version for entry in shapes_raw.model.opset_import] == [17]
    assert "equal to PyTorch at batch 1, 2, 3" in shapes_raw.notes[0]


@pytest.mark.covering(default=0)
@pytest.mark.parametrize("opset", [13, 20])
def test_opset_is_what_was_asked(opset):
    assert [e.version for e in load(SHAPES / "shapes.pt", size=64, opset=opset).model.opset_import] == [opset]


def test_size_is_what_the_checkpoint_was_trained_at_by_default():
    assert dims(load(SHAPES / "shapes.pt").model)[0] == ["batch", 3, 256, 256]


def test_height_and_width_may_differ():
    fused = fuse(SHAPES / "shapes.pt", size=(64, 96))
    assert fused.report
    assert dims(fused.model)[0] == ["batch", 3, 64, 96]


@pytest.fixture(scope="module")
def open_raw():
    return cache(lambda *size: load(SHAPES / "shapes.pt", size=size, dynamic_size=True))


@pytest.mark.covering(default=0)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamic_size_equals_reference_at_several_sizes(open_raw, backend):
    fused = fuse(open_raw(64, 96), backend=backend)
    assert fused.report
    assert dims(fused.model)[0] == ["batch", 3, "height", "width"]
    for height, width in ((32, 32), (96, 64), (128, 160)):
        image = fused.image.__class__("images", height, width, 32, True)
        resized = fused.__class__(**{**fused.__dict__, "image": image, "report": None})
        report = verify(resized, images=np.random.default_rng(0).random((2, 3, height, width), np.float32))
        assert report, report


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 100}, "size is 100x100; expected multiples of the stride 32, for example 96x96"),
        ({"size": 0}, "size is 0; expected one side"),
        ({"opset": 99}, "opset is 99; expected 13 to 20"),
    ],
)
def test_error_when_setting_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        load(SHAPES / "shapes.pt", **settings)


def test_error_when_export_differs_from_pytorch(monkeypatch):
    monkeypatch.setattr(parity, "largest_difference", lambda *_, **__: Difference(0.05, 0.5, 1))
    where = "in head_classes, on the image 'patches' alone at 64x64; expected at most 0.001"
    with pytest.raises(SourceError, match=rf"differs from PyTorch by 0\.5 {where}"):
        load(SHAPES / "shapes.pt", size=64)


def test_parity_sees_a_wrong_weight(monkeypatch):
    from onnx import numpy_helper

    real = export_module._to_onnx

    def spoiled(*args):
        model, baked = real(*args)
        weight = next(i for i in model.graph.initializer if len(i.dims) == 4)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
        return model, baked

    monkeypatch.setattr(export_module, "_to_onnx", spoiled)
    with pytest.raises(SourceError, match="differs from PyTorch"):
        load(SHAPES / "shapes.pt", size=64)


@pytest.mark.thorough
@pytest.mark.covering(default=0)
@pytest.mark.parametrize("backend", ["ort", "portable"])
def test_dynamic_size_finds_the_same_at_sizes_that_are_no_multiple_of_the_stride(open_raw, backend):
    """The last cells of a level then reach over the edge: an image cut to 250 pixels keeps its boxes where they were."""
    fused = fuse(open_raw(256, 256), backend=backend, unverified=True)
    runner = OnnxRuntimeRunner(with_outputs(fused.model, fused.layout.tensors))
    image = read_image(SHAPES / "shapes0.jpg")[200:456, 150:406]
    for height, width in ((256, 256), (250, 250), (256, 250), (31, 31)):
        outputs = runner.infer(to_tensor([image[:height, :width]]))
        count = int(outputs["num_detections"][0, 0])
        found = Rows(outputs["boxes"][0, :count], outputs["scores"][0, :count], outputs["labels"][0, :count])
        head = {name: outputs[name] for name in fused.layout.tensors}
        expected = postprocess(candidates(head, 0, fused.layout, (height, width)), fused.config, found).rows
        assert count == len(expected)
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)
        if (height, width) == (256, 250):
            wide = runner.infer(to_tensor([image]))
            near = np.abs(wide["boxes"][0][:, None] - found.boxes[None]).max(2).min(1)
            assert (near < 12).sum() > count / 2  # a cut edge moves boxes a little; a wrong grid moves all of them far
