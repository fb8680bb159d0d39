"""What the targets share: what is asked for, what was written, and what a kit takes from the fused file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from fusenms.artifacts import one_tensor
from fusenms.artifacts.fused import FusedModel, load_fused, usual_input
from fusenms.artifacts.report import counted
from fusenms.engines.running import DTYPES
from fusenms.errors import ConfigError, RunError, SourceError, UnsupportedByBackendError, first_line
from fusenms.fusion.backends import BACKENDS, get_backend
from fusenms.graph.custom_ops import foreign_operators
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.limits import Limits
from fusenms.onnx_reading.external import tensors_of
from fusenms.onnx_reading.files import read_onnx
from fusenms.onnx_reading.tensors import TensorInfo, needed_inputs, tensor_info
from fusenms.runtime.example_images import example_images
from fusenms.runtime.opening import ENGINE_RUNTIMES, EngineFile
from fusenms.safety.files import read_regular
from fusenms.safety.text import printable
from fusenms.verification.agreement import Agreement

BATCH = 8
"""Largest batch of a server, unless another is asked for; the default of `Detector`."""
OPEN = "batch"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of a target. See the arguments of `fusenms.deploy`; None where nothing was asked."""

    half: bool = False
    images: np.ndarray | None = None
    batch: int | None = None
    limits: Limits


@dataclass(frozen=True)
class Deployment:
    """What was written, and what was checked before.

    Attributes:
        folder: the folder. `fusenms.Detector` opens those for ncnn and OpenVINO.
        files: every file that was written.
        checks: what was compared with the fused file, a line for each.
        agreement: detections of the fused file and of the deployed one on the images; None if the target gets the fused file itself.
        drift: largest difference of the head's tensors, relative to their largest value; None as before.
    """

    folder: Path
    files: tuple[Path, ...]
    checks: tuple[str, ...]
    agreement: Agreement | None = None
    drift: float | None = None


@dataclass(frozen=True)
class Target:
    """A target of `fusenms.deploy`.

    Attributes:
        deploy: checks and writes; its errors are those of `fusenms.deploy`.
        takes: names of the settings that mean something there.
    """

    deploy: Callable[[Path, Path, Wanted], Deployment]
    takes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FusedFile:
    """A fused file as it is, in one piece.

    Attributes:
        fused: what it says of itself.
        data: its bytes; with the weights that it has in other files.
        inputs, optional, outputs: tensors that its graph declares. Those optional have defaults.
    """

    fused: FusedModel
    data: bytes
    inputs: tuple[TensorInfo, ...]
    optional: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


def read_fused(path: Path, limits: Limits) -> FusedFile:
    """Read a fused file.

    Raises:
        SourceError: it cannot be read, or is not a fused model.
    """
    fused, model = load_fused(path, limits=limits), read_onnx(path, limits)
    data = read_regular(path, limits.max_file_bytes)
    stored = onnx.ModelProto.FromString(data)
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors_of(stored)):
        data = model.SerializeToString()
    names = {given.name for given in fused.layout.runtime_inputs(fused.config)}
    optional = tuple(tensor_info(entry) for entry in model.graph.input if entry.name in names)
    return FusedFile(fused, data, needed_inputs(model), optional, tuple(map(tensor_info, model.graph.output)))


def run_there(path: Path, file: FusedFile, target: str) -> str:
    """Run the file in ONNX Runtime, as the target does, and compare its outputs with those declared. Return what was compared.

    Raises:
        UnsupportedByBackendError: the target's ONNX Runtime does not run such a file.
        RunError: it fails, or gives other outputs.
    """
    backend = get_backend(file.fused.backend)
    if not backend.runs_on_onnxruntime:
        able = " or ".join(repr(name) for name, other in BACKENDS.items() if other.runs_on_onnxruntime)
        raise UnsupportedByBackendError(
            f"{path}: its backend is {backend.name}, which ONNX Runtime does not run, and {target} runs the file there; convert it to "
            f"backend {able}"
        )
    model = onnx.ModelProto.FromString(file.data)
    if foreign := foreign_operators(model):
        raise UnsupportedByBackendError(
            f"{path}: has the operator {printable(next(iter(foreign)))} of a library of yours, which {target} does not have; expected "
            "operators of ONNX Runtime alone"
        )
    name, shape = usual_input(file.fused.image)
    kind = np.uint8 if file.fused.image.frames is not None else np.float32
    runner = OnnxRuntimeRunner(model, source=str(path), max_seconds=file.fused.limits.max_run_seconds)
    found = runner.run({name: np.zeros(shape, kind)})
    runner.close()
    for output in file.outputs:
        value = np.asarray(found[output.name])
        same = len(value.shape) == len(output.shape) and all(
            own == there for own, there in zip(output.shape, value.shape, strict=True) if isinstance(own, int)
        )
        if value.dtype != output.dtype or not same:
            raise RunError(
                f"{path}: gives {output.name} {value.dtype}{list(value.shape)}, but declares {output}; declare what it gives"
            )
    return f"runs in ONNX Runtime · {counted(len(file.outputs), 'output')} of the declared types and sizes"


