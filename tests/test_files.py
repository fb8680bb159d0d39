"""Only regular files within a size limit are opened."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fusenms.errors import ConfigError, InputError, SourceError
from fusenms.limits import Limits
from fusenms.safety.files import (
    TEMPORARY,
    check_writable,
    open_regular,
    read_regular,
    remove_leftovers,
    write_atomically,
    write_together,
)


def test_reads_a_file_and_a_link_to_one(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert read_regular(tmp_path / "a", 3) == read_regular(tmp_path / "b", 3) == b"abc"


def test_error_when_too_large(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(SourceError, match="has 3 bytes; expected at most 2"):
        read_regular(tmp_path / "a", 2)


def test_error_when_a_pipe_and_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SourceError, match="is not a regular file"):
        open_regular(tmp_path / "fifo", 10)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null"])
def test_error_when_a_link_to_a_device(tmp_path, path):
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(InputError, match="is not a regular file"):
        open_regular(tmp_path / "link", 10, error=InputError)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "missing", "."])
def test_error_when_the_path_is_unusable(path):
    with pytest.raises(SourceError):
        open_regular(Path(path), 10)


@pytest.mark.parametrize("value", [0, -1, float("nan"), "5", True, None])
def test_error_when_a_limit_is_no_positive_number(value):
    with pytest.raises(ConfigError, match="max_pixels"):
        Limits(max_pixels=value)


def names(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def leave_a_temporary(folder: Path) -> None:
    """A process that is killed while it writes into a folder."""
    code = "import os, sys, fusenms.safety.files as f; f._synchronize = lambda _: os.kill(os.getpid(), 9); "
    code += "f.write_atomically(f.Path(sys.argv[1]), b'x' * 1000)"
    done = subprocess.run([sys.executable, "-c", code, str(folder / "a")], capture_output=True)
    assert done.returncode == -9
    assert [TEMPORARY.fullmatch(path.name) is not None for path in folder.iterdir()] == [True]


def test_temporary_of_a_killed_run_is_removed_by_the_next(tmp_path):
    leave_a_temporary(tmp_path)
    write_atomically(tmp_path / "b", b"new")
    assert names(tmp_path) == {"b": b"new"}


def test_temporary_of_a_running_writer_stays(tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr("fusenms.safety.files._synchronize", lambda _: left.append(remove_leftovers(tmp_path)))
    write_atomically(tmp_path / "a", b"x")
    assert left == [[], []]  # at the file, and at the folder
    assert names(tmp_path) == {"a": b"x"}


@pytest.mark.parametrize(
    "name", [".fusenms-0123456789abcdef", ".fusenms-0123456789abcdeg.tmp", "x.fusenms-0123456789abcdef.tmp"]
)
def test_other_names_are_no_temporaries(tmp_path, name):
    (tmp_path / name).touch()
    assert remove_leftovers(tmp_path) == []


def test_what_is_no_file_is_not_removed(tmp_path):
    os.mkfifo(tmp_path / ".fusenms-0123456789abcdef.tmp")
    (tmp_path / ".fusenms-1123456789abcdef.tmp").symlink_to(tmp_path / "precious")
    (tmp_path / "precious").touch()
    (tmp_path / ".fusenms-2123456789abcdef.tmp").mkdir()
    assert remove_leftovers(tmp_path) == []


def test_file_then_folder_are_synchronized_around_the_rename(tmp_path, monkeypatch):
    done = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.path.isdir(f"/proc/self/fd/{fd}")), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), real_replace(a, b)))
    write_atomically(tmp_path / "a", b"x")
    assert done == [False, "rename", True]


@pytest.mark.parametrize("call", ["replace", "fsync", "fchmod"])
def test_existing_file_stays_when_a_step_fails(tmp_path, monkeypatch, call):
    (tmp_path / "a").write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(SourceError, match="cannot be written \\(No space left on device"):
        write_atomically(tmp_path / "a", b"new")
    assert names(tmp_path) == {"a": b"old"}


def test_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", b"new")
    assert names(tmp_path) == {}


@pytest.mark.parametrize("failing", [1, 2, 3])
@pytest.mark.parametrize("old", [{}, {"a": b"1", "b": b"2", "c": b"3"}, {"b": b"2"}])
def test_files_that_belong_together_are_written_all_or_none(tmp_path, monkeypatch, failing, old):
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)
    real, calls = os.replace, []

    def rename(source, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", rename)
    with pytest.raises(SourceError, match="No space left"):
        write_together({tmp_path / name: name.encode() * 5 for name in "abc"})
    assert names(tmp_path) == old


def test_target_that_became_a_folder_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (tmp_path / "a").mkdir(exist_ok=True))
    with pytest.raises(SourceError, match="cannot be written"):
        write_atomically(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["x\0y", "\ud800", "x" * 300, "loop", "no/where", "."])
def test_error_when_the_place_is_unusable(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    for call in (check_writable, lambda path: write_atomically(path, b"x")):
        with pytest.raises(SourceError):
            call(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_link_to_a_file_to_be_made_is_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/a")
    write_atomically(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "folder") == {"a": b"x"}


def test_many_writers_leave_one_whole_file(tmp_path):
    texts = [bytes([i]) * 100_000 for i in range(8)]
    errors: list[Exception] = []

    def work(data: bytes) -> None:
        try:
            for _ in range(5):
                write_atomically(tmp_path / "a", data)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(data,)) for data in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    (name, data), *others = names(tmp_path).items()
    assert (name, data in texts, others) == ("a", True, [])


def test_new_file_has_the_mode_of_the_process(tmp_path):
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o7777 == 0o640
