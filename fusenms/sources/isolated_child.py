"""The child process of `fusenms.sources.isolated`.

``python -m fusenms.sources.isolated_child FOLDER`` reads its task from standard input and writes the result to the folder.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from fusenms.errors import FusenmsError
from fusenms.graph.custom_ops import custom_ops
from fusenms.limits import Limits
from fusenms.sources import load
from fusenms.sources.isolated import ERROR, write_raw
from fusenms.sources.options import LoadOptions


def _main() -> None:
    folder, task = Path(sys.argv[1]), json.load(sys.stdin)
    path = Path(task["path"])
    try:
        with custom_ops(*task["custom_ops"]):
            raw = load(path, LoadOptions(limits=Limits(**task["limits"]), **task["options"]))
        write_raw(replace(raw, source=path.name), folder)
    except FusenmsError as error:
        (folder / ERROR).write_text(json.dumps({"error": type(error).__name__, "message": str(error)}))
    except MemoryError:
        message = f"{path}: reading it takes more than {task['limits']['max_isolated_bytes']} bytes of memory"
        (folder / ERROR).write_text(json.dumps({"error": "SourceError", "message": message}))


if __name__ == "__main__":
    _main()
