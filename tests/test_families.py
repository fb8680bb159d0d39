"""The catalog says what the code does: every file that it names, tried again; every head that it names, known."""

from __future__ import annotations

import pytest
from families import TABLE, row

from fusenms.catalog import families
from fusenms.heads import HEADS

FILES = [(family, file) for family in families() for file in family.files]
LINES = {line.split("`")[1]: line for line in TABLE.read_text().splitlines() if line.startswith("| `")}


@pytest.mark.parametrize(("family", "file"), FILES, ids=[file for _, file in FILES])
def test_file_does_what_the_table_says(zoo, tmp_path, family, file):
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX (pip install 'fusenms[rtx]')")
    found = row(zoo, file, tmp_path)
    assert str(found) == LINES[file]
    assert (found.task, found.head, found.decode) == (family.task, family.head, family.decode)
    assert set(found.equal) == {"equal"}


def test_table_has_the_files_of_the_catalog():
    assert list(LINES) == [file for _, file in FILES]


def test_catalog_names_every_head():
    known = {head.name for head in HEADS}
    assert {family.head for family in families()} == known | {"its own"}


def test_every_family_says_what_it_was_tried_on():
    assert all(family.tried and family.source and family.licence and family.checkpoints for family in families())
