"""`inspect`: describe a file by a value with fields."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from fusenms import contract
from fusenms.artifacts.fused import FusedModel, load_fused
from fusenms.artifacts.raw import RawModel
from fusenms.errors import HeadError, SourceError
from fusenms.heads import raw_head, recognize
from fusenms.heads.meaning import check_meaning
from fusenms.layout import Layout
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.onnx_reading.files import read_metadata, read_onnx
from fusenms.onnx_reading.tensors import TensorInfo, needed_inputs, tensor_info
from fusenms.runtime.example_images import example_images
from fusenms.sources import load
from fusenms.transforms.dynamic_batch import open_batch


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Description of a file.

    Attributes:
        kind: ``checkpoint``, ``onnx`` (a raw head) or ``fused``.
        inputs, outputs: inputs and outputs of the graph; empty for a checkpoint.
        layout: meaning of the head; None if no family fits.
        reason: why no family fits, or how the network contradicts the layout.
        meaning: what the network shows of the layout, and what is assumed.
        class_names: class names, if the file has them.
        notes: observations made while reading the file.
        frozen_batch: batch size of a raw file with a fixed batch; None if the batch is dynamic.
        opened: for a frozen batch: the result of opening it, or why it cannot be opened.
        fused: for a fused file: the model with backend, settings and precision.
        verification: for a fused file: the result of its verification, from the metadata.
        metadata: for an ONNX file: its metadata, key to text.
    """

    kind: str
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()
    layout: Layout | None = None
    reason: str = ""
    meaning: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    frozen_batch: int | None = None
    opened: str = ""
    fused: FusedModel | None = None
    verification: str = ""
    metadata: dict[str, str] = field(default_factory=dict)


def inspect(path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS) -> Inspection:
    """Describe a file: its kind, its head (or why no family fits), its metadata.

    Args:
        path: a checkpoint (`.pt`), a raw `.onnx`, a fused `.onnx`, or a directory of a Hugging Face detector.
        limits: bounds on what the file may cost.

    Raises:
        SourceError: the file cannot be read or is damaged.

    Example:
        >>> import fusenms
        >>> found = fusenms.inspect("yolov8n.pt")
        >>> found.kind, found.layout.family
        ('checkpoint', 'yolov8')
    """
    path = Path(path)
    if path.suffix.lower() != ".onnx" or not path.is_file():
        return _with_head(Inspection(kind="checkpoint"), load(path, limits=limits))
    model = read_onnx(path, limits)
    metadata = read_metadata(model)
    found = Inspection(
        kind="onnx", inputs=needed_inputs(model), outputs=tuple(map(tensor_info, model.graph.output)), metadata=metadata
    )
    if contract.KEY_BACKEND in metadata:
        fused = load_fused(path, limits=limits)
        return replace(
            found,
            kind="fused",
            inputs=(*found.inputs, *(tensor_info(e) for e in model.graph.input if e.name in _optional(fused))),
            layout=fused.layout,
            class_names=fused.class_names,
            notes=fused.notes,
            fused=fused,
            verification=metadata.get(contract.KEY_VERIFICATION, contract.UNVERIFIED),
        )
    try:
        raw = load(path, limits=limits)
    except (SourceError, HeadError) as error:
        return replace(found, reason=str(error))
    return _with_head(found, raw)


def _with_head(found: Inspection, raw: RawModel) -> Inspection:
    found = replace(found, class_names=raw.class_names, notes=raw.notes, frozen_batch=raw.frozen_batch)
    try:
        layout = recognize(raw)
    except (HeadError, SourceError) as error:
        return replace(found, reason=str(error))
    opened = ""
    if raw.frozen_batch is not None:
        try:
            raw = open_batch(raw, layout)
            opened = raw.notes[-1]
        except SourceError as error:
            opened = f"no: {error}"
    try:
        examples = example_images(raw.image.height, raw.image.width)
        meaning = check_meaning(
            raw, raw_head(raw, layout), [] if examples is None else [examples], guessed=raw.layout is None
        )
    except (HeadError, SourceError) as error:
        return replace(found, reason=str(error), opened=opened)
    return replace(found, layout=layout, meaning=meaning, opened=opened)


def _optional(fused: FusedModel) -> set[str]:
    """Names of the optional inputs of a fused model."""
    return {given.name for given in fused.layout.runtime_inputs(fused.config)}
