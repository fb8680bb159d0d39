"""Read a raw `.onnx`, our own or a stranger's, and make sure that its batch is dynamic."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from fusenms import contract
from fusenms.artifacts import ImageInput, RawModel, parse_names, read_metadata, read_onnx
from fusenms.errors import AlreadyFusedError, ConfigError, SourceError

NMS_OPS = ("NonMaxSuppression", "EfficientNMS", "BatchedNMS", "NMS_TRT", "NMSRotated", "TRTBatchedNMS")
DEFAULT_SIZE = 640
DEFAULT_STRIDE = 32
MIN_OPSET = 11
ROUNDING = 1e-4  # relative to the largest value of an output


def load_onnx(path: Path, *, size: tuple[int, int] | None, dynamic_size: bool, make_dynamic: bool) -> RawModel:
    """Read a raw detector from an ONNX file.

    Args:
        size: (height, width) in pixels, for a file that leaves them open.
        dynamic_size: keep the file's open height and width open.
        make_dynamic: open a frozen batch dimension, where ONNX Runtime shows that images stay independent.

    Raises:
        AlreadyFusedError: the graph already holds a non-maximum suppression.
        SourceError: the file is unreadable, takes something else than one batch of pictures, or its batch is frozen.
        ConfigError: the size contradicts the file.
    """
    model = read_onnx(path)
    metadata = read_metadata(model)
    _refuse_fused(path, model, metadata)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < MIN_OPSET:
        raise SourceError(
            f"{path}: opset {opset}; expected at least {MIN_OPSET}. "
            "Export again with a newer opset, or convert it with onnx.version_converter"
        )
    entry = _picture_input(path, model)
    dims = entry.type.tensor_type.shape.dim
    frozen = [dim.dim_value or None for dim in dims]
    image = _image(path, entry.name, (frozen[2], frozen[3]), metadata, size, dynamic_size)
    notes: list[str] = []
    if frozen[0] is not None:
        if not make_dynamic:
            raise SourceError(
                f"{path}: the batch size is frozen at {frozen[0]}; expected a dynamic batch. "
                "Export again with a dynamic batch, or add --make-dynamic (make_dynamic=True) to open it here and have that proven"
            )
        model, note, independent = _open_batch(path, model, image, frozen[0])
        image = replace(image, independent=independent)
        notes.append(note)
    dims = _picture_input(path, model).type.tensor_type.shape.dim
    if not image.dynamic_size:
        dims[2].dim_value, dims[3].dim_value = image.height, image.width
    sides = "height,width" if image.dynamic_size else f"{image.height},{image.width}"
    notes.insert(0, f"{image.tensor}[batch,3,{sides}] · opset {opset} · {len(model.graph.node)} nodes")
    names = parse_names(metadata.get(contract.KEY_NAMES, ""))
    return RawModel(model, image, names, metadata.get(contract.KEY_TASK, "detect"), path.name, None, tuple(notes))


def _refuse_fused(path: Path, model: onnx.ModelProto, metadata: dict[str, str]) -> None:
    if contract.KEY_BACKEND in metadata:
        raise AlreadyFusedError(
            f"{path}: is a fused model already (backend {metadata[contract.KEY_BACKEND]}); expected raw weights. "
            f"Run it with: python -m fusenms detect {path} IMAGE, or check it with: python -m fusenms verify {path}"
        )
    for node in model.graph.node:
        if any(word in node.op_type for word in NMS_OPS):
            raise AlreadyFusedError(
                f"{path}: already holds a non-maximum suppression ({node.op_type} node {node.name!r}); "
                "expected the raw head. Export the model again without NMS"
            )


def _picture_input(path: Path, model: onnx.ModelProto) -> onnx.ValueInfoProto:
    constants = {item.name for item in model.graph.initializer}
    inputs = [entry for entry in model.graph.input if entry.name not in constants]
    found = ", ".join(f"{entry.name} {_shape_text(entry)}" for entry in inputs) or "none"
    if len(inputs) != 1:
        raise SourceError(
            f"{path}: found {len(inputs)} inputs ({found}); expected one batch of pictures [batch, 3, height, width]"
        )
    tensor = inputs[0].type.tensor_type
    if tensor.elem_type != onnx.TensorProto.FLOAT:
        raise SourceError(
            f"{path}: input {found} is {onnx.TensorProto.DataType.Name(tensor.elem_type)}; expected FLOAT (float32)"
        )
    dims = tensor.shape.dim
    if len(dims) != 4 or (dims[1].dim_value or 3) != 3:
        raise SourceError(f"{path}: input {found}; expected a batch of pictures [batch, 3, height, width]")
    return inputs[0]


def _shape_text(entry: onnx.ValueInfoProto) -> str:
    return "[" + ", ".join(str(d.dim_value or d.dim_param or "?") for d in entry.type.tensor_type.shape.dim) + "]"


def _image(
    path: Path,
    tensor: str,
    fixed: tuple[int | None, int | None],
    metadata: dict[str, str],
    size: tuple[int, int] | None,
    dynamic_size: bool,
) -> ImageInput:
    stride = _metadata_stride(metadata)
    if fixed[0] and fixed[1]:
        if size is not None and size != fixed:
            raise ConfigError(
                f"{path}: takes {fixed[0]}x{fixed[1]} pictures, but size is {size[0]}x{size[1]}; "
                "leave the size out, or export the model at that size"
            )
        if dynamic_size:
            raise ConfigError(
                f"{path}: height and width are frozen at {fixed[0]}x{fixed[1]}; "
                "leave --dynamic-size out, or export the model with dynamic height and width"
            )
        return ImageInput(tensor, fixed[0], fixed[1], stride)
    height, width = size or _metadata_size(metadata) or (DEFAULT_SIZE, DEFAULT_SIZE)
    if height % stride or width % stride:
        raise ConfigError(f"size is {height}x{width}; expected multiples of the stride {stride}")
    return ImageInput(tensor, fixed[0] or height, fixed[1] or width, stride, dynamic_size)


def _metadata_stride(metadata: dict[str, str]) -> int:
    try:
        return max(1, int(float(metadata[contract.KEY_STRIDE])))
    except (KeyError, ValueError, OverflowError):
        return DEFAULT_STRIDE


def _metadata_size(metadata: dict[str, str]) -> tuple[int, int] | None:
    try:
        height, width = ast.literal_eval(metadata.get(contract.KEY_IMGSZ, ""))
        return (int(height), int(width)) if min(height, width) > 0 else None
    except (ValueError, SyntaxError, TypeError):
        return None


def _open_batch(
    path: Path, model: onnx.ModelProto, image: ImageInput, frozen: int
) -> tuple[onnx.ModelProto, str, bool]:
    """Replace the frozen batch size in the inputs, outputs and reshapes, and show that images stay independent."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    graph = opened.graph
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    from_image = {image.tensor}
    for i, node in enumerate(graph.node):
        if from_image.isdisjoint(node.input):
            continue  # a constant stays as it is
        from_image.update(node.output)
        shape = constants.get(node.input[1]) if node.op_type == "Reshape" else None
        if shape is not None and shape.size > 1 and shape[0] == frozen:
            name = f"{node.input[1]}_batch{i}"
            graph.initializer.append(numpy_helper.from_array(np.array([0, *shape[1:]], np.int64), name))
            node.input[1] = name
    del graph.value_info[:]
    for entry in (_picture_input(path, opened), *graph.output):
        dims = entry.type.tensor_type.shape.dim
        if dims and dims[0].dim_value == frozen:
            dims[0].dim_param = "batch"
    return opened, *_show_independence(path, model, opened, image, frozen)


