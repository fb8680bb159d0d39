"""onnxruntime-web: a page that runs the fused file in a browser and draws what it finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fusenms import contract
from fusenms.artifacts.fused import FusedModel, refuse_frames
from fusenms.deployment.base import Deployment, Wanted, model_name, read_fused, refuse_one_tensor, run_there
from fusenms.safety.files import write_folder

PAGE = Path(__file__).resolve().parent.parent / "_web"
ORT_WEB = "1.30.0"
"""The version of onnxruntime-web on npm that the page is tested with."""
MODEL, SETTINGS = "model.onnx", "model.json"


def deploy_web(path: Path, output: Path, wanted: Wanted) -> Deployment:
    """Write the file, its settings, the page and ``package.json``. Errors are those of `fusenms.deploy`."""
    name = model_name(path)
    file = read_fused(path, wanted.limits)
    refuse_frames(path, file.fused.image, "the page")
    refuse_one_tensor(path, file.fused, "the page")
    checked = run_there(path, file, "the page")
    package = {"name": "detector", "private": True, "dependencies": {"onnxruntime-web": ORT_WEB}}
    files = {page.name: page.read_bytes() for page in sorted(PAGE.iterdir()) if page.is_file()}
    files |= {MODEL: file.data, "package.json": _json(package), SETTINGS: _json(settings(file.fused))}
    written = write_folder(output, files, path)
    return Deployment(output, tuple(written), (checked, f"the page runs {name} in onnxruntime-web {ORT_WEB}"))


def settings(fused: FusedModel) -> dict[str, Any]:
    """What the page has to know of the file: its input, its outputs and its classes."""
    image, points = fused.image, fused.layout.keypoints
    count, boxes, scores, labels = fused.config.output_names
    outputs = {"count": count, "boxes": boxes, "scores": scores, "labels": labels}
    return {
        "file": MODEL,
        "input": image.tensor,
        "height": image.height,
        "width": image.width,
        "stride": image.stride,
        "dynamicSize": image.dynamic_size,
        "stretch": image.stretch,
        "batch": image.batch or 1,
        "outputs": outputs | ({} if points is None else {"keypoints": contract.KEYPOINTS}),
        "names": list(fused.class_names),
    }


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
