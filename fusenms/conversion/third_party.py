"""A file that others fused: find its suppression, cut it out, recognize the head, and show by the file's own rows that it is read right."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from fusenms import contract
from fusenms.artifacts.fused import FusedModel
from fusenms.artifacts.raw import RawModel
from fusenms.artifacts.report import counted
from fusenms.config import PostprocessConfig
from fusenms.conversion.branches import with_suppressions_inlined
from fusenms.conversion.cut import Around, Cut
from fusenms.conversion.old_file import rows_of, runnable
from fusenms.conversion.one_image import with_batch
from fusenms.conversion.selected import without_selections
from fusenms.conversion.semantics import Semantics
from fusenms.conversion.suppressions import (
    BATCHED,
    ChainContext,
    Found,
    find_suppression,
    plugin_semantics,
    standard_semantics,
)
from fusenms.errors import HeadError, SourceError, SuppressionError, first_line
from fusenms.fusion.tail import fuse_head
from fusenms.graph.model import part_before, with_outputs
from fusenms.graph.session import Session
from fusenms.heads import Anchors, raw_head, recognize
from fusenms.heads.probe import are_normalized
from fusenms.layout import Decoded, Layout
from fusenms.onnx_reading import untrusted
from fusenms.onnx_reading.files import read_onnx
from fusenms.reference import Rows, candidates, postprocess
from fusenms.runtime.example_images import example_images
from fusenms.runtime.placement import load_tensor
from fusenms.sources.onnx_file import load_model
from fusenms.sources.options import LoadOptions
from fusenms.transforms.dynamic_batch import open_batch

SAME_BOX, SAME_SCORE = 0.5, 2e-3
"""Largest difference of a row of the file to that of the reference, in pixels and in score: files compute in other orders."""
Images = np.ndarray | str | os.PathLike[str] | None
ENOUGH = 0.9
"""Share of the file's rows that the reference must give, with the file's own settings, for the head to be read right."""


@dataclass(frozen=True)
class RowsCompared:
    """Rows of a third-party file beside the reference on the same images.

    Attributes:
        images: number of images.
        before: rows of the file.
        expected: rows of the reference with the file's own settings.
        same: rows that are in both.
        after: rows of the reference with the new settings.
        left: rows of the file that are also among these.
        worst_box, worst_score: largest differences of rows in both, in pixels and in score.
    """

    images: int
    before: int
    expected: int
    same: int
    after: int
    left: int
    worst_box: float
    worst_score: float

    @property
    def agree(self) -> bool:
        """Whether the head is read right: enough of the rows of either are in both."""
        return self.same >= ENOUGH * max(self.before, self.expected)

    @property
    def explained(self) -> bool:
        """Whether the reference with the file's own settings gives every row of the file and no other."""
        return self.same == self.before == self.expected

    @property
    def verdict(self) -> str:
        """What the rows show, in words."""
        if not self.before and not self.expected:
            return (
                "no detections in these images, so that nothing is shown: give images that the model finds something in"
            )
        if self.explained:
            return (
                "every row of the file is the reference's with its settings: all differences are those of the settings"
            )
        return f"{self.before + self.expected - 2 * self.same} rows are not explained by the settings"

    @property
    def summary(self) -> str:
        """One line."""
        return (
            f"{counted(self.images, 'image')} · {self.before} rows in the file, {self.expected} by the reference with its settings, "
            f"{self.same} the same (worst box {self.worst_box:.2g} px, score {self.worst_score:.2g}) · now {self.after}, "
            f"{self.left} of them in the file"
        )


