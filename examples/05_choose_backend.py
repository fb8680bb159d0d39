"""One network, fused for every backend."""

import sys
from pathlib import Path

import fusenms

SHAPES = Path(__file__).resolve().parents[1] / "models" / "shapes" / "shapes.pt"
raw = fusenms.load(sys.argv[1] if len(sys.argv) > 1 else SHAPES)
layout = fusenms.recognize(raw)

for backend in ("ort", "trt", "portable", "plugin"):
    fused = fusenms.fuse(raw, layout=layout, backend=backend)
    print(f"{backend}: suppression by {fused.suppressed_by}, {fused.report.summary}")
    fused.save(f"model.{backend}.onnx")
