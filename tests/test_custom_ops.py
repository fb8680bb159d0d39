"""Libraries of custom operators: given by the user to each command and to `Detector`, and never by a file."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from third_party import SIZE, PpYoloe, YoloNas, write

import fusenms
from fusenms import contract
from fusenms.cli import main
from fusenms.errors import ConfigError, InputError, SourceError, UnsupportedOperatorError
from fusenms.fusion.backends import BACKENDS
from fusenms.graph.custom_ops import current_libraries
from fusenms.graph.editing import Op
from fusenms.layout import Activation, BoxFormat, Decoded, Layout, Tap

pytestmark = pytest.mark.slow
LAYOUT = Layout("own", Tap("boxes", 2, 0, 4), Tap("scores", 2, 0, 3), None, Activation.NONE, Decoded(BoxFormat.XYXY))
EXAMPLE = torch.zeros(1, 3, SIZE, SIZE)
SETTINGS = {"example": EXAMPLE, "layout": LAYOUT, "score_threshold": 0.01}
SCALE = "com.example::Scale"


@torch.library.custom_op("custom_ops_tests::scale", mutates_args=())
def scale(x: torch.Tensor, k: float) -> torch.Tensor:
    return x * k


class Scaled(YoloNas):
    """A detector with an operator of a library before its head."""

    def forward(self, images):
        return super().forward(scale(images, 1.5))


@pytest.fixture(autouse=True)
def registered():
    fusenms.register_operator("custom_ops_tests::scale", SCALE)
    yield
    fusenms.register_operator("custom_ops_tests::scale", None)


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    """A library with ``com.example::Scale``."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler, to build a library of custom operators")
    path = tmp_path_factory.mktemp("library") / "libscale.so"
    source = Path(__file__).parent / "custom_ops.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-O1", "-o", path, source], check=True)
    return path


@pytest.fixture(scope="session")
def files(library, tmp_path_factory) -> Path:
    """A folder with a fused file, a raw one, and an image."""
    folder = tmp_path_factory.mktemp("files")
    fusenms.register_operator("custom_ops_tests::scale", SCALE)
    with fusenms.custom_ops(library):
        raw = fusenms.load(Scaled(), example=EXAMPLE, layout=LAYOUT)
        fusenms.fuse(raw, score_threshold=0.01).save(folder / "fused.onnx")
    onnx.save(raw.model, folder / "raw.onnx")
    image = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), np.uint8)
    cv2.imwrite(str(folder / "image.png"), image)
    (folder / "layout.json").write_text(json.dumps(LAYOUT.to_dict()))
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_detector_with_a_custom_operator_is_fused_and_verified(library, backend):
    with fusenms.custom_ops(library):
        fused = fusenms.fuse(Scaled(), backend=backend, **SETTINGS)
    assert fused.report, fused.report
    assert "equal to PyTorch" in fused.notes[0]
    (node,) = (node for node in fused.model.graph.node if node.domain == "com.example")
    assert (node.op_type, node.attribute[0].name, node.attribute[0].f) == ("Scale", "k", 1.5)


def test_wrong_operator_is_found_by_the_comparison_with_pytorch(library):
    """The library's Scale multiplies by k; PyTorch's operator here adds it too."""
    fusenms.register_operator("custom_ops_tests::scale", lambda op, x, k: op(SCALE, x, k=k + 0.01))
    with fusenms.custom_ops(library), pytest.raises(SourceError, match="differs from PyTorch"):
        fusenms.fuse(Scaled(), **SETTINGS)


def test_detector_takes_a_library(files, library):
    with pytest.raises(
        UnsupportedOperatorError,
        match=r"ONNX Runtime has no operator com.example::Scale \(node '.*'\); give its library",
    ):
        fusenms.Detector(files / "fused.onnx")
    with fusenms.Detector(files / "fused.onnx", custom_ops=[library]) as detect:
        (found,) = detect([files / "image.png"])
        (again,) = pickle.loads(pickle.dumps(detect))([files / "image.png"])
    assert len(found) > 3
    assert np.array_equal(found.boxes, again.boxes)
    assert current_libraries() == ()


