"""Checkpoints made to run code, to take the place of code, or to cost too much. Each is refused by a `SourceError`."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import sys
import time
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from common import Attack

import fusenms
from fusenms.errors import SourceError
from fusenms.sources.torch_modules import layers as modules

MARK = "mark"  # what code that runs would write, into the current folder
MOST_SECONDS, MOST_MEMORY = 20.0, 2**30
CODE, REPLACED, BOMB, ARCHIVE, DAMAGE, FILES = (
    "code", "data in the place of code", "cost", "archive", "damage",
    "special files",
)  # fmt: skip


class Call:
    """Pickled as a call of something, with a state for what that gives."""

    def __init__(self, what: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (what, arguments) if state is None else (what, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


def sound() -> dict[str, Any]:
    """A small checkpoint that loads."""
    head = modules.AnchorFreeDetect(2, (8,), (8,))
    model = modules.DetectionModel([modules.Conv(3, 8, 8, 8, 0), modules.SPPF(8, 8), head], [-1, -1, [-1]])
    model.names = {0: "a", 1: "b"}
    return {"model": model}


def edited(edit: Callable[[dict[str, Any], Any], Any]) -> Callable[[Path], None]:
    """A checkpoint after a change of its content and its network."""

    def make(path: Path) -> None:
        content = sound()
        edit(content, content["model"])
        torch.save(content, path)

    return make


def extra(value: Callable[[], Any]) -> Callable[[Path], None]:
    """A sound checkpoint with one more value in it."""
    return edited(lambda content, _: content.update(x=value()))


def in_state(layer: int, **attributes: Any) -> Callable[[Path], None]:
    """A checkpoint with attributes in the state of a layer."""
    return edited(lambda _, model: model.model[layer].__dict__.update(attributes))


def in_convolution(**attributes: Any) -> Callable[[Path], None]:
    """A checkpoint with attributes in the state of its first convolution."""
    return edited(lambda _, model: model.model[0].conv.__dict__.update(attributes))


def named(text: str) -> Callable[[Path], None]:
    """A checkpoint whose first layer has a name of the attacker's."""

    def edit(_: Any, model: Any) -> None:
        children = model.model._modules
        model.model._modules = OrderedDict((text if key == "0" else key, child) for key, child in children.items())

    return edited(edit)


def of_pickle(data: bytes, **entries: bytes) -> Callable[[Path], None]:
    """A checkpoint of a bare pickle."""

    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name, content in ({"data.pkl": data} | entries).items():
                file.writestr(f"a/{name}", content)

    return make


def rewritten(change: Callable[[zipfile.ZipInfo, bytes], bytes | None]) -> Callable[[Path], None]:
    """A sound checkpoint whose entries are changed, and may be deflated; None leaves one out."""

    def make(path: Path) -> None:
        whole = io.BytesIO()
        torch.save(sound(), whole)
        with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as file:
            for entry in source.infolist():
                if (data := change(entry, source.read(entry))) is not None:
                    file.writestr(entry, data)

    return make


def patched(change: Callable[[bytearray], Any]) -> Callable[[Path], None]:
    """A sound checkpoint with some of its bytes changed."""

    def make(path: Path) -> None:
        whole = io.BytesIO()
        torch.save(sound(), whole)
        data = bytearray(whole.getvalue())
        change(data)
        path.write_bytes(data)

    return make


def nested(levels: int, wide: int = 10) -> Any:
    """A tuple that is small in memory and endless to walk."""
    value: Any = "x"
    for _ in range(levels):
        value = (value,) * wide
    return value


def shared(model: Any, levels: int) -> None:
    """Layers of which each has the one before twice."""
    layer: nn.Module = nn.Sequential(nn.SiLU())
    for _ in range(levels):
        outer = nn.Sequential()
        outer._modules = OrderedDict([("0", layer), ("1", layer)])
        layer = outer
    model.model[0]._modules["act"] = layer


def viewed(*arguments: Any) -> Callable[[Path], None]:
    """A checkpoint whose first weight is a view of its storage: size, strides, offset."""

    def edit(_: Any, model: Any) -> None:
        view = torch.zeros(64).as_strided((1,), (1,))
        model.model[0].conv._parameters["weight"] = Call(
            torch._utils._rebuild_tensor_v2,
            _StorageOf(view),
            arguments[2],
            arguments[0],
            arguments[1],
            False,
            OrderedDict(),
        )

    def make(path: Path) -> None:
        content = sound()
        edit(content, content["model"])
        torch.save(content, path)

    return make


def _StorageOf(tensor: torch.Tensor) -> Any:
    return tensor._typed_storage()


