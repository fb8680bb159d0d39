"""Measuring: contestants in turn, the tail that is timed is the real one, memory is seen; never a time that must be met."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import SHAPES
from onnx import parser
from third_party_exports import Decoded, write

from fusenms import fuse
from fusenms.benchmark import TAIL, WHOLE, Contestant, contestants, default_shape, measure, peak_memory
from fusenms.cli import main
from fusenms.errors import InputError, SourceError, UnsupportedByBackendError
from fusenms.runtime.contestants import CALL, more_contestants

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_exports")]

IMAGES = np.random.default_rng(0).random((1, 3, 64, 64), np.float32)


@pytest.fixture(scope="module")
def fused_file(tmp_path_factory) -> Path:
    return fuse(SHAPES / "shapes.pt", size=64, score_threshold=0.01).save(tmp_path_factory.mktemp("b") / "m.ort.onnx")


@pytest.fixture(scope="module")
def raw_file(tmp_path_factory) -> Path:
    return write(Decoded(), tmp_path_factory.mktemp("b") / "raw.onnx")


def sleeper(name: str, seconds: float, calls: list[str]) -> Contestant:
    def call() -> None:
        calls.append(name)
        time.sleep(seconds)

    return Contestant(name, WHOLE, lambda images: call)


def test_contestants_run_in_turn_and_ratios_are_to_the_first():
    calls: list[str] = []
    slow, slower = measure([sleeper("a", 0.06, calls), sleeper("b", 0.18, calls)], IMAGES, batches=[2], runs=3)
    assert calls == ["a", "b", *["a", "a", "b", "b"] * 3]  # once to see that they run; the second of two counts
    assert (slow.batch, slow.ratio) == (2, 1.0)
    assert slower.ratio == pytest.approx(3, rel=0.5)
    assert slower.low <= slower.milliseconds <= slower.high


def test_what_does_not_run_says_why_and_stops_nobody(tmp_path, raw_file):
    frozen = write(Decoded(), tmp_path / "frozen.onnx", dynamic=False)
    ran, failed = measure(contestants([raw_file, frozen]), IMAGES, batches=[2], runs=1)
    assert not ran.note
    assert "invalid dimensions" in failed.note
    assert failed.to_dict()["milliseconds"] is None


def test_the_tail_that_is_timed_gives_what_the_whole_gives(fused_file):
    whole, tail = contestants([fused_file])
    assert (whole.part, tail.part) == (WHOLE, TAIL)
    images = np.repeat(IMAGES, 3, 0)
    expected, got = whole.prepare(images)(), tail.prepare(images)()
    assert expected["num_detections"].min() > 0
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)


def test_a_file_that_onnxruntime_cannot_run_is_refused(tmp_path):
    path = fuse(SHAPES / "shapes.pt", size=64, backend="trt").save(tmp_path / "m.trt.onnx")
    with pytest.raises(UnsupportedByBackendError, match="made for backend trt"):
        contestants([path])


@pytest.mark.parametrize(("batches", "runs"), [([1], 0), ([0], 1), ([], 1)])
def test_error_when_a_number_is_not_positive(batches, runs):
    with pytest.raises(InputError, match="expected positive numbers"):
        measure([], IMAGES, batches=batches, runs=runs)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("megabytes", [20, 80])
def test_peak_memory_sees_what_a_run_needs(tmp_path, megabytes):
    count = megabytes * 1_000_000 // 4
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
      m (float[1, 3, 8, 8] images) => (float[1] out) {{
        zero = Constant <value = int64[1] {{0}}> ()
        one = Constant <value = int64[1] {{1}}> ()
        flat_shape = Constant <value = int64[1] {{-1}}> ()
        flat = Reshape (images, flat_shape)
        first = Slice (flat, zero, one)
        many = Constant <value = int64[1] {{{count}}}> ()
        big = Expand (first, many)
        out = ReduceSum (big, zero)
      }}""")
    onnx.save(model, tmp_path / "m.onnx")
    assert peak_memory(tmp_path / "m.onnx", WHOLE, 1) == pytest.approx(megabytes, rel=0.2, abs=5)


