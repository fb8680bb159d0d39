"""The values that travel down the line: `RawModel`, `FusedModel`; reading and writing their files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusenms import contract
from fusenms.config import PostprocessConfig
from fusenms.errors import ConfigError, SourceError, VerificationError
from fusenms.files import write_atomically
from fusenms.layout import Layout
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.onnx_reading import read_model, untrusted
from fusenms.onnx_reading.metadata import parse_names, read_json
from fusenms.sessions import first_line

if TYPE_CHECKING:
    import onnx

    from fusenms.verification import Report


@dataclass(frozen=True)
class Pixels:
    """What a network wants for a picture ``p`` (RGB, 0 to 1): ``(p * scale - mean) / std``, with the channels in this order.

    ``mean`` and ``std`` are in the order of ``channels``, "rgb" or "bgr".
    """

    channels: str = "rgb"
    scale: float = 1.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if self.channels not in ("rgb", "bgr"):
            raise ConfigError(f"channels is {self.channels!r}; expected 'rgb' or 'bgr'")
        if not 0 < self.scale < float("inf"):
            raise ConfigError(f"scale is {self.scale!r}; expected a positive number")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(self.std):
            raise ConfigError(f"mean is {self.mean!r}, std is {self.std!r}; expected three numbers each, std not 0")

    def __str__(self) -> str:
        text = f"{self.channels.upper()} from 0 to {self.scale:g}"
        normal = ", ".join(f"({v:g})" if v < 0 else f"{v:g}" for v in self.mean), ", ".join(f"{v:g}" for v in self.std)
        return f"{text}, less ({normal[0]}), over ({normal[1]})" if any(self.mean) or set(self.std) != {1.0} else text

    def apply(self, pictures: np.ndarray) -> np.ndarray:
        """Pictures ``[B, 3, height, width]`` float32 (RGB, 0 to 1) as the network wants them."""
        ordered = pictures[:, ::-1] if self.channels == "bgr" else pictures
        factor, offset = self.terms
        return ordered * factor + offset

    @property
    def terms(self) -> tuple[np.ndarray, np.ndarray]:
        """The same as a factor and a summand, ``[1, 3, 1, 1]`` float32 each."""
        mean, std = (np.array(values, np.float64).reshape(1, 3, 1, 1) for values in (self.mean, self.std))
        return (self.scale / std).astype(np.float32), (-mean / std).astype(np.float32)


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PIXELS: dict[str, Pixels] = {
    "rgb": Pixels(),
    "bgr": Pixels("bgr"),
    "rgb255": Pixels(scale=255.0),
    "bgr255": Pixels("bgr", 255.0),
    "imagenet": Pixels("rgb", 1.0, *_IMAGENET),
    "bgr255-imagenet": Pixels("bgr", 255.0, (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)),
}
"""By name: 0 to 1 or 0 to 255, RGB or BGR, normalized with the mean and deviation of ImageNet or not."""


@dataclass(frozen=True)
class ImageInput:
    """The picture input of a model: float32 ``[B, 3, height, width]``, RGB, 0 to 1.

    ``height`` and ``width`` are the sizes it works at by default; with ``dynamic_size`` other
    multiples of ``stride`` work too. ``independent`` is false where the images of a batch change each other's results
    (dynamic quantization, whose ranges span the batch). ``stretch``: pictures are stretched to the size, not letterboxed.
    """

    tensor: str
    height: int
    width: int
    stride: int
    dynamic_size: bool = False
    independent: bool = True
    stretch: bool = False

    def __post_init__(self) -> None:
        for name in ("height", "width", "stride"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a positive number of pixels")
        if not isinstance(self.tensor, str) or not self.tensor:
            raise ValueError(f"tensor is {self.tensor!r}; expected a name")
        for name in ("dynamic_size", "independent", "stretch"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected True or False")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RawModel:
    """A detector as ONNX, up to its raw head, with dynamic batch; or with a ``frozen_batch``, which `fusenms.batch` opens.

    ``layout`` is set where the source knows it (our own export, a module described by hand);
    otherwise `fusenms.recognize` finds it. ``limits`` bound what its graph may do where it is of unknown origin. ``precision`` is that of
    the network, "fp32" or "fp16". ``notes`` are lines for the user on how it came about. ``pixels`` and ``stretch`` say how the network
    wants its pictures; None: as its family usually does.
    """

    model: onnx.ModelProto
    image: ImageInput
    names: tuple[str, ...]
    task: str
    source: str
    layout: Layout | None = None
    notes: tuple[str, ...] = ()
    pixels: Pixels | None = None
    stretch: bool | None = None
    frozen_batch: int | None = None
    precision: str = "fp32"
    limits: Limits = field(default=DEFAULT_LIMITS, compare=False, repr=False)


@dataclass(frozen=True)
class FusedModel:
    """A model with the outputs of the contract. ``suppressed_by`` is the operator, for people; ``report`` the proof, once verified."""

    model: onnx.ModelProto
    image: ImageInput
    names: tuple[str, ...]
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
        """What the file says of itself: keys of `fusenms.contract` to text."""
        from fusenms import __version__

        return {
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
            contract.KEY_NAMES: str(dict(enumerate(self.names))),
            contract.KEY_TASK: self.task,
            contract.KEY_STRIDE: str(self.image.stride),
            contract.KEY_IMGSZ: str([self.image.height, self.image.width]),
        } | self._keypoints()

    def _keypoints(self) -> dict[str, str]:
        points = self.layout.keypoints
        return {} if points is None else {contract.KEY_KEYPOINTS: str([points.count, points.numbers])}

    def save(self, path: str | os.PathLike[str], *, unverified: bool = False) -> Path:
        """Write the model to ``path`` (whole or not at all) and return the path.

        Raises:
            VerificationError: the model has no passing report and ``unverified`` is false.
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
        model.CopyFrom(self.model)
        kept = {item.key: item.value for item in model.metadata_props} | self.metadata
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, kept)
        return write_atomically(Path(path), model.SerializeToString())


