"""ncnn: converts the network up to its head with pnnx; the late decode and the suppression stay an ONNX graph, which runs behind it.

pnnx aborts on the operators of a fused graph. What it reads is the network alone, at one image size and batch 1: ncnn has no others.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from fusenms.artifacts.fused import FusedModel, load_fused, refuse_frames
from fusenms.deployment.base import Deployment, Wanted, compared, images_for
from fusenms.errors import BackendUnavailableError, ConfigError, UnsupportedByBackendError
from fusenms.fusion.backends import get_backend
from fusenms.graph.editing import exposed, extracted
from fusenms.graph.session import Session
from fusenms.runtime.ncnn import HALF, NETWORK, TAIL, WEIGHTS, NcnnRunner, ncnn_metadata
from fusenms.safety.files import write_folder
from fusenms.verification.agreement import agreement_of

MOST_DRIFT = {False: 1e-4, True: 0.05}
"""Limit on the difference of the head's tensors, relative to their largest value: of float32, and of float16. Measured on YOLOv8n: 6e-6."""
SECONDS = 600.0
"""Limit on a conversion."""
MAGIC = "7767517"
"""First line of a network of ncnn."""


def deploy_ncnn(path: Path, output: Path, wanted: Wanted) -> Deployment:
    """Convert, compare and write. Errors are those of `fusenms.deploy`."""
    fused, half = load_fused(path, limits=wanted.limits), wanted.half
    refuse_frames(path, fused.image, "ncnn")
    if fused.image.dynamic_size:
        raise UnsupportedByBackendError(
            f"{path}: its image size is dynamic, and ncnn needs one; fuse the weights without dynamic_size"
        )
    if fused.precision != "fp32":
        raise UnsupportedByBackendError(
            f"{path}: its precision is {fused.precision}; expected fp32 (half=True stores float16 for ncnn)"
        )
    if fused.image.batch not in (None, 1):
        raise UnsupportedByBackendError(
            f"{path}: its batch is fixed at {fused.image.batch}, and ncnn runs images one by one; fuse the weights without batch"
        )
    looked = images_for(fused, wanted.images)
    network, tail = _divided(path, fused)
    with tempfile.TemporaryDirectory(prefix="fusenms-") as folder:
        place = Path(folder)
        param, weights = _converted(path, network, fused, place, half)
        stored = replace(fused, model=tail, precision=HALF if half else "fp32")
        onnx.helper.set_model_props(tail, stored.metadata | ncnn_metadata(param, weights))
        runner = NcnnRunner(place, stored)
        drift = _drift(network, runner, looked, path)
        found = agreement_of(fused, looked, stored, _all(runner, looked))
        runner.close()
    if not drift <= MOST_DRIFT[half]:  # NaN too
        raise UnsupportedByBackendError(
            f"{path}: ncnn computes something else: the tensors of its head differ by {drift:.2g} of their largest value; expected at most "
            f"{MOST_DRIFT[half]:g}. Nothing was written ({found.summary})"
        )
    files = write_folder(output, {NETWORK: param, WEIGHTS: weights, TAIL: tail.SerializeToString()}, path)
    return Deployment(output, tuple(files), compared("ncnn", found, drift), found, drift)


