"""The README is true: its commands run, its Python runs, its flags exist."""

from __future__ import annotations

import re
import shlex
import shutil
from importlib.util import find_spec

import pytest
from conftest import ROOT, SHAPES, write_segmenter

from fusenms.cli import build_parser, main

README = (ROOT / "README.md").read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that the README names: small ones of ours under those names."""
    shutil.copy(SHAPES / "shapes.pt", tmp_path / "yolov8n.pt")
    write_segmenter(tmp_path / "yolov8n-seg.pt")
    shutil.copy(SHAPES / "shapes0.jpg", tmp_path / "bus.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", README, re.S)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


@pytest.mark.slow
def test_commands_run_in_order(folder, capsys):
    assert len(commands()) >= 7
    for command in commands():
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "fusenms"], command
        if words[3] == "engine" and find_spec("tensorrt_rtx") is None:
            continue  # where TensorRT-RTX does not install
        assert main(words[3:]) == 0, command


@pytest.mark.slow
def test_python_runs(folder, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "0 mismatches" in capsys.readouterr().out


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`make ([a-z]+)`", README + (ROOT / "CONTRIBUTING.md").read_text()))
    assert named
    assert named <= targets


def test_flags_exist():
    subparsers = next(a for a in build_parser()._actions if a.dest == "command")
    known = {
        flag for parser in subparsers.choices.values() for action in parser._actions for flag in action.option_strings
    }
    named = set(re.findall(r"(--[a-z][a-z-]+)", README))
    assert named
    assert named <= known


def test_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README + (ROOT / "CONTRIBUTING.md").read_text()):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_version_is_in_the_changelog_or_unreleased():
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()
