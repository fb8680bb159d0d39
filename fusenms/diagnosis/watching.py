"""Writes down, with the line of the user's code, what a trace does not keep: conversions, random numbers, changes in place."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from fusenms.diagnosis.findings import Place
from fusenms.sources import unsupported

OURS = (*unsupported.OURS, str(Path(__file__).parent) + os.sep)
CONVERSIONS = ("__bool__", "__int__", "__float__", "__index__", "__len__", "__array__", "item", "tolist", "numpy")
COMPARISONS = ("__gt__", "__lt__", "__ge__", "__le__", "__eq__", "__ne__", "gt", "lt", "ge", "le", "eq", "ne")
RANDOM = (
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "bernoulli_", "multinomial"),
    *("normal", "normal_", "uniform_", "dropout", "dropout2d", "dropout1d", "dropout3d", "alpha_dropout", "feature_dropout"),
)  # fmt: skip
IN_PLACE = (
    "__iadd__",
    "__isub__",
    "__imul__",
    "__ifloordiv__",
    "__itruediv__",
    "add_",
    "sub_",
    "mul_",
    "div_",
    "floor_divide_",
)


@dataclass(frozen=True)
class Event:
    """A call of the user's code: what, where, and the value that came out (of conversions only)."""

    name: str
    place: Place
    value: Any = None


class Watch(TorchFunctionMode):
    """Records `Event`s of what runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = (resolve_name(func) or getattr(func, "__name__", "")).removesuffix(".__get__").rpartition(".")[2]
        if name in CONVERSIONS:
            self.events.append(Event(name, user_place(), _plain(result)))
        elif name in COMPARISONS and isinstance(result, Tensor) and result.ndim == 0 and len(args) == 2:
            with torch._C.DisableTorchFunction():
                values = [_number(value) for value in args]
            self.events.append(Event("compare", user_place(), str(values)))
        elif name in RANDOM or name == "data" or name in ("__setitem__", "index_put_"):
            self.events.append(Event(name, user_place()))
        elif name in IN_PLACE and isinstance(args[0], Tensor) and args[0].ndim == 0 and not args[0].is_floating_point():
            self.events.append(Event("shape", user_place()))
        return result


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the first place of each operator that runs under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: dict[str, Place] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = (func.name() if hasattr(func, "name") else str(func)).split(".")[0]
        if name not in self.places:
            self.places[name] = user_place()
        return func(*args, **(kwargs or {}))


def user_place() -> Place:
    """The innermost line of code that is neither PyTorch's nor the doctor's."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(OURS) and not file.startswith("<"):
            return Place(file, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return Place()


def place_of_error(error: BaseException) -> Place:
    """The innermost line of code in an error's traceback that is neither PyTorch's nor the doctor's."""
    found, step = Place(), error.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if not file.startswith(OURS) and not file.startswith("<"):
            found = Place(file, step.tb_lineno)
        step = step.tb_next
    return found


def _number(value: Any) -> Any:
    return float(value.detach()) if isinstance(value, Tensor) and value.ndim == 0 else str(value)[:50]


def _plain(value: Any) -> Any:
    """A value that can be compared; arrays and lists by their text."""
    return value if isinstance(value, (bool, int, float)) else str(value)[:200]
