"""Soak: one `Detector`, called again and again from several threads. Each answer equals a stored one, memory and descriptors stay.

make soak [ARGS="--calls 200000"]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SIZES = [(64, 64), (480, 640), (37, 91), (1, 1), (200, 50), (641, 333), (720, 1280), (3, 500)]


def resident() -> int:
    """Memory of its own that this process holds, in bytes. Pages of files do not count: the system takes them back when it likes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * sum(int(lines[key].split()[0]) for key in ("RssAnon", "VmSwap"))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def digest(found: list) -> bytes:
    """Of every array of the answers, bit for bit."""
    answer = hashlib.blake2b()
    for one in found:
        for array in (one.boxes, one.scores, one.labels, one.oriented_boxes, one.keypoints, one.indices):
            answer.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return answer.digest()


def main() -> int:
    """Run the soak; 0 where all answers are equal, memory is flat within 2 % after the warm-up, and no descriptor is left open."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument(
        "--growth", type=float, default=0.02, help="of memory, after the warm-up, either way (default: %(default)s)"
    )
    args = parser.parse_args()

    import cv2

    from fusenms import Detector, fuse

    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        fused = fuse(ROOT / "models" / "shapes" / "shapes.pt", size=64, score_threshold=0.05)
        path = fused.save(Path(folder) / "shapes.ort.onnx")
        shapes = cv2.imread(str(ROOT / "models" / "shapes" / "shapes0.jpg"))[..., ::-1]
        images = [np.ascontiguousarray(cv2.resize(shapes, size[::-1])) for size in SIZES]
        file = Path(folder) / "a.png"
        cv2.imwrite(str(file), images[1])
        inputs: list[list] = [[image] for image in images] + [[file], images[:3], images[2:5]]
        with Detector(path, threads=1) as detect:
            expected = [digest(detect(given)) for given in inputs]
            rows = sum(len(one) for given in inputs for one in detect(given))
            assert rows, "nothing is found in any image"
            return soak(detect, inputs, expected, args)


def soak(detect, inputs: list[list], expected: list[bytes], args: argparse.Namespace) -> int:
    done, wrong, lock = Counter(), Counter(), threading.Lock()
    warm = max(args.calls // 20, args.threads)

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        while True:
            with lock:
                if done["calls"] >= args.calls:
                    return
                done["calls"] += 1
            which = int(rng.integers(len(inputs)))
            try:
                if digest(detect(inputs[which])) != expected[which]:
                    wrong["different answers"] += 1
            except Exception as error:
                wrong[f"{type(error).__name__}: {error}"] += 1

    start, samples = time.monotonic(), []
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(args.threads)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(min(2.0, args.calls / 20_000))
        samples.append((done["calls"], resident(), descriptors()))
    after = [sample for sample in samples if sample[0] >= warm] or samples[-1:]
    third = max(1, len(after) // 3)
    first, last = (float(np.median([memory for _, memory, _ in part])) for part in (after[:third], after[-third:]))
    growth = last / first - 1
    most, least = max(fds for *_, fds in after), min(fds for *_, fds in after)
    print(
        f"{done['calls']} calls from {args.threads} threads in {time.monotonic() - start:.0f} s · {sum(wrong.values())} wrong · "
        f"memory {first / 1e6:.1f} MB, {last / 1e6:.1f} MB at the end ({growth:+.2%}), most {max(m for _, m, _ in after) / 1e6:.1f} MB · "
        f"descriptors {least} to {most}, {after[-1][2]} at the end"
    )
    for what, count in wrong.most_common(5):
        print(f"    {count} x {what}")
    leaked = after[-1][2] > after[0][2] + args.threads
    return int(bool(wrong) or abs(growth) > args.growth or leaked)


if __name__ == "__main__":
    sys.exit(main())
