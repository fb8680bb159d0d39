"""Heads without their decode that need more than the small image of `third_party`, or anchors that the user gives."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from raw_heads import LAYOUTS, SIZE
from third_party import CLASSES
from third_party_exports import AnchorDecoded, Decoded, write
from third_party_levels import AnchorLevels, Deltas, OneClass, PicoDet, Scrfd, YoloxLevels

from fusenms import fuse, load, recognize
from fusenms.errors import ConfigError, HeadNotRecognizedError, LayoutContradictedError
from fusenms.heads.anchors_agree import compare_anchors
from fusenms.heads.probe import Probe, probe_image
from fusenms.layout import AnchorBoxes
from fusenms.reference import candidates


def export(module, path, size=SIZE):
    image = torch.zeros(1, 3, size, size)
    names = [f"output{i}" for i in range(len(module.eval()(image)))]
    torch.onnx.export(
        module, (image,), path, dynamo=False, opset_version=17, input_names=["images"], output_names=names,
        dynamic_axes={name: {0: "batch"} for name in ("images", *names)},
    )  # fmt: skip
    return path


@pytest.mark.parametrize(("apart", "probabilities"), [(False, False), (True, False), (False, True)])
def test_levels_of_yolov5_are_decoded_with_the_anchors_given(tmp_path, apart, probabilities):
    module = AnchorLevels(apart, probabilities)
    raw = load(export(module, tmp_path / "m.onnx"))
    with pytest.raises(
        HeadNotRecognizedError, match=f"nothing shows that all {CLASSES} channels after the objectness are classes"
    ):
        recognize(raw, anchors="yolov5")
    layout = recognize(raw, "yolov5", anchors=np.ravel(module.anchors))
    assert (
        layout
        == recognize(raw, "yolov5", anchors="yolov5")
        == recognize(raw, "yolov5", anchors=[np.ravel(x).tolist() for x in module.anchors])
    )
    found = candidates(Probe(raw).head(layout), 0, layout, (SIZE, SIZE))
    with torch.no_grad():
        boxes, scores = (t[0].numpy() for t in module.truth(torch.from_numpy(probe_image(SIZE, SIZE))))
    np.testing.assert_allclose(found.boxes, boxes, atol=2e-3)
    np.testing.assert_allclose(found.scores, scores, atol=1e-5)
    fused = fuse(tmp_path / "m.onnx", family="yolov5", anchors="yolov5", score_threshold=0.01, max_detections=50)
    assert fused.report, fused.report


def test_picodet_is_read_as_it_is_meant(tmp_path):
    module = PicoDet()
    raw = load(export(module, tmp_path / "m.onnx", module.size))
    layout = recognize(raw)
    assert layout.family == "picodet"
    found = candidates(Probe(raw).head(layout), 0, layout, (module.size, module.size))
    with torch.no_grad():
        boxes, scores = (t[0].numpy() for t in module.truth(torch.from_numpy(probe_image(module.size, module.size))))
    np.testing.assert_allclose(found.boxes, boxes, atol=2e-3)
    np.testing.assert_allclose(found.scores, scores, atol=1e-5)


def test_levels_of_yolov5_without_anchors_are_refused(tmp_path):
    with pytest.raises(
        HeadNotRecognizedError, match="a file does not show its anchors, so give them: anchors='yolov5'"
    ):
        recognize(load(export(AnchorLevels(), tmp_path / "m.onnx")))


def _retinanet(level, anchor):
    """As torchvision rounds them: three shapes (height by width), three sizes each."""
    first = 32 * 2**level
    size, ratio = (first, int(first * 2 ** (1 / 3)), int(first * 2 ** (2 / 3)))[anchor % 3], (0.5, 1, 2)[anchor // 3]
    return 2 * round(size / math.sqrt(ratio) / 2), 2 * round(size * math.sqrt(ratio) / 2)


def _efficientdet(level, anchor):
    size = 4 * 8 * 2**level * 2 ** (anchor // 3 / 3)
    wide, tall = ((1, 1), (1.4, 0.7), (0.7, 1.4))[anchor % 3]
    return size * wide, size * tall


@pytest.mark.parametrize("by_level", [False, True])
@pytest.mark.parametrize(
    ("family", "point", "y_first", "sides"),
    [("retinanet", 0.0, False, _retinanet), ("efficientdet", 0.5, True, _efficientdet)],
)
def test_deltas_are_decoded_with_the_anchors_of_the_family_that_is_named(
    tmp_path, family, point, y_first, sides, by_level
):
    module = Deltas(point, y_first, by_level)
    raw = load(export(module, tmp_path / "m.onnx", module.size))
    with pytest.raises(HeadNotRecognizedError, match=f"{family}: nothing in a file shows its anchors"):
        recognize(raw)
    layout = recognize(raw, family)
    found = candidates(Probe(raw).head(layout), 0, layout, (module.size, module.size))
    with torch.no_grad():
        truth = module.truth(torch.from_numpy(probe_image(module.size, module.size)), sides)
    order = sorted(truth, key=lambda place: (place[0], place[3], *place[1:3]) if by_level else place)
    np.testing.assert_allclose(found.boxes, np.stack([truth[place].numpy() for place in order]), atol=5e-3)
    fused = fuse(tmp_path / "m.onnx", family=family, score_threshold=0.01, max_detections=50)
    assert fused.report, fused.report


@pytest.mark.parametrize(
    ("anchors", "message"),
    [
        ("yolov9", "anchors is 'yolov9'; expected widths and heights in pixels, or one of yolov5"),
        ([10, 13, 16], "expected widths and heights in pixels above 0"),
        ([10, -13], "expected widths and heights in pixels above 0"),
        ([10, float("nan")], "expected widths and heights in pixels above 0"),
        ([10, 1e39], "expected widths and heights in pixels above 0"),
        ([[10, 13], [16]], "expected widths and heights in pixels above 0"),
        ([], "expected widths and heights in pixels above 0"),
    ],
)
def test_error_when_anchors_mean_nothing(tmp_path, anchors, message):
    raw = load(export(AnchorLevels(), tmp_path / "m.onnx"))
    with pytest.raises(ConfigError, match=message):
        recognize(raw, anchors=anchors)


def test_error_when_anchors_do_not_fit_the_levels(tmp_path):
    raw = load(export(AnchorLevels(), tmp_path / "m.onnx"))
    with pytest.raises(HeadNotRecognizedError, match="found 2 anchors for 3 levels; expected as many for each level"):
        recognize(raw, anchors=[10, 13, 16, 30])


@pytest.mark.covering(default=1, quick=0)
@pytest.mark.parametrize("change", ["turned", "exchanged"])
def test_wrong_anchors_are_seen_on_images(zoo, change):
    """Of YOLOv5n: the right ones agree, others do not."""
    raw = load(zoo / "derived/yolov5n.onnx")
    layout = recognize(raw)
    decode = layout.decode
    assert isinstance(decode, AnchorBoxes)
    anchors = tuple(
        level[::-1] if change == "turned" else tuple(pair[::-1] for pair in level) for level in decode.anchors
    )
    wrong = replace(layout, decode=replace(decode, anchors=anchors))
    assert any("anchors agree within" in line for line in fuse(raw, layout=layout).notes)
    with pytest.raises(
        LayoutContradictedError, match="its anchors see the same objects in sizes that differ by a factor of"
    ):
        fuse(raw, layout=wrong)


def test_heads_without_anchors_are_not_compared():
    assert compare_anchors([], LAYOUTS["distances"](), (SIZE, SIZE)) is None


class SizesDecoded(YoloxLevels):
    """YOLOX whose file has the exponentials of sizes already."""

    def forward(self, images):
        parts = super().forward(images)
        return tuple(torch.cat((p[:, :2], p[:, 2:].exp()), 1) if i % 3 == 0 else p for i, p in enumerate(parts))


class DeltasOfOneAnchor(OneClass):
    """Box channels that are no distances: half of them are below 0."""

    def forward(self, images):
        return tuple(part for m in self.maps(images) for part in (m[:, :4] - m[:, :4].mean(), m[:, 4:]))


class LandmarksInPixels(Scrfd):
    def forward(self, images):
        parts = super().forward(images)
        return (*parts[:6], *(part.abs() * 40 * stride for part, stride in zip(parts[6:], self.strides, strict=True)))


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (SizesDecoded, "none of the channels of sizes is below 0, so they may be sizes"),
        (DeltasOfOneAnchor, "of the box channels are below 0, so they may be deltas to an anchor"),
        (LandmarksInPixels, "its landmarks are in pixels, not in strides"),
    ],
)
def test_box_terms_of_another_kind_are_refused(tmp_path, module, why):
    with pytest.raises(HeadNotRecognizedError, match=why):
        recognize(load(export(module(), tmp_path / "m.onnx")))


@pytest.mark.parametrize(
    ("module", "family", "why"),
    [
        (Decoded, "yolov8", "its boxes need no anchors; leave them out"),
        (AnchorDecoded, "yolov5", "which are decoded already; leave the anchors out"),
    ],
)
def test_anchors_that_mean_nothing_are_refused(tmp_path, module, family, why):
    raw = load(write(module(), tmp_path / "m.onnx"))
    assert recognize(raw, family).family == family
    with pytest.raises(HeadNotRecognizedError, match=why):
        recognize(raw, family, anchors="yolov5")
