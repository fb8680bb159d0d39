"""Operators that the user registers for the export: one registration serves both exporters of PyTorch.

An operator of PyTorch has a schema, which says what its arguments are. An `autograd.Function` has none: in an export its ``forward`` is an
operator of PyTorch, made from the types of its arguments, which no exporter looks into.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

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


_registered: dict[Any, Registration] = {}
_library: list[Any] = []
_numbers = itertools.count()
_made_by: dict[str, Registration] = {}
"""Operators of other domains that were emitted, ``domain::operator``, to their registrations."""
FUNCTIONS = "autograd_functions"
"""Namespace of the operators that functions become."""
TYPES = {bool: "bool", int: "SymInt", float: "float", str: "str"}


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
        _registered.pop(key, None)
        return
    if not callable(to) and not (isinstance(to, str) and re.fullmatch(r"([\w.-]+::)?\w+", to)):
        raise ConfigError(
            f"to is {to!r}; expected an ONNX operator, as 'Asinh' or 'com.example::Fold', or a function f(op, *arguments)"
        )
    if shape is not None and not callable(shape):
        raise ConfigError(f"shape is {shape!r}; expected a function of the arguments, as lambda x: x.shape")
    if dtype is not None and shape is None:
        raise ConfigError("found dtype without shape; both are for an operator that nothing here runs")
    if any(not isinstance(one, torch.dtype) for one in _several(dtype or ())):
        raise ConfigError(f"dtype is {dtype!r}; expected a torch.dtype, as torch.float32, or a list of them")
    name = function.__name__ if function else str(key)
    names = _forward_names(function) if function else None
    emit = to if callable(to) else _node_of(to, names)
    _registered[key] = Registration(name=name, emit=emit, shape=shape, dtype=dtype, function=function)


def is_declared(operator: str) -> bool:
    """Whether a ``domain::operator`` was emitted for a registration that declares its shape: nothing here has to run it."""
    return operator in _made_by and _made_by[operator].shape is not None


def made_by(operator: str) -> str:
    """The name of the registered operator that a ``domain::operator`` was emitted for; empty if there is none."""
    return _made_by[operator].name if operator in _made_by else ""


def is_registered(operator: str) -> bool:
    """Whether an operator of PyTorch is registered, or is the forward of a function that is, as `opaque_functions` makes it."""
    return operator in _registered or operator.startswith(f"{FUNCTIONS}::")


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


def _forward_names(function: Any) -> list[str]:
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


def _emitted(one: Registration, op: Op, arguments: Sequence[Any]) -> Any:
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


# The TorchScript-based exporter.


class _ScriptOp(Op):
    def __init__(self, context: Any, names: Sequence[str], outputs: int) -> None:
        super().__init__(names, outputs)
        self._context, self.opset = context, int(context.opset)

    def _is_tensor(self, value: Any) -> bool:
        import torch

        return isinstance(value, torch._C.Value)

    def _constant(self, array: np.ndarray) -> Any:
        import torch

        return self._context.op("Constant", value_t=torch.from_numpy(np.array(array)))

    def _node(self, domain: str, kind: str, inputs: list[Any], outputs: int, attributes: dict[str, Any]) -> list[Any]:
        while inputs and inputs[-1] is None:
            inputs.pop()
        values = [self._constant_none() if value is None else value for value in inputs]
        typed = {f"{name}_{_letter(value)}": _plain(value) for name, value in attributes.items()}
        made = self._context.op(f"{domain}::{kind}" if domain else kind, *values, outputs=outputs, **typed)
        return list(made) if outputs > 1 else [made]

    def _constant_none(self) -> Any:
        made = self._context.op("prim::Constant")
        made.setType(_native().OptionalType.ofTensor())
        return made


def _letter(value: Any) -> str:
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    if isinstance(value, (list, tuple)) and any(isinstance(one, float) for one in value):
        return "f"
    if isinstance(first, (bool, int, np.integer)):
        return "i"
    return "f" if isinstance(first, (float, np.floating)) else "s" if isinstance(first, str) else "t"


def _plain(value: Any) -> Any:
    import torch

    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    return int(value) if isinstance(value, bool) else list(value) if isinstance(value, tuple) else value


def _native() -> Any:
    import torch

    return torch._C


@contextmanager
def in_torchscript(opsets: Sequence[int], dynamic_size: bool = False) -> Iterator[None]:
    """Let the TorchScript-based exporter emit the registered operators in this block.

    Args:
        opsets: opsets of the exports; in each of them PyTorch's own symbolic is replaced.
        dynamic_size: whether sizes other than the first one may differ from those of the trace.
    """
    import torch

    with ExitStack() as stack:
        register: Any = torch.onnx.utils.register_custom_op_symbolic
        registry = register.__globals__["registration"].registry

        def add(one: Registration, name: str) -> None:
            if (
                registry.get_function_group(name) is None
            ):  # PyTorch leaves an empty group behind, and then fails to say what is missing
                stack.callback(registry._registry.pop, name, None)
            for opset in opsets:
                register(name, _symbolic(one, dynamic_size), opset)
                stack.callback(torch.onnx.utils.unregister_custom_op_symbolic, name, opset)

        for one in _registered.values():
            if one.function is None:
                add(one, one.name)
        stack.enter_context(opaque_functions(lambda one, overload: add(one, overload.name())))
        yield


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


def _symbolic(one: Registration, dynamic_size: bool) -> Callable[..., Any]:
    def symbolic(context: Any, *values: Any, **_: Any) -> Any:
        node = context.original_node
        schemas = _native()._jit_get_schemas_for_operator(node.kind().removesuffix("_"))
        schema = next((each for each in schemas if len(each.arguments) == len(values)), schemas[0])
        arguments = [_argument(value, str(a.type)) for value, a in zip(values, schema.arguments, strict=False)]
        made = _emitted(one, _ScriptOp(context, _argument_names(one, schema), node.outputsSize()), arguments)
        outputs = list(made) if isinstance(made, (list, tuple)) else [made]
        for i, (output, old) in enumerate(zip(outputs, node.outputs(), strict=False)):
            _declare(one, output, old, i, arguments, dynamic_size)
        return made

    return symbolic


def _argument_names(one: Registration, schema: Any) -> list[str]:
    """Names of the arguments: those of the function's forward, or those of the schema."""
    return _forward_names(one.function) if one.function is not None else [each.name for each in schema.arguments]


