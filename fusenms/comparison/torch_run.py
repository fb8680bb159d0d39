"""`TorchRun`: a PyTorch module, whose operators are written down with the modules that call them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from fusenms.artifacts.preprocessing import PIXELS, Pixels
from fusenms.comparison.runs import BFLOAT16, FLOAT16, FLOAT32, IMAGES, Place, Read
from fusenms.errors import SourceError, first_line
from fusenms.sources.module import flattened

UNITS = {torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
MOVING = (
    *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "slice", "select", "split", "split_with_sizes", "chunk", "unbind"),
    *("cat", "stack", "expand", "unsqueeze", "squeeze", "clone", "contiguous", "alias", "detach", "index", "gather", "flatten"),
)  # fmt: skip
"""Operators that only move values; those are not jittered."""


class TorchRun:
    """A PyTorch module as a `Run`. Its operators are those that PyTorch dispatches, so that a functional call is a place too."""

    jitters = True

    def __init__(
        self,
        module: nn.Module,
        *,
        source: str,
        size: tuple[int, int],
        outputs: Sequence[str] = (),
        pixels: Pixels = PIXELS["rgb"],
    ) -> None:
        """Watch a module.

        Args:
            module: takes images ``[B, 3, height, width]``, in evaluation mode, on the CPU.
            size: height and width of the images, in pixels.
            outputs: names of what it returns; default: those that `flattened` gives.
            pixels: what it expects; it is given RGB from 0 to 1.

        Raises:
            SourceError: it does not run.
        """
        self.source, self.module, self._pixels = source, module, pixels
        kinds = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
        self._dtype = next(iter(kinds)) if len(kinds) == 1 else torch.float32
        self.unit = UNITS.get(self._dtype, FLOAT32)
        tape = _Tape()
        found = self._run(np.full((1, 3, *size), 0.5, np.float32), tape)
        self.places, self._bytes = tape.places, tape.bytes
        self.readable = [place.number for place in self.places[1:]]
        named = flattened(found)[0]
        names = outputs if len(outputs) == len(named) else list(named)
        numbers = (tape.numbers.get(value) for value in named.values())
        self.outputs = {name: number for name, number in zip(names, numbers, strict=True) if number is not None}

    def bytes_of(self, number: int) -> int:
        return self._bytes[number]

    def reader(self, numbers: Sequence[int], jitter: float = 0.0) -> Read:
        def read(image: np.ndarray) -> list[np.ndarray]:
            tape = _Tape(set(numbers), jitter)
            self._run(image, tape)
            if [place.operator for place in tape.places] != [place.operator for place in self.places]:
                raise SourceError(
                    f"{self.source}: runs other operators for another image, so its tensors cannot be compared; "
                    "fusenms doctor looks for the line of code"
                )
            tape.values[IMAGES] = image
            return [tape.values[number] for number in numbers]

        return read

    def _run(self, image: np.ndarray, tape: _Tape) -> Any:
        images = torch.from_numpy(np.ascontiguousarray(self._pixels.apply(image))).to(self._dtype)
        tape.numbers[images] = IMAGES
        try:
            with torch.no_grad(), _paths(self.module, tape), tape:
                return self.module(images)
        except Exception as error:  # the module can raise any error
            raise SourceError(
                f"{self.source}: does not run on {list(image.shape)} ({type(error).__name__}: {first_line(error)})"
            ) from error


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down operators whose inputs depend on the images, and the values of some."""

    def __init__(self, wanted: set[int] | None = None, jitter: float = 0.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places = [Place(number=IMAGES, name="images")]
        self.bytes = [0]
        self.numbers: Any = WeakIdKeyDictionary()
        self.values: dict[int, np.ndarray] = {}
        self.path = [""]
        self._wanted, self._jitter = wanted or set(), jitter
        self._random = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        inputs = tuple(dict.fromkeys(self.numbers[one] for one in given if one in self.numbers))
        result = func(*args, **(kwargs or {}))
        if inputs:
            name = (func.name() if hasattr(func, "name") else str(func)).split(".")[0]
            for value in tree_leaves(result):
                if isinstance(value, Tensor) and value.numel():
                    self._keep(value, name, inputs)
        return result

    def _keep(self, value: Tensor, operator: str, inputs: tuple[int, ...]) -> None:
        number, path = len(self.places), self.path[-1]
        if self._jitter and value.is_floating_point() and operator.removeprefix("aten::").rstrip("_") not in MOVING:
            noise = torch.rand(value.shape, generator=self._random, dtype=torch.float32)
            value.mul_((1 + self._jitter * (2 * noise - 1)).to(value.dtype))
        self.numbers[value] = number
        self.places.append(
            Place(number=number, name=f"{path or 'forward'}#{number}", operator=operator, module=path, inputs=inputs)
        )
        self.bytes.append(4 * math.prod(value.shape))
        if number in self._wanted:
            kept = value.detach()
            self.values[number] = (kept.float() if kept.dtype == torch.bfloat16 else kept).numpy().copy()


@contextmanager
def _paths(module: nn.Module, tape: _Tape) -> Iterator[None]:
    """Tells the tape which module runs."""
    names: dict[int, list[str]] = {}
    for name, inner in module.named_modules(remove_duplicate=False):
        names.setdefault(id(inner), []).append(name)
    handles = []
    for inner in module.modules():
        if isinstance(inner, torch.jit.ScriptModule):
            continue

        def enter(inner: nn.Module, _: Any) -> None:  # of a module with several paths, the one below its caller
            every, caller = names[id(inner)], tape.path[-1]
            tape.path.append(next((name for name in every if caller and name.startswith(f"{caller}.")), every[0]))

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            tape.path.pop()

        handles += [inner.register_forward_pre_hook(enter), inner.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
