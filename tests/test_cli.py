"""The command line as a user meets it: what it prints, what it writes, and one clear message for every bad input."""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_onnx
import torch
from conftest import SHAPES
from test_checkpoint import Bomb, archive, tiny

import fusenms
from fusenms import fuse
from fusenms.cli import main

pytestmark = pytest.mark.usefixtures("shared_exports")

WEIGHTS = str(SHAPES / "shapes.pt")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def fused_file(tmp_path_factory) -> Path:
    return fuse(WEIGHTS, size=128).save(tmp_path_factory.mktemp("f") / "shapes.ort.onnx")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> Path:
    return fuse(WEIGHTS, size=64).save(tmp_path_factory.mktemp("f") / "small.ort.onnx")


def test_main_job_says_each_step_and_writes(tmp_path, capsys):
    assert main([WEIGHTS, "--size", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        *("load", "export", "head", "head", "head", "fuse", "settings", "verify", "wrote"),
        *("next", "next"),
    ]
    assert "no code executed" in lines[0]
    assert lines[2].split(maxsplit=1)[1].startswith("geometry assumed: ")
    assert lines[3].split(maxsplit=1)[1] == "pixels assumed for yolov8: RGB from 0 to 1"
    assert "shown on images: " in lines[4]
    assert "IoU > 0.45 suppressed" in lines[6]
    assert "0 mismatches" in lines[7]
    assert [path.name for path in tmp_path.iterdir()] == ["shapes.ort.onnx"]
    onnx.checker.check_model(onnx.load("shapes.ort.onnx"))


def test_metadata_explains_the_file():
    main([WEIGHTS, "--size", "64", "--backend", "trt", "-o", "t.onnx", "--score-threshold", "0.3"])
    stored = {item.key: item.value for item in onnx.load("t.onnx").metadata_props}
    assert stored["names"] == "{0: 'circle', 1: 'square', 2: 'triangle'}"
    assert (stored["task"], stored["stride"], stored["imgsz"]) == ("detect", "32", "[64, 64]")
    assert (stored["fusenms.backend"], stored["fusenms.decode"], stored["fusenms.source"]) == (
        "trt",
        "late",
        "shapes.pt",
    )
    assert json.loads(stored["fusenms.config"])["score_threshold"] == 0.3
    assert "0 mismatches" in stored["fusenms.verification"]


def test_json_is_one_object(capsys):
    assert main([WEIGHTS, "--size", "64", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["verification"]["equal"] is True
    assert (values["family"], values["output"]) == ("yolov8", "shapes.ort.onnx")


@pytest.mark.slow
def test_every_setting_reaches_the_file(capsys):
    flags = "--score-threshold 0.1 --iou-threshold 0.6 --max-detections 50 --max-candidates 500 --class-agnostic --multi-label"
    flags += " --backend portable --rounds 9 --indices --runtime-thresholds"
    assert (
        main([WEIGHTS, "--size", "96x64", *flags.split(), "--output-preset", "yolov7", "--opset", "18", "-o", "x.onnx"])
        == 0
    )
    capsys.readouterr()
    assert main(["inspect", "x.onnx", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["config"] == {
        "score_threshold": 0.1, "iou_threshold": 0.6, "max_detections": 50, "max_candidates": 500,
        "class_agnostic": True, "multi_label": True, "rounds": 9, "masks": "coefficients", "indices": True, "output_preset": "yolov7",
        "runtime_thresholds": True,
    }  # fmt: skip
    assert values["inputs"][0] == "images float32[batch, 3, 96, 64]"
    assert values["inputs"][1:3] == ["score_threshold float32[score_threshold_length]", "iou_threshold float32[1]"]
    assert values["outputs"][0] == "num_dets int32[batch, 1]"
    assert values["outputs"][4:] == ["converged int32[batch, 1]", "indices int32[batch, 50]"]


@pytest.mark.slow
def test_images_are_verified_on(capsys):
    found = []
    for flags in ([], ["--images", str(SHAPES)]):
        assert main([WEIGHTS, "--size", "128", *flags, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["verification"]["detections"])
    assert found[1] != found[0]


def test_unverified_is_said_and_stamped(capsys):
    assert main([WEIGHTS, "--size", "64", "--unverified"]) == 0
    assert "UNVERIFIED" in capsys.readouterr().out
    assert main(["inspect", "shapes.ort.onnx"]) == 0
    assert "verified  unverified" in capsys.readouterr().out


@pytest.mark.slow
def test_verify_repeats_the_proof(fused_file, capsys):
    assert main(["verify", str(fused_file), "--batch", "1", "3"]) == 0
    assert capsys.readouterr().out.startswith("verify    batch 1, 3 · ")


@pytest.mark.slow
def test_verify_fails_on_a_changed_file(fused_file, capsys):
    model = onnx.load(fused_file)
    node = next(n for n in model.graph.node if n.op_type == "NonMaxSuppression")
    limit = next(i for i in model.graph.initializer if i.name == node.input[3])
    limit.CopyFrom(onnx.numpy_helper.from_array(np.array([0.9], np.float32), limit.name))
    onnx.save(model, "changed.onnx")
    assert main(["verify", "changed.onnx"]) == 1
    assert "expected" in capsys.readouterr().out


@pytest.mark.slow
def test_detect_prints_and_draws(fused_file, capsys):
    assert main(["detect", str(fused_file), str(SHAPES), "-o", "out"]) == 0
    printed = capsys.readouterr().out
    assert "shapes0.jpg (640x480)" in printed
    assert "circle" in printed
    assert sorted(os.listdir("out")) == ["shapes0.jpg", "shapes1.jpg"]


@pytest.mark.slow
def test_detect_json_has_boxes_in_pixels_of_the_image(fused_file, capsys):
    assert main(["detect", str(fused_file), str(SHAPES / "shapes0.jpg"), "--json", "--no-draw"]) == 0
    (image,) = json.loads(capsys.readouterr().out)["images"]
    assert (image["width"], image["height"]) == (640, 480)
    assert max(row["box"][2] for row in image["detections"]) > 256


@pytest.mark.slow
def test_detect_does_not_overwrite_its_input(fused_file, tmp_path):
    (tmp_path / "a.jpg").write_bytes((SHAPES / "shapes0.jpg").read_bytes())
    assert main(["detect", str(fused_file), "a.jpg", "-o", "."]) == 1


@pytest.mark.slow
def test_inspect_checkpoint(capsys):
    assert main(["inspect", WEIGHTS]) == 0
    printed = capsys.readouterr().out
    assert "yolov8 · 3 classes · scores: sigmoid · boxes: distances" in printed
    assert "circle, square, triangle" in printed


def test_inspect_says_what_is_dynamic_and_writes_labels(tmp_path, capsys):
    (tmp_path / "m.onnx").write_bytes(tiny_onnx.fused_bytes())
    assert main(["inspect", str(tmp_path / "m.onnx"), "--labels", str(tmp_path / "labels.txt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "dynamic   images: batch" in lines and "classes   3: class 0, class 1, class 2" in lines
    assert (tmp_path / "labels.txt").read_text() == "class 0\nclass 1\nclass 2\n"
    assert main(["inspect", str(tmp_path / "m.onnx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dynamic"] == {"images": ["batch"]}
    assert main(["inspect", str(tmp_path / "m.onnx"), "--labels", str(tmp_path / "m.onnx")]) == 1
    assert "is the input file" in capsys.readouterr().err
    model = tiny_onnx.third_party()
    del model.metadata_props[:]
    (tmp_path / "bare.onnx").write_bytes(model.SerializeToString())
    assert main(["inspect", str(tmp_path / "bare.onnx"), "--labels", str(tmp_path / "none.txt")]) == 1
    assert "has no class names" in capsys.readouterr().err and not (tmp_path / "none.txt").exists()


def test_inspect_says_why_no_head_fits(tmp_path, capsys):
    from third_party_exports import write

    write(torch.nn.AvgPool2d(2), tmp_path / "m.onnx")
    assert main(["inspect", "m.onnx"]) == 0
    printed = capsys.readouterr().out
    assert "head      none:" in printed
    assert "yolov5: expected" in printed


@pytest.mark.slow
def test_demo_runs_the_whole_line(capsys):
    assert main(["demo", "-o", "demo"]) == 0
    assert sorted(os.listdir("demo")) == ["shapes.ort.onnx", "shapes0.jpg", "shapes1.jpg"]
    assert "0 mismatches" in capsys.readouterr().out


def bad_files(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Name to (arguments, what the message must say)."""
    raw = (SHAPES / "shapes.pt").read_bytes()
    (folder / "empty.pt").touch()
    (folder / "cut.pt").write_bytes(raw[:50_000])
    (folder / "text.pt").write_text("hello")
    (folder / "text.onnx").write_text("hello")
    (folder / "empty.onnx").touch()
    (folder / "model.h5").write_text("x")
    (folder / "folder").mkdir()
    (folder / "own.pt").write_bytes(raw)
    (folder / "link.onnx").symlink_to(folder / "own.pt")
    (folder / "image.jpg").write_text("no image")
    nan = tiny()
    nan["model"].model[0].conv.weight.data.fill_(float("nan"))
    torch.save(nan, folder / "nan.pt")
    torch.save({"model": Bomb(folder / "mark")}, folder / "bomb.pt")
    classifier = pickle.dumps({"model": 0}, 2).replace(b"K\x00", b"cultralytics.nn.tasks\nClassificationModel\n)\x81")
    archive(classifier, {}, folder / "classifier.pt")
    fuse(WEIGHTS, size=64).save(folder / "fused.onnx")
    return {
        "missing": (["nowhere.pt"], "nowhere.pt: no such file"),
        "directory": (["folder"], "folder: has no config.json; expected a directory of a Hugging Face detector"),
        "zero bytes": (["empty.pt"], "is empty (0 bytes)"),
        "zero bytes onnx": (["empty.onnx"], "is empty (0 bytes)"),
        "cut short": (["cut.pt"], "not a readable PyTorch checkpoint"),
        "text": (["text.pt"], "not a readable PyTorch checkpoint"),
        "text onnx": (["text.onnx"], "not a readable ONNX file"),
        "unknown kind": (["model.h5"], "unknown kind of file (.h5)"),
        "classifier": (["classifier.pt"], "found a classifier"),
        "code": (["bomb.pt"], "names code that fusenms does not know: posix.system"),
        "nan": (["nan.pt"], "are not finite"),
        "fused": (["fused.onnx"], "is a fused model already"),
        "score threshold": (
            [WEIGHTS, "--score-threshold", "1.5"],
            "--score-threshold is 1.5; expected a number from 0 to 1",
        ),
        "iou threshold": ([WEIGHTS, "--iou-threshold", "-1"], "--iou-threshold is -1.0"),
        "max detections": ([WEIGHTS, "--max-detections", "0"], "--max-detections is 0"),
        "size": ([WEIGHTS, "--size", "100"], "expected multiples of the stride 32"),
        "no folder": ([WEIGHTS, "-o", "no/where.onnx"], "the folder no does not exist"),
        "output is a directory": ([WEIGHTS, "-o", "folder"], "is a directory; expected a file to write"),
        "no images": ([WEIGHTS, "--images", "folder"], "has no images"),
        "bad image": (["detect", "fused.onnx", "image.jpg"], "image.jpg: not a readable image"),
        "missing image": (["detect", "fused.onnx", "gone.jpg"], "gone.jpg: cannot be read"),
        "raw weights to detect": (["detect", "text.onnx", "image.jpg"], "not a readable ONNX file"),
        "inspect missing": (["inspect", "nowhere.onnx"], "nowhere.onnx: no such file"),
        "verify missing": (["verify", "nowhere.onnx"], "nowhere.onnx: cannot be read"),
        "verify a checkpoint": (["verify", WEIGHTS], "is a checkpoint; expected an .onnx file: make one with"),
        "detect into a file": (
            ["detect", "fused.onnx", str(SHAPES / "shapes0.jpg"), "-o", "text.pt"],
            "the folder cannot be made",
        ),
        "long name": ([WEIGHTS, "-o", "x" * 300 + ".onnx"], "cannot be written (File name too long)"),
        "a device": ([WEIGHTS, "-o", os.devnull], "is not a regular file"),
        "onto the weights": (["own.pt", "-o", "own.pt"], "is the input file"),
        "onto a link to the weights": (["own.pt", "-o", "link.onnx"], "is the input file"),
    }


@pytest.mark.slow
def test_bad_input_gets_one_message_and_loses_nothing(tmp_path, capsys):
    cases = bad_files(tmp_path)
    (tmp_path / "shapes.ort.onnx").write_text("as it was")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    wrong = []
    for name, (arguments, message) in cases.items():
        code = main(arguments)
        printed = capsys.readouterr()
        if (
            code != 1
            or message not in printed.err
            or "Traceback" in printed.err
            or not printed.err.startswith("fusenms: ")
        ):
            wrong.append(f"{name}: exit {code}: {printed.err}")
    assert not wrong, "\n".join(wrong)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert not (tmp_path / "mark").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_error_when_folder_is_read_only(tmp_path, capsys):
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert main([WEIGHTS, "-o", "locked/x.onnx"]) == 1
    assert "no permission" in capsys.readouterr().err


def test_existing_output_is_left_when_writing_fails(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "shapes.ort.onnx").write_text("as it was")
    monkeypatch.setattr(os, "replace", full)
    assert main([WEIGHTS, "--size", "64"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("shapes.ort.onnx", "as it was")]


@pytest.mark.parametrize(
    "arguments", [[], ["--backend", "x", WEIGHTS], [WEIGHTS, "--size", "big"], ["detect"], [WEIGHTS, "--nonsense"]]
)
def test_usage_error_is_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_error_as_json(capsys):
    assert main(["nowhere.pt", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "SourceError"


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "fusenms", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fusenms ")


def test_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "target.onnx").write_text("old")
    (tmp_path / "target.onnx").chmod(0o640)
    (tmp_path / "link.onnx").symlink_to("target.onnx")
    assert main([WEIGHTS, "--size", "64", "-o", "link.onnx"]) == 0
    assert (tmp_path / "link.onnx").is_symlink()
    onnx.checker.check_model(onnx.load(tmp_path / "target.onnx"))
    assert (tmp_path / "target.onnx").stat().st_mode & 0o777 == 0o640


METADATA = {
    "height": ("fusenms.image", lambda v: v.replace('"height": 64', '"height": 128')),
    "text height": ("fusenms.image", lambda v: v.replace('"height": 64', '"height": "x"')),
    "negative height": ("fusenms.image", lambda v: v.replace('"height": 64', '"height": -64')),
    "preset": ("fusenms.config", lambda v: v.replace('"output_preset": "fusenms"', '"output_preset": "deepstream"')),
    "rows": ("fusenms.config", lambda v: v.replace('"max_detections": 300', '"max_detections": 301')),
    "classes": ("fusenms.layout", lambda v: v.replace('"stop": 3', '"stop": 900')),
    "axis": ("fusenms.layout", lambda v: v.replace('"channel_axis": 1', '"channel_axis": 2')),
    "bins": ("fusenms.layout", lambda v: v.replace('"bins": 16', '"bins": 7')),
    "strides": ("fusenms.layout", lambda v: v.replace("[8, 16, 32]", "[8]")),
    "zero strides": ("fusenms.layout", lambda v: v.replace("[8, 16, 32]", "[0, 16, 32]")),
    "tensor": ("fusenms.layout", lambda v: v.replace("head_boxes", "head_classes")),
    "nonsense": ("fusenms.layout", lambda v: "{"),
    "backend": ("fusenms.backend", lambda v: "zzz"),
}


@pytest.mark.covering(quick=0)
@pytest.mark.parametrize("case", METADATA)
def test_edited_metadata_is_one_message(tmp_path, capsys, small_file, case):
    key, edit = METADATA[case]
    model = onnx.load(small_file)
    entry = next(item for item in model.metadata_props if item.key == key)
    assert edit(entry.value) != entry.value
    entry.value = edit(entry.value)
    onnx.save(model, tmp_path / "e.onnx")
    assert main(["verify", "e.onnx"]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("fusenms: ") or "DIFFERS" in printed.out


@pytest.mark.covering(default=0)
@pytest.mark.slow
@pytest.mark.parametrize(
    "metadata",
    [
        {"stride": "[8, 16, 32]"},
        {"stride": "0"},
        {"names": "{'a': 1}"},
        {"names": "{1000000000: 'x'}"},
        {"imgsz": "[-640, 0]"},
    ],
)
def test_odd_metadata_of_a_third_party_file_does_not_matter(tmp_path, metadata):
    from third_party_exports import Decoded, write

    write(Decoded(), tmp_path / "m.onnx", metadata=metadata)
    assert main(["m.onnx"]) == 0


@pytest.mark.slow
def test_input_with_the_name_of_an_output_is_renamed(tmp_path):
    from third_party_exports import Decoded, write

    model = onnx.load(write(Decoded(), tmp_path / "m.onnx"))
    for node in model.graph.node:
        node.input[:] = ["scores" if name == "images" else name for name in node.input]
    model.graph.input[0].name = "scores"
    onnx.save(model, tmp_path / "m.onnx")
    assert main(["m.onnx"]) == 0


@pytest.mark.slow
def test_nan_in_the_weights_of_an_onnx_is_named(tmp_path, capsys):
    from third_party_exports import Decoded, write

    model = onnx.load(write(Decoded(), tmp_path / "m.onnx"))
    item = next(i for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT and len(i.dims) == 4)
    values = onnx.numpy_helper.to_array(item).copy()
    values.flat[0] = np.nan
    item.CopyFrom(onnx.numpy_helper.from_array(values, item.name))
    onnx.save(model, tmp_path / "m.onnx")
    assert main(["m.onnx"]) == 1
    assert f"the weights of {item.name} are not finite (NaN)" in capsys.readouterr().err


@pytest.mark.slow
def test_inspect_says_which_decode_stays_and_leaves_constants_out(tmp_path, capsys):
    from third_party_exports import Decoded, write

    model = onnx.load(write(Decoded(), tmp_path / "m.onnx"))
    weights = [onnx.helper.make_tensor_value_info(i.name, i.data_type, i.dims) for i in model.graph.initializer]
    model.graph.input.extend(weights)  # as files of IR version 3 have them
    onnx.save(model, tmp_path / "m.onnx")
    assert main(["inspect", "m.onnx", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["inputs"] == ["images float32[batch, 3, 64, 64]"]
    assert values["decode"] == "late"


def test_images_without_verifying_are_refused(capsys):
    assert main([WEIGHTS, "--unverified", "--images", str(SHAPES)]) == 1
    assert "images are only used to verify" in capsys.readouterr().err


@pytest.mark.slow
def test_detect_says_in_json_whether_rounds_were_enough(capsys):
    flags = ["--size", "128", "--backend", "portable", "--score-threshold", "0.01", "--unverified"]
    for rounds, enough in (("1", False), ("64", True)):
        assert main([WEIGHTS, *flags, "--rounds", rounds, "-o", "m.onnx"]) == 0
        capsys.readouterr()
        assert main(["detect", "m.onnx", str(SHAPES / "shapes0.jpg"), "--no-draw", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["images"][0]["converged"] is enough


def test_families_are_listed_and_searched(capsys):
    assert main(["families"]) == 0
    every = capsys.readouterr().out
    assert main(["families", "nanodet"]) == 0
    some = capsys.readouterr().out
    assert 0 < len(some) < len(every)
    assert some.startswith("NanoDet")
    assert main(["families", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["families"]) > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        lambda: fusenms.Detector(None),
        lambda: fusenms.Detector("shapes.ort.onnx")(None),
        lambda: fusenms.verify("shapes.ort.onnx", batches=5),
        lambda: fusenms.fuse(WEIGHTS, size=64, unverified=True).save(None, unverified=True),
    ],
)
def test_wrong_types_in_python_are_errors_of_ours(fused_file, tmp_path, call):
    (tmp_path / "shapes.ort.onnx").write_bytes(fused_file.read_bytes())
    with pytest.raises(fusenms.FusenmsError):
        call()
