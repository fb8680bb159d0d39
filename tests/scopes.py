"""How much of the suite runs: `pytest --scope quick`, `default`, `all` or `rest`, by three marks and one fixture.

- A test without a mark runs in every scope.
- `slow` (half a second of a processor or more): not in quick.
- `thorough`, and every test that takes the fixture `zoo`: in all only.
- `covering(default=2, quick=1)`, of a parametrized test: the scope runs as few cases as have every combination of 2 (1) values that
  occurs in a case of the whole product: every pair of values (every value). 0 is a single case. A scope that the mark does not name
  runs every case.
- Searches by hypothesis run in every scope, with the number of examples in `EXAMPLES`.

`all` deselects nothing. `rest` is what default leaves out, and the searches again: default and rest together are all.
`tests/test_scopes.py` checks it of the tests that were collected. A test that is named on the command line (`file.py::test`) runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import pytest

SCOPES = ("quick", "default", "all", "rest")
EXAMPLES = {"quick": 10, "default": 40, "all": 300, "rest": 300}
MARKS = (
    "slow: takes half a second or more; not in the scope quick",
    "thorough: in the scope all only",
    "covering(default=None, quick=None): the scope runs as few cases as have every combination of so many values",
)
COLLECTED = pytest.StashKey[list[pytest.Item]]()
"""In the stash of the configuration: every test, before any was left out."""


def covering(cases: Sequence[Sequence[object]], strength: int) -> list[int]:
    """Few of the cases, by number, in which every combination of `strength` values occurs that occurs in any case.

    Greedy: the case with most combinations that are still missing; of those, the one whose values were chosen least; of those, the
    first. At least one case.
    """
    held = [set(combinations(enumerate(case), strength)) for case in cases]
    missing, used, chosen = set().union(*held), Counter[object](), list[int]()
    while missing:
        best = max(range(len(held)), key=lambda i: (len(held[i] & missing), -sum(used[v] for v in enumerate(cases[i]))))
        chosen.append(best)
        missing -= held[best]
        used.update(enumerate(cases[best]))
    return sorted(chosen)


def family(item: pytest.Item) -> str:
    """The test function that a case belongs to."""
    return item.nodeid.partition("[")[0]


def select(items: Sequence[pytest.Item], scope: str) -> list[pytest.Item]:
    """Those of a scope, in their order."""
    if scope == "all":
        return list(items)
    if scope == "rest":
        default = set(select(items, "default"))
        return [item for item in items if item not in default or is_search(item)]
    families: dict[str, list[pytest.Item]] = {}
    for item in select(items, "default") if scope == "quick" else items:
        if is_within(item, scope):
            families.setdefault(family(item), []).append(item)
    chosen = {item for cases in families.values() for item in _covering(cases, scope)}
    return [item for item in items if item in chosen]


def is_within(item: pytest.Item, scope: str) -> bool:
    """Whether the marks of the test itself let it run."""
    thorough = item.get_closest_marker("thorough") or "zoo" in getattr(item, "fixturenames", ())
    return not thorough and (scope != "quick" or item.get_closest_marker("slow") is None)


def is_search(item: pytest.Item) -> bool:
    return getattr(getattr(item, "obj", None), "is_hypothesis_test", False)


def strength(item: pytest.Item, scope: str) -> int | None:
    mark = item.get_closest_marker("covering")
    return mark.kwargs.get(scope) if mark else None


def _covering(cases: list[pytest.Item], scope: str) -> list[pytest.Item]:
    size = strength(cases[0], scope)
    return cases if size is None else [cases[i] for i in covering([values(case) for case in cases], size)]


def values(item: pytest.Item) -> list[object]:
    """What tells the values of a case from those of the others, one for each parameter: plain ones by value, others by identity."""
    plain = (str, bytes, int, float, type(None))
    return [value if isinstance(value, plain) else ("object", id(value)) for value in item.callspec.params.values()]


def deselect(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not of the scope of this run, unless tests were named."""
    config.stash[COLLECTED] = list(items)
    if any("::" in argument for argument in config.args):
        return
    kept = select(items, config.getoption("scope"))
    within = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in within])
    items[:] = kept
