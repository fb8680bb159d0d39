"""`detect --ray` on one node of one core, and on two: throughput, interleaved.

    python tests/benchmarks/ray_data.py FUSED.onnx FOLDER [--images 400] [--rounds 3]

Both are clusters on this machine: nodes of one CPU, one actor with one thread each. The images of the folder are repeated under other
names. A round measures a bare `Detector` of one thread in a process of its own, one actor, and two actors; medians of the rounds are
compared. ``steady`` leaves out the start of the actors: it counts the last three quarters of the images.

On a machine that does other work too, actors do not get a core each. ``cores`` is what they got, in processor time, while it was steady,
and ``for each core`` the images per second of processor time: what two nodes lose to each other and to Ray, but for the time in which an
actor has nothing to do.
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

import fusenms
from fusenms.runtime.images import list_images

BARE = """
import sys, time, fusenms
from pathlib import Path
paths = sorted(Path(sys.argv[2]).iterdir())
with fusenms.Detector(sys.argv[1], threads=1) as detect:
    list(detect.stream(paths[:8]))
    start = time.perf_counter()
    assert len(list(detect.stream(paths, readers=1))) == len(paths)
    print(len(paths) / (time.perf_counter() - start))
"""


def repeated(folder: Path, count: int, target: Path) -> Path:
    """A folder with links to the images of another, over and over."""
    images = list_images(folder)
    target.mkdir()
    for number in range(count):
        source = images[number % len(images)]
        (target / f"{number:06}{source.suffix}").symlink_to(source.resolve())
    return target


class Processors:
    """Processor time of actors, those that have ended too."""

    def __init__(self) -> None:
        self._ticks: dict[str, int] = {}

    def seconds(self) -> float:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if (process / "cmdline").read_bytes().startswith(b"ray::MapWorker"):
                    words = (process / "stat").read_text().rpartition(")")[2].split()
                    self._ticks[process.name] = int(words[11]) + int(words[12])
            except OSError:  # it has ended
                continue
        return sum(self._ticks.values()) / os.sysconf("SC_CLK_TCK")


def rates(model: Path, images: Path, output: Path, actors: int) -> dict[str, float]:
    """Images per second of one job, and the cores that it got."""
    seen: list[tuple[float, int, float]] = []
    processors = Processors()
    done = fusenms.detect_dataset(
        model, images, output, actors=actors, progress=lambda count, _: seen.append((time.perf_counter(), count, processors.seconds()))
    )  # fmt: skip
    assert done.failed == 0 and done.actors == done.nodes == actors, done
    (last, every, after), quarter = seen[-1], seen[-1][1] / 4
    first, some, before = next(each for each in seen if each[1] >= quarter)
    return {
        "whole": done.images_per_second,
        "steady": (every - some) / (last - first),
        "cores": (after - before) / (last - first),
        "for each core": (every - some) / (after - before),
        "ready": done.ready_seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    found: dict[str, list[float]] = {}
    try:
        with tempfile.TemporaryDirectory() as name:
            images = repeated(args.folder, args.images, Path(name) / "images")
            for number in range(args.rounds):
                command = [sys.executable, "-c", BARE, str(args.model), str(images)]
                bare = subprocess.run(command, check=True, capture_output=True, text=True)
                values = {"bare": float(bare.stdout)}
                for actors in (1, 2):
                    of_job = rates(args.model, images, Path(name) / f"{number}-{actors}.parquet", actors)
                    values |= {f"{kind}, {actors}": value for kind, value in of_job.items()}
                for key, value in values.items():
                    found.setdefault(key, []).append(value)
                print(" ".join(f"{key}: {value:.2f}" for key, value in values.items()), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()
    medians = {key: statistics.median(values) for key, values in found.items()}
    print(f"medians of {args.rounds}, {args.images} images: " + ", ".join(f"{k} {v:.2f}" for k, v in medians.items()))
    for kind in ("steady", "whole", "for each core"):
        share = 1 if kind == "for each core" else 2
        one, two = medians[f"{kind}, 1"], medians[f"{kind}, 2"]
        pairs = [b / (share * a) for a, b in zip(found[f"{kind}, 1"], found[f"{kind}, 2"], strict=True)]
        what = f"{'twice ' * (share - 1)}one node (rounds {min(pairs):.3f} to {max(pairs):.3f})"
        print(f"{kind}: two nodes give {two / (share * one):.3f} of {what}")
    print(f"one actor gives {medians['steady, 1'] / medians['bare']:.3f} of a bare Detector with one thread")
    return 0


if __name__ == "__main__":
    sys.exit(main())
