"""Counts the cost of a network from shapes only: FLOPs, operators and sizes of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fusenms.limits import Limits
from fusenms.sources.torch_modules.layers import DetectionModel


class _Cost(TorchDispatchMode):
    """Counts operators and their floating-point operations, and raises ValueError when a limit is exceeded."""

    def __init__(self, most_flops: int, limits: Limits) -> None:
        super().__init__()
        self._left, self._operators, self._limits = most_flops, limits.max_operations, limits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [
            tensor.numel()
            for tensor in (made if isinstance(made, (list, tuple)) else [made])
            if isinstance(tensor, Tensor)
        ]
        self._operators -= 1
        self._left -= sum(sizes)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self._left -= count(*args, **(kwargs or {}), out_val=made)
        if self._operators < 0:
            raise ValueError(f"it runs more than {self._limits.max_operations} operators")
        if self._left < 0:
            raise ValueError(
                f"it takes more than {self._limits.max_flops_per_pixel} operations for each pixel of an image"
            )
        if max(sizes, default=0) > self._limits.max_tensor_elements:
            raise ValueError(
                f"it makes a tensor of {max(sizes)} elements; expected at most {self._limits.max_tensor_elements}"
            )
        return made


def check_cost(network: DetectionModel, side: int, limits: Limits) -> list[tuple[int, ...]]:
    """Run a network on the meta device, with an image ``[1, 3, side, side]``. Return the shapes of its taps, without the batch.

    Raises:
        ValueError: the network exceeds the limits.
    """
    with torch.no_grad(), torch.device("meta"), _Cost(limits.max_flops_per_pixel * side * side, limits):
        taps = network(torch.empty(1, 3, side, side))
    return [tuple(tap.shape[1:]) for tap in taps]
