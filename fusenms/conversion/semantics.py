"""`Semantics`: what the suppression of a third-party file does, as its attributes and constants say."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fusenms.config import MAX_CANDIDATES_LIMIT, PostprocessConfig
from fusenms.contract import ONE_TENSOR, OUTPUT_PRESETS


@dataclass(frozen=True, kw_only=True)
class Semantics:
    """What a third-party suppression does.

    Attributes:
        operator: the operator that suppresses.
        score_threshold: keep candidates with a score above this.
        iou_threshold: suppress candidates whose IoU with a better one is above this.
        max_detections: rows per image; None: no limit but that of each class.
        multi_label: whether every class of a box is a candidate, not only the best.
        class_agnostic: whether boxes of different classes suppress each other.
        inclusive: whether a score or IoU equal to its threshold counts as above.
        others: what else it does, a line each. fusenms does none of this.
        outputs: names of the file's counts, boxes, scores and classes, if these mean what those of a fused file mean; else empty.
    """

    operator: str
    score_threshold: float
    iou_threshold: float
    max_detections: int | None
    multi_label: bool
    class_agnostic: bool
    inclusive: bool = False
    others: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    @property
    def output_preset(self) -> str | None:
        """The preset that gives the names of the file; None if there is none."""
        return next(
            (preset for preset, names in OUTPUT_PRESETS.items() if names == self.outputs and preset != ONE_TENSOR), None
        )

    @property
    def summary(self) -> str:
        """One line."""
        sign = ">=" if self.inclusive else ">"
        rows = "any number of rows" if self.max_detections is None else f"at most {self.max_detections} rows"
        candidates = "every class of a box" if self.multi_label else "the best class of a box"
        across = "across classes" if self.class_agnostic else "within a class"
        return (
            f"{self.operator} · score {sign} {self.score_threshold:g} · IoU {sign} {self.iou_threshold:g} suppressed {across} · {rows} · "
            f"{candidates}"
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of `PostprocessConfig` that say the same, as far as they can."""
        rows = MAX_CANDIDATES_LIMIT if self.max_detections is None else self.max_detections
        return {
            "score_threshold": _within(self.score_threshold),
            "iou_threshold": _within(self.iou_threshold),
            "max_detections": min(max(rows, 1), MAX_CANDIDATES_LIMIT),
            "multi_label": self.multi_label,
            "class_agnostic": self.class_agnostic,
            **({"output_preset": self.output_preset} if self.output_preset else {}),
        }

    @property
    def config(self) -> PostprocessConfig:
        """These as settings."""
        return PostprocessConfig(**self.settings)

    @property
    def lost(self) -> tuple[str, ...]:
        """What no settings of fusenms say, a line each."""
        lines = [*self.others]
        if self.inclusive:
            lines.insert(0, "a score or IoU that equals its threshold exactly: fusenms compares strictly")
        if self.outputs and self.output_preset is None:
            lines.append(f"the output names {', '.join(self.outputs)}: no output preset has them")
        if self.max_detections is None:
            lines.append(f"any number of rows: at most {MAX_CANDIDATES_LIMIT}")
        return tuple(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def _within(threshold: float) -> float:
    """A threshold from 0 to 1, in the digits of a float32."""
    return float(f"{min(max(threshold, 0.0), 1.0):.7g}")
