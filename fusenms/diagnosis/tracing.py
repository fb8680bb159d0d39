"""Traces a module, and compares two traces: what differs between them is what the tracer has made constant.

A trace writes down operators, sizes as operators too, and everything else as constants. Two traces of a module, for inputs that differ in
one respect (the content, the batch or the size), are the same, unless something that depends on it was taken as a constant. Each node of a
trace knows the line of code that it came from.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusenms.diagnosis.findings import Place
from fusenms.diagnosis.watching import OURS, Event, Watch

_PLACE = re.compile(r"^(.+)\((\d+)\): ")


@dataclass(frozen=True)
class Step:
    """A node of a trace: its operator, the line that it came from, and its value if it is a constant."""

    kind: str
    place: Place
    value: str = ""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A traced module, its nodes, and what `Watch` saw."""

    module: Any
    steps: tuple[Step, ...]
    events: tuple[Event, ...]


class TraceError(Exception):
    """A module that runs cannot be traced; ``events`` is what `Watch` saw until then."""

    def __init__(self, events: tuple[Event, ...]) -> None:
        super().__init__("the module cannot be traced")
        self.events = events


def trace(module: nn.Module, images: Tensor) -> Trace:
    """Trace a module.

    Raises:
        TraceError: it cannot be traced.
    """
    watch = Watch()
    try:
        with warnings.catch_warnings(), torch.no_grad(), watch:
            warnings.simplefilter("ignore")
            traced: Any = torch.jit.trace(module, (images,), check_trace=False)  # type: ignore[no-untyped-call]
    except Exception as error:  # the module, and PyTorch, can raise any error
        raise TraceError(tuple(watch.events)) from error
    return Trace(module=traced, steps=tuple(_steps(traced.inlined_graph)), events=tuple(watch.events))


def _steps(graph: Any) -> Iterator[Step]:
    for node in graph.nodes():
        constant = node.kind() == "prim::Constant"
        if node.kind() in ("prim::GetAttr", "prim::CallMethod"):
            continue
        yield Step(node.kind(), _place(node.sourceRange()), _text(node.output().toIValue()) if constant else "")
        for block in node.blocks():
            yield from _steps(block)


def _text(value: Any) -> str:
    """A constant as text; a tensor by its shape and some statistics."""
    if isinstance(value, Tensor):
        wide = value.detach().double().flatten()
        some = [float(wide.sum()), float((wide * torch.arange(1, 1 + wide.numel())).sum())] if wide.numel() else []
        return f"{value.dtype}{list(value.shape)} {some}"
    return repr(value)


def _place(source: str) -> Place:
    """The innermost line of the user in the call stack of a node."""
    for line in source.splitlines():
        if (found := _PLACE.match(line)) and not found[1].startswith(OURS):
            return Place(found[1], int(found[2]))
    return Place()


@dataclass(frozen=True)
class Change:
    """Where two traces part: at a constant, or in their operators (``structure``)."""

    place: Place
    structure: bool


def changes(one: Trace, two: Trace) -> list[Change]:
    """List the constants that differ, each place once; a difference in the operators ends the list."""
    found = list[Change]()
    for a, b in zip(one.steps, two.steps, strict=False):
        if (a.kind, a.place) != (b.kind, b.place):
            return [*found, Change(a.place if a.place.line else b.place, True)]
        if a.value != b.value and Change(a.place, False) not in found:
            found.append(Change(a.place, False))
    if len(one.steps) != len(two.steps):
        rest = max(one.steps, two.steps, key=len)[min(len(one.steps), len(two.steps)) :]
        found.append(Change(next((step.place for step in rest if step.place.line), Place()), True))
    return found


def conversions(one: Trace, two: Trace) -> list[Event]:
    """List the conversions whose values differ between two traces, each place once."""
    by_place: dict[tuple[str, Place], list[list[Any]]] = {}
    for i, events in enumerate((one.events, two.events)):
        for event in events:
            if event.value is not None:
                by_place.setdefault((event.name, event.place), [[], []])[i].append(event.value)
    return [Event(name, place, values[0][:1]) for (name, place), values in by_place.items() if values[0] != values[1]]
