"""Digests of fused graphs, metadata aside, so that a change of the code can be shown to change no graph.

Usage: ``python tests/identity.py FOLDER... -o BEFORE.json`` before the change, and ``--against BEFORE.json`` after it. Every ``.pt`` and
``.onnx`` under the folders is fused with each backend and each set of settings; a refusal counts by its error type.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

import fusenms
from fusenms.config import PostprocessConfig

try:
    from fusenms.fusion.backends import BACKENDS
    from fusenms.fusion.tail import fuse_head
    from fusenms.heads import raw_head
    from fusenms.transforms.dynamic_batch import open_batch
    from fusenms.transforms.half_precision import to_half
except ImportError:  # the tree of version 0.1.0
    from fusenms.batch import open_batch
    from fusenms.precision import to_half

    def raw_head(raw, layout):  # type: ignore[misc]
        return layout

    from fusenms.backends import BACKENDS
    from fusenms.fusion import fuse_head

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "all outputs": {"indices": True, "max_detections": 50, "max_candidates": 200, "score_threshold": 0.1},
    "masks, every class": {"masks": "prototype", "multi_label": True},
    "agnostic": {"class_agnostic": True, "iou_threshold": 0.6},
    "rounds": {"rounds": 3},
}
LOADING: dict[str, dict[str, Any]] = {"": {}, "dynamic size": {"dynamic_size": True}}


def digest(model: onnx.ModelProto) -> str:
    """SHA-256 of a model without its metadata."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.metadata_props[:]
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def digests(file: Path) -> dict[str, str]:
    """``loading, backend, settings`` to the digest of the fused graph, or the error's type."""
    made = {}
    for loading, options in LOADING.items():
        if options and file.suffix != ".pt":
            continue
        try:
            raw = fusenms.load(file, make_dynamic=file.suffix == ".onnx", **options)
        except fusenms.FusenmsError as error:
            made[f"{loading}"] = type(error).__name__
            continue
        made[f"{loading}, raw"] = digest(raw.model)
        try:
            layout = fusenms.recognize(raw)
            raw = open_batch(raw, layout)
        except fusenms.FusenmsError as error:
            made[f"{loading}, layout"] = type(error).__name__
            continue
        made[f"{loading}, layout"] = hashlib.sha256(
            json.dumps(layout.to_dict()).replace('"dims"', '"numbers"').encode()
        ).hexdigest()
        variants = {"": raw}
        if not options and (half := attempt(lambda raw=raw, layout=layout: to_half(raw, layout))):
            variants["fp16"] = half
        for precision, network in variants.items():
            for backend in BACKENDS:
                for name, settings in SETTINGS.items():
                    if (options or precision) and name not in ("default", "all outputs"):
                        continue
                    config = PostprocessConfig(**settings)
                    try:
                        value = digest(fuse_head(network, raw_head(network, layout), config, backend).model)
                    except fusenms.FusenmsError as error:
                        value = type(error).__name__
                    made[f"{loading}, {precision}, {backend}, {name}"] = value
    return made


def attempt(make: Callable[[], Any]) -> Any:
    """What it makes; None where it refuses."""
    try:
        return make()
    except fusenms.FusenmsError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--against", type=Path)
    given = parser.parse_args()
    before = json.loads(given.against.read_text()) if given.against else {}
    after: dict[str, str] = {}
    for folder in given.folders:
        for file in sorted(path for path in folder.rglob("*") if path.suffix in (".pt", ".onnx")):
            name = str(file.relative_to(folder))
            mine = {f"{name}: {key}": value for key, value in digests(file).items()}
            changed = [key for key, value in mine.items() if before and before.get(key) != value]
            print(f"{name}: {len(mine)} graphs" + "".join(f"\n  changed: {key}" for key in changed), flush=True)
            after |= mine
    if given.output:
        given.output.write_text(json.dumps(after, indent=1, sort_keys=True))
    graphs = sum(len(value) == 64 for value in after.values())
    print(f"{graphs} graphs, {len(after) - graphs} refusals", end="")
    if before:
        same = sum(before.get(key) == value for key, value in after.items())
        print(f"; {same} of {len(before)} as before")
        if same != len(before) or len(after) != len(before):
            raise SystemExit(1)
    print()


if __name__ == "__main__":
    main()
