"""A network of our own classes, built from the plain data of a checkpoint.

1. Each record becomes a layer of ours: `StandIn` says what a class takes, `_LAYERS` what a layer of torch takes. An attribute, part or
   tensor beyond that is refused. Parts get our own names. The tensors have shapes, but no content yet.
2. The network runs once on shapes alone, so that its cost is known (`check_cost`).
3. The weights are read.

Nothing of the file is called, and no text of it becomes the name of anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fusenms.limits import Limits
from fusenms.sources import fields
from fusenms.sources.archive import Archive
from fusenms.sources.fields import Field, shown
from fusenms.sources.modules import DetectionModel, StandIn
from fusenms.sources.unpickle import Record, Storage

DTYPES = {
    "HalfStorage": torch.float16, "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
"""By the name of the storage's class in `torch`."""
_HOOKS = frozenset({
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
})  # fmt: skip
_EVERY_MODULE = frozenset({
    "training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_is_full_backward_hook",
    "i", "f", "type", "np",  # what trainers give to each layer
})  # fmt: skip
_UNUSED = frozenset({
    # of layers: what their constructors keep and nothing computes with
    "c", "c_", "c1", "c2", "g", "deploy", "groups", "id_tensor", "in_channels", "out_channels", "dim", "is_first", "channel", "mean", "std",
    "all_head_dim", "num_layers", "hidden_dim", "d_model", "im2col_step", "embed_dim", "kdim", "vdim", "_qkv_same_embed_dim", "dropout",
    "batch_first", "head_dim", "bias_k", "bias_v", "d",
    # of heads: caches, and settings of training and of the export that the trainer would do
    "nl", "no", "ne", "nk", "nk_sigma", "npr", "inplace", "anchors", "strides", "shape", "shapes", "valid_mask", "grid", "anchor_grid",
    "max_det", "end2end", "_end2end", "export", "format", "dynamic", "legacy", "include_nms", "concat", "xyxy", "detect", "angle",
    "nhead", "num_decoder_layers", "num_denoising", "label_noise_ratio", "box_noise_scale", "feat_strides",
    # of networks: how they were described and trained
    "names", "args", "yaml", "yaml_file", "pt_path", "nc", "criterion", "task", "hyp", "class_weights", "gr", "traced", "md", "date",
    "kpt_shape", "kpt_names", "kpt_oks_sigmas", "version", "fp16", "transforms", "overrides", "override",
})  # fmt: skip
"""Attributes of stand-ins that checkpoints have and that the computation does not read. `names` and `args` are read from the record."""
_LONGEST_VECTOR = 64
_REBUILD_TENSOR = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_REBUILD_PARAMETER = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")


