"""Functions of autograd as operators of PyTorch, which no exporter looks into."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from fusenms.sources.operators.registration import (
    FUNCTIONS,
    REGISTERED,
    Registration,
    dtype_of,
    shapes_of,
)

_library: list[Any] = []
_numbers = itertools.count()
TYPES = {bool: "bool", int: "SymInt", float: "float", str: "str"}


def empty(one: Registration, arguments: Sequence[Any]) -> Any:
    """Tensors without values, of the declared shapes and types; a type that is not declared is that of the first tensor."""
    first = next(value for value in arguments if hasattr(value, "new_empty"))
    made = [
        first.new_empty(tuple(shape), dtype=dtype_of(one, i) or first.dtype)
        for i, shape in enumerate(shapes_of(one, arguments))
    ]
    return made[0] if len(made) == 1 else made


@contextmanager
def opaque_functions(made: Callable[[Registration, Any], None] = lambda *_: None) -> Iterator[None]:
    """Run the forward of each registered `autograd.Function` as an operator of PyTorch in this block.

    Args:
        made: called with each operator, when it is made at the first call.
    """
    with ExitStack() as stack:
        for one in REGISTERED.values():
            if one.function is not None:
                stack.enter_context(_attribute(one.function, "forward", staticmethod(_opaque(one, made))))
        yield


def _opaque(one: Registration, made: Callable[[Registration, Any], None]) -> Callable[..., Any]:
    import torch

    real, operators = one.function.forward, dict[tuple[str, ...], Any]()
    takes_context = one.function.setup_context is torch.autograd.Function.setup_context

    def kernel(*arguments: Any) -> Any:
        context = torch.autograd.function.FunctionCtx()
        context.needs_input_grad = (False,) * len(arguments)  # type: ignore[attr-defined]
        with torch.no_grad(), _untraced():
            found = real(context, *arguments) if takes_context else real(*arguments)
            return _fresh(found, arguments)

    def forward(*given: Any) -> Any:
        arguments = given[1:] if takes_context else given
        kinds = tuple(_type_of(value) for value in arguments)
        if kinds not in operators:
            found = kernel(*arguments)
            count = len(found) if isinstance(found, (list, tuple)) else 1
            operators[kinds] = _operator(one, kinds, count, kernel)
            made(one, operators[kinds])
        return operators[kinds](*arguments)

    return functools.wraps(real)(forward)


@contextmanager
def _untraced() -> Iterator[None]:
    """Do not trace what runs in this block."""
    native = native_module()
    state = native._get_tracing_state()
    if state is not None:
        native._set_tracing_state(None)
    try:
        yield
    finally:
        if state is not None:
            native._set_tracing_state(state)


def _type_of(value: Any) -> str:
    import torch

    if isinstance(value, torch.Tensor):
        return "Tensor"
    if isinstance(value, (list, tuple)):
        return f"{_type_of(value[0])}[]" if value else "SymInt[]"
    if value is None:
        return "Tensor?"
    return next((text for kind, text in TYPES.items() if isinstance(value, kind)), "SymInt")


def _operator(one: Registration, kinds: Sequence[str], count: int, kernel: Callable[..., Any]) -> Any:
    """Define an operator of PyTorch that runs a function."""
    import torch

    if not _library:
        _library.append(torch.library.Library(FUNCTIONS, "DEF"))
    name = f"{one.name}_{next(_numbers)}"
    returns = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
    arguments = ", ".join(f"{kind} a{i}" for i, kind in enumerate(kinds))
    _library[0].define(f"{name}({arguments}) -> {returns}")
    _library[0].impl(name, kernel, "CPU")
    fake = (lambda *given: empty(one, given)) if one.shape is not None else kernel
    torch.library.register_fake(f"{FUNCTIONS}::{name}", fake, lib=_library[0])
    return getattr(getattr(torch.ops, FUNCTIONS), name).default


def _fresh(found: Any, given: Sequence[Any]) -> Any:
    """The outputs of a function, copied if they are its inputs, which an operator may not return."""
    if isinstance(found, (list, tuple)):
        return tuple(_fresh(one, given) for one in found)
    return found.clone() if any(found is value for value in given) else found


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a class in this block."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def native_module() -> Any:
    """PyTorch's compiled module, most of whose functions have no stubs."""
    import torch

    return torch._C
