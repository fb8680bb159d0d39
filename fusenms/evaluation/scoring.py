"""COCO's metrics of a set of results, by faster-coco-eval: the only module that imports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusenms.errors import BackendUnavailableError

KINDS = {"boxes": "bbox", "masks": "segm", "keypoints": "keypoints"}
"""What is compared, and what COCO calls it."""
COCO_KEYPOINTS = 17
"""As many have the deviations that COCO measured; others have 1 / P of P keypoints each, as in Ultralytics."""


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """Average precision of one class; None if it has no objects."""

    name: str
    objects: int
    ap50_95: float | None
    ap50: float | None
    ap75: float | None

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"class": self.name, "objects": self.objects} | {
            name: getattr(self, name) for name in ("ap50_95", "ap50", "ap75")
        }


@dataclass(frozen=True, kw_only=True)
class Scores:
    """COCO's metrics of boxes, masks or keypoints, 0 to 1; None where there is no object of that size.

    Attributes:
        map50_95: mean average precision over the IoU thresholds 0.5, 0.55, …, 0.95 and over the classes that have objects.
        map50, map75: the same at one IoU threshold.
        small, medium, large: ``map50_95`` of objects with an area up to 32², up to 96², and above.
        recall: mean recall over the same IoU thresholds and classes, with at most 100 detections per image and class (20 of keypoints).
        classes: of each class.
        curves: ``[3, 101]``: mean precision at the recalls 0, 0.01, …, 1, at IoU 0.5, at IoU 0.75, and over all IoU thresholds.
        class_curves: ``[classes with objects, 101]``: precision of each at IoU 0.5.
    """

    map50_95: float
    map50: float
    map75: float
    small: float | None
    medium: float | None
    large: float | None
    recall: float
    classes: tuple[ClassScore, ...]
    curves: np.ndarray
    class_curves: np.ndarray

    @property
    def metrics(self) -> dict[str, float | None]:
        """All metrics but those of single classes."""
        names = ("map50_95", "map50", "map75", "small", "medium", "large", "recall")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return self.metrics | {"classes": [each.to_dict() for each in self.classes]}


def library() -> Any:
    """Import faster-coco-eval on first use.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    try:
        import faster_coco_eval
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            "metrics and masks in COCO's format need faster-coco-eval; install it with: pip install 'fusenms[eval]'"
        ) from error
    return faster_coco_eval


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode a boolean mask ``[height, width]`` by run lengths, as COCO does.

    Raises:
        BackendUnavailableError: faster-coco-eval is not installed.
    """
    library()
    from faster_coco_eval import mask as encoder

    encoded = encoder.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = encoded["counts"]
    return {"size": list(map(int, encoded["size"])), "counts": counts.decode() if isinstance(counts, bytes) else counts}


def score(
    kind: str,
    sizes: Mapping[int, tuple[int, int]],
    categories: Mapping[int, str],
    annotations: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
) -> Scores:
    """Compare results with annotations.

    Args:
        kind: a key of `KINDS`.
        sizes: number of each image to its (height, width).
        categories: category to its name.
        annotations: of these images, in COCO's format, in pixels.
        results: of these images.
    """
    api = library()
    images = [{"id": number, "height": height, "width": width} for number, (height, width) in sizes.items()]
    # A copy of each: the library writes into them. Areas of results are those of what is compared, so boxes are left out for others.
    kept = "bbox" if kind == "boxes" else "segmentation" if kind == "masks" else "keypoints"
    own = [{name: row[name] for name in ("image_id", "category_id", "score", kept)} for row in results]
    truth = api.COCO(
        {
            "images": images,
            "annotations": [dict(entry) for entry in annotations],
            "categories": [{"id": number, "name": name} for number, name in categories.items()],
        }
    )
    points = max((len(entry.get("keypoints", ())) // 3 for entry in annotations), default=0)
    deviations = None if points in (0, COCO_KEYPOINTS) else [1 / points] * points
    run = api.COCOeval_faster(
        truth, truth.loadRes(own), KINDS[kind], print_function=lambda *_: None, kpt_oks_sigmas=deviations
    )
    run.params.imgIds, run.params.catIds = sorted(sizes), sorted(categories)
    run.evaluate()
    run.accumulate()
    return _scores(run, categories, annotations)


def _scores(run: Any, categories: Mapping[int, str], annotations: Sequence[dict[str, Any]]) -> Scores:
    precision = np.asarray(run.eval["precision"])[..., -1]  # [IoU thresholds, recalls, classes, sizes], -1: no objects
    recall = np.asarray(run.eval["recall"])[..., -1]
    thresholds, sizes = np.asarray(run.params.iouThrs), list(run.params.areaRngLbl)
    at = {iou: int(np.abs(thresholds - iou).argmin()) for iou in (0.5, 0.75)}
    numbers = list(run.params.catIds)
    counts = dict.fromkeys(numbers, 0)
    for entry in annotations:
        counts[entry["category_id"]] += not entry["iscrowd"]
    every = precision[:, :, :, 0]
    having = (every > -1).all((0, 1))
    curves = every[:, :, having]
    by_size = {
        name: _mean(precision[..., sizes.index(name)]) if name in sizes else None
        for name in ("small", "medium", "large")
    }
    return Scores(
        map50_95=_mean(every) or 0.0,
        map50=_mean(every[at[0.5]]) or 0.0,
        map75=_mean(every[at[0.75]]) or 0.0,
        small=by_size["small"],
        medium=by_size["medium"],
        large=by_size["large"],
        recall=_mean(recall[:, :, 0]) or 0.0,
        classes=tuple(
            ClassScore(
                name=categories[number],
                objects=counts[number],
                ap50_95=_mean(every[:, :, k]),
                ap50=_mean(every[at[0.5], :, k]),
                ap75=_mean(every[at[0.75], :, k]),
            )
            for k, number in enumerate(numbers)
        ),
        curves=np.stack((curves[at[0.5]], curves[at[0.75]], curves.mean(0))).mean(2)
        if having.any()
        else np.zeros((3, 101)),
        class_curves=curves[at[0.5]].T,
    )


def _mean(values: np.ndarray) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None
