"""Try every file of the catalog and write docs/families.md:  python tests/families.py [FOLDER]

For each file: raw outputs against Ultralytics' own or those that came with it, fused against the reference on every backend, the batch,
and an engine of TensorRT-RTX from the portable graph. `test_families.py` holds the table against what the code does now.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "families.md"
HEAD = """# Families, and what each was tried on

Made by `python tests/families.py`, and held against the code by `tests/test_families.py`. The files are other people's checkpoints and
small ones that we trained, and are not part of the repository. Ultralytics 8.4.190 made the expected outputs.

| file | task | head | meaning | decode | raw outputs | ort | trt | portable | plugin ¹ | batch | TensorRT-RTX |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""
NOTES = """
- **meaning**: *motion*: the boxes move with the image, which shows format, strides and order of levels; *images*: objects are found again
  in mirror images of the package's photos; *assumed*: nothing shows them ([what a head means](concepts/meaning.md)). Checkpoints are tried
  at 320 x 320, where the cells of some see the edges of the image.
- **raw outputs**: boxes (with angles) and scores equal to Ultralytics' own on the same input, within 0.01 px and 1e-4 of a score;
  *detections*: no raw outputs came with the file, so it is compared by its detections (`tests/test_detector.py`). Masks and keypoints:
  `tests/test_tasks.py`.
- **ort, trt, portable, plugin**: every row of the fused model equals the float64 reference on 32 images at batch 1, 2 and 7 (`trt`: with a
  body for the plugin, in ONNX Runtime; oriented boxes are suppressed by plain operators on every backend but `plugin`).
- **batch**: *dynamic*; *mixed*: dynamic int8, whose ranges span the batch.
- **TensorRT-RTX**: an engine of the portable graph builds.

¹ In ONNX Runtime, the graph of backend `ort` (oriented boxes: `portable`) stands in for the plugin, so this column adds nothing to
theirs. It says nothing about the plugin's kernels: [their own tests](how-to/plugin.md#what-the-tests-show) compare them with the
reference.
"""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    file: str
    task: str
    head: str
    meaning: str
    decode: str
    raw: str
    equal: tuple[str, ...]
    batch: str
    engine: str

    def __str__(self) -> str:
        cells = (
            f"`{self.file}`",
            self.task,
            self.head,
            self.meaning,
            self.decode,
            self.raw,
            *self.equal,
            self.batch,
            self.engine,
        )
        return f"| {' | '.join(cells)} |"


def how_shown(notes: Iterable[str]) -> str:
    """What shows the meaning of the head, by the notes of a fused model."""
    said = {"geometry shown": "motion", "shown on images": "images"}
    return ", ".join(how for start, how in said.items() if any(note.startswith(start) for note in notes)) or "assumed"


def row(folder: Path, file: str, work: Path, engines: bool = True) -> Row:
    """Try one file; ``work`` is a folder for what it writes."""
    from fusenms import fuse, load, recognize
    from fusenms.fusion.backends import BACKENDS

    path = folder / file
    small = {"size": 320} if path.suffix == ".pt" else {}
    raw = load(path, **small)
    layout = recognize(raw)
    settings = {"score_threshold": 0.1, "indices": True}
    fused = {backend: fuse(raw, layout=layout, backend=backend, **settings) for backend in BACKENDS}
    equal = tuple("equal" if model.report else "DIFFERS" for model in fused.values())
    engine = _engine(fused["portable"].save(work / "m.portable.onnx")) if engines else ""
    batch = "dynamic" if fused["ort"].image.independent else "mixed"
    meaning = how_shown(fused["ort"].notes)
    return Row(
        file, layout.task, layout.family, meaning, layout.decode_stage, _parity(folder, file), equal, batch, engine
    )


def _engine(path: Path) -> str:
    from fusenms.engines.base import EngineSettings
    from fusenms.engines.rtx import build_rtx
    from fusenms.errors import UnsupportedByBackendError

    try:
        build_rtx(str(path), EngineSettings(batch=(1, 2, 8)))
    except UnsupportedByBackendError as error:
        return "float only" if "take the float file" in str(error) else "refused"
    return "built"


def _parity(folder: Path, file: str) -> str:
    """Raw outputs of a checkpoint against the golden ones."""
    name = Path(file).stem
    places = (folder / "shapes" / "golden" / f"{name}.npz", folder / "golden" / f"{name}-bus.npz")
    golden = next((path for path in places if path.is_file()), None)
    if not file.endswith(".pt") or golden is None:
        return "detections"
    import torch

    from fusenms.boxes import cxcywh_to_xyxy
    from fusenms.reference import candidates
    from fusenms.sources.checkpoint import load_checkpoint
    from fusenms.sources.export import network_of

    values = np.load(golden)
    network = network_of(load_checkpoint(folder / file), name)
    pixels = values["input"] if "input" in values else values["letterboxed_rgb_uint8"].transpose(2, 0, 1)[None]
    images = pixels.astype(np.float32) / 255
    with torch.no_grad():
        taps = [t.numpy() for t in network.module(torch.from_numpy(images))]
    head = dict(zip(network.layout.sources, taps, strict=True))
    worst = [0.0, 0.0]
    for i in range(len(images)):
        found = candidates(head, i, network.layout, images.shape[2:])
        if "logits" in values:  # RT-DETR
            boxes, scores = cxcywh_to_xyxy(values["boxes"][i] * images.shape[2]), 1 / (1 + np.exp(-values["logits"][i]))
        else:
            key = "raw" if "raw" in values else "output" if network.layout.suppress else "one2one"
            output, last = values[key][i].T, 4 + network.layout.num_classes
            boxes, scores = cxcywh_to_xyxy(output[:, :4]), output[:, 4:last]
            if network.layout.angle is not None:
                boxes = np.concatenate((output[:, :4], output[:, last:]), 1)
        worst = [
            max(w, float(np.abs(a - b).max()))
            for w, a, b in zip(worst, (found.boxes, found.scores), (boxes, scores), strict=True)
        ]
    return "equal" if worst[0] <= 1e-2 and worst[1] <= 1e-4 else f"DIFFERS ({worst[0]:.2g} px, {worst[1]:.2g})"


def main(folder: Path) -> None:
    import tempfile

    from fusenms.catalog import families

    rows = []
    with tempfile.TemporaryDirectory() as work:
        for family in families():
            for file in family.files:
                rows.append(row(folder, file, Path(work)))
                print(rows[-1], flush=True)
    TABLE.write_text(HEAD + "".join(f"{line}\n" for line in rows) + NOTES)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "zoo")
