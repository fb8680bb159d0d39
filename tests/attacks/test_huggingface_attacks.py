"""Hugging Face directories that ask for code, for other places, or for too much. Each ends in one of our errors."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from common import Attack

from fusenms.errors import FusenmsError

transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'fusenms[hf]')")
transformers.logging.set_verbosity_error()
from fusenms.sources.huggingface import load_directory  # noqa: E402  # which needs PyTorch

CODE, PLACES, NUMBERS, SETTINGS, WEIGHTS, FILES = (
    "code of the directory", "other places", "sizes without bound", "settings of other types", "damaged weights", "special files",
)  # fmt: skip
MOST_SECONDS = 30.0
BACKBONE = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "layer_type": "basic"}
MARK = "mark"
Edit = Callable[[Path], Any]


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> Path:
    """A tiny DETR as transformers saves it, with the settings of its images."""
    path = tmp_path_factory.mktemp("sound")
    made = transformers.DetrConfig(
        backbone_config=transformers.ResNetConfig(**BACKBONE, out_features=["stage4"]),
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=5,
        id2label={0: "cat", 1: "dog"},
    )
    transformers.AutoModelForObjectDetection.from_config(made).save_pretrained(path)
    settings = {"do_normalize": False, "size": {"height": 64, "width": 64}}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


def config(**values: Any) -> Edit:
    """Entries of config.json; dots of a key are double underscores."""

    def edit(path: Path) -> None:
        file = path / "config.json"
        settings = json.loads(file.read_text())
        for name, value in values.items():
            inner, *rest = (settings, *name.split("__"))
            for key in rest[:-1]:
                inner = inner[key]
            inner[rest[-1]] = value
        file.write_text(json.dumps(settings))

    return edit


def preprocessor(**values: Any) -> Edit:
    return lambda path: (path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False} | values))


def text(name: str, content: str) -> Edit:
    return lambda path: (path / name).write_text(content)


def data(name: str, make: Callable[[bytes], bytes]) -> Edit:
    return lambda path: (path / name).write_bytes(make((path / name).read_bytes()))


def special(name: str, make: Callable[[Path], Any]) -> Edit:
    def edit(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        make(path / name)

    return edit


def header(change: Callable[[dict[str, Any]], Any]) -> Edit:
    """The header of the weights after a change."""

    def made(content: bytes) -> bytes:
        size = struct.unpack("<Q", content[:8])[0]
        entries = json.loads(content[8 : 8 + size])
        change(entries)
        encoded = json.dumps(entries).encode()
        return struct.pack("<Q", len(encoded)) + encoded + content[8 + size :]

    return data("model.safetensors", made)


def tensors(entries: dict[str, Any]) -> list[str]:
    return [name for name in entries if name != "__metadata__"]


class Runs:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self) -> Any:
        return open, (MARK, "w")


def pickled(path: Path) -> None:
    """A pickle in place of safetensors."""
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))


def pickled_beside(path: Path) -> None:
    for name in ("pytorch_model.bin", "adapter_model.bin", "model.pth"):
        (path / name).write_bytes(pickle.dumps(Runs()))
    (path / "model.safetensors").write_bytes(b"")


def own_code(path: Path) -> None:
    (path / "modeling.py").write_text(f"open({MARK!r}, 'w')\nclass Model: pass\nclass Config: pass\n")
    config(auto_map={"AutoConfig": "modeling.Config", "AutoModelForObjectDetection": "modeling.Model"})(path)


def adapter(path: Path) -> None:
    (path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "somebody/else"})
    )
    (path / "model.safetensors").write_bytes(b"")


def index(places: Any) -> Edit:
    def edit(path: Path) -> None:
        (path / "model.safetensors").rename(path / "part.safetensors")
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return edit


def hole(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def nan(content: bytes) -> bytes:
    return content[: len(content) // 2] + b"\xff" * (len(content) - len(content) // 2)


TABLE: dict[str, dict[str, Edit]] = {
    CODE: {
        "auto_map": own_code,
        "auto_map of another repository": config(auto_map={"AutoConfig": "somebody/else--modeling.Config"}),
        "auto_map within the backbone": config(
            backbone_config__auto_map={"AutoConfig": "somebody/else--modeling.Config"}
        ),
        "trust_remote_code": config(trust_remote_code=True),
        "quantization of a package": config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "a pickle for weights": pickled,
        "pickles beside broken weights": pickled_beside,
        "an adapter": adapter,
        "another type of model": config(model_type="auto"),
        "a type that is a path": config(model_type="../../somebody"),
        "a type that is a list": config(model_type=["detr"]),
    },
    PLACES: {
        "a backbone of the hub": config(backbone_config=None, backbone="somebody/backbone", use_timm_backbone=False),
        "a backbone of the hub, through timm": config(
            backbone_config=None, backbone="hf-hub:somebody/backbone", use_timm_backbone=True
        ),
        "a backbone of a folder, through timm": config(
            backbone_config=None, backbone="local-dir:/tmp", use_timm_backbone=True
        ),
        "a checkpoint for the backbone": config(
            backbone_config=None,
            backbone="resnet18",
            use_timm_backbone=True,
            backbone_kwargs={"checkpoint_path": "x.pth"},
        ),
        "a name that is a path": config(backbone_config__backbone="/etc"),
        "an index of a file above": index({"a": "../secret.safetensors"}),
        "an index of an absolute path": index({"a": "/etc/passwd"}),
        "an index of a list": index(["part.safetensors"]),
        "an index of numbers": index({"a": 5}),
    },
    NUMBERS: {
        **{
            f"{name} is {value}": config(**{name: value})
            for name in (
                "d_model",
                "encoder_layers",
                "decoder_layers",
                "num_queries",
                "encoder_ffn_dim",
                "encoder_attention_heads",
                "num_channels",
            )
            for value in (10**30, 10**9, 50_000, 0, -1)
        },
        "depths of a million": config(backbone_config__depths=[10**6] * 4),
        "a thousand stages": config(backbone_config__depths=[1000] * 1000),
        "hidden sizes of 60,000": config(backbone_config__hidden_sizes=[60_000] * 4),
        "a million classes": lambda path: config(id2label={str(i): "a" for i in range(10**6)})(path),
        "10^9 classes by number": config(num_labels=10**9, id2label=None),
        "images of 10^9": preprocessor(size={"height": 10**9, "width": 10**9}),
        "images of 100,000": preprocessor(size={"height": 100_000, "width": 64}),
        "images of 0": preprocessor(size={"height": 0, "width": 64}),
        "the shortest edge 10^9": preprocessor(size={"shortest_edge": 10**9}),
    },
    SETTINGS: {
        "no JSON": text("config.json", "{"),
        "nothing": text("config.json", ""),
        "a list": text("config.json", "[]"),
        "no UTF-8": lambda path: (path / "config.json").write_bytes(b"\xff\xfe{}"),
        "100,000 brackets deep": text("config.json", "[" * 100_000),
        "100,000 objects deep": text("config.json", '{"a":' * 100_000 + "1" + "}" * 100_000),
        "a number of ten thousand digits": text(
            "config.json", '{"model_type": "detr", "d_model": ' + "9" * 10_000 + "}"
        ),
        "NaN": text("config.json", '{"model_type": "detr", "d_model": NaN}'),
        "9 MB": text("config.json", '{"model_type": "detr", "a": "' + "a" * 9 * 2**20 + '"}'),
        "d_model is a text": config(d_model="x"),
        "d_model is a list": config(d_model=[1]),
        "d_model is an object": config(d_model={}),
        "d_model is a half": config(d_model=16.5),
        "d_model is no multiple of the heads": config(d_model=17),
        "dropout 5": config(dropout=5.0),
        "an unknown activation": config(activation_function="os.system"),
        "an activation that is a number": config(activation_function=5),
        "an unknown backbone": config(backbone_config={"model_type": "nobody"}),
        "a backbone that is a text": config(backbone_config="resnet"),
        "a backbone that is a detector": config(backbone_config={"model_type": "detr"}),
        "a backbone without a type": config(backbone_config={}),
        "classes that are a list": config(id2label=["a", "b"]),
        "classes that are a text": config(id2label="ab"),
        "classes with keys that are texts": config(id2label={"a": "b"}),
        "class names that are objects": config(id2label={"0": {}, "1": [[]]}),
        "a class name with an escape sequence": config(id2label={"0": "\x1b[2J", "1": "b"}),
        "a class name of a million characters": config(id2label={"0": "a" * 10**6, "1": "b"}),
        "three classes": config(id2label={"0": "a", "1": "b", "2": "c"}),
        "image_size of texts": config(image_size=["a", "b"]),
        "a type of an unknown name": config(dtype="float7"),
        "a type that is an attribute of torch": config(dtype="save"),
        "preprocessor: a list": text("preprocessor_config.json", "[]"),
        "preprocessor: deep": text("preprocessor_config.json", "[" * 100_000),
        "preprocessor: factor 0": preprocessor(rescale_factor=0),
        "preprocessor: factor 1e308": preprocessor(rescale_factor=1e308),
        "preprocessor: factor a text": preprocessor(rescale_factor="a"),
        "preprocessor: mean of two": preprocessor(do_normalize=True, image_mean=[0, 0], image_std=[1, 1]),
        "preprocessor: mean of texts": preprocessor(do_normalize=True, image_mean=["a"] * 3, image_std=[1, 1, 1]),
        "preprocessor: std 0": preprocessor(do_normalize=True, image_mean=[0, 0, 0], image_std=[0, 0, 0]),
        "preprocessor: size of texts": preprocessor(size={"height": "a", "width": []}),
        "preprocessor: size of a list": preprocessor(size=[1, 2, 3]),
    },
    WEIGHTS: {
        "nothing": data("model.safetensors", lambda _: b""),
        "4 bytes": data("model.safetensors", lambda content: content[:4]),
        "cut in half": data("model.safetensors", lambda content: content[: len(content) // 2]),
        "a header of 2^63 bytes": data("model.safetensors", lambda content: struct.pack("<Q", 2**63) + content[8:]),
        "a header of 100 MB": data("model.safetensors", lambda content: struct.pack("<Q", 10**8) + content[8:]),
        "a header that is no JSON": data("model.safetensors", lambda content: content[:8] + b"x" + content[9:]),
        "a header 100,000 deep": data("model.safetensors", lambda _: struct.pack("<Q", 100_000) + b"[" * 100_000),
        "NaN": data("model.safetensors", nan),
        "tensors that overlap": header(
            lambda h: h[tensors(h)[1]].update(data_offsets=h[tensors(h)[0]]["data_offsets"])
        ),
        "a tensor behind the end": header(lambda h: h[tensors(h)[0]].update(data_offsets=[2**40, 2**40 + 4])),
        "a tensor whose end is before its start": header(lambda h: h[tensors(h)[0]].update(data_offsets=[8, 4])),
        "sizes that lie": header(lambda h: h[tensors(h)[0]].update(shape=[10**9, 10**9])),
        "negative sizes": header(lambda h: h[tensors(h)[0]].update(shape=[-1])),
        "an unknown type": header(lambda h: h[tensors(h)[0]].update(dtype="F7")),
        "another type": header(lambda h: h[tensors(h)[0]].update(dtype="I32")),
        "another shape": header(
            lambda h: [entry.update(shape=entry["shape"][::-1]) for name, entry in h.items() if name != "__metadata__"]
        ),
        "a tensor less": header(lambda h: h.pop(tensors(h)[-1])),
        "other names": header(lambda h: [h.__setitem__(f"x{name}", h.pop(name)) for name in tensors(h)]),
        "no tensors": data("model.safetensors", lambda _: struct.pack("<Q", 2) + b"{}"),
    },
    FILES: {
        "the settings are a FIFO": special("config.json", os.mkfifo),
        "the settings are a device": special("config.json", lambda path: path.symlink_to("/dev/zero")),
        "the settings are a directory": special("config.json", Path.mkdir),
        "the settings are a link to nothing": special("config.json", lambda path: path.symlink_to("gone")),
        "the settings are a link to itself": special("config.json", lambda path: path.symlink_to(path.name)),
        "the preprocessor is a FIFO": special("preprocessor_config.json", os.mkfifo),
        "the weights are a FIFO": special("model.safetensors", os.mkfifo),
        "the weights are a device": special("model.safetensors", lambda path: path.symlink_to("/dev/zero")),
        "the weights are a directory": special("model.safetensors", Path.mkdir),
        "the weights are a sparse file of 1 TB": special("model.safetensors", hole),
        "other weights are a FIFO": lambda path: os.mkfifo(path / "more.safetensors"),
        "an index is a FIFO": lambda path: (index({})(path), special("model.safetensors.index.json", os.mkfifo)(path)),
    },
}
ATTACKS = tuple(Attack(kind, name, edit) for kind, attacks in TABLE.items() for name, edit in attacks.items())
SOUND = {
    "auto_map", "auto_map of another repository", "auto_map within the backbone", "trust_remote_code",
    "a name that is a path", "dropout 5", "class names that are objects", "another type", "encoder_layers is 0", "encoder_layers is -1",
    "decoder_layers is 0", "decoder_layers is -1", "num_channels is 50000", "num_channels is 0", "num_channels is -1",
}  # fmt: skip
"""Attacks after which the directory may still be a detector: what it says in vain is left aside."""


@pytest.mark.covering(quick=0)
@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_directory_ends_in_one_of_our_errors_when_it_is(attack, sound, tmp_path, monkeypatch):
    path = tmp_path / "model"
    shutil.copytree(sound, path)
    attack.make(path)
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *args, **_: asked.append(args) or (_ for _ in ()).throw(OSError("no network"))
    )
    start, failed = time.process_time(), None
    try:
        load_directory(path)
    except FusenmsError as error:
        failed = error
    assert time.process_time() - start < MOST_SECONDS
    assert failed is not None or attack.name in SOUND
    assert not asked and not (tmp_path / MARK).exists()
    assert failed is None or len(str(failed)) < 20_000


def test_sound_directory_loads(sound):
    assert load_directory(sound).class_names == ("cat", "dog")