def load_fused(path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS) -> FusedModel:
    """Read a fused file that `FusedModel.save` wrote. Its report is not stored: `fusenms.verify` makes a new one.

    Args:
        limits: bounds of what is read, and of each run.

    Raises:
        SourceError: the file cannot be read, is not a fused model, is damaged, or exceeds a limit.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise SourceError(f"found a {type(path).__name__}; expected the path of a fused .onnx file")
    model = read_onnx(Path(path), limits)
    metadata = read_metadata(model)
    if contract.KEY_BACKEND not in metadata:
        raise SourceError(
            f"{path}: not a fused model (it has no {contract.KEY_BACKEND} metadata); make one with: python -m fusenms {path}"
        )
    with untrusted(path, "reading its metadata"):
        try:
            fused = _from_metadata(model, metadata, limits)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, SourceError) as error:
            raise SourceError(f"{path}: its metadata is damaged ({first_line(error)}); fuse the model again") from error
        _check_graph(path, fused)
    image = fused.image
    refuse_cost(path, model, {image.tensor: (1, 3, image.height, image.width)}, limits)
    return fused


def _from_metadata(model: onnx.ModelProto, metadata: dict[str, str], limits: Limits) -> FusedModel:
    image = ImageInput(**read_json(metadata[contract.KEY_IMAGE], limits))
    if max(image.height, image.width, image.stride) > limits.max_image_side:
        raise ValueError(
            f"its input is {image.height}x{image.width}, stride {image.stride}; expected at most {limits.max_image_side} (max_image_side)"
        )
    notes = read_json(metadata[contract.KEY_NOTES], limits)
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise ValueError("its notes are no list of texts")
    config = PostprocessConfig.from_dict(read_json(metadata[contract.KEY_CONFIG], limits))
    if not isinstance(config.names, str) or not isinstance(config.masks, str):
        raise ValueError("its settings are of other types")
    return FusedModel(
        model=model,
        image=image,
        names=parse_names(metadata[contract.KEY_NAMES], limits),
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


def refuse_cost(
    path: str | os.PathLike[str], model: onnx.ModelProto, sizes: Mapping[str, tuple[int, ...]], limits: Limits
) -> None:
    """Refuse a graph whose run would exceed the limits, as far as shapes show it.

    Args:
        sizes: input name to its shape.

    Raises:
        SourceError: it would.
    """
    from fusenms.onnx_reading.cost import check_cost

    with untrusted(path, "finding the sizes of its tensors"):
        try:
            check_cost(model, sizes, limits)
        except ValueError as error:
            raise SourceError(f"{path}: {first_line(error)}") from error


def _check_graph(path: str | os.PathLike[str], fused: FusedModel) -> None:
    """Refuse a file whose graph is not what its metadata says."""
    graph = fused.model.graph
    sizes = {
        entry.name: [d.dim_value for d in entry.type.tensor_type.shape.dim] for entry in (*graph.input, *graph.output)
    }
    image, config = fused.image, fused.config
    wanted = {image.tensor: [0, 3, *([0, 0] if image.dynamic_size else [image.height, image.width])]}
    for name, spec in fused.layout.outputs(config):
        height, width = sizes.get(name, [0, 0])[-2:] if "h" in spec.shape else (0, 0)  # the picture's size says them
        wanted[name] = [0, *(int(d) for d in spec.shape_for(0, config.max_detections, height, width)[1:])]
    if unknown := [entry.name for entry in graph.output if entry.name not in wanted]:
        raise SourceError(
            f"{path}: the graph gives {', '.join(unknown)} too, which its metadata does not name; fuse the model again"
        )
    if fused.task != fused.layout.task:
        raise SourceError(
            f"{path}: its metadata says that its task is {fused.task!r}, but its head is one of {fused.layout.task!r}; fuse the model again"
        )
    for name, shape in wanted.items():
        if sizes.get(name) != shape:
            found = f"{sizes[name]}" if name in sizes else "nothing of that name"
            raise SourceError(
                f"{path}: its metadata says {name} {shape} (0: open), but the graph has {found}; fuse the model again"
            )


def read_onnx(path: Path, limits: Limits = DEFAULT_LIMITS) -> onnx.ModelProto:
    """Read an ONNX file of unknown origin, with its external data, and check all of it.

    Raises:
        SourceError: it is missing, empty, damaged, not ONNX, or exceeds a limit.
    """
    if path.is_dir():
        raise SourceError(f"{path}: is a directory; expected an .onnx file")
    if path.suffix in (".pt", ".pth"):
        raise SourceError(f"{path}: is a checkpoint; expected an .onnx file: make one with python -m fusenms {path}")
    with untrusted(path, "reading"):
        return read_model(path, limits)


def read_metadata(model: onnx.ModelProto) -> dict[str, str]:
    """Metadata of the file, key to text."""
    return {item.key: item.value for item in model.metadata_props}
