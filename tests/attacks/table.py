"""The table of threats in docs/security.md: kinds of attack, how many of each the tests try, and what comes of them.

`python tests/attacks/table.py` runs the attacks and writes the table anew, and refuses where one failed; `test_security_docs.py` checks
that what is written is what the tests list.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [folder for folder in map(str, (HERE, HERE.parent, ROOT)) if folder not in sys.path]
DOCS = ROOT / "docs" / "security.md"
SUBJECTS = {
    "checkpoint": "checkpoint (`.pt`)",
    "onnx": "third-party ONNX",
    "fused": "fused file",
    "huggingface": "Hugging Face directory",
    "image": "image",
    "terminal": "text shown in a terminal",
}
"""By the module `test_NAME_attacks.py`; one that is not here is called by its name."""


def modules() -> list[str]:
    """Names of the modules that list attacks."""
    return sorted(path.stem for path in HERE.glob("test_*_attacks.py"))


def counts() -> dict[str, Counter[str]]:
    """Subject to the number of attacks by kind, as the modules list them.

    Raises:
        AttributeError: a module has no `ATTACKS`.
    """
    found: dict[str, Counter[str]] = {}
    for name in modules():
        subject = name.removeprefix("test_").removesuffix("_attacks")
        attacks = importlib.import_module(name).ATTACKS
        found[SUBJECTS.get(subject, subject)] = Counter(attack.kind for attack in attacks)
    return found


def table() -> str:
    """Markdown, without an end of line."""
    rows = ["| subject | threat | tries | outcome |", "|---|---|--:|---|"]
    for subject, kinds in counts().items():
        rows += [f"| {subject} | {kind} | {tries} | {tries} of {tries} held |" for kind, tries in sorted(kinds.items())]
    total = sum(sum(kinds.values()) for kinds in counts().values())
    return "\n".join([*rows, f"| | all | {total} | |"])


def fuzzing() -> str:
    """The same of `make fuzz`, from docs/security-fuzzing.json."""
    path = ROOT / "docs" / "security-fuzzing.json"
    sums = json.loads(path.read_text()) if path.exists() else {}
    rows = ["| target | inputs | CPU hours | finds, all mended |", "|---|--:|--:|--:|"]
    return "\n".join([
        *rows,
        *(f"| {name} | {own['runs']:,} | {own['cpu_seconds'] / 3600:.2f} | {own['finds']} |" for name, own in sorted(sums.items())),
    ])  # fmt: skip


def limits() -> str:
    """Every field of `fusenms.Limits`: its default, and its line in the docstring."""
    from dataclasses import fields

    from fusenms.limits import Limits

    text = (Limits.__doc__ or "").partition("Attributes:")[2]
    meaning = {
        name: " ".join(words.split()) for name, words in re.findall(r"^ {8}(\w+): (.*(?:\n {9,}.*)*)", text, re.M)
    }
    rows = ["| limit | default | of |", "|---|--:|---|"]
    return "\n".join([*rows, *(f"| `{f.name}` | {f.default:,} | {meaning[f.name]} |" for f in fields(Limits))])


PARTS = {"attacks": table, "fuzzing": fuzzing, "limits": limits}


def written(text: str) -> str:
    """The document with every part between its marks made anew."""
    for name, make in PARTS.items():
        start, stop = f"<!-- {name}: made by tests/attacks/table.py -->", f"<!-- end of {name} -->"
        before, mark, rest = text.partition(start)
        if not mark or stop not in rest:
            raise SystemExit(f"{DOCS.name} has no marks for {name}: {start} … {stop}")
        text = f"{before}{mark}\n\n{make()}\n\n{rest[rest.index(stop) :]}"
    return text


def main() -> int:
    if modules():
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--scope",
            "all",
            "-p",
            "no:cacheprovider",
            *(str(HERE / f"{name}.py") for name in modules()),
        ]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        if done.returncode:
            print("an attack was not held, or a test is broken: nothing was written", file=sys.stderr)
            return done.returncode
    DOCS.write_text(written(DOCS.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
