"""A Detector on images."""

import sys
from pathlib import Path

import fusenms

SHAPES = Path(__file__).resolve().parents[1] / "models" / "shapes"
images = sys.argv[1:] or [SHAPES / "shapes0.jpg", SHAPES / "shapes1.jpg"]

fusenms.fuse(SHAPES / "shapes.pt").save("shapes.ort.onnx")
with fusenms.Detector("shapes.ort.onnx", batch_size=8) as detect:
    for image, found in zip(images, detect(images), strict=True):
        print(image)
        for box, score, label in found:
            print(f"  {found.name(label)} {score:.2f} {box.round(1).tolist()}")
