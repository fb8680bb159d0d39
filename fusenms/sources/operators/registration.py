"""What the user registered, and how a registration makes ONNX operators in any exporter."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusenms.errors import BackendUnavailableError, ConfigError

Shape = Callable[..., Sequence[Any]]
"""Maps the arguments of an operator to the shape of its output, or to a list of shapes."""


@dataclass(frozen=True, kw_only=True)
class Registration:
    """A registered operator: its name in PyTorch, or the `autograd.Function` itself, and what it becomes."""

    name: str
    emit: Callable[..., Any]
    shape: Shape | None = None
    dtype: Any = None
    function: Any = None


REGISTERED: dict[Any, Registration] = {}
_made_by: dict[str, Registration] = {}
"""Operators of other domains that were emitted, ``domain::operator``, to their registrations."""
FUNCTIONS = "autograd_functions"
"""Namespace of the operators that functions become."""


def register_operator(
    operator: Any,
    to: str | Callable[..., Any] | None,
    *,
    shape: Shape | None = None,
    dtype: Any = None,
) -> None:
    """Say what an operator of PyTorch becomes in ONNX, for both exporters of PyTorch, in all later exports of this process.

    Args:
        operator: a name, as ``"aten::asinh"`` or ``"mylib::fold"``, or ``torch.ops.mylib.fold``; or a subclass of
            `torch.autograd.Function`.
        to: what it becomes; None: what was registered is forgotten.

            - The name of an ONNX operator, as ``"Asinh"`` or, with a domain, ``"com.example::Fold"``. Tensors become its inputs, in order;
              other arguments become attributes of their names in the schema (or in ``forward``).
            - A function ``f(op, *arguments)`` that makes it from ONNX operators: ``op.Log(x)``, ``op.Resize(x, None, scales,
              mode="cubic")``, or ``op("com.example::Fold", x, outputs=2)``. ``arguments`` are those of the schema, in order: tensors are
              the exporter's, others are plain values. Numbers, lists and arrays among the inputs become constants (int64, float32, or
              the array's type). ``op.opset`` is the opset of the export.
        shape: for an operator that nothing here runs, as a TensorRT plugin: the shape of its output, or a list of shapes, from its
            arguments (tensors have ``.shape``). If ONNX Runtime does not have it, the export is not compared with PyTorch, which is said,
            and can only be fused unverified. The torch.export-based exporter also takes it for the kernel that an operator lacks.
        dtype: with ``shape``: the `torch.dtype` of its output, or a list of them; default: that of the first tensor.

    Raises:
        ConfigError: PyTorch has no such operator, or an argument is invalid.
        BackendUnavailableError: PyTorch is not installed.

    Example:
        >>> import torch, fusenms
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         return torch.hypot(x, x + 1)
        >>> fusenms.doctor(Net(), torch.zeros(1, 3, 64, 64)).findings[0].kind
        'unsupported-operator'
        >>> fusenms.register_operator("aten::hypot", lambda op, a, b: op.Sqrt(op.Add(op.Mul(a, a), op.Mul(b, b))))
        >>> bool(fusenms.doctor(Net(), torch.zeros(1, 3, 64, 64)))
        True
        >>> fusenms.register_operator("aten::hypot", None)
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"register_operator needs PyTorch ({error}); install it with: pip install 'fusenms[export]'"
        ) from error
    function = operator if isinstance(operator, type) and issubclass(operator, torch.autograd.Function) else None
    key = function or _name_of(operator)
    if to is None:
        REGISTERED.pop(key, None)
        return
    if not callable(to) and not (isinstance(to, str) and re.fullmatch(r"([\w.-]+::)?\w+", to)):
        raise ConfigError(
            f"to is {to!r}; expected an ONNX operator, as 'Asinh' or 'com.example::Fold', or a function f(op, *arguments)"
        )
    if shape is not None and not callable(shape):
        raise ConfigError(f"shape is {shape!r}; expected a function of the arguments, as lambda x: x.shape")
    if dtype is not None and shape is None:
        raise ConfigError("found dtype without shape; both are for an operator that nothing here runs")
    if any(not isinstance(one, torch.dtype) for one in several(dtype or ())):
        raise ConfigError(f"dtype is {dtype!r}; expected a torch.dtype, as torch.float32, or a list of them")
    name = function.__name__ if function else str(key)
    names = forward_names(function) if function else None
    emit = to if callable(to) else _node_of(to, names)
    REGISTERED[key] = Registration(name=name, emit=emit, shape=shape, dtype=dtype, function=function)


def is_declared(operator: str) -> bool:
    """Whether a ``domain::operator`` was emitted for a registration that declares its shape: nothing here has to run it."""
    return operator in _made_by and _made_by[operator].shape is not None


def made_by(operator: str) -> str:
    """The name of the registered operator that a ``domain::operator`` was emitted for; empty if there is none."""
    return _made_by[operator].name if operator in _made_by else ""


