"""README and docs/ are true: their commands run, their Python runs, their flags, links and generated tables are those of the code.

Each block of code is a test of its own. It runs in a folder that has the files it names: small stand-ins, made once.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import onnx
import pytest
import reference_pages
from conftest import ROOT, SHAPES

from fusenms import contract
from fusenms.cli import build_parser, main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), *sorted((ROOT / "plugins").glob("*.md")))
    if path.name != "CHANGELOG.md"
}
HAND_WRITTEN = [name for name in PAGES if not name.startswith("docs/benchmarks")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SIDE = 64
"""Input size of the stand-ins, which is what their blocks run at."""


FIRST_PAGES = ("README.md", "docs/get-started.md")


def blocks(language: str) -> list:
    """Page and text of each block of that language, named by the page and its number there. Those of the later pages are thorough."""
    return [
        pytest.param(
            page,
            text,
            id=f"{page.removeprefix('docs/').removesuffix('.md')}-{number}",
            marks=[] if page in FIRST_PAGES else [pytest.mark.thorough],
        )
        for page in HAND_WRITTEN
        for number, text in enumerate(re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.S))
    ]


class StandIns:
    """Small files under the names that the pages use, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, text: str, target: Path) -> None:
        """Copy what a block names, and does not make itself, into its folder."""
        for name, make in self.makers().items():
            if re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w.-])", text):
                if not (self.folder / name).exists():
                    make(self.folder / name)
                if (self.folder / name).is_dir():
                    shutil.copytree(self.folder / name, target / name)
                else:
                    shutil.copy(self.folder / name, target / name)

    def makers(self):
        return {
            "yolov8n.pt": self.checkpoint,
            "yolov8n-seg.pt": lambda path: self.checkpoint(path, masks=True),
            "yolov8n.ort.onnx": lambda path: self.fused(path, "ort"),
            "yolov8n.trt.onnx": lambda path: self.fused(path, "trt"),
            "yolov8n.portable.onnx": lambda path: self.fused(path, "portable"),
            "detector.onnx": lambda path: self.raw(path, dynamic=True),
            "detector_b1.onnx": lambda path: self.raw(path, dynamic=False),
            "layout.json": self.layout,
            "detector_features.onnx": self.raw_with_features,
            "bus.jpg": lambda path: shutil.copy(SHAPES / "shapes0.jpg", path),
            "street.jpg": lambda path: shutil.copy(SHAPES / "shapes1.jpg", path),
            "photos": self.photos,
        }

    def checkpoint(self, path: Path, masks: bool = False) -> None:
        import torch
        from torch import nn

        from fusenms.sources.torch_modules.layers import AnchorFreeDetect, Conv, DetectionModel
        from fusenms.sources.torch_modules.tasks import AnchorFreeSegment, Proto

        torch.manual_seed(0)
        head = AnchorFreeDetect(3, (8,), (8,))
        if masks:
            head.__class__, head.nm = AnchorFreeSegment, 4
            head.cv4, head.proto = nn.ModuleList([nn.Conv2d(8, 4, 1)]), Proto()
            head.proto.cv1, head.proto.cv2, head.proto.cv3 = Conv(8, 8, 3), Conv(8, 8, 3), Conv(8, 4)
            head.proto.upsample = nn.ConvTranspose2d(8, 8, 2, 2)
        model = DetectionModel([Conv(3, 8, 8, 8, 0), head], [-1, [-1]])
        model.names, model.args = ["person", "bicycle", "bus"], {"imgsz": SIDE}
        torch.save({"model": model}, path)

    def fused(self, path: Path, backend: str) -> None:
        from fusenms import fuse

        weights = self.folder / "yolov8n.pt"
        if not weights.exists():
            self.checkpoint(weights)
        fuse(weights, backend=backend, unverified=True).save(path, unverified=True)

    def raw(self, path: Path, dynamic: bool) -> None:
        from third_party import Yolov8, write

        write(Yolov8(), path, dynamic=dynamic)

    def layout(self, path: Path) -> None:
        import json

        from fusenms import load, recognize

        detector = self.folder / "detector.onnx"
        if not detector.exists():
            self.raw(detector, dynamic=True)
        path.write_text(json.dumps(recognize(load(detector)).to_dict()))

    def raw_with_features(self, path: Path) -> None:
        import onnx
        from onnx import TensorProto, helper

        self.raw(path, dynamic=True)
        model = onnx.load(path)
        model.graph.node.append(helper.make_node("GlobalAveragePool", [model.graph.input[0].name], ["features"]))
        model.graph.output.append(helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 3, 1, 1]))
        onnx.save(model, path)

    def photos(self, path: Path) -> None:
        path.mkdir()
        shutil.copy(SHAPES / "shapes0.jpg", path / "a.jpg")


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory) -> StandIns:
    return StandIns(tmp_path_factory.mktemp("stand-ins"))