def _divided(path: str | os.PathLike[str], fused: FusedModel) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The network from one image to the tensors of the head, and what follows, of standard operators."""
    model = _with_shapes(get_backend(fused.backend).to_standard(fused.model, fused), fused)
    sources, outputs = list(fused.layout.sources), [name for name, _ in fused.layout.outputs(fused.config)]
    try:
        network = extracted(model, [fused.image.tensor], sources)
        tail = extracted(model, sources, [*outputs, *(e.name for e in model.graph.output if e.name not in outputs)])
    except ConfigError as error:
        raise UnsupportedByBackendError(f"{path}: cannot be divided at its head ({error})") from error
    for size, dim in zip(
        (1, 3, fused.image.height, fused.image.width), network.graph.input[0].type.tensor_type.shape.dim, strict=True
    ):
        dim.Clear()
        dim.dim_value = size
    for entry in network.graph.output:
        entry.type.tensor_type.shape.dim[0].Clear()
        entry.type.tensor_type.shape.dim[0].dim_value = 1
    del network.graph.value_info[:]
    del network.metadata_props[:]
    return network, tail


def _with_shapes(model: onnx.ModelProto, fused: FusedModel) -> onnx.ModelProto:
    """The model with the shapes of the head's tensors, which shape inference does not always find."""
    sources = list(fused.layout.sources)
    image = np.zeros((1, 3, fused.image.height, fused.image.width), np.float32)
    values = _outputs(exposed(model, sources), image, fused.source)
    found = onnx.ModelProto()
    found.CopyFrom(model)
    kept = [entry for entry in found.graph.value_info if entry.name not in sources]
    del found.graph.value_info[:]
    batch = fused.image.batch or "batch"
    found.graph.value_info.extend(
        [
            *kept,
            *(
                onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [batch, *values[name].shape[1:]])
                for name in sources
            ),
        ]
    )
    return found


def _converted(
    path: str | os.PathLike[str], network: onnx.ModelProto, fused: FusedModel, place: Path, half: bool
) -> tuple[bytes, bytes]:
    """Run pnnx in a folder of its own. Return the two files of ncnn."""
    onnx.save(network, place / "network.onnx")
    shape = f"[1,3,{fused.image.height},{fused.image.width}]f32"
    command = [_pnnx(), "network.onnx", f"inputshape={shape}", f"fp16={int(half)}"]
    try:
        done = subprocess.run(
            command, cwd=place, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UnsupportedByBackendError(f"{path}: pnnx did not finish within {SECONDS:g} s") from error
    files = place / NETWORK, place / WEIGHTS
    if done.returncode or not all(file.is_file() for file in files):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
        raise UnsupportedByBackendError(
            f"{path}: pnnx cannot convert its network (exit code {done.returncode}: {last})"
        )
    param, weights = (file.read_bytes() for file in files)
    if lost := _foreign_layers(param.decode("utf-8", "replace")):
        raise UnsupportedByBackendError(
            f"{path}: ncnn has no operator for {', '.join(lost)}; fuse the weights for ONNX Runtime or TensorRT instead"
        )
    return param, weights


def _foreign_layers(param: str) -> list[str]:
    """Types of layers that pnnx could not translate: it leaves PyTorch's names, which have a dot or colons."""
    lines = param.splitlines()
    if not lines or lines[0].strip() != MAGIC:
        return ["a network in another format"]
    types = (line.split()[0] for line in lines[2:] if line.strip())
    return list(dict.fromkeys(kind for kind in types if "." in kind or "::" in kind))


def _pnnx() -> str:
    """Path of the program: the package's Python imports PyTorch, which the conversion of an ONNX file does not need."""
    spec = importlib.util.find_spec("pnnx")
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        raise BackendUnavailableError("pnnx is not installed; install it with: pip install 'fusenms[ncnn]'")
    return os.path.join(folders[0], "pnnx.exe" if platform.system() == "Windows" else "pnnx")


def _outputs(network: onnx.ModelProto, image: np.ndarray, source: str) -> dict[str, np.ndarray]:
    session = Session(network, source=source)
    names = [entry.name for entry in network.graph.output]
    return dict(zip(names, session.run({session.inputs[0]: image}, names), strict=True))


def _drift(network: onnx.ModelProto, runner: NcnnRunner, images: np.ndarray, path: str | os.PathLike[str]) -> float:
    """Largest difference of the head's tensors between ncnn and ONNX Runtime, relative to their largest value."""
    worst = 0.0
    for image in images:
        mine, theirs = runner.head(image[None]), _outputs(network, image[None], str(path))
        for name, value in theirs.items():
            scale = max(float(np.abs(value).max()), 1e-12)
            worst = max(worst, float(np.abs(mine[name] - value).max()) / scale)
            if not np.isfinite(mine[name]).all():
                return float("nan")
    return worst


def _all(runner: NcnnRunner, images: np.ndarray) -> dict[str, np.ndarray]:
    rows = [runner.infer(image[None]) for image in images]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
