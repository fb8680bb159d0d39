"""Fuzz targets of checkpoints: the bytes decide which part of a sound one is changed, and how."""

from __future__ import annotations

import contextlib
import io
import pickletools
import resource
import struct
import tempfile
import time
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fusenms.errors import FusenmsError
from fusenms.limits import DEFAULT_LIMITS
from fusenms.sources.checkpoint import load_checkpoint
from fusenms.sources.export import network_of
from fusenms.sources.torch_files.unpickle import Global, Record, Storage, globals_of, unpickle
from fusenms.sources.torch_modules import layers as modules

MOST_SECONDS, MOST_MEMORY = 20.0, 2**30
_NUMBERS = (0, 1, -1, 2, 127, 128, 255, 2**31 - 1, -(2**31), 10**9, 2**62)


class Chance:
    """Choices that the bytes of an input make, one after the other; zeros where they end. Like these of `random.Random`."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def randbytes(self, count: int) -> bytes:
        return self._data.read(count).ljust(count, b"\0")

    def randrange(self, stop: int) -> int:
        return int.from_bytes(self.randbytes(2), "little") % stop

    def choice(self, values: Sequence[Any]) -> Any:
        return values[self.randrange(len(values))]


@cache
def _sound() -> tuple[tuple[str, bytes], ...]:
    """The entries of a small checkpoint that loads."""
    torch.manual_seed(0)
    head = modules.AnchorFreeDetect(2, (8,), (8,))
    layers = [
        modules.Conv(3, 8, 8, 8, 0),
        modules.C2f(8, 8),
        modules.SPPF(8, 8),
        modules.Concat(),
        modules.Conv(16, 8),
        head,
    ]
    model = modules.DetectionModel(layers, [-1, -1, -1, [-1, 1], -1, [-1]])
    model.names = {0: "a", 1: "b"}
    model.args = {"imgsz": 64}
    whole = io.BytesIO()
    torch.save({"model": model}, whole)
    with zipfile.ZipFile(whole) as file:
        return tuple((entry.filename, file.read(entry)) for entry in file.infolist())


@cache
def _instructions() -> tuple[tuple[str, bytes], ...]:
    """The pickle of that, cut into its instructions."""
    data = next(content for name, content in _sound() if name.endswith("data.pkl"))
    places = [(opcode.name, position) for opcode, _, position in pickletools.genops(data)]
    ends = [position for _, position in places[1:]] + [len(data)]
    return tuple((name, data[start:end]) for (name, start), end in zip(places, ends, strict=True))


@cache
def _texts() -> tuple[bytes, ...]:
    return tuple(sorted({code for name, code in _instructions() if name in ("BINUNICODE", "GLOBAL")}))


def _changed_pickle(chance: Chance) -> bytes:
    """The pickle with some of its instructions changed in ways that keep it one."""
    parts = [code for _, code in _instructions()]
    names = [name for name, _ in _instructions()]
    for _ in range(chance.choice((1, 1, 1, 2, 4, 12))):
        at = chance.randrange(len(parts))
        kind = chance.randrange(9)
        if kind == 0:
            parts[at] = b""
        elif kind == 1:
            parts[at] += parts[at]
        elif kind == 2:
            parts[at] = parts[chance.randrange(len(parts))]
        elif kind == 3 and names[at] in ("BINUNICODE", "GLOBAL"):
            parts[at] = chance.choice(_texts())
        elif kind == 4:
            parts[at] = b"J" + struct.pack("<i", max(-(2**31), min(2**31 - 1, chance.choice(_NUMBERS))))
        elif kind == 5:
            number = chance.choice(_NUMBERS)
            parts[at] = b"\x8a\x08" + struct.pack("<q", number)
        elif kind == 6:
            parts[at] = chance.choice(
                (b"N", b"\x88", b"\x89", b"]", b"}", b")", b"(", b"0", b"G" + chance.randbytes(8))
            )
        elif kind == 7:
            text = chance.choice(
                ("", "x" * 5000, "a\nb", "\x1b[0m", "0", "forward", "__class__", "parts", "\u202e", "-1")
            )
            parts[at] = b"X" + struct.pack("<I", len(text.encode())) + text.encode()
        else:
            broken = bytearray(parts[at])
            broken[chance.randrange(len(broken) or 1) : 1] = chance.randbytes(1)
            parts[at] = bytes(broken)
    return b"".join(parts)


def _run(path: Path) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with contextlib.suppress(FusenmsError):
        network_of(load_checkpoint(path), path.name)
    seconds = time.process_time() - start
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if seconds > MOST_SECONDS or memory > MOST_MEMORY:
        raise AssertionError(f"took {seconds:.1f} s and {memory} bytes")


def fuzz_checkpoint(data: bytes) -> None:
    """A checkpoint whose pickle, storages or archive is changed loads, or ends in one of our errors."""
    chance = Chance(data)
    entries: list[tuple[str, bytes]] = list(_sound())
    kind = chance.randrange(10)
    method = zipfile.ZIP_STORED
    if kind < 7:
        entries = [
            (name, _changed_pickle(chance) if name.endswith("data.pkl") else content) for name, content in entries
        ]
    elif kind == 7:
        at = chance.randrange(len(entries))
        name, content = entries[at]
        entries[at] = (
            name,
            chance.choice((b"", content[:-1], content * 2, chance.randbytes(len(content)), bytes(len(content)))),
        )
    elif kind == 8:
        method = chance.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
        first = chance.randrange(len(entries))
        entries = (entries[first:] + entries[:first])[: 1 + chance.randrange(len(entries))]
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", method) as file:
        for name, content in entries:
            file.writestr(name, content)
    content = bytearray(whole.getvalue())
    if kind == 9 or chance.randrange(10) == 1:
        for _ in range(chance.choice((1, 2, 8))):
            near_the_end = chance.randrange(10) < 7  # where the directory is
            at = (
                len(content) - 1 - chance.randrange(min(3000, len(content)))
                if near_the_end
                else chance.randrange(len(content))
            )
            content[at] = chance.randrange(256)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt"
        path.write_bytes(content)
        _run(path)


def fuzz_archive(data: bytes) -> None:
    """Any bytes as a checkpoint end in one of our errors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt"
        path.write_bytes(data)
        _run(path)


def fuzz_pickle(data: bytes) -> None:
    """Any bytes as a pickle are plain data, or end in a ValueError; the names are found in any case."""
    names = globals_of(data, DEFAULT_LIMITS)
    try:
        found = unpickle(data, DEFAULT_LIMITS)
    except ValueError:
        return
    _walk(found.tree, set())
    if missing := found.names - names:
        raise AssertionError(f"names that the scan does not find: {missing}")


def _walk(value: Any, seen: set[int]) -> None:
    """See that nothing is there but plain data."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        elif isinstance(value, Record):
            waiting += [value.arguments, value.state]
        elif not isinstance(value, (str, bytes, bytearray, int, float, type(None), Global, Storage)):
            raise AssertionError(f"found a {type(value)} in a pickle")
