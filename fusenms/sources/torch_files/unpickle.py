"""Reads a pickle as plain data. No class, function or attribute that it names is imported or called.

A pickle is a program for a stack machine. This module runs only the instructions that `torch.save` writes:

1. An import becomes a `Global`, which holds only the name.
2. A call becomes a `Record`, which holds the name and the arguments.

`pickletools` of the standard library decodes the instructions.

Source of the instructions: the comments in CPython's `pickletools.py`.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fusenms.limits import Limits

_LONGEST_INTEGER = 16  # bytes; torch writes at most 8
_TEXT_AND_NUMBERS = frozenset({
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8", "BINSTRING", "SHORT_BINSTRING",
})  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_DICTIONARIES = ("collections.OrderedDict", "builtins.dict", "__builtin__.dict")
_SETS = ("builtins.set", "__builtin__.set", "builtins.frozenset", "__builtin__.frozenset")
_SCALARS = (str, int, bool, type(None))
_LARGEST_KEY = 2**31  # larger integers can be made to collide in a hash table
_PICKLES_OF_THE_OLD_FORMAT = (
    6  # in one file: magic number, version, platform, objects, storages, and one more as a margin
)


@dataclass(frozen=True, slots=True)
class Global:
    """An import that the pickle requests: a name, ``module.attribute``."""

    name: str


@dataclass(slots=True, eq=False)
class Record:
    """A call that the pickle requests: the name, the arguments, and the state that is set afterwards.

    Values that the pickle appends to the object, or sets by key, are dropped.
    """

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage of tensors: the name of its class, its entry in the archive, and its number of elements."""

    kind: str
    key: str
    count: int


class _Mark:
    """Marks the start of a group of values on the stack."""


_MARK = _Mark()


@dataclass(frozen=True, slots=True)
class Unpickled:
    """The content of a pickle.

    Attributes:
        tree: the object tree: dictionaries, lists, tuples, sets, strings, bytes, numbers and None. Everything else is a `Global`, a
            `Record` or a `Storage`.
        names: all names that the pickle requests to import.
        called: the names that it requests to call with arguments.
    """

    tree: Any
    names: frozenset[str]
    called: frozenset[str]


def unpickle(data: bytes, limits: Limits) -> Unpickled:
    """Read a pickle as plain data.

    >>> import pickle, pathlib
    >>> found = unpickle(pickle.dumps({"a": [1, pathlib.PurePosixPath("/etc")]}, 2), Limits())
    >>> found.tree
    {'a': [1, Record(name='pathlib.PurePosixPath', arguments=('/', 'etc'), state=None)]}
    >>> found.names, found.called
    (frozenset({'pathlib.PurePosixPath'}), frozenset({'pathlib.PurePosixPath'}))

    Args:
        data: the pickle, protocol 2 to 5.

    Raises:
        ValueError: the pickle is damaged, uses an instruction that `torch.save` does not write, or exceeds a limit.
    """
    machine = _Machine()
    for name, argument in _instructions(io.BytesIO(data), limits):
        if name != "STOP":
            machine.run(name, argument)
    return Unpickled(machine.result(), frozenset(machine.names), frozenset(machine.called))


def globals_of(data: bytes, limits: Limits) -> set[str]:
    """Names of all imports in a pickle, without running it. Reading stops at the first damaged instruction."""
    found, texts, stream = set[str](), ["", ""], io.BytesIO(data)
    try:
        for _ in range(_PICKLES_OF_THE_OLD_FORMAT):
            for name, argument in _instructions(stream, limits):
                if name in ("GLOBAL", "INST"):
                    found.add(argument.replace(" ", ".", 1))
                elif name == "STACK_GLOBAL":
                    found.add(".".join(texts))
                elif isinstance(argument, str):
                    texts = [texts[1], argument]
    except ValueError:
        pass  # the rest of the data is not a pickle
    return found


