"""The examination of a module, from what can be seen without a trace to what only the exported file shows."""

from __future__ import annotations

import ast
import copy
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from fusenms.diagnosis.findings import Diagnosis, Finding, Place
from fusenms.diagnosis.places import branch_of, class_place, forward_place, function_of, return_place, statement_of
from fusenms.diagnosis.tracing import Change, Trace, TraceError, changes, conversions, trace
from fusenms.diagnosis.watching import RANDOM, Event, Operators, Watch, place_of_error, user_place
from fusenms.errors import ConfigError, SourceError, UnsupportedOperatorError, first_line
from fusenms.graph.custom_ops import foreign_operators
from fusenms.graph.session import Session
from fusenms.graph.unlike_images import largest_difference, unlike_images
from fusenms.sources.export import DEFAULT_OPSET, FIRST_OPSET_OF_DYNAMO, OPSETS
from fusenms.sources.module import flattened
from fusenms.sources.operators import (
    FUNCTIONS,
    in_torch_export,
    in_torchscript,
    is_declared,
    is_registered,
    made_by,
    opaque_functions,
)
from fusenms.sources.quiet import quiet_exporters
from fusenms.sources.unsupported import detail, operator_of, way_out

TOLERANCE = 1e-4
"""Largest difference that is rounding, relative to the largest value of a tensor."""
ROUNDING = 1e-5
"""A change of the image, relative to its values, that does no more than the rounding of some layers."""
STEP = 32
"""The other sizes are this many pixels larger, or twice as many."""
BATCHES = (1, 3)
LIBRARY = (
    "give the library that has it: custom_ops='LIB'; if nothing here runs it, as a TensorRT plugin, declare it with shape=…, and fuse with "
    "unverified=True"
)
FUNCTION = (
    "stay with tensors, or, in an autograd.Function, say what it is in ONNX: fusenms.register_operator(FUNCTION, f) with a function "
    "f(op, *arguments) of ONNX operators"
)
REGISTERED = "correct what fusenms.register_operator was given for it, or forget it with None"
Size = tuple[int, int]


def examine(
    module: nn.Module, size: Size, *, sizes: bool = True, source: str = "", opset: int | None = None
) -> Diagnosis:
    """Examine a module that takes images ``[B, 3, height, width]`` float32.

    Args:
        size: height and width of the example, in pixels.
        sizes: also ask whether height and width are dynamic.
        source: name of the module, for errors.
        opset: ONNX operator set of the export; default: that of `fusenms.fuse`.

    Raises:
        ConfigError: the opset is out of its range.
    """
    if opset is not None and opset not in OPSETS:
        raise ConfigError(f"opset is {opset}; expected {OPSETS.start} to {OPSETS.stop - 1}")
    examination = _Examination(module, size, sizes, source or type(module).__name__, opset or DEFAULT_OPSET)
    with opaque_functions():
        return examination.run()


RESHAPES = (
    "aten::view",
    "aten::_unsafe_view",
    "aten::reshape",
    "aten::expand",
    "aten::squeeze",
    "aten::mean",
    "aten::sum",
)


