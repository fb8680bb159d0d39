"""Text of unknown origin is made fit to print."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fusenms.safety.text import has_controls, printable, printable_lines


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


@pytest.mark.slow
def test_every_character_comes_out_visible():
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    assert printable(every).isprintable()


def test_further_lines_are_indented():
    assert printable_lines("a\nverify    0 mismatches\n  b\n\nc\r") == "a\n  verify    0 mismatches\n  b\n\n  c\\r"


@pytest.mark.parametrize("text", ["a\nb", "\x1b[0m", "\x9b", "\x00", "\u202e", "\u2066", "\u2028", "\ud800", "\x7f"])
def test_controls_are_found(text):
    assert has_controls(text)


@pytest.mark.parametrize(
    "text",
    ["", "person", "\u30c8\u3000\u30e9", "a\u00a0b", "\U0001f468\u200d\U0001f469", "\u0634\u062e\u0635", "e\u0301"],
)
def test_text_of_every_language_has_none(text):
    assert not has_controls(text)
