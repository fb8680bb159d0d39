"""What `Detector` adds to the bare run, and how it compares with a loop written by hand, interleaved in one process.

    python tests/benchmarks/detector.py FUSED.onnx IMAGE.jpg

Each ratio is that of medians: of an array of 810 x 1080 against the bare run of ONNX Runtime, of a JPEG file and of one of 3840 x 2160
against a loop with OpenCV and ONNX Runtime, and of a stream against runs alone. Thread pools do not spin: those of two sessions would
disturb each other.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnxruntime

import fusenms
from fusenms.artifacts.fused import load_fused


def by_hand(session: onnxruntime.InferenceSession, name: str, size: tuple[int, int], path: Path) -> list[np.ndarray]:
    """What a service writes itself: read, letterbox, convert, run, take the boxes back."""
    image = cv2.imread(str(path))
    gain = min(size[0] / image.shape[0], size[1] / image.shape[1])
    width, height = round(image.shape[1] * gain), round(image.shape[0] * gain)
    left, top = (size[1] - width) // 2, (size[0] - height) // 2
    canvas = np.full((*size, 3), 114, np.uint8)
    canvas[top : top + height, left : left + width] = cv2.resize(image, (width, height))
    tensor = np.ascontiguousarray(canvas[..., ::-1].transpose(2, 0, 1)[None]).astype(np.float32) / 255
    count, boxes, scores, labels = session.run(None, {name: tensor})[:4]
    number = int(count[0, 0])
    return [(boxes[0, :number] - [left, top, left, top]) / gain, scores[0, :number], labels[0, :number]]


def interleaved(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each way, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--images", type=int, default=200, help="length of the stream")
    args = parser.parse_args()
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    fused = load_fused(args.model)
    size, name = (fused.image.height, fused.image.width), fused.image.tensor
    session = onnxruntime.InferenceSession(str(args.model), options, providers=["CPUExecutionProvider"])
    detect = fusenms.Detector(args.model, session_options=options)
    image = cv2.imread(str(args.image))
    array = np.ascontiguousarray(cv2.resize(image, (1080, 810))[..., ::-1])
    tensor = np.random.default_rng(0).random((1, 3, *size), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small.jpg", Path(folder) / "large.jpg"
        cv2.imwrite(str(small), cv2.resize(image, (1080, 810)))
        cv2.imwrite(str(large), cv2.resize(image, (3840, 2160)))
        found = interleaved(
            {
                "bare": lambda: session.run(None, {name: tensor}),
                "array": lambda: detect(array),
                "hand small": lambda: by_hand(session, name, size, small),
                "path small": lambda: detect(small),
                "hand large": lambda: by_hand(session, name, size, large),
                "path large": lambda: detect(large),
            },
            args.rounds,
        )
        batch = np.repeat(tensor, 8, 0)
        paths = [small] * args.images
        read = statistics.median(_timed(lambda: cv2.imread(str(small))) for _ in range(10))
        alone, streamed = [], []
        list(detect.stream(paths[:16]))
        for _ in range(3):
            alone.append(_timed(lambda: [session.run(None, {name: batch}) for _ in range(args.images // 8)]))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            streamed.append(_timed(lambda: [None for _ in detect.stream(paths)]))
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for one, other in (("array", "bare"), ("path small", "hand small"), ("path large", "hand large")):
        print(
            f"{one} / {other}: {found[one] / found[other]:.3f} ({1000 * found[one]:.1f} and {1000 * found[other]:.1f} ms)"
        )
    print(
        f"stream, share of the throughput of runs alone: {min(alone) / min(streamed):.3f} ({args.images} images, {1000 * read:.1f} ms to "
        f"read one, peak memory + {(after - before) / 1024:.1f} MB in the last of three)"
    )
    return 0


def _timed(way: Callable[[], object]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
