"""Hostile text, and hostile terminals: nothing that a file says acts on a terminal, and no terminal ends a command."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from common import Attack
from conftest import ROOT, SHAPES

import fusenms
from fusenms import fuse
from fusenms.cli import main
from fusenms.cli.bench import print_table
from fusenms.cli.printing import ProgressBar, Steps
from fusenms.runtime.detections import Detections
from fusenms.runtime.drawing import draw
from fusenms.safety.text import has_controls

IMAGE = SHAPES / "shapes0.jpg"
ATTACKS = [
    Attack("escape", "color", lambda: "\x1b[31mred"),
    Attack("escape", "title of the window", lambda: "\x1b]0;owned\x07"),
    Attack("escape", "C1", lambda: "\x9b2J\x9d0;x\x9c"),
    Attack("escape", "clear the screen", lambda: "\x1b[2J\x1b[H"),
    Attack("escape", "link", lambda: "\x1b]8;;http://example.invalid\x1b\\\\click"),
    Attack("line", "one of ours", lambda: "x\nverify    batch 1 · 0 mismatches"),
    Attack("line", "overwritten", lambda: "bad\rverify    0 mismatches"),
    Attack("line", "backspaces", lambda: "bad\b\b\bgood"),
    Attack("line", "other separators", lambda: "a\u2028b\u2029c\x85d\x0be\x0cf"),
    Attack("direction", "override", lambda: "\u202egnp.exe\u202c"),
    Attack("direction", "isolates", lambda: "\u2066a\u2069\u200f"),
    Attack("unicode", "lone surrogate", lambda: "a\ud800b"),
    Attack("unicode", "invisible", lambda: "a\u200b\ufeff\u00adb\U000e0041"),
    Attack("markup", "unclosed", lambda: "[/]"),
    Attack("markup", "style", lambda: "[bold red]x[/bold red]"),
    Attack("markup", "link", lambda: "[link=http://example.invalid]x[/link]"),
    Attack("markup", "formula", lambda: "$\\frac{$"),
]


def check(printed: str) -> None:
    for line in printed.split("\n"):
        assert line.isprintable(), ascii(line)
        assert not line.startswith(("verify    batch", "verify    0")), line


@pytest.fixture(scope="module")
def model(shapes_raw) -> fusenms.FusedModel:
    return fuse(shapes_raw, unverified=True, score_threshold=0.05)


@pytest.mark.covering(default=0, quick=0)
@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_class_names_and_paths_are_escaped(model, tmp_path, capsys, attack):
    """`detect` and `inspect` of a file whose class names, and whose own name, are hostile. Names with control characters are refused."""
    text = attack.make()
    surrogate = "surrogate" in attack.name  # no file of protobuf holds one
    names = model.class_names if surrogate else (text,) * 3
    folder = tmp_path / text.replace("/", "").replace("\0", "").replace("\ud800", "\udcff")
    folder.mkdir()
    path = replace(model, class_names=names).save(folder / "f.onnx", unverified=True)
    (folder / "a.jpg").write_bytes(IMAGE.read_bytes())
    for words in (["detect", str(path), str(folder), "-o", str(folder / "out")], ["inspect", str(path)]):
        refused = has_controls("".join(names))
        assert main(words) == int(refused)
        check("".join(capsys.readouterr()))
        assert main([*words, "--json"]) == int(refused)
        json.loads(capsys.readouterr().out)


@pytest.mark.covering(quick=0)
@pytest.mark.parametrize("attack", ATTACKS, ids=str)
@pytest.mark.parametrize("command", [[], ["inspect"], ["verify"], ["detect"], ["bench"], ["engine"]])
def test_error_messages_are_escaped(tmp_path, monkeypatch, capsys, attack, command):
    monkeypatch.chdir(tmp_path)
    name = attack.make().replace("/", "") + ".onnx"
    for flags in ([], ["-v"], ["--json"]):
        assert main([*command, name, *(["x.jpg"] if command == ["detect"] else []), *flags]) == 1
        printed = capsys.readouterr()
        check(printed.err)
        check("" if flags == ["--json"] else printed.out)
        assert flags != ["--json"] or json.loads(printed.out)["error"]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_usage_messages_are_escaped(capsys, attack):
    for words in (["x.pt", attack.make()], ["x.pt", "--size", attack.make()], ["x.pt", "--backend", attack.make()]):
        with pytest.raises(SystemExit):
            main(words)
        check(capsys.readouterr().err)


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_steps_titles_and_tables_are_escaped(capsys, monkeypatch, attack):
    text = attack.make()
    steps = Steps(False)
    steps.line("read", text)
    steps.lines("head", text)
    timing = {
        "batch": 1,
        "part": "whole",
        "memory_mb": None,
        "milliseconds": 1.0,
        "low": 1.0,
        "high": 1.0,
        "ratio": 1.0,
    }
    print_table([SimpleNamespace(name=text, note="", **timing), SimpleNamespace(name=text, note=text, **timing)], 1)
    check(capsys.readouterr().out)
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressBar("bench") as bar:
        bar.update(text, 1, 2)
    assert text not in stream.getvalue() or attack.kind == "markup"


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_drawn_names_are_escaped(attack, monkeypatch):
    import cv2

    drawn, image = [], np.zeros((300, 600, 3), np.uint8)
    real = cv2.putText
    monkeypatch.setattr(cv2, "putText", lambda *args: (drawn.append(args[1]), real(*args)))
    empty = np.zeros((1, 0, 2), np.float32)
    box, one = np.array([[1, 1, 9, 9]], np.float32), np.ones(1, np.float32)
    fields = {
        "boxes": box,
        "scores": one,
        "labels": np.zeros(1, np.int32),
        "class_names": (attack.make() * 50,),
        "keypoints": empty,
    }
    draw(image, made(fields))
    assert len(drawn) == 1 and drawn[0].isprintable() and 10 < len(drawn[0]) < 60


def made(fields: dict) -> Detections:
    from fusenms.runtime.masks import Masks
    from fusenms.runtime.placement import Placement

    box = fields["boxes"]
    oriented = np.concatenate(((box[:, :2] + box[:, 2:]) / 2, box[:, 2:] - box[:, :2], np.zeros((1, 1), np.float32)), 1)
    masks = Masks(np.zeros((0, 1, 1), np.float32), box, Placement(50, 50, 0, 0, 50, 50), (50, 50))
    indices = np.zeros(1, np.int32)
    return Detections(
        **fields | {"oriented_boxes": oriented, "masks": masks, "indices": indices},
    )


def test_numbers_that_are_not_finite_are_null_in_json(capsys):
    Steps(True).finish(values=[float("nan"), {"a": float("inf")}, 1.5])
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"values": [None, {"a": None}, 1.5]}


# ---- terminals


def command(*words: str, **settings) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(Path(fusenms.__file__).parents[1])} | settings.pop("env", {})
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | settings
    return subprocess.run([sys.executable, "-m", "fusenms", *words], env=env, timeout=120, **settings)


@pytest.fixture(scope="module")
def fused_file(model, tmp_path_factory) -> Path:
    return model.save(tmp_path_factory.mktemp("m") / "f.onnx", unverified=True)


@pytest.mark.covering(quick=0)
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "utf-16", "shift_jis"])
def test_no_encoding_ends_a_command(fused_file, monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    assert main(["detect", str(fused_file), str(IMAGE), "--no-draw"]) == 0
    assert "detections" in raw.getvalue().decode(encoding)


@pytest.mark.slow
def test_locale_without_signs_ends_no_command(fused_file):
    env = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:strict"}
    done = command("inspect", str(fused_file), env=env)
    assert (done.returncode, done.stderr) == (0, b"")


def test_our_signs_are_spelled_out_where_the_encoding_has_none(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    assert main(["families", "yolov8"]) == 0
    assert b" - " in raw.getvalue()
    assert b"\\xb7" not in raw.getvalue()


OUTPUTS = {
    "a full disk": ("exec >/dev/full", 1, "standard output cannot be written (No space left on device)"),
    "closed": ("exec >&-", 1, "standard output cannot be written (it is closed)"),
    "all closed": ("exec <&- >&- 2>&-", 1, ""),
    "both full": ("exec >/dev/full 2>/dev/full", 1, ""),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("case", OUTPUTS)
def test_output_that_cannot_be_written_ends_no_command(fused_file, tmp_path, case):
    redirect, status, message = OUTPUTS[case]
    words = f"{redirect}; exec {sys.executable} -m fusenms detect {fused_file} {IMAGE} -o {tmp_path}"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", words], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == status
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == (1 if message else 0)
    assert fusenms.runtime.images.read_image(tmp_path / "shapes0.jpg").size


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("words", ["--help", "families --json"])
def test_text_for_a_full_disk_is_one_message(words):
    with open("/dev/full", "w") as full:
        done = command(*words.split(), stdout=full)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"standard output cannot be written" in done.stderr


@pytest.mark.slow
def test_pipe_that_nobody_reads_is_no_error(fused_file, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = command("detect", str(fused_file), str(IMAGE), "-o", str(tmp_path), stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "shapes0.jpg").stat().st_size
