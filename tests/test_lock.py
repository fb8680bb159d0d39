"""requirements-dev.lock has everything that pyproject.toml asks for, each version with hashes, and says nothing of where it came from."""

from __future__ import annotations

import re
import sys

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOCK = (ROOT / "requirements-dev.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("cpu", "images", "hf", "test", "dev")
ENTRIES = re.split(r"\n(?=\S)", LOCK.strip())


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_every_dependency_is_locked_in_its_range(extra):
    texts = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    versions: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([a-z0-9-]+)==([^\s;]+)", LOCK, re.M):
        versions.setdefault(name, []).append(version)
    for requirement in map(Requirement, texts):
        if (name := canonicalize_name(requirement.name)) != "fusenms":
            assert versions.get(name), f"{name} is not locked: run make lock"
            assert all(map(requirement.specifier.contains, versions[name])), (
                f"{requirement}: locked is {versions[name]}"
            )


def test_every_version_has_hashes():
    entries = [entry for entry in ENTRIES if not entry.startswith("#")]
    assert len(entries) > 50
    assert all("==" in entry and "--hash=sha256:" in entry for entry in entries)


def test_no_place_is_named():
    assert "://" not in LOCK
    assert not re.search(r"^\s*--(index|extra|find|trusted)", LOCK, re.M)