@dataclass(frozen=True)
class ThirdParty:
    """A third-party file, cut before its suppression: the raw model, its layout, what the file did, its rows, and on which images.

    ``meant`` says that the graph itself shows what the head means, whatever rows there are; ``notes``, what it does with images.
    """

    raw: RawModel
    layout: Layout
    semantics: Semantics
    rows: RowsCompared
    images: np.ndarray | None
    meant: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What a third-party file is read for: family and anchors of its head, images to compare on, and the settings of the new file.

    ``fields`` are those of `PostprocessConfig` that are given; with ``keep_semantics``, the others are the file's own.
    """

    family: str | None
    anchors: Anchors | None
    images: Images
    keep_semantics: bool
    fields: dict[str, Any]

    def config(self, semantics: Semantics) -> PostprocessConfig:
        """The settings of the new file.

        Raises:
            ConfigError: a setting is unknown, or out of its range.
        """
        return PostprocessConfig.from_dict((semantics.settings if self.keep_semantics else {}) | self.fields)


Attempts = Iterator[tuple[str, Callable[[], ThirdParty]]]
"""Places where a file may be cut, in words, and what cuts it there."""


def take_apart(path: Path, options: LoadOptions, wanted: Wanted) -> ThirdParty:
    """Cut a file before its suppression, with the first cut whose head is recognized and gives the file's own rows.

    Raises:
        SuppressionError: there is no suppression, it cannot be cut out, or the head gives other rows than the file.
        SourceError: the file cannot be read, or does not run.
    """
    model = with_batch(read_onnx(path, options.limits))
    with untrusted(path, "finding its suppression"):
        flat = with_suppressions_inlined(model)
        found = find_suppression(path.name, flat)
        if found is None:
            raise SuppressionError(
                f"{path}: has no suppression; expected one to cut out. Fuse the raw head with: python -m fusenms {path}"
            )
        _refuse_decoding(path, model)
        whole = _loaded(path, flat, options)
    ways: list[Callable[[], Attempts]] = [lambda: _cuts(path, options, wanted, whole, found)]
    if flat is not model:  # torchvision's batched_nms, whose boxes are x, y, x, y
        ways.insert(0, lambda: _all_candidates(path, options, wanted, whole, found, model))
    reasons = []
    for way in ways:
        for named, attempt in way():
            try:
                return attempt()
            except (HeadError, SourceError) as error:
                reasons.append(f"{named}: {first_line(error).removeprefix(f'{path}: ')}")
    listed = "".join(f"\n  {reason}" for reason in reasons) or " no tensor of candidates is before it"
    raise SuppressionError(
        f"{path}: its suppression ({found.operator}) cannot be cut out; expected a known head before it, which gives its rows:{listed}"
    )


def _cuts(path: Path, options: LoadOptions, wanted: Wanted, whole: RawModel, found: Found) -> Attempts:
    """Cut at tensors of the file."""
    with untrusted(path, "finding its suppression"):
        around = Around(whole, found)
        cuts = around.cuts()
    for cut in cuts:
        named = ", ".join(f"{name} {list(around.values[name].shape)}" for name in cut.tensors)
        yield named, partial(_try, path, options, wanted, around, cut)


def _all_candidates(
    path: Path, options: LoadOptions, wanted: Wanted, whole: RawModel, found: Found, model: onnx.ModelProto
) -> Attempts:
    """Cut where the file has selected candidates already, without the selection. ``model`` is the file as it runs."""
    with untrusted(path, "finding its candidates"):
        dense = without_selections(whole, found)
    if dense is not None:

        def attempt() -> ThirdParty:
            raw, old = _loaded(path, dense.model, options), _loaded(path, model, options)
            raw = replace(raw, pixels=dense.pixels) if raw.pixels is None else raw
            shown = _shown(path, wanted, raw, dense.layout, dense.semantics, old)
            return replace(shown, meant=True, notes=dense.notes)

        yield f"all {dense.model.graph.output[0].type.tensor_type.shape.dim[1].dim_value} candidates", attempt


def _refuse_decoding(path: Path, model: onnx.ModelProto) -> None:
    """Refuse a file that takes the bytes of image files, as onnxruntime-extensions writes it.

    Raises:
        SuppressionError: it is one.
    """
    decoder = next((node for node in model.graph.node if node.op_type == "DecodeImage"), None)
    if decoder is None:
        return
    first = next((node.input[0] for node in model.graph.node if node.op_type == "Conv"), "")
    raise SuppressionError(
        f"{path}: decodes images itself (node {decoder.name!r} of type DecodeImage), and its rows are not outputs; expected a file that "
        f"takes images. Cut the network out with fusenms.extract, from the tensor {first!r} to its head, and fuse that"
    )


def _try(path: Path, options: LoadOptions, wanted: Wanted, around: Around, cut: Cut) -> ThirdParty:
    part = part_before(around.model, [*cut.tensors, *cut.kept])
    _drop_arguments(part)
    raw = _loaded(path, part, options)
    layout = recognize(raw, wanted.family, anchors=wanted.anchors)
    semantics = _semantics(around, cut, layout)
    old = replace(around.raw, model=_runnable(around, semantics))
    return _shown(path, wanted, raw, layout, semantics, old)


def _shown(
    path: Path, wanted: Wanted, raw: RawModel, layout: Layout, semantics: Semantics, old: RawModel
) -> ThirdParty:
    """Compare rows of the file, ``old``, with those of a head.

    Raises:
        SuppressionError: the head gives other rows.
    """
    opened = open_batch(raw, layout)
    head = raw_head(opened, layout)
    arrays = _arrays(wanted.images, raw, head.stretch)
    shown = arrays if arrays is not None else np.zeros((0, 3, raw.image.height, raw.image.width), np.float32)
    new = fuse_head(opened, head, wanted.config(semantics), "ort")
    rows = _compared(old, semantics, new, head.pixels.apply(shown), shown)
    if not rows.agree:
        read = ", ".join((*semantics.others, semantics.summary))
        raise SuppressionError(
            f"{path}: read as {layout.family}, but its own settings give other rows than the file: {rows.before} rows in the file, "
            f"{rows.expected} by the reference with its settings, {rows.same} the same ({read})"
        )
    return ThirdParty(raw, layout, semantics, rows, arrays)


def _arrays(images: Images, raw: RawModel, stretch: bool) -> np.ndarray | None:
    """The images as an array: those given, or the package's own; None without OpenCV."""
    if images is None:
        return example_images(raw.image.height, raw.image.width)
    if isinstance(images, np.ndarray):
        return images
    return load_tensor(Path(images), raw.image.height, raw.image.width, stretch, raw.limits)


