"""Where test data lies, and models that several tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import scopes
import sharing

from fusenms import RawModel, load, sources

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ROOT / "models" / "shapes"
ZOO = ROOT.parent / "shared" / "zoo"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--scope", choices=scopes.SCOPES, default="default", help="how much of the suite runs")


def pytest_report_header(config: pytest.Config) -> str:
    return f"scope: {config.getoption('scope')} (--scope {', '.join(scopes.SCOPES)})"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    scopes.deselect(config, items)


def pytest_configure(config: pytest.Config) -> None:
    """Marks, how long searches are, and threads.

    Tests that run beside each other take one thread each: more would wait for one another.
    """
    for mark in scopes.MARKS:
        config.addinivalue_line("markers", mark)
    hypothesis.settings.register_profile(
        "scope", max_examples=scopes.EXAMPLES[config.getoption("scope")], deadline=None
    )
    hypothesis.settings.load_profile("scope")
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
    """Real checkpoints and photos of others, for testing only; not part of the repository."""
    if not ZOO.is_dir():
        pytest.skip(f"needs the checkpoints and photos in {ZOO.relative_to(ROOT.parent)} beside the repository")
    return ZOO


@pytest.fixture(scope="session", autouse=True)
def _folder_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    sharing.start(tmp_path_factory)


@pytest.fixture(scope="module")
def shared_exports() -> Iterator[None]:
    """Weights with the same content are exported with the same settings once in a run. Not for tests of reading and exporting."""
    export = sources._export

    def shared(path: Path, *settings: object) -> RawModel:
        if not (path.is_file() or path.is_dir()):
            return export(path, *settings)
        key = repr((path.name, sharing.digest(path), settings))
        return sharing.once(key, lambda: export(path, *settings))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_export", shared)
        yield


@pytest.fixture(scope="session")
def shapes_raw() -> RawModel:
    """The embedded detector, exported at 64 x 64."""
    return sharing.once("shapes_raw", lambda: load(SHAPES / "shapes.pt", size=64))


def write_segmenter(path: Path) -> Path:
    """The embedded detector with a branch for masks, of random weights, as a checkpoint."""
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
