"""What `compare` takes: a checkpoint, a directory, ``FILE.py:NAME``, a module, an `.onnx` file (raw or fused) or an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusenms import contract
from fusenms.artifacts.fused import FusedModel, load_fused, refuse_frames
from fusenms.artifacts.preprocessing import PIXELS, Pixels
from fusenms.artifacts.raw import RawModel
from fusenms.comparison.onnx_run import OnnxRun
from fusenms.comparison.runs import Run
from fusenms.config import PostprocessConfig
from fusenms.diagnosis.targets import module_of
from fusenms.engines.base import load_engine
from fusenms.engines.running import ENGINES
from fusenms.errors import ConfigError, FusenmsError, HeadError, SourceError
from fusenms.fusion.backends import get_backend
from fusenms.heads import raw_head, recognize
from fusenms.limits import Limits
from fusenms.onnx_reading.files import read_metadata, read_onnx
from fusenms.sources import LoadOptions, load, load_network
from fusenms.sources.onnx_file import load_any_onnx

if TYPE_CHECKING:
    from fusenms.sources.network import Network

Size = tuple[int, int]
USUAL_SIZE = (640, 640)


@dataclass(frozen=True, kw_only=True)
class Target:
    """One of the two things that are compared, read but not opened.

    Attributes:
        name: what it is called in messages.
        size: height and width that it takes, in pixels; None: any.
        usual_size: the size it is run at if both take any.
        pixels, stretch: preprocessing of its images; None: not known.
        assumed: whether the pixels are only those that are usual for its family.
        fused: the fused model, if it is one.
        weights: what `fusenms.fuse` takes, if it may be a detector; else None.
        engine: metadata of an engine; empty for others.
    """

    name: str
    size: Size | None = None
    usual_size: Size = USUAL_SIZE
    pixels: Pixels | None = None
    stretch: bool | None = None
    assumed: bool = False
    fused: FusedModel | None = None
    weights: Any = None
    network: Network | None = None
    module: Any = None
    raw: RawModel | None = None
    path: Path | None = None
    engine: Mapping[str, str] | None = None

    def open(self, size: Size, pixels: Pixels, limits: Limits) -> Run:
        """Open it for images of a size.

        Raises:
            SourceError: it does not run.
            BackendUnavailableError: what it runs on is not installed.
        """
        if self.path is not None:
            from fusenms.comparison.engine_run import EngineRun

            return EngineRun(self.path, load_engine(self.path))
        if self.fused is not None:
            fused = self.fused
            model = get_backend(fused.backend).to_standard(fused.model, fused)
            batch, head = fused.image.batch or 1, fused.layout.tensors
            return OnnxRun(
                model, fused.image.tensor, source=self.name, size=size, batch=batch, outputs=head, limits=limits
            )
        if self.raw is not None:
            raw = self.raw
            return OnnxRun(
                raw.model, raw.image.tensor, source=self.name, size=size, batch=raw.frozen_batch or 1, pixels=pixels, limits=limits
            )  # fmt: skip
        from fusenms.comparison.torch_run import TorchRun

        if self.network is not None:
            names = self.network.layout.sources
            return TorchRun(self.network.module, source=self.name, size=size, outputs=names, pixels=pixels)
        return TorchRun(self.module, source=self.name, size=size, pixels=pixels)

    @property
    def config(self) -> PostprocessConfig | None:
        """The settings of its post-processing; None if it has none."""
        if self.engine is not None and contract.KEY_CONFIG in self.engine:
            return PostprocessConfig.from_dict(json.loads(self.engine[contract.KEY_CONFIG]))
        return self.fused.config if self.fused is not None else None


def read_target(target: Any, size: Size | None, limits: Limits) -> Target:
    """Read a target. The code of a ``FILE.py`` is run.

    Raises:
        ConfigError: the target is none of these.
        SourceError: it cannot be read.
    """
    if hasattr(target, "named_modules"):
        return Target(name=type(target).__name__, module=_prepared(target), size=size)
    text = str(target)
    file, mark, name = text.rpartition(":")
    if mark and file.endswith(".py"):
        return Target(name=text, module=_prepared(module_of(Path(file), name)), size=size)
    path = Path(text)
    if path.suffix == ".py":
        raise ConfigError(f"{text}: expected FILE.py:NAME, where NAME() gives the module")
    if path.suffix in ENGINES and path.is_file():
        return _engine(path)
    if path.suffix.lower() == ".onnx" and not path.is_dir():
        return _onnx(path, size, limits)
    network = load_network(path, LoadOptions(size=size, limits=limits)) if path.exists() else None
    if network is None:
        load(path, limits=limits)  # says what was expected
        raise SourceError(f"{path}: no such file")
    return Target(
        name=text,
        network=network,
        size=size or (None if network.open_size else network.size),
        usual_size=network.size,
        pixels=network.pixels or PIXELS["rgb"],
        stretch=network.stretch,
        weights=path,
    )


def _prepared(module: Any) -> Any:
    """A module in evaluation mode, as an export of it is."""
    for inner in module.modules():
        if inner.training:
            raise ConfigError(
                f"{type(module).__name__}: is in training mode ({type(inner).__name__}), and an export is not; call module.eval() first"
            )
    return module


def _engine(path: Path) -> Target:
    info = load_engine(path).info
    usual = next(iter(info["inputs"].values()))["opt"]
    if len(usual) != 4:
        raise SourceError(f"{path}: its first input has the shape {usual}; expected that of images")
    metadata = info["metadata"]
    stretch = json.loads(metadata.get(contract.KEY_IMAGE, "{}")).get("stretch")
    known = PIXELS["rgb"] if contract.KEY_BACKEND in metadata else None
    return Target(
        name=str(path), path=path, size=(int(usual[2]), int(usual[3])), pixels=known, stretch=stretch, engine=metadata
    )


def _onnx(path: Path, size: Size | None, limits: Limits) -> Target:
    if contract.KEY_BACKEND in read_metadata(read_onnx(path, limits)):
        fused = load_fused(path, limits=limits)
        refuse_frames(path, fused.image, "compare")
        own = fused.image.height, fused.image.width
        if size is not None and size != own and not fused.image.dynamic_size:
            raise ConfigError(f"{path}: takes {own[0]}x{own[1]} images, but size is {size[0]}x{size[1]}")
        return Target(
            name=str(path), fused=fused, size=size if fused.image.dynamic_size else own, usual_size=own, pixels=PIXELS["rgb"],
            stretch=fused.image.stretch,
        )  # fmt: skip
    options = LoadOptions(size=size, limits=limits)
    raw = load_any_onnx(path, options)
    target = Target(
        name=str(path), raw=raw, size=(raw.image.height, raw.image.width), pixels=raw.pixels, stretch=raw.stretch
    )
    try:
        whole = load(path, options)
        head = raw_head(whole, recognize(whole))
    except (HeadError, SourceError):
        return target  # no detector that fusenms knows, or one with its suppression inside
    return replace(target, pixels=head.pixels, stretch=head.stretch, weights=path, assumed=raw.pixels is None)


def read_both(a: Any, b: Any, size: Size | None, limits: Limits) -> tuple[Target, Target, Size]:
    """Read two targets, and find the size that both run at.

    Raises:
        ConfigError: they take images of different sizes.
        FusenmsError: one cannot be read.
    """
    one = read_target(a, size, limits)
    try:
        two = read_target(b, size or one.size, limits)
    except ConfigError:
        if size is not None or one.size is None:
            raise
        two = read_target(b, None, limits)
    if size is None and one.size is not None and two.size is not None and one.size != two.size:
        with suppress(FusenmsError):  # a file that was read at its usual size may take others
            one = read_target(a, two.size, limits)
    if one.size is not None and two.size is not None and one.size != two.size:
        raise ConfigError(
            f"{one.name} takes {one.size[0]}x{one.size[1]} images, and {two.name} {two.size[0]}x{two.size[1]}; expected the same size: "
            "give a size, or export both at one"
        )
    return one, two, one.size or two.size or size or one.usual_size
