"""Triton Inference Server: a model repository with the fused file, or an engine of TensorRT, as it is, and its configuration.

Triton's ONNX Runtime takes optional inputs only of models that it does not batch, and batches only models whose inputs and outputs all
begin with a dynamic batch. So a file gets one of these configurations:

1. a dynamic batch of independent images: ``max_batch_size`` N and dynamic batching; the dims are those of one image;
2. images that depend on each other: the same with ``max_batch_size`` 1, and no batching;
3. a fixed batch, an engine that takes no single image, or thresholds as inputs: ``max_batch_size`` 0, and the dims begin with the batch.

``label_filename`` is left out: Triton names places in a tensor by it, and the places of `labels` are rows. The class names are a parameter.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fusenms.artifacts.fused import FusedModel
from fusenms.artifacts.report import counted
from fusenms.deployment.base import (
    BATCH,
    OPEN,
    Deployment,
    Wanted,
    labels_file,
    model_name,
    outputs_of,
    read_fused,
    refuse_other_builders,
    run_there,
)
from fusenms.engines.running import ENGINES
from fusenms.errors import ConfigError, UnsupportedByBackendError
from fusenms.onnx_reading.tensors import TensorInfo
from fusenms.runtime.opening import EngineFile, read_engine
from fusenms.safety.files import write_folder
from fusenms.safety.text import printable

TYPES = {"bool": "BOOL", "float16": "FP16", "float32": "FP32", "float64": "FP64"} | {
    f"{kind}{bits}": f"{kind.upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)
}
"""Triton's types, without their TYPE_, by NumPy's names."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What Triton is told of a model.

    Attributes:
        file: name of its file.
        platform: Triton's name of what runs it.
        kind: which instances there may be.
        inputs, optional, outputs: its tensors; an open size is a text.
        most: the largest batch that it takes; None: any.
        batches: whether it takes every batch from 1 to that.
    """

    file: str
    platform: str
    kind: str
    inputs: tuple[TensorInfo, ...]
    optional: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    most: int | None
    batches: bool


def deploy_triton(path: Path, output: Path, wanted: Wanted) -> Deployment:
    """Write the model, ``labels.txt`` and ``config.pbtxt`` into a folder of the model's name. Errors are those of `fusenms.deploy`."""
    name = model_name(path)
    if path.suffix.lower() in ENGINES:
        engine = read_engine(path, wanted.limits)
        fused, data, model = engine.fused, engine.engine.data, _of_engine(path, engine)
        checked = "engine and sidecar belong together"
    else:
        file = read_fused(path, wanted.limits)
        checked, fused, data = run_there(path, file, "Triton"), file.fused, file.data
        batches = not file.optional and _open((*file.inputs, *file.outputs))
        model = Model(
            file="model.onnx", platform="onnxruntime_onnx", kind="KIND_AUTO", inputs=file.inputs, optional=file.optional,
            outputs=file.outputs, most=None, batches=batches,
        )  # fmt: skip
    if strange := [one for one in (*model.inputs, *model.optional, *model.outputs) if one.dtype not in TYPES]:
        raise UnsupportedByBackendError(
            f"{path}: Triton has no type for {printable(strange[0])}; leave that tensor out"
        )
    size = _max_batch_size(path, fused, model, wanted.batch)
    labels = labels_file(path, fused.class_names)
    config = config_text(name, fused, model, size)
    files = write_folder(
        output / name,
        {f"1/{model.file}": data, "labels.txt": labels, "config.pbtxt": config.encode()},
        path,
    )
    tensors = f"{counted(len(model.inputs) + len(model.optional), 'input')}, {counted(len(model.outputs), 'output')}"
    batching = f"up to {size} images" if size else "requests as they come, not batched"
    return Deployment(output, tuple(files), (checked, f"config.pbtxt has its {tensors} · {batching}"))


def _max_batch_size(path: Path, fused: FusedModel, model: Model, wanted: int | None) -> int:
    """Triton's ``max_batch_size``.

    Raises:
        ConfigError: the model cannot have the batch that is wanted.
    """
    most = (model.most or wanted or BATCH) if model.batches else 0
    if most and not fused.image.independent:
        most = 1
    if wanted is not None and wanted > most:
        why = (
            f"takes at most {most}" if most else "has a fixed batch or optional inputs, so that Triton cannot batch it"
        )
        raise ConfigError(f"batch is {wanted}, but {path} {why}; leave it out")
    return wanted or most


def _open(tensors: tuple[TensorInfo, ...]) -> bool:
    """Whether all tensors begin with a dynamic size."""
    return all(tensor.shape and isinstance(tensor.shape[0], str) for tensor in tensors)


def _of_engine(path: Path, file: EngineFile) -> Model:
    """The model that an engine is, by its sidecar.

    Raises:
        UnsupportedByBackendError: it is one of TensorRT-RTX.
        SourceError: the sidecar does not say what its outputs are.
    """
    refuse_other_builders(path, file, "Triton")
    outputs, (least, most) = outputs_of(path, file), file.batches
    shapes = file.engine.info["inputs"][file.fused.image.tensor]
    sizes = [low if low == high else OPEN for low, high in zip(shapes["min"], shapes["max"], strict=False)]
    sizes[0] = OPEN if _open(outputs) else most
    return Model(
        file="model.plan", platform="tensorrt_plan", kind="KIND_GPU",
        inputs=(TensorInfo(name=file.fused.image.tensor, dtype="float32", shape=tuple(sizes)),), optional=(), outputs=outputs,
        most=most, batches=_open(outputs) and least == 1,
    )  # fmt: skip


def config_text(name: str, fused: FusedModel, model: Model, max_batch_size: int) -> str:
    """The text of ``config.pbtxt``."""
    parts = [f"name: {quoted(name)}", f"platform: {quoted(model.platform)}", f"max_batch_size: {max_batch_size}"]
    first = 1 if max_batch_size else 0
    parts += [_tensor("input", one, first) for one in model.inputs]
    parts += [_tensor("input", one, first, optional=True) for one in model.optional]
    parts += [_tensor("output", one, first) for one in model.outputs]
    if max_batch_size > 1:
        parts.append("dynamic_batching { }")
    parts.append(f"instance_group [ {{ count: 1 kind: {model.kind} }} ]")
    names = quoted(json.dumps(list(fused.class_names)))
    parts.append(f"parameters [ {{ key: {quoted('names')} value: {{ string_value: {names} }} }} ]")
    return "\n".join((*parts, ""))


def _tensor(kind: str, tensor: TensorInfo, first: int, optional: bool = False) -> str:
    sizes = [str(size) if isinstance(size, int) else "-1" for size in tensor.shape[first:]]
    more = " optional: true" if optional else ""
    if not sizes:  # Triton has no tensors without dims
        sizes, more = ["1"], f"{more} reshape: {{ shape: [ ] }}" if first else more
    entry = f"name: {quoted(tensor.name)} data_type: TYPE_{TYPES[tensor.dtype]} dims: [ {', '.join(sizes)} ]{more}"
    return f"{kind} [ {{ {entry} }} ]"


def quoted(text: str) -> str:
    """A text in the text format of protocol buffers: UTF-8, all but printable ASCII in octal."""
    marks = {ord('"'): '\\"', ord("\\"): "\\\\"}
    safe = (marks.get(byte) or (chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}") for byte in text.encode())
    return f'"{"".join(safe)}"'
