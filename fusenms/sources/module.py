"""An `nn.Module` of the user's own, with a layout written by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusenms.errors import ConfigError, SourceError
from fusenms.layout import Activation, Layout
from fusenms.safety.text import has_controls
from fusenms.sources.export import Network
from fusenms.sources.options import LoadOptions


class _Head(nn.Module):
    """A module that returns the tensors of the layout, in order."""

    def __init__(self, module: nn.Module, tensors: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.tensors = module, tensors

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return outputs_of(self.module(images), self.tensors)


def load_module(module: nn.Module, options: LoadOptions) -> Network:
    """A copy of the module, ready for export: in evaluation mode, float32, on the CPU.

    Args:
        module: takes images ``[B, 3, height, width]``; returns the tensors that ``layout.sources`` names: in that order, or by name.
        options: with an example, whose size is the one that the model works at, and a layout.

    Raises:
        ConfigError: the layout does not fit what the module returns.
        SourceError: the module does not run on the example.
    """
    title, example, layout, class_names = type(module).__name__, options.example, options.layout, options.class_names
    if not isinstance(example, Tensor) or example.ndim != 4 or example.shape[1] != 3:
        found = list(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ConfigError(f"example is {found}; expected a tensor [batch, 3, height, width]")
    if not isinstance(layout, Layout):
        raise ConfigError(
            f"layout is a {type(layout).__name__}; expected a fusenms.layout.Layout that says what {title} returns"
        )
    if isinstance(class_names, str):
        raise ConfigError(f"class_names is the text {class_names!r}; expected a list of class names")
    if bad := [name for name in map(str, class_names) if has_controls(name)]:
        raise ConfigError(f"class_names has {bad[0]!a}, with control characters; expected text of one line")
    if class_names and layout.num_classes and len(class_names) != layout.num_classes:
        raise ConfigError(f"class_names are {len(class_names)}, but the layout has {layout.num_classes} classes")
    head = _Head(copy.deepcopy(module), layout.sources).cpu().float().eval().requires_grad_(False)
    height, width = (int(side) for side in example.shape[2:])
    try:
        with torch.no_grad():
            tensors = head(torch.zeros(2, 3, height, width))
    except ConfigError:
        raise
    except Exception as error:  # the module's own
        raise SourceError(
            f"{title}: does not run on [2, 3, {height}, {width}] ({type(error).__name__}: {error})"
        ) from error
    _check_shapes(title, layout, tensors)
    _check_scores(title, head, layout, (height, width))
    every = tuple(map(str, class_names)) or tuple(f"class{i}" for i in range(layout.num_classes))
    return Network(
        module=head,
        layout=layout,
        class_names=every,
        task=layout.task,
        source=title,
        size=(height, width),
        stride=1,
        pixels=options.preprocessing,
        stretch=options.stretch,
    )


def outputs_of(found: Any, tensors: tuple[str, ...]) -> tuple[Tensor, ...]:
    """What a module returned as the tensors of these names.

    Raises:
        ConfigError: there are others, or as many.
    """
    if isinstance(found, Mapping):
        if missing := [name for name in tensors if name not in found]:
            raise ConfigError(
                f"the module returns {', '.join(map(str, found))}; the layout also names {', '.join(missing)}"
            )
        found = [found[name] for name in tensors]
    every = (found,) if isinstance(found, Tensor) else tuple(found)
    if len(every) != len(tensors):
        raise ConfigError(
            f"the module returns {len(every)} tensors; the layout names {len(tensors)}: {', '.join(tensors)}"
        )
    return every


def _check_scores(title: str, head: nn.Module, layout: Layout, size: tuple[int, int]) -> None:
    """Refuse logits that the layout calls probabilities, where random images show them."""
    tensors = dict(zip(layout.sources, head(torch.rand(2, 3, *size)), strict=True))
    tap = layout.classes
    if layout.activation is not Activation.NONE or tap.tensor not in tensors:
        return
    scores = tensors[tap.tensor].narrow(tap.channel_axis, tap.start, tap.channels)
    if scores.min() < -1e-3 or scores.max() > 1 + 1e-3:
        raise ConfigError(
            f"{title}: class scores go from {scores.min():.3g} to {scores.max():.3g}; with Activation.NONE they are probabilities, from 0 "
            "to 1: say Activation.SIGMOID or SOFTMAX if these are logits"
        )


def _check_shapes(title: str, layout: Layout, tensors: tuple[Tensor, ...]) -> None:
    """Refuse a layout whose taps are not in the tensors."""
    shapes = {name: tuple(t.shape) for name, t in zip(layout.sources, tensors, strict=True)}
    if bad := [name for name, t in zip(layout.sources, tensors, strict=True) if t.shape[0] != 2]:
        raise ConfigError(f"{title}: {bad[0]} is {list(shapes[bad[0]])} for a batch of 2; expected the batch first")
    counts = set()
    for tap in layout.taps:
        shape = shapes.get(tap.tensor)
        if shape is None:  # joined of parts
            continue
        if len(shape) != 3 or shape[tap.channel_axis] < tap.stop:
            raise ConfigError(
                f"{title}: {tap.tensor} is {list(shape)}; expected 3 dimensions, {tap.stop} channels or more at axis {tap.channel_axis}"
            )
        counts.add(shape[tap.candidate_axis])
    if layout.masks is not None:
        shape, wanted = shapes[layout.masks.prototypes], layout.masks.coefficients.channels
        if len(shape) != 4 or shape[1] != wanted:
            raise ConfigError(
                f"{title}: prototypes {layout.masks.prototypes} are {list(shape)}; expected [batch, {wanted}, height, width]"
            )
    if len(counts) > 1:
        raise ConfigError(
            f"{title}: its tensors have {', '.join(map(str, sorted(counts)))} candidates; expected as many in each"
        )
