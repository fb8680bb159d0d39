"""Fuzz the readers of files: `make fuzz SECONDS=60 TARGET=metadata`, or `python tests/fuzz/run.py -h`.

Where atheris is installed it guides the inputs by the coverage of `fusenms`; elsewhere the corpus is mutated at random. Every target runs
in a process of its own, so that a crash or a hang ends that one alone. A find is written to a file, with the command that repeats it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT)]

LARGEST = 1 << 16  # bytes of one input
SLOWEST = 10.0  # seconds of CPU for one input
RECORD = ROOT / "docs" / "security-fuzzing.json"
TOKENS = (
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b":",
    b",",
    b"null",
    b"NaN",
    b"1e400",
    b"-1",
    b"0",
    b"true",
    b"\x00",
    b"\xff",
    b"[" * 2000,
)


def mutate(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A few random edits: bytes flipped, cut out, doubled, taken from another input; tokens, numbers at the ends."""
    made = bytearray(data)
    for _ in range(1 + int(rng.expovariate(0.5))):
        at = rng.randrange(len(made) + 1)
        stop = min(len(made), at + 1 + int(rng.expovariate(0.1)))
        edit = rng.randrange(6)
        if edit == 0 and made:
            made[at % len(made)] ^= 1 << rng.randrange(8)
        elif edit == 1:
            del made[at:stop]
        elif edit == 2:
            made[at:at] = made[at:stop]
        elif edit == 3:
            made[at:at] = rng.choice(TOKENS)
        elif edit == 4 and others:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            made[at:stop] = other[start : start + 1 + int(rng.expovariate(0.02))]
        else:
            number = rng.choice((0, 1, 127, 255, 65535, 2**31 - 1, 2**32 - 1, 2**63 - 1))
            made[at:stop] = number.to_bytes(8, rng.choice(("little", "big")))[: rng.choice((1, 2, 4, 8))]
    return bytes(made[:LARGEST])


class Search:
    """One target's run: counts, and the finds by what they are."""

    def __init__(self, name: str, finds: Path) -> None:
        from targets import targets

        known = targets()
        if name not in known:
            sys.exit(f"no target {name!r}; there are {', '.join(known)}")
        self.name, self.target, self.finds = name, known[name], finds
        self.runs, self.kinds = 0, set[str]()
        self.started, self.cpu = time.monotonic(), time.process_time()

    def one(self, data: bytes) -> None:
        """Run one input; what it raises is a find, once for each kind and place."""
        self.runs += 1
        start = time.process_time()
        try:
            self.target(data)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            place = error.__traceback__
            while place is not None and place.tb_next is not None:
                place = place.tb_next
            where = (
                f"{Path(place.tb_frame.f_code.co_filename).name}-{place.tb_lineno}" if place is not None else "unknown"
            )
            self.keep(f"{type(error).__name__}-{where}", data, str(error))
        if (took := time.process_time() - start) > SLOWEST:
            self.keep("slow", data, f"took {took:.1f} s of CPU; expected at most {SLOWEST:g}")

    def keep(self, kind: str, data: bytes, message: str) -> None:
        if kind in self.kinds:
            return
        self.kinds.add(kind)
        self.finds.mkdir(parents=True, exist_ok=True)
        path = self.finds / f"{self.name}-{kind}"
        path.write_bytes(data)
        print(
            f"FIND {self.name} {kind}: {message[:200]}\n  python tests/fuzz/run.py --replay {self.name} {path}",
            flush=True,
        )

    def result(self, engine: str) -> dict[str, object]:
        return {
            "target": self.name,
            "engine": engine,
            "runs": self.runs,
            "cpu_seconds": round(time.process_time() - self.cpu, 1),
            "finds": sorted(self.kinds),
        }


def search(name: str, seconds: float, seed: int, finds: Path, *, guided: bool = True) -> dict[str, object]:
    """Run one target for so long, in this process, by atheris where it is installed and ``guided``."""
    if guided and find_spec("atheris") is not None:
        return _guided(name, seconds, seed, finds)
    from targets import corpus

    run, rng = Search(name, finds), random.Random(seed)
    seeds = [path.read_bytes() for path in corpus(name)]
    for data in seeds:
        run.one(data)
    while time.monotonic() - run.started < seconds:
        run.one(mutate(rng.choice(seeds) if seeds else b"", seeds, rng))
    return run.result("random")


