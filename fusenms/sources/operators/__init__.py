"""Operators that the user registers for the export: one registration serves both exporters of PyTorch.

An operator of PyTorch has a schema, which says what its arguments are. An `autograd.Function` has none: in an export its ``forward`` is an
operator of PyTorch, made from the types of its arguments, which no exporter looks into.
"""

from __future__ import annotations

from fusenms.sources.operators.functions import opaque_functions
from fusenms.sources.operators.registration import FUNCTIONS, is_declared, is_registered, made_by, register_operator
from fusenms.sources.operators.torch_export import in_torch_export
from fusenms.sources.operators.torchscript import in_torchscript

__all__ = [
    "FUNCTIONS",
    "in_torch_export",
    "in_torchscript",
    "is_declared",
    "is_registered",
    "made_by",
    "opaque_functions",
    "register_operator",
]
