"""An `nn.Module` of one's own, with a layout written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from third_party import CLASSES, SIZE, RtDetr, YoloNas
from torch import nn

from fusenms import fuse, load
from fusenms.errors import AlreadyFusedError, ConfigError, SourceError
from fusenms.fusion.backends import BACKENDS
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.layout import Activation, BoxFormat, Decoded, Distances, Join, Layout, MaskTerms, Tap

pytestmark = pytest.mark.slow

EXAMPLE = torch.zeros(1, 3, SIZE, SIZE)
NAMES = ("cat", "dog", "cow")


def layout(classes: int = CLASSES, boxes: str = "boxes", scores: str = "scores") -> Layout:
    return Layout(
        "in-house", Tap(boxes, 2, 0, 4), Tap(scores, 2, 0, classes), None, Activation.NONE, Decoded(BoxFormat.XYXY)
    )


class Named(YoloNas):
    """Outputs by name, in another order, and one more."""

    def forward(self, images):
        boxes, scores = self.truth(images)
        return {"features": images, "scores": scores, "boxes": boxes}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("module", [YoloNas, Named])
def test_equals_reference(module, backend):
    fused = fuse(module(), example=EXAMPLE, layout=layout(), class_names=NAMES, backend=backend, score_threshold=0.01)
    assert fused.report, fused.report
    assert (fused.class_names, fused.layout.family, fused.source) == (NAMES, "in-house", module.__name__)


def test_gives_what_the_module_means():
    module, images = YoloNas(), np.random.default_rng(0).random((2, 3, SIZE, SIZE), np.float32)
    fused = fuse(module, example=EXAMPLE, layout=layout(), score_threshold=0.01, iou_threshold=1.0)
    got = OnnxRuntimeRunner(fused.model).infer(images)
    boxes, scores = (t.detach().numpy() for t in module.truth(torch.from_numpy(images)))
    for i in range(2):
        best = scores[i].max(1)
        order = np.argsort(-best, kind="stable")[: (best > 0.01).sum()]
        assert got["num_detections"][i, 0] == len(order) > 5
        np.testing.assert_allclose(got["boxes"][i, : len(order)], boxes[i][order], atol=1e-3)


def test_module_is_left_as_it_was():
    module = YoloNas().train().double()
    fuse(module, example=EXAMPLE, layout=layout(), unverified=True)
    assert module.training
    assert next(module.parameters()).dtype == torch.float64
    assert next(module.parameters()).requires_grad


def test_queries_in_any_order_are_equal():
    boxes, logits = Tap("b", 2, 0, 4), Tap("l", 2, 0, CLASSES)
    decode = Decoded(BoxFormat.CXCYWH, normalized=True)
    own = Layout("queries", boxes, logits, None, Activation.SIGMOID, decode, suppress=False)

    class Swapped(RtDetr):
        def forward(self, images):
            return super().forward(images)[::-1]

    assert fuse(Swapped(), example=EXAMPLE, layout=own, score_threshold=0.01).report


class Overhanging(nn.Module):
    """Levels whose last cells reach over the edge of an image of 60 pixels; boxes as distances in bins."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.levels = nn.ModuleList(nn.Conv2d(3, 64 + CLASSES, s, s) for s in (8, 16, 32))

    def forward(self, images):
        padded = nn.functional.pad(images, (0, 4, 0, 4))
        rows = torch.cat([conv(padded).flatten(2) for conv in self.levels], 2)
        return rows[:, :64], rows[:, 64:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_size_that_is_no_multiple_of_the_stride_equals_reference(backend):
    boxes, scores = Tap("boxes", 1, 0, 64), Tap("scores", 1, 0, CLASSES)
    own = Layout("own", boxes, scores, None, Activation.SIGMOID, Distances((8, 16, 32), 16))
    fused = fuse(Overhanging(), example=torch.zeros(1, 3, 60, 60), layout=own, backend=backend)
    assert fused.report, fused.report


class OnlyDynamo(YoloNas):
    """An operator that PyTorch's TorchScript exporter does not know."""

    def forward(self, images):
        boxes, scores = self.truth(images)
        return boxes, torch.special.expit(torch.atan2(scores * 8 - 4, torch.ones_like(scores)).sinc() * 2 - 6)


@pytest.mark.thorough
def test_newer_exporter_takes_what_the_older_one_cannot():
    pytest.importorskip("onnxscript")
    module = OnlyDynamo()
    with pytest.raises(SourceError, match="could not be exported"):
        load(module, example=EXAMPLE, layout=layout(), opset=17)
    raw = load(module, example=EXAMPLE, layout=layout())
    assert "opset 18" in raw.notes[0]
    assert fuse(raw, score_threshold=0.001).report


class Logits(YoloNas):
    def forward(self, images):
        boxes, scores = self.truth(images)
        return boxes, scores.logit()


class Broken(nn.Module):
    def forward(self, images):
        raise RuntimeError("out of paint")


@pytest.mark.parametrize(
    ("module", "settings", "error", "message"),
    [
        (YoloNas(), {"layout": None}, ConfigError, "an nn.Module needs example .* and layout"),
        (YoloNas(), {"example": None}, ConfigError, "an nn.Module needs example"),
        (YoloNas(), {"example": torch.zeros(3, 4, 4)}, ConfigError, r"example is \[3, 4, 4\]; expected a tensor \[batch, 3"),
        (YoloNas(), {"example": "x"}, ConfigError, "example is str"),
        (YoloNas(), {"layout": "x"}, ConfigError, "layout is a str; expected"),
        (YoloNas(), {"layout": layout(9)}, ConfigError, r"scores is \[2, 84, 3\]; expected 3 dimensions, 9 channels or more"),
        (Named(), {"layout": layout(boxes="corners")}, ConfigError, "returns features, scores, boxes; the layout also names corners"),
        (YoloNas(), {"class_names": ["a"]}, ConfigError, "class_names has 1 names; expected 3"),
        (YoloNas(), {"class_names": "cat"}, ConfigError, "class_names is the text 'cat'; expected a list"),
        (YoloNas(), {"class_names": ["cat", "a\nb"]}, ConfigError, "with control characters"),
        (Logits(), {}, ConfigError, "class scores range from .* expected probabilities from 0 to 1"),
        (YoloNas(), {"size": 64}, ConfigError, "size, one_to_many and ignore are for files"),
        (nn.Conv2d(3, 3, 1), {}, ConfigError, "the module returns 1 tensors; the layout names 2: boxes, scores"),
        (Broken(), {}, SourceError, "Broken: does not run on .* out of paint"),
        (object(), {}, SourceError, "weights is a object; expected the path of"),
    ],
)  # fmt: skip
def test_error_says_what_is_wrong(module, settings, error, message):
    with pytest.raises(error, match=message):
        load(module, **({"example": EXAMPLE, "layout": layout()} | settings))


def test_error_when_a_file_is_given_a_layout(tmp_path):
    with pytest.raises(ConfigError, match="example, layout and class_names are for an"):
        load("yolov8n.pt", layout=layout())


class WithMasks(torch.nn.Module):
    """Boxes, classes and mask coefficients in one tensor, prototypes in another."""

    def __init__(self, prototypes: int = 4):
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.prototypes = torch.nn.Conv2d(3, 4 + 3 + 4, 16, 16), torch.nn.Conv2d(3, prototypes, 4, 4)

    def forward(self, images):
        rows = self.rows(images).flatten(2)
        return torch.cat((rows[:, :4].sigmoid() * 64, rows[:, 4:]), 1), self.prototypes(images)


MASK_LAYOUT = Layout(
    "in-house", Tap("rows", 1, 0, 4), Tap("rows", 1, 4, 7), None, Activation.SIGMOID, Decoded(BoxFormat.CXCYWH),
    masks=MaskTerms(Tap("rows", 1, 7, 11), "protos"),
)  # fmt: skip


@pytest.mark.parametrize("masks", ["coefficients", "prototype"])
def test_module_with_masks(masks):
    fused = fuse(WithMasks(), example=torch.zeros(1, 3, 64, 64), layout=MASK_LAYOUT, masks=masks)
    assert fused.report, fused.report
    assert fused.task == "segment"


def test_error_when_prototypes_do_not_fit_their_coefficients():
    with pytest.raises(
        ConfigError, match=r"prototypes protos are \[2, 5, 16, 16\]; expected \[batch, 4, height, width\]"
    ):
        fuse(WithMasks(5), example=torch.zeros(1, 3, 64, 64), layout=MASK_LAYOUT)


class Nested(YoloNas):
    """Tensors in lists and tuples, and what is no tensor between them."""

    def __init__(self, arrange):
        super().__init__()
        self.arrange = arrange

    def forward(self, images):
        return self.arrange(*self.truth(images))


NESTED = {
    "lists": (lambda b, s: [[b], [s]], ("boxes", "scores"), ""),
    "tuples of tuples": (lambda b, s: ((b, (s,)),), ("0.0", "0.1.0"), ""),
    "a dictionary of lists": (lambda b, s: {"head": [b, s], "loss": None}, ("head.0", "head.1"), "loss (None)"),
    "text and None": (lambda b, s: (b, None, "cat", s, 3), ("boxes", "scores"), "1 (None), 2 (str), 4 (int)"),
    "more by number": (lambda b, s: [b, s, b * 0], ("0", "1"), ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", NESTED)
def test_nested_outputs_have_names_by_their_places(kind):
    arrange, names, left = NESTED[kind]
    fused = fuse(Nested(arrange), example=EXAMPLE, layout=layout(boxes=names[0], scores=names[1]), score_threshold=0.01)
    assert fused.report, fused.report
    plain = fuse(YoloNas(), example=EXAMPLE, layout=layout(), score_threshold=0.01)
    assert fused.report.summary == plain.report.summary
    notes = [note for note in fused.notes if "left out" in note]
    assert notes == ([f"not tensors, so left out of what the module returns: {left}"] if left else [])


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (lambda b, s: {"head": [b, s]}, "the module returns head.0, head.1; the layout also names boxes, scores"),
        (lambda b, s: [[b, s], [b]], "the module returns 3 tensors; the layout names 2: boxes, scores"),
        (lambda b, s: "cat", "the module returns 0 tensors; the layout names 2"),
        (lambda b, s: {"loss": None}, "the module returns no tensors; the layout also names boxes, scores"),
    ],
)
def test_error_lists_what_a_module_returns(arrange, message):
    with pytest.raises(ConfigError, match=message):
        load(Nested(arrange), example=EXAMPLE, layout=layout())


class Plain(nn.Module):
    """A module that scripts, with a branch in Python."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.norm = nn.Conv2d(3, 7, 16, 16), nn.BatchNorm2d(7)

    def forward(self, images):
        rows = self.norm(self.head(images)).flatten(2)
        if images.shape[2] > 1000:
            rows = rows * 2
        return rows


ROWS_LAYOUT = Layout(
    "own", Tap("rows", 1, 0, 4), Tap("rows", 1, 4, 7), None, Activation.SIGMOID, Decoded(BoxFormat.XYXY)
)


@pytest.mark.filterwarnings("error:The .grad attribute")
@pytest.mark.parametrize("kind", ["traced", "scripted", "frozen", "inner"])
def test_traced_and_scripted_modules_are_taken(kind):
    module, example = Plain().eval(), torch.rand(1, 3, SIZE, SIZE)
    made = {
        "traced": lambda: torch.jit.trace(module, example, check_trace=False),
        "scripted": lambda: torch.jit.script(module),
        "frozen": lambda: torch.jit.freeze(torch.jit.script(module)),
        "inner": lambda: nn.Sequential(nn.Identity(), torch.jit.script(module)),
    }[kind]()
    fused = fuse(made, example=example, layout=ROWS_LAYOUT, score_threshold=0.5)
    assert fused.report, fused.report
    assert fused.source == ("Sequential" if kind == "inner" else "Plain")


def test_script_in_double_and_in_training_is_left_as_it_was():
    module = torch.jit.script(Plain().double().train())
    fuse(module, example=EXAMPLE, layout=ROWS_LAYOUT, unverified=True)
    assert module.training
    assert next(module.parameters()).dtype == torch.float64


class Uncopied(YoloNas):
    def __deepcopy__(self, memo):
        raise RuntimeError("holds a lock")


def test_error_when_a_module_cannot_be_copied():
    with pytest.raises(SourceError, match=r"Uncopied: cannot be copied for the export \(RuntimeError: holds a lock\)"):
        load(Uncopied(), example=EXAMPLE, layout=layout())


@pytest.fixture(scope="module")
def suppress():
    """An operator of the name that torchvision gives its own."""
    library = torch.library.Library("fusenms_tests", "DEF")
    library.define("nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", lambda boxes, scores, _: scores.argsort(descending=True), "CPU")
    yield torch.ops.fusenms_tests.nms
    del library


def test_error_names_a_suppression_in_the_module(suppress):
    class Suppressing(YoloNas):
        def forward(self, images):
            boxes, scores = self.truth(images)
            return boxes[:, suppress(boxes[0], scores[0, :, 0], 0.5)], scores

    with pytest.raises(
        AlreadyFusedError,
        match=r"Suppressing: already holds a non-maximum suppression \(fusenms_tests::nms\); expected the raw head",
    ):
        load(Suppressing(), example=EXAMPLE, layout=layout())


class Levels(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.boxes, self.classes = nn.Conv2d(3, 4, 8, 8), nn.Conv2d(3, 3, 8, 8)

    def forward(self, images):
        return {"b": self.boxes(images).relu(), "c": self.classes(images)}


@pytest.mark.parametrize(
    ("boxes", "classes", "taken"),
    [
        ("joined_b", "joined_c", ""),
        ("boxes", "k", "boxes"),
        ("k", "labels", "labels"),
        ("b", "k", "b"),
        ("k", "k", "k"),
    ],
)
def test_join_needs_a_name_of_its_own(boxes, classes, taken):
    def fused():
        joins = (Join(boxes, ("b",), 1, 4), Join(classes, ("c",), 1, 3))
        taps = Tap(boxes, 1, 0, 4), Tap(classes, 1, 0, 3)
        own = Layout("own", *taps, None, Activation.SIGMOID, Distances((8,), 1), joins=joins)
        return fuse(Levels(), example=EXAMPLE, layout=own)

    if not taken:
        assert fused().report
        return
    with pytest.raises(ConfigError, match=f"join into '{taken}': .* expected its own, as 'joined_{taken}'"):
        fused()
