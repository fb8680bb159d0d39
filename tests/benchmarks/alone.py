"""Time one file in a process of its own, as a user runs it: ONNX Runtime's default settings.

    python tests/benchmarks/alone.py MODEL.onnx INPUTS.npz THREADS RUNS

Prints the median in ms. `alone` starts it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime


def alone(model: Path, inputs: dict[str, np.ndarray], folder: Path, threads: int, runs: int) -> float:
    """Median ms of a file in a process of its own."""
    np.savez(folder / "inputs.npz", **inputs)
    words = [sys.executable, __file__, str(model), str(folder / "inputs.npz"), str(threads), str(runs)]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    model, inputs, threads, runs = sys.argv[1:]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    given = dict(np.load(inputs))
    for _ in range(3):
        session.run(None, given)
    times = []
    for _ in range(int(runs)):
        start = time.perf_counter()
        session.run(None, given)
        times.append(time.perf_counter() - start)
    print(1e3 * statistics.median(times))


if __name__ == "__main__":
    main()
