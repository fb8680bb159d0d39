"""`Comparison`: what two runs have in common, and where they part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusenms.comparison.runs import Place
from fusenms.verification.agreement import Agreement


@dataclass(frozen=True, kw_only=True)
class Row:
    """A pair of tensors along the graph of the second target.

    Attributes:
        a, b: the places in both runs.
        error: largest difference, as a share of the largest value; infinite if the shapes differ, or if only one is finite.
        tolerance: how much of that rounding can make.
        state: ``equal``, ``apart``, or ``unstable`` if rounding alone may change most of the tensor.
    """

    a: Place
    b: Place
    error: float
    tolerance: float
    state: str

    def to_dict(self) -> dict[str, Any]:
        """Return both places, error, tolerance and state."""
        return {
            "a": _place(self.a), "b": _place(self.b), "error": self.error, "tolerance": self.tolerance, "state": self.state,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Parting:
    """The first place where two runs part: everything that it is computed from is equal, and its result is not.

    Attributes:
        a, b: the operator in both runs; None where it has no counterpart.
        a_since, b_since: the operators from the last equal tensors up to there, it included.
        error, tolerance: as in `Row`; the error is None if there is nothing to compare it with.
        hints: what the operators themselves differ in: attributes, weights.
        others: further places that part by themselves.
    """

    a: Place | None
    b: Place | None
    a_since: tuple[Place, ...] = ()
    b_since: tuple[Place, ...] = ()
    error: float | None = None
    tolerance: float = 0.0
    hints: tuple[str, ...] = ()
    others: int = 0

    def __str__(self) -> str:
        return " | ".join(f"{side}: {place or 'nothing'}" for side, place in (("A", self.a), ("B", self.b)))

    def to_dict(self) -> dict[str, Any]:
        """Return the places and how far they are apart."""
        return {
            "a": _place(self.a), "b": _place(self.b), "a_since": [_place(one) for one in self.a_since],
            "b_since": [_place(one) for one in self.b_since], "error": self.error, "tolerance": self.tolerance,
            "hints": list(self.hints), "others": self.others,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Result of `fusenms.compare`. It is true if both are equal.

    Attributes:
        a, b: names of the targets.
        images: number of images.
        equal: whether all that was compared is equal.
        parting: the first place where they part; None if they do not, or if there is no such place inside.
        rows: pairs of tensors in the order of ``b``.
        outputs: the outputs in words, each with what became of it.
        tensors: tensors of each, and how many of them are equal to one of the other.
        detections: the detections of both; None if they were not compared.
        notes: what was not compared, and why.
    """

    a: str
    b: str
    images: int
    equal: bool
    parting: Parting | None = None
    rows: tuple[Row, ...] = ()
    outputs: tuple[str, ...] = ()
    tensors: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    detections: Agreement | None = None
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.equal

    def __str__(self) -> str:
        return "\n".join(f"{head:<9} {text}" for head, text in self.lines())

    def lines(self, around: int = 3) -> list[tuple[str, str]]:
        """The result as lines, each with its head; of the rows, those around the first place where they part."""
        lines = [
            (side, f"{name} · {equal} of {count} tensors are equal to one of {other}")
            for side, name, (count, equal), other in zip("AB", (self.a, self.b), self.tensors, "BA", strict=True)
        ]
        lines += [("output", text) for text in self.outputs]
        if self.parting is not None:
            lines += _parting_lines(self.parting)
            lines += [("", line) for line in table(_around(self.rows, self.parting, around))]
        if self.detections is not None:
            found = self.detections
            lines.append(("detect", found.summary.replace("in float32", "of A").replace("now", "of B")))
        lines += [("note", text) for text in self.notes]
        return [*lines, ("EQUAL" if self.equal else "DIFFERS", f"on {self.images} image{'s' * (self.images != 1)}")]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the rows in their short form."""
        return {
            "a": self.a, "b": self.b, "images": self.images, "equal": self.equal,
            "parting": self.parting.to_dict() if self.parting else None,
            "outputs": list(self.outputs),
            "tensors": {side: {"count": n, "equal": k} for side, (n, k) in zip("ab", self.tensors, strict=True)},
            "detections": self.detections.to_dict() if self.detections else None,
            "notes": list(self.notes),
            "rows": [row.to_dict() for row in self.rows],
        }  # fmt: skip


def table(rows: Sequence[Row]) -> list[str]:
    """Rows as lines of a table: state, error, rounding, and the operators of both."""
    lines = [f"{row.state:<8} {_share(row.error):>8} {_share(row.tolerance):>8}  {row.b}  =  {row.a}" for row in rows]
    return [f"{'':<8} {'error':>8} {'rounding':>8}  B  =  A", *lines] if lines else []


def _around(rows: Sequence[Row], parting: Parting, count: int) -> Sequence[Row]:
    at = next((i for i, row in enumerate(rows) if row.state == "apart" and row.b == parting.b), None)
    if at is None and parting.b is not None:
        at = sum(row.b.number < parting.b.number for row in rows)
    if at is None:
        at = next((i for i, row in enumerate(rows) if row.state == "apart"), 0)
    return rows[max(0, at - count) : at + count + 1]


def _parting_lines(found: Parting) -> list[tuple[str, str]]:
    how = f"differs by {_share(found.error or 0)} of its largest value; rounding: up to {_share(found.tolerance)}"
    lines = [("parts", "all before it is equal, and it has no counterpart" if found.error is None else how)]
    for side, place, since in (("A", found.a, found.a_since), ("B", found.b, found.b_since)):
        if place is None:
            lines.append((f"parts {side}", " → ".join(map(str, since)) or "nothing stands there"))
            continue
        module = f" · module {place.module}" if place.module else f" · tensor {place.name}"
        more = f" (since the last equal tensors: {' → '.join(map(str, since))})" if len(since) > 1 else ""
        lines.append((f"parts {side}", f"{place}{module}{more}"))
    lines += [("hint", text) for text in found.hints]
    if found.others:
        lines.append(("", f"and {found.others} more that part by themselves, or are computed otherwise"))
    return lines


def _share(value: float) -> str:
    return f"{value:.1e}"


def _place(place: Place | None) -> dict[str, Any] | None:
    if place is None:
        return None
    return {"tensor": place.name, "operator": place.operator, "node": place.node, "module": place.module}
