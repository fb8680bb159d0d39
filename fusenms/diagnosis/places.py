"""Places in the user's code: where a class, its forward or its return stands, and the statement that a line belongs to."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from pathlib import Path

from torch import nn

from fusenms.diagnosis.findings import Place


def class_place(module: nn.Module) -> Place:
    """The line where the class of a module begins."""
    try:
        return Place(inspect.getsourcefile(type(module)) or "", inspect.getsourcelines(type(module))[1])
    except (OSError, TypeError):
        return Place()


def forward_place(module: nn.Module) -> Place:
    """The line where its forward begins."""
    try:
        return Place(inspect.getsourcefile(type(module).forward) or "", inspect.getsourcelines(type(module).forward)[1])
    except (OSError, TypeError):
        return class_place(module)


def return_place(module: nn.Module) -> Place | None:
    """The line of the last return of its forward; None if there is none."""
    forward = forward_place(module)
    inside = [
        node
        for node in ast.walk(_tree(forward.file))
        if isinstance(node, ast.FunctionDef) and node.lineno == forward.line
    ]
    returns = [node for function in inside for node in ast.walk(function) if isinstance(node, ast.Return)]
    return Place(forward.file, returns[-1].lineno) if returns else None


@cache
def _tree(file: str) -> ast.AST:
    try:
        return ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])


def statement_of(place: Place) -> ast.AST | None:
    """The branch or loop whose condition or range is on a line, if there is one; else None."""
    for node in ast.walk(_tree(place.file)):
        if isinstance(node, (ast.If, ast.While, ast.Assert, ast.IfExp)):
            condition: ast.AST = node.test
        elif isinstance(node, (ast.For, ast.comprehension)):
            condition = node.iter
        else:
            continue
        if condition.lineno <= place.line <= (condition.end_lineno or 0):  # type: ignore[attr-defined]
            return node
    return None


def branch_of(place: Place) -> Place | None:
    """The line of the innermost branch or loop around a line."""
    around = [
        node
        for node in ast.walk(_tree(place.file))
        if isinstance(node, (ast.If, ast.While, ast.For)) and node.lineno <= place.line <= (node.end_lineno or 0)
    ]
    return Place(place.file, max(node.lineno for node in around)) if around else None


def function_of(place: Place) -> tuple[str, int]:
    """The file and the line of the innermost function around a line."""
    around = [
        node.lineno
        for node in ast.walk(_tree(place.file))
        if isinstance(node, (ast.FunctionDef, ast.Lambda)) and node.lineno <= place.line <= (node.end_lineno or 0)
    ]
    return place.file, max(around, default=0)
