"""`compare`: whether two forms of a network compute the same, and where they part."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusenms.comparison.result import Comparison, Parting, Row
from fusenms.comparison.runs import PRECISIONS
from fusenms.errors import ConfigError
from fusenms.limits import DEFAULT_LIMITS, Limits

if TYPE_CHECKING:
    import numpy as np

    from fusenms.comparison.tracing import OnProgress

__all__ = ["Comparison", "Parting", "Row", "compare"]


def compare(
    a: Any,
    b: Any,
    *,
    images: np.ndarray | str | os.PathLike[str] | None = None,
    size: int | tuple[int, int] | None = None,
    rounding: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: OnProgress | None = None,
) -> Comparison:
    """Compare two forms of a network, and find the first place where they part beyond rounding.

    Tensors are aligned by their values, on two images, and the rest by order and shape. Names play no part. If one of both gives
    detections and the other is a detector, the detections in all images are compared too.

    Args:
        a, b: an `nn.Module` in evaluation mode, or the path of a checkpoint, of a Hugging Face directory, of an `.onnx` file (raw or
            fused), of an engine (outputs only), or ``FILE.py:NAME``, where ``NAME()`` gives a module; the code of the file is run.
        images: ``[n, 3, height, width]`` float32 (RGB, 0 to 1), or a folder of images; default: the package's own.
        size: height and width in pixels, or one side; default: that of the files.
        rounding: the precision whose rounding is no difference, ``float32``, ``float16``, ``bfloat16`` or ``int8``; default: the coarser
            one of both.
        limits: bounds on what a file may cost.
        progress: called at each step.

    Returns:
        the comparison, which is true if both are equal.

    Raises:
        ConfigError: a target is of no known kind, a precision is unknown, or the two take images of different sizes.
        SourceError: a target cannot be read, or does not run.
        InputError: the images do not fit, or no image has a detection, so that nothing is compared.
        BackendUnavailableError: a target needs a package or a GPU that is not there.

    Example:
        >>> import fusenms
        >>> path = fusenms.fuse("yolov8n.pt", size=64).save("yolov8n.ort.onnx")
        >>> bool(fusenms.compare("yolov8n.pt", path, size=64))
        True
        >>> from fusenms.graph.editing import Op
        >>> edited = fusenms.edit(path, "wrong.onnx", insert={"head_classes": Op("Mul", (0.9,))})
        >>> fusenms.compare(path, edited).parting.b.operator
        'Mul'
    """
    from fusenms.comparison.comparing import compare_targets
    from fusenms.sources import LoadOptions

    folder = Path(images) if isinstance(images, (str, os.PathLike)) else images
    sides = LoadOptions(size=size, limits=limits).sides
    if rounding is not None and rounding not in PRECISIONS:
        raise ConfigError(f"rounding is {rounding!r}; expected one of {', '.join(PRECISIONS)}")
    unit = None if rounding is None else PRECISIONS[rounding]
    tell = progress or (lambda *_: None)
    return compare_targets(a, b, images=folder, size=sides, unit=unit, limits=limits, progress=tell)
