"""The fuzz targets: what was found once stays mended, and a short run with fixed randomness finds nothing. `make fuzz` runs longer."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT

FUZZ = ROOT / "tests" / "fuzz"
sys.path.insert(0, str(FUZZ))

import run as fuzz_run  # noqa: E402
from targets import corpus, targets  # noqa: E402

TARGETS = targets()
FILES = [(name, path) for name in TARGETS for path in corpus(name)]


@pytest.mark.parametrize(("name", "path"), FILES, ids=lambda value: getattr(value, "name", value))
def test_file_of_the_corpus_is_no_find(name, path):
    TARGETS[name](path.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found_in_a_second(name, tmp_path):
    result = fuzz_run.search(name, 1.0, 1, tmp_path, guided=False)
    assert result["finds"] == []
    assert result["runs"] > 0


def test_every_folder_of_the_corpus_has_a_target_and_files():
    folders = {path.name for path in (FUZZ / "corpus").iterdir()}
    assert folders <= set(TARGETS)
    assert all(corpus(name) for name in folders)


def test_corpus_is_small():
    assert sum(path.stat().st_size for path in (FUZZ / "corpus").rglob("*") if path.is_file()) <= 200_000


def breaks(data: bytes) -> None:
    if b"[" in data:
        raise KeyError("not one of ours")


def test_find_is_written_with_its_kind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("targets.targets", lambda: {"breaks": breaks})
    result = fuzz_run.search("breaks", 0.5, 1, tmp_path, guided=False)
    (kind,) = result["finds"]
    assert kind.startswith("KeyError-test_fuzz_corpus.py-")
    assert b"[" in (tmp_path / f"breaks-{kind}").read_bytes()
    assert "--replay breaks" in capsys.readouterr().out


def test_slow_input_is_a_find(tmp_path, monkeypatch):
    monkeypatch.setattr("targets.targets", lambda: {"slow": lambda data: None})
    monkeypatch.setattr(fuzz_run, "SLOWEST", -1.0)
    assert fuzz_run.search("slow", 0.5, 1, tmp_path, guided=False)["finds"] == ["slow"]


def test_figures_add_up(tmp_path):
    path = tmp_path / "f.json"
    for finds in (["a"], []):
        fuzz_run.record([{"target": "t", "runs": 3, "cpu_seconds": 1.5, "finds": finds}], path)
    assert json.loads(path.read_text()) == {"t": {"runs": 6, "cpu_seconds": 3.0, "finds": 1}}


@pytest.mark.thorough
def test_command_exits_with_1_on_a_find(tmp_path):
    """A crash of the whole process is one too."""
    words = [sys.executable, FUZZ / "run.py", "metadata", "--random", "--seconds", "0.2", "--finds", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "metadata     random" in done.stdout
    assert subprocess.run([*words[:2], "unknown", *words[3:]], capture_output=True).returncode == 1
