"""`doctor`: why a module does not export well, with the line of code and what to do. Shown by behavior, not by reading the code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusenms.diagnosis.findings import KINDS, Diagnosis, Finding, Place
from fusenms.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["KINDS", "Diagnosis", "Finding", "Place", "doctor"]


def doctor(module: nn.Module, example: Tensor, *, sizes: bool = True, opset: int = 17) -> Diagnosis:
    """Examine how a module exports to ONNX.

    The module is run, traced and exported for inputs that differ in one respect each: the content of the image, the batch, the size. What
    differs between two traces was made constant; what differs between the export and PyTorch is not dynamic. Weights are not changed.

    Args:
        module: takes images ``[B, 3, height, width]`` float32.
        example: such images; their size is the one that the others are derived from.
        sizes: whether height and width have to be dynamic.
        opset: ONNX operator set of the export, 13 to 20.

    Raises:
        ConfigError: the example is none, or the opset is out of its range.
        SourceError: the module does not run on images of the example's size.

    Example:
        >>> import torch, fusenms
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x * x.max().item()
        >>> fusenms.doctor(Net(), torch.zeros(1, 3, 64, 64)).findings[0].kind
        'detached-data'
        >>> bool(fusenms.doctor(torch.nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 64, 64)))
        True
    """
    import torch

    from fusenms.diagnosis.examination import examine

    if not isinstance(module, torch.nn.Module):
        raise ConfigError(f"module is a {type(module).__name__}; expected an nn.Module")
    found: Any = example
    if not isinstance(found, torch.Tensor) or found.ndim != 4 or found.shape[1] != 3:
        what = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ConfigError(f"example is {what}; expected a tensor [batch, 3, height, width]")
    return examine(module, (int(found.shape[2]), int(found.shape[3])), sizes=sizes, opset=opset)