def _instructions(stream: io.BytesIO, limits: Limits) -> Iterator[tuple[str, Any]]:
    """Yield the name and the argument of each instruction, up to the end of the pickle.

    Raises:
        ValueError: the pickle is damaged, has too many instructions, or uses one that `torch.save` does not write.
    """
    count = 0
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            count += 1
            if count > limits.max_opcodes:
                raise ValueError(f"the pickle has more than {limits.max_opcodes} instructions")
            if opcode.name in ("LONG4", "LONG", "INT"):  # integers as text or of arbitrary length
                raise ValueError(f"the pickle uses the instruction {opcode.name}, which torch.save does not write")
            yield opcode.name, argument
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        MemoryError,
    ) as error:  # pickletools raises these on damaged data
        raise ValueError(f"the pickle is damaged ({type(error).__name__})") from error


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self.names: set[str] = set()
        self.called: set[str] = set()

    def result(self) -> Any:
        if len(self._stack) != 1:
            raise ValueError("the pickle leaves no value or several values; expected one")
        return self._pop()

    def run(self, name: str, argument: Any) -> None:
        """Run one instruction."""
        if name in _TEXT_AND_NUMBERS:
            if name == "LONG1" and argument.bit_length() > 8 * _LONGEST_INTEGER:
                raise ValueError(f"the pickle has an integer of {argument.bit_length()} bits")
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif (step := getattr(self, f"_run_{name.lower()}", None)) is not None:
            step(argument)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"the pickle uses the instruction {name}, which torch.save does not write")

    def _pop(self) -> Any:
        value = self._stack.pop() if self._stack else _MARK
        if value is _MARK:
            raise ValueError("the pickle takes a value that it has not given")
        return value

    def _pop_group(self) -> list[Any]:
        for position in range(len(self._stack) - 1, -1, -1):
            if self._stack[position] is _MARK:
                group = self._stack[position + 1 :]
                del self._stack[position:]
                return group
        raise ValueError("the pickle takes a group of values that it has not begun")

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise ValueError("the pickle changes a value that it has not given")
        return self._stack[-1]

    def _run_mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def _run_pop(self, _: Any) -> None:
        if not self._stack:
            raise ValueError("the pickle takes a value that it has not given")
        self._stack.pop()

    # The memo.

    def _run_binput(self, position: int) -> None:
        self._memo[position] = self._top()

    _run_long_binput = _run_binput

    def _run_memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._top()

    def _run_binget(self, position: int) -> None:
        if position not in self._memo:
            raise ValueError("the pickle recalls a value that it has not stored")
        self._stack.append(self._memo[position])

    _run_long_binget = _run_binget

    # Containers.

    def _run_empty_dict(self, _: Any) -> None:
        self._stack.append({})

    def _run_empty_list(self, _: Any) -> None:
        self._stack.append([])

    def _run_empty_tuple(self, _: Any) -> None:
        self._stack.append(())

    def _run_empty_set(self, _: Any) -> None:
        self._stack.append(set())

    def _run_tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._pop_group()))

    def _run_tuple1(self, _: Any) -> None:
        self._stack.append((self._pop(),))

    def _run_tuple2(self, _: Any) -> None:
        second, first = self._pop(), self._pop()
        self._stack.append((first, second))

    def _run_tuple3(self, _: Any) -> None:
        third, second, first = self._pop(), self._pop(), self._pop()
        self._stack.append((first, second, third))

    def _run_append(self, _: Any) -> None:
        value = self._pop()
        self._extend([value])

    def _run_appends(self, _: Any) -> None:
        self._extend(self._pop_group())

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Record):
            raise ValueError(f"the pickle appends to a {type(target).__name__}")

    def _run_additems(self, _: Any) -> None:
        values, target = self._pop_group(), self._top()
        if not isinstance(target, set):
            raise ValueError(f"the pickle adds elements to a {type(target).__name__}")
        target.update(_elements(values))

    def _run_setitem(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def _run_setitems(self, _: Any) -> None:
        self._set(self._pop_group())

    def _set(self, pairs: list[Any]) -> None:
        target = self._top()
        if len(pairs) % 2:
            raise ValueError("the pickle sets a key without a value")
        if isinstance(target, dict):
            target.update(zip(_elements(pairs[::2]), pairs[1::2], strict=True))
        elif not isinstance(target, Record):
            raise ValueError(f"the pickle sets a key of a {type(target).__name__}")

    # Imports, calls and states.

    def _run_global(self, argument: str) -> None:
        self._name(argument.replace(" ", ".", 1))

    def _name(self, name: str) -> None:
        self.names.add(name)
        self._stack.append(Global(name))

    def _run_stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("the pickle has an import whose name is not a text")
        self._name(f"{module}.{name}")

    def _run_reduce(self, _: Any) -> None:
        arguments, what = self._pop(), self._pop()
        self._make(what, arguments)

    _run_newobj = _run_reduce

    def _run_newobj_ex(self, _: Any) -> None:
        self._pop()  # keyword arguments
        self._run_reduce(None)

    def _make(self, what: Any, arguments: Any) -> None:
        if not isinstance(what, Global) or not isinstance(arguments, tuple):
            raise ValueError(f"the pickle calls a {type(what).__name__}; expected a name and a tuple of arguments")
        if arguments:
            self.called.add(what.name)
        if what.name in _DICTIONARIES:
            pairs = [pair for group in arguments for pair in group] if _all(list, arguments) else None
            if pairs is None or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
                raise ValueError("the pickle makes a dictionary from something other than pairs")
            self._stack.append(dict(zip(_elements([key for key, _ in pairs]), [v for _, v in pairs], strict=True)))
        elif what.name in _SETS:
            if not _all(list, arguments):
                raise ValueError("the pickle makes a set from something other than a list")
            self._stack.append(set(_elements([value for group in arguments for value in group])))
        elif what.name == "_codecs.encode":  # protocol 2 writes bytes in this way
            if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] != "latin1":
                raise ValueError("the pickle encodes text in an encoding other than latin1")
            self._stack.append(arguments[0].encode("latin1"))
        else:
            self._stack.append(Record(what.name, arguments))

    def _run_build(self, _: Any) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, dict):
            return  # attributes of an OrderedDict, such as the versions in a state dict
        if not isinstance(target, Record) or target.state is not None:
            raise ValueError(
                f"the pickle sets the state of a {type(target).__name__}, which cannot have one or has one already"
            )
        target.state = state

    def _run_binpersid(self, _: Any) -> None:
        match self._pop():
            case ("storage", Global(name=kind), str(key), str(), int(count)) if count >= 0:
                self._stack.append(Storage(kind, key, count))
            case _:
                raise ValueError("the pickle refers to an object other than a storage")


def _all(kind: type, values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, kind) for value in values)


def _elements(values: list[Any]) -> list[Any]:
    """Check keys of a dictionary or elements of a set. Only small scalars are accepted, because others could be slow to hash."""
    if bad := [v for v in values if not isinstance(v, _SCALARS) or (isinstance(v, int) and abs(v) > _LARGEST_KEY)]:
        raise ValueError(f"the pickle uses a {type(bad[0]).__name__} as a key or an element of a set")
    return values