@pytest.mark.slow
@pytest.mark.parametrize(("page", "text"), blocks("console"))
def test_commands_run(page, text, stand_ins, tmp_path, monkeypatch, capsys):
    stand_ins.put(text, tmp_path)
    monkeypatch.chdir(tmp_path)
    for command, shown in commands(text):
        words = shlex.split(command)
        if words[:2] == ["pip", "install"]:
            extras = re.fullmatch(r"\.\[(.*)\]", words[2])
            assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"]), command
            continue
        assert words[:3] == ["python", "-m", "fusenms"], command
        if words[3] == "engine" and find_spec("tensorrt_rtx") is None:
            continue  # where TensorRT-RTX does not install
        if "--ray" in words and find_spec("ray") is None:
            pytest.skip("needs Ray: pip install 'fusenms[ray]'")
        assert main(words[3:]) == 0, command
        printed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
        stages = [line.split()[0] for line in shown if line[0] not in "┃│"]
        assert [word for word in stages if word not in printed] == [], command


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Each command of a block, and the lines that the page shows of what it prints."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif line.strip():
            found[-1][1].append(line)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python_runs(page, text, stand_ins, tmp_path, monkeypatch):
    if "detect_dataset" in text and find_spec("ray") is None:
        pytest.skip("needs Ray: pip install 'fusenms[ray]'")
    stand_ins.put(text, tmp_path)
    monkeypatch.chdir(tmp_path)
    module = ModuleType("block")  # a home for the classes that a block defines
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(text, page, "exec"), module.__dict__)


def test_there_are_blocks():
    assert len(blocks("console")) >= 20
    assert len(blocks("python")) >= 6


def test_readme_is_one_screen():
    assert len(README.split()) <= 700


def test_readme_has_the_numbers_of_the_pages():
    held = re.search(r"\| all \| (\d+) \|", PAGES["docs/security.md"])[1]
    assert f"[{held} of {held}](docs/security.md#attacks)" in README
    ratio = re.search(r"\*\*fusenms \(ort\)\*\* \| [\d.]+ \((0\.\d\d)\)", PAGES["docs/benchmarks.md"])[1]
    assert f"[{ratio}](docs/benchmarks.md)" in README
    assert "325 of 325" in PAGES["docs/performance.md"]


def test_scaling_page_has_the_numbers_that_its_script_wrote():
    rows = json.loads((DOCS / "scaling.json").read_text())["plans"]
    for row in rows:
        start = f"| {row['rate']:,} | {row['busy_cores']:,.1f} | {row['replicas']:,} | {row['load']:.0%} |"
        assert start in PAGES["docs/concepts/scaling.md"]
    assert [row["rate"] for row in rows] == [10, 1_000, 100_000]


def test_only_readme_and_the_page_on_gpus_say_what_has_not_run():
    pattern = r"not (been )?run( yet| there|;|,|\.)|for want of|not proven"
    where = [name for name in HAND_WRITTEN if re.search(pattern, PAGES[name], re.I)]
    assert [name for name in where if name != "docs/development/add-a-backend.md"] == ["README.md", "docs/gpu.md"]


PRIVATE = re.compile(r"\b(pictures?|strangers?)\b", re.I)
"""Words that the glossary has others for."""