def _argument(value: Any, kind: str) -> Any:
    """An argument of an operator, of a type of its schema: a tensor, or a plain value if it is constant."""
    if not hasattr(value, "node"):
        return value
    node = value.node()
    if node.mustBeNone():
        return None
    if kind.startswith(("Tensor", "Optional[Tensor")):
        return value
    if node.kind() == "prim::ListConstruct":
        parts = [_argument(part, kind.replace("List[", "", 1)) for part in node.inputs()]
        return parts
    if node.kind() == "onnx::Constant":
        found: Any = node.t("value").tolist() if node.kindOf("value") == "t" else value.toIValue()
    elif node.kind() == "prim::Constant":
        found = value.toIValue()
    else:
        return value  # computed at run time
    return float(found) if "float" in kind and isinstance(found, int) else found


def _declare(one: Registration, output: Any, old: Any, i: int, arguments: list[Any], dynamic_size: bool) -> None:
    """Give an output a type, and the sizes that are known: those declared, else those of the trace without what may change."""
    traced, made = old.type(), output.type()
    if not hasattr(traced, "sizes") or (one.shape is None and getattr(made, "sizes", lambda: None)() is not None):
        return
    if one.shape is not None:
        sizes, dtype = _declared_sizes(one, arguments, i), _dtype_of(one, i)
        traced = traced.with_dtype(dtype) if dtype is not None else traced
    elif (found := traced.sizes()) is not None:
        sizes = [
            None if axis == 0 or (dynamic_size and not (axis == 1 and len(found) == 4)) else side
            for axis, side in enumerate(found)
        ]
    else:
        return
    output.setType(traced.with_sizes(sizes))


