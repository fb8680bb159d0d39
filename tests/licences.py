"""The licence of every distribution that fusenms and its extras install: `make licences` checks them and writes docs/licences.md.

pip-licenses reads them from the metadata of what is installed here. Refused: copyleft without a reason in `ALLOWED_COPYLEFT`,
proprietary licences without one in `ALLOWED_PROPRIETARY`, and a licence that is not stated.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "licences.md"
EXTRAS = (
    "cpu",
    "export",
    "hf",
    "images",
    "bench",
    "eval",
    "rtx",
    "plugin",
    "openvino",
    "ncnn",
    "serve",
    "ray",
    "docs",
    "dev",
)
"""Those that install without a GPU. `gpu` and `trt` are in `ELSEWHERE`."""

STRONG = re.compile(
    r"\bA?GPL|\bLGPL|General Public|\bEUPL|\bSSPL|\bOSL-|\bCC-BY-(SA|NC)|Commons Clause|Business Source", re.I
)
WEAK = re.compile(r"\bMPL|Mozilla Public|\bEPL-|\bCDDL", re.I)
FREE = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|ISC|PSF|Python Software Foundation|Zlib|BSL-1\.0|CC0|Unlicense|HPND|CNRI|ZPL|MPL|Mozilla Public)",
    re.I,
)
PROPRIETARY = re.compile(r"NVIDIA|Proprietary", re.I)

FILE_LEVEL = "binds changes to its own files, which are installed as they come"
ALLOWED_COPYLEFT = {
    "hypothesis": f"in the tests only; {FILE_LEVEL}",
    "pathspec": f"of mypy, for development only; {FILE_LEVEL}",
    "tqdm": f"of transformers and huggingface-hub; {FILE_LEVEL}",
    "certifi": f"certificates alone; {FILE_LEVEL}",
    "docutils": "of the documentation; the GPL is that of an Emacs mode in its sources, which the wheel does not have",
}
ALLOWED_PROPRIETARY = {
    "tensorrt-rtx": "builds engines", "tensorrt-rtx-cu13": "builds engines", "tensorrt-rtx-cu13-bindings": "builds engines",
    "tensorrt-rtx-cu13-libs": "builds engines", "nvidia-cuda-nvrtc": "compiles the plugin's kernels", "cuda-bindings": "calls the GPU",
    "cuda-python": "calls the GPU",
}  # fmt: skip
"""NVIDIA's own terms; each comes with an extra that somebody asks for by name, none with fusenms itself."""
IN_ITS_FILE = {"faster-coco-eval": ("Apache-2.0", "Apache License Version 2.0")}
"""Distributions whose metadata state no licence: the licence, and how the file of that name in them begins."""
ELSEWHERE = """\
Not installed in the tests, as their publishers state it: `onnxruntime-gpu` (extra `gpu`) MIT; `tensorrt` (extra `trt`) and the
`nvidia-*` packages of PyTorch's CUDA build (extra `export` on Linux, from PyPI) NVIDIA's proprietary licences; `triton` MIT.

A wheel can carry libraries with licences of their own beside the one stated. Those of `opencv-python-headless` (extra `images`)
carry FFmpeg (LGPL-2.1), which decodes and encodes the videos of `detect`, and libquadmath (LGPL-2.1), as shared libraries. They
and NumPy's carry libgfortran (GPL-3.0 with the runtime library exception)."""


def closure(extra: str | None) -> set[str]:
    """Names of all distributions that fusenms with this extra needs here, itself left out."""
    found: set[str] = set()
    todo: list[tuple[str, str]] = [("fusenms", extra or "")]
    seen: set[tuple[str, str]] = set()
    while todo:
        name, wanted = todo.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        for requirement in _requirements(name, wanted):
            other = canonicalize_name(requirement.name)
            found.add(other)
            todo += [(other, ""), *((other, each) for each in requirement.extras)]
    return found - {"fusenms"}


def _requirements(name: str, extra: str) -> Iterator[Requirement]:
    if name == "fusenms":  # as it stands in the repository, not as it was installed
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        texts = project["optional-dependencies"][extra] if extra else project["dependencies"]
        yield from filter(_applies, map(Requirement, texts))
        return
    try:
        texts = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return
    yield from (requirement for requirement in map(Requirement, texts) if _applies(requirement, extra))


def _applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def licences() -> dict[str, str]:
    """Licence of every distribution that is installed here, as it states it."""
    command = [sys.executable, "-m", "piplicenses", "--from=mixed", "--with-system", "--format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    stated = {canonicalize_name(entry["Name"]): entry["License"] for entry in json.loads(done.stdout)}
    return stated | {name: in_its_file(name) for name in IN_ITS_FILE if name in stated}


def in_its_file(name: str) -> str:
    """The licence of a distribution by its file; "UNKNOWN" if that does not begin as it should."""
    licence, start = IN_ITS_FILE[name]
    files = [file for file in metadata.files(name) or () if file.name == "LICENSE"]
    texts = [" ".join(Path(str(file.locate())).read_text().split()) for file in files]
    return licence if texts and all(text.startswith(start) for text in texts) else "UNKNOWN"


def problem(name: str, licence: str) -> str | None:
    """Why a distribution may not be installed; None where it may."""
    if STRONG.search(licence) and name not in ALLOWED_COPYLEFT:
        return f"{name}: {licence} is copyleft; drop it, or give a reason in ALLOWED_COPYLEFT"
    if WEAK.search(licence) and name not in ALLOWED_COPYLEFT:
        return f"{name}: {licence} is copyleft of its files; drop it, or give a reason in ALLOWED_COPYLEFT"
    if PROPRIETARY.search(licence):
        return (
            None
            if name in ALLOWED_PROPRIETARY
            else f"{name}: {licence} is proprietary; drop it, or name it in ALLOWED_PROPRIETARY"
        )
    return None if FREE.search(licence) else f"{name}: its licence is {licence!r}, which is not known here"


def installed() -> dict[str, tuple[str, list[str]]]:
    """Distribution to its licence and to the extras that bring it ("always" where it comes without one)."""
    stated, found = licences(), dict[str, tuple[str, list[str]]]()
    for extra in (None, *EXTRAS):
        for name in closure(extra):
            if name in stated:
                found.setdefault(name, (stated[name], []))[1].append(extra or "always")
    return dict(sorted(found.items()))


def document() -> str:
    """docs/licences.md."""
    rows = []
    for name, (licence, extras) in installed().items():
        why = ALLOWED_COPYLEFT.get(name) or (ALLOWED_PROPRIETARY.get(name, "") if PROPRIETARY.search(licence) else "")
        brought = "always" if "always" in extras else ", ".join(f"`{extra}`" for extra in extras)
        rows.append(f"| {name} | {licence} | {brought} | {why} |")
    head = "# Licences\n\n"
    head += "fusenms is Apache-2.0. This is what it and its extras install on Linux, with the licence that each states. `make licences` "
    head += (
        "writes\nthis table. CI refuses copyleft, proprietary and unknown licences other than those with a note.\n\n"
    )
    return "\n".join([head + "| distribution | licence | with | note |", "|---|---|---|---|", *rows, "", ELSEWHERE, ""])


def main() -> int:
    problems = [text for name, (licence, _) in installed().items() if (text := problem(name, licence))]
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        return 1
    if "--check" not in sys.argv:
        DOCS.write_text(document())
    print(f"{len(installed())} distributions, every licence is allowed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