COMMANDS = [
    ["verify", "fused.onnx", "--batch", "1"],
    ["detect", "fused.onnx", "image.png", "--no-draw"],
    ["bench", "fused.onnx", "--runs", "1", "--batch", "1", "--no-memory"],
    ["doctor", "raw.onnx"],
    ["raw.onnx", "--layout", "layout.json", "-o", "written.onnx"],
    ["restamp", "fused.onnx", "--like", "fused.onnx", "-o", "stamped.onnx"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_command_takes_a_library(files, library, words, capsys, monkeypatch):
    monkeypatch.chdir(files)
    assert main(words) == 1
    assert "has no operator com.example::Scale" in (said := capsys.readouterr().err)
    assert "give its library: --custom-ops LIB" in said
    assert main([*words, "--custom-ops", str(library)]) == 0
    assert current_libraries() == ()


def test_memory_is_measured_with_a_library(files, library):
    from fusenms.benchmark import peak_memory

    assert peak_memory(files / "fused.onnx", "whole", 1) is None
    with fusenms.custom_ops(library):
        assert peak_memory(files / "fused.onnx", "whole", 1) is not None or not Path("/proc/self/clear_refs").exists()


def test_child_process_takes_a_library(files, library, capfd):
    words = ["verify", str(files / "fused.onnx"), "--batch", "1", "--isolate"]
    assert main(words) == 1
    assert main([*words, "--custom-ops", str(library)]) == 0
    assert "0 mismatches" in capfd.readouterr().out


def test_isolated_reading_takes_a_library(library, tmp_path):
    """The values of its second input are computed while it is read."""
    write(PpYoloe(), tmp_path / "raw.onnx")
    inserted = {"images": Op(SCALE, attributes={"k": 1.0})}
    fusenms.edit(tmp_path / "raw.onnx", tmp_path / "scaled.onnx", insert=inserted)
    with pytest.raises(SourceError, match=SCALE):
        fusenms.load(tmp_path / "scaled.onnx", isolate=True)
    with fusenms.custom_ops(library):
        assert fusenms.load(tmp_path / "scaled.onnx", isolate=True).notes


def test_no_file_opens_a_library(files, library, tmp_path, monkeypatch):
    """Metadata, domains and names that are paths of a library mean nothing."""
    opened = tmp_path / "opened"
    monkeypatch.setenv("FUSENMS_OPENED", str(opened))
    model = onnx.load(files / "fused.onnx")
    for key in ("custom_ops", "fusenms.custom_ops", "ort_custom_ops", "session.custom_ops", "library"):
        model.metadata_props.add(key=key, value=str(library))
    for entry in model.metadata_props:
        if entry.key == contract.KEY_NOTES:
            entry.value = json.dumps([f"custom_ops={library}"])
    for node in model.graph.node:
        if node.domain == "com.example":
            node.domain = str(library)
    next(entry for entry in model.opset_import if entry.domain == "com.example").domain = str(library)
    onnx.save(model, tmp_path / "hostile.onnx")
    monkeypatch.chdir(library.parent)
    for run in (fusenms.Detector, fusenms.verify):
        with pytest.raises(SourceError, match=r"has no operator|refuses the model"):
            run(tmp_path / "hostile.onnx")
    fusenms.inspect(tmp_path / "hostile.onnx")
    assert not opened.exists()
    with fusenms.custom_ops(library):
        assert opened.exists()  # the trap works


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.so", "no such file; expected a shared library"),
        ("text.so", "ONNX Runtime cannot use it"),
        (".", "no such file"),
    ],
)
def test_error_when_a_library_cannot_be_used(tmp_path, monkeypatch, name, message, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.so").write_text("no library")
    with pytest.raises(ConfigError, match=message), fusenms.custom_ops(name):
        pass
    assert main(["verify", "any.onnx", "--custom-ops", name]) == 1
    assert message.partition(";")[0] in capsys.readouterr().err


def test_error_when_libraries_are_no_list(files):
    with pytest.raises(InputError, match="expected a list of paths"):
        fusenms.Detector(files / "fused.onnx", custom_ops="libscale.so")
    with pytest.raises(ConfigError, match="custom_ops has a int"), fusenms.custom_ops(3):
        pass


def test_error_when_half_precision_meets_an_operator_of_another_domain(library):
    with (
        fusenms.custom_ops(library),
        pytest.raises(ConfigError, match=r"operators of other domains .com.example::Scale.*leave precision fp16 out"),
    ):
        fusenms.fuse(Scaled(), precision="fp16", **SETTINGS)


def test_operators_of_onnxruntime_extensions():
    """A real library: its NegPos gives the negative part and the positive part."""
    extensions = pytest.importorskip("onnxruntime_extensions")

    class Rectified(YoloNas):
        def forward(self, images):
            return super().forward(Rectify.apply(images - 0.3) + 0.3)

    class Rectify(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.from_numpy(np.maximum(x.detach().numpy(), 0))

    fusenms.register_operator(Rectify, lambda op, x: op("ai.onnx.contrib::NegPos", x, outputs=2)[1])
    try:
        with fusenms.custom_ops(extensions.get_library_path()):
            fused = fusenms.fuse(Rectified(), **SETTINGS)
        with pytest.raises(UnsupportedOperatorError, match=r"ai\.onnx\.contrib::NegPos"):
            fusenms.verify(fused)
    finally:
        fusenms.register_operator(Rectify, None)
    assert fused.report, fused.report