def bits_of_entries(value: int, offset_local: int, offset_central: int) -> Callable[[bytearray], None]:
    """Write a 16-bit field of every entry's headers."""

    def change(data: bytearray) -> None:
        for signature, offset in ((b"PK\x03\x04", offset_local), (b"PK\x01\x02", offset_central)):
            at = -1
            while (at := data.find(signature, at + 1)) >= 0:
                data[at + offset : at + offset + 2] = struct.pack("<H", value)

    return change


def overlapping(entries: int) -> Callable[[Path], None]:
    """A directory of which all entries are one deflated member, under different names."""

    def make(path: Path) -> None:
        raw = bytes(2**24)
        data, checksum = zlib.compress(raw, 9)[2:-4], zlib.crc32(raw)
        sizes = (checksum, len(data), len(raw))
        local = struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, 8, 0, 0, *sizes, 10, 0) + b"a/data/000" + data
        central = b"".join(
            struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, 0, 8, 0, 0, *sizes, 10, 0, 0, 0, 0, 0, 0)
            + b"a/data/%03d" % i
            for i in range(entries)
        )
        end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, entries, entries, len(central), len(local), 0)
        path.write_bytes(local + central + end)

    return make


def colliding(path: Path) -> None:
    """A dictionary whose keys all have the same hash: it takes minutes to fill."""
    pairs = b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(10**5))
    of_pickle(b"\x80\x02}(" + pairs + b"u.")(path)


