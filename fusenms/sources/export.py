"""Export a loaded checkpoint to ONNX, cut at the head's taps, and check it against PyTorch."""

from __future__ import annotations

import io
import threading
import warnings

import numpy as np
import onnx
import torch

from fusenms.artifacts import ImageInput, RawModel
from fusenms.errors import ConfigError, SourceError
from fusenms.layout import Activation, AnchorBoxes, BoxFormat, Decoded, Distances, Layout, Tap
from fusenms.sources.checkpoint import Checkpoint
from fusenms.sources.modules import AnchorFreeDetect
from fusenms.sources.rtdetr import RTDETRDecoder

DEFAULT_OPSET = 17
"""The newest opset that every supported TensorRT reads (8.5 reads 17 at most)."""
OPSETS = range(13, 21)  # what PyTorch's TorchScript exporter writes
DEFAULT_SIZE = 640
PARITY_BATCHES = (1, 2, 3)
PARITY_TOLERANCE = 1e-3  # absolute, on logits of magnitude ten; float32 rounding gives about 1e-4

_exporting = threading.Lock()  # the TorchScript exporter keeps global state

IMAGE, HEAD, HEAD_BOXES, HEAD_CLASSES = "images", "head", "head_boxes", "head_classes"


def export(
    checkpoint: Checkpoint, source: str, *, size: tuple[int, int] | None, dynamic_size: bool, opset: int | None
) -> RawModel:
    """Export to ONNX with dynamic batch; compare ONNX Runtime with PyTorch at batch 1, 2, 3.

    Args:
        source: file name, for the records.
        size: (height, width) in pixels; default: what the checkpoint was trained at, or 640.
        dynamic_size: leave height and width open.
        opset: ONNX operator set; default `DEFAULT_OPSET`.

    Raises:
        ConfigError: the size is no multiple of the stride, or the opset cannot be written.
        SourceError: the network does not run, or the export differs from it.
    """
    opset = DEFAULT_OPSET if opset is None else opset
    if opset not in OPSETS:
        raise ConfigError(f"opset is {opset}; expected {OPSETS.start} to {OPSETS.stop - 1}")
    stride = max(checkpoint.strides)
    height, width = size or (checkpoint.size or DEFAULT_SIZE,) * 2
    if height % stride or width % stride:
        near = tuple(max(stride, round(side / stride) * stride) for side in (height, width))
        raise ConfigError(
            f"size is {height}x{width}; expected multiples of the stride {stride}, as {near[0]}x{near[1]}"
        )
    layout = _layout(checkpoint)
    if dynamic_size and isinstance(layout.decode, Decoded):
        raise ConfigError(f"{source}: the queries of RT-DETR are made for one size; leave --dynamic-size out")
    try:
        model = _to_onnx(checkpoint, layout, (height, width), dynamic_size, opset)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        IndexError,
        AttributeError,
        torch.onnx.errors.OnnxExporterError,
    ) as error:
        raise SourceError(f"{source}: the network could not be exported ({error})") from error
    sizes = [(height, width)] + ([(height + stride, width + 2 * stride)] if dynamic_size else [])
    worst = max(_difference(checkpoint, layout, model, batch, s) for batch in PARITY_BATCHES for s in sizes)
    if not worst <= PARITY_TOLERANCE:
        raise SourceError(
            f"{source}: the exported network differs from PyTorch by {worst:.2g} (at most {PARITY_TOLERANCE:g} is rounding)"
        )
    side = "height,width" if dynamic_size else f"{height},{width}"
    note = f"{IMAGE}[batch,3,{side}] · opset {opset} · equal to PyTorch at batch 1, 2, 3 (max |Δ| {worst:.0e})"
    image = ImageInput(IMAGE, height, width, stride, dynamic_size)
    return RawModel(model, image, checkpoint.names, checkpoint.task, source, layout, (note,))


