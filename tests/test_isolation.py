"""Reading in a child process gives the same, and what takes too much is stopped."""

from __future__ import annotations

import sys

import pytest
from conftest import SHAPES

import fusenms
from fusenms.cli import main
from fusenms.errors import ConfigError, SourceError
from fusenms.limits import Limits
from fusenms.safety.isolation import run_isolated

pytestmark = pytest.mark.slow


def program(folder, monkeypatch, text):
    """A module of Python in a folder that child processes find."""
    (folder / "a_program.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return "a_program"


def test_a_checkpoint_is_the_same():
    here, there = (fusenms.load(SHAPES / "shapes.pt", size=64, isolate=isolate) for isolate in (False, True))
    assert there.model.SerializeToString() == here.model.SerializeToString()
    assert (there.layout, there.image, there.class_names, there.notes) == (
        here.layout,
        here.image,
        here.class_names,
        here.notes,
    )


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["missing.pt", "text.pt"])
def test_an_error_is_the_same(tmp_path, name):
    (tmp_path / "text.pt").write_text("hello")
    messages = []
    for isolate in (False, True):
        with pytest.raises(SourceError) as error:
            fusenms.load(tmp_path / name, isolate=isolate)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.thorough
def test_a_setting_that_does_not_fit_is_the_same_error():
    with pytest.raises(ConfigError, match="multiples of the stride"):
        fusenms.load(SHAPES / "shapes.pt", size=65, isolate=True)


@pytest.mark.skipif(sys.platform != "linux", reason="memory for data is limited on Linux only")
@pytest.mark.parametrize("most", [60, 900])
def test_error_when_memory_runs_out(tmp_path, monkeypatch, most):
    name = program(tmp_path, monkeypatch, "data = bytearray(2**30)")
    assert run_isolated(name, [], Limits(max_isolated_bytes=2000 * 2**20), what="a.pt") == 0
    assert run_isolated(name, [], Limits(max_isolated_bytes=most * 2**20), what="a.pt") == 1


def test_error_when_time_runs_out(tmp_path, monkeypatch):
    name = program(tmp_path, monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(SourceError, match=r"a\.pt: the child process took more than 1 s"):
        run_isolated(name, [], Limits(max_isolated_seconds=1), what="a.pt")


def test_error_when_the_child_is_ended(tmp_path, monkeypatch):
    name = program(tmp_path, monkeypatch, "import os; os.abort()")
    with pytest.raises(SourceError, match="ended by signal 6"):
        run_isolated(name, [], Limits(), what="a.pt")


def test_the_command_runs_isolated(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", str(SHAPES / "shapes.pt"), "--isolate", "--limit", "max_modules=30"]) == 1
    assert "expected at most 30" in capfd.readouterr().err


@pytest.mark.covering(default=0)
@pytest.mark.parametrize("words", [["inspect"], ["verify"]])
def test_a_fused_file_is_read_within_the_memory_of_an_isolated_command(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    fusenms.fuse(SHAPES / "shapes.pt", size=64, unverified=True).save("a.ort.onnx", unverified=True)
    assert main([*words, "a.ort.onnx", "--isolate"]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="memory for data is limited on Linux only")
def test_reading_takes_the_memory_of_the_file_not_of_the_limit(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"abc")
    text = f"from pathlib import Path; from fusenms.safety.files import read_regular; read_regular(Path({str(tmp_path / 'a')!r}), 2**32)"
    name = program(tmp_path, monkeypatch, text)
    assert run_isolated(name, [], Limits(max_isolated_bytes=1000 * 2**20), what="a") == 0
