"""Fused files for other runtimes and servers. Each target has its own file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import numpy as np

from fusenms.deployment.base import Deployment, Target, Wanted
from fusenms.deployment.deepstream import deploy_deepstream
from fusenms.deployment.docker import deploy_docker
from fusenms.deployment.ncnn import deploy_ncnn
from fusenms.deployment.openvino import deploy_openvino
from fusenms.deployment.triton import deploy_triton
from fusenms.deployment.web import deploy_web
from fusenms.errors import ConfigError
from fusenms.limits import DEFAULT_LIMITS, Limits

TARGETS: Final = {
    "ncnn": Target(deploy_ncnn, ("half", "images")),
    "openvino": Target(deploy_openvino, ("half", "images")),
    "triton": Target(deploy_triton, ("batch",)),
    "deepstream": Target(deploy_deepstream, ("half", "batch")),
    "web": Target(deploy_web),
    "docker": Target(deploy_docker),
}

__all__ = ["TARGETS", "Deployment", "deploy"]


def deploy(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    target: str = "ncnn",
    half: bool = False,
    images: np.ndarray | None = None,
    batch: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Deployment:
    """Write what another runtime or server needs to run a fused file, checked against the file.

    Args:
        path: a fused `.onnx`; for ``triton`` and ``deepstream`` also an engine of TensorRT with its sidecar.
        output: the folder to write. Files of the same names are replaced, all of them or none.
        target: ``ncnn`` and ``openvino`` (`Detector` opens the folder), ``triton`` (model repository), ``deepstream`` (configuration of
            nvinfer), ``web`` (a page for onnxruntime-web), ``docker`` (image of the server).
        half: ``ncnn``, ``openvino``: store the weights as float16; ncnn calculates so where the CPU does. ``deepstream``: let TensorRT
            calculate in float16.
        images: ``[n, 3, height, width]`` float32 (RGB, 0 to 1), for ``ncnn`` and ``openvino``: to compare on besides the package's own.
        batch: ``triton``, ``deepstream``: the largest batch; default: 8, the largest of an engine, or 1 if images of a batch depend on
            each other.

    Returns:
        what was written, what was checked, and, where the target gets other files than the fused one, how far it agrees.

    Raises:
        ConfigError: there is no such target, it has no such setting, or images have another size.
        SourceError: the file is not a fused model, or the folder cannot be written.
        UnsupportedByBackendError: the target cannot run this file, and the message says why; or it computes something else.
        BackendUnavailableError: the target's packages are not installed.

    Example:
        >>> import fusenms
        >>> path = fusenms.fuse("yolov8n.pt", size=64).save("yolov8n.ort.onnx")
        >>> written = fusenms.deploy(path, "repository", target="triton", batch=16)
        >>> [file.relative_to("repository").as_posix() for file in written.files]
        ['yolov8n/1/model.onnx', 'yolov8n/labels.txt', 'yolov8n/config.pbtxt']
        >>> written = fusenms.deploy(path, "yolov8n.ncnn", target="ncnn")
        >>> len(fusenms.Detector(written.folder)("bus.jpg"))
        1
    """
    if target not in TARGETS:
        raise ConfigError(f"target is {target!r}; expected one of {', '.join(TARGETS)}")
    asked = {"half": half, "images": images is not None, "batch": batch is not None}
    if foreign := [name for name, value in asked.items() if value and name not in TARGETS[target].takes]:
        raise ConfigError(f"found {' and '.join(foreign)}, but target {target} has none; leave it out")
    if batch is not None and (type(batch) is not int or batch < 1):
        raise ConfigError(f"batch is {batch!r}; expected a positive number of images")
    wanted = Wanted(half=half, images=images, batch=batch, limits=limits)
    return TARGETS[target].deploy(Path(path), Path(output), wanted)
