"""Paths of test data, and models that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fusenms import RawModel, load

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ROOT / "models" / "shapes"
ZOO = ROOT.parent / "shared" / "zoo"


def pytest_configure(config: pytest.Config) -> None:
    """Give parallel tests one thread each, because more threads would wait for each other."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    import onnxruntime
    import torch

    class OneThread(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    onnxruntime.SessionOptions = OneThread
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def zoo() -> Path:
    """Real checkpoints and photos from third parties, for testing only. They are not part of the repository."""
    if not ZOO.is_dir():
        pytest.skip(f"needs the checkpoints and photos in {ZOO.relative_to(ROOT.parent)} beside the repository")
    return ZOO


@pytest.fixture(scope="session")
def shapes_raw() -> RawModel:
    """The embedded detector, exported at 64 x 64."""
    return load(SHAPES / "shapes.pt", size=64)


def write_segmenter(path: Path) -> Path:
    """Write a checkpoint of the embedded detector with a mask branch of random weights."""
    import torch
    from torch import nn

    from fusenms.sources.checkpoint import load_checkpoint
    from fusenms.sources.torch_modules.layers import Conv
    from fusenms.sources.torch_modules.tasks import AnchorFreeSegment, Proto

    torch.manual_seed(0)
    model = load_checkpoint(SHAPES / "shapes.pt").module
    head = model.model[-1]
    channels = [branch[0].conv.in_channels for branch in head.cv2]
    del head.one_to_one
    head.__class__, head.nm = AnchorFreeSegment, 4
    head.cv4, head.proto = nn.ModuleList(nn.Conv2d(c, 4, 1) for c in channels), Proto()
    head.proto.cv1, head.proto.cv2, head.proto.cv3 = Conv(channels[0], 8, 3), Conv(8, 8, 3), Conv(8, 4)
    head.proto.upsample = nn.ConvTranspose2d(8, 8, 2, 2)
    torch.save({"model": model}, path)
    return path
