"""A TensorRT-RTX engine, without a GPU (pip install 'fusenms[rtx]')."""

import sys
from pathlib import Path

import fusenms

SHAPES = Path(__file__).resolve().parents[1] / "models" / "shapes" / "shapes.pt"
fused = fusenms.fuse(sys.argv[1] if len(sys.argv) > 1 else SHAPES, backend="portable", size=128)
file = fused.save("model.portable.onnx")

engine = fusenms.build_engine(file, settings=fusenms.EngineSettings(batch=(1, 2, 4)))
print(engine.info["builder"], engine.info["inputs"])
print(engine.save(Path("model.rtx")))
