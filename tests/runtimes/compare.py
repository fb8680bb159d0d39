"""Run fused files in every runtime that is installed, and compare each row with what ONNX Runtime on CPU gives.

    python tests/runtimes/compare.py FILE.onnx ... [--image FILE ...] [--node FOLDER] [--json]

OpenVINO and tract come from PyPI, onnxruntime-node and onnxruntime-web from npm (`npm install --ignore-scripts` in FOLDER).
Exit status 1 where a runtime gives other detections.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fusenms import contract
from fusenms.artifacts.fused import FusedModel, load_fused
from fusenms.errors import first_line
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.heads.probe import probe_image
from fusenms.runtime.images import read_image
from fusenms.runtime.placement import letterbox, to_tensor

Outputs = dict[str, np.ndarray]
Run = Callable[[Path, np.ndarray], Outputs]
BATCHES = (1, 2, 5)
PIXELS, SCORES = 0.01, 1e-4
"""A runtime computes the network in its own way; ONNX Runtime and OpenVINO differ by 1e-4 px and 2e-6."""


@dataclass(frozen=True)
class Row:
    """A file in a runtime: detections compared, rows that differ, worst differences; or why it did not run."""

    file: str
    runtime: str
    detections: int
    differing: int
    worst_box: float
    worst_score: float
    note: str = ""


def run_openvino(path: Path, images: np.ndarray) -> Outputs:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return {key.any_name: np.array(value) for key, value in compiled(images).items()}


def run_tract(path: Path, images: np.ndarray) -> Outputs:
    import tract

    model = tract.onnx().load(str(path))
    fused = load_fused(path)
    names = [name for name, _ in fused.layout.outputs(fused.config)]  # it names outputs after their nodes
    for i in range(len(names)):
        model.set_output_fact(i, None)
    model.set_input_fact(0, ",".join(map(str, images.shape)) + ",f32")
    outputs = model.into_model().into_runnable().run([np.ascontiguousarray(images)])
    return {name: value.to_numpy() for name, value in zip(names, outputs, strict=True)}


def run_node(package: str, folder: Path) -> Run:
    def run(path: Path, images: np.ndarray) -> Outputs:
        with tempfile.NamedTemporaryFile(suffix=".bin") as file:
            file.write(np.ascontiguousarray(images).tobytes())
            file.flush()
            words = ["node", str(Path(__file__).with_name("run.mjs")), package, str(path.resolve()), file.name]
            shape = ",".join(map(str, images.shape))
            done = subprocess.run([*words, shape], capture_output=True, text=True, cwd=folder)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "rror" in line]
            raise RuntimeError(lines[0] if lines else done.stderr[-200:])
        outputs = json.loads(done.stdout.splitlines()[-1])["outputs"]
        return {name: np.array(value["data"]).reshape(value["dims"]) for name, value in outputs.items()}

    return run


def runtimes(folder: Path | None) -> tuple[dict[str, Run], list[str]]:
    """Those that are installed, and those that are not."""
    found: dict[str, Run] = {}
    missing = []
    for name, run in (("openvino", run_openvino), ("tract", run_tract)):
        if importlib.util.find_spec(name):
            found[name] = run
        else:
            missing.append(name)
    for package in ("onnxruntime-node", "onnxruntime-web"):
        if folder is not None and shutil.which("node") and (folder / "node_modules" / package).is_dir():
            found[package] = run_node(package, folder)
        else:
            missing.append(package)
    return found, missing


def compare(path: Path, name: str, run: Run, images: np.ndarray) -> Row:
    """One file in one runtime, at every batch size."""
    fused = load_fused(path)
    truth = OnnxRuntimeRunner(fused.model)
    detections = differing = 0
    box = score = 0.0
    for batch in BATCHES:
        filled = images[np.arange(batch) % len(images)]
        try:
            got = run(path, filled)
        except Exception as error:  # each runtime raises its own kinds
            return Row(path.name, name, 0, 0, 0.0, 0.0, f"batch {batch}: {first_line(error)}")
        for rows in _pairs(fused, truth.infer(filled), got):
            detections += rows[0]
            differing, box, score = differing + rows[1], max(box, rows[2]), max(score, rows[3])
    return Row(path.name, name, detections, differing, box, score)


def _pairs(fused: FusedModel, expected: Outputs, got: Outputs) -> list[tuple[int, int, float, float]]:
    """For each image: detections, rows that differ, worst difference of a box, of a score."""
    names, found = fused.config.output_names, []
    for i, count in enumerate(expected[names[0]][:, 0].tolist()):
        if int(got[names[0]][i, 0]) != count:
            found.append((count, abs(int(got[names[0]][i, 0]) - count), 0.0, 0.0))
            continue
        boxes, scores = (np.abs(expected[n][i, :count] - got[n][i, :count]) for n in names[1:3])
        other = (boxes.max(1, initial=0) > PIXELS) | (scores > SCORES)
        other |= expected[names[3]][i, :count] != got[names[3]][i, :count]
        for name in set(expected) - set(names) - {contract.PROTOTYPES, contract.CONVERGED}:  # of rows too
            apart = np.abs(expected[name][i, :count].astype(np.float64) - got[name][i, :count])
            other |= (apart > PIXELS).reshape(count, -1).mean(1, dtype=np.float64) > (
                0.001 if name == contract.MASKS else 0
            )
        found.append((count, int(other.sum()), float(boxes.max(initial=0)), float(scores.max(initial=0))))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--image", nargs="+", type=Path, default=[])
    parser.add_argument("--node", type=Path, metavar="FOLDER")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found, missing = runtimes(args.node)
    rows = []
    for path in args.files:
        image = load_fused(path).image
        images = probe_image(image.height, image.width)
        if args.image:
            images = to_tensor([letterbox(read_image(p), image.height, image.width)[0] for p in args.image])
        rows += [compare(path, name, run, images) for name, run in found.items()]
    if args.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "missing": missing}))
    else:
        for row in rows:
            said = f"does not run: {row.note}" if row.note else (
                f"{row.detections} detections, {row.differing} differ, worst {row.worst_box:.1e} px, {row.worst_score:.1e}"
            )  # fmt: skip
            print(f"{row.file:28} {row.runtime:18} {said}")
        for name in missing:
            print(f"not installed: {name}")
    return int(any(row.differing for row in rows))


if __name__ == "__main__":
    sys.exit(main())
