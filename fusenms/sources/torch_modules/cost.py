"""Counts the cost of a network from shapes only: FLOPs, operators and sizes of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fusenms.limits import Limits
from fusenms.sources.torch_modules.layers import DetectionModel

_ATEN = torch.ops.aten
_POINTWISE = frozenset(
    (_ATEN.silu, _ATEN.silu_, _ATEN.relu, _ATEN.relu_, _ATEN.leaky_relu, _ATEN.leaky_relu_, _ATEN.hardswish, _ATEN.hardswish_, _ATEN.gelu,
     _ATEN.sigmoid, _ATEN.exp, _ATEN.add, _ATEN.add_, _ATEN.sub, _ATEN.rsub, _ATEN.mul, _ATEN.mul_, _ATEN.div)
)  # fmt: skip


def _made(func: Any, args: Any) -> Tensor | tuple[Tensor, ...] | None:
    """What the most frequent operators give, from shapes; None for others.

    PyTorch's own kernels for these on the meta device import its compiler, which takes a second.
    """
    packet = func._overloadpacket
    if packet is _ATEN.native_batch_norm:
        return torch.empty_like(args[0]), *(torch.empty(0, device="meta") for _ in range(2))
    tensors = args[0] if packet is _ATEN.cat else [value for value in args if isinstance(value, Tensor)]
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        return None
    if packet is _ATEN.cat:
        shape, dim = list(tensors[0].shape), args[1] if len(args) > 1 else 0
        shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
        alike = all(
            [*tensor.shape[:dim], *tensor.shape[dim:][1:]] == [*shape[:dim], *shape[dim:][1:]] for tensor in tensors
        )
        return torch.empty(shape, device="meta") if alike else None
    if packet not in _POINTWISE:
        return None
    if func._schema.is_mutable:
        return args[0]  # type: ignore[no-any-return]
    return torch.empty(torch.broadcast_shapes(*(tensor.shape for tensor in tensors)), device="meta")


class _Cost(TorchDispatchMode):
    """Counts operators and their floating-point operations, and raises ValueError when a limit is exceeded."""

    def __init__(self, most_flops: int, limits: Limits) -> None:
        super().__init__()
        self._left, self._operators, self._limits = most_flops, limits.max_operations, limits

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled here, and PyTorch's compiler, which the answer yes imports, takes a second to import."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = _made(func, args)
        if made is None:
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
