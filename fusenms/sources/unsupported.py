"""Which operator an exporter does not take, where the module calls it, and what to do."""

from __future__ import annotations

import os
import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from fusenms.errors import first_line
from fusenms.sources import operators
from fusenms.sources.parity import Baked

_TORCHVISION = find_spec("torchvision")
OURS = (
    str(Path(torch.__file__).parent) + os.sep,
    str(Path(operators.__file__).parent) + os.sep,
    *([str(Path(_TORCHVISION.origin).parent) + os.sep] if _TORCHVISION is not None and _TORCHVISION.origin else []),
)
"""Code that is never the user's."""

NO_FORMULA = re.compile(
    r"aten::(_?linalg_(svd|svdvals|eigh?|eigvalsh?|qr|lu\w*|ldl\w*|cholesky\w*|inv\w*|solve\w*|lstsq|pinv|matrix_rank|matrix_exp)"
    r"|_?(svd|symeig|eig|qr|geqrf|cholesky\w*|inverse|lstsq|lu\w*|triangular_solve|linalg_svd|linalg_eigh))"
)
"""Operators of PyTorch that iterate over a matrix: ONNX has none, and no fixed number of its operators computes one."""
NO_WAY_OUT = (
    "no way out: ONNX has no such operator, and no fixed number of its operators computes it; leave it out of the module, or compute it "
    "outside"
)
MOST_NAMES = 7
"""Arguments of an operator that are all named in a remedy."""
_NAMED = (
    re.compile(r"operator '((?:\w+::)?\w+)'"),
    re.compile(r"namespace (\w+::\w+)"),
    re.compile(r"operator ((?:\w+::)?[a-z]\w+)"),
    re.compile(r"\b(\w+::\w+)"),
)
_SINCE = re.compile(r"added in version (\d+)")
_TRACED = re.compile(r"^(?:.* )?(/.+|[A-Za-z]:\\.+)\((\d+)\): ", re.M)


def operator_of(error: BaseException) -> str:
    """The operator that an exporter's error names, as ``aten::asinh``; empty if it names none."""
    text = str(error)
    found = next((match[1] for pattern in _NAMED if (match := pattern.search(text))), "")
    return found if "::" in found or not found else f"aten::{found}"


def call_of(module: nn.Module, images: Tensor, operator: str, error: BaseException) -> tuple[str, int]:
    """File and line of the innermost code outside of PyTorch that calls an operator; an empty file if it is not known."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            traced: Any = torch.jit.trace(module, (images,), check_trace=False)  # type: ignore[no-untyped-call]
        for node in traced.inlined_graph.nodes():
            if node.kind().removesuffix("_") == operator.removesuffix("_") and (
                place := _innermost(node.sourceRange())
            ):
                return place
    except Exception:  # the module, and PyTorch, can raise any error
        pass
    return _innermost(str(error)) or ("", 0)


def _innermost(stack: str) -> tuple[str, int] | None:
    return next(
        (
            (file, int(line))
            for file, line in _TRACED.findall(stack)
            if not file.startswith(OURS) and Path(file).is_file()
        ),
        None,
    )


def way_out(operator: str, error: BaseException | None = None) -> str:
    """What to do about an operator, by its kind, as far as it is known without trying."""
    if since := _SINCE.search(str(error or "")):
        return f"opset {since[1]} has it: opset={since[1]}"
    if NO_FORMULA.fullmatch(operator):
        return NO_WAY_OUT
    if not operator:
        return "use other operators, another opset or another exporter"
    if same := _same_in_onnx(operator):
        return f"ONNX has it: fusenms.register_operator({operator!r}, {same!r})"
    names = _arguments(operator)
    called = ", ".join(["op", *names] if len(names) <= MOST_NAMES else ["op", *names[:2], "*others"])
    formula = f"fusenms.register_operator({operator!r}, lambda {called}: …)"
    if operator.startswith("aten::"):
        return f"write it with other operators in the module, or with those of ONNX: {formula}"
    return (
        f"say what it is in operators of ONNX: {formula}, or in a node that a custom-op library or a TensorRT plugin runs: "
        f"fusenms.register_operator({operator!r}, 'com.example::NAME')"
    )


def _same_in_onnx(operator: str) -> str:
    """The ONNX operator of one tensor that is called as one of PyTorch is; empty if there is none."""
    name = operator.partition("::")[2] if operator.startswith("aten::") else ""
    return next(
        (
            each.name
            for each in onnx.defs.get_all_schemas()
            if each.domain == "" and len(each.inputs) == 1 and not each.attributes and each.name.lower() == name
        ),
        "",
    )


def _arguments(operator: str) -> list[str]:
    native: Any = torch._C
    schemas = native._jit_get_schemas_for_operator(operator)
    names = [argument.name for argument in schemas[0].arguments] if schemas else ["x"]
    return ["x" if name == "self" else name for name in names]


def described(module: nn.Module, images: Tensor, error: BaseException, opset: int) -> str:
    """The operator of an exporter's error with the line that calls it and the way out, as a clause; else the error's first line."""
    operator = operator_of(error)
    if not operator:
        return first_line(error)
    file, line = call_of(module, images, operator, error)
    what = f"{operator} is not exported at opset {opset}{detail(error)}; {way_out(operator, error)}"
    return str(Baked(file, line, what)) if file else what


def detail(error: BaseException) -> str:
    """What an error says beyond that an operator is not exported, in parentheses."""
    plain = isinstance(error, torch.onnx.errors.UnsupportedOperatorError) or "unrecognized namespace" in str(error)
    return "" if plain else f" ({first_line(error)[:160]})"


def deepest(error: BaseException) -> BaseException:
    """The error that the others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
