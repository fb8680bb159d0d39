"""What traces with other inputs show: other ways through the module, and constants that should not be ones."""

from __future__ import annotations

import ast

import numpy as np
import torch
from torch import Tensor

from fusenms.diagnosis.places import branch_of, function_of, statement_of
from fusenms.diagnosis.subject import Subject, alike, tensors
from fusenms.diagnosis.tracing import Change, Trace, TraceError, changes, conversions, trace
from fusenms.diagnosis.watching import Event, place_of_error
from fusenms.errors import first_line


def compare_traces(subject: Subject) -> Trace | None:
    """Compare the trace of a module with traces for other inputs. Return it; None if it is no trace of the module at all."""
    try:
        base = trace(subject.flat, subject.base)
    except TraceError as error:
        _untraced(subject, error)
        return None
    if not alike(_traced(base, subject.base), subject.run(subject.base)):
        place = next((event.place for event in base.events if event.name == "shape"), subject.forward)
        subject.add(
            "shape-arithmetic",
            place,
            "the trace gives another result than the module for the same image: a size is changed in place",
        )
        return None
    for respect, words, images in subject.inputs():
        try:
            expected = subject.run(images)
        except Exception as error:
            if respect != "content":
                place = place_of_error(error)
                subject.add(
                    "fixed-size", place, f"the module does not run {words} ({first_line(error)})", explains=respect
                )
            continue
        try:
            other = trace(subject.flat, images)
        except TraceError:
            continue
        same = alike(_traced(base, images), expected) or not subject.steady(images)
        if _parted(subject, base, other, respect, words, same):
            subject.explained.add(respect)
        elif respect not in subject.explained and not same:
            subject.add("baked-constant", subject.forward, f"the trace gives another result {words}", explains=respect)
    return base


def _untraced(subject: Subject, error: TraceError) -> None:
    cause = error.__cause__ or error
    shape = next((event.place for event in error.events if event.name == "shape"), None)
    if shape is not None:
        subject.add("shape-arithmetic", shape, f"the module runs, but its trace does not ({first_line(cause)})")
        return
    subject.add("unsupported-operator", place_of_error(cause), f"the module cannot be traced ({first_line(cause)})")


def _traced(base: Trace, images: Tensor) -> list[np.ndarray]:
    try:
        with torch.no_grad():
            return tensors(base.module(images))
    except Exception:  # the trace does not run on them
        return []


def _parted(subject: Subject, base: Trace, other: Trace, respect: str, words: str, same: bool) -> bool:
    """Report what two traces made constant. Return whether there was anything.

    Where the first trace gives the ``same`` as the module for the inputs of the second, only a branch that hangs on values counts.
    """
    parted, causes = changes(base, other), conversions(base, other)
    if not parted or same:
        causes = [event for event in causes if event.name == "compare" and statement_of(event.place) is not None]
        parted = []
        if respect != "content" or not causes:
            return False
    for event in causes:
        _conversion(subject, event, respect, words)
    functions = {function_of(event.place) for event in causes}
    for change in parted:
        if function_of(change.place) not in functions:
            _change(subject, change, base, respect, words)
            functions.add(function_of(change.place))
    return True


def _conversion(subject: Subject, event: Event, respect: str, words: str) -> None:
    what = {"__bool__": "bool", "__int__": "int", "__float__": "float", "__index__": "index", "__len__": "len"}
    statement = statement_of(event.place)
    if event.name == "compare" and statement is None:
        return  # compared, but nothing hangs on it
    if isinstance(statement, (ast.If, ast.While, ast.IfExp, ast.For, ast.Assert, ast.comprehension)):
        way = "hangs on a value of the image" if event.name == "compare" else f"takes another way {words}"
        subject.add("control-flow", event.place, f"{way}, and the export keeps one way")
    elif respect == "content":
        name = what.get(event.name, f".{event.name}()")
        subject.add(
            "detached-data",
            event.place,
            f"a value of the image becomes a number of Python ({name}), which the export keeps",
        )
    else:
        name = what.get(event.name, event.name)
        subject.add(
            "baked-constant",
            event.place,
            f"a size becomes a number of Python ({name}), which is another one {words}",
        )


def _change(subject: Subject, change: Change, base: Trace, respect: str, words: str) -> None:
    if change.structure:
        place = branch_of(change.place) or change.place
        subject.add("control-flow", place, f"the operators differ {words}, and the export keeps one way")
    elif respect == "content":
        detached = [event.place for event in base.events if event.name in ("data", "numpy", "__array__", "tolist")]
        near = [place for place in detached if function_of(place) == function_of(change.place)]
        subject.add(
            "detached-data",
            near[0] if near else change.place,
            "a value of the image becomes a constant of the export",
        )
    else:
        subject.add("baked-constant", change.place, f"holds a constant that is another one {words}")
