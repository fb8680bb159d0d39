"""`FusedModel`: a model with the outputs of the contract; writing and reading its file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fusenms import contract
from fusenms.artifacts import one_tensor
from fusenms.artifacts.frames import Frames
from fusenms.artifacts.raw import ImageInput
from fusenms.config import PostprocessConfig
from fusenms.errors import ConfigError, SourceError, UnsupportedByBackendError, VerificationError, first_line
from fusenms.layout import Layout
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.onnx_reading import untrusted
from fusenms.onnx_reading.files import read_metadata, read_onnx, refuse_cost
from fusenms.onnx_reading.metadata import parse_names, read_json
from fusenms.safety.files import write_atomically

if TYPE_CHECKING:
    import onnx

    from fusenms.artifacts.report import Report


@dataclass(frozen=True, kw_only=True)
class FusedModel:
    """A model with the outputs of the contract. ``suppressed_by`` names the operator, for display; ``report`` is set once verified."""

    model: onnx.ModelProto
    image: ImageInput
    class_names: tuple[str, ...]
    task: str
    source: str
    layout: Layout
    config: PostprocessConfig
    backend: str
    suppressed_by: str = ""
    precision: str = "fp32"
    report: Report | None = field(default=None, compare=False)
    notes: tuple[str, ...] = ()
    limits: Limits = field(default=DEFAULT_LIMITS, compare=False, repr=False)

    def proven(self, report: Report) -> FusedModel:
        """Return this model with the report of its verification."""
        return replace(self, report=report)

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the file: keys of `fusenms.contract` to text."""
        from fusenms._version import __version__

        return (
            {
                contract.KEY_VERSION: __version__,
                contract.KEY_BACKEND: self.backend,
                contract.KEY_SOURCE: self.source,
                contract.KEY_LAYOUT: json.dumps(self.layout.to_dict()),
                contract.KEY_CONFIG: json.dumps(self.config.to_dict()),
                contract.KEY_IMAGE: json.dumps(self.image.to_dict()),
                contract.KEY_DECODE: self.layout.decode_stage,
                contract.KEY_SUPPRESSION: self.suppressed_by,
                contract.KEY_PRECISION: self.precision,
                contract.KEY_NOTES: json.dumps(list(self.notes)),
                contract.KEY_VERIFICATION: self.report.summary if self.report else contract.UNVERIFIED,
                contract.KEY_NAMES: str(dict(enumerate(self.class_names))),
                contract.KEY_TASK: self.task,
                contract.KEY_STRIDE: str(self.image.stride),
                contract.KEY_IMGSZ: str([self.image.height, self.image.width]),
            }
            | self._keypoints()
            | self._one_tensor()
        )

    def _keypoints(self) -> dict[str, str]:
        points = self.layout.keypoints
        return {} if points is None else {contract.KEY_KEYPOINTS: str([points.count, points.dims])}

    def _one_tensor(self) -> dict[str, str]:
        """What Ultralytics has to know of a file whose rows are in one tensor: they are final; a file of one size runs image by image."""
        if not one_tensor.has_one_tensor(self.config):
            return {}
        return {
            contract.KEY_BATCH: str(self.image.batch or 1),
            contract.KEY_END_TO_END: "True",
            contract.KEY_ARGUMENTS: str({"dynamic": self.image.dynamic_size}),
        }

    def save(self, path: str | os.PathLike[str], *, unverified: bool = False) -> Path:
        """Write the model to ``path`` atomically and return the path.

        Raises:
            VerificationError: the report has mismatches.
            ConfigError: the model has no report and ``unverified`` is False.
            SourceError: the path cannot be written.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise SourceError(f"found a {type(path).__name__}; expected the path of a file to write")
        if self.report is not None and not self.report:
            raise VerificationError(
                f"{path} was not written: the fused model differs from the reference\n{self.report}", self.report
            )
        if self.report is None and not unverified:
            raise ConfigError(
                f"{path} was not written: the model was not verified; call fusenms.verify first, or save with unverified=True"
            )
        import onnx

        model = onnx.ModelProto()
        in_file = self.model
        if one_tensor.has_one_tensor(self.config):
            in_file = one_tensor.cut(self.model, self.layout, self.image.dynamic_size)
        model.CopyFrom(in_file)
        kept = {item.key: item.value for item in model.metadata_props} | self.metadata
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, kept)
        return write_atomically(Path(path), model.SerializeToString())


def load_fused(path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS) -> FusedModel:
    """Read a fused file that `FusedModel.save` wrote. The file does not store the report; `fusenms.verify` makes a new one.

    Args:
        limits: bounds on the file and on each run.

    Raises:
        SourceError: the file cannot be read, is not a fused model, is damaged, or exceeds a limit.

    Example:
        >>> import fusenms
        >>> path = fusenms.fuse("yolov8n.pt", size=64).save("yolov8n.ort.onnx")
        >>> fusenms.load_fused(path).backend
        'ort'
    """
    if not isinstance(path, (str, os.PathLike)):
        raise SourceError(f"found a {type(path).__name__}; expected the path of a fused .onnx file")
    model = read_onnx(Path(path), limits)
    metadata = read_metadata(model)
    if contract.KEY_BACKEND not in metadata:
        raise SourceError(
            f"{path}: not a fused model (it has no {contract.KEY_BACKEND} metadata); make one with: python -m fusenms {path}"
        )
    if contract.KEY_NCNN in metadata:
        raise SourceError(
            f"{path}: is the last part of a model for ncnn; give its folder to Detector or to the command detect"
        )
    with untrusted(path, "reading its metadata"):
        try:
            fused = from_metadata(model, metadata, limits)
            if one_tensor.has_one_tensor(fused.config):
                fused = replace(fused, model=one_tensor.with_contract(model, fused.layout, fused.config))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, SourceError) as error:
            raise SourceError(f"{path}: its metadata is damaged ({first_line(error)}); fuse the model again") from error
        check_graph(path, fused)
    image = fused.image
    name, shape = usual_input(image)
    refuse_cost(path, model, {name: shape}, limits)
    return fused


def usual_input(image: ImageInput) -> tuple[str, tuple[int, ...]]:
    """Name and shape of the input at its default size; frames of any size have that of the model's images."""
    if image.frames is None:
        return image.tensor, (image.batch or 1, 3, image.height, image.width)
    return image.frames.tensor, (
        image.batch or 1,
        *image.frames.shape(*(image.frames.size or (image.height, image.width))),
    )


