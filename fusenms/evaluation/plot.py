"""Precision over recall as a figure."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from fusenms.evaluation.result import Evaluation
from fusenms.safety.files import write_atomically
from fusenms.safety.text import printable

LINES = (("IoU 0.5", "#2a9d5c"), ("IoU 0.75", "#3d6fb4"), ("IoU 0.5 to 0.95", "#d1495b"))


def plot(found: Evaluation, path: Path) -> None:
    """Draw the mean curves of boxes, masks and keypoints, and in gray the curve of each class at IoU 0.5, as .png, .svg or .pdf.

    Raises:
        SourceError: the path cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(found.scores), 4.6), layout="constrained")
    for axes, (kind, scores) in zip(
        figure.subplots(1, len(found.scores), squeeze=False)[0], found.scores.items(), strict=True
    ):
        recalls = np.linspace(0, 1, scores.curves.shape[1])
        for curve in scores.class_curves:
            axes.plot(recalls, curve, color="#8a94a6", linewidth=0.6, alpha=0.35)
        means = (scores.map50, scores.map75, scores.map50_95)
        for curve, mean, (name, color) in zip(scores.curves, means, LINES, strict=True):
            axes.plot(recalls, curve, color=color, linewidth=2, label=f"{name}: {mean:.3f}")
        axes.set(
            xlabel="recall", ylabel="precision", title=f"{kind}, {found.images} images", xlim=(0, 1), ylim=(0, 1.02)
        )
        axes.legend(title="mAP", loc="lower left")
        axes.spines[["top", "right"]].set_visible(False)
    name = printable(Path(found.file).name).replace("$", r"\$")  # matplotlib parses text between dollars as a formula
    figure.suptitle(name)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130, format=path.suffix[1:])
    write_atomically(path, drawn.getvalue())
