"""What `fusenms serve` takes beside the bare `Detector`: throughput, latency, errors, memory, and what overload gets.

    python tests/benchmarks/serving.py FUSED.onnx IMAGE.jpg [IMAGE.jpg ...] [--seconds 60] [--concurrency 1 8 32]

The server runs in a process of its own. Each client waits for its answer, compares it with a stored one, and sends the next image. Bare
calls of `Detector`, on the same files in batches, and served ones take turns, so that what else the machine does weighs on both. The
ratio is that of images a second. On a machine with other work it swings with that work, so processor time for an image is told too: of
the server, and of bare calls. At last, more clients than the server has places: what is answered with 503, and how soon. With --delays, a
server for each time that a batch waits (batch_delay, in ms), at the concurrencies: the curve of latency and throughput.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import fusenms

ROUNDS = 6
"""In which bare and served calls take turns."""


@dataclass
class Load:
    """What clients saw: seconds of each answer, and the number of each status. A wrong answer counts as status 0."""

    seconds: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    elapsed: float = 0.0

    def rate(self) -> float:
        return len(self.seconds) / self.elapsed

    def percentile(self, share: float) -> float:
        return sorted(self.seconds)[min(int(share * len(self.seconds)), len(self.seconds) - 1)] * 1000


@contextmanager
def served(path: Path, *flags: str) -> Iterator[tuple[str, int, int]]:
    """Host, port and process number of a server in a process of its own."""
    command = [sys.executable, "-m", "fusenms", "serve", str(path), "--port", "0", "--json", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("}"):
                    break
            host, port = json.loads("".join(lines))["url"].removeprefix("http://").rsplit(":", 1)
            yield host, int(port), process.pid
        finally:
            process.terminate()
            assert process.wait(60) == 0


async def request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes, body: bytes
) -> tuple[int, bytes]:
    """Send a request on an open connection; return status and body of the answer."""
    writer.write(head + body)
    await writer.drain()
    status, length = int((await reader.readline()).split()[1]), 0
    while (line := await reader.readline()) not in (b"\r\n", b""):
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    return status, await reader.readexactly(length)


async def client(
    host: str,
    port: int,
    name: str,
    bodies: list[bytes],
    answers: list[list] | None,
    until: float,
    load: Load,
    first: int,
) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    number = first
    while time.perf_counter() < until:
        body = bodies[number % len(bodies)]
        head = f"POST /detect/{name} HTTP/1.1\r\nHost: a\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
        start = time.perf_counter()
        status, answer = await request(reader, writer, head.encode(), body)
        took = time.perf_counter() - start
        if status == 503:
            load.refused.append(took)
            await asyncio.sleep(1)  # as the answer says (Retry-After)
            reader, writer = await asyncio.open_connection(host, port)
        elif status == 200 and (
            answers is None or same(json.loads(answer)["detections"], answers[number % len(bodies)])
        ):
            load.seconds.append(took)
        else:
            status = 0 if status == 200 else status
        load.statuses[status] += 1
        number += 1
    writer.close()


def same(found: list[dict], stored: list[dict]) -> bool:
    """Whether the rows are the same, but for the rounding of another batch size."""
    return len(found) == len(stored) and all(
        a["label"] == b["label"]
        and abs(a["score"] - b["score"]) < 1e-4
        and max(abs(p - q) for p, q in zip(a["box"], b["box"], strict=True)) < 0.1
        for a, b in zip(found, stored, strict=True)
    )


async def clients(
    host: str,
    port: int,
    name: str,
    bodies: list[bytes],
    answers: list[list] | None,
    count: int,
    seconds: float,
    load: Load,
) -> None:
    start = time.perf_counter()
    await asyncio.gather(
        *(client(host, port, name, bodies, answers, start + seconds, load, number) for number in range(count))
    )
    load.elapsed += time.perf_counter() - start


def bare(detect: fusenms.Detector, paths: list[Path], batch: int, seconds: float) -> tuple[int, float]:
    """Images and seconds of bare calls."""
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        detect([paths[(done + i) % len(paths)] for i in range(batch)])
        done += batch
    return done, time.perf_counter() - start


def memory(process: int) -> float:
    """Resident memory of a process, in MB."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096 / 1e6


