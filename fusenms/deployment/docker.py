"""Docker: what builds an image of `fusenms serve` with one fused file in it."""

from __future__ import annotations

import json
from pathlib import Path

from fusenms._version import __version__
from fusenms.deployment.base import Deployment, Wanted, model_name, read_fused, run_there
from fusenms.safety.files import write_folder

REQUIREMENT = f"fusenms[cpu,serve]=={__version__}"
PORT = 8000
READY = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{PORT}/v2/health/ready', timeout=2)"


def deploy_docker(path: Path, output: Path, wanted: Wanted) -> Deployment:
    """Write the file, ``requirements.txt``, ``.dockerignore`` and ``Dockerfile``. Errors are those of `fusenms.deploy`."""
    name = model_name(path)
    file = read_fused(path, wanted.limits)
    checked = run_there(path, file, "the server")
    files = {
        path.name: file.data,
        "requirements.txt": f"{REQUIREMENT}\n".encode(),
        ".dockerignore": f"*\n!{path.name}\n!requirements.txt\n!*.whl\n".encode(),
        "Dockerfile": dockerfile(path.name).encode(),
    }
    written = write_folder(output, files, path)
    return Deployment(output, tuple(written), (checked, f"serves the model {name} on port {PORT}"))


def dockerfile(file: str) -> str:
    """The text of ``Dockerfile``. Wheels that lie beside it are taken before those of the package index."""
    serve = ["fusenms", "serve", f"/models/{file}", "--host", "0.0.0.0", "--port", str(PORT)]
    return f"""\
FROM python:3.12-slim
RUN useradd --create-home --uid 10001 fusenms
COPY requirements.txt *.whl /opt/fusenms/
RUN pip install --no-cache-dir --find-links /opt/fusenms --requirement /opt/fusenms/requirements.txt
COPY {file} /models/
USER fusenms
EXPOSE {PORT}
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD {json.dumps(["python", "-c", READY])}
ENTRYPOINT {json.dumps(serve)}
"""