def outputs_of(path: Path, file: EngineFile) -> tuple[TensorInfo, ...]:
    """Outputs of an engine by its sidecar. Open sizes are ``batch``, the only ones that an engine of a fused file has.

    Raises:
        SourceError: the sidecar does not say what they are.
    """
    try:
        found = tuple(
            TensorInfo(
                name=str(name),
                dtype=np.dtype(DTYPES[one["dtype"].upper()]).name,
                shape=tuple(int(size) if size >= 0 else OPEN for size in one["shape"]),
            )
            for name, one in file.engine.info["outputs"].items()
        )
        if not found:
            raise ValueError("there are none")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(
            f"{path}: its sidecar does not describe its outputs ({first_line(error)}); build it again"
        ) from error
    return found


def refuse_other_builders(path: Path, file: EngineFile, target: str) -> None:
    """Refuse an engine of TensorRT-RTX.

    Raises:
        UnsupportedByBackendError: it is one.
    """
    builder = file.engine.info["builder"]["name"]
    if builder != ENGINE_RUNTIMES["tensorrt"]:
        raise UnsupportedByBackendError(
            f"{path}: is an engine of {printable(builder)}; {target} runs those of TensorRT: build it with TensorRT, or deploy the .onnx"
        )


def refuse_one_tensor(path: Path, fused: FusedModel, target: str) -> None:
    """Refuse a file whose rows are in one tensor.

    Raises:
        UnsupportedByBackendError: they are.
    """
    if one_tensor.has_one_tensor(fused.config):
        raise UnsupportedByBackendError(
            f"{path}: has all rows in one output, but {target} needs num_detections, boxes, scores and labels; configure it with "
            "output_preset='fusenms'"
        )


def model_name(path: Path) -> str:
    """Name of a model in a server: that of its file up to the first dot.

    Raises:
        UnsupportedByBackendError: the file's name has characters that not every server and shell takes.
    """
    if not re.fullmatch(r"\w[\w.-]*", path.name, re.ASCII):
        raise UnsupportedByBackendError(
            f"{printable(path)}: its name becomes that of the model; expected letters, digits, -, _ and dots: rename the file"
        )
    return path.name.split(".")[0]


def labels_file(path: str | os.PathLike[str], names: tuple[str, ...], without: str = "") -> bytes:
    """Class names, one on each line, in the order of their numbers. A fused file has none with line ends.

    Raises:
        UnsupportedByBackendError: a name is empty, or has one of the characters in ``without``.
    """
    for number, name in enumerate(names):
        if not name.strip() or set(without) & set(name):
            raise UnsupportedByBackendError(
                f"{path}: its class {number} is named {printable(name)!r}; expected a name for its line in the file of labels"
                f"{f', without {without}' if without else ''}"
            )
    return "".join(f"{name}\n" for name in names).encode()


def images_for(fused: FusedModel, images: np.ndarray | None) -> np.ndarray:
    """What a deployed model is compared on, ``[n, 3, height, width]`` float32: the example images, and those given.

    Raises:
        ConfigError: those given have another size.
    """
    size = fused.image.height, fused.image.width
    if images is not None and images.shape[1:] != (3, *size):
        raise ConfigError(f"images have shape {list(images.shape)}; expected [n, 3, {size[0]}, {size[1]}]")
    own = example_images(*size)
    some = [one for one in (own, images) if one is not None]
    return np.concatenate(some) if some else np.random.default_rng(0).random((1, 3, *size), np.float32)


def compared(target: str, found: Agreement, drift: float) -> tuple[str, ...]:
    """What a comparison of a deployed model found, in two lines."""
    return (
        f"head within {drift:.1g} of its largest value",
        f"{found.images} images · {found.before} detections in the file, {found.after} in {target}, {found.same} the same",
    )
