"""Registered operators in the TorchScript-based exporter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from fusenms.sources.operators.functions import native_module, opaque_functions
from fusenms.sources.operators.registration import (
    REGISTERED,
    Op,
    Registration,
    argument_names,
    dtype_of,
    emitted,
    shapes_of,
)


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
        made.setType(native_module().OptionalType.ofTensor())
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

        for one in REGISTERED.values():
            if one.function is None:
                add(one, one.name)
        stack.enter_context(opaque_functions(lambda one, overload: add(one, overload.name())))
        yield


def _symbolic(one: Registration, dynamic_size: bool) -> Callable[..., Any]:
    def symbolic(context: Any, *values: Any, **_: Any) -> Any:
        node = context.original_node
        schemas = native_module()._jit_get_schemas_for_operator(node.kind().removesuffix("_"))
        schema = next((each for each in schemas if len(each.arguments) == len(values)), schemas[0])
        arguments = [_argument(value, str(a.type)) for value, a in zip(values, schema.arguments, strict=False)]
        made = emitted(one, _ScriptOp(context, argument_names(one, schema), node.outputsSize()), arguments)
        outputs = list(made) if isinstance(made, (list, tuple)) else [made]
        for i, (output, old) in enumerate(zip(outputs, node.outputs(), strict=False)):
            _declare(one, output, old, i, arguments, dynamic_size)
        return made

    return symbolic


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
        sizes, dtype = _declared_sizes(one, arguments, i), dtype_of(one, i)
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
        return [int(side) for side in shapes_of(one, given)[i]]

    base = shapes(None)
    others = [shapes(axis) for axis in (0, 2, 3)]
    return [side if all(other[k] == side for other in others) else None for k, side in enumerate(base)]


def _grown(value: Any, axis: int | None) -> list[int]:
    """The sizes of a traced tensor, one of them larger; 64 where the trace does not know one."""
    known = value.type().varyingSizes() if hasattr(value.type(), "varyingSizes") else value.type().sizes()
    sizes = [64 if side is None else int(side) for side in known or ()]
    return [side + 64 * (k == axis) for k, side in enumerate(sizes)]
