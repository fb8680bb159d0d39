"""A checkpoint to a verified model, and what its report says."""

import sys
from pathlib import Path

import fusenms

SHAPES = Path(__file__).resolve().parents[1] / "models" / "shapes" / "shapes.pt"
weights = sys.argv[1] if len(sys.argv) > 1 else SHAPES

fused = fusenms.fuse(weights, score_threshold=0.3, max_detections=100)
print(fused.report.summary)
print(fused.save("model.ort.onnx"))