class _Flat(nn.Module):
    """A module that returns the tensors of another one, as a flat tuple."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(flattened(self.module(images))[0].values())


@dataclass
class _Examination:
    given: nn.Module
    size: Size
    sizes: bool
    source: str
    opset: int
    findings: list[Finding] = field(default_factory=list)
    dynamic: dict[str, str] = field(default_factory=dict)
    explained: set[str] = field(default_factory=set)
    """Respects (content, batch, size) in which a finding already explains that the export differs."""

    def run(self) -> Diagnosis:
        if not self._device():
            return self._diagnosis()
        self.module = self._copied()
        self._training_mode()
        self.module.eval()
        self.forward = forward_place(self.module)
        self.flat = _Flat(self.module).eval()
        self.images = {kind: torch.from_numpy(values)[None] for kind, values in unlike_images(*self.size).items()}
        self.base = self.images["patches"].repeat(2, 1, 1, 1)
        expected = self._first_run()
        if expected is None:
            return self._diagnosis()
        self._output_structure(expected)
        if self._randomness(expected):
            return self._diagnosis()
        self._batch_mixing()
        self._traces()
        self._export()
        return self._diagnosis()

    def _diagnosis(self) -> Diagnosis:
        seen, kept = set(), []
        for finding in self.findings:  # the first one at a place is the most certain one
            if finding.kind == "batch-mixing" and finding.place == self.forward and self._explains_mixing():
                continue
            key = (finding.file, finding.line) if finding.line else finding.message
            if key not in seen or finding.kind == "output-structure":
                seen.add(key)
                kept.append(finding)
        return Diagnosis(findings=tuple(kept), dynamic=self.dynamic)

    def _add(self, kind: str, place: Place, message: str, remedy: str = "", explains: str = "") -> None:
        self.findings.append(Finding.at(kind, place, message, remedy))
        if explains:
            self.explained.add(explains)

    def _explains_mixing(self) -> bool:
        """Whether something of the whole batch, which the trace keeps, is used in forward: a branch, a number, its length."""
        function = function_of(self.forward)
        kinds = ("control-flow", "detached-data", "baked-constant")
        return any(finding.kind in kinds and function_of(finding.place) == function for finding in self.findings)

    # Without a trace.

    def _device(self) -> bool:
        """Whether all weights are on the CPU."""
        for name, tensor in (*self.given.named_parameters(), *self.given.named_buffers()):
            if tensor.device.type != "cpu":
                self._add(
                    "device", class_place(self.given), f"{name} is on {tensor.device}, and the export runs on the CPU"
                )
                return False
        return True

    def _copied(self) -> nn.Module:
        try:
            module = copy.deepcopy(self.given)
        except Exception as error:  # modules of others can hold what cannot be copied
            raise SourceError(
                f"{self.source}: cannot be copied ({type(error).__name__}: {first_line(error)})"
            ) from error
        for parameter in module.parameters():
            if parameter.is_leaf:
                parameter.requires_grad_(False)
        return module

    def _training_mode(self) -> None:
        kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.InstanceNorm2d)
        left = [
            (name, inner) for name, inner in self.module.named_modules() if isinstance(inner, kinds) and inner.training
        ]
        left = [
            (name, inner)
            for name, inner in left
            if getattr(inner, "p", 1) and getattr(inner, "track_running_stats", True)
        ]
        if left:
            name, inner = left[0]
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            self._add(
                "training-mode",
                class_place(self.module),
                f"{name or 'the module'} ({type(inner).__name__}){more} is in training mode",
            )

    def _first_run(self) -> Any:
        """What the module returns for the example; None if it holds a suppression."""
        operators = Operators()
        try:
            with torch.no_grad(), operators:
                found = self.module(self.base)
        except Exception as error:
            place = place_of_error(error)
            raise SourceError(
                f"{self.source}: does not run on {list(self.base.shape)}, at {place} ({type(error).__name__}: {first_line(error)})"
            ) from error
        self.operators = operators.places
        for name, place in operators.places.items():
            if "nms" in name.lower():
                self._add("nms-inside", place, f"the module calls {name}")
                return None
        return found

    def _output_structure(self, found: Any) -> None:
        place = return_place(self.module) or self.forward
        names, left = flattened(found)
        if left:
            self._add("output-structure", place, f"the export leaves out {', '.join(left)}")
        if isinstance(found, Mapping):
            self._add(
                "output-structure",
                place,
                f"a dict is returned; the export keeps the order ({', '.join(names)}) and loses the keys",
            )
        elif isinstance(found, (list, tuple)) and any(isinstance(part, (list, tuple, dict)) for part in found):
            self._add(
                "output-structure",
                place,
                f"nested lists or dicts are returned; the export flattens them to {len(names)} outputs",
            )

    def _randomness(self, expected: Any) -> bool:
        again, watch = None, Watch()
        with torch.no_grad(), watch:
            again = self.module(self.base)
        if _alike(_tensors(again), _tensors(expected)):
            return False
        place = next((event.place for event in watch.events if event.name in RANDOM), self.forward)
        self._add("randomness", place, "the same image gives other results each time")
        return True

    def _batch_mixing(self) -> None:
        every = torch.cat(list(self.images.values()))
        try:
            together = self._run(every)
            alone = [self._run(image) for image in self.images.values()]
        except Exception as error:
            self._add(
                "fixed-size",
                place_of_error(error),
                f"the module runs at one batch size only ({first_line(error)})",
                explains="batch",
            )
            return
        if any(not part.ndim or len(part) != len(every) for part in together):
            place = next((self.operators[name] for name in RESHAPES if name in self.operators), self.forward)
            self._add(
                "fixed-size",
                place,
                f"a batch of {len(every)} gives an output of another first dimension",
                explains="batch",
            )
            return
        if not _alike(together, [np.concatenate(parts) for parts in zip(*alone, strict=True)]) and self._steady(every):
            self._add(
                "batch-mixing",
                self._mixing_place(every),
                "the images of a batch change each other's results",
                explains="batch",
            )

    def _mixing_place(self, every: Tensor) -> Place:
        """The line that calls the first submodule whose output for an image depends on the others; else that of forward."""
        outputs: dict[str, list[Tensor]] = {}
        places: dict[str, Place] = {}

        def hook(name: str) -> Callable[..., None]:
            def keep(_: nn.Module, __: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    outputs.setdefault(name, []).append(output)
                    places.setdefault(name, user_place())

            return keep

        handles = [inner.register_forward_hook(hook(name)) for name, inner in self.module.named_modules() if name]
        try:
            self._run(every)
            self._run(every[:1])
        finally:
            for handle in handles:
                handle.remove()
        for name, (both, one, *_) in ((name, found) for name, found in outputs.items() if len(found) == 2):
            if len(both) == len(every) and not _alike([both[:1].numpy()], [one.numpy()]):
                return places[name]
        return self.forward

    def _steady(self, images: Tensor) -> bool:
        """Whether rounding leaves the results as they are. Where queries are chosen by their scores, it may exchange them."""
        plain, generator = self._run(images), torch.Generator().manual_seed(0)
        noises = (torch.empty_like(images).uniform_(-ROUNDING, ROUNDING, generator=generator) for _ in range(3))
        return all(_alike(self._run(images * (1 + noise)), plain) for noise in noises)

    def _run(self, images: Tensor) -> list[np.ndarray]:
        with torch.no_grad():
            return _tensors(self.module(images))

    # By traces.

    def _inputs(self) -> Iterator[tuple[str, str, Tensor]]:
        """Respect, its words, and images that differ from the base in that respect."""
        for kind in ("dark", "bright", "noise"):
            yield "content", "for another image", self.images[kind].repeat(2, 1, 1, 1)
        for factor, words in ((255.0, "for an image of large values"), (-1.0, "for an image below 0")):
            yield "content", words, factor * self.images["noise"].repeat(2, 1, 1, 1)
        for batch in BATCHES:
            yield "batch", f"for a batch of {batch}", self.images["patches"].repeat(batch, 1, 1, 1)
        if self.sizes:
            for height, width in self._other_sizes():
                image = torch.from_numpy(unlike_images(height, width)["patches"])[None]
                yield "size", f"at {height}x{width}", image.repeat(2, 1, 1, 1)

    def _other_sizes(self) -> list[Size]:
        return [(self.size[0] + STEP, self.size[1] + 2 * STEP), (self.size[0] + 2 * STEP, self.size[1])]

    def _traces(self) -> None:
        try:
            base = trace(self.flat, self.base)
        except TraceError as error:
            self._untraced(error)
            self.explained |= {"content", "batch", "size", "export"}
            return
        self.base_trace = base
        if not _alike(self._traced(base, self.base), self._run(self.base)):
            place = next((event.place for event in base.events if event.name == "shape"), self.forward)
            self._add(
                "shape-arithmetic",
                place,
                "the trace gives another result than the module for the same image: a size is changed in place",
            )
            self.explained |= {"content", "batch", "size", "export"}
            return
        for respect, words, images in self._inputs():
            try:
                expected = self._run(images)
            except Exception as error:
                if respect != "content":
                    place = place_of_error(error)
                    self._add(
                        "fixed-size", place, f"the module does not run {words} ({first_line(error)})", explains=respect
                    )
                continue
            try:
                other = trace(self.flat, images)
            except TraceError:
                continue
            same = _alike(self._traced(base, images), expected) or not self._steady(images)
            if self._parted(base, other, respect, words, same):
                self.explained.add(respect)
            elif respect not in self.explained and not same:
                self._add("baked-constant", self.forward, f"the trace gives another result {words}", explains=respect)

    def _untraced(self, error: TraceError) -> None:
        cause = error.__cause__ or error
        shape = next((event.place for event in error.events if event.name == "shape"), None)
        if shape is not None:
            self._add("shape-arithmetic", shape, f"the module runs, but its trace does not ({first_line(cause)})")
            return
        self._add("unsupported-operator", place_of_error(cause), f"the module cannot be traced ({first_line(cause)})")

    def _traced(self, base: Trace, images: Tensor) -> list[np.ndarray]:
        try:
            with torch.no_grad():
                return _tensors(base.module(images))
        except Exception:  # the trace does not run on them
            return []

    def _parted(self, base: Trace, other: Trace, respect: str, words: str, same: bool) -> bool:
        """Report what two traces made constant. Return whether there was anything.

        Where the first trace gives the ``same`` as the module for the inputs of the second, only a branch that hangs on values counts.
        """
        parted, causes = changes(base, other), conversions(base, other)
        if not parted or same:
            causes = [event for event in causes if event.name == "compare" and statement_of(event.place) is not None]
            parted = []
            if respect != "content" or not causes:
                return False
        for event in causes:
            self._conversion(event, respect, words)
        functions = {function_of(event.place) for event in causes}
        for change in parted:
            if function_of(change.place) not in functions:
                self._change(change, base, respect, words)
                functions.add(function_of(change.place))
        return True

    def _conversion(self, event: Event, respect: str, words: str) -> None:
        what = {"__bool__": "bool", "__int__": "int", "__float__": "float", "__index__": "index", "__len__": "len"}
        statement = statement_of(event.place)
        if event.name == "compare" and statement is None:
            return  # compared, but nothing hangs on it
        if isinstance(statement, (ast.If, ast.While, ast.IfExp, ast.For, ast.Assert, ast.comprehension)):
            way = "hangs on a value of the image" if event.name == "compare" else f"takes another way {words}"
            self._add("control-flow", event.place, f"{way}, and the export keeps one way")
        elif respect == "content":
            name = what.get(event.name, f".{event.name}()")
            self._add(
                "detached-data",
                event.place,
                f"a value of the image becomes a number of Python ({name}), which the export keeps",
            )
        else:
            name = what.get(event.name, event.name)
            self._add(
                "baked-constant",
                event.place,
                f"a size becomes a number of Python ({name}), which is another one {words}",
            )

    def _change(self, change: Change, base: Trace, respect: str, words: str) -> None:
        if change.structure:
            place = branch_of(change.place) or change.place
            self._add("control-flow", place, f"the operators differ {words}, and the export keeps one way")
        elif respect == "content":
            detached = [event.place for event in base.events if event.name in ("data", "numpy", "__array__", "tolist")]
            near = [place for place in detached if function_of(place) == function_of(change.place)]
            self._add(
                "detached-data",
                near[0] if near else change.place,
                "a value of the image becomes a constant of the export",
            )
        else:
            self._add("baked-constant", change.place, f"holds a constant that is another one {words}")

    # By the exported file.

    def _export(self) -> None:
        if "export" in self.explained:
            return
        try:
            model = _to_onnx(self.flat, self.base, self.opset, self.sizes)
        except Exception as error:  # exporters raise any error
            self._unsupported(error)
            return
        self._compare_export(model)

    def _unsupported(self, error: Exception) -> None:
        operator = operator_of(error)
        if not operator and self.explained:
            return  # a consequence
        place = self._call_of(operator) or place_of_error(error)
        index = "index_put" in str(error) or ("index" in first_line(error).lower() and "index" in operator)
        self._add(
            "index" if index else "unsupported-operator",
            place if place.file else self.forward,
            f"{operator or 'the module'} is not exported at opset {self.opset}{detail(error)}",
            self._way_out(operator, index, error),
        )

    def _call_of(self, operator: str) -> Place | None:
        """The line that calls an operator, in the trace or, where PyTorch calls it by another name there, in a run."""
        traced = next((step.place for step in self.base_trace.steps if operator and step.kind == operator), None)
        plain = operator.split("::")[-1].strip("_")
        run = (place for known, place in self.operators.items() if plain and known.split("::")[-1].strip("_") == plain)
        return traced or next(run, None)

    def _way_out(self, operator: str, index: bool, error: Exception) -> str:
        """What was tried and gives the same as PyTorch, else what the kind of the operator says."""
        if newer := self._newer():
            return f"opset {newer} has it: opset={newer}"
        for opset in dict.fromkeys((max(self.opset, FIRST_OPSET_OF_DYNAMO), OPSETS[-1])):
            if self._works(partial(_by_dynamo, self.flat, self.base, opset)):
                by_itself = "fuse takes it by itself" if opset == FIRST_OPSET_OF_DYNAMO else f"opset={opset}"
                older = "" if opset == self.opset else f"; for an older opset: {way_out(operator)}"
                return f"the torch.export-based exporter has it at opset {opset}: {by_itself} (torch.onnx.export(…, dynamo=True)){older}"
        if index:
            return "no opset up to 20 and no exporter of PyTorch takes it: write it with torch.where or torch.scatter"
        return way_out(operator)

    def _newer(self) -> int | None:
        """A newer opset at which the export gives the same as PyTorch."""
        opsets = (opset for opset in (16, 18, 20) if opset > self.opset)
        works = (opset for opset in opsets if self._works(partial(_to_onnx, self.flat, self.base, opset, self.sizes)))
        return next(works, None)

    def _works(self, make: Callable[[], onnx.ModelProto]) -> bool:
        """Whether an export succeeds and gives the same as PyTorch."""
        try:
            session = Session(make(), source=self.source)
        except Exception:  # exporters raise any error
            return False
        return _differs(session, self.base, self._run(self.base)) is None

    def _compare_export(self, model: onnx.ModelProto) -> None:
        try:
            session = Session(model, source=self.source)
        except UnsupportedOperatorError:
            self._not_run(foreign_operators(model))
            return
        except SourceError as error:
            self._add("unsupported-operator", self.forward, f"ONNX Runtime refuses the export ({first_line(error)})")
            return
        if (reason := _differs(session, self.base, self._run(self.base))) is not None and self._steady(self.base):
            if self._detached(reason):
                return
            events = [event for event in self._events() if event.name in ("__setitem__", "index_put_")]
            called = next((name for name in self.operators if is_registered(name)), "")
            if not events and called:
                message = f"the exported file {reason}, and {called.removeprefix(f'{FUNCTIONS}::')} is registered"
                self._add("unsupported-operator", self.operators[called], message, REGISTERED)
                return
            if not events and (newer := self._newer()):
                message = f"at opset {self.opset}, the exported file {reason}"
                remedy = f"opset {newer} gives the same as PyTorch: opset={newer}"
                self._add("unsupported-operator", self.forward, message, remedy)
                return
            place = events[0].place if events else self.operators.get("aten::index", self.forward)
            self._add(
                "index" if events or "aten::index" in self.operators else "dynamic-dimension",
                place,
                f"the exported file {reason}",
            )
            return
        self.dynamic = {"batch": "equal", "size": "equal" if self.sizes else "not asked for"}
        for respect, words, images in self._inputs():
            try:
                expected = self._run(images)
            except Exception:
                self.dynamic[respect] = f"the module itself does not run {words}"
                continue
            if (reason := _differs(session, images, expected)) is None:
                continue
            if not self._steady(images):
                if respect in self.dynamic:
                    self.dynamic[respect] = f"not judged {words}: rounding alone changes the results"
                continue
            if respect in self.dynamic:
                self.dynamic[respect] = f"{reason} {words}"
            if respect not in self.explained and not (respect == "content" and self._detached(f"{reason} {words}")):
                self._add("dynamic-dimension", self.forward, f"the exported file {reason} {words}", explains=respect)

    def _detached(self, reason: str) -> bool:
        """Report the first value of the image that became one of Python where no trace looks: in an `autograd.Function`."""
        seen = [event.place for event in self._events() if event.name in ("numpy", "__array__", "tolist", "item")]
        if not seen:
            return False
        message = f"the exported file {reason}: a value of the image becomes a constant of the export"
        self._add("detached-data", seen[0], message, FUNCTION, explains="content")
        return True

    def _not_run(self, operators: Mapping[str, str]) -> None:
        """Report operators that nothing here runs, unless they are declared as such."""
        self.dynamic = dict.fromkeys(("batch", "size"), f"not run: nothing here runs {', '.join(operators)}")
        for name in operators:
            if not is_declared(name):
                called = made_by(name)
                place = self._call_of(called) or next(
                    (
                        p
                        for known, p in self.operators.items()
                        if called and known.startswith(f"{FUNCTIONS}::{called}_")
                    ),
                    self.forward,
                )
                self._add(
                    "unsupported-operator", place, f"{called} becomes {name}, which ONNX Runtime does not have", LIBRARY
                )

    def _events(self) -> Sequence[Event]:
        with torch.no_grad(), Watch() as watch:
            self.module(self.base)
        return watch.events


def _to_onnx(module: nn.Module, images: Tensor, opset: int, sizes: bool) -> onnx.ModelProto:
    stream, count = io.BytesIO(), len(module(images))
    names = [f"output{i}" for i in range(count)]
    axes = {"images": {0: "batch"} | ({2: "height", 3: "width"} if sizes else {})} | {
        name: {0: "batch"} for name in names
    }
    with in_torchscript([opset], sizes), quiet_exporters(), torch.no_grad():
        torch.onnx.export(
            module, (images,), cast(Any, stream), dynamo=False, opset_version=opset, input_names=["images"], output_names=names,
            dynamic_axes=axes,
        )  # fmt: skip
    model = onnx.load_from_string(stream.getvalue())
    for entry in model.graph.output:  # sizes that follow from open ones are open too
        entry.type.tensor_type.ClearField("shape")
    return model


def _by_dynamo(module: nn.Module, images: Tensor, opset: int) -> onnx.ModelProto:
    with in_torch_export(lambda: module(images)) as table, quiet_exporters(), torch.no_grad():
        program = torch.onnx.export(
            module, (images,), dynamo=True, opset_version=opset, verbose=False, custom_translation_table=table or None
        )
    assert program is not None
    return program.model_proto


def _differs(session: Session, images: Tensor, expected: list[np.ndarray]) -> str | None:
    """How the file differs from PyTorch, as a clause; None if it does not."""
    if not session.inputs:
        return "does not depend on the image"
    try:
        got = session.run({session.inputs[0]: images.numpy()}, None)
    except SourceError as error:
        node = re.search(r"Name: ?'([^']+)'", str(error))
        return f"does not run{f' at node {node[1]}' if node else ''} ({first_line(error)[:160]})"
    if _alike(list(got), expected):
        return None
    found = largest_difference(list(got), expected) if len(got) == len(expected) else None
    return (
        f"differs from PyTorch by {found.absolute:.2g} in output {found.tensor}"
        if found
        else "has other outputs than PyTorch"
    )


def _alike(got: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> bool:
    if len(got) != len(expected):
        return False
    return not expected or largest_difference(list(got), list(expected)).share <= TOLERANCE


def _tensors(found: Any) -> list[np.ndarray]:
    return [tensor.detach().cpu().numpy() for tensor in flattened(found)[0].values()]


def check_size(size: Any) -> Size:
    """Check a (height, width) in pixels.

    Raises:
        ConfigError: it is none.
    """
    if (
        not isinstance(size, tuple)
        or len(size) != 2
        or not all(type(side) is int and 0 < side <= 2**14 for side in size)
    ):
        raise ConfigError(f"size is {size!r}; expected (height, width) in pixels")
    return size
