"""What `doctor` takes beside a module: a checkpoint, a directory, an `.onnx` file, and ``FILE.py:NAME``."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fusenms.diagnosis.findings import Diagnosis, Finding, Place
from fusenms.errors import ConfigError, SourceError, first_line
from fusenms.graph.model import with_only_outputs
from fusenms.graph.session import Session
from fusenms.graph.unlike_images import largest_difference, unlike_images
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.onnx_reading import untrusted
from fusenms.sources import LoadOptions, load, load_network

TOLERANCE = 1e-3
Size = tuple[int, int]


def examine_target(
    target: str, size: Size | None = None, limits: Limits = DEFAULT_LIMITS, *, opset: int | None = None
) -> Diagnosis:
    """Examine a checkpoint, a Hugging Face directory, an `.onnx` file, or the module that ``NAME()`` of ``FILE.py:NAME`` gives.

    The code of a ``FILE.py`` is run.

    Args:
        size: height and width in pixels; default: that of the weights, and 640 x 640 for a module.
        limits: bounds on what a file may cost.
        opset: ONNX operator set of the export; default: 17. An `.onnx` file has its own.

    Raises:
        ConfigError: the target is none of these, or the opset is out of its range.
        SourceError: the weights cannot be read, or the code does not run.
    """
    file, mark, name = target.rpartition(":")
    if mark and file.endswith(".py"):
        from fusenms.diagnosis.examination import examine

        return examine(module_of(Path(file), name), size or (640, 640), source=target, opset=opset)
    path = Path(target)
    if path.suffix == ".py":
        raise ConfigError(f"{target}: expected FILE.py:NAME, where NAME() gives the module")
    if path.suffix.lower() == ".onnx" and path.is_file():
        if opset is not None:
            raise ConfigError("opset is for exporting a module; an .onnx file keeps its own: leave it out")
        return _examine_file(path, size, limits)
    from fusenms.diagnosis.examination import examine

    network = load_network(path, LoadOptions(size=size, limits=limits))
    return examine(network.module, size or network.size, sizes=network.open_size, source=network.source, opset=opset)


def module_of(path: Path, name: str) -> Any:
    """Run a file, and return what its function or class of this name gives."""
    if not path.is_file():
        raise SourceError(f"{path}: no such file; expected FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(code)
        make = getattr(code, name, None)
        module = make() if callable(make) and not hasattr(make, "named_modules") else make
    except Exception as error:  # the user's code can raise any error
        raise SourceError(f"{path}:{name}: does not run ({type(error).__name__}: {first_line(error)})") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    if isinstance(make, type) and hasattr(make, "named_modules"):  # a class of modules
        try:
            module = make()
        except Exception as error:
            raise SourceError(f"{path}:{name}: does not run ({type(error).__name__}: {first_line(error)})") from error
    if not hasattr(module, "named_modules"):
        raise ConfigError(
            f"{path}:{name}: gives a {type(module).__name__}; expected a function or class that gives an nn.Module"
        )
    return module


def _examine_file(path: Path, size: Size | None, limits: Limits) -> Diagnosis:
    """Which dimensions of an `.onnx` are dynamic, and whether the images of a batch change each other's results."""
    raw = load(path, limits=limits)
    height, width = size or (raw.image.height, raw.image.width)
    outputs = [entry.name for entry in raw.model.graph.output]
    with untrusted(path, "examining"):
        session = Session(with_only_outputs(raw.model, outputs), source=str(path), max_seconds=limits.max_run_seconds)
        images = np.stack(list(unlike_images(height, width).values()))
        place, findings, dynamic = Place(str(path), 0), list[Finding](), dict[str, str]()
        if raw.frozen_batch is not None:
            dynamic["batch"] = f"frozen at {raw.frozen_batch}"
        else:
            dynamic["batch"] = "equal"
            alone = [_run(session, image[None]) for image in images]
            together = _run(session, images)
            bad = next((one for one in (*alone, together) if isinstance(one, str)), "")
            if isinstance(together, str) or bad:
                dynamic["batch"] = bad
                findings.append(Finding.at("dynamic-dimension", place, f"the batch is not dynamic: the file {bad}"))
            else:
                joined = [
                    np.concatenate(parts)
                    for parts in zip(*(one for one in alone if not isinstance(one, str)), strict=True)
                ]
                found = largest_difference(together, joined)
                if found.share > TOLERANCE:
                    dynamic["batch"] = f"differs by {found.absolute:.2g} in {outputs[found.tensor]}"
                    message = f"the images of a batch change each other's results: {outputs[found.tensor]} differs by {found.absolute:.2g}"
                    findings.append(Finding.at("batch-mixing", place, message))
        if raw.image.dynamic_size:
            dynamic["size"] = "runs"
            for other in ((height + 64, width + 32), (height, width + 64)):
                got = _run(session, next(iter(unlike_images(*other).values()))[None])
                if isinstance(got, str):
                    dynamic["size"] = f"{got} at {other[0]}x{other[1]}"
                    message = f"height and width are not dynamic: the file {dynamic['size']}"
                    findings.append(Finding.at("dynamic-dimension", place, message))
                    break
        else:
            dynamic["size"] = f"fixed at {raw.image.height}x{raw.image.width}"
    return Diagnosis(findings=tuple(findings), dynamic=dynamic)


def _run(session: Session, images: np.ndarray) -> list[np.ndarray] | str:
    """The outputs, or why there are none, with the node."""
    try:
        return list(session.run({session.inputs[0]: images}, None))
    except SourceError as error:
        node = re.search(r"Name: ?'([^']+)'", str(error))
        return (
            f"does not run on {list(images.shape)}{f' at node {node[1]}' if node else ''} ({first_line(error)[:200]})"
        )
