"""What running a module shows, without a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusenms.diagnosis.findings import Place
from fusenms.diagnosis.places import class_place, return_place
from fusenms.diagnosis.subject import Subject, alike, tensors
from fusenms.diagnosis.watching import RANDOM, Operators, Watch, place_of_error, user_place
from fusenms.errors import SourceError, first_line
from fusenms.sources.module import flattened

RESHAPES = (
    "aten::view",
    "aten::_unsafe_view",
    "aten::reshape",
    "aten::expand",
    "aten::squeeze",
    "aten::mean",
    "aten::sum",
)


def check_runs(subject: Subject) -> bool:
    """Run a module in several ways. Return whether traces can tell more.

    Raises:
        SourceError: the module cannot be copied, or does not run.
    """
    if not _device(subject):
        return False
    subject.module = _copied(subject)
    _training_mode(subject)
    subject.module.eval()
    expected = _first_run(subject)
    if expected is None:
        return False
    _output_structure(subject, expected)
    if _randomness(subject, expected):
        return False
    _batch_mixing(subject)
    return True


def _device(subject: Subject) -> bool:
    """Whether all weights are on the CPU."""
    for name, tensor in (*subject.module.named_parameters(), *subject.module.named_buffers()):
        if tensor.device.type != "cpu":
            subject.add(
                "device", class_place(subject.module), f"{name} is on {tensor.device}, and the export runs on the CPU"
            )
            return False
    return True


def _copied(subject: Subject) -> nn.Module:
    try:
        module = copy.deepcopy(subject.module)
    except Exception as error:  # modules of others can hold what cannot be copied
        raise SourceError(
            f"{subject.source}: cannot be copied ({type(error).__name__}: {first_line(error)})"
        ) from error
    for parameter in module.parameters():
        if parameter.is_leaf:
            parameter.requires_grad_(False)
    return module


def _training_mode(subject: Subject) -> None:
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.InstanceNorm2d)
    left = [
        (name, inner) for name, inner in subject.module.named_modules() if isinstance(inner, kinds) and inner.training
    ]
    left = [
        (name, inner) for name, inner in left if getattr(inner, "p", 1) and getattr(inner, "track_running_stats", True)
    ]
    if left:
        name, inner = left[0]
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        subject.add(
            "training-mode",
            class_place(subject.module),
            f"{name or 'the module'} ({type(inner).__name__}){more} is in training mode",
        )


def _first_run(subject: Subject) -> Any:
    """What the module returns for the example; None if it holds a suppression."""
    operators = Operators()
    try:
        with torch.no_grad(), operators:
            found = subject.module(subject.base)
    except Exception as error:
        place = place_of_error(error)
        raise SourceError(
            f"{subject.source}: does not run on {list(subject.base.shape)}, at {place} ({type(error).__name__}: {first_line(error)})"
        ) from error
    subject.operators = operators.places
    for name, place in operators.places.items():
        if "nms" in name.lower():
            subject.add("nms-inside", place, f"the module calls {name}")
            return None
    return found


def _output_structure(subject: Subject, found: Any) -> None:
    place = return_place(subject.module) or subject.forward
    names, left = flattened(found)
    if left:
        subject.add("output-structure", place, f"the export leaves out {', '.join(left)}")
    if isinstance(found, Mapping):
        subject.add(
            "output-structure",
            place,
            f"a dict is returned; the export keeps the order ({', '.join(names)}) and loses the keys",
        )
    elif isinstance(found, (list, tuple)) and any(isinstance(part, (list, tuple, dict)) for part in found):
        subject.add(
            "output-structure",
            place,
            f"nested lists or dicts are returned; the export flattens them to {len(names)} outputs",
        )


def _randomness(subject: Subject, expected: Any) -> bool:
    again, watch = None, Watch()
    with torch.no_grad(), watch:
        again = subject.module(subject.base)
    if alike(tensors(again), tensors(expected)):
        return False
    place = next((event.place for event in watch.events if event.name in RANDOM), subject.forward)
    subject.add("randomness", place, "the same image gives other results each time")
    return True


def _batch_mixing(subject: Subject) -> None:
    every = torch.cat(list(subject.images.values()))
    try:
        together = subject.run(every)
        alone = [subject.run(image) for image in subject.images.values()]
    except Exception as error:
        subject.add(
            "fixed-size",
            place_of_error(error),
            f"the module runs at one batch size only ({first_line(error)})",
            explains="batch",
        )
        return
    if any(not part.ndim or len(part) != len(every) for part in together):
        place = next((subject.operators[name] for name in RESHAPES if name in subject.operators), subject.forward)
        subject.add(
            "fixed-size",
            place,
            f"a batch of {len(every)} gives an output of another first dimension",
            explains="batch",
        )
        return
    if not alike(together, [np.concatenate(parts) for parts in zip(*alone, strict=True)]) and subject.steady(every):
        subject.add(
            "batch-mixing",
            _mixing_place(subject, every),
            "the images of a batch change each other's results",
            explains="batch",
        )


def _mixing_place(subject: Subject, every: Tensor) -> Place:
    """The line that calls the first submodule whose output for an image depends on the others; else that of forward."""
    outputs: dict[str, list[Tensor]] = {}
    places: dict[str, Place] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.setdefault(name, []).append(output)
                places.setdefault(name, user_place())

        return keep

    handles = [inner.register_forward_hook(hook(name)) for name, inner in subject.module.named_modules() if name]
    try:
        subject.run(every)
        subject.run(every[:1])
    finally:
        for handle in handles:
            handle.remove()
    for name, (both, one, *_) in ((name, found) for name, found in outputs.items() if len(found) == 2):
        if len(both) == len(every) and not alike([both[:1].numpy()], [one.numpy()]):
            return places[name]
    return subject.forward
