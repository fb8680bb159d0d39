"""`Report`: what a verification compared, and what differed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Check:
    """Result for one image of one run: its position, what was compared, and what differed (empty: nothing).

    ``setting`` says what the optional inputs were fed; empty: nothing, or the model has none.
    ``frame`` is the size of the frames, of a model that takes them; ``worst_iou`` is then the least IoU of a row with its own on
    letterboxed images. ``converged`` is False if the model reports that its rounds were too few; then nothing is compared.
    """

    batch: int
    image: int
    case: str
    detections: int = 0
    close_calls: int = 0
    worst_box: float = 0.0
    worst_score: float = 0.0
    problems: tuple[str, ...] = ()
    converged: bool = True
    setting: str = ""
    frame: tuple[int, int] | None = None
    worst_iou: float = 1.0


@dataclass(frozen=True)
class Report:
    """Every comparison of a verification. It is true if nothing differed, and prints as text.

    ``unshown`` names the optional inputs that changed nothing in any run, so that nothing was proven of them.
    """

    checks: tuple[Check, ...]
    batches: tuple[int, ...]
    unshown: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.checks) and self.mismatches == 0

    @property
    def detections(self) -> int:
        return sum(check.detections for check in self.checks)

    @property
    def mismatches(self) -> int:
        return sum(len(check.problems) for check in self.checks)

    @property
    def close_calls(self) -> int:
        return sum(check.close_calls for check in self.checks)

    @property
    def settings(self) -> int:
        """Number of different values that the optional inputs of the model were fed."""
        return len({check.setting for check in self.checks} - {""})

    @property
    def unconverged(self) -> int:
        """Number of images for which the model reports too few rounds. They were not compared."""
        return sum(not check.converged for check in self.checks)

    @property
    def worst_box(self) -> float:
        """Largest difference in a coordinate of a matched box, in pixels."""
        return max((check.worst_box for check in self.checks), default=0.0)

    @property
    def worst_score(self) -> float:
        return max((check.worst_score for check in self.checks), default=0.0)

    @property
    def frames(self) -> int:
        """Number of sizes of frames that were run; 0 if the model takes images."""
        return len({check.frame for check in self.checks} - {None})

    @property
    def worst_iou(self) -> float:
        """Least IoU of a row of a frame with its own on letterboxed images."""
        return min((check.worst_iou for check in self.checks), default=1.0)

    @property
    def summary(self) -> str:
        """One line: what was run, and the verdict."""
        close = f" · {counted(self.close_calls, 'close call')}" if self.close_calls else ""
        if self.unconverged:
            close += f" · {counted(self.unconverged, 'image')} did not converge, as the model says (more rounds help)"
        if self.settings:
            close += f" · thresholds fed {self.settings} ways"
        if self.frames:
            rows = sum(check.detections for check in self.checks if check.frame is not None)
            close += (
                f" · frames of {counted(self.frames, 'size')}, {counted(rows, 'row')}, worst IoU {self.worst_iou:.4f}"
            )
        if self.unshown:
            close += f" · {', '.join(self.unshown)} changed nothing"
        sizes = ", ".join(map(str, self.batches))
        wrong = counted(self.mismatches, "mismatch", "mismatches")
        return (
            f"batch {sizes} · {len(self.checks)} images · {self.detections} detections · {wrong} · "
            f"worst box error {self.worst_box:.2g} px{close}"
        )

    def __str__(self) -> str:
        lines = [self.summary]
        for check in self.checks:
            lines += [
                f"  batch {check.batch}, image {check.image} ({', '.join(filter(None, (check.case, check.setting)))}): {problem}"
                for problem in check.problems
            ]
        return "\n".join(lines if len(lines) <= 41 else [*lines[:41], f"  … and {len(lines) - 41} more"])

    def to_dict(self) -> dict[str, object]:
        """Plain values, for ``--json``."""
        problems = [
            {"batch": c.batch, "image": c.image, "case": c.case, "setting": c.setting, "problem": p}
            for c in self.checks
            for p in c.problems
        ]
        return {
            "equal": bool(self),
            "batches": list(self.batches),
            "images": len(self.checks),
            "detections": self.detections,
            "mismatches": self.mismatches,
            "close_calls": self.close_calls,
            "settings": self.settings,
            "frames": self.frames,
            "worst_iou": self.worst_iou,
            "unshown": list(self.unshown),
            "unconverged": self.unconverged,
            "worst_box_px": self.worst_box,
            "worst_score": self.worst_score,
            "problems": problems,
        }


def counted(count: int, one: str, many: str | None = None) -> str:
    """Format a number with the noun that it counts."""
    return f"{count} {one if count == 1 else many or one + 's'}"
