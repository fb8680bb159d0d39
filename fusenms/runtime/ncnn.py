"""A detector deployed for ncnn: the network up to its head runs in ncnn, the late decode and the suppression behind it in ONNX Runtime.

A folder holds `NETWORK` and `WEIGHTS`, which ncnn reads, and `TAIL`, the rest of the fused graph with its metadata, which also has the
SHA-256 of the other two: files of different exports do not mix.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusenms.artifacts.fused import FusedModel, from_metadata
from fusenms.contract import KEY_NCNN
from fusenms.errors import BackendUnavailableError, RunError, SourceError, first_line
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.limits import Limits
from fusenms.onnx_reading import untrusted
from fusenms.onnx_reading.files import read_metadata, read_onnx
from fusenms.onnx_reading.metadata import read_json
from fusenms.safety.files import sha256

NETWORK, WEIGHTS, TAIL = "network.ncnn.param", "network.ncnn.bin", "tail.onnx"
SUFFIX = ".ncnn"
"""Of the folder."""
HALF = "fp16"


def load_ncnn(folder: str | os.PathLike[str], limits: Limits) -> FusedModel:
    """Read a folder that `fusenms.deploy` wrote. The model is the tail alone: it starts at the head's tensors.

    Raises:
        SourceError: a file is missing, damaged, of another export, or exceeds a limit.
    """
    place = Path(folder)
    model = read_onnx(place / TAIL, limits)
    metadata = read_metadata(model)
    if KEY_NCNN not in metadata:
        raise SourceError(f"{folder}: {TAIL} was not made for ncnn; make such a folder with fusenms.deploy")
    with untrusted(folder, "reading its metadata"):
        try:
            fused = from_metadata(model, metadata, limits)
            sums = dict(read_json(metadata[KEY_NCNN], limits))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, SourceError) as error:
            raise SourceError(
                f"{folder}: its metadata is damaged ({first_line(error)}); deploy the model again"
            ) from error
    for name in (NETWORK, WEIGHTS):
        if sha256(place / name, limits.max_file_bytes) != sums.get(name):
            raise SourceError(f"{folder}: {name} is not the one that {TAIL} was written with; deploy the model again")
    return fused


def ncnn_metadata(param: bytes, weights: bytes) -> dict[str, str]:
    """What the metadata of the tail says of the files of ncnn."""
    sums = {NETWORK: hashlib.sha256(param).hexdigest(), WEIGHTS: hashlib.sha256(weights).hexdigest()}
    return {KEY_NCNN: json.dumps(sums)}


class NcnnRunner:
    """A deployed model, open in ncnn and ONNX Runtime. Images run one by one."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        fused: FusedModel,
        threads: int | None = None,
        max_seconds: float | None = None,
    ) -> None:
        """Open the files.

        Args:
            fused: what `load_ncnn` gave.
            threads: number of threads of one run; default: chosen by ncnn and by ONNX Runtime.
            max_seconds: limit on the time of the tail; default: that of the model's limits.

        Raises:
            BackendUnavailableError: ncnn is not installed.
            SourceError: ncnn cannot read the network.
        """
        self._ncnn, self._folder = _ncnn(), str(folder)
        self._net = self._ncnn.Net()
        if threads is not None:
            self._net.opt.num_threads = threads
        if fused.precision != HALF:  # the default converts float32 to float16 on CPUs that have it
            self._net.opt.use_fp16_packed = self._net.opt.use_fp16_storage = self._net.opt.use_fp16_arithmetic = False
        place = Path(folder)
        if self._net.load_param(str(place / NETWORK)) or self._net.load_model(str(place / WEIGHTS)):
            raise SourceError(
                f"{folder}: ncnn {self._ncnn.__version__} cannot read its network; deploy the model again with this version"
            )
        seconds = fused.limits.max_run_seconds if max_seconds is None else max_seconds
        self._tail = OnnxRuntimeRunner(fused.model, threads=threads, source=self._folder, max_seconds=seconds)
        dims = {
            entry.name: [d.dim_value for d in entry.type.tensor_type.shape.dim] for entry in fused.model.graph.input
        }
        self._shapes = {name: dims[name][1:] for name in self._tail.inputs}

    def head(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Run the network on images ``[B, 3, height, width]`` float32; return the tensors of the head by name.

        Raises:
            RunError: ncnn fails.
        """
        found: dict[str, list[np.ndarray]] = {name: [] for name in self._shapes}
        for image in images:
            extractor = self._net.create_extractor()
            extractor.input("in0", self._ncnn.Mat(np.ascontiguousarray(image)).clone())
            for index, (name, shape) in enumerate(self._shapes.items()):
                status, value = extractor.extract(f"out{index}")
                array = np.array(value)
                if status or array.size != np.prod(shape):
                    raise RunError(f"{self._folder}: ncnn gives {list(array.shape)} for {name}; expected {shape}")
                found[name].append(array.reshape(shape).astype(np.float32))
        return {name: np.stack(values) for name, values in found.items()}

    def infer(self, images: np.ndarray, more: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Run on images ``[B, 3, height, width]`` float32 and optional inputs of the tail; return outputs by name.

        Raises:
            RunError: ncnn or ONNX Runtime fails, or does not finish within the time limit.
        """
        return self._tail.run(self.head(images) | dict(more or {}))

    def close(self) -> None:
        self._net.clear()
        self._tail.close()


def _ncnn() -> Any:
    try:
        import ncnn
    except ImportError as error:
        raise BackendUnavailableError(
            f"ncnn is not installed ({error}); install it with: pip install 'fusenms[ncnn]'"
        ) from error
    return ncnn
