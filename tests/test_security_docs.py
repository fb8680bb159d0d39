"""The tables of docs/security.md are what the code and the attack tests say."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import fields

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "attacks"))

import table
from common import Attack

from fusenms.limits import Limits


def test_tables_are_current():
    text = table.DOCS.read_text()
    assert table.written(text) == text, "run: python tests/attacks/table.py"


def test_every_limit_has_its_meaning():
    assert all(f"| `{field.name}` | {field.default:,} |" in table.limits() for field in fields(Limits))


def test_attacks_are_counted_by_kind(tmp_path, monkeypatch):
    made = "Attack('bomb', 'a', list), Attack('bomb', 'b', list), Attack('code', 'c', list)"
    listed = f"from common import Attack\nATTACKS = ({made})\n"
    (tmp_path / "test_made_up_attacks.py").write_text(listed)
    monkeypatch.setattr(table, "HERE", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert table.counts() == {"made_up": Counter({"bomb": 2, "code": 1})}
    assert "| made_up | bomb | 2 | 2 of 2 held |" in table.table()


def test_every_attack_has_a_name_of_its_own():
    for name in table.modules():
        attacks = table.importlib.import_module(name).ATTACKS
        assert attacks
        assert all(isinstance(attack, Attack) and attack.kind and callable(attack.make) for attack in attacks)
        assert len({(attack.kind, attack.name) for attack in attacks}) == len(attacks)


def test_error_when_the_document_lost_a_mark():
    with pytest.raises(SystemExit, match="no marks for attacks"):
        table.written("# nothing")


@pytest.mark.parametrize(
    "link", ["docs/security.md", "tests/attacks", "tests/fuzz/corpus", "docs/licences.md", "requirements-dev.lock"]
)
def test_files_that_the_documents_name_exist(link):
    assert (ROOT / link).exists()