def _guided(name: str, seconds: float, seed: int, finds: Path) -> dict[str, object]:
    """By atheris: coverage of fusenms alone. It ends its process, so results go out from within.

    Inputs that reach new code are kept beside the finds, and start the next run.
    """
    import atheris

    with atheris.instrument_imports(include=["fusenms"], enable_loader_override=False):
        run = Search(name, finds)
    folder, grown = HERE / "corpus" / name, finds / f"{name}.grown"
    grown.mkdir(parents=True, exist_ok=True)
    report = finds / f"{name}.result.json"

    def one(data: bytes) -> None:
        run.one(data)
        if time.monotonic() - run.started >= seconds:
            report.write_text(json.dumps(run.result("atheris")))
            sys.stdout.flush()
            os._exit(0)  # libFuzzer's own time limit counts from another start and leaves no word

    flags = [
        f"-max_len={LARGEST}",
        f"-seed={seed}",
        f"-artifact_prefix={finds}/",
        "-timeout=60",
        "-rss_limit_mb=4096",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *flags, str(grown), *([str(folder)] if folder.is_dir() else [])], one)
    atheris.Fuzz()
    raise AssertionError("atheris gave up")


def record(results: list[dict[str, object]], path: Path) -> None:
    """Add what was run to the sums in the file, from which the table in docs/security.md is made."""
    sums = json.loads(path.read_text()) if path.exists() else {}
    for result in results:
        own = sums.setdefault(str(result["target"]), {"runs": 0, "cpu_seconds": 0, "finds": 0})
        own["runs"] += result["runs"]
        own["cpu_seconds"] = round(own["cpu_seconds"] + float(str(result["cpu_seconds"])), 1)
        own["finds"] += len(list(result["finds"]))  # type: ignore[call-overload]
    path.write_text(json.dumps(sums, indent=2, sort_keys=True) + "\n")


def replay(name: str, files: list[str]) -> int:
    """Run files through a target as they are; the first find's traceback ends it."""
    from targets import targets

    for file in files:
        targets()[name](Path(file).read_bytes())
        print(f"{file}: no find")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="which; default: all")
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--random", action="store_true", help="not by atheris, even where it is installed")
    parser.add_argument("--finds", type=Path, default=ROOT / "fuzz-finds", help="folder that finds are written to")
    parser.add_argument("--record", action="store_true", help=f"add the figures to {RECORD.relative_to(ROOT)}")
    parser.add_argument("--list", action="store_true", help="name the targets")
    parser.add_argument("--replay", action="store_true", help="TARGET FILE ...: run these files through the target")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.replay:
        return replay(given.targets[0], given.targets[1:])
    from targets import targets

    if given.list:
        print(*targets(), sep="\n")
        return 0
    given.finds = given.finds.resolve()
    if given.inner:
        result = search(given.targets[0], given.seconds, given.seed, given.finds, guided=not given.random)
        given.finds.mkdir(parents=True, exist_ok=True)
        (given.finds / f"{given.targets[0]}.result.json").write_text(json.dumps(result))
        return 0
    results, failed = [], False
    for name in given.targets or targets():
        result = _outside(name, given)
        results.append(result)
        failed |= bool(result["finds"])
        found = f"{len(list(result['finds']))} finds"  # type: ignore[call-overload]
        print(
            f"{name:12} {result['engine']:8} {result['runs']:>9} runs  {result['cpu_seconds']:>7} s of CPU  {found}",
            flush=True,
        )
    if given.record:
        record(results, RECORD)
    return int(failed)


def _outside(name: str, given: argparse.Namespace) -> dict[str, object]:
    """One target in a process of its own; a crash, or one that does not end, is a find too."""
    report = given.finds / f"{name}.result.json"
    report.unlink(missing_ok=True)
    words = [name, "--inner", "--seconds", str(given.seconds), "--seed", str(given.seed or random.randrange(1, 2**31))]
    words += ["--finds", str(given.finds), *(["--random"] if given.random else [])]
    lost = None
    try:
        done = subprocess.run(
            [sys.executable, __file__, *words],
            timeout=given.seconds + 120,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        if done.returncode:
            lost = f"ended with {done.returncode}"
            print(done.stderr[-3000:], file=sys.stderr)
    except subprocess.TimeoutExpired:
        lost = "did not end"
    result: dict[str, object] = {"target": name, "engine": "?", "runs": 0, "cpu_seconds": 0, "finds": []}
    if report.exists():
        result = json.loads(report.read_text())
    report.unlink(missing_ok=True)
    return result | {"finds": [*result["finds"], *([lost] if lost else [])]}


if __name__ == "__main__":
    sys.exit(main())
