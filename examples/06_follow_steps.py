"""Events of fuse, for a progress bar or a log."""

import sys
from pathlib import Path

import fusenms
from fusenms.events import Event, Progress

SHAPES = Path(__file__).resolve().parents[1] / "models" / "shapes" / "shapes.pt"


def show(event: Event) -> None:
    """Print each step when it is done, and the progress of the verification."""
    if isinstance(event, Progress):
        print(f"  {event.what}: {event.done} of {event.total}")
    else:
        print(f"{type(event).__name__}: {event.summary}")


fusenms.fuse(sys.argv[1] if len(sys.argv) > 1 else SHAPES, on_event=show).save("model.ort.onnx")
