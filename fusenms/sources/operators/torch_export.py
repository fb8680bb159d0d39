"""Registered operators in the torch.export-based exporter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np

from fusenms.sources.operators.functions import empty, opaque_functions
from fusenms.sources.operators.registration import (
    REGISTERED,
    Op,
    Registration,
    argument_names,
    emitted,
)


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
        if any(one.function is not None for one in REGISTERED.values()):
            run()
        for one in REGISTERED.values():
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
    names = argument_names(one, schema)

    def translate(*given: Any, **named: Any) -> Any:
        arguments = [
            given[i] if i < len(given) else named.get(a.name, a.default_value if a.has_default_value() else None)
            for i, a in enumerate(schema.arguments)
        ]
        kinds = [str(a.type) for a in schema.arguments]
        arguments = [
            float(v) if "float" in k and isinstance(v, int) else v for v, k in zip(arguments, kinds, strict=True)
        ]
        return emitted(one, _ExportOp(names, len(schema.returns)), arguments)

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
        torch.library.register_fake(name, lambda *arguments: empty(REGISTERED[name], arguments))
