"""What the doctor finds."""

from __future__ import annotations

import linecache
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KINDS = {
    "control-flow": "choose with torch.where, or loop a fixed number of times; torch.jit.script keeps a branch or a loop",
    "baked-constant": "keep sizes as PyTorch gives them (x.shape, x.size(i)), without int(), math or NumPy between",
    "detached-data": "stay with tensors: no .item(), float(), .tolist(), .numpy() or .data on values of the image",
    "shape-arithmetic": "write h = h // 2 instead of h //= 2: under the tracer, a size is a tensor that others share",
    "fixed-size": "make the tensor at the size of the input (x.new_zeros(x.shape[0], …)), or export at this size only",
    "output-structure": "return a tensor, or a flat tuple of tensors, and name them with output_names",
    "index": "index one dimension after the other, or use torch.gather, torch.scatter or torch.where; the newer exporter takes more",
    "training-mode": "call model.eval() before the export",
    "randomness": "take the random part out, or give its numbers as an input",
    "batch-mixing": "reduce over the channels and places of an image only, never over the first dimension",
    "unsupported-operator": "use other operators, another opset or another exporter",
    "nms-inside": "return the tensors before it: fusenms puts the suppression into the graph",
    "dynamic-dimension": "keep this dimension fixed, or change what the node does",
    "device": "call model.cpu() before the export",
}
"""Kind to its usual remedy."""


@dataclass(frozen=True)
class Place:
    """A line of code; line 0 of an empty file if it is not known."""

    file: str = ""
    line: int = 0

    @property
    def code(self) -> str:
        """The text of the line."""
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}" if self.file else "(place unknown)"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One cause of a bad export: its ``kind`` (of `KINDS`), the place in the user's code, what is wrong, and what to do."""

    kind: str
    file: str
    line: int
    message: str
    remedy: str

    @classmethod
    def at(cls, kind: str, place: Place, message: str, remedy: str = "") -> Finding:
        """A finding at a place; without a ``remedy`` with that of its kind."""
        return cls(kind=kind, file=place.file, line=place.line, message=message, remedy=remedy or KINDS[kind])

    @property
    def place(self) -> Place:
        return Place(self.file, self.line)

    def __str__(self) -> str:
        code = f" `{self.place.code[:100]}`" if self.place.code else ""
        return f"{self.place}{code}: {self.message}; {self.remedy}"

    def to_dict(self) -> dict[str, Any]:
        """Return kind, file, line, message and remedy."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Result: the findings, most certain first, and which dimensions of the export are really dynamic.

    ``dynamic`` maps ``batch`` and ``size`` to what was tried: ``equal``, or why it was not.
    """

    findings: tuple[Finding, ...]
    dynamic: dict[str, str]

    def __bool__(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def __str__(self) -> str:
        lines = [f"{finding.kind:<20} {finding}" for finding in self.findings]
        lines += [f"{'dynamic ' + name:<20} {text}" for name, text in self.dynamic.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the findings and the dimensions."""
        return {"findings": [finding.to_dict() for finding in self.findings], "dynamic": dict(self.dynamic)}
