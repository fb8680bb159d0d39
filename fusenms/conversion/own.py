"""The raw model and the head of a file that fusenms fused, from the file alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx

from fusenms import contract
from fusenms.artifacts.frames import Frames
from fusenms.artifacts.fused import FusedModel
from fusenms.artifacts.one_tensor import has_one_tensor
from fusenms.artifacts.preprocessing import Pixels
from fusenms.artifacts.raw import RawModel
from fusenms.artifacts.raw_head import RawHead
from fusenms.config import PostprocessConfig
from fusenms.errors import ConfigError, SourceError, UnsupportedByBackendError
from fusenms.fusion.backends import get_backend
from fusenms.fusion.backends.plugin import IN_HALF
from fusenms.fusion.tail import NO_SUPPRESSION, fuse_head
from fusenms.graph.model import part_before
from fusenms.graph.session import Session
from fusenms.heads import raw_head
from fusenms.heads.probe import probe_image
from fusenms.transforms.frames import check_frames, frames_from, parts, with_frames

HEAD_ROUNDING = {"fp32": 1e-4, "fp16": 1e-2, "int8": 1e-4}
"""Largest difference of a head tensor, relative to its largest value, by precision. ONNX Runtime joins other operators in another graph."""


def raw_of(fused: FusedModel) -> tuple[RawModel, RawHead]:
    """Return the network of a fused file up to the tensors of its head, and the head. It takes images, also if the file takes frames.

    The network converts pixels itself, where it needs others than RGB from 0 to 1.

    Raises:
        SourceError: the graph lacks the head, or the network does not run.
    """
    core = fused if fused.image.frames is None else parts(fused).core
    model = part_before(get_backend(core.backend).in_float(core.model), core.layout.tensors)
    drop_idle_domains(model)
    _free_names(model, [f"{name}{IN_HALF}" for name in core.layout.tensors])
    _drop_metadata(model, has_one_tensor(core.config))
    raw = RawModel(
        model=model,
        image=core.image,
        class_names=core.class_names,
        task=core.task,
        source=core.source,
        notes=_kept_notes(fused),
        pixels=Pixels(),
        stretch=core.image.stretch,
        frozen_batch=core.image.batch,
        precision=core.precision,
        limits=core.limits,
    )
    head = raw_head(raw, core.layout)
    return replace(raw, model=_declared(raw, head)), head


def fused_again(fused: FusedModel, raw: RawModel, head: RawHead, config: PostprocessConfig, backend: str) -> FusedModel:
    """Fuse the network of a fused file with other settings or for another backend. It takes frames if the file does.

    Raises:
        ConfigError, UnsupportedByBackendError: a setting, of the file or a new one, does not fit the backend or the head.
        SourceError: the network does not give the head that the file has.
    """
    frames = fused.image.frames
    if fused.precision == "int8" and backend != fused.backend and "ort" in (backend, fused.backend):
        raise UnsupportedByBackendError(
            f"{raw.source}: is quantized for backend {fused.backend}, and backend {backend} takes int8 in another form; quantize the "
            "weights for it"
        )
    try:
        get_backend(backend, config)
        if frames is not None:
            taken = frames_from(frames.size or "dynamic", frames.channels, backend, config, frames.tiles)
            assert taken is not None
            check_frames(raw.source, head.layout, taken, raw.limits.max_image_side)
        made = fuse_head(raw, head, config, backend, None if frames is None else frames.tiles)
    except (ConfigError, UnsupportedByBackendError) as error:
        if isinstance(error, ConfigError) and backend == fused.backend:
            raise
        raise type(error)(f"{error} (the file has backend {fused.backend}, and its other settings are kept)") from error
    _compare_heads(fused, made)
    if frames is None:
        return made
    framed = with_frames(made, frames)
    _compare_images(fused, framed, frames)
    return framed


def _compare_images(before: FusedModel, after: FusedModel, frames: Frames) -> None:
    """Refuse metadata of frames that the graph of the file does not follow: the new one is made by them, and is right by them.

    Raises:
        SourceError: the two make other images of the same frames.
    """
    size = frames.size or (98, 62)
    noise = np.random.default_rng(0).integers(0, 256, (before.image.batch or 2, *frames.shape(*size)), dtype=np.uint8)
    made = []
    for one in (before, after):
        model = parts(one).before
        session = Session(model, source=one.source, max_seconds=one.limits.max_run_seconds)
        given = {model.graph.input[0].name: noise}
        made.append(session.run(given, [output.name for output in model.graph.output]))
        session.close()
    if not all(a.shape == b.shape and np.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(*made, strict=True)):
        raise SourceError(
            f"{before.source}: its metadata says that it takes {frames}, but its graph makes other images of them; the file was changed "
            "after it was written: fuse the weights again"
        )


def _compare_heads(before: FusedModel, after: FusedModel) -> None:
    """Refuse a network that gives another head than that of the file: verification compares only what comes after it.

    Raises:
        SourceError: it does.
    """
    core = before if before.image.frames is None else parts(before).core
    values, rounding = [], HEAD_ROUNDING[before.precision]
    for one in (core, after):
        backend = get_backend(one.backend)
        network = part_before(backend.in_float(one.model), one.layout.tensors)
        session = Session(network, source=one.source, max_seconds=one.limits.max_run_seconds)
        image = probe_image(one.image.height, one.image.width).repeat(one.image.batch or 1, 0)
        values.append(session.run({one.image.tensor: image}, one.layout.tensors))
        session.close()
    for name, old, new in zip(core.layout.tensors, *values, strict=True):
        largest = float(np.abs(old[np.isfinite(old)]).max(initial=1.0))
        if old.shape != new.shape or not np.allclose(old, new, rtol=0, atol=rounding * largest, equal_nan=True):
            raise SourceError(
                f"{before.source}: the network gives another {name} than the file does; the file was changed after it was written: "
                "fuse the weights again"
            )


def changes(before: PostprocessConfig, after: PostprocessConfig) -> tuple[str, ...]:
    """Settings that differ, as ``score_threshold 0.25 -> 0.4``."""
    old, new = before.to_dict(), after.to_dict()
    return tuple(f"{name} {old[name]} -> {new[name]}" for name in old if old[name] != new[name])


def with_settings(config: PostprocessConfig, fields: dict[str, object]) -> PostprocessConfig:
    """The settings of a file, with some replaced.

    Raises:
        ConfigError: there is no such setting, or a value is out of range.
    """
    known = config.to_dict()
    if unknown := sorted(set(fields) - set(known)):
        raise ConfigError(
            f"found {', '.join(unknown)}, which a fused file cannot change; expected some of {', '.join(known)}: everything else needs "
            "the weights"
        )
    return PostprocessConfig.from_dict(known | fields)


def _kept_notes(fused: FusedModel) -> tuple[str, ...]:
    """Notes without those that fusing adds again."""
    frames = None if fused.image.frames is None else f"takes {fused.image.frames},"
    return tuple(
        note
        for note in fused.notes
        if not note.startswith(NO_SUPPRESSION) and not (frames is not None and note.startswith(frames))
    )


def _free_names(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Rename tensors that have one of these names, which backend plugin gives to tensors of its own."""
    new = {name: f"{name}/of_network" for name in names}
    for node in model.graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    for entry in model.graph.value_info:
        entry.name = new.get(entry.name, entry.name)


