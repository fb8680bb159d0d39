"""What one node does, measured, and what it implies for many: writes docs/figures/scaling.svg and docs/scaling.json.

    python tests/benchmarks/scaling.py FUSED.onnx FOLDER

Measured, in processes with one thread for the model: seconds of processor time for each image and stage, by batch; the same from image
file to detections; memory of a replica; bytes of images and answers. Processor time is that of a core of this machine, also while others
use it; a whole node is slower than its cores alone, by what they share (the last level cache, memory, clock), which is not in here.

Computed: a queue in front of replicas of one core each. Images arrive at random (Poisson), wait in one queue, and the next free replica
takes one. Service times are drawn from the measured ones.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import fusenms
from fusenms.runtime.images import list_images, read_image
from fusenms.runtime.placement import letterbox, to_tensor

DOCS = Path(__file__).resolve().parents[2] / "docs"
BATCHES = (1, 2, 4, 8, 16)
REPLICAS = (1, 2, 4, 8, 16, 64, 256)
SHOWN = (1, 4, 16, 64, 256)
LOADS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95)
RATES = (10, 1_000, 100_000)
WITHIN = 3.0
"""p99 of the latency that the table plans for, in mean service times."""
ARRIVALS = 200_000
MEMORY = """
import sys, fusenms
def held():
    fields = dict(line.split(":")[:2] for line in open("/proc/self/status") if line.startswith(("VmRSS", "RssAnon")))
    return {name: int(value.split()[0]) / 1024 for name, value in fields.items()}
before = held()
with fusenms.Detector(sys.argv[1], threads=1, batch_size=8) as detect:
    for count in (1, 8, 8, 8):
        detect(sys.argv[2:2 + count])
    after = held()
