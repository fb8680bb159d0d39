"""Time `python -m fusenms WEIGHTS` beside the bare road: import torch, load the checkpoint, `torch.onnx.export`.

    python tests/benchmarks/command.py yolov8n.pt [--runs 5]

Each run is a process of its own; the two take turns. The checkpoint is loaded by fusenms on the bare road too, since nothing else that is
installed here reads it. Printed are medians of wall time and of processor time (user and system, all threads).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BARE = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from pathlib import Path
from fusenms.sources.checkpoint import load_checkpoint
from fusenms.sources.export import network_of
network = network_of(load_checkpoint(Path(sys.argv[1])), sys.argv[1])
with torch.no_grad():
    torch.onnx.export(
        network.module, (torch.zeros(1, 3, *network.size),), sys.argv[2], dynamo=False, opset_version=17, input_names=["images"],
        output_names=list(network.layout.sources), dynamic_axes={"images": {0: "batch"}},
    )
"""


def timed(words: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of a process."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    wall, after = time.perf_counter() - start, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        roads = {
            "bare": ["-c", BARE, str(args.weights), f"{folder}/bare.onnx"],
            "fusenms": ["-m", "fusenms", str(args.weights), "-o", f"{folder}/fused.onnx"],
        }
        for road in roads.values():  # bytecode and the disk's cache
            timed(road)
        times = {name: [] for name in roads}
        for _ in range(args.runs):
            for name, road in roads.items():
                times[name].append(timed(road))
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    for name, (wall, used) in medians.items():
        print(f"{name:8} {wall:6.2f} s wall {used:6.2f} s processor")
    wall, used = (a / b for a, b in zip(medians["fusenms"], medians["bare"], strict=True))
    print(f"ratio    {wall:6.2f}        {used:6.2f}")


if __name__ == "__main__":
    main()
