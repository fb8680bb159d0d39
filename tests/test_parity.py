"""The export of a module is compared with PyTorch on unlike images, alone and together, and at sizes that differ clearly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import SHAPES
from torch import nn

from fusenms import fuse, load
from fusenms.errors import SourceError
from fusenms.graph.unlike_images import largest_difference, unlike_images
from fusenms.layout import Activation, BoxFormat, Decoded, Layout, Tap

LAYOUT = Layout(
    "in-house", Tap("rows", 1, 0, 4), Tap("rows", 1, 4, 7), None, Activation.SIGMOID,
    Decoded(BoxFormat.CXCYWH, normalized=True),
)  # fmt: skip
MARKED = torch.full((1, 3, 64, 96), 0.25)


class Rows(nn.Module):
    """One convolution. ``doubled(images)`` says in Python whether its rows are doubled."""

    def __init__(self, doubled=lambda images: False):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.doubled = nn.Conv2d(3, 7, 16, 16), doubled

    def forward(self, images):
        rows = self.head(self.before(images)).flatten(2)
        if self.doubled(images):
            rows = rows * 2
        return torch.cat((rows[:, :4].sigmoid(), rows[:, 4:]), 1)

    def before(self, images):
        return images


class Centered(Rows):
    def before(self, images):
        return images - images.mean()


class Running(Rows):
    """The sum over the images before it."""

    def before(self, images):
        return images.cumsum(0)


BRANCHES = {
    "bright": (lambda x: x.mean() > 0.8, "'bright' alone at 64x96"),
    "dark": (lambda x: 0 < x.max() < 0.3, "'dark' alone"),
    "noisy": (lambda x: (x[..., 1:] - x[..., :-1]).abs().mean() > 0.3, "'noise' alone"),
    "example": (lambda x: (x == 0.25).all(), "'example 0' alone"),
}


@pytest.mark.slow
@pytest.mark.parametrize("branch", BRANCHES)
def test_branch_on_the_image_is_found_and_named(branch):
    doubled, where = BRANCHES[branch]
    with pytest.raises(
        SourceError,
        match=rf"differs from PyTorch by [\d.]+ in rows, on the image {where}.*; constant in the export: .*test_parity.py:\d+ `if self",
    ):
        load(Rows(doubled), example=MARKED, layout=LAYOUT)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "batch"), [(3, 3), (4, 7)])
def test_branch_on_the_batch_is_found_and_named(count, batch):
    module = Rows(lambda x: len(x) == count if count < 4 else len(x) > 4)
    with pytest.raises(
        SourceError, match=rf"in a batch of {batch} at 64x96 .*; constant in the export: test_parity.py"
    ):
        load(module, example=MARKED, layout=LAYOUT)


@pytest.mark.slow
@pytest.mark.parametrize("module", [Centered, Running])
def test_images_that_change_each_other_are_refused(module):
    with pytest.raises(
        SourceError, match=r"gives other results in a batch: rows differs by [\d.]+ on the image '\w+' in a batch of 2"
    ):
        load(module(), example=MARKED, layout=LAYOUT)


SIZE_BRANCHES = {
    "high": lambda x: x.shape[2] > 100,
    "wide": lambda x: x.shape[3] > 150,
    "large": lambda x: x.shape[2] > 100 and x.shape[3] > 150,
    "small": lambda x: x.shape[2] < 50,
    "narrow": lambda x: x.shape[2] > x.shape[3],
}


@pytest.mark.slow
@pytest.mark.parametrize("branch", SIZE_BRANCHES)
def test_branch_on_the_size_is_found(branch):
    module = Rows(SIZE_BRANCHES[branch])
    assert "constant in the export" in " ".join(load(module, example=MARKED, layout=LAYOUT).notes)
    with pytest.raises(
        SourceError, match=r"differs from PyTorch by .* at \d+x\d+; .*constant in the export: test_parity.py"
    ):
        load(module, example=MARKED, layout=LAYOUT, dynamic_size=True)


@pytest.mark.slow
def test_module_of_one_size_is_refused_for_a_dynamic_one():
    class Grid(Rows):
        def before(self, images):
            return images + torch.zeros(1, 3, 64, 96)

    assert load(Grid(), example=MARKED, layout=LAYOUT)
    with pytest.raises(SourceError, match=r"Grid: the network does not run at \d+x\d+ .*; leave dynamic_size out"):
        load(Grid(), example=MARKED, layout=LAYOUT, dynamic_size=True)


@pytest.mark.slow
def test_dynamic_size_has_the_stride_that_was_tried():
    fused = fuse(Rows(), example=MARKED, layout=LAYOUT, dynamic_size=True, score_threshold=0.5)
    assert fused.report
    assert (fused.image.stride, fused.image.dynamic_size) == (32, True)


@pytest.mark.slow
def test_warning_of_the_trace_is_a_note_and_not_printed(capfd, recwarn):
    raw = load(Rows(lambda x: x.mean() > 5), example=MARKED, layout=LAYOUT)
    assert "equal to PyTorch at batch 1, 2, 3, 7" in raw.notes[0]
    (note,) = (note for note in raw.notes if "constant in the export" in note)
    assert "test_parity.py:" in note and "if self.doubled(images)" in note and "Python boolean" in note
    assert "/" not in note.replace("`", "").split(":")[1]
    assert capfd.readouterr().out == ""
    assert not [item for item in recwarn if "Tracer" in item.category.__name__]


@pytest.mark.slow
def test_checkpoint_has_no_notes_of_the_trace():
    assert "constant in the export" not in " ".join(load(SHAPES / "shapes.pt", size=64).notes)


def test_kinds_of_images_differ():
    images = unlike_images(40, 56)
    means = {kind: float(image.mean()) for kind, image in images.items()}
    assert means["dark"] < 0.1 < means["patches"] < 0.8 < means["bright"]
    assert all(image.shape == (3, 40, 56) and image.min() >= 0 and image.max() <= 1 for image in images.values())
    np.testing.assert_array_equal(images["noise"], unlike_images(40, 56)["noise"])


NAN = np.full((1, 2), np.nan)


@pytest.mark.parametrize(
    ("got", "expected", "share", "tensor"),
    [
        ([np.ones((1, 2))], [np.ones((1, 2))], 0, 0),
        ([np.ones((1, 2)), np.full((1, 2), 3.0)], [np.ones((1, 2)), np.full((1, 2), 4.0)], 0.25, 1),
        ([np.ones((1, 2))], [np.ones((1, 3))], np.inf, 0),
        ([NAN], [NAN], 0, 0),
        ([NAN], [np.ones((1, 2))], np.inf, 0),
        ([np.ones((1, 2))], [np.full((1, 2), np.inf)], np.inf, 0),
        ([np.zeros((1, 0))], [np.zeros((1, 0))], 0, 0),
        ([np.ones((1, 2), bool)], [np.zeros((1, 2), bool)], 1e9, 0),
    ],
)
def test_largest_difference(got, expected, share, tensor):
    found = largest_difference(got, expected)
    assert found.share == pytest.approx(share)
    assert found.tensor == tensor


def test_order_of_candidates_does_not_count_where_a_top_k_made_it():
    rows = np.random.default_rng(0).random((1, 20, 5))
    turned = rows[:, ::-1]
    assert largest_difference([turned], [rows]).share > 0.1
    assert largest_difference([turned], [rows], [1]).share == 0
    assert largest_difference([turned.transpose(0, 2, 1)], [rows.transpose(0, 2, 1)], [2]).share == 0
    lost = np.concatenate((turned[:, :-1], turned[:, :1]), 1)
    assert largest_difference([lost], [rows], [1]).share > 0.1
