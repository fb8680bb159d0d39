"""Fused files for runtimes that read no ONNX. Each target has its own file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from fusenms.deployment.ncnn import Deployment, deploy_ncnn
from fusenms.errors import ConfigError
from fusenms.limits import DEFAULT_LIMITS, Limits

TARGETS: Final[dict[str, Callable[..., Deployment]]] = {"ncnn": deploy_ncnn}

__all__ = ["TARGETS", "Deployment", "deploy"]


def deploy(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    target: str = "ncnn",
    half: bool = False,
    images: np.ndarray | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Deployment:
    """Write a fused file for another runtime, run it there, and compare its detections with those of the file.

    Args:
        path: a fused `.onnx` of float32, of any backend and of one image size.
        output: the folder to write; `Detector` opens it.
        target: ``ncnn``.
        half: store the weights as float16, and calculate in float16 where the CPU does.
        images: ``[n, 3, height, width]`` float32 (RGB, 0 to 1), to compare on besides the package's own.

    Returns:
        what was written and how far it agrees.

    Raises:
        ConfigError: there is no such target, or images have another size.
        SourceError: the file is not a fused model, or the folder cannot be written.
        UnsupportedByBackendError: the target cannot run this network, and the message names the operators; or it computes something else.
        BackendUnavailableError: the target's packages are not installed.

    Example:
        >>> import fusenms
        >>> path = fusenms.fuse("yolov8n.pt", size=64).save("yolov8n.ort.onnx")
        >>> written = fusenms.deploy(path, "yolov8n.ncnn", target="ncnn")
        >>> len(fusenms.Detector(written.folder)("bus.jpg"))
        1
    """
    if target not in TARGETS:
        raise ConfigError(f"target is {target!r}; expected one of {', '.join(TARGETS)}")
    return TARGETS[target](path, Path(output), half=half, images=images, limits=limits)
