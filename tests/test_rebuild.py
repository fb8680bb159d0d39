"""A network rebuilt from plain data computes what the pickled one does."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from conftest import SHAPES
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fusenms import load
from fusenms.errors import ConfigError, SourceError
from fusenms.limits import Limits
from fusenms.sources.checkpoint import load_checkpoint
from fusenms.sources.torch_modules import layers as modules
from fusenms.sources.torch_modules.cost import _made

LAYERS = [
    nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, (1, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2), groups=4, bias=False),
    nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(8, 8, 1, padding="valid"),
    nn.ConvTranspose2d(8, 8, 2, 2), nn.ConvTranspose2d(8, 8, 3, 2, output_padding=1, groups=2),
    nn.BatchNorm2d(8, eps=0.1), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.MaxPool2d(3, 1, 1, ceil_mode=True),
    nn.Upsample(scale_factor=2.0), nn.Upsample(scale_factor=(1.5, 2.0), mode="bilinear", align_corners=True), nn.ZeroPad2d((1, 0, 2, 3)),
    nn.SiLU(), nn.ReLU(inplace=True), nn.Hardswish(), nn.LeakyReLU(0.3), nn.GELU("tanh"), nn.GELU(), nn.Tanh(), nn.Identity(),
    nn.Dropout(0.5), nn.Sequential(nn.SiLU(), nn.Tanh()), nn.LayerNorm((2,), eps=0.1), nn.Linear(2, 2), nn.Linear(2, 2, bias=False),
]  # fmt: skip


def checkpoint(path, layer: nn.Module | None = None) -> modules.DetectionModel:
    """Save a network with this layer in it; return the network."""
    torch.manual_seed(0)
    head = modules.AnchorFreeDetect(2, (8,), (8,))
    model = modules.DetectionModel([modules.Conv(3, 8, 8, 8, 0), modules.Conv(8, 8), head], [-1, -1, [0]]).eval()
    if layer is not None:
        model.model[1].act = layer.eval()
        head.nc = 2
    torch.save({"model": model}, path)
    return model


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layer_computes_the_same(layer, tmp_path):
    with torch.no_grad():
        for tensor in (*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())):
            tensor.uniform_(0.5, 1.5)
    model = checkpoint(tmp_path / "a.pt", layer)
    images = torch.rand(1, 3, 16, 16)
    rebuilt = load_checkpoint(tmp_path / "a.pt").module
    torch.testing.assert_close(
        rebuilt.model[1](rebuilt.model[0](images)), model.model[1](model.model[0](images)), atol=1e-5, rtol=1e-5
    )


def changed_weight(change):
    def edit(model):
        conv = model.model[0].conv
        conv.weight = nn.Parameter(change(conv.weight.detach()), requires_grad=False)

    return edit


@pytest.mark.parametrize(
    "change",
    [torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.double,
     lambda w: w.contiguous(memory_format=torch.channels_last), lambda w: torch.cat((w, w))[8:],
     lambda w: w.permute(3, 2, 1, 0).clone().permute(3, 2, 1, 0)],
    ids=["float16", "bfloat16", "float64", "channels last", "a part of a storage", "permuted"],
)  # fmt: skip
def test_weight_is_read_however_it_is_stored(change, tmp_path):
    model = checkpoint(tmp_path / "a.pt")
    changed_weight(change)(model)
    torch.save({"model": model}, tmp_path / "a.pt")
    expected = copy.deepcopy(model.model[0]).float()
    expected.fold()
    got = load_checkpoint(tmp_path / "a.pt").module.model[0].conv.weight
    torch.testing.assert_close(got, expected.conv.weight, atol=0, rtol=0)


@pytest.mark.parametrize(
    "fold", [lambda conv: conv.fold(), lambda conv: (conv.fold(), conv.__delattr__("bn"))], ids=["None", "absent"]
)
def test_a_folded_convolution_is_taken_as_it_is(fold, tmp_path):
    model = checkpoint(tmp_path / "a.pt")
    fold(model.model[0])
    torch.save({"model": model}, tmp_path / "a.pt")
    got = load_checkpoint(tmp_path / "a.pt").module.model[0]
    torch.testing.assert_close(got.conv.weight, model.model[0].conv.weight, atol=0, rtol=0)


def test_a_shared_layer_stays_shared(tmp_path):
    model = checkpoint(tmp_path / "a.pt")
    model.model[1].act = model.model[0].act
    torch.save({"model": model}, tmp_path / "a.pt")
    rebuilt = load_checkpoint(tmp_path / "a.pt").module
    assert rebuilt.model[1].act is rebuilt.model[0].act


def test_the_host_programs_own_loading_is_not_disturbed(tmp_path, monkeypatch):
    checkpoint(tmp_path / "a.pt")
    for name in ("add_safe_globals", "clear_safe_globals", "safe_globals", "load"):
        monkeypatch.setattr(torch.serialization, name, None)
    monkeypatch.setattr(torch, "load", None)
    found = []
    threads = [threading.Thread(target=lambda: found.append(load_checkpoint(tmp_path / "a.pt"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4


def test_error_when_the_size_that_is_asked_for_exceeds_the_limit(tmp_path):
    checkpoint(tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="size is 64x4104; expected at most 4096 a side"):
        load(tmp_path / "a.pt", size=(64, 4104))


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"max_modules": 10}, "layers; expected at most 10"),
        ({"max_parameters": 100}, "weights; expected at most 100"),
        ({"max_operations": 5}, "more than 5 operators"),
        ({"max_flops_per_pixel": 5}, "more than 5 operations for each pixel"),
        ({"max_tensor_elements": 300}, "expected"),
        ({"max_channels": 7}, "expected a whole number from 1 to 7"),
        ({"max_repeats": 3}, "expected a whole number from 1 to 3"),
        ({"max_nesting": 1}, "nested deeper than 1"),
        ({"max_opcodes": 50}, "more than 50 instructions"),
        ({"max_pickle_bytes": 50}, "expected at most 50"),
        ({"max_archive_entries": 5}, "expected at most 5"),
        ({"max_file_bytes": 500}, "expected at most 500"),
        ({"max_class_names": 1}, "class"),
        ({"max_name_length": 5}, "characters; expected at most 5"),
    ],
    ids=str,
)
def test_error_when_a_checkpoint_exceeds_a_bound(limit, message, tmp_path):
    checkpoint(tmp_path / "a.pt")
    load_checkpoint(tmp_path / "a.pt")
    with pytest.raises(SourceError, match=message):
        load_checkpoint(tmp_path / "a.pt", limits=Limits(**limit))


POINTWISE = [
    ("silu", F.silu), ("silu in place", partial(F.silu, inplace=True)), ("relu", F.relu), ("leaky relu", F.leaky_relu),
    ("hardswish", F.hardswish), ("gelu", F.gelu), ("sigmoid", torch.sigmoid), ("exp", torch.exp), ("add", lambda x: x + x[:, :1]),
    ("mul", lambda x: x * x[:1, :, :1, :1]), ("sub", lambda x: x - x[:1]), ("rsub", lambda x: 1 - x), ("div", lambda x: x / 2),
    ("cat", lambda x: torch.cat((x, x[:, :2]), 1)),
    ("cat of the last axis", lambda x: torch.cat((x, x[..., :2]), -1)),
    ("batch norm", lambda x: nn.BatchNorm2d(4, device="meta").eval()(x)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "step"), POINTWISE, ids=[name for name, _ in POINTWISE])
def test_shapes_known_for_the_cost_are_those_of_pytorch(name, step):
    class Kept(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            known, made = _made(func, args), func(*args, **(kwargs or {}))
            if known is not None:
                shown.append(func)
                one, other = (value if isinstance(value, tuple) else (value,) for value in (known, made))
                assert [(v.shape, v.dtype, v.device) for v in one][:1] == [(v.shape, v.dtype, v.device) for v in other][
                    :1
                ]
            return made

    shown = []
    with torch.no_grad(), Kept():
        step(torch.empty(2, 4, 6, 8, device="meta"))
    assert len(shown) == 1


def test_unlike_tensors_are_left_to_pytorch():
    alike, other = torch.empty(1, 2, 4, device="meta"), torch.empty(1, 2, 5, device="meta")
    assert _made(torch.ops.aten.cat.default, ([alike, other], 1)) is None
    assert _made(torch.ops.aten.add.Tensor, (alike.long(), alike.long())) is None
    with pytest.raises(RuntimeError):
        _made(torch.ops.aten.add.Tensor, (alike, other))


@pytest.mark.slow
def test_loading_imports_no_compiler():
    """It takes a second."""
    code = f"import sys, fusenms; fusenms.load({str(SHAPES / 'shapes.pt')!r}, size=64); assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
