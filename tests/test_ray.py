"""`detect --ray`: on a cluster of several nodes, every input gives its rows once, whatever is stopped, and they are those of `Detector`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHAPES

import fusenms
from fusenms.cli import main
from fusenms.cluster import dataset, detecting, job, output, writer
from fusenms.cluster.actor import open_detector
from fusenms.cluster.dataset import items_of
from fusenms.cluster.output import Output
from fusenms.cluster.rows import schema, values_of
from fusenms.errors import BackendUnavailableError, ConfigError, InputError, RunError, SourceError
from fusenms.limits import DEFAULT_LIMITS
from fusenms.runtime.masks import Masks
from fusenms.runtime.video import Video, VideoFile

pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'fusenms[ray]'")
parquet = pytest.importorskip("pyarrow.parquet")
ray = pytest.importorskip("ray", reason="needs Ray: pip install 'fusenms[ray]'")
pytest.importorskip("ray.data", reason="needs Ray Data: pip install 'fusenms[ray]'")

FRAMES = 7
SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 2}
"""So that a node that is killed is missed within a second, not within a quarter of a minute."""


@pytest.fixture(scope="module")
def fused(shapes_raw, tmp_path_factory):
    path = tmp_path_factory.mktemp("fused") / "f.onnx"
    return str(fusenms.fuse(shapes_raw, unverified=True, score_threshold=0.1).save(path, unverified=True))


class Nodes:
    """Two nodes of one core each, both on this machine."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        store = {"object_store_memory": 80 * 2**20, "num_cpus": 1}
        self.cluster = Cluster(True, head_node_args={**store, "include_dashboard": False, "_system_config": SOON})
        self.second = self.cluster.add_node(**store)
        ray.init(address=self.cluster.address, log_to_driver=False)

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture(scope="module")
def nodes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
        opened = Nodes()
        yield opened
        opened.close()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("photos/deep")
    shutil.copy(SHAPES / "shapes0.jpg", "photos/a.jpg")
    shutil.copy(SHAPES / "shapes1.jpg", "photos/deep/12.jpg")
    Path("photos/b.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    return tmp_path


def copies(folder: Path, count: int) -> list[str]:
    """Many images: links to two."""
    folder.mkdir()
    for number in range(count):
        os.symlink(SHAPES / f"shapes{number % 2}.jpg", folder / f"{number:04}.jpg")
    return [str(folder / f"{number:04}.jpg") for number in range(count)]


def clip(path: Path) -> Path:
    video = VideoFile(path, 10.0)
    image = fusenms.runtime.images.read_image(SHAPES / "shapes0.jpg")
    for number in range(FRAMES):
        video.write(np.roll(image, 16 * number, 1))
    video.close()
    return path


def table_of_images(path: Path) -> Path:
    """A Parquet file of two row groups, whose images are as Hugging Face stores them; one is null, one is no image, one is a path."""
    data = [{"bytes": (SHAPES / f"shapes{i % 2}.jpg").read_bytes(), "path": None} for i in range(4)]
    values = [*data[:2], None, {"bytes": b"no image", "path": None}, {"bytes": None, "path": "photos/a.jpg"}, *data[2:]]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    parquet.write_table(pa.table({"id": range(7), "photo": pa.array(values, kind)}), path, row_group_size=4)
    return path


def rows_of(path: str | Path) -> list[dict]:
    return parquet.read_table(path).to_pylist()


def by_key(rows: list[dict]) -> dict[tuple, dict]:
    found = {(row["image"], row["row"], row["frame"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def expected(found: fusenms.Detections, **where: object) -> dict:
    """The row of an image with upright boxes, written apart from the code."""
    place = found.masks.place
    nothing = dict.fromkeys(("oriented_box", "corners", "keypoints", "polygons", "index"))
    detections = [
        {"label": label, "name": found.class_names[label], "score": score, "box": [float(side) for side in box]}
        | nothing
        for box, score, label in zip(found.boxes, found.scores.tolist(), found.labels.tolist(), strict=True)
    ]
    row = {"height": place.height, "width": place.width, "detections": detections, "converged": True}
    return dict.fromkeys(schema().names) | row | where


def test_rows_have_what_a_model_has():
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 5:20, 10:30] = masks[1, 30:38, 2:9] = True
    values = np.random.default_rng(0).random((2, 17)).astype(np.float32)
    found = fusenms.Detections(
        boxes=values[:, :4], scores=values[:, 4], labels=np.array([1, 0], np.int32), class_names=("a", "b"), oriented=True,
        oriented_boxes=values[:, 5:10], keypoints=values[:, 10:16].reshape(2, 2, 3), masks=Masks.of_arrays(masks),
        indices=np.array([7, 3], np.int32),
    )  # fmt: skip
    (row,) = pa.Table.from_pylist([values_of(found)], schema()).to_pylist()
    assert (row["height"], row["width"], row["converged"]) == (40, 60, True)
    for name, array in {
        "box": found.boxes, "oriented_box": found.oriented_boxes, "keypoints": found.keypoints, "score": found.scores,
        "label": found.labels, "index": found.indices, "corners": found.corners.astype(np.float32),
    }.items():  # fmt: skip
        assert np.array_equal(np.array([each[name] for each in row["detections"]], array.dtype), array), name
    assert [each["name"] for each in row["detections"]] == ["b", "a"]
    assert [each["polygons"] for each in row["detections"]] == [each["polygons"] for each in found.to_dicts()]


@pytest.mark.slow
def test_rows_are_those_of_a_detector(fused, folder, nodes):
    """Images, a list with one that is missing, rows of Parquet and frames, exactly, in one job."""
    Path("list.txt").write_text("# two\nphotos/deep/12.jpg\ngone.jpg\n")
    video, table = clip(folder / "clip.mp4"), table_of_images(folder / "t.parquet")
    named = ["photos", "list.txt", "photos/a.jpg", table, video]
    done = fusenms.detect_dataset(fused, named, "out.parquet", column="photo", every=2, batch_size=3)
    rows = by_key(rows_of("out.parquet"))
    with fusenms.Detector(fused, threads=1) as detect:
        want = {}
        for name in ("photos/a.jpg", "photos/deep/12.jpg"):
            path = str(folder / name)
            want[path, None, None] = expected(detect(path)[0], image=path)
        for row, name in {0: "shapes0", 1: "shapes1", 4: "shapes0", 5: "shapes0", 6: "shapes1"}.items():
            want[str(table), row, None] = expected(detect(SHAPES / f"{name}.jpg")[0], image=str(table), row=row)
        opened = Video(video)
        for frame in opened.frames(2):
            where = {"image": str(video), "frame": frame.number, "seconds": frame.seconds}
            want[str(video), None, frame.number] = expected(detect(frame.image)[0], **where)
        opened.close()
    assert sum(len(row["detections"]) for row in want.values()) > 30
    assert {key: row for key, row in rows.items() if row["error"] is None} == want
    errors = {key: row["error"] for key, row in rows.items() if row["error"]}
    assert "not a readable image" in errors.pop((str(folder / "photos/b.png"), None, None))
    assert "cannot be read" in errors.pop((str(folder / "gone.jpg"), None, None))
    assert "null" in errors.pop((str(table), 2, None))
    assert "not a readable image" in errors.pop((str(table), 3, None))
    assert errors == {}
    assert (done.images, done.failed, done.skipped) == (len(rows), 4, 0)
    assert done.detections == sum(len(row["detections"]) for row in want.values())
    assert 1 <= done.nodes <= done.actors <= 2 and done.images_per_second > 0
    again = fusenms.detect_dataset(fused, named, "out.parquet", column="photo", every=2)
    assert (again.images, again.skipped) == (0, 4 + 7 + 1)  # a video counts once
    assert len(rows_of("out.parquet")) == len(rows)


@pytest.mark.thorough
def test_lost_node_loses_and_doubles_nothing(fused, folder, nodes, monkeypatch):
    names, take, seen = copies(folder / "many", 400), writer.Writer.take, []
    second = nodes.second.node_id

    def takes(self, table):
        take(self, table)
        if second in self.nodes and not seen:  # it has given rows, and has a task in hand and another that waits
            seen.append(self.images)
            nodes.cluster.remove_node(nodes.second, allow_graceful=False)

    monkeypatch.setattr(writer.Writer, "take", takes)
    try:
        done = fusenms.detect_dataset(fused, "many", "out.parquet", batch_size=4)
    finally:
        nodes.second = nodes.cluster.add_node(object_store_memory=80 * 2**20, num_cpus=1)
    assert seen and seen[0] < len(names) and done.nodes >= 2
    rows = rows_of("out.parquet")
    assert Counter(row["image"] for row in rows) == Counter(names)
    assert {len(row["detections"]) for row in rows[:50]} == {len(row["detections"]) for row in rows}


@pytest.mark.thorough
def test_stopped_run_goes_on(fused, folder, nodes, monkeypatch):
    """Parts of a few rows. After Ctrl-C, all that had come is there, and the next run does the rest, and what is new."""
    names = copies(folder / "many", 60)
    monkeypatch.setattr(writer, "PART_ROWS", 5)

    def stop(done, total):
        if done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fusenms.detect_dataset(fused, "many", "out.parquet", batch_size=4, progress=stop)
    before = len(rows_of("out.parquet"))
    assert 16 <= before < 60
    os.symlink(SHAPES / "shapes0.jpg", "many/new.jpg")
    seen = []
    done = fusenms.detect_dataset(
        fused, "many", "out.parquet", batch_size=2, progress=lambda *counts: seen.append(counts)
    )
    assert (done.images, done.skipped, done.failed) == (61 - before, before, 0)
    assert Counter(row["image"] for row in rows_of("out.parquet")) == Counter([*names, str(folder / "many/new.jpg")])
    assert seen[0] == (before, 61) and seen[-1] == (61, 61) and seen == sorted(seen)
    assert not [name for name in os.listdir("out.parquet") if "tmp" in name]


@pytest.mark.thorough
def test_killed_run_goes_on(fused, folder, nodes):
    names = copies(folder / "many", 300)
    script = (
        "import sys; from fusenms.cluster import writer; writer.PART_ROWS = 5; from fusenms.cli import main;"
        f"main(['detect', '--ray', {nodes.cluster.address!r}, {fused!r}, 'many', '-o', 'out.parquet', '--batch', '4'])"
    )
    child = subprocess.Popen([sys.executable, "-c", script])
    try:
        while not list(folder.glob("out.parquet/part-*")):
            assert child.poll() is None
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    before = len(rows_of("out.parquet"))
    assert 0 < before < 300
    done = fusenms.detect_dataset(fused, "many", "out.parquet", batch_size=4)
    assert done.skipped == before
    assert Counter(row["image"] for row in rows_of("out.parquet")) == Counter(names)


@pytest.mark.slow
def test_command_reports(fused, nodes, capsys):
    words = ["detect", "--ray", nodes.cluster.address, fused, "photos", "-o", "out.parquet"]
    assert main([*words, "--json"]) == 1
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    assert (values["images"], values["failed"], values["nodes"]) == (2, 1, 1)
    assert values["images_per_second"] > 0
    assert printed.err == "fusenms: 1 failed; the column error of out.parquet says why\n"
    assert main(words) == 0
    assert "0 images · 0 detections · 0 failed · 2 done before" in capsys.readouterr().out


@pytest.mark.thorough
def test_model_that_fails_on_a_node_is_said(fused, folder, nodes, monkeypatch):
    monkeypatch.setattr(detecting, "Job", lambda **values: replace(job.Job(**values), version="0.0"))
    monkeypatch.setattr(detecting, "_checked_model", lambda model, _: Path(model).read_bytes())
    with pytest.raises(RunError, match=r"found fusenms .* on a node, and 0\.0 where the job was started"):
        fusenms.detect_dataset(fused, "photos", "out.parquet")
    assert rows_left("out.parquet") == []


def rows_left(path: str) -> list[str]:
    return [name for name in os.listdir(path) if name.startswith("part")]


LISTENING = """
import os, pathlib
from fusenms.cluster.connection import connected
def own(pid):
    children = [own(int(c)) for c in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return {pid}.union(*children)
with connected("local", 0) as ray:
    ray.get(ray.remote(lambda: 1).remote())
    sockets = set()
    for pid in own(os.getpid()):
        for file in pathlib.Path(f"/proc/{pid}/fd").iterdir():
            try: sockets.add(os.readlink(file))
            except OSError: pass
    places = set()
    for name in ("tcp", "tcp6"):
        for line in pathlib.Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets: places.add(words[1].split(":")[0])
    print(sorted(places), os.environ["RAY_USAGE_STATS_ENABLED"])
"""


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux")
def test_local_ray_listens_on_loopback_alone(folder):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", LISTENING]
    done = subprocess.run(command, env=clean | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    loopback = ["0000000000000000FFFF00000100007F", "0100007F"]
    assert done.stdout.strip() == f"{loopback} 0"


# Without a cluster.


def test_actors_open_only_the_model_and_version_of_the_job(fused):
    data = Path(fused).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    usual = {"settings": {}, "column": "image", "every": 1, "batch_size": 1, "cpus": 1, "custom_ops": ()}
    made = job.Job(sha256=digest, limits=DEFAULT_LIMITS, **usual)
    with open_detector(np.frombuffer(data, np.uint8), made) as detect:
        assert len(detect("photos/a.jpg")[0]) > 3
    for model, wanted, message in (
        (data[:-1] + b"x", made, "is not the one that the job was started with"),
        (data, replace(made, version="0.0"), "on a node, and 0.0 where the job was started"),
    ):
        with pytest.raises(SourceError, match=message):
            open_detector(model, wanted)


def test_data_set_is_folders_patterns_lists_and_files(folder):
    clip(folder / "clip.MP4")
    table_of_images(folder / "photos/t.parquet")
    Path("lists").mkdir()
    Path("lists/all.txt").write_text(f"# some\n\n../photos/a.jpg\n../clip.MP4\n{folder}/photos/t.parquet\ngone\n")

    def found(*arguments):
        items = items_of(list(arguments), "photo", DEFAULT_LIMITS)
        assert all(os.path.isabs(item.path) for item in items)
        return [(os.path.relpath(item.path), item.kind, item.first, item.rows) for item in items]

    rows = [("photos/t.parquet", "parquet", 0, 4), ("photos/t.parquet", "parquet", 4, 3)]
    a, b, deep = (
        ("photos/a.jpg", "image", 0, 1),
        ("photos/b.png", "image", 0, 1),
        ("photos/deep/12.jpg", "image", 0, 1),
    )
    assert found("photos") == [a, b, *rows]
    assert found("photos/**/*.jpg", "photos/a.jpg") == [a, deep]
    assert found("lists/all.txt") == [a, ("clip.MP4", "video", 0, 1), *rows, ("lists/gone", "image", 0, 1)]
    assert found("gone.jpg") == [("gone.jpg", "image", 0, 1)]


def test_addresses_are_kept_as_addresses(folder, monkeypatch):
    opened = dataset.open_filesystem
    Path("photos/list.txt").write_text("a.jpg\n")
    base = f"file://{folder}/photos"
    for argument, names in {
        base: ["a.jpg", "b.png"], f"{base}/": ["a.jpg", "b.png"], f"{base}/*.jpg": ["a.jpg"], f"{base}/**/*.jpg": ["a.jpg", "deep/12.jpg"],
        f"{base}/?.jpg": ["a.jpg"], f"{base}/list.txt": ["a.jpg"], f"{base}/a.jpg": ["a.jpg"],
    }.items():  # fmt: skip
        assert [item.path for item in items_of([argument], "image", DEFAULT_LIMITS)] == [f"{base}/{n}" for n in names]
    assert dataset.beside("s3://b/x/list.txt?region=r", "../y.jpg") == "s3://b/y.jpg?region=r"
    options = "?type=file"  # kept for actors, and no part of a name
    monkeypatch.setattr(dataset, "open_filesystem", lambda path: opened(path.removesuffix(options)))
    for argument in (f"{base}{options}", f"{base}/?.???{options}", f"{base}/list.txt{options}"):
        paths = [item.path for item in items_of([argument], "image", DEFAULT_LIMITS)]
        assert paths[0] == f"{base}/a.jpg{options}" and {path.removesuffix(options) for path in paths} <= {
            f"{base}/a.jpg",
            f"{base}/b.png",
        }


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("*.tiff", "no file fits this pattern"),
        ("empty", "has no images, videos or Parquet files"),
        ("nothing.txt", "names nothing"),
        ("binary.txt", "is no text"),
        ("gone.txt", "cannot be read"),
        ("nowhere://x/y.jpg", "cannot be opened"),
        ("numbers.parquet", "has no column 'image'; it has a"),
        ("strings.parquet", r"column 'image' is int64; expected the bytes"),
    ],
)
def test_data_set_that_names_nothing_is_refused(argument, message, folder):
    Path("empty").mkdir()
    Path("nothing.txt").write_text("# nothing\n")
    Path("binary.txt").write_bytes(b"\xff\xfe\xff")
    parquet.write_table(pa.table({"a": [1]}), "numbers.parquet")
    parquet.write_table(pa.table({"image": [1]}), "strings.parquet")
    with pytest.raises(InputError, match=message):
        items_of([argument], "image", DEFAULT_LIMITS)


def part(out: Output, rows: list[dict], ended: list[str] = ()) -> None:
    out.write(pa.Table.from_pylist(rows, schema()), list(ended))


JOB = {"model": "x", "settings": {}}


def test_output_knows_what_is_left(folder):
    items = [dataset.Item(name, kind, *where) for name, kind, where in (
        ("a", "image", ()), ("b", "image", ()), ("v", "video", ()), ("w", "video", ()), ("x", "video", ()),
        ("t", "parquet", (0, 0, 3)), ("t", "parquet", (1, 3, 2)),
    )]  # fmt: skip
    with Output("out.parquet", JOB, DEFAULT_LIMITS) as out:
        assert [out.left(item) for item in items] == [(1, [])] * 5 + [(3, []), (2, [])]
        part(out, [{"image": "b"}, {"image": "v", "frame": 0}, {"image": "w", "frame": 0}, {"image": "t", "row": 1}])
        part(out, [{"image": "v", "frame": 4}, {"image": "x", "error": "broken"}, {"image": "t", "row": 4}], ["w"])
    with Output("out.parquet", JOB, DEFAULT_LIMITS) as out:
        left = [out.left(item) for item in items]
    assert left == [(1, []), (0, []), (1, [0, 4]), (0, []), (0, []), (2, [1]), (1, [4])]
    assert sorted(os.listdir("out.parquet")) == [output.JOB, output.LOCK, "part-00000.parquet", "part-00001.parquet"]


def test_output_is_not_shared_mixed_or_guessed(folder):
    with Output("out.parquet", JOB, DEFAULT_LIMITS) as out:
        with pytest.raises(SourceError, match="another run writes there"):
            Output("out.parquet", JOB, DEFAULT_LIMITS)
        Path("out.parquet/part-00000.parquet").write_bytes(b"")
        with pytest.raises(SourceError, match=r"another run has written part-00000"):
            part(out, [{"image": "a"}])
    with pytest.raises(SourceError, match=r"part-00000.parquet is damaged"):
        Output("out.parquet", JOB, DEFAULT_LIMITS)
    os.remove("out.parquet/part-00000.parquet")
    with pytest.raises(ConfigError, match=r'rows of another job: model differs \("x" there, "y" now\)'):
        Output("out.parquet", JOB | {"model": "y"}, DEFAULT_LIMITS)
    Path("out.parquet", output.JOB).write_text("[")
    with pytest.raises(SourceError, match="is damaged"):
        Output("out.parquet", JOB, DEFAULT_LIMITS)
    for path, message in (("photos", "a.jpg, which no run of fusenms wrote"), ("photos/a.jpg", "is a file")):
        with pytest.raises(SourceError, match=message):
            Output(path, JOB, DEFAULT_LIMITS)


@pytest.mark.slow
def test_other_settings_and_models_are_refused_before_ray_starts(fused, folder, monkeypatch):
    def never(*_):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(detecting, "connected", never)
    with pytest.raises(AssertionError):
        fusenms.detect_dataset(fused, "photos", "out.parquet", score_threshold=0.5)
    for settings, message in (
        ({"score_threshold": 0.6}, "settings differs"), ({"score_threshold": 0.5, "every": 3}, "every differs"),
        ({"labels": ["nobody"]}, "found the class 'nobody'"), ({"score_threshold": 0.01}, "expected at least 0.1"),
        ({"actors": 0}, "actors is 0"), ({"cpus": True}, "cpus is True"),
    ):  # fmt: skip
        with pytest.raises((ConfigError, InputError), match=message):
            fusenms.detect_dataset(fused, "photos", "out.parquet", **settings)
    other = str(folder / "other.onnx")
    fusenms.configure(fused, max_detections=5).save(other)
    with pytest.raises(ConfigError, match="model differs"):
        fusenms.detect_dataset(other, "photos", "out.parquet", score_threshold=0.5)
    with pytest.raises(InputError, match="is in the output"):
        fusenms.detect_dataset(fused, ["photos", f"{folder}/out.parquet/x.jpg"], "out.parquet", score_threshold=0.5)
    for model, message in ((folder, "expected the path of a fused .onnx"), (3, "found int")):
        with pytest.raises(InputError, match=message):
            fusenms.detect_dataset(model, "photos", "out.parquet")


@pytest.mark.slow
def test_actors_get_the_libraries_and_settings_in_use(fused, nodes, monkeypatch):
    given = []
    monkeypatch.setattr(detecting, "current_libraries", lambda: ("/lib/fold.so",))
    monkeypatch.setattr(detecting, "run_job", lambda _, made, *more: given.append(made))
    fusenms.detect_dataset(
        fused, "photos", "out.parquet", cpus=2, batch_size=3, labels=[0], limits=fusenms.Limits(max_pixels=9)
    )
    (made,) = given
    assert (made.custom_ops, made.cpus, made.batch_size) == (("/lib/fold.so",), 2, 3)
    assert (made.settings, made.limits.max_pixels) == ({"labels": [0]}, 9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--actors", "2"], "found --actors without --ray"),
        (["--ray", "local"], "found --ray without -o"),
        (["--ray", "local", "-o", "o", "--coco", "c.json"], "found --coco with --ray"),
        (["--ray", "ray://h:1", "-o", "o"], "the address is 'ray://h:1'"),
        (["--ray", "local", "-o", "o", "--column", "x", "--cpus", "0"], "cpus is 0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(words, message, fused, capsys):
    assert main(["detect", fused, "photos/a.jpg", *words]) == 1
    assert message in capsys.readouterr().err


def test_error_when_ray_is_not_installed(fused, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'fusenms\[ray\]'"):
        fusenms.detect_dataset(fused, "photos", "out.parquet")