@dataclass(frozen=True)
class _Stored:
    """A tensor in a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Built:
    """A layer, and how many layers and weights it has, counted at each place where they are used."""

    module: nn.Module
    layers: int
    weights: int


class Rebuilder:
    """Builds the network of one checkpoint."""

    def __init__(self, archive: Archive, classes: Mapping[str, type[nn.Module] | None]) -> None:
        """Take the archive for its storages, and the class of ours for each name in the file; None: there is none."""
        self._archive, self._limits, self._classes = archive, archive.limits, classes
        self._built: dict[int, _Built | None] = {}
        self._tensors: list[tuple[nn.Module, str, _Stored]] = []

    def network(self, record: Record) -> DetectionModel:
        """The network of a record; its weights are float32 and have no content yet.

        Raises:
            ValueError: the record describes no network that fusenms knows, or exceeds a bound.
        """
        module = self._build(record, "", 0).module
        if not isinstance(module, DetectionModel):
            raise ValueError(f"it is a {type(module).__name__}, not a network")
        layers = module._modules.get("model")
        if not isinstance(layers, nn.Sequential):
            raise ValueError("it has no list of layers")
        return module.eval()

    def read_weights(self) -> None:
        """Give the network its weights. Each storage is read once.

        Raises:
            ValueError: a storage is missing, is damaged, or has another size.
        """
        waiting: dict[Storage, list[tuple[nn.Module, str, _Stored]]] = {}
        for module, name, stored in self._tensors:
            waiting.setdefault(stored.storage, []).append((module, name, stored))
        for storage, takers in waiting.items():
            content, made = self._content(storage), dict[_Stored, Tensor]()
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
        attributes = _Attributes(state, where, self._limits)
        tensors = {
            name: self._stored(value, f"{where}.{_shown_name(name)}")
            for name, value in (*state["_parameters"].items(), *state["_buffers"].items())
            if value is not None
        }
        children = {name: child for name, child in state["_modules"].items() if child is not None}
        module: nn.Module
        if issubclass(cls, StandIn):
            module = self._stand_in(cls, attributes, tensors, state)
        else:
            module = _LAYERS[cls](attributes, tensors)
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
        self, cls: type[StandIn], attributes: _Attributes, tensors: dict[str, _Stored], state: dict[str, Any]
    ) -> StandIn:
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        for name, field in cls.attributes.items():
            if field is fields.vector:
                if (value := attributes.take(name)) is not None:
                    setattr(module, name, self._vector(value, f"{attributes.where}.{name}"))
            elif name in state or not hasattr(cls, name):  # the class has what older checkpoints lack
                setattr(module, name, attributes(name, field))
        if unknown := sorted(set(tensors) - cls.tensors - {"num_batches_tracked"}):
            raise ValueError(
                f"{attributes.where} has tensors that fusenms does not know: {', '.join(map(_shown_name, unknown[:4]))}"
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
        """The parts, with names of ours."""
        if issubclass(cls, StandIn):
            if extra := sorted(_shown_name(name) for name in children if name not in cls.parts):
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
                raise ValueError(f"{where} has a part of the name {_shown_name(name)}; expected a word or a number")
            if cls is nn.ModuleList and name != str(position):
                raise ValueError(f"{where} has part {_shown_name(name)} at position {position}")
        return [(str(position), child) for position, child in enumerate(children.values())]

    def _take(self, module: nn.Module, tensors: dict[str, _Stored], where: str) -> None:
        """Note the tensors of a layer of torch, which must be those that it has, in the same shapes."""
        own = dict((*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)))
        given = {name: stored for name, stored in tensors.items() if name != "num_batches_tracked"}
        if "num_batches_tracked" in own:
            module._buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
            del own["num_batches_tracked"]
        if set(own) != set(given):
            found = ", ".join(sorted(map(_shown_name, given))) or "none"
            raise ValueError(f"{where} has the tensors {found}; expected {', '.join(sorted(own)) or 'none'}")
        for name, stored in given.items():
            if tuple(own[name].shape) != stored.size:
                raise ValueError(f"{where}.{name} is {list(stored.size)}; expected {list(own[name].shape)}")
            self._tensors.append((module, name, stored))

    def _connect(self, layers: Any, module: nn.Module) -> None:
        """Tell each layer of the network where its input comes from."""
        sequence = module._modules.get("model")
        if not isinstance(layers, Record) or not isinstance(sequence, nn.Sequential):
            raise ValueError("the network has no list of layers")
        records = [child for child in layers.state["_modules"].values() if child is not None]
        for position, (record, layer) in enumerate(zip(records, sequence, strict=True)):
            attributes = _Attributes(record.state, f"layer {position}", self._limits)
            layer.i = attributes("i", fields.index)
            layer.f = attributes("f", fields.index_or_indices)

    # Tensors.

    def _stored(self, value: Any, where: str) -> _Stored:
        """Where a tensor is stored: its elements lie inside of the storage, and none of them is used twice."""
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
            raise ValueError(f"{where} {list(size)} reaches out of its storage of {storage.count} elements")
        dense = 1
        for step, side in sorted((step, side) for step, side in zip(stride, size, strict=True) if side > 1):
            if step < dense:
                raise ValueError(f"{where} {list(size)} uses elements of its storage more than once")
            dense = step * side
        return _Stored(storage, offset, size, stride)

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


def _tensor(stored: _Stored, content: Tensor) -> Tensor:
    """A tensor out of its storage, float32 and contiguous, with elements of its own."""
    if 0 in stored.size:
        return torch.zeros(stored.size)
    tensor = content.as_strided(stored.size, stored.stride, stored.offset)
    return tensor.to(torch.float32).clone(memory_format=torch.contiguous_format)


class _Attributes:
    """The attributes of one layer in the file. Each is taken once by its check; what is left over is refused."""

    def __init__(self, state: Mapping[str, Any], where: str, limits: Limits) -> None:
        self._state, self.where, self.limits = state, where, limits
        self._taken = set(_EVERY_MODULE)
        for key in _HOOKS:
            if (hooks := state.get(key)) is not None and hooks != {}:
                raise ValueError(f"{where} carries hooks; expected plain weights")

    def __call__(self, name: str, field: Field, *default: Any) -> Any:
        """The value of an attribute, checked; or the default where there is none."""
        if name not in self._state:
            if default:
                return default[0]
            raise ValueError(f"{self.where} has no attribute {name}")
        try:
            return field(self.take(name), self.limits)
        except ValueError as error:
            raise ValueError(f"{self.where}: {name} {error}") from None

    def take(self, *names: str) -> Any:
        """The value of the last of these attributes, unchecked."""
        self._taken.update(names)
        return self._state.get(names[-1])

    def refuse_others(self, cls: type[nn.Module]) -> None:
        """Refuse attributes that nothing has taken."""
        known = self._taken | _HOOKS | (_UNUSED | cls.parts | set(cls.tensors) if issubclass(cls, StandIn) else set())
        if unknown := [name for name in self._state if name not in known]:
            raise ValueError(
                f"{self.where} has an attribute that fusenms does not know: {_shown_name(unknown[0])}. It may change what the layer "
                "computes; pass the .onnx of this model"
            )


def _shown_name(name: Any) -> str:
    return name[:60] if isinstance(name, str) and name.isprintable() else shown(name)


def _kind(value: Any) -> str:
    return value.name if isinstance(value, Record) else f"a {type(value).__name__}"


# Layers of torch. They are constructed from checked numbers, without content.


def _pair(least: int) -> Field:
    """One or two whole numbers, as a pair."""

    def check(value: Any, limits: Limits) -> tuple[int, int]:
        pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
        if len(pair) not in (1, 2):
            raise ValueError(f"has {len(pair)} numbers; expected two")
        first, second = (fields.whole(number, least, limits.max_repeats) for number in (pair[0], pair[-1]))
        return first, second

    return check


def _one_of(*texts: Any) -> Field:
    def check(value: Any, _: Limits) -> Any:
        if not isinstance(value, (str, type(None))) or value not in texts:
            raise ValueError(f"is {shown(value)}; expected one of {', '.join(map(str, texts))}")
        return value

    return check


def _optional(field: Field) -> Field:
    return lambda value, limits: None if value is None else field(value, limits)


def _factor(value: Any, limits: Limits) -> Any:
    """A positive factor, or one for each axis."""
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return tuple(_factor(number, limits) for number in value)
    factor = fields.real(value, limits)
    if not 1 / limits.max_repeats <= factor <= limits.max_repeats:
        raise ValueError(f"is {factor:g}; expected a factor from 1/{limits.max_repeats} to {limits.max_repeats}")
    return factor


def _padding(value: Any, limits: Limits) -> Any:
    return value if isinstance(value, str) and value in ("same", "valid") else _pair(0)(value, limits)


def _borders(value: Any, limits: Limits) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        raise ValueError(f"is {shown(value)}; expected four numbers")
    return tuple(fields.repeats(side, limits) for side in value)


_PADDINGS = ("zeros", "reflect", "replicate", "circular")


def _convolution(cls: Any) -> Callable[[_Attributes, dict[str, _Stored]], nn.Module]:
    def make(a: _Attributes, tensors: dict[str, _Stored]) -> nn.Module:
        a.take("_reversed_padding_repeated_twice", "_padding_repeated_twice", "transposed")
        said = {
            "stride": a("stride", _pair(1)), "padding": a("padding", _padding), "dilation": a("dilation", _pair(1)),
            "groups": a("groups", fields.channels), "padding_mode": a("padding_mode", _one_of(*_PADDINGS), "zeros"),
        }  # fmt: skip
        output_padding = a("output_padding", _pair(0), (0, 0))
        if cls is nn.ConvTranspose2d:
            said["output_padding"] = output_padding
        sides = a("in_channels", fields.channels), a("out_channels", fields.channels), a("kernel_size", _pair(1))
        return cls(*sides, **said, bias="bias" in tensors, device="meta")

    return make


def _batch_norm(a: _Attributes, _: dict[str, _Stored]) -> nn.Module:
    a.take("momentum")
    if not a("affine", fields.flag, True) or not a("track_running_stats", fields.flag, True):
        raise ValueError(f"{a.where} normalizes by the batch; expected running statistics")
    eps = a("eps", fields.real)
    return nn.BatchNorm2d(a("num_features", fields.channels), eps=eps, device="meta")


def _linear(a: _Attributes, tensors: dict[str, _Stored]) -> nn.Module:
    sides = a("in_features", fields.channels), a("out_features", fields.channels)
    return nn.Linear(*sides, bias="bias" in tensors, device="meta")


def _layer_norm(a: _Attributes, tensors: dict[str, _Stored]) -> nn.Module:
    shape, eps = a("normalized_shape", fields.several_channels), a("eps", fields.real)
    affine = a("elementwise_affine", fields.flag, True)
    return nn.LayerNorm(shape, eps, affine, bias=affine and "bias" in tensors, device="meta")


def _embedding(a: _Attributes, _: dict[str, _Stored]) -> nn.Module:
    a.take("padding_idx", "norm_type", "scale_grad_by_freq", "sparse")
    if a("max_norm", _optional(fields.real), None) is not None:
        raise ValueError(f"{a.where} renormalizes its weights; expected max_norm None")
    return nn.Embedding(a("num_embeddings", fields.channels), a("embedding_dim", fields.channels), device="meta")


def _max_pool(a: _Attributes, _: dict[str, _Stored]) -> nn.Module:
    kernel = a("kernel_size", _pair(1))
    a("return_indices", fields.no, False)
    stride, padding = a("stride", _optional(_pair(1)), None) or kernel, a("padding", _pair(0), 0)
    return nn.MaxPool2d(
        kernel, stride, padding, a("dilation", _pair(1), 1), ceil_mode=a("ceil_mode", fields.flag, False)
    )


def _upsample(a: _Attributes, _: dict[str, _Stored]) -> nn.Module:
    a.take("name", "recompute_scale_factor")
    if a("size", _optional(_pair(1)), None) is not None:
        raise ValueError(f"{a.where} enlarges to a fixed size; expected a factor")
    mode = a("mode", _one_of("nearest", "nearest-exact", "bilinear", "bicubic"), "nearest")
    align = a("align_corners", _optional(fields.flag), None)
    return nn.Upsample(scale_factor=a("scale_factor", _factor), mode=mode, align_corners=align)


def _activation(cls: Any, **said: Field) -> Callable[[_Attributes, dict[str, _Stored]], nn.Module]:
    def make(a: _Attributes, _: dict[str, _Stored]) -> nn.Module:
        a.take("inplace")
        return cls(**{name: a(name, field) for name, field in said.items() if name in a._state})

    return make


def _zero_pad(a: _Attributes, _: dict[str, _Stored]) -> nn.Module:
    if a("value", fields.real, 0.0) != 0:
        raise ValueError(f"{a.where} pads with another value than 0")
    return nn.ZeroPad2d(a("padding", _borders))


_LAYERS: dict[type[nn.Module], Callable[[_Attributes, dict[str, _Stored]], nn.Module]] = {
    nn.Conv2d: _convolution(nn.Conv2d),
    nn.ConvTranspose2d: _convolution(nn.ConvTranspose2d),
    nn.BatchNorm2d: _batch_norm,
    nn.Linear: _linear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
    nn.MaxPool2d: _max_pool,
    nn.Upsample: _upsample,
    nn.ZeroPad2d: _zero_pad,
    nn.SiLU: _activation(nn.SiLU),
    nn.ReLU: _activation(nn.ReLU),
    nn.Hardswish: _activation(nn.Hardswish),
    nn.LeakyReLU: _activation(nn.LeakyReLU, negative_slope=fields.real),
    nn.GELU: _activation(nn.GELU, approximate=_one_of("none", "tanh")),
    nn.Tanh: _activation(nn.Tanh),
    nn.Identity: _activation(nn.Identity),
    nn.Dropout: _activation(nn.Dropout, p=fields.real),
    nn.Sequential: _activation(nn.Sequential),
    nn.ModuleList: _activation(nn.ModuleList),
}
TORCH_LAYERS = tuple(_LAYERS)


# What a network costs.


class _Cost(TorchDispatchMode):
    """Counts operators and their floating-point operations, and refuses what is too much before it is run."""

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
    """Run a network without content on an image ``[1, 3, side, side]`` and return the shapes that it gives, without the batch.

    Raises:
        ValueError: it costs more than the limits allow.
    """
    with torch.no_grad(), torch.device("meta"), _Cost(limits.max_flops_per_pixel * side * side, limits):
        taps = network(torch.empty(1, 3, side, side))
    return [tuple(tap.shape[1:]) for tap in taps]
