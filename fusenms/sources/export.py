"""Exports a PyTorch detector to ONNX, up to the head's taps. `fusenms.sources.parity` compares the export with PyTorch."""

from __future__ import annotations

import importlib.util
import io
import threading
import warnings
from typing import Any

import onnx
import torch
from torch import nn
from torch.jit._trace import TracerWarning

from fusenms.artifacts.raw import ImageInput, RawModel
from fusenms.errors import ConfigError, SourceError, UnsupportedOperatorError, first_line
from fusenms.graph.session import lacking, missing_operators
from fusenms.layout import (
    Activation,
    AnchorBoxes,
    AngleTerm,
    BoxFormat,
    Decoded,
    Distances,
    KeypointTerms,
    Layout,
    MaskTerms,
    Tap,
)
from fusenms.sources import parity
from fusenms.sources.checkpoint import Checkpoint
from fusenms.sources.network import Network
from fusenms.sources.operators import in_torch_export, in_torchscript, is_declared
from fusenms.sources.quiet import quiet_exporters
from fusenms.sources.torch_modules import tasks
from fusenms.sources.torch_modules.layers import AnchorFreeDetect
from fusenms.sources.torch_modules.rtdetr import RTDETRDecoder
from fusenms.sources.unsupported import deepest, described, operator_of

DEFAULT_OPSET = 17
"""The newest opset that all supported versions of TensorRT read. TensorRT 8.5 reads up to opset 17."""
OPSETS = range(13, 21)  # the opsets that PyTorch's TorchScript exporter writes
FIRST_OPSET_OF_DYNAMO = 18
DEFAULT_SIZE = 640
NOT_COMPARED = "not compared with PyTorch, because nothing here runs {}"

_exporting = threading.Lock()  # the TorchScript exporter keeps global state

IMAGE, HEAD, HEAD_BOXES, HEAD_CLASSES = "images", "head", "head_boxes", "head_classes"
HEAD_COEFFICIENTS, HEAD_PROTOTYPES, HEAD_KEYPOINTS, HEAD_ANGLE = (
    f"head_{name}" for name in ("mask_coefficients", "prototypes", "keypoints", "angle")
)


def network_of(checkpoint: Checkpoint, source: str) -> Network:
    """The network of a checkpoint. ``source`` is the name of its file."""
    size = (checkpoint.size or DEFAULT_SIZE,) * 2
    stride, queries = max(checkpoint.strides), isinstance(checkpoint.head, RTDETRDecoder)
    return Network(
        checkpoint.module,
        _layout(checkpoint),
        checkpoint.class_names,
        checkpoint.task,
        source,
        size,
        stride,
        not queries,
        rebuilt=True,
    )


def export(network: Network, *, size: tuple[int, int] | None, dynamic_size: bool, opset: int | None) -> RawModel:
    """Export to ONNX with a dynamic batch. Compare ONNX Runtime with PyTorch on unlike images, at batch 1, 2, 3 and 7.

    PyTorch's TorchScript exporter is tried first. If it fails, the newer exporter (dynamo) is used, provided that onnxscript is installed
    and no opset below `FIRST_OPSET_OF_DYNAMO` is requested.

    Args:
        size: input size (height, width) in pixels; default: that of the network.
        dynamic_size: make height and width dynamic.
        opset: ONNX operator set; default `DEFAULT_OPSET`.

    Raises:
        ConfigError: the size is not a multiple of the stride or cannot be dynamic, or the opset is not supported.
        SourceError: the network does not run, or the export differs from it.
    """
    if opset is not None and opset not in OPSETS:
        raise ConfigError(f"opset is {opset}; expected {OPSETS.start} to {OPSETS.stop - 1}")
    stride, source, layout = network.stride, network.source, network.layout
    height, width = size or network.size
    if height % stride or width % stride:
        near = tuple(max(stride, round(side / stride) * stride) for side in (height, width))
        raise ConfigError(
            f"size is {height}x{width}; expected multiples of the stride {stride}, for example {near[0]}x{near[1]}"
        )
    if dynamic_size and not network.open_size:
        raise ConfigError(f"{source}: this network works at one size only; leave dynamic_size out")
    sizes = [(height, width), *(parity.other_sizes(network, (height, width))[::-1] if dynamic_size else [])]
    shapes = [_shapes(network, one) for one in sizes]
    try:
        model, baked = _to_onnx(network, sizes[0], shapes, opset)
    except _EXPORT_ERRORS as error:
        raise _failed(network, sizes[0], error, opset) from error
    not_run = _not_run(source, model)
    worst = 0.0 if not_run else parity.compare(network, model, sizes, baked)
    if dynamic_size:
        stride = parity.step_of(network, (height, width))
    side, written = "height,width" if dynamic_size else f"{height},{width}", model.opset_import[0].version
    batches = ", ".join(map(str, parity.BATCHES))
    shown = (
        NOT_COMPARED.format(", ".join(not_run))
        if not_run
        else f"equal to PyTorch at batch {batches} (max |Δ| {worst:.0e})"
    )
    note = f"{IMAGE}[batch,3,{side}] · opset {written} · {shown}"
    constant = [parity.baked_text(baked)] if baked else []
    image = ImageInput(IMAGE, height, width, stride, dynamic_size)
    return RawModel(
        model=model,
        image=image,
        class_names=network.class_names,
        task=network.task,
        source=source,
        layout=layout,
        notes=(note, *constant, *network.notes),
        pixels=network.pixels,
        stretch=network.stretch,
        not_run=tuple(not_run),
    )


