"""`fusenms families`: lists the detectors that fusenms reads, how, and what each was tested with; and those of installed packages."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from fusenms.catalog import families
from fusenms.cli.printing import Steps
from fusenms.heads import installed_heads, known_heads

NAME = "families"
HELP = "list the detector families, how their files are read, and the models that each was tested with"
WEIGHTS = {"pt": ".pt", "hf": "Hugging Face directory", "onnx": ".onnx", "module": "nn.Module"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="WORD", help="list only families whose entry has all these words")


def run(args: argparse.Namespace) -> int:
    steps = Steps(args.json)
    words = [word.lower() for word in args.words]
    found = [entry for entry in families() if all(word in str(asdict(entry)).lower() for word in words)]
    known_heads()  # refuses what is no family
    others = [
        (where, head)
        for where, head in installed_heads()
        if all(word in f"{head.name} {where}".lower() for word in words)
    ]
    if not args.json:
        for entry in found:
            nms = "suppressed" if entry.suppress else "no suppression"
            print(f"{entry.name}")
            weights = ", ".join(WEIGHTS[kind] for kind in entry.weights)
            print(f"    reads    {weights} · {entry.task} · head {entry.head} · {entry.decode} decode · {nms}")
            print(f"    known    {'; '.join(entry.checkpoints)}")
            print(f"    source   {entry.source} ({entry.licence})")
            print(f"    tried    {entry.tried}")
        for where, head in others:
            print(f"{head.name}\n    reads    .onnx · {', '.join(head.tasks)} · head {head.name}\n    source   {where}")
        if not found and not others:
            print(f"no family has the words {' '.join(args.words)!r}; list all with: fusenms families")
    installed = [{"name": head.name, "tasks": list(head.tasks), "source": where} for where, head in others]
    steps.finish(families=[asdict(entry) for entry in found], installed=installed)
    return 0
