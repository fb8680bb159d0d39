"""The examples in the docstrings of public names run, and every public function and class has one."""

from __future__ import annotations

import doctest
import inspect
import shutil
from importlib.util import find_spec

import pytest
from conftest import SHAPES

import fusenms
from fusenms.layout import Layout

VALUES = {
    "Comparison",
    "DatasetRun",
    "Detections",
    "Engine",
    "Evaluation",
    "FusedModel",
    "FusenmsError",
    "Inspection",
    "RawModel",
    "Report",
}
"""What functions return or raise; the examples of those functions show them."""
PUBLIC = {name: getattr(fusenms, name) for name in fusenms.__all__ if name not in VALUES} | {"Layout": Layout}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC)
def test_example_runs(name, tmp_path, monkeypatch):
    examples = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name)
    text = inspect.getdoc(PUBLIC[name]) or ""
    assert ">>>" in text, f"{name} has no example"
    if "build_engine" in text and find_spec("tensorrt_rtx") is None:
        pytest.skip("needs TensorRT-RTX: pip install 'fusenms[rtx]'")
    if "detect_dataset" in text and find_spec("ray") is None:
        pytest.skip("needs Ray: pip install 'fusenms[ray]'")
    shutil.copy(SHAPES / "shapes.pt", tmp_path / "yolov8n.pt")
    shutil.copy(SHAPES / "shapes0.jpg", tmp_path / "bus.jpg")
    monkeypatch.chdir(tmp_path)
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL | doctest.ELLIPSIS)
    for example in examples:
        runner.run(example, out=output.append)
    assert runner.tries > 1
    assert not runner.failures, "".join(output)
