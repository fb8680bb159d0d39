"""Kills at random moments: no run that is killed leaves a torn file, and the next one removes what it left.

python tests/faults/kills.py [--kills 100] [--writes 100] [--seed 0]; make faults runs this and the other faults.

`--kills` are of whole commands. Since those spend little of their time on writing, `--writes` are of a process that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [
    sys.executable,
    "-m",
    "fusenms",
    str(ROOT / "models" / "shapes" / "shapes.pt"),
    "--size",
    "64",
    "-o",
    "out.onnx",
]
WRITER = """
import itertools, sys
from pathlib import Path
from fusenms.safety.files import write_atomically, write_together
print("ready", flush=True)
for i in itertools.count():
    data = bytes([i % 256]) * 3_000_000
    write_atomically(Path("one"), data)
    write_together({Path("pair.json"): data[:1000], Path("pair"): data})
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def temporaries(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith(".fusenms-"))


def whole(path: Path) -> bool:
    """Whether a fused file is there, whole and readable."""
    from fusenms import FusenmsError
    from fusenms.artifacts.fused import load_fused

    try:
        return bool(load_fused(path).model.graph.node)
    except FusenmsError:
        return False


def run_command(folder: Path, kill_after: float | None = None) -> int:
    """Run the command in a folder; the exit status, negative where it was killed."""
    process = subprocess.Popen(
        COMMAND, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return process.returncode


def kill_commands(kills: int, rng: random.Random) -> list[str]:
    """Kill the command so often, each at a moment of its own; what is wrong, as text."""
    problems, states = [], Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        output = folder / "out.onnx"
        start = time.monotonic()
        if run_command(folder) != 0 or not whole(output):
            return ["the command fails without being killed"]
        length = time.monotonic() - start
        for i in range(kills):
            if i % 3 == 0:  # the other times over an older file, where one was written
                output.unlink(missing_ok=True)
            moment = rng.uniform(0, length) if i % 4 < 2 else rng.uniform(0.8 * length, 1.05 * length)
            before, start = output.exists(), time.monotonic()
            status = run_command(folder, moment)
            if status == 0:  # the machine is faster than it was
                length = min(length, time.monotonic() - start)
            states["killed" if status < 0 else f"exit {status}", "temporary" if temporaries(folder) else "clean"] += 1
            if output.exists() and not whole(output):
                problems.append(f"a torn file, killed after {moment:.3f} s")
            if before and not output.exists():
                problems.append(f"the older file is gone, killed after {moment:.3f} s")
        if run_command(folder) != 0 or os.listdir(folder) != ["out.onnx"]:
            problems.append(f"after the last run the folder has {os.listdir(folder)}")
    print(f"{kills} kills of the command ({length:.1f} s): {dict(states)}, {len(problems)} problems")
    return problems


def kill_writers(kills: int, rng: random.Random) -> list[str]:
    """Kill a process that writes without pause; what is wrong, as text."""
    problems, states = [], Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(kills):
            process = subprocess.Popen(
                [sys.executable, "-c", WRITER], cwd=folder, env=environment(), stdout=subprocess.PIPE
            )
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            states["temporary" if temporaries(folder) else "clean"] += 1
            if len(temporaries(folder)) > 3:
                problems.append("what earlier runs left is still there")
            for path, size in ((folder / "one", 3_000_000), (folder / "pair", 3_000_000), (folder / "pair.json", 1000)):
                if path.exists() and (len(data := path.read_bytes()) != size or data.count(data[0]) != size):
                    problems.append(f"{path.name} is torn")
            if (folder / "pair").exists():
                first, second = ((folder / end).read_bytes()[:1] for end in ("pair", "pair.json"))
                states["a pair of two runs"] += first != second
        code = "from fusenms.safety.files import *; write_atomically(Path('one'), b'x')"
        subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment(), check=True)
        if temporaries(folder):
            problems.append(f"after the last run the folder has {temporaries(folder)}")
    print(f"{kills} kills of a writer: {dict(states)}, {len(problems)} problems")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--writes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    rng = random.Random(args.seed)
    problems = kill_writers(args.writes, rng) + kill_commands(args.kills, rng)
    print("\n".join(problems))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
