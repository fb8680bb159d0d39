"""Text of unknown origin is made fit to print."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fusenms.text import printable, printable_lines


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("café · 犬 × |Δ|", "café · 犬 × |Δ|"),
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\r\nb\tc\x07", "a\\r\\nb\\tc\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202etxt.exe\u2066", "\\u202etxt.exe\\u2066"),
        ("\ud800\udcff", "\\ud800\\udcff"),
        ("a\u2028b\u00a0", "a\\u2028b\\xa0"),
        (Path("a\nb"), "a\\nb"),
        (b"a\xff", "a\\udcff"),
        (5, "5"),
    ],
)
def test_what_is_not_visible_is_escaped(text, shown):
    assert printable(text) == shown


def test_every_character_comes_out_visible():
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    assert printable(every).isprintable()


def test_further_lines_are_indented():
    assert printable_lines("a\nverify    0 mismatches\n  b\n\nc\r") == "a\n  verify    0 mismatches\n  b\n\n  c\\r"