import json; print(json.dumps({"before": before, "after": after}))
"""


def processor_seconds(work: Any, rounds: int) -> list[float]:
    """Processor time of each call, after one more."""
    work()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return times


def measured(model: Path, paths: list[Path], rounds: int) -> dict[str, Any]:
    """Everything that is measured on this machine."""
    fused = fusenms.load_fused(model)
    size = fused.image.height, fused.image.width
    arrays = [read_image(path) for path in paths]
    stages = {
        "read and decode": [s for p in paths for s in processor_seconds(lambda p=p: read_image(p), 3)],
        "letterbox": [s for a in arrays for s in processor_seconds(lambda a=a: to_tensor([letterbox(a, *size)[0]]), 3)],
    }
    found: dict[str, Any] = {
        "machine": processor_name(), "python": platform.python_version(), "model": model.name, "size": list(size), "images": len(paths),
        "image_bytes": statistics.mean(path.stat().st_size for path in paths),
        "pixels": statistics.mean(array.shape[0] * array.shape[1] for array in arrays),
        "stages_ms": {name: 1000 * statistics.mean(values) for name, values in stages.items()},
    }  # fmt: skip
    with fusenms.Detector(model, threads=1, batch_size=max(BATCHES)) as detect:
        services = [s for _ in range(rounds) for p in paths for s in processor_seconds(lambda p=p: detect(p), 1)]
        batches = {}
        for count in BATCHES:
            some = (arrays * -(-count // len(arrays)))[:count]
            batches[count] = 1000 * statistics.median(processor_seconds(lambda some=some: detect(some), rounds))
        answers = [json.dumps(found.to_dicts()) for found in detect(paths)]
    found |= {
        "service_ms": [1000 * each for each in services],
        "service_mean_ms": 1000 * statistics.mean(services),
        "batch_ms": batches,
        "answer_bytes": statistics.mean(map(len, answers)),
    }
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(model), *map(str, (paths * 8)[:8])],
        capture_output=True,
        text=True,
        check=True,
    )
    return found | {"memory_mb": json.loads(done.stdout)}


def processor_name() -> str:
    """The model of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def latencies(services: np.ndarray, replicas: int, load: float, rng: np.random.Generator) -> np.ndarray:
    """Seconds from the arrival of each image until it is done, after a start that is left out.

    Args:
        services: measured service times, in seconds.
        replicas: number of servers.
        load: arrivals times service time, by server.
    """
    count = max(ARRIVALS, 400 * replicas)
    times = rng.choice(services, count)
    arrivals = np.cumsum(rng.exponential(services.mean() / (replicas * load), count))
    free = [0.0] * replicas
    done = np.empty(count)
    for i, (arrival, service) in enumerate(zip(arrivals.tolist(), times.tolist(), strict=True)):
        end = max(arrival, free[0]) + service
        heapq.heapreplace(free, end)
        done[i] = end - arrival
    return done[count // 5 :]


def queueing(services: np.ndarray) -> dict[int, dict[float, dict[str, float]]]:
    """p50 and p99 of the latency in milliseconds, by replicas and load."""
    rng, found = np.random.default_rng(0), {}
    for replicas in REPLICAS:
        found[replicas] = {}
        for load in LOADS:
            p50, p99 = np.percentile(1000 * latencies(services, replicas, load, rng), (50, 99))
            found[replicas][load] = {"p50": float(p50), "p99": float(p99)}
    return found


def highest_load(curves: dict[int, dict[float, dict[str, float]]], replicas: float, most_ms: float) -> float:
    """The highest simulated load at which p99 is at most that, of the largest simulated pool that is not larger than this one."""
    size = max((each for each in curves if each <= replicas), default=min(curves))
    return max((load for load, values in curves[size].items() if values["p99"] <= most_ms), default=0.0)


def plans(values: dict[str, Any], curves: dict[int, dict[float, dict[str, float]]]) -> list[dict[str, float]]:
    """What each rate needs."""
    seconds, rows = values["service_mean_ms"] / 1000, []
    most_ms = WITHIN * values["service_mean_ms"]
    shared = values["memory_mb"]["after"]["VmRSS"]
    for rate in RATES:
        busy = rate * seconds
        replicas = next(
            count for count in range(1, 10**7) if count >= busy and busy / count <= highest_load(curves, count, most_ms)
        )
        rows.append(
            {
                "rate": rate, "busy_cores": busy, "replicas": replicas, "load": busy / replicas, "memory_gb": replicas * shared / 1024,
                "network_in_mb_s": rate * values["image_bytes"] / 1e6, "network_out_mb_s": rate * values["answer_bytes"] / 1e6,
                "decode_cores": rate * values["stages_ms"]["read and decode"] / 1000,
            }
        )  # fmt: skip
    return rows


STYLE = """
    .card { fill: #ffffff; stroke: #d0d7de; }
    .grid { stroke: #e1e4e8; stroke-width: 1; }
    .c0 { stroke: #1d4ed8; } .c1 { stroke: #15803d; } .c2 { stroke: #b45309; } .c3 { stroke: #7e22ce; } .c4 { stroke: #be123c; }
    .curve { fill: none; stroke-width: 2; }
    text { fill: #1f2328; font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
    .small { font-size: 12px; }
    .mid { text-anchor: middle; }
    .end { text-anchor: end; }
    @media (prefers-color-scheme: dark) {
      .card { fill: #161b22; stroke: #30363d; }
      .grid { stroke: #30363d; }
      .c0 { stroke: #60a5fa; } .c1 { stroke: #4ade80; } .c2 { stroke: #fbbf24; } .c3 { stroke: #c084fc; } .c4 { stroke: #fb7185; }
      text { fill: #e6edf3; }
    }
"""


def figure(values: dict[str, Any], curves: dict[int, dict[float, dict[str, float]]]) -> str:
    """Two charts: milliseconds an image by batch, and p99 by load."""
    mean, most = values["service_mean_ms"], 8.0
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 330" width="900" height="330" role="img">',
        "  <title>Cost of an image by batch, and p99 of the latency by load</title>",
        f"  <style>{STYLE}  </style>",
        '  <rect class="card" x="0.5" y="0.5" width="899" height="329" rx="8"/>',
        '  <text x="24" y="30">A batch takes its time, ms (measured)</text>',
        '  <text x="400" y="30">p99 of the latency, in mean service times (simulated)</text>',
    ]
    top, bottom = 54.0, 280.0
    highest = max(values["batch_ms"].values())
    step = 10 ** math.floor(math.log10(highest)) / (2 if highest / 10 ** math.floor(math.log10(highest)) < 3 else 1)
    points = []
    for tick in np.arange(0, highest * 1.05 + step, step):
        y = bottom - (bottom - top) * tick / (highest * 1.05 + step)
        parts.append(
            f'  <path class="grid" d="M72 {y:.1f}H340"/><text class="small end" x="64" y="{y + 4:.1f}">{tick:.0f}</text>'
        )
    for batch, each in values["batch_ms"].items():
        x, y = 72 + 250 * int(batch) / max(BATCHES), bottom - (bottom - top) * each / (highest * 1.05 + step)
        points.append(f"{x:.1f} {y:.1f}")
        parts.append(f'  <text class="small mid" x="{x:.1f}" y="298">{batch}</text>')
    parts.append(
        f'  <path class="curve c0" d="M{" L".join(points)}"/><text class="small mid" x="205" y="318">images in a batch</text>'
    )
    for tick in range(1, int(most) + 1):
        y = bottom - (bottom - top) * tick / most
        parts.append(
            f'  <path class="grid" d="M430 {y:.1f}H780"/><text class="small end" x="422" y="{y + 4:.1f}">{tick}</text>'
        )
    for load in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        parts.append(f'  <text class="small mid" x="{_x(load):.1f}" y="298">{load:.0%}</text>')
    parts.append('  <text class="small mid" x="605" y="318">share of time that a core is busy</text>')
    for number, replicas in enumerate(SHOWN):
        by_load = curves[replicas]
        shown = [(load, each["p99"] / mean) for load, each in by_load.items() if each["p99"] / mean <= most]
        line = " L".join(f"{_x(load):.1f} {bottom - (bottom - top) * value / most:.1f}" for load, value in shown)
        y = 70 + 22 * number
        parts.append(f'  <path class="curve c{number}" d="M{line}"/>')
        label = f"{replicas} core{'' if replicas == 1 else 's'}"
        parts.append(
            f'  <path class="curve c{number}" d="M796 {y - 4}h20"/><text class="small" x="822" y="{y}">{label}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def _x(load: float) -> float:
    return 430 + 350 * (load - 0.3) / 0.65


def table(rows: list[dict[str, float]]) -> str:
    """The plans, as Markdown."""
    lines = [
        "| images/s | cores that are busy | replicas of one core | of these busy | memory | images in | answers out | decoding alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['rate']:,} | {row['busy_cores']:,.1f} | {row['replicas']:,} | {row['load']:.0%} | {row['memory_gb']:,.1f} GB | "
            f"{row['network_in_mb_s']:,.1f} MB/s | {row['network_out_mb_s']:,.2f} MB/s | {row['decode_cores']:,.1f} cores |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    import cv2

    cv2.setNumThreads(1)
    values = measured(args.model, list(list_images(args.folder)), args.rounds)
    curves = queueing(np.array(values.pop("service_ms")) / 1000)
    rows = plans(values, curves)
    written = {"measured": values, "simulated": curves, "plans": rows}
    (DOCS / "scaling.json").write_text(json.dumps(written, indent=1) + "\n")
    (DOCS / "figures" / "scaling.svg").write_text(figure(values, curves))
    print(json.dumps(values, indent=1))
    print(table(rows))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
