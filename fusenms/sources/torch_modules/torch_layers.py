"""Builds layers of torch from checked numbers, without content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fusenms.limits import Limits
from fusenms.sources.torch_files.unpickle import Storage
from fusenms.sources.torch_modules import fields
from fusenms.sources.torch_modules.attributes import Attributes
from fusenms.sources.torch_modules.fields import Field, shown


@dataclass(frozen=True)
class Stored:
    """The place of a tensor in a storage. Offset and stride are in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _pair(least: int) -> Field:
    """A check for one or two integers, which returns a pair."""

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


def _convolution(cls: Any) -> Callable[[Attributes, dict[str, Stored]], nn.Module]:
    def make(a: Attributes, tensors: dict[str, Stored]) -> nn.Module:
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


def _batch_norm(a: Attributes, _: dict[str, Stored]) -> nn.Module:
    a.take("momentum")
    if not a("affine", fields.flag, True) or not a("track_running_stats", fields.flag, True):
        raise ValueError(f"{a.where} normalizes with statistics of the batch; expected running statistics")
    eps = a("eps", fields.real)
    return nn.BatchNorm2d(a("num_features", fields.channels), eps=eps, device="meta")


def _linear(a: Attributes, tensors: dict[str, Stored]) -> nn.Module:
    sides = a("in_features", fields.channels), a("out_features", fields.channels)
    return nn.Linear(*sides, bias="bias" in tensors, device="meta")


def _layer_norm(a: Attributes, tensors: dict[str, Stored]) -> nn.Module:
    shape, eps = a("normalized_shape", fields.several_channels), a("eps", fields.real)
    affine = a("elementwise_affine", fields.flag, True)
    return nn.LayerNorm(shape, eps, affine, bias=affine and "bias" in tensors, device="meta")


def _embedding(a: Attributes, _: dict[str, Stored]) -> nn.Module:
    a.take("padding_idx", "norm_type", "scale_grad_by_freq", "sparse")
    if a("max_norm", _optional(fields.real), None) is not None:
        raise ValueError(f"{a.where} renormalizes its weights; expected max_norm None")
    shape = a("num_embeddings", fields.channels), a("embedding_dim", fields.channels)
    return nn.Embedding(*shape, _weight=torch.empty(shape, device="meta"))  # without weights it would draw random ones


def _max_pool(a: Attributes, _: dict[str, Stored]) -> nn.Module:
    kernel = a("kernel_size", _pair(1))
    a("return_indices", fields.no, False)
    stride, padding = a("stride", _optional(_pair(1)), None) or kernel, a("padding", _pair(0), 0)
    return nn.MaxPool2d(
        kernel, stride, padding, a("dilation", _pair(1), 1), ceil_mode=a("ceil_mode", fields.flag, False)
    )


def _upsample(a: Attributes, _: dict[str, Stored]) -> nn.Module:
    a.take("name", "recompute_scale_factor")
    if a("size", _optional(_pair(1)), None) is not None:
        raise ValueError(f"{a.where} resizes to a fixed size; expected a factor")
    mode = a("mode", _one_of("nearest", "nearest-exact", "bilinear", "bicubic"), "nearest")
    align = a("align_corners", _optional(fields.flag), None)
    return nn.Upsample(scale_factor=a("scale_factor", _factor), mode=mode, align_corners=align)


def _activation(cls: Any, **said: Field) -> Callable[[Attributes, dict[str, Stored]], nn.Module]:
    def make(a: Attributes, _: dict[str, Stored]) -> nn.Module:
        a.take("inplace")
        return cls(**{name: a(name, field) for name, field in said.items() if a.has(name)})

    return make


def _zero_pad(a: Attributes, _: dict[str, Stored]) -> nn.Module:
    if a("value", fields.real, 0.0) != 0:
        raise ValueError(f"{a.where} pads with a value other than 0; expected 0")
    return nn.ZeroPad2d(a("padding", _borders))


LAYERS: dict[type[nn.Module], Callable[[Attributes, dict[str, Stored]], nn.Module]] = {
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


TORCH_LAYERS = tuple(LAYERS)
