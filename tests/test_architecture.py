"""The shape of the code: who imports whom, what is public, how fast the import is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fusenms

PACKAGE = Path(fusenms.__file__).parent
ORDER = [
    "errors", "limits", "text", "files", "isolation", "sessions", "onnx_reading", "catalog", "contract", "config", "boxes", "layout",
    "reference", "graph", "artifacts", "sources", "heads", "batch", "precision", "decoding", "choosing", "backends", "fusion", "scenes",
    "diagnosis", "further", "verification", "drift", "benchmark", "engines", "pipeline", "runtime", "cli",
]  # fmt: skip
HEAVY = {"torch", "onnx", "onnxruntime", "onnx_graphsurgeon", "cv2", "rich", "tensorrt", "tensorrt_rtx", "PIL"}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Modules that a file imports, but for type checking only."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            return
        if top_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file_imports_only_from_above(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = {name.split(".")[1] for name in imports(path) if name.startswith("fusenms.")} & {p.stem for p in FILES} | {
        name.split(".")[1] for name in imports(path) if name.startswith("fusenms.") and name.split(".")[1] in ORDER
    }
    below = sorted(name for name in names if name in ORDER and ORDER.index(name) > ORDER.index(room))
    assert not below, f"{room} imports {below}"


def test_every_room_has_its_place():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms == set(ORDER)


def test_graphsurgeon_is_imported_in_one_file():
    users = [path.name for path in FILES if any(name.startswith("onnx_graphsurgeon") for name in imports(path))]
    assert users == ["graph.py"]


def test_reference_shares_nothing_with_the_emitters():
    forbidden = {"graph", "decoding", "backends", "choosing", "fusion"}
    for name in ("reference.py", "boxes.py"):
        used = {module.split(".")[1] for module in imports(PACKAGE / name) if module.startswith("fusenms.")}
        assert not used & forbidden


def test_public_names_exist():
    for name in fusenms.__all__:
        assert getattr(fusenms, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fusenms.nothing  # noqa: B018


def test_import_loads_nothing_heavy():
    code = f"import sys, fusenms; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
