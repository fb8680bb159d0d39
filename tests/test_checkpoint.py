"""Checkpoints load without their code: equal to Ultralytics' raw outputs, and nothing that is not weights gets through."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHAPES
from torch import nn

from fusenms.errors import ConfigError, SourceError
from fusenms.layout import Activation, AnchorBoxes, Distances, Layout, Tap
from fusenms.reference import candidates
from fusenms.sources.checkpoint import Checkpoint, load_checkpoint
from fusenms.sources.export import _layout
from fusenms.sources.torch_modules import layers as modules


def decoded(checkpoint: Checkpoint, images: np.ndarray) -> np.ndarray:
    """Every candidate as the reference decodes it, ``[B, 4 + C, N]``: corners, then scores."""
    layout = _layout(checkpoint)
    with torch.no_grad():
        taps = checkpoint.module(torch.from_numpy(images))
    head = {name: tap.numpy() for name, tap in zip(layout.tensors, taps, strict=True)}
    found = [candidates(head, i, layout, images.shape[2:]) for i in range(len(images))]
    return np.stack([np.concatenate((f.boxes, f.scores), 1).T for f in found])


def corners(output: np.ndarray) -> np.ndarray:
    """Ultralytics' raw output ``[B, 4 + C, N]`` with center and size made corners."""
    center, half = output[:, :2], output[:, 2:4] / 2
    return np.concatenate((center - half, center + half, output[:, 4:]), 1)


def assert_equal(got, expected):
    np.testing.assert_allclose(got[:, :4], expected[:, :4], atol=1e-2, rtol=0)
    np.testing.assert_allclose(got[:, 4:], expected[:, 4:], atol=1e-4, rtol=0)


def nchw(images: np.ndarray) -> np.ndarray:
    images = images if images.ndim == 4 else images.transpose(2, 0, 1)[None]
    return images.astype(np.float32) / 255


def test_equals_ultralytics_on_a_photo(zoo):
    golden = np.load(zoo / "golden" / "yolov8n-bus.npz")
    got = decoded(load_checkpoint(zoo / "derived" / "yolov8n.pt"), nchw(golden["letterboxed_rgb_uint8"]))
    assert_equal(got, corners(golden["raw"]))


ONE_HEAD = ["yolov3-tinyu-p", "yolov5u-p", "yolov6-p", "yolov8-p", "yolov9-p", "yolo11-p", "yolo12-p"]
TWO_HEADS = ["yolov10-p", "yolo26-p"]


@pytest.mark.parametrize("name", [*ONE_HEAD, *TWO_HEADS])
def test_equals_ultralytics_with_trained_batch_normalization(zoo, name):
    golden = np.load(zoo / "shapes" / "golden" / f"{name}.npz")
    got = decoded(load_checkpoint(zoo / "shapes" / f"{name}.pt", one_to_many=name in TWO_HEADS), nchw(golden["input"]))
    assert_equal(got, corners(golden["output"]))


@pytest.mark.parametrize("name", TWO_HEADS)
def test_one_to_one_head_equals_ultralytics(zoo, name):
    golden = np.load(zoo / "shapes" / "golden" / f"{name}.npz")
    checkpoint = load_checkpoint(zoo / "shapes" / f"{name}.pt")
    assert not _layout(checkpoint).suppress
    assert_equal(decoded(checkpoint, nchw(golden["input"])), corners(golden["one2one"]))


def test_error_when_there_is_one_head_only(zoo):
    with pytest.raises(ConfigError, match="has only one head"):
        load_checkpoint(zoo / "shapes" / "yolov8-p.pt", one_to_many=True)


def test_equals_the_yolov5_export_on_a_photo(zoo):
    import onnxruntime

    images = nchw(np.load(zoo / "golden" / "yolov8n-bus.npz")["letterboxed_rgb_uint8"])
    raw = onnxruntime.InferenceSession(str(zoo / "derived" / "yolov5n.onnx")).run(None, {"images": images})[0]
    raw = raw.transpose(0, 2, 1)
    expected = corners(np.concatenate((raw[:, :4], raw[:, 4:5] * raw[:, 5:]), 1))
    assert_equal(decoded(load_checkpoint(zoo / "yolov5n.pt"), images), expected)


def test_names_strides_and_size_are_kept(zoo):
    waste = load_checkpoint(zoo / "yolov5n_waste2.pt")
    assert waste.class_names == ("Biodegradable", "Non-biodegradable")
    assert waste.strides == (8, 16, 32)
    shapes = load_checkpoint(zoo / "shapes" / "yolov8-p.pt")
    assert (shapes.size, shapes.task, shapes.class_names) == (256, "detect", ("circle", "square", "triangle"))