def test_default_shape(tmp_path, fused_file):
    assert default_shape(fused_file) == (64, 64)
    fuse(SHAPES / "shapes.pt", size=96, dynamic_size=True, unverified=True).save(
        tmp_path / "open.onnx", unverified=True
    )
    assert default_shape(tmp_path / "open.onnx") == (96, 96)
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> m (float[a] x) => (float[a] y) { y = Abs (x) }'
    )
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"does not take a batch of images"):
        default_shape(tmp_path / "m.onnx")


@pytest.mark.thorough
def test_command_prints_a_table_and_draws(tmp_path, raw_file, fused_file, capsys):
    plot = tmp_path / "plot.svg"
    assert main(["bench", str(raw_file), str(fused_file), "--runs", "2", "--batch", "1", "3", "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    assert text.count("m.ort.onnx") >= 6  # model, tail and call, at two batch sizes
    assert "medians of 2 interleaved runs" in text
    assert plot.read_text().startswith("<?xml")


def test_command_gives_json(raw_file, fused_file, capsys):
    arguments = [str(raw_file), str(fused_file), "--runs", "1", "--batch", "2", "--json", "--runtimes", "onnxruntime"]
    assert main(["bench", *arguments]) == 0
    timings = json.loads(capsys.readouterr().out)["timings"]
    assert [(t["name"], t["part"], t["batch"]) for t in timings] == [
        ("raw.onnx", WHOLE, 2), ("m.ort.onnx", WHOLE, 2), ("m.ort.onnx", TAIL, 2), ("m.ort.onnx", CALL, 2),
    ]  # fmt: skip
    assert all(t["milliseconds"] > 0 and t["memory_mb"] >= 0 for t in timings[:3])
    assert timings[3]["milliseconds"] > 0 and timings[3]["memory_mb"] is None


def test_other_runtimes_and_whole_calls_are_timed(raw_file, fused_file, monkeypatch):
    pytest.importorskip("openvino")
    image = np.zeros((90, 120, 3), np.uint8)
    entries = more_contestants([raw_file, fused_file], image, ["onnxruntime", "openvino"], threads=1)
    assert [(entry.name, entry.part) for entry in entries] == [
        ("raw.onnx in openvino", WHOLE), ("m.ort.onnx in openvino", WHOLE), ("m.ort.onnx", CALL), ("m.ort.onnx in openvino", CALL),
    ]  # fmt: skip
    found = entries[2].prepare(IMAGES.repeat(2, 0))()
    assert len(found) == 2 and found[0].masks.place.height == 90
    outputs = entries[1].prepare(IMAGES.repeat(2, 0))()
    assert outputs["boxes"].shape == (2, 300, 4)
    assert all(not timing.note for timing in measure(entries, IMAGES, batches=[1], runs=1))
    with pytest.raises(InputError, match="expected onnxruntime or openvino"):
        more_contestants([raw_file], image, ["caffe"])


def test_command_refuses_before_it_measures(tmp_path, fused_file, capsys):
    frozen = write(Decoded(), tmp_path / "frozen.onnx", dynamic=False)
    other = fuse(SHAPES / "shapes.pt", size=128).save(tmp_path / "other.ort.onnx")
    for arguments, message in (
        ([str(fused_file), str(other)], "images of different sizes (64x64, 128x128)"),
        ([str(fused_file), "--plot", "x.jpg"], "unknown format '.jpg'; expected .png, .svg or .pdf"),
        ([str(fused_file), "--plot", "nowhere/x.png"], "the folder nowhere does not exist"),
        (["missing.onnx"], "cannot be read"),
        ([str(fused_file), "--threads", "0"], "threads is 0; expected a positive number"),
        ([str(frozen), "--batch", "3"], "none of the files runs at batch 3: "),
    ):
        assert main(["bench", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_files_of_one_name_are_told_apart(tmp_path, raw_file):
    (tmp_path / "raw.onnx").write_bytes(raw_file.read_bytes())
    names = {t.name for t in measure(contestants([raw_file, tmp_path / "raw.onnx"]), IMAGES, batches=[1], runs=1)}
    assert names == {str(raw_file), str(tmp_path / "raw.onnx")}


def test_error_when_a_file_is_no_model(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(SourceError, match="not a readable ONNX file"):
        contestants([tmp_path / "m.onnx"])
