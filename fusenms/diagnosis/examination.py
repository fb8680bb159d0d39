"""The examination of a module, from what can be seen without a trace to what only the exported file shows."""

from __future__ import annotations

from typing import Any

from torch import nn

from fusenms.diagnosis.export_checks import compare_with_export
from fusenms.diagnosis.findings import Diagnosis
from fusenms.diagnosis.run_checks import check_runs
from fusenms.diagnosis.subject import Size, Subject
from fusenms.diagnosis.trace_checks import compare_traces
from fusenms.errors import ConfigError
from fusenms.sources.export import DEFAULT_OPSET, OPSETS
from fusenms.sources.operators import opaque_functions


def examine(
    module: nn.Module, size: Size, *, sizes: bool = True, source: str = "", opset: int | None = None
) -> Diagnosis:
    """Examine a module that takes images ``[B, 3, height, width]`` float32.

    Args:
        size: height and width of the example, in pixels.
        sizes: also ask whether height and width are dynamic.
        source: name of the module, for errors.
        opset: ONNX operator set of the export; default: that of `fusenms.fuse`.

    Raises:
        ConfigError: the opset is out of its range.
    """
    if opset is not None and opset not in OPSETS:
        raise ConfigError(f"opset is {opset}; expected {OPSETS.start} to {OPSETS.stop - 1}")
    subject = Subject(module, size, sizes, source or type(module).__name__, opset or DEFAULT_OPSET)
    with opaque_functions():
        if check_runs(subject) and (base := compare_traces(subject)) is not None:
            compare_with_export(subject, base)
    return subject.diagnosis()


def check_size(size: Any) -> Size:
    """Check a (height, width) in pixels.

    Raises:
        ConfigError: it is none.
    """
    if (
        not isinstance(size, tuple)
        or len(size) != 2
        or not all(type(side) is int and 0 < side <= 2**14 for side in size)
    ):
        raise ConfigError(f"size is {size!r}; expected (height, width) in pixels")
    return size
