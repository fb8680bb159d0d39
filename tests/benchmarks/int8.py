"""int8 beside float32 and beside the same model quantized whole: mAP, detections, and times, interleaved in one process.

    python tests/benchmarks/int8.py CHECKPOINT.pt DATASET [--rounds 20] [--size 640]

DATASET holds ``images`` and ``labels`` in YOLO's format. Every fourth image is not calibrated on. The raw model is the checkpoint with its
usual decode. Thread pools do not spin: those of several sessions would disturb each other.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from detector import interleaved
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from run import raw_model

import fusenms
from fusenms.errors import FusenmsError, first_line
from fusenms.runtime.images import list_images
from fusenms.runtime.placement import load_tensor
from fusenms.sources.checkpoint import load_checkpoint
from fusenms.verification.agreement import agreement

FOR_MAP = {"score_threshold": 0.001, "iou_threshold": 0.7, "multi_label": True}


class Images(CalibrationDataReader):  # type: ignore[misc]
    """Images one by one, for ONNX Runtime's calibration of the whole model."""

    def __init__(self, images: np.ndarray) -> None:
        self._left = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self._left, None)
        return None if image is None else {"images": image[None]}


def session(path: Path) -> Callable[[np.ndarray], Any]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = opened.get_inputs()[0].name
    return lambda images: opened.run(None, {name: images})


def openvino(path: Path) -> Callable[[np.ndarray], Any]:
    import openvino as ov

    compiled = ov.Core().compile_model(str(path), "CPU")
    return lambda images: compiled([images])


def fused(args: argparse.Namespace, calibrate: list[Path], folder: Path) -> dict[str, fusenms.FusedModel]:
    """float32, and int8 in both forms, at the default settings."""
    made = {"float32": fusenms.fuse(args.checkpoint, size=args.size)}
    for backend in ("ort", "portable"):
        made[f"int8 {backend}"] = fusenms.fuse(
            args.checkpoint, size=args.size, backend=backend, precision="int8", calibrate=calibrate, max_drift=1.0
        )
    for name, model in made.items():
        model.save(folder / f"{name}.onnx")
    return made


def scores(path: Path, args: argparse.Namespace) -> str:
    """mAP50-95 and mAP50 of a fused file with settings that are right for it."""
    found = fusenms.evaluate(path, yolo=args.dataset)
    return f"mAP50-95 {100 * found.map50_95:.2f}, mAP50 {100 * found.map50:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    every = list(list_images(args.dataset / "images"))
    arrays = load_tensor(args.dataset / "images", args.size, args.size, False, fusenms.Limits())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = fused(args, every, folder)
        for label, model in models.items():
            changed = agreement(models["float32"], model, arrays).summary if label != "float32" else ""
            file = fusenms.configure(folder / f"{label}.onnx", **FOR_MAP).save(folder / f"{label}.map.onnx")
            print(f"{label}: {scores(file, args)} {changed}", flush=True)
        raw_model(load_checkpoint(args.checkpoint), args.size, folder / "raw.onnx")
        whole = folder / "whole.onnx"
        quantize_static(
            folder / "raw.onnx", whole, Images(arrays), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        try:
            file = fusenms.fuse(whole, **FOR_MAP).save(folder / "whole.map.onnx")
            print(f"quantized whole, min and max: {scores(file, args)}", flush=True)
        except FusenmsError as error:
            print(f"quantized whole, min and max: {first_line(error)}", flush=True)
        for runtime, opened in (("ONNX Runtime", session), ("OpenVINO", openvino)):
            times(runtime, opened, [folder / "raw.onnx", *(folder / f"{label}.onnx" for label in models)], args)
    return 0


def times(
    runtime: str, opened: Callable[[Path], Callable[[np.ndarray], Any]], files: list[Path], args: argparse.Namespace
) -> None:
    """Print the times of files, interleaved, by batch."""
    for batch in (1, 8):
        images = np.random.default_rng(0).random((batch, 3, args.size, args.size), dtype=np.float32)
        ways = {path.stem: partial(opened(path), images) for path in files}
        found = interleaved(ways, args.rounds)
        raw = found["raw"]
        line = ", ".join(f"{name} {1000 * seconds:.1f} ms ({seconds / raw:.2f})" for name, seconds in found.items())
        print(f"{runtime}, batch {batch}: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