def processor_seconds(process: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument(
        "--seconds", type=float, default=60, help="of served calls at each concurrency, and of bare ones"
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--delays", type=float, nargs="+", default=[])
    parser.add_argument("--flags", default="", help="of the server")
    args = parser.parse_args()
    bodies, name = [path.read_bytes() for path in args.images], args.model.name.split(".")[0]
    with fusenms.Detector(args.model) as detect:
        answers = [detect(path)[0].to_dicts() for path in args.images]
        with served(args.model, *args.flags.split()) as (host, port, process):
            for count in args.concurrency:
                measure(detect, args, (host, port), process, name, bodies, answers, count)
    overload(args.model, name, bodies, answers)
    for delay in args.delays:
        with served(args.model, "--batch-delay", str(delay)) as (host, port, _):
            for count in args.concurrency:
                load = Load()
                asyncio.run(clients(host, port, name, bodies, answers, count, args.seconds / ROUNDS, load))
                print(line(f"delay {delay:g} ms, {count} clients", load), flush=True)


def measure(detect, args, address, process, name, bodies, answers, count) -> None:
    """Bare and served calls in turn."""
    load, ratios, before = Load(), [], memory(process)
    images, own, theirs = 0, 0.0, processor_seconds(process)
    batch = min(count, detect.batch_size)
    bare(detect, args.images, batch, 1.0)
    asyncio.run(clients(*address, name, bodies, answers, count, 1.0, Load()))
    settled, theirs = memory(process), processor_seconds(process)
    for _ in range(ROUNDS):
        start = time.process_time()
        done, seconds = bare(detect, args.images, batch, args.seconds / ROUNDS)
        images, own = images + done, own + time.process_time() - start
        now = Load()
        asyncio.run(clients(*address, name, bodies, answers, count, args.seconds / ROUNDS, now))
        ratios.append(now.rate() / (done / seconds))
        load.seconds += now.seconds
        load.statuses += now.statuses
        load.elapsed += now.elapsed
    theirs = processor_seconds(process) - theirs
    print(
        line(f"{count} clients", load)
        + f" · {statistics.median(ratios):.2f} of bare calls in batches of {batch} ({min(ratios):.2f} to {max(ratios):.2f})"
        + f" · processor time {theirs / len(load.seconds) * 1000:.0f} ms an image, bare {own / images * 1000:.0f} ms"
        + f" · memory {before:.0f}, {settled:.0f}, {memory(process):.0f} MB",
        flush=True,
    )


def line(what: str, load: Load) -> str:
    wrong = {status: number for status, number in load.statuses.items() if status != 200}
    return (
        f"{what}: {len(load.seconds)} answers, {wrong or 'no'} errors · {load.rate():.1f} images/s · p50 {load.percentile(0.5):.0f} ms, "
        f"p99 {load.percentile(0.99):.0f} ms"
    )


def overload(model: Path, name: str, bodies: list[bytes], answers: list[list]) -> None:
    """64 clients of a server with 8 places."""
    load = Load()
    with served(model, "--max-queue", "8") as (host, port, _):
        asyncio.run(clients(host, port, name, bodies, answers, 64, 10, load))
    refused = sorted(load.refused)
    print(
        f"overload, 64 clients and 8 places: {load.statuses[200]} answers, {load.statuses[503]} refused, others "
        f"{load.statuses.total() - load.statuses[200] - load.statuses[503]} · {load.rate():.1f} images/s · 503 after p50 "
        f"{refused[len(refused) // 2] * 1000:.0f} ms, p99 {refused[int(0.99 * len(refused))] * 1000:.0f} ms"
    )


if __name__ == "__main__":
    main()