@pytest.mark.parametrize("page", HAND_WRITTEN)
def test_pages_say_what_the_glossary_says(page):
    text = re.sub(r"<!-- \w+: made by .*?<!-- end of", "", PAGES[page], flags=re.S)
    assert PRIVATE.findall(re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)) == []


@cache
def known_flags() -> set[str]:
    subparsers = next(a for a in build_parser()._actions if a.dest == "command")
    every = (*subparsers.choices.values(), build_parser())
    return {flag for parser in every for action in parser._actions for flag in action.option_strings}


OTHER_FLAGS = {
    "--tensorrt", "--record", "--calls",  # of the programs in tests/
    "--onnx", "--plugin", "--static",  # of trtexec
    "--ignore-scripts", "--prefix",  # of npm
    "--rm", "--bind",  # of docker and of Python's http.server
    "--data-binary",  # of curl
}  # fmt: skip


@pytest.mark.parametrize("page", HAND_WRITTEN)
def test_flags_exist(page):
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", PAGES[page]))
    assert named - OTHER_FLAGS <= known_flags()


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    named = re.findall(r"(?:^|`)make ([a-z][a-z-]*)(?![\w./-])", PAGES[page], re.M)
    assert set(named) <= targets


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", PAGES[page]):
        if target.startswith("http"):
            continue
        path = ((ROOT / page).parent / target if target else ROOT / page).resolve()
        assert path.exists(), f"{page}: {target}"
        if anchor:
            text = path.read_text() + (README if path == DOCS / "index.md" else "")
            assert anchor in anchors(text), f"{page}: {target}#{anchor}"


def anchors(text: str) -> set[str]:
    """Anchors of the headings of a page, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"^([a-z][a-z/-]+)$", PAGES["docs/index.md"], re.M))
    pages = {str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md")} - {"index"}
    assert listed == pages


@pytest.mark.parametrize("page", sorted({page for page, _ in reference_pages.PARTS.values()}))
def test_reference_is_what_the_code_says(page):
    text = PAGES[f"docs/reference/{page}"]
    assert reference_pages.written(page, text) == text, "run: python tests/reference_pages.py"


def test_error_when_a_page_lost_a_mark():
    with pytest.raises(SystemExit, match="no marks for errors"):
        reference_pages.written("errors.md", "# nothing")


def test_metadata_page_has_every_key(stand_ins):
    listed = re.findall(r"^\| `([\w.]+)` \|", PAGES["docs/reference/metadata.md"], re.M)
    assert sorted(listed) == sorted(value for name, value in vars(contract).items() if name.startswith("KEY_"))
    path = stand_ins.folder / "metadata.onnx"
    stand_ins.fused(path, "ort")
    assert {item.key for item in onnx.load(path).metadata_props} <= set(listed)


def test_python_page_has_every_public_name():
    import fusenms

    documented = set(re.findall(r"auto(?:class|function):: (\w+)", PAGES["docs/reference/python.md"]))
    assert set(fusenms.__all__) - {"FusenmsError"} <= documented


def test_extras_table_has_every_extra():
    rows = re.findall(r"^\| ((?:`\w+`(?: or |, )?)+) \|", PAGES["docs/get-started.md"], re.M)
    extras = {extra for row in rows for extra in re.findall(r"`(\w+)`", row)}
    assert extras >= set(PROJECT["optional-dependencies"]) - {"test", "dev"}


@pytest.mark.parametrize("figure", sorted((DOCS / "figures").glob("*.svg")), ids=lambda path: path.stem)
def test_figure_is_readable_in_light_and_dark(figure):
    text = figure.read_text()
    root = ElementTree.fromstring(text)
    light, _, dark = text.partition("@media (prefers-color-scheme: dark)")
    classes = {name for element in root.iter() for name in element.get("class", "").split()}
    colored = set(re.findall(r"\.(\w+) \{[^}]*#", light))
    assert colored <= set(re.findall(r"\.(\w+) \{[^}]*#", dark))
    assert "card" in classes  # its own background, whatever the page's is
    width = float(root.get("viewBox").split()[2])
    assert all(0 <= float(e.get("x")) <= width for e in root.iter() if e.get("x"))


def test_version_is_in_the_changelog_or_unreleased():
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()
