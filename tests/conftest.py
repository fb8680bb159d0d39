"""Where test data lies, and models that several tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusenms import RawModel, load

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ROOT / "models" / "shapes"
ZOO = ROOT.parent / "shared" / "zoo"


@pytest.fixture(scope="session")
def zoo() -> Path:
    """Real checkpoints and photos of others, for testing only; not part of the repository."""
    if not ZOO.is_dir():
        pytest.skip(f"needs the checkpoints and photos in {ZOO.relative_to(ROOT.parent)} beside the repository")
    return ZOO


@pytest.fixture(scope="session")
def shapes_raw() -> RawModel:
    """The embedded detector, exported at 64 x 64."""
    return load(SHAPES / "shapes.pt", size=64)
