"""`RawDetector`: the raw model, with the reference (`fusenms.reference`) as its post-processing. Slow, and nothing of it is fused."""

from __future__ import annotations

import numpy as np

from fusenms import reference
from fusenms.artifacts.fused import FusedModel
from fusenms.artifacts.raw import RawModel
from fusenms.errors import ConfigError
from fusenms.heads import Probe, raw_head, recognize
from fusenms.layout import Layout
from fusenms.runtime import Detections
from fusenms.runtime.masks import Masks, logits_of
from fusenms.runtime.placement import letterbox, stretched, to_tensor


class RawDetector:
    """A raw model and the reference, with the settings of a fused model."""

    def __init__(self, raw: RawModel, layout: Layout | None, fused: FusedModel) -> None:
        """Open the raw model.

        Args:
            layout: of its head; None: it is recognized.

        Raises:
            ConfigError: it takes images of another size than the fused model, or has another number of classes.
            HeadError: its head is not recognized.
            SourceError: it does not run.
        """
        self._layout = recognize(raw) if layout is None else layout
        head = raw_head(raw, self._layout)
        own, other = (raw.image.height, raw.image.width), (fused.image.height, fused.image.width)
        if own != other or self._layout.num_classes != fused.layout.num_classes:
            raise ConfigError(
                f"{raw.source}: takes {own[0]}x{own[1]} images and has {self._layout.num_classes} classes, but the fused model takes "
                f"{other[0]}x{other[1]} and has {fused.layout.num_classes}; expected the weights that it was made of"
            )
        self._size, self._pixels, self._probe = own, head.pixels, Probe(raw)
        self._fit = stretched if head.stretch else letterbox
        self._config, self._class_names = fused.config, fused.class_names

    def __call__(self, image: np.ndarray) -> Detections:
        """Detect objects in an image ``[height, width, 3]`` uint8 RGB.

        Raises:
            SourceError: the model does not run.
        """
        layout, size = self._layout, self._size
        canvas, place = self._fit(image, *size)
        (head,) = self._probe.heads_on([self._pixels.apply(to_tensor([canvas]))], layout)
        expected = reference.postprocess(reference.candidates(head, 0, layout, size), self._config)
        rows, numbers = expected.rows, expected.indices
        boxes = place.to_image(rows.boxes)
        logits = np.zeros((0, 1, 1), np.float32)
        if layout.masks is not None:
            coefficients = reference.mask_coefficients(head, 0, layout, numbers)
            logits = logits_of(coefficients, head[layout.masks.prototypes][0]).astype(np.float32)
        points = np.zeros((len(rows), 0, 2))
        if layout.keypoints is not None:
            points = reference.keypoints(head, 0, layout, size, numbers)
        return Detections(
            boxes=boxes,
            scores=rows.scores.astype(np.float32),
            labels=rows.labels.astype(np.int32),
            class_names=self._class_names,
            keypoints=place.points_to_image(points),
            masks=Masks(logits, boxes, place, size),
            indices=numbers.astype(np.int32),
        )
