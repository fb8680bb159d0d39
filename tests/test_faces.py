"""Face detectors with landmarks, against a decode of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from raw_heads import OnnxRuntimeRunner
from test_meaning import write_new
from third_party import SIZE, LevelsApart

from fusenms import Detector, fuse, load, recognize
from fusenms.errors import HeadNotRecognizedError
from fusenms.layout import GridOffsets


class Yunet(LevelsApart):
    """Class, objectness, box and five landmarks a level, flat; all classes first, as the authors' export has them."""

    strides = (8, 16)  # at 64 pixels, a level of stride 32 would have as many cells as channels
    channels = 16

    def forward(self, images):
        rows = [m.flatten(2).transpose(1, 2) for m in self.maps(images)]
        spans = ((0, 1), (1, 2), (2, 6), (6, 16))
        return tuple(r[..., a:b].sigmoid() if b <= 2 else r[..., a:b] for a, b in spans for r in rows)


def decoded(outputs):
    """Corners, scores and landmarks of one image, from the twelve outputs."""
    boxes, scores, points = [], [], []
    for i, stride in enumerate(Yunet.strides):
        cls, obj, box, kps = (outputs[2 * k + i][0].astype(np.float64) for k in range(4))
        for j in range(len(cls)):
            cell = np.array([j % (SIZE // stride), j // (SIZE // stride)])
            center, size = (box[j, :2] + cell) * stride, np.exp(box[j, 2:]) * stride
            boxes.append(np.concatenate((center - size / 2, center + size / 2)))
            scores.append(np.sqrt(cls[j, 0] * obj[j, 0]))
            points.append((kps[j].reshape(5, 2) + cell) * stride)
    return np.array(boxes), np.array(scores), np.array(points)


@pytest.mark.slow
def test_yunet_gives_what_its_own_decode_gives(tmp_path):
    path = write_new(Yunet(), tmp_path / "m.onnx")
    raw = load(path)
    layout = recognize(raw)
    assert (layout.family, layout.task, layout.decode) == ("yunet", "pose", GridOffsets(Yunet.strides))
    fused = fuse(path, family="yunet", score_threshold=0.0, iou_threshold=1.0, max_detections=80, pixels="rgb")
    assert fused.report, fused.report
    image = np.random.default_rng(3).random((1, 3, SIZE, SIZE), dtype=np.float32)
    with torch.no_grad():
        boxes, scores, points = decoded([t.numpy() for t in Yunet().eval()(torch.from_numpy(image))])
    found = OnnxRuntimeRunner(fused.model).infer(image)
    order = np.argsort(-scores, kind="stable")
    count = int(found["num_detections"][0, 0])
    assert count == 80
    assert np.abs(found["scores"][0] - scores[order]).max() < 1e-5
    assert np.abs(found["boxes"][0] - boxes[order]).max() < 1e-3
    assert np.abs(found["keypoints"][0] - points[order]).max() < 1e-3


def test_error_when_scores_are_no_probabilities(tmp_path):
    class Logits(Yunet):
        def forward(self, images):
            rows = [m.flatten(2).transpose(1, 2) for m in self.maps(images)]
            return tuple(r[..., a:b] for a, b in ((0, 1), (1, 2), (2, 6), (6, 16)) for r in rows)

    with pytest.raises(HeadNotRecognizedError, match=r"yunet: found scores from .* expected probabilities"):
        recognize(load(write_new(Logits(), tmp_path / "m.onnx")))


@pytest.mark.parametrize(
    ("file", "family", "size"),
    [
        ("yunet_n_dynamic.onnx", "yunet", 640),
        ("yolov8lite_t_face.onnx", "levels", None),
        ("ultraface_rfb320.onnx", "ultraface", None),
    ],
)
def test_real_files_find_both_faces(zoo, tmp_path, file, family, size):
    path = zoo.parent / "cases" / "files" / file
    if not path.exists():
        pytest.skip("needs ../shared/cases/files")
    fused = fuse(path, size=size, score_threshold=0.6)
    assert fused.report, fused.report
    assert (fused.layout.family, fused.layout.num_classes) == (family, 1)
    with Detector(fused.save(tmp_path / "f.onnx")) as detect:
        found = detect(zoo / "photos" / "zidane.jpg")[0]
    centers = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
    for face in ((985, 190), (605, 340)):  # by eye
        assert (np.abs(centers - face).max(1) < 20).any(), (face, centers)
