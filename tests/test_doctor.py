"""The doctor: each trap of the gallery at its line, nothing in what is healthy, and the command line."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import doctor_gallery
import pytest
import torch
from doctor_gallery import GALLERY, HEALTHY
from raw_heads import LAYOUTS

import fusenms
from fusenms import doctor, load
from fusenms.cli import main
from fusenms.diagnosis import KINDS
from fusenms.diagnosis.targets import examine_target
from fusenms.errors import ConfigError, SourceError

FILE = str(Path(doctor_gallery.__file__))
EXAMPLE = torch.zeros(1, 3, 64, 64)


def marked(kind):
    """The lines of a class of the gallery that are marked, with the kind of finding."""
    lines, start = inspect.getsourcelines(kind)
    return [(start + i, mark[1]) for i, line in enumerate(lines) if (mark := re.search(r"# <- ([\w-]+)", line))]


def made(kind):
    module = kind()
    return module if kind.__name__ == "DropoutLeftOn" else module.eval()


@pytest.mark.parametrize("kind", GALLERY)
def test_trap_is_named_at_its_line(kind):
    found = doctor(made(kind), EXAMPLE)
    assert [(finding.line, finding.kind) for finding in found.findings] == marked(kind), found
    assert all(finding.file == FILE and finding.message and finding.remedy for finding in found.findings)


def test_gallery_has_traps_of_nearly_every_kind():
    named = {kind for trap in GALLERY for _, kind in marked(trap)}
    assert set(KINDS) - named == {"dynamic-dimension", "index"}  # what only an exporter's fault shows
    assert len(GALLERY) >= 24


@pytest.mark.parametrize("kind", HEALTHY)
def test_healthy_module_has_no_finding(kind):
    found = doctor(kind().eval(), EXAMPLE)
    assert found, found
    assert found.dynamic == {"batch": "equal", "size": "equal"}


def test_weights_are_not_changed():
    module = doctor_gallery.BatchStatistics()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    doctor(module, EXAMPLE)
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_exporters_say_nothing(capfd):
    """A failing export of PyTorch prints its whole graph."""
    doctor(doctor_gallery.NoOperator().eval(), EXAMPLE)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_main_line_says_nothing_of_the_exporters_either(capfd):
    class Head(torch.nn.Module):
        def forward(self, x):
            y = torch.nn.functional.avg_pool2d(x, 32).flatten(2)
            return torch.cat([y, y, torch.linalg.svdvals(y)[..., None].expand_as(y)], 1)

    layout = LAYOUTS["decoded"](5)
    layout = fusenms.layout.Layout("own", layout.boxes, layout.classes, None, layout.activation, layout.decode)
    with pytest.raises(fusenms.FusenmsError):
        load(Head(), example=EXAMPLE, layout=layout)
    assert capfd.readouterr().out == ""


def test_command_line_prints_findings_as_json(capsys):
    assert main(["doctor", f"{FILE}:ValueByItem", "--input", "1x3x64x64", "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert set(finding) == {"kind", "file", "line", "message", "remedy"}
    assert (finding["line"], finding["kind"]) == marked(doctor_gallery.ValueByItem)[0]
    assert main(["doctor", f"{FILE}:evaluated", "--input", "64x64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []


def test_command_line_prints_place_and_remedy(capsys):
    assert main(["doctor", f"{FILE}:SizeAsInt", "--input", "1x3x64x64"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"baked-constant doctor_gallery.py:\d+  cells = int\(y.shape\[2\] \* y.shape\[3\]\)", said)
    assert "do: keep sizes as PyTorch gives them" in said


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("missing.py:Net", SourceError, "no such file; expected FILE.py:NAME"),
        (FILE, ConfigError, "expected FILE.py:NAME"),
        (f"{FILE}:Nothing", ConfigError, "gives a NoneType; expected a function or class that gives an nn.Module"),
        (f"{FILE}:FILE", ConfigError, "expected a function or class"),
        ("missing.pt", SourceError, "missing.pt"),
    ],
)
def test_error_when_there_is_nothing_to_examine(target, error, message):
    with pytest.raises(error, match=message):
        examine_target(target)


@pytest.mark.parametrize(
    ("module", "example", "message"),
    [
        (None, EXAMPLE, "module is a NoneType; expected an nn.Module"),
        (torch.nn.Identity(), None, "example is NoneType; expected a tensor"),
        (torch.nn.Identity(), torch.zeros(1, 1, 64, 64), r"example is \[1, 1, 64, 64\]; expected a tensor"),
    ],
)
def test_error_when_an_argument_is_none(module, example, message):
    with pytest.raises(ConfigError, match=message):
        doctor(module, example)


def test_error_when_the_module_does_not_run():
    with pytest.raises(SourceError, match=r"does not run on \[2, 3, 64, 64\], at doctor_gallery.py:\d+ \(RuntimeError"):
        doctor(doctor_gallery.LengthOfBatch().eval().double(), EXAMPLE)


@pytest.mark.parametrize(
    ("text", "batch", "kinds"),
    [
        ("y = Relu (images)", "equal", []),
        ("m = ReduceMean <axes = [0], keepdims = 1> (images)  y = Sub (images, m)", "differs by", ["batch-mixing"]),
        (
            "s = Constant <value = int64[4] {1, 3, 64, 64}> ()  y = Reshape (images, s)",
            "does not run on",
            ["dynamic-dimension"],
        ),
    ],
)
def test_file_is_run_at_other_batches(tmp_path, text, batch, kinds):
    import onnx

    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[b, 3, 64, 64] images) => (float[b, 3, 64, 64] y) {{ {text} }}'
    )
    onnx.save(model, tmp_path / "m.onnx")
    found = examine_target(str(tmp_path / "m.onnx"))
    assert [finding.kind for finding in found.findings] == kinds
    assert found.dynamic["batch"].startswith(batch)
    assert found.dynamic["size"] == "fixed at 64x64"


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", ["yolov8-p.pt", "yolo11-p-seg.pt", "yolov10-p.pt", "yolo26-p-pose.pt", "rtdetr-p.pt", "yolov9-p.pt"]
)
def test_checkpoints_of_the_zoo_are_healthy(zoo, name):
    found = examine_target(str(zoo / "shapes" / name), (160, 160))
    assert found, found
