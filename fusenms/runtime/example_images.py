"""The example images of the package: people, faces, an animal, things on a table. `_images/CREDITS.md` says whose they are."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from fusenms.runtime.images import has_opencv, read_image
from fusenms.runtime.placement import letterbox, to_tensor

FOLDER = Path(__file__).resolve().parent.parent / "_images"
NAMES = ("astronaut.jpg", "hopper.jpg", "cat.jpg", "coffee.jpg")


@lru_cache(maxsize=2)
def example_images(height: int, width: int) -> np.ndarray | None:
    """All example images, in the quarters of one: ``[1, 3, height, width]`` float32, RGB, 0 to 1. None if OpenCV is not installed."""
    if not has_opencv() or min(height, width) < 2:
        return None
    sizes = [(h, w) for h in (height // 2, height - height // 2) for w in (width // 2, width - width // 2)]
    parts = [letterbox(read_image(FOLDER / name), *size)[0] for name, size in zip(NAMES, sizes, strict=True)]
    return to_tensor([np.vstack((np.hstack(parts[:2]), np.hstack(parts[2:])))])
