"""The shape of the code: who imports whom, what is public, how fast the import is."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import fusenms
from fusenms import contract, layout

PACKAGE = Path(fusenms.__file__).parent
ORDER = [
    "_version", "artifacts.report", "errors", "limits", "graph", "safety", "onnx_reading", "catalog", "contract", "config", "boxes",
    "layout", "reference", "artifacts", "sources", "heads", "transforms", "fusion", "verification", "benchmark", "engines", "runtime",
    "deployment", "quantization", "events", "pipeline", "inspection", "editing", "conversion", "diagnosis", "comparison", "evaluation",
    "cluster", "serving", "cli",
]  # fmt: skip
"""Folders and modules of the package: each imports from those before it and from itself. The report is a value without imports."""
HEAVY = {"torch", "onnx", "onnxruntime", "onnx_graphsurgeon", "cv2", "rich", "tensorrt", "tensorrt_rtx", "PIL"}


MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
}
"""Name within the package to file, but for the facade and the program, which import everything."""


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, those for type checking too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            inner = [name for name in names if name.removeprefix("fusenms.") in MODULES]
            found.update(inner if len(inner) == len(names) else [*inner, node.module])
    return found


def own_imports(path: Path) -> set[str]:
    """The package's own modules that a file imports, by their names within the package."""
    return {name.removeprefix("fusenms.") for name in imports(path) if name.split(".")[0] == "fusenms"}


def place(module: str) -> str:
    """The entry of `ORDER` that a module belongs to."""
    return module if module in ORDER else module.split(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_file_imports_only_from_above(module):
    own = ORDER.index(place(module))
    below = sorted(name for name in own_imports(MODULES[module]) if ORDER.index(place(name)) > own)
    assert not below, f"{module} imports {below}"


def test_no_import_circle():
    """Imports inside functions and for type checking count."""
    order = graphlib.TopologicalSorter({name: own_imports(path) - {name} for name, path in MODULES.items()})
    order.prepare()  # raises CycleError with the circle


def test_every_module_has_its_place():
    assert {place(module) for module in MODULES} == set(ORDER)


def test_graphsurgeon_is_imported_in_one_folder():
    users = {name for name, path in MODULES.items() if any(n.startswith("onnx_graphsurgeon") for n in imports(path))}
    assert {place(name) for name in users} == {"graph"}


def test_sessions_are_opened_in_one_module():
    users = [name for name, path in MODULES.items() if "InferenceSession(" in path.read_text()]
    assert users == ["graph.session"]


def test_reference_shares_nothing_with_the_emitters():
    for name in ("reference", "boxes"):
        assert not {place(module) for module in own_imports(MODULES[name])} & {"graph", "fusion"}


def test_oracle_shares_nothing_with_the_reference_and_the_emitters():
    """It reads layouts and settings, which are data, and takes no function of theirs."""
    oracle = Path(__file__).parent / "oracle.py"
    assert own_imports(oracle) == {"config", "layout"}
    nodes = [node for node in ast.walk(ast.parse(oracle.read_text())) if isinstance(node, ast.ImportFrom)]
    taken = [alias.name for node in nodes if node.module == "fusenms.layout" for alias in node.names]
    assert taken and all(isinstance(getattr(layout, name), type) for name in taken)


def test_public_names_exist():
    for name in fusenms.__all__:
        assert getattr(fusenms, name) is not None
    assert [name for name in dir(fusenms) if not name.startswith("__")] == sorted(fusenms.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fusenms.nothing  # noqa: B018


def test_import_loads_nothing_heavy():
    code = f"import sys, fusenms; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_metadata_keys_are_those_of_files_that_exist():
    """They stand in files (`ncnn` in deployed ones only), so they stay whatever the modules are called."""
    keys = {getattr(contract, name) for name in vars(contract) if name.startswith("KEY_")}
    own = (
        "version",
        "backend",
        "layout",
        "config",
        "image",
        "decode",
        "precision",
        "suppression",
        "source",
        "notes",
        "verification",
        "ncnn",
    )
    assert keys == {f"fusenms.{name}" for name in own} | {
        "names", "stride", "task", "imgsz", "kpt_shape", "batch", "end2end", "args",
    }  # fmt: skip