def deflated(path: Path) -> None:
    """A pickle of 80 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", b"]" * (80 * 2**20))


def lying_size(path: Path) -> None:
    """The same, but its entry says 100 bytes."""
    deflated(path)
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.find(signature)
        data[at + offset : at + offset + 4] = struct.pack("<I", 100)
    path.write_bytes(data)


def huge_directory(path: Path) -> None:
    """A directory of 200 MB that the end record asks to be read in one piece."""
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(200 * 2**20)
        file.seek(0, 2)
        file.write(struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, 200 * 2**20 - 4, 4, 0))


def pipe(path: Path) -> None:
    os.mkfifo(path)


def linked(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(2**40)


def loop(_: Any, model: Any) -> None:
    inner = nn.Sequential(nn.SiLU())
    inner._modules["1"] = inner
    model.model[0]._modules["act"] = inner


SHELL = f"echo > {MARK}"
NAMES_OF_CODE = {
    "python source in the name of a layer": f'0")\rgetattr(__import__("os"),"system")("{SHELL}")\rdef g(self):\r    ("',
    "a newline in the name of a layer": "0\nimport os",
    "a dotted name of a layer": "a.b",
    "a name of a layer that is no text of ASCII": "\u0661",
    "an empty name of a layer": "",
}
ATTACKS: tuple[Attack, ...] = (
    *(Attack(CODE, what, named(text)) for what, text in NAMES_OF_CODE.items()),
    Attack(CODE, "a call of os.system", extra(lambda: Call(os.system, SHELL))),
    Attack(CODE, "a call of eval", extra(lambda: Call(eval, f"__import__('os').system({SHELL!r})"))),
    Attack(CODE, "a call of exec as the model", edited(lambda c, _: c.update(model=Call(exec, f"open({MARK!r}, 'w')")))),
    Attack(CODE, "a call of what getattr gives", of_pickle(
        b"\x80\x02c__builtin__\ngetattr\ncos\nsystem\nX\x08\x00\x00\x00__call__\x86RX\x01\x00\x00\x00a\x85R.")),
    Attack(CODE, "a constructor of torch with arguments", extra(lambda: Call(nn.Linear, 30000, 30000))),
    Attack(CODE, "a reduce function of torch that calls", extra(lambda: Call(
        torch._tensor._rebuild_from_type_v2, nn.Identity(), nn.Conv2d, (), {"forward": nn.Identity()}))),
    Attack(CODE, "a call of torch.load", extra(lambda: Call(torch.load, "other.pt"))),
    Attack(CODE, "a codec that is slow", extra(lambda: Call(__import__("_codecs").encode, "x" * 9, "punycode"))),
    Attack(CODE, "a call of a value that is no name", of_pickle(b"\x80\x02X\x01\x00\x00\x00a)R.")),
    Attack(CODE, "an instruction INST", of_pickle(b"(S'" + SHELL.encode() + b"'\nios\nsystem\n.")),
    Attack(CODE, "an instruction OBJ", of_pickle(b"(cos\nsystem\nX\x01\x00\x00\x00ao.")),
    Attack(CODE, "an extension of copyreg", of_pickle(b"\x80\x02\x82\x01.")),
    Attack(CODE, "a name by STACK_GLOBAL", of_pickle(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01a\x85R.")),
    Attack(CODE, "an attribute of an allowed class", of_pickle(b"\x80\x02ctorch.nn.modules.conv\nConv2d.__init__\n)R.")),
    Attack(CODE, "a persistent identifier that is no storage", of_pickle(b"\x80\x02X\x01\x00\x00\x00aQ.")),
    Attack(CODE, "a bare pickle", lambda path: path.write_bytes(pickle.dumps(Call(os.system, SHELL), 2))),
    Attack(CODE, "a TorchScript archive", of_pickle(b"\x80\x02N.", **{"constants.pkl": b"\x80\x02)."})),
    Attack(CODE, "the name of a parameter", edited(lambda _, m: m.model[0].conv._parameters.update({"x\ny": torch.ones(1)}))),
    Attack(CODE, "the name of a buffer", edited(lambda _, m: m.model[0].bn._buffers.update({"import os": torch.ones(1)}))),
    Attack(REPLACED, "forward in the state", in_state(0, forward=nn.SiLU())),
    Attack(REPLACED, "the compiled call of a layer", in_state(0, _compiled_call_impl=nn.SiLU(), **{"_x": 1})),
    Attack(REPLACED, "the list of known parts", in_state(1, parts={"cv1", "cv2", "m", "cv3"})),
    Attack(REPLACED, "the list of known attributes", in_state(1, attributes={})),
    Attack(REPLACED, "the class of a layer", in_state(0, __class__=1)),
    Attack(REPLACED, "an attribute that no version has", in_state(1, flipped=True)),
    Attack(REPLACED, "a property of the head", in_state(2, bin_values=(1.0,))),
    Attack(REPLACED, "hooks", edited(lambda _, m: setattr(m.model[0], "_forward_hooks", OrderedDict({0: nn.SiLU()})))),
    Attack(REPLACED, "a part more", edited(lambda _, m: m.model[1]._modules.update(cv3=nn.Conv2d(3, 3, 1)))),
    Attack(REPLACED, "a part in a layer that has none", edited(lambda _, m: m.model[0].conv._modules.update(a=nn.SiLU()))),
    Attack(REPLACED, "a part of text", edited(lambda _, m: m.model[0]._modules.update(conv="x"))),
    Attack(REPLACED, "an attribute that is a tensor", in_state(1, n=torch.ones(3))),
    Attack(BOMB, "a class name that is endless to print", edited(lambda _, m: setattr(m, "names", {0: nested(9), 1: "b"}))),
    Attack(BOMB, "a key that is endless to hash", edited(lambda c, _: (c.clear(), c.update({"model": {nested(8): 1}})))),
    Attack(BOMB, "layers within each other, each twice", edited(lambda _, m: shared(m, 40))),
    Attack(BOMB, "layers within each other, many", edited(lambda _, m: shared(m, 200))),
    Attack(BOMB, "a layer within itself", edited(loop)),
    Attack(BOMB, "poolings", in_state(1, n=10**9)),
    Attack(BOMB, "negative poolings", in_state(1, n=-1)),
    *(Attack(BOMB, f"{name} {str(value)[:20]} of a convolution", in_convolution(**{name: value}))
      for name, value in (("kernel_size", (10**9, 10**9)), ("padding", (10**9, 10**9)), ("stride", (0, 0)), ("dilation", (10**8, 1)),
                          ("out_channels", 10**9), ("groups", 0), ("groups", 10**9), ("padding_mode", "x" * 10**6))),
    Attack(BOMB, "an enlarging factor", edited(lambda _, m: m.model[0]._modules.update(act=nn.Upsample(scale_factor=1e9)))),
    Attack(BOMB, "enlarging factors one after the other", edited(
        lambda _, m: m.model[0]._modules.update(act=nn.Sequential(*(nn.Upsample(scale_factor=100) for _ in range(8)))))),
    Attack(BOMB, "a weight that is one number, used often", edited(lambda _, m: m.model[0].conv._parameters.update(
        weight=nn.Parameter(torch.zeros(1).as_strided((40000, 40000, 1, 1), (0, 0, 0, 0)), requires_grad=False)))),
    Attack(BOMB, "a weight that overlaps itself", viewed((8, 3, 8, 8), (1, 1, 1, 1), 0)),
    Attack(BOMB, "a weight past its storage", viewed((8, 3, 8, 8), (192, 64, 8, 1), 0)),
    Attack(BOMB, "a weight at a negative offset", viewed((8,), (1,), -8)),
    Attack(BOMB, "a weight of negative size", viewed((-8,), (1,), 0)),
    Attack(BOMB, "a weight of a thousand dimensions", viewed((1,) * 1000, (1,) * 1000, 0)),
    Attack(BOMB, "an input size", edited(lambda _, m: setattr(m, "args", {"imgsz": 10**5}))),
    Attack(BOMB, "class names", edited(lambda _, m: setattr(m, "names", ["a"] * 10**5))),
    Attack(BOMB, "a long class name", edited(lambda _, m: setattr(m, "names", ["a" * 10**6, "b"]))),
    *(Attack(BOMB, f"a class name with {what}", edited(lambda _, m, t=text: setattr(m, "names", [t, "b"])))
      for what, text in (("an escape", "\x1b[31m"), ("a newline", "a\nb"), ("an override of direction", "a\u202eb"), ("C1", "\x9b31m"))),
    Attack(BOMB, "classes", in_state(2, nc=10**7)),
    Attack(BOMB, "inputs of one layer", in_state(1, f=[-1] * 200_000)),
    Attack(BOMB, "an input that no layer gives", in_state(1, f=77)),
    Attack(BOMB, "a stride of a million numbers", in_state(2, stride=torch.ones(10**6))),
    Attack(BOMB, "an integer of many bits", extra(lambda: 1 << 2000)),
    Attack(BOMB, "an integer of a megabyte", of_pickle(b"\x80\x02\x8b" + struct.pack("<i", 2**20) + b"\xff" * 2**20 + b".")),
    Attack(BOMB, "keys that collide", colliding),
    Attack(BOMB, "instructions", of_pickle(b"\x80\x02" + b"]0" * 600_000 + b"N.")),
    Attack(BOMB, "a float as a whole number", in_state(1, n=float("inf"))),
    Attack(ARCHIVE, "a pickle that deflates well", deflated),
    Attack(ARCHIVE, "an entry that inflates past what it says", lying_size),
    Attack(ARCHIVE, "entries that overlap", overlapping(900)),
    Attack(ARCHIVE, "storages that deflate well", rewritten(
        lambda e, d: (setattr(e, "compress_type", zipfile.ZIP_DEFLATED), bytes(2**22) if "/data/" in e.filename else d)[1])),
    Attack(ARCHIVE, "a directory of 200 MB", huge_directory),
    Attack(ARCHIVE, "encrypted entries", patched(bits_of_entries(1, 6, 8))),
    Attack(ARCHIVE, "an unknown method", patched(bits_of_entries(99, 8, 10))),
    Attack(ARCHIVE, "a method that is not for checkpoints (bzip2)", rewritten(lambda e, d: (setattr(e, "compress_type", 12), d)[1])),
    Attack(ARCHIVE, "two pickles", of_pickle(b"\x80\x02N.", **{"../b/data.pkl": b"\x80\x02N."})),
    Attack(ARCHIVE, "no pickle", rewritten(lambda e, d: None if e.filename.endswith("data.pkl") else d)),
    Attack(ARCHIVE, "no storages", rewritten(lambda e, d: None if "/data/" in e.filename else d)),
    Attack(ARCHIVE, "short storages", rewritten(lambda e, d: d[:-2] if "/data/" in e.filename else d)),
    Attack(ARCHIVE, "long storages", rewritten(lambda e, d: d + d if "/data/" in e.filename else d)),
    Attack(ARCHIVE, "big-endian", rewritten(lambda e, d: b"big" if e.filename.endswith("byteorder") else d)),
    Attack(DAMAGE, "cut short", patched(lambda d: d.__delitem__(slice(len(d) // 2, None)))),
    Attack(DAMAGE, "a bit", patched(lambda d: d.__setitem__(len(d) // 2, d[len(d) // 2] ^ 1))),
    Attack(DAMAGE, "an empty pickle", of_pickle(b"")),
    Attack(DAMAGE, "a pickle without an end", of_pickle(b"\x80\x02N")),
    Attack(DAMAGE, "a pickle that takes what it has not given", of_pickle(b"\x80\x02\x85\x85s.")),
    Attack(DAMAGE, "a pickle that leaves two values", of_pickle(b"\x80\x02NN.")),
    Attack(DAMAGE, "a pickle that leaves a mark", of_pickle(b"\x80\x02(.")),
    Attack(FILES, "a pipe", pipe),
    Attack(FILES, "an endless device", linked("/dev/zero")),
    Attack(FILES, "a link to itself", lambda path: path.symlink_to(path)),
    Attack(FILES, "a link to nothing", linked("/nowhere/at/all")),
    Attack(FILES, "a folder", lambda path: path.mkdir()),
    Attack(FILES, "a terabyte of nothing", sparse),
)  # fmt: skip


@pytest.mark.slow
def test_the_checkpoint_loads_without_an_attack(tmp_path):
    edited(lambda *_: None)(tmp_path / "a.pt")
    assert fusenms.load(tmp_path / "a.pt", size=64).class_names == ("a", "b")


@pytest.mark.covering(quick=0)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack.kind}: {attack.name}")
def test_attack_is_refused(attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "attack.pt"
    attack.make(path)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    forward = nn.Conv2d.forward
    with pytest.raises(SourceError):
        fusenms.load(path)
    assert not Path(MARK).exists()
    assert nn.Conv2d.forward is forward
    assert time.process_time() - start < MOST_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY
