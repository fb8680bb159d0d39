"""The examples run as they are."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, tmp_path, monkeypatch, capsys):
    if "engine" in path.name and find_spec("tensorrt_rtx") is None:
        pytest.skip("needs TensorRT-RTX: pip install 'fusenms[rtx]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out
    assert list(tmp_path.iterdir())


def test_every_example_is_listed():
    listed = (ROOT / "examples" / "README.md").read_text()
    assert all(f"`{path.name}`" in listed for path in EXAMPLES)
    assert listed.count(".py`") == len(EXAMPLES)