def _failed(network: Network, size: tuple[int, int], error: Exception, opset: int | None) -> SourceError:
    """The error for a network that is not exported: the operator, the line that calls it and the way out, if PyTorch names one."""
    both = isinstance(error, _BothFailed)
    cause = error.__cause__ or error if both else error
    advice = "" if network.rebuilt else f"; {parity.DOCTOR}"
    said = f"{network.source}: the network could not be exported"
    if not operator_of(cause):
        return SourceError(f"{said} ({first_line(error)}){advice}")
    text = described(network.module, torch.zeros(2, 3, *size), cause, opset or DEFAULT_OPSET)
    if not both and opset is not None and opset < FIRST_OPSET_OF_DYNAMO:
        text += f"; without opset, the newer exporter (opset {FIRST_OPSET_OF_DYNAMO}) is tried too"
    return UnsupportedOperatorError(f"{said}: {text}{advice}")


def _not_run(source: str, model: onnx.ModelProto) -> dict[str, str]:
    """Operators that nothing here runs, all of them declared by the user.

    Raises:
        UnsupportedOperatorError: one is not declared.
    """
    missing = missing_operators(model)
    if undeclared := {name: node for name, node in missing.items() if not is_declared(name)}:
        raise UnsupportedOperatorError(
            f"{source}: {lacking(undeclared)}; give its library: custom_ops='LIB'. If nothing here runs it, as a TensorRT plugin, declare "
            "it with fusenms.register_operator(…, shape=…), and fuse with unverified=True"
        )
    return missing


class _BothFailed(RuntimeError):
    """Neither exporter takes a network. The cause is the error of the first one."""

    def __init__(self, first: Exception, second: Exception) -> None:
        super().__init__(f"{first_line(first)}; by the newer exporter: {first_line(deepest(second))}")


_EXPORT_ERRORS = (
    *(RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, NotImplementedError, AssertionError),
    torch.onnx.errors.OnnxExporterError,
)


def _layout(checkpoint: Checkpoint) -> Layout:
    head, count = checkpoint.head, len(checkpoint.class_names)
    if isinstance(head, RTDETRDecoder):
        return queries_layout(count, softmax=False)
    if isinstance(head, AnchorFreeDetect):
        boxes, classes = Tap(HEAD_BOXES, 1, 0, 4 * head.reg_max), Tap(HEAD_CLASSES, 1, 0, count)
        plain = head.bin_values == tuple(map(float, range(head.reg_max)))
        decode = Distances(checkpoint.strides, head.reg_max, values=() if plain else head.bin_values)
        task_terms = _task_terms(head)
        return Layout(
            "yolov8", boxes, classes, None, Activation.SIGMOID, decode, suppress=not head.one_to_one, **task_terms
        )
    pixels = head.anchors.double() * torch.tensor(checkpoint.strides, dtype=torch.float64)[:, None, None]
    anchors = tuple(tuple((round(w, 4), round(h, 4)) for w, h in level) for level in pixels.tolist())
    boxes, objectness, classes = Tap(HEAD, 1, 0, 4), Tap(HEAD, 1, 4, 5), Tap(HEAD, 1, 5, 5 + count)
    anchored = AnchorBoxes(checkpoint.strides, anchors)
    return Layout("yolov5", boxes, classes, objectness, Activation.SIGMOID, anchored, **_task_terms(head))


def _task_terms(head: nn.Module) -> dict[str, Any]:
    """The terms of `Layout` for the head's task outputs."""
    if isinstance(head, (tasks.AnchorFreeSegment, tasks.AnchorSegment)):
        return {"masks": MaskTerms(Tap(HEAD_COEFFICIENTS, 1, 0, int(head.nm)), HEAD_PROTOTYPES)}
    if isinstance(head, tasks.AnchorFreePose):
        count, numbers = (int(n) for n in head.kpt_shape)
        values = Tap(HEAD_KEYPOINTS, 1, 0, count * numbers)
        return {"keypoints": KeypointTerms(values, numbers, head.factor, head.point)}
    if isinstance(head, tasks.AnchorFreeOriented):
        return {"angle": AngleTerm(Tap(HEAD_ANGLE, 1, 0, 1), head.sigmoid)}
    return {}


