"""Nothing is lost: every test runs in the scope all; quick is within default; default and rest together are all."""

from __future__ import annotations

import itertools

import pytest
import scopes
from hypothesis import given
from hypothesis import strategies as st

pytest_plugins = ["pytester"]
few = st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=40)


@given(few, st.integers(0, 3))
def test_every_combination_that_occurs_is_covered(cases, strength):
    chosen = [cases[i] for i in scopes.covering(cases, strength)]
    for places in itertools.combinations(range(3), strength):
        assert {tuple(case[i] for i in places) for case in cases} == {tuple(case[i] for i in places) for case in chosen}


def test_pairs_take_far_fewer_cases_than_the_product():
    product = list(itertools.product(range(9), range(6), range(4), range(2)))
    assert [len(scopes.covering(product, strength)) for strength in (0, 1)] == [1, 9]
    assert 54 <= len(scopes.covering(product, 2)) < 70 < len(product)


@pytest.fixture
def collected(request) -> list[pytest.Item]:
    return request.config.stash[scopes.COLLECTED]


def test_all_has_every_test(collected):
    assert scopes.select(collected, "all") == collected
    assert {item.nodeid for item in collected} >= {"tests/test_scopes.py::test_all_has_every_test"}


def test_scopes_lie_within_each_other(collected):
    quick, default, rest = (set(scopes.select(collected, scope)) for scope in ("quick", "default", "rest"))
    assert quick <= default
    assert default | rest == set(collected)
    assert all(map(scopes.is_search, default & rest))


def test_every_test_of_default_is_there_in_some_case(collected):
    """A mark on cases leaves out cases, never a whole test."""
    default = {scopes.family(item) for item in scopes.select(collected, "default")}
    left = [item for item in collected if scopes.family(item) not in default]
    assert all(not scopes.is_within(item, "default") for item in left)


def families(items: list[pytest.Item]) -> dict[str, list[pytest.Item]]:
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("covering"):
            groups.setdefault(scopes.family(item), []).append(item)
    return groups


def test_families_are_whole_products_before_a_scope_leaves_cases_out(collected):
    """As many cases as the values of their parameters have combinations."""
    for name, cases in families(collected).items():
        whole = 1
        for mark in cases[0].iter_markers("parametrize"):
            whole *= len(list(mark.args[1]))
        assert len(cases) == whole, name


@pytest.mark.parametrize("scope", ["default", "quick"])
def test_scope_has_the_combinations_that_its_mark_says(collected, scope):
    chosen = families(scopes.select(collected, scope))
    for name, cases in families(collected).items():
        strength = scopes.strength(cases[0], scope)
        if strength is not None and all(scopes.is_within(case, scope) for case in cases):
            whole, part = ({c for v in map(scopes.values, group) for c in itertools.combinations(enumerate(v), strength)}
                           for group in (cases, chosen[name]))  # fmt: skip
            assert whole == part, name


def test_marks_say_what_can_be(collected):
    for item in collected:
        if mark := item.get_closest_marker("covering"):
            assert set(mark.kwargs) <= {"default", "quick"} and not mark.args, item.nodeid
            default = mark.kwargs.get("default", len(scopes.values(item)))
            assert 0 <= mark.kwargs.get("quick", default) <= default <= len(scopes.values(item)), item.nodeid


SAMPLE = """
import pytest
@pytest.mark.covering(default=2, quick=1)
@pytest.mark.parametrize("a", range(3))
@pytest.mark.parametrize("b", range(3))
@pytest.mark.parametrize("c", range(3))
def test_product(a, b, c): pass
@pytest.mark.slow
def test_slow(): pass
@pytest.mark.thorough
def test_thorough(): pass
@pytest.fixture
def zoo(): pass
def test_zoo(zoo): pass
def test_plain(): pass
"""
HOOKS = """
import scopes
def pytest_addoption(parser):
    parser.addoption("--scope", default="default")
def pytest_configure(config):
    for mark in scopes.MARKS:
        config.addinivalue_line("markers", mark)
def pytest_collection_modifyitems(config, items):
    scopes.deselect(config, items)
"""


@pytest.mark.parametrize(
    ("words", "count"),
    [(["--scope", "quick"], 3 + 1), ([], 9 + 2), (["--scope", "all"], 27 + 4), (["--scope", "rest"], 18 + 2),
     (["test_sample.py::test_thorough"], 1), (["test_sample.py::test_product"], 27)],
    ids=str,
)  # fmt: skip
def test_marks_and_the_option(pytester, words, count):
    pytester.makepyfile(test_sample=SAMPLE)
    pytester.makeconftest(HOOKS)
    pytester.runpytest_inprocess("-p", "no:cacheprovider", *words).assert_outcomes(passed=count)
