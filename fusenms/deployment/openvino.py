"""OpenVINO: the whole fused graph in OpenVINO's own form (IR), run there and compared with the file before it is kept."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx

from fusenms.artifacts.fused import FusedModel, load_fused
from fusenms.deployment.base import Deployment, Wanted, compared, images_for
from fusenms.errors import BackendUnavailableError, ConfigError, UnsupportedByBackendError, first_line
from fusenms.fusion.backends import BACKENDS, get_backend
from fusenms.graph.custom_ops import foreign_operators
from fusenms.graph.editing import exposed
from fusenms.graph.session import Session
from fusenms.runtime.example_images import example_images
from fusenms.runtime.openvino import IR, IR_METADATA, IR_WEIGHTS, OpenVinoRunner, ir_metadata, without_defaults
from fusenms.safety.files import write_folder
from fusenms.safety.text import printable
from fusenms.verification.agreement import agreement_of
from fusenms.verification.letterboxing import as_frames

MOST_DRIFT = {False: 1e-4, True: 0.05}
"""Limit on the difference of the head's tensors, relative to their largest value: of float32, and of weights stored as float16."""
MOST_LOST = 0.1
"""Limit on the share of detections that only one of the two has: scores at the threshold may fall on either side."""


def deploy_openvino(path: Path, output: Path, wanted: Wanted) -> Deployment:
    """Convert, compare and write. Errors are those of `fusenms.deploy`."""
    fused = load_fused(path, limits=wanted.limits)
    _check(path, fused)
    looked = _inputs(fused, wanted.images)
    with tempfile.TemporaryDirectory(prefix="fusenms-") as folder:
        whole, head = Path(folder) / "whole", Path(folder) / "head"
        files = _converted(path, fused.model, whole, wanted.half)
        runner = OpenVinoRunner(whole, fused=fused, source=str(path), max_seconds=wanted.limits.max_run_seconds)
        rows = [runner.infer(one[None].repeat(fused.image.batch or 1, 0)) for one in looked]
        runner.close()
        found = agreement_of(
            fused, looked, fused, {name: np.concatenate([r[name][:1] for r in rows]) for name in rows[0]}
        )
        drift = _drift(path, fused, looked, head, wanted)
    said = compared("OpenVINO", found, drift)
    if not drift <= MOST_DRIFT[wanted.half] or found.drift > MOST_LOST:  # NaN too
        raise UnsupportedByBackendError(
            f"{path}: OpenVINO computes something else: {' · '.join(said)}; expected at most {MOST_DRIFT[wanted.half]:g}, and the same "
            "detections. Nothing was written"
        )
    written = write_folder(output, files | {IR_METADATA: ir_metadata(fused, files)}, path)
    return Deployment(output, tuple(written), said, found, drift)


def _check(path: Path, fused: FusedModel) -> None:
    """Refuse a file with operators that OpenVINO lacks.

    Raises:
        UnsupportedByBackendError: it has some.
    """
    if not get_backend(fused.backend).runs_on_onnxruntime or (foreign := foreign_operators(fused.model)):
        able = " or ".join(repr(name) for name, backend in BACKENDS.items() if backend.runs_on_onnxruntime)
        what = f"backend {fused.backend}" if not get_backend(fused.backend).runs_on_onnxruntime else next(iter(foreign))
        raise UnsupportedByBackendError(
            f"{path}: has operators of {printable(what)}, which OpenVINO lacks; convert it to backend {able}"
        )


def _inputs(fused: FusedModel, images: np.ndarray | None) -> np.ndarray:
    """What both run on: images as for every target, or a frame of the example images."""
    frames = fused.image.frames
    if frames is None:
        return images_for(fused, images)
    if images is not None:
        raise ConfigError("found images, but the file takes frames; leave them out")
    height, width = frames.size or (fused.image.height, fused.image.width)
    colors = example_images(height, width)
    if colors is None:
        colors = np.random.default_rng(0).random((1, 3, height, width), np.float32)
    return as_frames(np.rint(colors * 255).astype(np.uint8).transpose(0, 2, 3, 1), frames.channels)


def _converted(path: Path, model: onnx.ModelProto, folder: Path, half: bool) -> dict[str, bytes]:
    """Write a model as IR into a new folder. Return its files.

    Raises:
        BackendUnavailableError: OpenVINO is not installed.
        UnsupportedByBackendError: it cannot convert the model.
    """
    try:
        import openvino
    except ImportError as error:
        raise BackendUnavailableError(
            f"OpenVINO is not installed ({first_line(error)}); install it with: pip install 'fusenms[openvino]'"
        ) from error
    folder.mkdir()
    try:
        read = openvino.Core().read_model(without_defaults(model)[0].SerializeToString())
        openvino.save_model(read, folder / IR, compress_to_fp16=half)
    except Exception as error:  # OpenVINO raises RuntimeError, protobuf a ValueError beyond 2 GB
        raise UnsupportedByBackendError(f"{path}: OpenVINO cannot convert it ({first_line(error)})") from error
    return {name: (folder / name).read_bytes() for name in (IR, IR_WEIGHTS)}


def _drift(path: Path, fused: FusedModel, looked: np.ndarray, folder: Path, wanted: Wanted) -> float:
    """Largest difference of the head's tensors between OpenVINO and ONNX Runtime, relative to their largest value."""
    sources = list(fused.layout.sources)
    model = exposed(fused.model, sources)
    _converted(path, model, folder, wanted.half)
    session = Session(model, source=str(path), max_seconds=wanted.limits.max_run_seconds)
    runner = OpenVinoRunner(folder, fused=fused, source=str(path), max_seconds=wanted.limits.max_run_seconds)
    runner.outputs = sources
    worst = 0.0
    for one in looked:
        batch = one[None].repeat(fused.image.batch or 1, 0)
        mine, theirs = runner.infer(batch), session.run({session.inputs[0]: batch}, sources)
        for name, value in zip(sources, theirs, strict=True):
            if not np.isfinite(mine[name]).all():
                return float("nan")
            scale = max(float(np.abs(value).max()), 1e-12)
            worst = max(worst, float(np.abs(mine[name] - value).max()) / scale)
    runner.close()
    session.close()
    return worst
