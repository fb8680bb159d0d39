"""Fuzz targets of ONNX files: data says how a sound file is changed, field by field and byte by byte; then it goes down the whole line.

A target raises where anything but a result or a `FusenmsError` comes out. Run by itself, this is a random loop:
``python tests/fuzz/onnx_targets.py SECONDS [SEED]``.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_onnx import fused_bytes, third_party

import fusenms
from fusenms.errors import FusenmsError
from fusenms.limits import Limits

LIMITS = Limits(max_run_seconds=2.0, max_tensor_elements=20_000_000, max_run_operations=20_000_000_000)
MOST_SECONDS = 20.0
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    4,
    5,
    7,
    8,
    16,
    64,
    127,
    255,
    1000,
    2**31 - 1,
    -(2**31),
    2**31,
    2**32,
    2**62,
    2**63 - 1,
    -(2**63),
)
FLOATS = (0.0, 1.0, -1.0, float("nan"), float("inf"), 3.4e38, 1e-45)
TEXTS = (
    "",
    "a",
    "images",
    "output0",
    "head",
    "scores",
    "\x1b[0m",
    "a\0b",
    "é",
    "x" * 5000,
    "[" * 2000,
    "{}",
    "null",
    "NaN",
    "-1",
    "1e999",
    "{0: 'a'}",
)
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)


class Choices:
    """Decisions out of data, all 0 after its end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def below(self, count: int) -> int:
        taken, self.at = self.data[self.at : self.at + 2], self.at + 2
        return int.from_bytes(taken, "little") % max(count, 1)

    def one_of(self, values: Any) -> Any:
        return values[self.below(len(values))]

    @property
    def left(self) -> bool:
        return self.at < len(self.data)


def messages(message: Any) -> list[Any]:
    """All messages within a message."""
    found = [message]
    for one in found:
        for field, value in one.ListFields():
            if field.message_type is not None:
                found += [value] if hasattr(value, "ListFields") else list(value)
    return found


def scalar(field: Any, choices: Choices, old: Any) -> Any:
    """Another value of a field's type."""
    if field.enum_type is not None:
        return choices.one_of([value.number for value in field.enum_type.values])
    if field.type == field.TYPE_STRING:
        return choices.one_of(TEXTS)
    if field.type == field.TYPE_BYTES:
        data = bytearray(old or b"")
        if data and choices.below(3):
            data[choices.below(len(data))] = choices.below(256)
            return bytes(data)
        return bytes(data[: choices.below(len(data) + 1)])
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return choices.one_of(FLOATS)
    number = choices.one_of(NUMBERS)
    if field.type == field.TYPE_INT32:
        return max(-(2**31), min(number, 2**31 - 1))
    return abs(number) if field.type == field.TYPE_UINT64 else number


def mutate(model: onnx.ModelProto, choices: Choices, donors: list[Any]) -> None:
    """Change one field of one message."""
    message = choices.one_of(messages(model))
    fields = [field for field, _ in message.ListFields()] if choices.below(4) else list(message.DESCRIPTOR.fields)
    if not fields:
        return
    field = choices.one_of(fields)
    value = getattr(message, field.name)
    if hasattr(value, "ListFields") or not (hasattr(value, "append") or hasattr(value, "add")):
        if choices.below(4) == 0:
            message.ClearField(field.name)
        elif field.message_type is None:
            setattr(message, field.name, scalar(field, choices, value))
        else:
            same = [donor for donor in donors if donor.DESCRIPTOR is field.message_type]
            value.CopyFrom(choices.one_of(same)) if same else value.SetInParent()
        return
    place, action = choices.below(len(value)), choices.below(5)
    if action == 0 and len(value):
        del value[place]
    elif action == 1 and len(value):
        value.append(
            value[place]
            if field.message_type is None
            else type(value[place]).FromString(value[place].SerializeToString())
        )
    elif action == 2 and len(value) > 1:
        other = choices.below(len(value))
        if field.message_type is None:
            value[place], value[other] = value[other], value[place]
        else:
            value[place].ParseFromString(value[other].SerializeToString())
    elif field.message_type is None:
        new = scalar(field, choices, value[place] if len(value) else None)
        if len(value):
            value[place] = new
        else:
            value.append(new)
    else:
        same = [donor for donor in donors if donor.DESCRIPTOR is field.message_type]
        if same:
            value.append(choices.one_of(same))
        else:
            value.add()


def changed(sound: onnx.ModelProto, data: bytes) -> bytes:
    """The file after what the data says."""
    choices = Choices(data)
    kind, count = choices.below(4), 1 + choices.below(4)
    donors = messages(
        type(sound).FromString(sound.SerializeToString())
    )  # parts of another message, which no change reaches
    for _ in range(count if kind else 0):
        if choices.left:
            mutate(sound, choices, donors)
    encoded = bytearray(sound.SerializeToString())
    for _ in range(count if kind in (0, 1) else 0):
        if not choices.left or not encoded:
            break
        place = (choices.below(2**16) << 16 | choices.below(2**16)) % len(encoded)
        if choices.below(2):  # most of a file is weights: what stands before and after them is the rest
            place = min(place % 4000, len(encoded) - 1) if choices.below(2) else max(len(encoded) - 1 - place % 6000, 0)
        action = choices.below(6)
        if action == 0:
            del encoded[place:]
        elif action == 1:
            del encoded[place : place + 1 + choices.below(8)]
        elif action == 2:
            encoded[place:place] = encoded[place : place + 1 + choices.below(64)]
        else:
            encoded[place] = choices.below(256)
    return bytes(encoded)


def run(encoded: bytes, fused: bool) -> str:
    """Send a file down the line; what came of it.

    Raises:
        Exception: what is none of ours. AssertionError: it took too long.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        Path(path).write_bytes(encoded)
        try:
            if fused:
                with fusenms.Detector(path, limits=LIMITS) as detect:
                    detect([IMAGE, IMAGE])
            else:
                fusenms.fuse(path, unverified=True, limits=LIMITS)
            outcome = "sound"
        except FusenmsError as error:
            outcome = type(error).__name__
    assert time.monotonic() - start < MOST_SECONDS, "took too long"
    return outcome


def fuzz_onnx(data: bytes) -> None:
    """A third-party file: load, recognize, open the batch, fuse."""
    run(changed(third_party(batch=1 + len(data) % 2 if len(data) % 3 == 0 else "batch"), data), fused=False)


def fuzz_fused(data: bytes) -> None:
    """A fused file: open, and call with two images."""
    backend = "portable" if len(data) % 4 == 0 else "ort"
    run(changed(onnx.ModelProto.FromString(fused_bytes(backend)), data), fused=True)


def main(seconds: float, seed: int) -> int:
    """Random data for so long; the file of a find is written beside."""
    rng, until = random.Random(seed), time.process_time() + seconds
    counts = {"fuzz_onnx": 0, "fuzz_fused": 0}
    finds = 0
    last = Path(tempfile.gettempdir()) / f"fuzz-last-{seed}"
    while time.process_time() < until:
        target = rng.choice((fuzz_onnx, fuzz_fused))
        data = rng.randbytes(rng.randrange(4, 64))
        last.write_text(f"{target.__name__} {data.hex()}")  # for a crash of the whole process
        counts[target.__name__] += 1
        try:
            target(data)
        except Exception as error:
            finds += 1
            print(f"{target.__name__} {data.hex()} {type(error).__name__}: {str(error)[:200]}", flush=True)
    print(f"{counts} {finds} finds", flush=True)
    return 1 if finds else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
