"""Files of opset 9 and 10 are converted, and shown to give the same."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import version_converter
from third_party import SIZE, Ssd, YoloNas

from fusenms import fuse, load, recognize
from fusenms.errors import SourceError
from fusenms.heads import raw_head


def old_file(module, path, opset: int):
    outputs = ["output0", "output1"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), (torch.rand(1, 3, SIZE, SIZE),), path, dynamo=False, opset_version=opset, input_names=["images"],
            output_names=outputs, dynamic_axes={name: {0: "batch"} for name in ("images", *outputs)},
        )  # fmt: skip
    assert onnx.load(path).opset_import[0].version == opset
    return path


@pytest.mark.slow
@pytest.mark.parametrize("opset", [9, 10])
def test_older_opset_is_converted_and_says_so(tmp_path, opset):
    fused = fuse(old_file(YoloNas(), tmp_path / "m.onnx", opset))
    assert fused.report, fused.report
    assert f"opset {opset} converted to 13, equal on 4 unlike images (max |Δ| 0e+00 of full scale)" in fused.notes


def test_conversion_that_changes_results_is_refused(tmp_path, monkeypatch):
    path = old_file(YoloNas(), tmp_path / "m.onnx", 9)
    right = version_converter.convert_version

    def wrong(model, opset):
        newer = right(model, opset)
        for item in newer.graph.initializer:
            if item.data_type == onnx.TensorProto.FLOAT and len(item.dims) == 4:
                item.CopyFrom(
                    onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(item) * np.float32(1.01), item.name)
                )
        return newer

    monkeypatch.setattr(version_converter, "convert_version", wrong)
    with pytest.raises(SourceError, match=r"opset 9 converted to 13 differs by .* of full scale"):
        load(path)


def test_error_when_the_opset_cannot_be_converted(tmp_path, monkeypatch):
    path = old_file(YoloNas(), tmp_path / "m.onnx", 9)

    def fail(*_):
        raise RuntimeError("no adapter")

    monkeypatch.setattr(version_converter, "convert_version", fail)
    with pytest.raises(SourceError, match=r"opset 9 could not be converted to 13 \(no adapter\)"):
        load(path)


def test_error_when_the_opset_is_older_than_9(tmp_path):
    path = old_file(YoloNas(), tmp_path / "m.onnx", 9)
    model = onnx.load(path)
    model.opset_import[0].version = 8
    onnx.save(model, path)
    with pytest.raises(SourceError, match="opset 8; expected at least 9"):
        load(path)


class UltraFace(Ssd):
    """One class beside the background, with the anchors of UltraFace on each level."""

    def forward(self, images):
        boxes, scores = super().forward(images)
        counts = [a * (-(-SIZE // s)) ** 2 for s, a in ((8, 3), (16, 2), (32, 2), (64, 3))]
        number = torch.arange(sum(counts)) % boxes.shape[1]
        shares = torch.stack((scores[..., 0], 1 - scores[..., 0]), -1)
        return boxes[:, number], shares[:, number]


def test_ultraface_is_told_from_ssd_by_its_candidates(tmp_path):
    raw = load(old_file(UltraFace(), tmp_path / "m.onnx", 9))
    layout = recognize(raw)
    assert (layout.family, layout.num_classes) == ("ultraface", 1)
    head = raw_head(raw, layout)
    assert str(head.pixels) == "RGB from 0 to 255, less (127, 127, 127), over (128, 128, 128)"
    assert head.stretch
    raw = load(old_file(Ssd(), tmp_path / "s.onnx", 10))
    assert recognize(raw).family == "ssd"
