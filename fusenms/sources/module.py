"""Loads a custom `nn.Module` with a layout that the user wrote."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusenms.errors import AlreadyFusedError, ConfigError, SourceError, first_line
from fusenms.layout import Activation, Layout
from fusenms.safety.text import has_controls
from fusenms.sources.network import Network
from fusenms.sources.options import LoadOptions

MOST_EXAMPLES = 4
"""Images of the example on which the export is compared with PyTorch."""


class _SuppressionFound(Exception):
    """The module calls an operator of non-maximum suppression; its name is the message."""


class _NoSuppression(TorchDispatchMode):
    """Stops at operators of non-maximum suppression, such as ``torchvision::nms``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name() if hasattr(func, "name") else str(func)
        if "nms" in name.lower():
            raise _SuppressionFound(name.split(".")[0])
        return func(*args, **(kwargs or {}))


class _Head(nn.Module):
    """A module that returns the tensors of the layout, in order."""

    def __init__(self, module: nn.Module, tensors: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.tensors = module, tensors

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return outputs_of(self.module(images), self.tensors)


def load_module(module: nn.Module, options: LoadOptions) -> Network:
    """Copy a module and prepare it for export: in evaluation mode, float32, on the CPU. Scripted and traced modules are taken too.

    Args:
        module: takes images ``[B, 3, height, width]``. It returns the tensors that ``layout.sources`` names, in that order or by name,
            as `flattened` names them.
        options: options with an example and a layout. The size of the example becomes the input size.

    Raises:
        ConfigError: an option is invalid, or the layout does not fit the tensors that the module returns.
        SourceError: the module cannot be copied, or does not run at the size of the example.
        AlreadyFusedError: the module holds a non-maximum suppression.
    """
    title = str(getattr(module, "original_name", type(module).__name__))  # of the class that was scripted or traced
    example, layout, class_names = options.example, options.layout, options.class_names
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
    head = _copied(title, module, layout.sources)
    height, width = (int(side) for side in example.shape[2:])
    try:
        with torch.no_grad(), _NoSuppression():
            found = head.module(torch.zeros(2, 3, height, width))
        tensors, left = outputs_of(found, layout.sources), flattened(found)[1]
    except ConfigError:
        raise
    except _SuppressionFound as error:
        raise AlreadyFusedError(
            f"{title}: already holds a non-maximum suppression ({error}); expected the raw head. Return the tensors before it"
        ) from error
    except Exception as error:  # the module can raise any error
        raise SourceError(
            f"{title}: does not run on [2, 3, {height}, {width}] ({type(error).__name__}: {first_line(error)})"
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
        notes=(f"not tensors, so left out of what the module returns: {', '.join(left)}",) if left else (),
        examples=example.detach().cpu().float().numpy()[:MOST_EXAMPLES],
    )


def _copied(title: str, module: nn.Module, tensors: tuple[str, ...]) -> _Head:
    try:
        with warnings.catch_warnings():  # PyTorch asks a scripted module's parameters for gradients that nobody wants
            warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
            head = _Head(copy.deepcopy(module), tensors).cpu().float().eval()
    except Exception as error:  # modules of others can hold what cannot be copied or moved
        raise SourceError(
            f"{title}: cannot be copied for the export ({type(error).__name__}: {first_line(error)}); expected an nn.Module in float32 "
            "on the CPU"
        ) from error
    for parameter in head.parameters():  # a scripted module has no requires_grad_, and its parameters may be computed
        if parameter.is_leaf:
            parameter.requires_grad_(False)
    return head


def flattened(found: Any, name: str = "") -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that a module returns, by name, and what else it returns.

    A tensor in a mapping has the name of its key, one in a list or tuple has its number, and inner ones have both: ``boxes.0``.

    >>> flattened({"boxes": [torch.zeros(1), torch.zeros(1)], "loss": None})
    ({'boxes.0': tensor([0.]), 'boxes.1': tensor([0.])}, ['loss (None)'])
    """
    if isinstance(found, Tensor):
        return {name or "0": found}, []
    items: Any = ()
    if isinstance(found, Mapping):
        items = found.items()
    elif isinstance(found, (list, tuple)):
        items = enumerate(found)
    else:
        return {}, [f"{name or '0'} ({'None' if found is None else type(found).__name__})"]
    tensors, left = dict[str, Tensor](), list[str]()
    for key, value in items:
        some, others = flattened(value, f"{name}.{key}" if name else str(key))
        tensors |= some
        left += others
    return tensors, left


def outputs_of(found: Any, tensors: tuple[str, ...]) -> tuple[Tensor, ...]:
    """The returned value of a module as a tuple of tensors, in the order of the names.

    The names are those of `flattened`. Without a mapping, other names stand for the tensors in order.

    Raises:
        ConfigError: a name is missing, or the number of tensors differs.
    """
    every, _ = flattened(found)
    missing = [name for name in tensors if name not in every]
    if not missing:
        return tuple(every[name] for name in tensors)
    if isinstance(found, Mapping):
        raise ConfigError(
            f"the module returns {', '.join(every) or 'no tensors'}; the layout also names {', '.join(missing)}"
        )
    if len(every) != len(tensors):
        raise ConfigError(
            f"the module returns {len(every)} tensors; the layout names {len(tensors)}: {', '.join(tensors)}"
        )
    return tuple(every.values())


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