def drop_idle_domains(model: onnx.ModelProto) -> None:
    """Remove the operator sets that no node uses, such as that of a plugin which is gone. Subgraphs and functions keep all of them."""
    used = {"", "ai.onnx"} | {node.domain for node in model.graph.node} | {one.domain for one in model.functions}
    if any(attribute.HasField("g") for node in model.graph.node for attribute in node.attribute):
        return
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _drop_metadata(model: onnx.ModelProto, one_tensor: bool) -> None:
    """Remove what the metadata say of the fused file. All else stays."""
    gone = {contract.KEY_BATCH, contract.KEY_END_TO_END, contract.KEY_ARGUMENTS} if one_tensor else set()
    kept = [
        (item.key, item.value)
        for item in model.metadata_props
        if item.key not in gone and not item.key.startswith(contract.PREFIX)
    ]
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(kept))


def raw_file(raw: RawModel) -> bytes:
    """The network as a raw `.onnx`, with class names, task, stride and size in its metadata."""
    model = onnx.ModelProto()
    model.CopyFrom(raw.model)
    kept = {item.key: item.value for item in model.metadata_props}
    kept |= {
        contract.KEY_TASK: raw.task,
        contract.KEY_STRIDE: str(raw.image.stride),
        contract.KEY_IMGSZ: str([raw.image.height, raw.image.width]),
    }
    if raw.class_names:
        kept[contract.KEY_NAMES] = str(dict(enumerate(raw.class_names)))
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, kept)
    return model.SerializeToString()


def _declared(raw: RawModel, head: RawHead) -> onnx.ModelProto:
    """The network with the types and shapes of its outputs. With a dynamic size, only their channels are fixed."""
    model, batch = onnx.ModelProto(), raw.image.batch or "batch"
    model.CopyFrom(raw.model)
    del model.graph.output[:]
    channels = {tap.tensor: tap.channel_axis for tap in head.layout.taps}
    for name in head.layout.tensors:
        sizes: list[int | str] = list(head.shapes[name])
        if raw.image.dynamic_size:
            fixed = channels.get(name, 1)
            sizes = [size if axis == fixed else f"{name}_{axis}" for axis, size in enumerate(sizes, 1)]
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [batch, *sizes]))
    return model
