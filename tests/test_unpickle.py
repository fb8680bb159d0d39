"""A pickle becomes plain data: what it names stays a name, what it calls stays a record."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from pathlib import PurePosixPath

import pytest

from fusenms.limits import Limits
from fusenms.sources.torch_files.unpickle import Global, Record, Storage, globals_of, unpickle

LIMITS = Limits()
PLAIN = [
    None, True, False, 0, -1, 2**31 - 1, 2**60, 1.5, "text", "\u00e9\U0001f600", b"bytes", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4),
    [], [1], list(range(2000)), {}, {"a": [1, {"b": (2,)}]}, {i: str(i) for i in range(2000)}, set(), {"a"}, {1, 2},
]  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", PLAIN, ids=lambda value: str(value)[:20])
def test_plain_data_is_as_python_reads_it(value, protocol):
    assert unpickle(pickle.dumps(value, protocol), LIMITS).tree == value


def test_shared_values_stay_shared():
    inner: list[int] = []
    first, second = unpickle(pickle.dumps([inner, inner], 2), LIMITS).tree
    assert first is second


def test_an_ordered_dictionary_is_a_dictionary():
    assert unpickle(pickle.dumps(OrderedDict(a=1), 2), LIMITS).tree == {"a": 1}


def test_an_object_is_a_record_of_its_state():
    found = unpickle(pickle.dumps(Limits(max_pixels=5), 2), LIMITS).tree
    assert (found.name, found.state["max_pixels"]) == ("fusenms.limits.Limits", 5)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_call_is_a_record_of_its_arguments(protocol):
    found = unpickle(pickle.dumps(PurePosixPath("a/b"), protocol), LIMITS)
    assert (found.tree.name, found.tree.arguments) == ("pathlib.PurePosixPath", ("a", "b"))
    assert found.names == found.called == {"pathlib.PurePosixPath"}


def test_a_function_is_a_name():
    assert unpickle(pickle.dumps(os.system, 2), LIMITS).tree == Global("posix.system")


def test_a_storage_is_its_kind_key_and_size():
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", os.system, "7", "cpu", 12) if value is Ellipsis else None

    file = io.BytesIO()
    Pickler(file, 2).dump([Ellipsis])
    assert unpickle(file.getvalue(), LIMITS).tree == [Storage("posix.system", "7", 12)]


def test_names_are_found_in_all_pickles_of_a_file():
    data = b"".join(pickle.dumps(value, 2) for value in (1, 2, os.system))
    assert globals_of(data, LIMITS) == {"posix.system"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "exhausted before seeing STOP"),
        (b"\x80\x02N", "exhausted before seeing STOP"),
        (b"\x80\x02X\x09\x00\x00\x00a.", "expected 9 bytes"),
        (b"\x80\x02NN.", "no value or several values"),
        (b"\x80\x02a.", "has not given"),
        (b"\x80\x02h\x05.", "has not stored"),
        (b"\x80\x02u.", "has not begun"),
        (b"\x80\x02Nq\x00b.", "has not given|cannot have one"),
        (b"\x80\x02X\x01\x00\x00\x00a)R.", "calls a str"),
        (b"\x80\x02cos\nsystem\nNR.", "calls a Global"),
        (b"\x80\x02}]Ns.", "uses a list as a key"),
        (b"\x80\x02}G\x00\x00\x00\x00\x00\x00\x00\x00Ns.", "uses a float as a key"),
        (b"\x80\x02cos\nsystem\n)\x81}b}b.", "has one already"),
        (b"\x80\x02NQ.", "other than a storage"),
        (b"I01\n.", "instruction INT"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"\x80\x02N2.", "instruction DUP"),
        (b"\x80\x02(cos\nsystem\no.", "instruction OBJ"),
        (b"(ios\nsystem\n.", "instruction INST"),
    ],
)
def test_error_when_a_pickle_is_damaged_or_unusual(data, message):
    with pytest.raises(ValueError, match=message):
        unpickle(data, LIMITS)


def test_error_when_there_are_too_many_instructions():
    data = pickle.dumps(list(range(100)), 2)
    with pytest.raises(ValueError, match="more than 50 instructions"):
        unpickle(data, Limits(max_opcodes=50))


def test_a_record_cannot_be_called():
    assert not callable(Record("os.system", ()))
    assert not callable(Global("os.system"))
