"""`evaluate`: how well a detector finds the objects of images whose objects are known, by COCO's metrics.

1. Read the ground truth (`coco`, `yolo`), and open the model (`models`).
2. Match classes and categories (`classes`).
3. Run the model on each image, and write its detections as results (`running`, `results`).
4. Compare results and ground truth (`scoring`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusenms.errors import ConfigError
from fusenms.evaluation.coco import read_coco
from fusenms.evaluation.models import open_subject
from fusenms.evaluation.result import Evaluation
from fusenms.evaluation.running import run
from fusenms.evaluation.scoring import library
from fusenms.evaluation.truth import GroundTruth
from fusenms.evaluation.yolo import YoloFolder, read_yolo
from fusenms.limits import DEFAULT_LIMITS
from fusenms.pipeline import FuseFields

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fusenms.events import OnEvent

__all__ = ["Evaluation", "evaluate"]


def evaluate(
    file: Any,
    *,
    coco: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    yolo: str | os.PathLike[str] | None = None,
    family: str | None = None,
    against: Any = None,
    batch_size: int = 8,
    threads: int | None = None,
    runtime: str = "auto",
    device: str = "cpu",
    on_event: OnEvent | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **fields: Unpack[FuseFields],
) -> Evaluation:
    """Run a detector on images whose objects are known, and compute COCO's metrics.

    Weights are fused, verified and run with settings that are right for mAP: score threshold 0.001, IoU threshold 0.7, every class of a box
    above the threshold, at most 300 detections per image. A fused file has its settings inside, and is run with these; `Evaluation.notes`
    says where they limit its mAP.

    Args:
        file: weights as for `fusenms.fuse`, a fused file, a folder that `fusenms.deploy` wrote, or a `FusedModel`.
        coco: ground truth in COCO's format, a JSON file. Categories are matched with classes by name, else by order.
        images: folder of the images that ``coco`` names; default: the folder of that file.
        yolo: ground truth in YOLO's format: a folder that holds ``images`` and ``labels``, or a folder of images below one named
            ``images``, as ``data/images/val``.
        family: name of the detector family, if more than one fits the weights.
        against: also run the raw model with `fusenms.reference` as its post-processing on the same images: True for the weights in
            ``file``, or the weights that a fused file was made of (a loaded `RawModel`, if they need options).
        batch_size, threads, runtime, device: as for `Detector`.
        on_event: called after each step of fusing, as for `fusenms.fuse`.
        progress: called with the name of the step, the number of images done, and the total.
        **fields: fields of `PostprocessConfig` other than those above, and of `LoadOptions`. For a fused model only ``limits``.

    Returns:
        the metrics and the results. Images that cannot be read are left out with their objects, and named.

    Raises:
        InputError: the ground truth is malformed, has no objects or not the classes of the model, or no image can be read.
        ConfigError: not exactly one ground truth is given, or a setting is given for a fused model.
        BackendUnavailableError: faster-coco-eval is not installed.
        UnsupportedByBackendError: the model has oriented boxes, or does not run in ONNX Runtime.
        FusenmsError: the weights cannot be fused.

    Example:
        >>> import json
        >>> truth = {
        ...     "images": [{"id": 1, "file_name": "bus.jpg", "height": 480, "width": 640}],
        ...     "categories": [{"id": i, "name": name} for i, name in enumerate(("circle", "square", "triangle"), 1)],
        ...     "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [20, 30, 90, 80], "iscrowd": 0}],
        ... }
        >>> _ = open("truth.json", "w").write(json.dumps(truth))
        >>> import fusenms
        >>> found = fusenms.evaluate("yolov8n.pt", coco="truth.json", size=320)
        >>> 0 <= found.map50_95 <= found.map50 <= 1
        True
        >>> found.images, found.objects, found.matched
        (1, 1, 'by name')
        >>> found.save("results.json").name
        'results.json'
    """
    if (coco is None) == (yolo is None):
        raise ConfigError(f"found {'neither' if coco is None else 'both'} coco and yolo; expected one of them")
    if images is not None and coco is None:
        raise ConfigError(
            "found images without coco; a folder in YOLO's format has its images inside: leave images out"
        )
    limits = fields.get("limits", DEFAULT_LIMITS)
    library()  # fail before anything is read
    truth: GroundTruth | YoloFolder
    if coco is not None:
        truth = read_coco(Path(coco), None if images is None else Path(images), limits)
    else:
        assert yolo is not None
        truth = read_yolo(Path(yolo), limits)
    opening = {"batch_size": batch_size, "threads": threads, "runtime": runtime, "device": device}
    with open_subject(
        file, family=family, against=against, fields=fields, opening=opening, on_event=on_event
    ) as subject:
        return run(subject, truth, batch_size, progress or (lambda *_: None))
