"""Loads a custom `nn.Module` with a layout that the user wrote."""

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
    """Copy a module and prepare it for export: in evaluation mode, float32, on the CPU.

    Args:
        module: takes images ``[B, 3, height, width]``. It returns the tensors that ``layout.sources`` names, in that order or by name.
        options: options with an example and a layout. The size of the example becomes the input size.

    Raises:
        ConfigError: an option is invalid, or the layout does not fit the tensors that the module returns.
        SourceError: the module does not run at the size of the example.
    """
    title, example, layout, class_names = type(module).__name__, options.example, options.layout, options.class_names
    if not isinstance(example, Tensor) or example.ndim != 4 or example.shape[1] != 3:
        found = list(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ConfigError(f"example is {found}; expected a tensor [batch, 3, height, width]")
    if not isinstance(layout, Layout):
        raise ConfigError(
            f"layout is a {type(layout).__name__}; expected a fusenms.layout.Layout that describes what {title} returns"
        )
    if isinstance(class_names, str):
        raise ConfigError(f"class_names is the text {class_names!r}; expected a list of class names")
    if bad := [name for name in map(str, class_names) if has_controls(name)]:
        raise ConfigError(f"class_names has {bad[0]!a}, with control characters; expected text of one line")
    if class_names and layout.num_classes and len(class_names) != layout.num_classes:
        raise ConfigError(
            f"class_names has {len(class_names)} names; expected {layout.num_classes}, as the layout has classes"
        )
    head = _Head(copy.deepcopy(module), layout.sources).cpu().float().eval().requires_grad_(False)
    height, width = (int(side) for side in example.shape[2:])
    try:
        with torch.no_grad():
            tensors = head(torch.zeros(2, 3, height, width))
    except ConfigError:
        raise
    except Exception as error:  # the module can raise any error
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
    """The returned value of a module as a tuple of tensors, in the order of the names.

    Raises:
        ConfigError: a name is missing, or the number of tensors differs.
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
    """Refuse a layout without activation if the class scores of random images are not probabilities."""
    tensors = dict(zip(layout.sources, head(torch.rand(2, 3, *size)), strict=True))
    tap = layout.classes
    if layout.activation is not Activation.NONE or tap.tensor not in tensors:
        return
    scores = tensors[tap.tensor].narrow(tap.channel_axis, tap.start, tap.channels)
    if scores.min() < -1e-3 or scores.max() > 1 + 1e-3:
        raise ConfigError(
            f"{title}: class scores range from {scores.min():.3g} to {scores.max():.3g}; expected probabilities from 0 to 1 for "
            "Activation.NONE. If they are logits, use Activation.SIGMOID or SOFTMAX"
        )


def _check_shapes(title: str, layout: Layout, tensors: tuple[Tensor, ...]) -> None:
    """Refuse a layout whose taps do not fit the shapes of the tensors."""
    shapes = {name: tuple(t.shape) for name, t in zip(layout.sources, tensors, strict=True)}
    if bad := [name for name, t in zip(layout.sources, tensors, strict=True) if t.shape[0] != 2]:
        raise ConfigError(f"{title}: {bad[0]} is {list(shapes[bad[0]])} for a batch of 2; expected the batch first")
    counts = set()
    for tap in layout.taps:
        shape = shapes.get(tap.tensor)
        if shape is None:  # a tensor that is joined from parts
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
            f"{title}: its tensors have {', '.join(map(str, sorted(counts)))} candidates; expected the same number in each"
        )