def is_registered(operator: str) -> bool:
    """Whether an operator of PyTorch is registered, or is the forward of a function that is, as `opaque_functions` makes it."""
    return operator in REGISTERED or operator.startswith(f"{FUNCTIONS}::")


def _name_of(operator: Any) -> str:
    """The name of an operator without its overload.

    Raises:
        ConfigError: PyTorch has none of that name.
    """
    import torch

    name = operator if isinstance(operator, str) else str(getattr(operator, "_qualified_op_name", ""))
    name = name or (
        operator.name() if isinstance(operator, torch._ops.OpOverload) else str(getattr(operator, "_qualname", ""))
    )
    name = name.partition(".")[0]
    native: Any = torch._C
    if "::" in name and native._jit_get_schemas_for_operator(name):
        return name
    known = {schema.name for schema in native._jit_get_all_schemas()}
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
    advice = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
    raise ConfigError(
        f"operator is {name or operator!r}; expected the name of an operator of PyTorch, as 'aten::asinh', or an "
        f"autograd.Function; an operator of a library is there once the library is imported{advice}"
    )


def forward_names(function: Any) -> list[str]:
    """Names of the arguments of a function's forward, without ``ctx``."""
    import torch

    names = list(inspect.signature(function.forward).parameters)
    combined = function.setup_context is torch.autograd.Function.setup_context  # forward takes ctx itself
    return names[1:] if combined else names


def _node_of(to: str, names: list[str] | None) -> Callable[..., Any]:
    """A function that emits one node: tensors are inputs, other arguments attributes. Those of the schema are given by name."""

    def emit(op: Op, *arguments: Any) -> Any:
        called = names or op._names
        attributes = {
            name: value
            for name, value in zip(called, arguments, strict=False)
            if value is not None and not op._is_tensor(value)
        }
        inputs = [value for value in arguments if op._is_tensor(value)]
        return op(to, *inputs, outputs=op._outputs, **attributes)

    return emit


class Op:
    """Emits ONNX operators in an export: ``op.Add(x, 1.0)``, or ``op("com.example::Fold", x, outputs=2, mode="low")``."""

    opset: int

    def __init__(self, names: Sequence[str], outputs: int) -> None:
        self._names, self._outputs, self._emitted = list(names), outputs, set[str]()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not name[:1].isupper():
            raise AttributeError(name)
        return lambda *inputs, **attributes: self(name, *inputs, **attributes)

    def __call__(self, name: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        """Emit a node and return its output, or the list of its ``outputs``."""
        domain, _, kind = name.rpartition("::")
        if domain:
            self._emitted.add(name)
        values = [
            value if value is None or self._is_tensor(value) else self._constant(_array(value)) for value in inputs
        ]
        made = self._node(domain, kind, values, outputs, {k: v for k, v in attributes.items() if v is not None})
        return made[0] if outputs == 1 else made

    def _is_tensor(self, value: Any) -> bool:
        raise NotImplementedError

    def _constant(self, array: np.ndarray) -> Any:
        raise NotImplementedError

    def _node(self, domain: str, kind: str, inputs: list[Any], outputs: int, attributes: dict[str, Any]) -> list[Any]:
        raise NotImplementedError


def emitted(one: Registration, op: Op, arguments: Sequence[Any]) -> Any:
    """What a registration emits; operators of other domains are noted."""
    made = one.emit(op, *arguments)
    _made_by.update(dict.fromkeys(op._emitted, one))
    return made


def _array(value: Any) -> np.ndarray:
    """A constant: numbers and lists of them are int64 or float32, arrays and tensors keep their type."""
    if hasattr(value, "detach"):
        return np.asarray(value.detach().cpu().numpy())
    array = np.asarray(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return array
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def argument_names(one: Registration, schema: Any) -> list[str]:
    """Names of the arguments: those of the function's forward, or those of the schema."""
    return forward_names(one.function) if one.function is not None else [each.name for each in schema.arguments]


def shapes_of(one: Registration, arguments: Sequence[Any]) -> list[Sequence[Any]]:
    """The declared shapes of the outputs.

    Raises:
        ConfigError: the shape function fails, or gives something else.
    """
    assert one.shape is not None
    try:
        found = list(one.shape(*arguments))
        return [tuple(shape) for shape in found] if found and isinstance(found[0], (list, tuple)) else [tuple(found)]
    except Exception as error:  # the user's function can raise any error
        raise ConfigError(
            f"shape of {one.name}: fails ({type(error).__name__}: {error}); expected a function of the arguments, as lambda x: x.shape"
        ) from error


def several(value: Any) -> tuple[Any, ...]:
    """A list as it is, and anything else as one of its own."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def dtype_of(one: Registration, i: int) -> Any:
    """The declared `torch.dtype` of an output; the last one counts for those behind it."""
    kinds = several(one.dtype)
    return kinds[min(i, len(kinds) - 1)]