def refuse_frames(path: str | os.PathLike[str], image: ImageInput, what: str) -> None:
    """Refuse a model that takes frames, for ``what``, which gives it images.

    Raises:
        UnsupportedByBackendError: it takes frames.
    """
    if image.frames is not None:
        raise UnsupportedByBackendError(
            f"{path}: takes {image.frames}, but {what} needs a model that takes images; fuse the weights without frames"
        )


def from_metadata(model: onnx.ModelProto, metadata: dict[str, str], limits: Limits) -> FusedModel:
    """Return a fused model as its metadata say; its graph is not checked.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, OverflowError, SourceError: the metadata are incomplete or damaged.
    """
    image = ImageInput.from_dict(read_json(metadata[contract.KEY_IMAGE], limits))
    if max(image.height, image.width, image.stride) > limits.max_image_side:
        raise ValueError(
            f"its input is {image.height}x{image.width}, stride {image.stride}; expected at most {limits.max_image_side} (max_image_side)"
        )
    if image.frames is not None and max(image.frames.size or (1,)) > limits.max_image_side:
        raise ValueError(f"it takes {image.frames}; expected at most {limits.max_image_side} (max_image_side)")
    notes = read_json(metadata[contract.KEY_NOTES], limits)
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise ValueError("its notes are not a list of strings")
    config = PostprocessConfig.from_dict(read_json(metadata[contract.KEY_CONFIG], limits))
    if not isinstance(config.output_preset, str) or not isinstance(config.masks, str):
        raise ValueError("its settings output_preset and masks are not strings")
    return FusedModel(
        model=model,
        image=image,
        class_names=parse_names(metadata[contract.KEY_NAMES], limits),
        task=metadata[contract.KEY_TASK],
        source=metadata[contract.KEY_SOURCE],
        layout=Layout.from_dict(read_json(metadata[contract.KEY_LAYOUT], limits)),
        config=config,
        backend=metadata[contract.KEY_BACKEND],
        suppressed_by=metadata.get(contract.KEY_SUPPRESSION, ""),
        precision=metadata.get(contract.KEY_PRECISION, "fp32"),
        notes=tuple(notes),
        limits=limits,
    )


