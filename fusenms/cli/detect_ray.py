"""`fusenms detect --ray ADDRESS|local FUSED DATASET... -o OUT.parquet`: the same on a cluster, into Parquet."""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import asdict

from fusenms.cli.printing import ProgressBar, Steps
from fusenms.cli.terminal import only_own_messages
from fusenms.cluster import detect_dataset
from fusenms.errors import ConfigError
from fusenms.safety.isolation import is_confined
from fusenms.safety.text import printable

FLAGS = ("actors", "cpus", "column")
"""Of this road alone."""
ALONE = ("jsonl", "coco")
"""Of the other road alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    group = parser.add_argument_group("on a cluster, with Ray")
    group.add_argument(
        "--ray",
        metavar="ADDRESS|local",
        help="detect with a Ray cluster (auto, HOST:PORT), or with Ray on this machine alone (local): images, videos and .parquet files, "
        "folders, patterns and lists (.txt) of them, local or as s3://...; then -o names a folder of Parquet files",
    )
    group.add_argument(
        "--actors", type=int, metavar="N", help="most processes that detect (default: one for each --cpus)"
    )
    group.add_argument("--cpus", type=int, metavar="N", help="CPUs, and threads, of each process (default: 1)")
    group.add_argument(
        "--column",
        metavar="NAME",
        help="of .parquet files, the column with the images: bytes or paths (default: image)",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse flags of one road on the other.

    Raises:
        ConfigError: there is one, or a cluster is to run with the limits of a child process.
    """
    given = [name for name in (FLAGS if args.ray is None else ALONE) if getattr(args, name) is not None]
    if given:
        where = "without --ray; add it" if args.ray is None else "with --ray, which writes Parquet"
        raise ConfigError(f"found --{given[0]} {where}, or leave --{given[0]} out")
    if args.ray is not None and is_confined():
        raise ConfigError("found --isolate with --ray, whose processes it does not limit; leave it out")


def run(args: argparse.Namespace, output: str | None) -> int:
    """Run the job, and print its report.

    Raises:
        ConfigError: no output is named.
    """
    if output is None:
        raise ConfigError("found --ray without -o; expected -o OUT.parquet, a folder for Parquet files")
    steps = Steps(args.json)
    with contextlib.ExitStack() as stack:
        if not args.verbose:
            stack.enter_context(only_own_messages())
        bar = stack.enter_context(ProgressBar("detect"))
        done = detect_dataset(
            args.model, args.images, output, address=args.ray, column=args.column or "image", every=args.every,
            batch_size=args.batch, actors=args.actors, cpus=1 if args.cpus is None else args.cpus,
            limits=args.limits, progress=lambda count, total: bar.update("inputs", count, total),
        )  # fmt: skip
    skipped = f" · {done.skipped} done before" if done.skipped else ""
    steps.line("detect", f"{done.images} images · {done.detections} detections · {done.failed} failed{skipped}")
    if done.images:
        places = f"{_several(done.actors, 'actor')} on {_several(done.nodes, 'node')}"
        steps.line(
            "speed",
            f"{done.images_per_second:.1f} images/s · {done.seconds:.1f} s, {done.ready_seconds:.1f} s until the first · {places}",
        )
    steps.line("wrote", done.output)
    steps.finish(**asdict(done), images_per_second=round(done.images_per_second, 3))
    if done.failed:
        print(f"fusenms: {done.failed} failed; the column error of {printable(done.output)} says why", file=sys.stderr)
    return 1 if done.failed else 0


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
