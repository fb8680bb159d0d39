"""Only regular files within a size limit are opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fusenms.errors import ConfigError, InputError, SourceError
from fusenms.files import open_regular, read_regular
from fusenms.limits import Limits


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
    with pytest.raises(SourceError, match="is no regular file"):
        open_regular(tmp_path / "fifo", 10)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null"])
def test_error_when_a_link_to_a_device(tmp_path, path):
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(InputError, match="is no regular file"):
        open_regular(tmp_path / "link", 10, error=InputError)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "missing", "."])
def test_error_when_the_path_is_unusable(path):
    with pytest.raises(SourceError):
        open_regular(Path(path), 10)


@pytest.mark.parametrize("value", [0, -1, float("nan"), "5", True, None])
def test_error_when_a_limit_is_no_positive_number(value):
    with pytest.raises(ConfigError, match="max_pixels"):
        Limits(max_pixels=value)
