"""Faults of the machine: kills, full disks, read-only folders, little memory, no home. `make faults` runs the long version."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SHAPES

sys.path.insert(0, str(ROOT / "tests" / "faults"))
import kills

pytestmark = pytest.mark.slow

LONG = bool(os.environ.get("FUSENMS_FAULTS"))
"""Set by `make faults`: more of everything."""

SAVE = """
import sys
from fusenms.artifacts.fused import load_fused
load_fused(sys.argv[1]).save(sys.argv[2], unverified=True)
"""


@pytest.fixture(scope="module")
def fused_file(shapes_raw, tmp_path_factory) -> Path:
    from fusenms import fuse

    return fuse(shapes_raw, unverified=True).save(tmp_path_factory.mktemp("m") / "f.onnx", unverified=True)


def run(*words: str, cwd: Path, before=None, **env: str | None) -> subprocess.CompletedProcess:
    """The command line in a process of its own; a variable that is None is taken out of its environment."""
    settings = {key: value for key, value in (os.environ | kills.environment() | env).items() if value is not None}
    words = (sys.executable, *words) if words[0] == "-c" else (sys.executable, "-m", "fusenms", *words)
    return subprocess.run(words, cwd=cwd, env=settings, preexec_fn=before, capture_output=True, text=True, timeout=300)


def one_message(done: subprocess.CompletedProcess) -> bool:
    return done.returncode == 1 and done.stderr.startswith("fusenms: ") and "Traceback" not in done.stderr


def full_after(size: int):
    """A limit on the size of files, which a write meets as it would meet a full disk."""

    def limit() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_killed_writers_leave_whole_files():
    assert kills.kill_writers(100 if LONG else 6, random.Random(1)) == []


@pytest.mark.skipif(not LONG, reason="takes minutes: make faults")
def test_killed_commands_leave_whole_files():
    assert kills.kill_commands(100, random.Random(1)) == []


@pytest.mark.parametrize("size", [0, 1, 4096, 100_000, 200_000] if LONG else [0, 100_000])
def test_full_disk_at_the_model_leaves_what_was_there(tmp_path, fused_file, size):
    (tmp_path / "out.onnx").write_text("as it was")
    done = run("-c", SAVE, str(fused_file), "out.onnx", cwd=tmp_path, before=full_after(size))
    assert "SourceError: out.onnx: cannot be written (File too large)" in done.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out.onnx": "as it was"}


@pytest.mark.skipif(not LONG, reason="takes a minute: make faults")
@pytest.mark.parametrize("size", [0, 1, 4096, 100_000, 200_000])
def test_full_disk_ends_the_command_with_one_message(tmp_path, size):
    (tmp_path / "out.onnx").write_text("as it was")
    done = run(*kills.COMMAND[3:], cwd=tmp_path, before=full_after(size))
    assert one_message(done), done.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out.onnx": "as it was"}


@pytest.mark.parametrize("size", [0, 10_000] if LONG else [10_000])
def test_full_disk_at_the_drawn_image_leaves_none(tmp_path, fused_file, size):
    done = run(
        "detect", str(fused_file), str(SHAPES / "shapes0.jpg"), "-o", "out", cwd=tmp_path, before=full_after(size)
    )
    assert one_message(done), done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_small_disk_that_fills(tmp_path, fused_file):
    """A real one, where this machine lets us mount it."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], capture_output=True)
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        done = run("-c", SAVE, str(fused_file), "out.onnx", cwd=tmp_path)
        assert "cannot be written (No space left on device)" in done.stderr
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_read_only_disk(tmp_path, fused_file):
    """Root writes into folders without permission, so the whole disk is read-only."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", tmp_path], capture_output=True)
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        done = run("-c", SAVE, str(fused_file), "out.onnx", cwd=tmp_path)
        assert "cannot be written" in done.stderr
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_folder_without_permission(tmp_path, fused_file):
    tmp_path.chmod(0o500)
    done = run("-c", SAVE, str(fused_file), "out.onnx", cwd=tmp_path)
    tmp_path.chmod(0o700)
    assert "no permission" in done.stderr


@pytest.mark.parametrize("megabytes", [300, 500, 700, 900, 1200] if LONG else [700])
def test_little_memory_never_leaves_half_a_file(tmp_path, fused_file, megabytes):
    (tmp_path / "out.onnx").write_text("as it was")
    limit = megabytes * 2**20
    done = run(
        "-c", SAVE, str(fused_file), "out.onnx", cwd=tmp_path,
        before=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    (path,) = tmp_path.iterdir()
    assert path.read_bytes()[:9] == b"as it was" if done.returncode else kills.whole(path)


HOMES = {
    "no HOME": {"HOME": None},
    "HOME that is not there": {"HOME": "/nonexistent"},
    "no place for temporary files": {"TMPDIR": "/nonexistent", "HOME": None, "XDG_CACHE_HOME": "/nonexistent"},
}


@pytest.mark.parametrize("case", HOMES)
def test_reading_needs_no_home(tmp_path, fused_file, case):
    done = run("inspect", str(fused_file), cwd=tmp_path, **HOMES[case])
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not LONG, reason="takes a minute: make faults")
@pytest.mark.parametrize("case", HOMES)
def test_fusing_needs_no_home(tmp_path, case):
    done = run(*kills.COMMAND[3:], cwd=tmp_path, **HOMES[case])
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_names_with_spaces_and_of_other_scripts(tmp_path, fused_file):
    from fusenms.cli import main

    folder = tmp_path / "café · 犬 and a space"
    folder.mkdir()
    (image := folder / "ein Bild №1.jpg").write_bytes((SHAPES / "shapes0.jpg").read_bytes())
    (model := folder / "модель 1.onnx").write_bytes(fused_file.read_bytes())
    assert main(["detect", str(model), str(image), "-o", str(folder / "out put")]) == 0
    assert (folder / "out put" / image.name).stat().st_size
    assert main(["inspect", str(model)]) == 0


def test_two_processes_that_write_one_file(tmp_path, fused_file):
    """Both end well, and the file is one of the two."""
    code = SAVE.replace(
        "load_fused(sys.argv[1]).save", "model = load_fused(sys.argv[1])\nfor _ in range(30): model.save"
    )
    command = [sys.executable, "-c", code, str(fused_file), "out.onnx"]
    processes = [subprocess.Popen(command, cwd=tmp_path, env=kills.environment()) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]
    assert kills.whole(tmp_path / "out.onnx")