def queries_layout(count: int, softmax: bool) -> Layout:
    """The layout of a head with queries: boxes ``[B, queries, 4]`` (cxcywh, normalized) and class logits.

    Args:
        count: number of classes.
        softmax: whether scores are a softmax, with "no object" after the classes. Otherwise they are sigmoids.
    """
    boxes, classes = Tap(HEAD_BOXES, 2, 0, 4), Tap(HEAD_CLASSES, 2, 0, count)
    decode = Decoded(BoxFormat.CXCYWH, normalized=True)
    if not softmax:
        return Layout("rtdetr", boxes, classes, None, Activation.SIGMOID, decode, suppress=False)
    background = Tap(HEAD_CLASSES, 2, count, count + 1)
    return Layout("detr", boxes, classes, None, Activation.SOFTMAX, decode, suppress=False, background=background)


def _shapes(network: Network, size: tuple[int, int]) -> list[tuple[int, ...]]:
    """Shapes of the head's tensors for one image of this size.

    Raises:
        SourceError: the network does not run.
    """
    try:
        return [tuple(tap.shape) for tap in parity.run(network.module, torch.zeros(1, 3, *size))]
    except Exception as error:  # the module can raise any error
        at = f"{network.source}: the network does not run at {size[0]}x{size[1]} ({type(error).__name__}: {first_line(error)})"
        raise SourceError(f"{at}; leave dynamic_size out if it works at one size only") from error


def _to_onnx(
    network: Network, size: tuple[int, int], shapes: list[list[tuple[int, ...]]], opset: int | None
) -> tuple[onnx.ModelProto, tuple[parity.Baked, ...]]:
    """The network as ONNX, and what the trace has made constant. The batch is dynamic, and so are dimensions that differ between sizes.

    Args:
        shapes: for each size, the shapes of the head's tensors.
    """
    fixed = [[len(set(sides)) == 1 for sides in zip(*some, strict=True)] for some in zip(*shapes, strict=True)]
    axes = {IMAGE: {0: "batch"} | ({2: "height", 3: "width"} if len(shapes) > 1 else {})}
    for name, still in zip(network.layout.sources, fixed, strict=True):
        axes[name] = {0: "batch"} | {i: f"{name}_{i}" for i, same in enumerate(still) if i and not same}
    baked: tuple[parity.Baked, ...] = ()
    try:
        model, baked = _by_torchscript(network, size, axes, opset or DEFAULT_OPSET)
    except _EXPORT_ERRORS as first:
        if (opset is not None and opset < FIRST_OPSET_OF_DYNAMO) or importlib.util.find_spec("onnxscript") is None:
            raise
        try:
            model = _by_dynamo(network, size, axes[IMAGE], opset or FIRST_OPSET_OF_DYNAMO)
        except _EXPORT_ERRORS as second:
            raise _BothFailed(first, second) from first
    for entry, shape, still in zip(
        model.graph.output, shapes[0], fixed, strict=True
    ):  # exporters make more dimensions dynamic than necessary
        for dim, side, same in list(zip(entry.type.tensor_type.shape.dim, shape, still, strict=True))[1:]:
            if same:
                dim.dim_value = side
        entry.type.tensor_type.shape.dim[0].dim_param = "batch"
    return model, baked


def _by_torchscript(
    network: Network, size: tuple[int, int], axes: dict[str, dict[int, str]], opset: int
) -> tuple[onnx.ModelProto, tuple[parity.Baked, ...]]:
    stream = io.BytesIO()
    with _exporting, in_torchscript([opset], len(axes[IMAGE]) > 1), quiet_exporters() as caught, torch.no_grad():
        warnings.filterwarnings("always", category=TracerWarning)
        TracerWarning.ignore_lib_warnings()
        module, images = network.module, torch.zeros(2, 3, *size)
        if any(isinstance(inner, torch.jit.ScriptModule) for inner in module.modules()):
            module = torch.jit.trace(module, (images,), check_trace=False)  # the exporter takes scripts only as a whole
        torch.onnx.export(
            module,
            (images,),
            stream,  # type: ignore[arg-type]  # the TorchScript exporter writes to streams
            dynamo=False,
            opset_version=opset,
            input_names=[IMAGE],
            output_names=list(network.layout.sources),
            dynamic_axes=axes,
        )
    return onnx.load_from_string(stream.getvalue()), parity.baked_in(caught)


def _by_dynamo(network: Network, size: tuple[int, int], axes: dict[int, str], opset: int) -> onnx.ModelProto:
    images = torch.zeros(2, 3, *size)
    with _exporting, in_torch_export(lambda: network.module(images)) as table, quiet_exporters(), torch.no_grad():
        program = torch.onnx.export(
            network.module,
            (images,),
            dynamo=True,
            opset_version=opset,
            input_names=[IMAGE],
            output_names=list(network.layout.sources),
            dynamic_shapes=(dict.fromkeys(axes, torch.export.Dim.DYNAMIC),),
            custom_translation_table=table or None,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for axis, name in axes.items():
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    return model