def _loaded(path: Path, model: onnx.ModelProto, options: LoadOptions) -> RawModel:
    """A part of the file as a raw model. Class names of the file stay."""
    raw = load_model(path, model, options)
    return replace(
        raw,
        batch=options.asked_batch,
        pixels=raw.pixels if options.pixels is None else options.preprocessing,
        stretch=raw.stretch if options.stretch is None else options.stretch,
    )


def _semantics(around: Around, cut: Cut, layout: Layout) -> Semantics:
    if around.found.is_plugin:
        return replace(plugin_semantics(around.found), outputs=_same_outputs(around, layout))
    context = ChainContext(
        rows_of_suppression=around.rows_of_suppression(),
        classes=layout.num_classes,
        offset=around.has_offset(cut.tensors),
        compared=around.constants_compared(),
        rows=around.rows_of_output(),
        selected_before=around.selected_before(cut.tensors),
    )
    return standard_semantics(around.found, around.values, context)


def _same_outputs(around: Around, layout: Layout) -> tuple[str, ...]:
    """Names of the outputs that mean the same as the four of a fused file: those of `EfficientNMS_TRT`, with boxes in pixels."""
    names = tuple(around.found.nodes[0].output[:4])
    given = {entry.name for entry in around.model.graph.output}
    in_pixels = not (isinstance(layout.decode, Decoded) and layout.decode.normalized)
    return names if around.found.operator not in BATCHED and in_pixels and given.issuperset(names) else ()


def _compared(raw: RawModel, semantics: Semantics, new: FusedModel, fed: np.ndarray, shown: np.ndarray) -> RowsCompared:
    """Run the file ``raw`` as it is and the network of the new one on images, one by one, and compare rows."""
    size = (raw.image.height, raw.image.width)
    old = Session(raw.model, source=raw.source, max_seconds=raw.limits.max_run_seconds)
    heads = Session(
        part_before(with_outputs(new.model, new.layout.tensors), new.layout.tensors),
        source=raw.source,
        max_seconds=raw.limits.max_run_seconds,
    )
    counts, worst = [0, 0, 0, 0, 0], [0.0, 0.0]
    for image, given in zip(shown, fed, strict=True):
        found = rows_of(old.run({raw.image.tensor: given[None].repeat(raw.frozen_batch or 1, 0)}, old.outputs))
        if found is None:
            raise SuppressionError(f"{raw.source}: its outputs {', '.join(old.outputs)} are rows of no known form")
        found = _in_pixels(found, size)
        batch = image[None].repeat(new.image.batch or 1, 0)
        head = dict(zip(new.layout.tensors, heads.run({new.image.tensor: batch}, new.layout.tensors), strict=True))
        every = candidates(head, 0, new.layout, size)
        own = postprocess(every, semantics.config).rows
        now = postprocess(every, new.config).rows
        pairs = _pairs(found, own)
        counts = [
            a + b
            for a, b in zip(counts, (len(found), len(own), len(pairs), len(now), len(_pairs(found, now))), strict=True)
        ]
        for i, j in pairs:
            worst[0] = max(worst[0], float(np.abs(found.boxes[i] - own.boxes[j]).max()))
            worst[1] = max(worst[1], float(abs(found.scores[i] - own.scores[j])))
    old.close()
    heads.close()
    return RowsCompared(len(shown), *counts, *worst)


def _runnable(around: Around, semantics: Semantics) -> onnx.ModelProto:
    model = runnable(around.model, around.found, semantics)
    if around.found.is_plugin:
        return model
    independent = around.independent()
    return part_before(model, [entry.name for entry in model.graph.output if entry.name not in independent])


def _in_pixels(rows: Rows, size: tuple[int, int]) -> Rows:
    """Rows whose boxes are in units of the image, in pixels."""
    if not len(rows) or not are_normalized(rows.boxes):
        return rows
    return Rows(rows.boxes * np.array([size[1], size[0]] * 2, np.float64), rows.scores, rows.labels)


def _pairs(one: Rows, two: Rows) -> list[tuple[int, int]]:
    """Rows that are the same, each at most once."""
    free, pairs = set(range(len(two))), []
    for i in range(len(one)):
        near = [
            j
            for j in free
            if one.labels[i] == two.labels[j]
            and abs(one.scores[i] - two.scores[j]) <= SAME_SCORE
            and np.abs(one.boxes[i] - two.boxes[j][:4]).max() <= SAME_BOX
        ]
        if near:
            best = min(near, key=lambda j: float(np.abs(one.boxes[i] - two.boxes[j][:4]).max()))
            free.discard(best)
            pairs.append((i, best))
    return pairs


def _drop_arguments(model: onnx.ModelProto) -> None:
    """Remove what Ultralytics' metadata say of the suppression that is gone."""
    gone = (contract.KEY_ARGUMENTS, contract.KEY_BATCH, contract.KEY_END_TO_END)
    kept = {item.key: item.value for item in model.metadata_props if item.key not in gone}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, kept)
