"""What is installed has licences that may be used, and docs/licences.md names all of it."""

from __future__ import annotations

import re

import licences
import pytest
from licences import ALLOWED_COPYLEFT, ALLOWED_PROPRIETARY, DOCS, IN_ITS_FILE, in_its_file, installed, problem

pytest.importorskip("piplicenses", reason="needs pip-licenses, of the extra dev")


@pytest.fixture(scope="module")
def found():
    return installed()


def test_every_licence_is_allowed(found):
    assert len(found) > 20
    assert not [text for name, (licence, _) in found.items() if (text := problem(name, licence))]


def test_document_names_all_that_is_installed(found):
    named = set(re.findall(r"^\| ([a-z0-9-]+) \|", DOCS.read_text(), re.M))
    assert set(found) <= named, "run: make licences"


@pytest.mark.parametrize(
    "licence",
    ["GPL-3.0-or-later", "AGPL-3.0",
     "LGPL-2.1", "MIT AND LGPL-2.1", "GNU General Public License v3", "MPL-2.0", "UNKNOWN", "", "NVIDIA"],
)  # fmt: skip
def test_licence_is_refused(licence):
    assert problem("some-package", licence)


@pytest.mark.parametrize(
    "licence", ["MIT", "BSD-3-Clause AND 0BSD", "Apache Software License", "ISC License (ISCL)", "PSF-2.0"]
)
def test_licence_is_allowed(licence):
    assert problem("some-package", licence) is None


def test_no_exception_comes_without_being_asked_for(found):
    """With fusenms itself, that is without an extra, come neither copyleft nor proprietary distributions."""
    always = {name for name, (_, extras) in found.items() if "always" in extras}
    assert not always & (set(ALLOWED_COPYLEFT) | set(ALLOWED_PROPRIETARY))


@pytest.mark.parametrize("name", IN_ITS_FILE)
def test_licence_in_a_file_is_read(name, monkeypatch):
    pytest.importorskip(name.replace("-", "_"))
    assert in_its_file(name) == IN_ITS_FILE[name][0]
    monkeypatch.setitem(licences.IN_ITS_FILE, name, ("MIT", "MIT License"))
    assert problem(name, in_its_file(name))