def check_graph(path: str | os.PathLike[str], fused: FusedModel) -> None:
    """Refuse a file whose graph contradicts its metadata. Further outputs are none of its business.

    Raises:
        SourceError: an input or output of the contract is missing, or has another shape; or the task is another one.
    """
    graph = fused.model.graph
    sizes = {
        entry.name: [d.dim_value for d in entry.type.tensor_type.shape.dim] for entry in (*graph.input, *graph.output)
    }
    image, config = fused.image, fused.config
    batch = image.batch or 0
    wanted = {image.tensor: [batch, 3, *([0, 0] if image.dynamic_size else [image.height, image.width])]}
    if image.frames is not None:
        wanted = {image.frames.tensor: [batch, *image.frames.shape(*(image.frames.size or (0, 0)))]}
        _check_frames(path, fused.model, image.frames)
    for name, output in fused.layout.outputs(config):
        height, width = sizes.get(name, [0, 0])[-2:] if "h" in output.shape else (0, 0)  # the image size sets them
        wanted[name] = [batch, *(int(d) for d in output.shape_for(0, config.max_detections, height, width)[1:])]
    for given in fused.layout.runtime_inputs(config):
        wanted[given.name] = [size if isinstance(size, int) else 0 for size in given.shape]
        _check_default(path, fused.model, given)
    if fused.task != fused.layout.task:
        raise SourceError(
            f"{path}: its metadata says that its task is {fused.task!r}, but its head is for {fused.layout.task!r}; fuse the model again"
        )
    for name, shape in wanted.items():
        if sizes.get(name) != shape:
            found = f"{sizes[name]}" if name in sizes else "nothing of that name"
            raise SourceError(
                f"{path}: its metadata says {name} {shape} (0: open), but the graph has {found}; fuse the model again"
            )


def _check_frames(path: str | os.PathLike[str], model: onnx.ModelProto, frames: Frames) -> None:
    """Refuse a graph whose frames are not its first input, which runtimes are fed, or not uint8.

    Raises:
        SourceError: they are not.
    """
    import onnx

    first = model.graph.input[0] if model.graph.input else None
    if first is None or first.name != frames.tensor or first.type.tensor_type.elem_type != onnx.TensorProto.UINT8:
        raise SourceError(
            f"{path}: its metadata says that its first input is {frames.tensor}, uint8, but the graph has another; fuse the model again"
        )


def _check_default(path: str | os.PathLike[str], model: onnx.ModelProto, given: contract.RuntimeInput) -> None:
    """Refuse a default that is not that of the settings.

    Raises:
        SourceError: it is missing or another one.
    """
    import onnx

    stored = next((item for item in model.graph.initializer if item.name == given.name), None)
    found = None if stored is None or tuple(stored.dims) != given.default.shape else onnx.numpy_helper.to_array(stored)
    if found is None or found.dtype != given.dtype or not np.array_equal(found, given.default):
        raise SourceError(
            f"{path}: its metadata says that {given.name} is an input with the default {given.dtype}{list(given.default.shape)} "
            f"{given.value}, but the graph has {'none' if stored is None else 'another default'}; fuse the model again"
        )
