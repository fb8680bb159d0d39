"""Reads the outputs of a fused model: checks them against the contract, and makes `Detections` of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusenms import contract
from fusenms.artifacts.fused import FusedModel
from fusenms.boxes import oriented_to_corners, upright_around
from fusenms.contract import Output
from fusenms.errors import RunError
from fusenms.runtime.call import Call
from fusenms.runtime.detections import Detections
from fusenms.runtime.masks import Masks, logits_of
from fusenms.runtime.placement import Placement

Placed = tuple[np.ndarray, Placement]
"""The input ``[height, width, 3]`` uint8 made of an image (RGB; of a model with frames, in their order), and where the image lies in it."""


@dataclass(frozen=True)
class Results:
    """What a model gives.

    Attributes:
        source: name of the file, for messages.
        names: names of the first four outputs.
        outputs: every output and its name.
        rows: number of rows of an image.
        class_names: names of all classes.
    """

    source: str
    names: tuple[str, ...]
    outputs: tuple[tuple[str, Output], ...]
    rows: int
    class_names: tuple[str, ...]

    @classmethod
    def of(cls, fused: FusedModel, source: str) -> Results:
        """Those of a fused model."""
        config = fused.config
        outputs = fused.layout.outputs(config)
        return cls(source, config.output_names, outputs, config.max_detections, fused.class_names)

    def check(self, outputs: dict[str, np.ndarray], batch: int) -> None:
        """Refuse outputs that violate the contract. The graph may have been changed after it was written.

        Raises:
            RunError: an output has another shape or type, or invalid values.
        """
        for name, output in self.outputs:
            value = outputs.get(name)
            sides = value.shape[2:] if isinstance(value, np.ndarray) and value.ndim == 4 and "h" in output.shape else ()
            expected = output.shape_for(batch, self.rows, *sides)
            if not isinstance(value, np.ndarray) or value.shape != expected or value.dtype != output.dtype:
                found = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else "nothing"
                raise RunError(
                    f"{self.source}: gives {name} {found}; expected {output.dtype}{list(expected)}. Fuse the model again"
                )
        counts, boxes, scores, _ = (outputs[name] for name in self.names)
        if counts.min() < 0 or counts.max() > self.rows:
            raise RunError(
                f"{self.source}: gives {counts.ravel().tolist()[:8]} detections; expected 0 to {self.rows}. Fuse the model again"
            )
        used = np.arange(self.rows) < counts
        if not (np.isfinite(boxes).all(2) & np.isfinite(scores))[used].all():
            raise RunError(
                f"{self.source}: gives boxes or scores that are not finite; the weights or the file are damaged"
            )

    def found(
        self, outputs: dict[str, np.ndarray], count: int, placed: Placed, converged: bool, call: Call
    ) -> Detections:
        """The detections in one image that a call asks for, from its outputs."""
        canvas, place = placed
        rows = call.choose(*(outputs[name][:count] for name in self.names[2:]))
        boxes, scores, labels = (outputs[name][rows] for name in self.names[1:])
        turned = boxes.shape[1] == 5
        if turned:
            oriented = place.oriented_to_image(boxes)
            boxes = upright_around(oriented_to_corners(oriented))
        else:
            boxes = place.to_image(boxes)
            sides = boxes[:, 2:] - boxes[:, :2]
            oriented = np.concatenate(((boxes[:, :2] + boxes[:, 2:]) / 2, sides, np.zeros_like(boxes[:, :1])), 1)
        points = outputs[contract.KEYPOINTS][rows] if contract.KEYPOINTS in outputs else np.zeros((len(rows), 0, 2))
        return Detections(
            boxes=boxes,
            scores=scores,
            labels=labels,
            class_names=self.class_names,
            oriented_boxes=oriented,
            keypoints=place.points_to_image(points),
            masks=Masks(_mask_logits(outputs, rows), boxes, place, canvas.shape[:2]),
            indices=outputs[contract.INDICES][rows]
            if contract.INDICES in outputs
            else np.full(len(rows), -1, np.int32),
            oriented=turned,
            converged=converged,
        )


def _mask_logits(outputs: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Mask logits ``[n, h, w]`` float32 of some rows, above 0 inside the masks. n is 0 if the model has no masks."""
    if contract.MASKS in outputs:
        return outputs[contract.MASKS][rows] - np.float32(0.5)
    if contract.PROTOTYPES not in outputs:
        return np.zeros((0, 1, 1), np.float32)
    return logits_of(outputs[contract.MASK_COEFFICIENTS][rows], outputs[contract.PROTOTYPES])