class _Shaped:
    """Stands for a tensor in the call of a shape function."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape, self.ndim = tuple(shape), len(shape)

    def size(self, axis: int | None = None) -> Any:
        return self.shape if axis is None else self.shape[axis]


def _declared_sizes(one: Registration, arguments: list[Any], i: int) -> list[int | None]:
    """The sizes that a shape function gives; None where they follow from sizes of the arguments that may change."""
    assert one.shape is not None

    def shapes(axis: int | None) -> list[int]:
        given = [_Shaped(_grown(value, axis)) if hasattr(value, "type") else value for value in arguments]
        return [int(side) for side in _shapes_of(one, given)[i]]

    base = shapes(None)
    others = [shapes(axis) for axis in (0, 2, 3)]
    return [side if all(other[k] == side for other in others) else None for k, side in enumerate(base)]


def _grown(value: Any, axis: int | None) -> list[int]:
    """The sizes of a traced tensor, one of them larger; 64 where the trace does not know one."""
    known = value.type().varyingSizes() if hasattr(value.type(), "varyingSizes") else value.type().sizes()
    sizes = [64 if side is None else int(side) for side in known or ()]
    return [side + 64 * (k == axis) for k, side in enumerate(sizes)]


def _shapes_of(one: Registration, arguments: Sequence[Any]) -> list[Sequence[Any]]:
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


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _dtype_of(one: Registration, i: int) -> Any:
    kinds = _several(one.dtype)
    return kinds[min(i, len(kinds) - 1)]


# The torch.export-based exporter.


class _ExportOp(Op):
    def __init__(self, names: Sequence[str], outputs: int) -> None:
        from onnxscript import evaluator

        super().__init__(names, outputs)
        self._recorder = cast(Any, evaluator.default())
        self.opset = int(self._recorder.opset.version)

    def _is_tensor(self, value: Any) -> bool:
        import onnx_ir

        return isinstance(value, onnx_ir.Value)

    def _constant(self, array: np.ndarray) -> Any:
        import onnx_ir

        return self._node("", "Constant", [], 1, {"value": onnx_ir.tensor(np.array(array))})[0]

    def _node(self, domain: str, kind: str, inputs: list[Any], outputs: int, attributes: dict[str, Any]) -> list[Any]:
        import onnx_ir

        while inputs and inputs[-1] is None:
            inputs.pop()
        plain = {
            name: onnx_ir.tensor(value)
            if isinstance(value, np.ndarray)
            else [float(number) for number in value]
            if isinstance(value, (list, tuple)) and any(isinstance(number, float) for number in value)
            else value
            for name, value in attributes.items()
        }
        node = onnx_ir.node(
            kind,
            inputs,
            plain,
            domain=domain,
            num_outputs=outputs,
            version=1 if domain else self.opset,
        )
        self._recorder.nodes.append(node)
        return list(node.outputs)


@contextmanager
def in_torch_export(run: Callable[[], Any]) -> Iterator[dict[Any, Callable[..., Any]]]:
    """Let the torch.export-based exporter emit the registered operators in this block; yield its ``custom_translation_table``.

    Args:
        run: runs the module on an example, from which the operators for functions are made.
    """
    table = dict[Any, Callable[..., Any]]()

    def add(one: Registration, overload: Any) -> None:
        table[overload] = _translation(one, overload)

    with opaque_functions(add):
        if any(one.function is not None for one in _registered.values()):
            run()
        for one in _registered.values():
            if one.function is None:
                for overload in _overloads(one.name):
                    add(one, overload)
                if one.shape is not None:
                    _give_fake(one.name)
        yield table


def _overloads(name: str) -> list[Any]:
    import torch

    space, _, operator = name.partition("::")
    packet = getattr(getattr(torch.ops, space), operator)
    return [getattr(packet, overload) for overload in packet.overloads()]


def _translation(one: Registration, overload: Any) -> Callable[..., Any]:
    schema = overload._schema
    names = _argument_names(one, schema)

    def translate(*given: Any, **named: Any) -> Any:
        arguments = [
            given[i] if i < len(given) else named.get(a.name, a.default_value if a.has_default_value() else None)
            for i, a in enumerate(schema.arguments)
        ]
        kinds = [str(a.type) for a in schema.arguments]
        arguments = [
            float(v) if "float" in k and isinstance(v, int) else v for v, k in zip(arguments, kinds, strict=True)
        ]
        return _emitted(one, _ExportOp(names, len(schema.returns)), arguments)

    return translate


def _give_fake(name: str) -> None:
    """Give an operator of a library that has no fake kernel one that follows the declared shape."""
    import torch
    from torch._library.custom_ops import OPDEFS
    from torch._library.simple_registry import singleton

    native: Any = torch._C
    definition = OPDEFS.get(name)
    has = (
        definition._abstract_fn is not None
        if definition is not None
        else singleton.find(name).fake_impl.kernel is not None
    )
    if not has and not native._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"):
        torch.library.register_fake(name, lambda *arguments: _empty(_registered[name], arguments))


def _empty(one: Registration, arguments: Sequence[Any]) -> Any:
    first = next(value for value in arguments if hasattr(value, "new_empty"))
    made = [
        first.new_empty(tuple(shape), dtype=_dtype_of(one, i) or first.dtype)
        for i, shape in enumerate(_shapes_of(one, arguments))
    ]
    return made[0] if len(made) == 1 else made


@contextmanager
def opaque_functions(made: Callable[[Registration, Any], None] = lambda *_: None) -> Iterator[None]:
    """Run the forward of each registered `autograd.Function` as an operator of PyTorch in this block.

    Args:
        made: called with each operator, when it is made at the first call.
    """
    with ExitStack() as stack:
        for one in _registered.values():
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
    native = _native()
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
    fake = (lambda *given: _empty(one, given)) if one.shape is not None else kernel
    torch.library.register_fake(f"{FUNCTIONS}::{name}", fake, lib=_library[0])
    return getattr(getattr(torch.ops, FUNCTIONS), name).default


def _fresh(found: Any, given: Sequence[Any]) -> Any:
    """The outputs of a function, copied if they are its inputs, which an operator may not return."""
    if isinstance(found, (list, tuple)):
        return tuple(_fresh(one, given) for one in found)
    return found.clone() if any(found is value for value in given) else found
