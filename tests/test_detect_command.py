"""`fusenms detect` on folders, patterns, videos and cameras: nothing is lost, and what fails is named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import SHAPES

import fusenms
from fusenms.cli import detect as command
from fusenms.cli import main
from fusenms.cli.inputs import Input, inputs_of
from fusenms.errors import InputError, SourceError
from fusenms.limits import Limits
from fusenms.runtime.video import Video, VideoFile

pytestmark = pytest.mark.slow
FRAMES = 9


@pytest.fixture(scope="module")
def fused(shapes_raw, tmp_path_factory):
    path = tmp_path_factory.mktemp("fused") / "f.onnx"
    return str(fusenms.fuse(shapes_raw, unverified=True, score_threshold=0.1).save(path, unverified=True))


def frame(number: int) -> np.ndarray:
    """The sample, moved to the right by 16 pixels a frame."""
    image = cv2.imread(str(SHAPES / "shapes0.jpg"))[..., ::-1]
    return np.roll(image, 16 * number, 1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    writer = VideoFile(path, 10.0)
    for number in range(FRAMES):
        writer.write(frame(number))
    writer.close()
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with two images and a broken one, which is the current one."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("photos/deep")
    shutil.copy(SHAPES / "shapes0.jpg", "photos/a.jpg")
    shutil.copy(SHAPES / "shapes1.jpg", "photos/deep/12.jpg")
    (tmp_path / "photos" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    return tmp_path


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_inputs_are_files_folders_patterns_and_cameras(folder, clip):
    shutil.copy(clip, "photos/clip.MP4")
    (folder / "7").mkdir()
    shutil.copy(SHAPES / "shapes0.jpg", "x[1].jpg")

    def names(*arguments):
        return [(each.name, each.is_video) for each in inputs_of(arguments)]

    assert names("photos") == [("photos/a.jpg", False), ("photos/b.png", False), ("photos/clip.MP4", True)]
    assert names("photos/**/*.jpg") == [("photos/a.jpg", False), ("photos/deep/12.jpg", False)]
    assert names("x[1].jpg", "0") == [("x[1].jpg", False), ("camera 0", True)]
    assert names("gone.jpg") == [("gone.jpg", False)]
    assert [each.drawn for each in inputs_of(["photos/clip.MP4", "0", "photos/a.jpg"])] == [
        "clip.mp4",
        "camera0.mp4",
        "a.jpg",
    ]
    assert Input(folder / "image", False).drawn == "image.jpg"
    for argument, message in (("*.tiff", "no file fits"), ("7", "has no images or videos")):
        with pytest.raises(InputError, match=message):
            inputs_of([argument])


def test_bad_images_are_named_and_the_others_are_done(fused, capsys):
    assert (
        main(["detect", fused, "photos", "photos/deep", "gone.jpg", "--jsonl", "out.jsonl", "--coco", "coco.json"]) == 1
    )
    printed = capsys.readouterr()
    assert "photos/b.png: not a readable image" in printed.err
    assert "gone.jpg: cannot be read" in printed.err
    assert "2 failed, 2 done" in printed.err
    with open("out.jsonl") as file:
        rows = lines(file.read())
    assert [(row["image"], "error" in row) for row in rows] == [
        ("photos/a.jpg", False), ("photos/b.png", True), ("photos/deep/12.jpg", False), ("gone.jpg", True)
    ]  # fmt: skip
    assert sorted(os.listdir("detections")) == ["12.jpg", "a.jpg"]
    with open("coco.json") as file:
        results = json.load(file)
    assert {row["image_id"] for row in results} == {"a", 12}
    first, box = rows[0]["detections"][0], results[0]["bbox"]
    assert (results[0]["category_id"], results[0]["score"]) == (first["label"], pytest.approx(first["score"], abs=1e-6))
    assert [box[0], box[1], box[0] + box[2], box[1] + box[3]] == pytest.approx(first["box"], abs=0.01)


@pytest.mark.parametrize("batch", ["1", "3"])
def test_results_do_not_depend_on_the_batch(batch, fused, capsys):
    assert main(["detect", fused, "photos/**/*.jpg", "photos/b.png", "--no-draw", "--json", "--batch", batch]) == 1
    values = json.loads(capsys.readouterr().out)
    with fusenms.Detector(fused) as detect:
        expected = [detect(path)[0].to_dicts() for path in ("photos/a.jpg", "photos/deep/12.jpg")]
    assert [image["detections"] for image in values["images"]] == expected
    assert [each["image"] for each in values["failed"]] == ["photos/b.png"]


def test_lines_go_to_standard_output_alone(fused, capsys):
    assert main(["detect", fused, "photos/a.jpg", "photos/deep", "--no-draw", "--jsonl", "-", "--coco", "c.json"]) == 0
    assert [row["image"] for row in lines(capsys.readouterr().out)] == ["photos/a.jpg", "photos/deep/12.jpg"]


def test_lines_stay_when_the_run_is_stopped(fused, monkeypatch, capsys):
    real, seen = command.save_image, []

    def stops(path, image):
        seen.append(path)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(path, image)

    monkeypatch.setattr(command, "save_image", stops)
    assert main(["detect", fused, "photos/**/*.jpg", "--jsonl", "out.jsonl", "--coco", "c.json"]) == 130
    with open("out.jsonl") as file:
        assert [row["image"] for row in lines(file.read())] == ["photos/a.jpg"]
    assert not os.path.exists("c.json")


def test_frames_of_a_video_are_detected_and_drawn(fused, clip, capsys):
    assert main(["detect", fused, str(clip), "--jsonl", "out.jsonl"]) == 0
    with open("out.jsonl") as file:
        rows = lines(file.read())
    assert [(row["frame"], row["seconds"]) for row in rows] == [(i, i / 10) for i in range(FRAMES)]
    video = Video(clip)
    with fusenms.Detector(fused) as detect:
        expected = [detect(each.image)[0].to_dicts() for each in video.frames()]
    video.close()
    assert [row["detections"] for row in rows] == expected
    assert expected[0] != expected[4]
    drawn = Video(Path("detections/clip.mp4"))
    got = [each.image for each in drawn.frames()]
    assert (len(got), drawn.fps) == (FRAMES, 10)
    assert [np.abs(image.astype(float) - frame(i)).mean() < 30 for i, image in enumerate(got)] == [True] * FRAMES
    assert os.listdir("detections") == ["clip.mp4"]


def test_frames_of_a_stopped_run_are_kept(fused, clip, monkeypatch, capsys):
    write, seen = VideoFile.write, []

    def stops(self, image):
        seen.append(image)
        if len(seen) == 3:
            raise KeyboardInterrupt
        write(self, image)

    monkeypatch.setattr(VideoFile, "write", stops)
    assert main(["detect", fused, str(clip), "--jsonl", "out.jsonl", "--batch", "2"]) == 130
    with open("out.jsonl") as file:
        assert [row["frame"] for row in lines(file.read())] == [0, 1]
    assert len(list(Video(Path("detections/clip.mp4")).frames())) == 2
    assert os.listdir("detections") == ["clip.mp4"]


def test_every_nth_frame_is_taken(fused, clip, capsys):
    assert main(["detect", fused, str(clip), "--json", "--every", "4", "--batch", "2"]) == 0
    images = json.loads(capsys.readouterr().out)["images"]
    assert [image["frame"] for image in images] == [0, 4, 8]
    drawn = Video(Path("detections/clip.mp4"))
    assert (len(list(drawn.frames())), drawn.fps) == (3, 2.5)


def test_videos_that_cannot_be_read_are_named(fused, clip, folder, capsys):
    data = clip.read_bytes()
    (folder / "text.mp4").write_text("no video")
    (folder / "list.mp4").write_text("#EXTM3U\n/etc/passwd\n")
    (folder / "cut.avi").write_bytes(short_avi(folder))
    assert data[4:8] == b"ftyp"
    assert main(["detect", fused, "text.mp4", "list.mp4", "cut.avi", str(clip), "--no-draw"]) == 1
    printed = capsys.readouterr()
    assert "text.mp4: not a readable video" in printed.err
    assert "list.mp4: names other files" in printed.err
    assert "cut.avi: ends after" in printed.err
    assert f"clip.mp4 · {FRAMES} frames" in printed.out
    assert f"3 failed, {FRAMES}" not in printed.err  # the frames before the cut are done too
    assert "cut.avi · 0 frames" not in printed.out


def short_avi(folder) -> bytes:
    """An .avi that was cut in the middle: its header says how many frames it had."""
    writer = cv2.VideoWriter(
        str(folder / "whole.avi"), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (640, 480)
    )
    for number in range(FRAMES):
        writer.write(np.ascontiguousarray(frame(number)[..., ::-1]))
    writer.release()
    data = (folder / "whole.avi").read_bytes()
    return data[: len(data) // 2]


def test_frames_have_the_colors_of_the_video(tmp_path):
    """Red is first, as in every image of the package."""
    red = np.full((96, 128, 3), (200, 60, 30), np.uint8)
    writer = VideoFile(tmp_path / "red.mp4", 10.0)
    writer.write(red)
    writer.close()
    video = Video(tmp_path / "red.mp4")
    image = next(video.frames()).image.astype(float)
    video.close()
    right, swapped = (np.abs(image - expected).mean() for expected in (red, red[..., ::-1]))
    assert right < 8 < swapped - right, (right, swapped)


def test_frames_have_a_limit(clip):
    with pytest.raises(InputError, match="max_pixels"):
        Video(clip, Limits(max_pixels=1000))


def test_closed_video_gives_no_frames(clip):
    video = Video(clip)
    frames = video.frames()
    next(frames)
    video.close()
    assert list(frames) == []


def test_annotated_video_that_is_not_kept_leaves_nothing(folder):
    writer = VideoFile(folder / "v.mp4", 5.0)
    writer.write(frame(0))
    writer.close(keep=False)
    assert not [name for name in os.listdir(folder) if name != "photos"]
    with pytest.raises(SourceError, match="does not exist"):
        VideoFile(folder / "no" / "v.mp4", 5.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos/a.jpg", "--every", "0"], "--every is 0"),
        (["photos/a.jpg", "--batch", "0"], "--batch is 0"),
        (["photos/a.jpg", "--json", "--jsonl", "-"], "both write to standard output"),
        (["photos/a.jpg", "--jsonl", "no/out.jsonl"], "does not exist"),
        (["photos/a.jpg", "--coco", "photos/a.jpg"], "is the input file"),
        (["photos/a.jpg", "--jsonl", "photos/a.jpg"], "is the input file"),
        (["photos/a.jpg", "-o", "photos"], "would be overwritten"),
        (["photos/a.jpg", "./photos/a.jpg"], "more than one image named a.jpg"),
        (["photos/b.png"], "not a readable image"),
        (["99"], "camera 99"),
    ],
)
def test_error_gets_one_message_and_writes_nothing(arguments, message, fused, folder, capsys):
    before = sorted(path.name for path in folder.rglob("*"))
    assert main(["detect", fused, *arguments]) == 1
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in folder.rglob("*")) == before
