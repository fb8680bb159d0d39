"""Builds a network of fusenms classes from the plain data of a checkpoint.

1. Each record becomes a layer. `StandIn` declares the attributes, parts and tensors of a stand-in, and `LAYERS` those of a torch layer.
   Others are refused. Parts get the names that fusenms declares. Tensors have shapes, but no content yet.
2. The network runs once on shapes only, to count its cost (`check_cost`).
3. The weights are read.

No code of the file is called, and no text of the file becomes a name in Python.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusenms.sources.torch_files.archive import Archive
from fusenms.sources.torch_files.unpickle import Record, Storage
from fusenms.sources.torch_modules import fields
from fusenms.sources.torch_modules.attributes import Attributes, shown_name
from fusenms.sources.torch_modules.layers import DetectionModel, StandIn
from fusenms.sources.torch_modules.torch_layers import LAYERS, Stored

DTYPES = {
    "HalfStorage": torch.float16, "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
"""Data types by the name of the storage class in `torch`."""
_LONGEST_VECTOR = 64
_REBUILD_TENSOR = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_REBUILD_PARAMETER = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")


@dataclass(frozen=True)
class _Built:
    """A layer with its numbers of layers and weights. A shared layer counts at each place where it is used."""

    module: nn.Module
    layers: int
    weights: int


class Rebuilder:
    """Builds the network of one checkpoint."""

    def __init__(self, archive: Archive, classes: Mapping[str, type[nn.Module] | None]) -> None:
        """Create a rebuilder.

        Args:
            archive: the archive with the storages.
            classes: for each name in the file, the fusenms class that replaces it; None for plain data.
        """
        self._archive, self._limits, self._classes = archive, archive.limits, classes
        self._built: dict[int, _Built | None] = {}
        self._tensors: list[tuple[nn.Module, str, Stored]] = []

    def network(self, record: Record) -> DetectionModel:
        """Build the network of a record. Its weights are float32 and have no content yet.

        Raises:
            ValueError: the record is not a network that fusenms knows, or exceeds a limit.
        """
        module = self._build(record, "", 0).module
        if not isinstance(module, DetectionModel):
            raise ValueError(f"it is a {type(module).__name__}, not a network")
        layers = module._modules.get("model")
        if not isinstance(layers, nn.Sequential):
            raise ValueError("it has no list of layers")
        return module.eval()

    def read_weights(self) -> None:
        """Read the weights of the network. Each storage is read once.

        Raises:
            ValueError: a storage is missing or damaged, or has another size.
        """
        waiting: dict[Storage, list[tuple[nn.Module, str, Stored]]] = {}
        for module, name, stored in self._tensors:
            waiting.setdefault(stored.storage, []).append((module, name, stored))
        for storage, takers in waiting.items():
            content, made = self._content(storage), dict[Stored, Tensor]()
            for module, name, stored in takers:
                if stored not in made:
                    made[stored] = _tensor(stored, content)
                if name in module._parameters:
                    module._parameters[name] = nn.Parameter(made[stored], requires_grad=False)
                else:
                    module._buffers[name] = made[stored]

    # Layers.

    def _build(self, record: Any, path: str, depth: int) -> _Built:
        where = f"layer {path}" if path else "the network"
        if not isinstance(record, Record) or record.name not in self._classes:
            raise ValueError(f"{where} is {_kind(record)}; expected a layer")
        if id(record) in self._built:
            built = self._built[id(record)]
            if built is None:
                raise ValueError(f"{where} contains itself")
            return built
        if depth > self._limits.max_nesting:
            raise ValueError(f"{where} is nested deeper than {self._limits.max_nesting} layers")
        self._built[id(record)] = None
        built = self._built[id(record)] = self._new(record, path, where, depth)
        if built.layers > self._limits.max_modules:
            raise ValueError(f"{where} has {built.layers} layers; expected at most {self._limits.max_modules}")
        if built.weights > self._limits.max_parameters:
            raise ValueError(f"{where} has {built.weights} weights; expected at most {self._limits.max_parameters}")
        return built

    def _new(self, record: Record, path: str, where: str, depth: int) -> _Built:
        cls, state = self._classes[record.name], record.state
        if cls is None:
            raise ValueError(f"{where} is a {record.name}; expected a layer")
        where = f"{where} ({cls.__name__})"
        if not isinstance(state, dict) or not all(
            isinstance(state.get(key), dict) for key in ("_modules", "_parameters", "_buffers")
        ):
            raise ValueError(f"{where} has no parts, parameters or buffers; the file is damaged")
        attributes = Attributes(state, where, self._limits)
        tensors = {
            name: self._stored(value, f"{where}.{shown_name(name)}")
            for name, value in (*state["_parameters"].items(), *state["_buffers"].items())
            if value is not None
        }
        children = {name: child for name, child in state["_modules"].items() if child is not None}
        module: nn.Module
        if issubclass(cls, StandIn):
            module = self._stand_in(cls, attributes, tensors, state)
        else:
            module = LAYERS[cls](attributes, tensors)
            self._take(module, tensors, where)
        attributes.refuse_others(cls)
        built = [
            (name, self._build(child, f"{path}.{name}".lstrip("."), depth + 1))
            for name, child in self._named(cls, children, where)
        ]
        for name, child in built:
            module.add_module(name, child.module)
        if issubclass(cls, DetectionModel):
            self._connect(state["_modules"].get("model"), module)
        weights = sum(math.prod(stored.size) for stored in tensors.values())
        return _Built(module, 1 + sum(b.layers for _, b in built), weights + sum(b.weights for _, b in built))

    def _stand_in(
        self, cls: type[StandIn], attributes: Attributes, tensors: dict[str, Stored], state: dict[str, Any]
    ) -> StandIn:
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        for name, field in cls.attributes.items():
            if field is fields.vector:
                if (value := attributes.take(name)) is not None:
                    setattr(module, name, self._vector(value, f"{attributes.where}.{name}"))
            elif name in state or not hasattr(
                cls, name
            ):  # the class has a default for attributes that older checkpoints lack
                setattr(module, name, attributes(name, field))
        if unknown := sorted(set(tensors) - cls.tensors - {"num_batches_tracked"}):
            raise ValueError(
                f"{attributes.where} has tensors that fusenms does not know: {', '.join(map(shown_name, unknown[:4]))}"
            )
        for name in sorted(cls.tensors):
            if name not in tensors:
                setattr(module, name, None)
                continue
            shape = torch.empty(tensors[name].size, device="meta")
            if name in state["_parameters"]:
                module.register_parameter(name, nn.Parameter(shape, requires_grad=False))
            else:
                module.register_buffer(name, shape)
            self._tensors.append((module, name, tensors[name]))
        return module

    def _named(self, cls: type[nn.Module], children: dict[Any, Any], where: str) -> list[tuple[str, Any]]:
        """The parts, with the names that fusenms declares.

        Raises:
            ValueError: a part is unknown, or its name is invalid.
        """
        if issubclass(cls, StandIn):
            if extra := sorted(shown_name(name) for name in children if name not in cls.parts):
                raise ValueError(
                    f"{where} has parts that fusenms does not know: {', '.join(extra[:8])}. This variant is not supported; pass its .onnx"
                )
            ours = {part: part for part in cls.parts}
            return [(ours[name], child) for name, child in children.items()]
        if cls not in (nn.Sequential, nn.ModuleList):
            if children:
                raise ValueError(f"{where} has parts; expected none")
            return []
        for position, name in enumerate(children):
            if not isinstance(name, str) or not (name.isidentifier() or name.isdecimal()) or not name.isascii():
                raise ValueError(f"{where} has a part with the name {shown_name(name)}; expected a word or a number")
            if cls is nn.ModuleList and name != str(position):
                raise ValueError(f"{where} has part {shown_name(name)} at position {position}")
        return [(str(position), child) for position, child in enumerate(children.values())]

    def _take(self, module: nn.Module, tensors: dict[str, Stored], where: str) -> None:
        """Record the tensors of a torch layer, to be read later. Their names and shapes must be those of the layer.

        Raises:
            ValueError: a name or a shape differs.
        """
        own = dict((*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)))
        given = {name: stored for name, stored in tensors.items() if name != "num_batches_tracked"}
        if "num_batches_tracked" in own:
            module._buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
            del own["num_batches_tracked"]
        if set(own) != set(given):
            found = ", ".join(sorted(map(shown_name, given))) or "none"
            raise ValueError(f"{where} has the tensors {found}; expected {', '.join(sorted(own)) or 'none'}")
        for name, stored in given.items():
            if tuple(own[name].shape) != stored.size:
                raise ValueError(f"{where}.{name} is {list(stored.size)}; expected {list(own[name].shape)}")
            self._tensors.append((module, name, stored))

    def _connect(self, layers: Any, module: nn.Module) -> None:
        """Set the inputs of each layer of the network (`f`), and its index (`i`)."""
        sequence = module._modules.get("model")
        if not isinstance(layers, Record) or not isinstance(sequence, nn.Sequential):
            raise ValueError("the network has no list of layers")
        records = [child for child in layers.state["_modules"].values() if child is not None]
        for position, (record, layer) in enumerate(zip(records, sequence, strict=True)):
            attributes = Attributes(record.state, f"layer {position}", self._limits)
            layer.i = attributes("i", fields.index)
            layer.f = attributes("f", fields.index_or_indices)

    # Tensors.

    def _stored(self, value: Any, where: str) -> Stored:
        """The place of a tensor in its storage.

        Raises:
            ValueError: the value is not a tensor, its elements exceed the storage, or it uses an element more than once.
        """
        if isinstance(value, Record) and value.name in _REBUILD_PARAMETER and value.arguments:
            value = value.arguments[0]
        if not isinstance(value, Record) or value.name not in _REBUILD_TENSOR or len(value.arguments) < 4:
            raise ValueError(f"{where} is {_kind(value)}; expected a tensor")
        storage, offset, size, stride = value.arguments[:4]
        if not isinstance(storage, Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
            raise ValueError(f"{where} is a damaged tensor")
        kind = storage.kind.removeprefix("torch.")
        if kind not in DTYPES:
            raise ValueError(f"{where} has elements of the type {kind[:40]!r}")
        if len(size) != len(stride) or len(size) > 8:
            raise ValueError(f"{where} has {len(size)} dimensions and {len(stride)} strides")
        most = self._limits.max_tensor_elements
        sides = [fields.whole(side, 0, most) for side in (*size, *stride)]
        size, stride = tuple(sides[: len(size)]), tuple(sides[len(size) :])
        count, reach = math.prod(size), 1 + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
        if count > most:
            raise ValueError(f"{where} has {count} elements; expected at most {most}")
        if fields.whole(offset, 0, storage.count) + (reach if count else 0) > storage.count:
            raise ValueError(f"{where} {list(size)} exceeds its storage of {storage.count} elements")
        dense = 1
        for step, side in sorted((step, side) for step, side in zip(stride, size, strict=True) if side > 1):
            if step < dense:
                raise ValueError(f"{where} {list(size)} uses elements of its storage more than once")
            dense = step * side
        return Stored(storage, offset, size, stride)

    def _content(self, storage: Storage) -> Tensor:
        """All elements of a storage, ``[count]``."""
        dtype = DTYPES[storage.kind.removeprefix("torch.")]
        data = bytearray(self._archive.storage(storage.key, storage.count * dtype.itemsize))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)

    def _vector(self, value: Any, where: str) -> Tensor:
        stored = self._stored(value, where)
        if stored.storage.count > _LONGEST_VECTOR:
            raise ValueError(f"{where} has {stored.storage.count} elements; expected at most {_LONGEST_VECTOR}")
        return _tensor(stored, self._content(stored.storage)).flatten()


def _tensor(stored: Stored, content: Tensor) -> Tensor:
    """Copy a tensor from its storage, as float32 and contiguous."""
    if 0 in stored.size:
        return torch.zeros(stored.size)
    tensor = content.as_strided(stored.size, stored.stride, stored.offset)
    return tensor.to(torch.float32).clone(memory_format=torch.contiguous_format)


def _kind(value: Any) -> str:
    return value.name if isinstance(value, Record) else f"a {type(value).__name__}"