@pytest.mark.slow
def test_no_package_of_the_checkpoint_is_imported():
    code = (
        "import sys; from pathlib import Path; from fusenms.sources.checkpoint import load_checkpoint; "
        f"load_checkpoint(Path({str(SHAPES / 'shapes.pt')!r})); "
        "assert not {'ultralytics', 'torchvision', 'models'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def archive(data: bytes, storages: dict[str, int], path: Path) -> Path:
    """A checkpoint file from a bare pickle, its storages made up: zeros, but for what is bins (0 to 15) or strides by its size."""
    known = {32: np.arange(16, dtype=np.float16).tobytes(), 6: np.array([8, 16, 32], np.float16).tobytes()}
    known |= {64: np.arange(16, dtype=np.float32).tobytes(), 12: np.array([8, 16, 32], np.float32).tobytes()}
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3\n")
        for key, size in storages.items():
            file.writestr(f"archive/data/{key}", known.get(size, bytes(size)))
    return path


def storages_of(data: bytes) -> dict[str, int]:
    """Key and size in bytes of every storage that a pickle names."""
    width = {"HalfStorage": 2, "FloatStorage": 4, "LongStorage": 8, "DoubleStorage": 8}
    found: dict[str, int] = {}

    class Names(pickle.Unpickler):
        def find_class(self, module, name):
            if module in ("collections", "__builtin__", "builtins"):
                return super().find_class(module, name)
            return type(name, (), {"__new__": lambda cls, *a, **k: object.__new__(cls), "__init__": lambda *a, **k: None,
                                   "__setstate__": lambda self, state: None, "storage": name})  # fmt: skip

        def persistent_load(self, pid):
            _, kind, key, _, count = pid
            found[str(key)] = count * width[kind.storage]

    Names(io.BytesIO(data)).load()
    return found


def test_flat_class_paths_of_the_first_release_load(zoo, tmp_path):
    data = (zoo / "pickles" / "yolov8n.data.pkl").read_bytes()
    assert b"ultralytics.nn.modules\nC2f" in data
    checkpoint = load_checkpoint(archive(data, storages_of(data), tmp_path / "old.pt"))
    assert len(checkpoint.class_names) == 80
    assert decoded(checkpoint, np.zeros((1, 3, 64, 64), np.float32)).shape == (1, 84, 84)


@pytest.mark.parametrize("name", ["yolo11n", "yolo12n", "yolov10n", "yolo26n"])
def test_trees_of_real_checkpoints_load(zoo, tmp_path, name):
    data = (zoo / "pickles" / f"{name}.data.pkl").read_bytes()
    checkpoint = load_checkpoint(archive(data, storages_of(data), tmp_path / "new.pt"))
    assert checkpoint.class_names[:3] == ("person", "bicycle", "car")
    assert decoded(checkpoint, np.zeros((1, 3, 64, 64), np.float32)).shape == (1, 84, 84)


def test_error_names_what_is_unknown(zoo, tmp_path):
    data = (zoo / "pickles" / "yolo11n.data.pkl").read_bytes()
    renamed = data.replace(b"ultralytics.nn.modules.block\nC2PSA\n", b"ultralytics.nn.modules.block\nC9PSA\n")
    with pytest.raises(
        SourceError, match=r"names code that fusenms does not know: ultralytics\.nn\.modules\.block\.C9PSA"
    ):
        load_checkpoint(archive(renamed, storages_of(data), tmp_path / "new.pt"))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_the_file_runs(tmp_path, zipped, protocol):
    mark, path = tmp_path / "mark", tmp_path / "bomb.pt"
    torch.save({"model": Bomb(mark)}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SourceError, match=r"names code that fusenms does not know: (posix|nt)\.system"):
            load_checkpoint(path)
    assert not mark.exists()
    data = pickle.dumps(Bomb(mark))
    assert any(op.name == "REDUCE" for op, _, _ in pickletools.genops(data))
    pickle.loads(data)
    assert mark.exists(), "the bomb is a dud: this test could not fail"


@pytest.mark.parametrize("protocol", [2, 4])
def test_bare_pickle_is_refused_by_what_it_names(tmp_path, protocol):
    mark, path = tmp_path / "mark", tmp_path / "bomb.pt"
    path.write_bytes(pickle.dumps({"model": Bomb(mark)}, protocol))
    with pytest.raises(SourceError, match=r"names code that fusenms does not know: (posix|nt)\.system"):
        load_checkpoint(path)
    assert not mark.exists()


def test_what_the_host_program_trusts_is_not_trusted_here(tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "bomb.pt"
    torch.save({"model": Bomb(mark)}, path)
    with torch.serialization.safe_globals([os.system]):
        with pytest.raises(SourceError, match=r"posix\.system"):
            load_checkpoint(path)
        assert os.system in torch.serialization.get_safe_globals()
    assert not mark.exists()


class Got:
    """Pickled as what `getattr` gives, as older heads keep a method of theirs."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_getattr_in_a_file_gives_nothing(tmp_path):
    content = tiny()
    content["model"].model[-1].detect = Got(modules.AnchorFreeDetect, "forward")
    torch.save(content, tmp_path / "old.pt")
    assert not hasattr(load_checkpoint(tmp_path / "old.pt").head, "detect")


def test_getattr_cannot_be_a_way_to_call(tmp_path):
    """`getattr(Conv, "__subclasses__")()` by hand: what stands for it is no function, so the file is refused."""
    data = b"\x80\x02c__builtin__\ngetattr\n(cfusenms.sources.torch_modules.layers\nConv\nX\x0e\x00\x00\x00__subclasses__tR)R."
    assert pickle.loads(data), "the pickle is a dud: this test could not fail"
    with pytest.raises(SourceError):
        load_checkpoint(archive(data, {}, tmp_path / "calls.pt"))


def tiny(**changes) -> dict[str, object]:
    """A small sound checkpoint to damage."""
    head = modules.AnchorFreeDetect(2, (8,), (8,))
    model = modules.DetectionModel([modules.Conv(3, 8, 8, 8, 0), head], [-1, [-1]])
    model.names = ["a", "b"]
    for key, value in changes.items():
        setattr(model, key, value)
    return {"model": model}


def test_ema_is_preferred_over_model(tmp_path):
    content = tiny() | {"ema": tiny(names={0: "x", 1: "y"})["model"]}
    torch.save(content, tmp_path / "c.pt")
    assert load_checkpoint(tmp_path / "c.pt").class_names == ("x", "y")


def test_error_when_a_weight_is_nan(tmp_path):
    content = tiny()
    content["model"].model[0].conv.weight.data[0, 0, 0, 0] = float("nan")
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(SourceError, match=r"weights of model\.0\.conv\.weight are not finite"):
        load_checkpoint(tmp_path / "c.pt")


def test_error_when_data_takes_the_place_of_code(tmp_path):
    content = tiny()
    content["model"].model[0].__dict__["forward"] = nn.SiLU()
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(
        SourceError, match=r"layer model\.0 \(Conv\) has an attribute that fusenms does not know: forward"
    ):
        load_checkpoint(tmp_path / "c.pt")


def test_error_when_a_layer_has_hooks(tmp_path):
    content = tiny()
    content["model"].model[0]._forward_hooks = OrderedDict({0: nn.SiLU()})
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(SourceError, match="carries hooks"):
        load_checkpoint(tmp_path / "c.pt")


def test_error_when_a_layer_has_unknown_parts(tmp_path):
    content = tiny()
    content["model"].model[0].extra = nn.SiLU()
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(SourceError, match="parts that fusenms does not know: extra"):
        load_checkpoint(tmp_path / "c.pt")


def test_error_when_the_last_layer_is_no_head(tmp_path):
    torch.save({"model": modules.DetectionModel([modules.Conv(3, 8)], [-1])}, tmp_path / "c.pt")
    with pytest.raises(SourceError, match="its last layer is a Conv, not a detection head"):
        load_checkpoint(tmp_path / "c.pt")


def test_error_when_a_state_dict(tmp_path):
    torch.save(nn.Conv2d(3, 8, 1).state_dict(), tmp_path / "c.pt")
    with pytest.raises(SourceError, match=r"2 entries \(weight, bias\), without a network"):
        load_checkpoint(tmp_path / "c.pt")


def test_error_when_a_classifier(tmp_path):
    data = pickle.dumps({"model": 0}, 2).replace(b"K\x00", b"cultralytics.nn.tasks\nClassificationModel\n)\x81")
    with pytest.raises(SourceError, match="found a classifier"):
        load_checkpoint(archive(data, {}, tmp_path / "c.pt"))


@pytest.mark.parametrize("kind", ["cut short", "text", "onnx", "garbage zip"])
def test_error_when_not_a_checkpoint(tmp_path, kind):
    whole = (SHAPES / "shapes.pt").read_bytes()
    data = {
        "cut short": whole[: len(whole) // 2],
        "text": b"hello",
        "onnx": b"\x08\x08\x12\x07pytorch",
        "garbage zip": b"PK\x03\x04junk",
    }
    (tmp_path / "c.pt").write_bytes(data[kind])
    with pytest.raises(SourceError, match="not a readable PyTorch checkpoint") as error:
        load_checkpoint(tmp_path / "c.pt")
    assert "weights_only" not in str(error.value)


def test_folding_changes_nothing():
    torch.manual_seed(0)
    conv = modules.Conv(3, 8, 3).eval()
    for tensor in (conv.bn.running_mean, conv.bn.running_var, conv.bn.weight.data, conv.bn.bias.data):
        tensor.uniform_(0.5, 2)
    x = torch.rand(2, 3, 9, 9)
    before = conv(x)
    conv.fold()
    assert conv.bn is None
    torch.testing.assert_close(conv(x), before)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_error_when_anchors_are_no_sizes(tmp_path, value):
    head = modules.AnchorDetect()
    head.nc, head.na, head.no, head.stride = 1, 1, 6, torch.tensor([8.0])
    head.m = nn.ModuleList([nn.Conv2d(8, 6, 1)])
    head.register_buffer("anchors", torch.full((1, 1, 2), 2.0))
    model = modules.DetectionModel([modules.Conv(3, 8, 8, 8, 0), head], [-1, [-1]])
    torch.save({"model": model}, tmp_path / "c.pt")
    assert load_checkpoint(tmp_path / "c.pt").strides == (8,)
    head.anchors[0, 0, 0] = value
    torch.save({"model": model}, tmp_path / "c.pt")
    with pytest.raises(SourceError, match=r"anchors|not finite"):
        load_checkpoint(tmp_path / "c.pt")


def test_layouts_say_the_heads(zoo):
    five = _layout(load_checkpoint(zoo / "yolov5n.pt"))
    assert five.decode.anchors[0] == ((10.0, 13.0), (16.0, 30.0), (33.0, 23.0))
    assert isinstance(five.decode, AnchorBoxes)
    eight = _layout(load_checkpoint(SHAPES / "shapes.pt"))
    expected = Layout(
        "yolov8",
        Tap("head_boxes", 1, 0, 64),
        Tap("head_classes", 1, 0, 3),
        None,
        Activation.SIGMOID,
        Distances((8, 16, 32), 16),
    )
    assert eight == expected


def broken(kind: str, content: dict) -> dict:
    """One field of a sound checkpoint changed."""
    model = content["model"]
    head, conv = model.model[-1], model.model[0]
    changes = {
        "ema is a tensor": lambda: content.update(ema=torch.ones(3)),
        "stride 0": lambda: setattr(head, "stride", torch.zeros(1)),
        "stride infinite": lambda: setattr(head, "stride", torch.tensor([float("inf")])),
        "stride negative": lambda: setattr(head, "stride", torch.tensor([-8.0])),
        "stride wrong": lambda: setattr(head, "stride", torch.tensor([16.0])),
        "too many strides": lambda: setattr(head, "stride", torch.tensor([8.0, 16.0])),
        "no children": lambda: conv.__dict__.pop("_modules"),
        "no parameters": lambda: conv.conv.__dict__.pop("_parameters"),
        "a child is text": lambda: conv._modules.update(conv="x"),
        "no classes": lambda: setattr(head, "nc", 0),
        "fewer classes than it gives": lambda: setattr(head, "nc", 1),
        "more classes than it gives": lambda: setattr(head, "nc", 500),
    }
    changes[kind]()
    return content


@pytest.mark.parametrize(
    "kind",
    ["ema is a tensor", "stride 0", "stride infinite", "stride negative", "stride wrong", "too many strides", "no children",
     "no parameters", "a child is text", "no classes", "fewer classes than it gives", "more classes than it gives"],
)  # fmt: skip
def test_error_when_checkpoint_is_inconsistent(tmp_path, kind):
    torch.save(tiny(), tmp_path / "sound.pt")
    assert load_checkpoint(tmp_path / "sound.pt").class_names == ("a", "b")
    torch.save(broken(kind, tiny()), tmp_path / "c.pt")
    with pytest.raises(SourceError, match=r"c\.pt: "):
        load_checkpoint(tmp_path / "c.pt")


def test_error_when_a_bit_has_flipped(tmp_path):
    data = bytearray((SHAPES / "shapes.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "c.pt").write_bytes(data)
    with pytest.raises(SourceError, match=r"not a readable PyTorch checkpoint \(Bad CRC-32 for file"):
        load_checkpoint(tmp_path / "c.pt")


def test_error_says_so_when_the_format_is_old(tmp_path):
    torch.save(tiny(), tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(SourceError, match=r"format from before 1\.6"):
        load_checkpoint(tmp_path / "c.pt")