def _layout(checkpoint: Checkpoint) -> Layout:
    head, count = checkpoint.head, len(checkpoint.names)
    if isinstance(head, RTDETRDecoder):
        boxes, classes = Tap(HEAD_BOXES, 2, 0, 4), Tap(HEAD_CLASSES, 2, 0, count)
        normalized = Decoded(BoxFormat.CXCYWH, normalized=True)
        return Layout("rtdetr", boxes, classes, None, Activation.SIGMOID, normalized, suppress=False)
    if isinstance(head, AnchorFreeDetect):
        boxes, classes = Tap(HEAD_BOXES, 1, 0, 4 * head.reg_max), Tap(HEAD_CLASSES, 1, 0, count)
        decode = Distances(checkpoint.strides, head.reg_max)
        return Layout("yolov8", boxes, classes, None, Activation.SIGMOID, decode, suppress=not head.one_to_one)
    pixels = head.anchors.double() * torch.tensor(checkpoint.strides, dtype=torch.float64)[:, None, None]
    anchors = tuple(tuple((round(w, 4), round(h, 4)) for w, h in level) for level in pixels.tolist())
    boxes, objectness, classes = Tap(HEAD, 1, 0, 4), Tap(HEAD, 1, 4, 5), Tap(HEAD, 1, 5, 5 + count)
    return Layout("yolov5", boxes, classes, objectness, Activation.SIGMOID, AnchorBoxes(checkpoint.strides, anchors))


def _to_onnx(
    checkpoint: Checkpoint, layout: Layout, size: tuple[int, int], dynamic_size: bool, opset: int
) -> onnx.ModelProto:
    axes: dict[str, dict[int, str]] = {IMAGE: {0: "batch"}} | {name: {0: "batch"} for name in layout.tensors}
    if dynamic_size:
        axes[IMAGE] |= {2: "height", 3: "width"}
        for name in layout.tensors:
            axes[name] |= {2: "candidates"}
    stream = io.BytesIO()
    with _exporting, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the TorchScript exporter announces its own retirement; opset 17 has no other
        torch.onnx.export(
            checkpoint.module,
            (torch.zeros(2, 3, *size),),
            stream,  # type: ignore[arg-type]  # the TorchScript exporter writes to streams
            dynamo=False,
            opset_version=opset,
            input_names=[IMAGE],
            output_names=list(layout.tensors),
            dynamic_axes=axes,
        )
    model = onnx.load_from_string(stream.getvalue())
    with torch.no_grad():
        taps = checkpoint.module(torch.zeros(1, 3, *size))
    for entry, tap in zip(model.graph.output, taps, strict=True):  # the exporter leaves all of these open
        dims = entry.type.tensor_type.shape.dim
        dims[1].dim_value = tap.shape[1]
        if not dynamic_size:
            dims[2].dim_value = tap.shape[2]
    return model


def _difference(
    checkpoint: Checkpoint, layout: Layout, model: onnx.ModelProto, batch: int, size: tuple[int, int]
) -> float:
    """Largest absolute difference between ONNX Runtime and PyTorch on a random batch."""
    import onnxruntime

    images = np.random.default_rng(batch).random((batch, 3, *size), dtype=np.float32)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        got = session.run(list(layout.tensors), {IMAGE: images})
    except Exception as error:  # ONNX Runtime raises its own kinds
        message = str(error).strip().splitlines()[0][:300]
        raise SourceError(f"the exported network does not run in ONNX Runtime at batch {batch} ({message})") from error
    with torch.no_grad():
        expected = checkpoint.module(torch.from_numpy(images))
    values = [tap.numpy() for tap in expected]
    if any(a.shape != b.shape for a, b in zip(got, values, strict=True)):
        return float("inf")
    if isinstance(layout.decode, Decoded):
        return _difference_of_queries(*(np.concatenate(parts, 2) for parts in (got, values)))
    return max(float(np.abs(a - b).max()) for a, b in zip(got, values, strict=True))


def _difference_of_queries(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest distance of a query ``[B, queries, channels]`` from its like: near-equal scores stand in any order."""
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        if (np.abs(a - b) > PARITY_TOLERANCE).any():
            far = np.stack([np.abs(row - b).max(1) for row in a])
            worst = max(worst, float(far.min(0).max()), float(far.min(1).max()))
        else:
            worst = max(worst, float(np.abs(a - b).max()))
    return worst
