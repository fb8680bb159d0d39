"""What only the exported file shows: operators that are not exported, and results that differ from PyTorch."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from fusenms.diagnosis.findings import Place
from fusenms.diagnosis.subject import Subject, alike
from fusenms.diagnosis.tracing import Trace
from fusenms.diagnosis.watching import place_of_error
from fusenms.errors import SourceError, UnsupportedOperatorError, first_line
from fusenms.graph.custom_ops import foreign_operators
from fusenms.graph.session import Session
from fusenms.graph.unlike_images import largest_difference
from fusenms.sources.export import FIRST_OPSET_OF_DYNAMO, OPSETS
from fusenms.sources.operators import FUNCTIONS, in_torch_export, in_torchscript, is_declared, is_registered, made_by
from fusenms.sources.quiet import quiet_exporters
from fusenms.sources.unsupported import detail, operator_of, way_out

LIBRARY = (
    "give the library that has it: custom_ops='LIB'; if nothing here runs it, as a TensorRT plugin, declare it with shape=…, and fuse with "
    "unverified=True"
)
FUNCTION = (
    "stay with tensors, or, in an autograd.Function, say what it is in ONNX: fusenms.register_operator(FUNCTION, f) with a function "
    "f(op, *arguments) of ONNX operators"
)
REGISTERED = "correct what fusenms.register_operator was given for it, or forget it with None"


def compare_with_export(subject: Subject, base: Trace) -> None:
    """Export a module, and compare the file with it.

    Args:
        base: its trace.
    """
    try:
        model = _to_onnx(subject.flat, subject.base, subject.opset, subject.sizes)
    except Exception as error:  # exporters raise any error
        _unsupported(subject, base, error)
        return
    _compare_export(subject, base, model)


def _unsupported(subject: Subject, base: Trace, error: Exception) -> None:
    operator = operator_of(error)
    if not operator and subject.explained:
        return  # a consequence
    place = _call_of(subject, base, operator) or place_of_error(error)
    index = "index_put" in str(error) or ("index" in first_line(error).lower() and "index" in operator)
    subject.add(
        "index" if index else "unsupported-operator",
        place if place.file else subject.forward,
        f"{operator or 'the module'} is not exported at opset {subject.opset}{detail(error)}",
        _way_out(subject, operator, index, error),
    )


def _call_of(subject: Subject, base: Trace, operator: str) -> Place | None:
    """The line that calls an operator, in the trace or, where PyTorch calls it by another name there, in a run."""
    traced = next((step.place for step in base.steps if operator and step.kind == operator), None)
    plain = operator.split("::")[-1].strip("_")
    run = (place for known, place in subject.operators.items() if plain and known.split("::")[-1].strip("_") == plain)
    return traced or next(run, None)


def _way_out(subject: Subject, operator: str, index: bool, error: Exception) -> str:
    """What was tried and gives the same as PyTorch, else what the kind of the operator says."""
    if newer := _newer(subject):
        return f"opset {newer} has it: opset={newer}"
    for opset in dict.fromkeys((max(subject.opset, FIRST_OPSET_OF_DYNAMO), OPSETS[-1])):
        if _works(subject, partial(_by_dynamo, subject.flat, subject.base, opset)):
            by_itself = "fuse takes it by itself" if opset == FIRST_OPSET_OF_DYNAMO else f"opset={opset}"
            older = "" if opset == subject.opset else f"; for an older opset: {way_out(operator)}"
            return f"the torch.export-based exporter has it at opset {opset}: {by_itself} (torch.onnx.export(…, dynamo=True)){older}"
    if index:
        return "no opset up to 20 and no exporter of PyTorch takes it: write it with torch.where or torch.scatter"
    return way_out(operator)


def _newer(subject: Subject) -> int | None:
    """A newer opset at which the export gives the same as PyTorch."""
    opsets = (opset for opset in (16, 18, 20) if opset > subject.opset)
    works = (
        opset
        for opset in opsets
        if _works(subject, partial(_to_onnx, subject.flat, subject.base, opset, subject.sizes))
    )
    return next(works, None)


def _works(subject: Subject, make: Callable[[], onnx.ModelProto]) -> bool:
    """Whether an export succeeds and gives the same as PyTorch."""
    try:
        session = Session(make(), source=subject.source)
    except Exception:  # exporters raise any error
        return False
    return _differs(session, subject.base, subject.run(subject.base)) is None


def _compare_export(subject: Subject, base: Trace, model: onnx.ModelProto) -> None:
    try:
        session = Session(model, source=subject.source)
    except UnsupportedOperatorError:
        _not_run(subject, base, foreign_operators(model))
        return
    except SourceError as error:
        subject.add("unsupported-operator", subject.forward, f"ONNX Runtime refuses the export ({first_line(error)})")
        return
    if (reason := _differs(session, subject.base, subject.run(subject.base))) is not None and subject.steady(
        subject.base
    ):
        if _detached(subject, reason):
            return
        events = [event for event in subject.events() if event.name in ("__setitem__", "index_put_")]
        called = next((name for name in subject.operators if is_registered(name)), "")
        if not events and called:
            message = f"the exported file {reason}, and {called.removeprefix(f'{FUNCTIONS}::')} is registered"
            subject.add("unsupported-operator", subject.operators[called], message, REGISTERED)
            return
        if not events and (newer := _newer(subject)):
            message = f"at opset {subject.opset}, the exported file {reason}"
            remedy = f"opset {newer} gives the same as PyTorch: opset={newer}"
            subject.add("unsupported-operator", subject.forward, message, remedy)
            return
        place = events[0].place if events else subject.operators.get("aten::index", subject.forward)
        subject.add(
            "index" if events or "aten::index" in subject.operators else "dynamic-dimension",
            place,
            f"the exported file {reason}",
        )
        return
    subject.dynamic = {"batch": "equal", "size": "equal" if subject.sizes else "not asked for"}
    for respect, words, images in subject.inputs():
        try:
            expected = subject.run(images)
        except Exception:
            subject.dynamic[respect] = f"the module itself does not run {words}"
            continue
        if (reason := _differs(session, images, expected)) is None:
            continue
        if not subject.steady(images):
            if respect in subject.dynamic:
                subject.dynamic[respect] = f"not judged {words}: rounding alone changes the results"
            continue
        if respect in subject.dynamic:
            subject.dynamic[respect] = f"{reason} {words}"
        if respect not in subject.explained and not (respect == "content" and _detached(subject, f"{reason} {words}")):
            subject.add("dynamic-dimension", subject.forward, f"the exported file {reason} {words}", explains=respect)


def _detached(subject: Subject, reason: str) -> bool:
    """Report the first value of the image that became one of Python where no trace looks: in an `autograd.Function`."""
    seen = [event.place for event in subject.events() if event.name in ("numpy", "__array__", "tolist", "item")]
    if not seen:
        return False
    message = f"the exported file {reason}: a value of the image becomes a constant of the export"
    subject.add("detached-data", seen[0], message, FUNCTION, explains="content")
    return True


def _not_run(subject: Subject, base: Trace, operators: Mapping[str, str]) -> None:
    """Report operators that nothing here runs, unless they are declared as such."""
    subject.dynamic = dict.fromkeys(("batch", "size"), f"not run: nothing here runs {', '.join(operators)}")
    for name in operators:
        if not is_declared(name):
            called = made_by(name)
            place = _call_of(subject, base, called) or next(
                (p for known, p in subject.operators.items() if called and known.startswith(f"{FUNCTIONS}::{called}_")),
                subject.forward,
            )
            subject.add(
                "unsupported-operator", place, f"{called} becomes {name}, which ONNX Runtime does not have", LIBRARY
            )


def _to_onnx(module: nn.Module, images: Tensor, opset: int, sizes: bool) -> onnx.ModelProto:
    stream, count = io.BytesIO(), len(module(images))
    names = [f"output{i}" for i in range(count)]
    axes = {"images": {0: "batch"} | ({2: "height", 3: "width"} if sizes else {})} | {
        name: {0: "batch"} for name in names
    }
    with in_torchscript([opset], sizes), quiet_exporters(), torch.no_grad():
        torch.onnx.export(
            module, (images,), cast(Any, stream), dynamo=False, opset_version=opset, input_names=["images"], output_names=names,
            dynamic_axes=axes,
        )  # fmt: skip
    model = onnx.load_from_string(stream.getvalue())
    for entry in model.graph.output:  # sizes that follow from open ones are open too
        entry.type.tensor_type.ClearField("shape")
    return model


def _by_dynamo(module: nn.Module, images: Tensor, opset: int) -> onnx.ModelProto:
    with in_torch_export(lambda: module(images)) as table, quiet_exporters(), torch.no_grad():
        program = torch.onnx.export(
            module, (images,), dynamo=True, opset_version=opset, verbose=False, custom_translation_table=table or None
        )
    assert program is not None
    return program.model_proto


def _differs(session: Session, images: Tensor, expected: list[np.ndarray]) -> str | None:
    """How the file differs from PyTorch, as a clause; None if it does not."""
    if not session.inputs:
        return "does not depend on the image"
    try:
        got = session.run({session.inputs[0]: images.numpy()}, None)
    except SourceError as error:
        node = re.search(r"Name: ?'([^']+)'", str(error))
        return f"does not run{f' at node {node[1]}' if node else ''} ({first_line(error)[:160]})"
    if alike(list(got), expected):
        return None
    found = largest_difference(list(got), expected) if len(got) == len(expected) else None
    return (
        f"differs from PyTorch by {found.absolute:.2g} in output {found.tensor}"
        if found
        else "has other outputs than PyTorch"
    )
