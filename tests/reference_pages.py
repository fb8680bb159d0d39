"""The parts of docs/reference that code makes:  python tests/reference_pages.py

Each stands between its marks in a page that is otherwise written by hand. `test_docs.py` holds them against the code.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "reference"
sys.path.insert(0, str(ROOT))

from fusenms import PostprocessConfig, contract, errors  # noqa: E402
from fusenms.cli import build_parser  # noqa: E402
from fusenms.layout import Activation, BoxFormat, Decoded, Layout, Tap  # noqa: E402


def cli() -> str:
    """Every subcommand: what it does, its arguments and flags; those that all of them have come last."""
    commands = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    lists = {
        name: [_argument(action) for action in parser._actions if "--help" not in action.option_strings]
        for name, parser in commands.choices.items()
    }
    shared = [row for row in next(iter(lists.values())) if all(row in rows for rows in lists.values())]
    parts = []
    for name, parser in commands.choices.items():
        parts += [f"## {name}", "", f"{_sentence(parser.description or '')}", ""]
        parts += _table("argument or flag", [row for row in lists[name] if row not in shared])
    return "\n".join([*parts, "## Flags of every subcommand", "", *_table("flag", shared)]).rstrip()


def _argument(action: argparse.Action) -> tuple[str, str]:
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        value = ""
    elif action.choices is not None:
        value = " · ".join(f"`{choice}`" for choice in action.choices)
    else:
        several = " ..." if action.nargs == "+" else ""
        value = f"`{str(action.metavar or action.dest.upper()).replace('|', ' or ')}{several}`"
    text = (action.help or "") % (vars(action) | {"prog": "fusenms"})
    return " ".join(filter(None, (names, value))), text.replace("|", " or ")


def _table(head: str, rows: list[tuple[str, str]]) -> list[str]:
    return [f"| {head} | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows), ""]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def settings() -> str:
    """Every field of `PostprocessConfig`: its default, and its line in the docstring."""
    meaning = attributes(PostprocessConfig)
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for field in fields(PostprocessConfig):
        assert field.default is not MISSING
        rows.append(f"| `{field.name}` | `{field.default!r}` | {meaning[field.name]} |".replace('"', ""))
    return "\n".join(rows)


def attributes(owner: Any) -> dict[str, str]:
    """The `Attributes:` of a class's docstring, as Markdown."""
    text = (owner.__doc__ or "").partition("Attributes:")[2]
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {9,}.*)*)", text, re.M)
    return {name: " ".join(words.split()).replace("``", "`") for name, words in found}


def inputs() -> str:
    """The optional inputs of the contract, of a head that suppresses."""
    meaning = {
        contract.SCORE_THRESHOLD: "keep candidates with score > this: one for all classes, or one for each",
        contract.IOU_THRESHOLD: "suppress above this; only of heads that need suppression",
        contract.CLASS_MASK: "whether each class counts",
    }
    classes = 987  # stands for C
    boxes, scores = Tap("boxes", 2, 0, 4), Tap("scores", 2, 0, classes)
    layout = Layout("two-outputs", boxes, scores, None, Activation.NONE, Decoded(BoxFormat.XYXY))
    rows = ["| optional input | shape | dtype | default | |", "|---|---|---|---|---|"]
    for given in layout.runtime_inputs(PostprocessConfig(runtime_thresholds=True)):
        shape = " or ".join(f"[{'C' if length == classes else length}]" for length in given.lengths)
        value = f"`{given.value}`" if given.name == contract.CLASS_MASK else f"the setting `{given.name}`"
        rows.append(f"| `{given.name}` | {shape} | {given.dtype} | {value} | {meaning[given.name]} |")
    return "\n".join(rows)


def outputs() -> str:
    """The outputs of the contract."""
    meaning = {
        contract.NUM_DETECTIONS: "valid rows of each image",
        contract.BOXES: "x1, y1, x2, y2 in pixels of the input; of oriented boxes [B, K, 5]: cx, cy, w, h, angle in radians",
        contract.SCORES: "best first",
        contract.LABELS: "class index",
        contract.INDICES: "with `--indices`: the candidate of each row",
        contract.CONVERGED: "with `--rounds N`: 1 if these were enough",
    }
    rows = ["| output | shape | dtype | |", "|---|---|---|---|"]
    for output in (*contract.OUTPUTS, contract.INDICES_OUTPUT, contract.CONVERGED_OUTPUT):
        shape = ", ".join(map(str, output.shape))
        rows.append(f"| `{output.name}` | [{shape}] | {output.dtype} | {meaning[output.name]} |")
    return "\n".join(rows)


def presets() -> str:
    """The presets of output names."""
    rows = [f"| preset | {' | '.join(f'`{output.name}`' for output in contract.OUTPUTS)} |", "|---|---|---|---|---|"]
    presets = [(name, names) for name, names in contract.OUTPUT_PRESETS.items() if name != contract.ONE_TENSOR]
    return "\n".join([*rows, *(f"| `{name}` | {' | '.join(f'`{n}`' for n in names)} |" for name, names in presets)])


def errors_() -> str:
    """Every error: what it derives from, and its docstring."""
    rows = ["| error | is a | when |", "|---|---|---|"]
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, Exception):
            bases = ", ".join(f"`{base.__name__}`" for base in kind.__bases__)
            text = " ".join((kind.__doc__ or "").split()).replace("``", "`")
            rows.append(f"| `{name}` | {bases} | {text} |")
    return "\n".join(rows)


PARTS = {
    "cli": ("cli.md", cli), "settings": ("settings.md", settings), "outputs": ("outputs.md", outputs),
    "inputs": ("outputs.md", inputs), "presets": ("outputs.md", presets), "errors": ("errors.md", errors_),
}  # fmt: skip
"""Mark to the page and to what makes the part."""


def written(page: str, text: str) -> str:
    """The page with its parts made anew."""
    for name, (home, make) in PARTS.items():
        if home != page:
            continue
        start, stop = f"<!-- {name}: made by tests/reference_pages.py -->", f"<!-- end of {name} -->"
        before, mark, rest = text.partition(start)
        if not mark or stop not in rest:
            raise SystemExit(f"{page} has no marks for {name}: {start} … {stop}")
        text = f"{before}{mark}\n\n{make()}\n\n{rest[rest.index(stop) :]}"
    return text


def main() -> None:
    for page in sorted({page for page, _ in PARTS.values()}):
        (PAGES / page).write_text(written(page, (PAGES / page).read_text()))


if __name__ == "__main__":
    main()