def _show_independence(
    path: Path, model: onnx.ModelProto, opened: onnx.ModelProto, image: ImageInput, frozen: int
) -> tuple[str, bool]:
    """Run both models: what was found, as a note, and whether each image's rows are those of the original alone.

    Dynamic quantization takes its ranges over the batch; there copies of an image must give what the image gives.

    Raises:
        SourceError: the opened graph does not run, or mixes images for another reason.
    """
    rng = np.random.default_rng(0)
    pictures = rng.random((3 * frozen, 3, image.height, image.width), dtype=np.float32)
    cure = "Export the model again with a dynamic batch"
    try:
        alone = [
            np.concatenate(parts) for parts in zip(*(_run(model, image, p) for p in np.split(pictures, 3)), strict=True)
        ]
        together = _run(opened, image, pictures)
        copies = _run(opened, image, np.repeat(pictures[:frozen], 3, 0))
    except Exception as error:  # ONNX Runtime raises its own kinds
        message = f"the graph does not run at batch {len(pictures)} ({_first_line(error)})"
        raise SourceError(f"{path}: the batch cannot be opened, {message}. {cure}") from error
    for name, got, expected in zip((e.name for e in model.graph.output), together, alone, strict=True):
        if got.shape != expected.shape:
            message = f"output {name} keeps the shape {list(got.shape)} at batch {len(pictures)}"
            raise SourceError(f"{path}: the batch cannot be opened, {message}. {cure}")
    drift = _worst(together, alone)
    if drift <= ROUNDING:
        return f"batch opened (was {frozen}) · 3 images equal to running them alone", True
    quantized = any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.node)
    if not quantized or _worst(copies, [np.repeat(a[:frozen], 3, 0) for a in alone]) > ROUNDING:
        raise SourceError(
            f"{path}: the batch cannot be opened, images of one batch change each other's results. {cure}"
        )
    return (
        f"batch opened (was {frozen}), but images are not independent: dynamic quantization takes its ranges over the "
        f"batch, which moves raw outputs by up to {drift:.1%} of full scale. Run it at batch 1 where that matters; the Detector does"
    ), False


def _run(model: onnx.ModelProto, image: ImageInput, pictures: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {image.tensor: pictures})


def _worst(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Largest difference, relative to the largest value of its output."""
    if any(a.shape != b.shape for a, b in zip(got, expected, strict=True)):
        return float("inf")
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-9)) for a, b in zip(got, expected, strict=True))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
