"""Engines of TensorRT-RTX (`pip install tensorrt-rtx`). Building an engine needs no GPU, but running one does.

TensorRT-RTX has no plugins and no kernel for `NonMaxSuppression`. So it supports files of the backend ``portable``, and models that need
no suppression. Its networks are strongly typed: an engine computes in the types of its graph.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from fusenms.engines.base import Engine, EngineSettings
from fusenms.engines.nvidia import Library, build
from fusenms.errors import BackendUnavailableError, UnsupportedByBackendError
from fusenms.onnx_reading.files import read_onnx
from fusenms.verification.checks import OnProgress

CURES = {
    "NonMaxSuppression": "fuse the weights again with backend='portable'",
    "NonZero": "fuse the weights again with backend='portable'",
    "EfficientNMS_TRT": "fuse the weights again with backend='portable'",
    "DynamicQuantizeLinear": "dynamic int8 files are for CPUs: take the float file that this one was made from",
    "ConvInteger": "dynamic int8 files are for CPUs: take the float file that this one was made from",
    "TopK": "TensorRT's TopK needs a fixed number of at most 3840: lower max_candidates",
}
"""Advice for each operator that the parser or the builder refuses."""


def build_rtx(path: str, settings: EngineSettings, progress: OnProgress | None = None) -> Engine:
    """Build an engine from an ONNX file.

    Raises:
        BackendUnavailableError: TensorRT-RTX is not installed.
        UnsupportedByBackendError, EngineBuildError, ConfigError, SourceError: as in `fusenms.engines.nvidia.build`.
    """
    library = load_rtx()
    refuse_nms(path, read_onnx(Path(path)), library)
    return build(library, path, settings, progress)


def refuse_nms(path: str, model: onnx.ModelProto, library: Library) -> None:
    """Refuse `NonMaxSuppression`, which the parser accepts although the builder has no kernel for it.

    Raises:
        UnsupportedByBackendError: the graph has a `NonMaxSuppression` node.
    """
    if node := next((node for node in model.graph.node if node.op_type == "NonMaxSuppression"), None):
        raise UnsupportedByBackendError(
            f"{path}: {library.name} has no kernel for NonMaxSuppression (node {node.name!r}); {CURES['NonMaxSuppression']}"
        )


def load_rtx() -> Library:
    """Import TensorRT-RTX.

    Raises:
        BackendUnavailableError: TensorRT-RTX is not installed.
    """
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise BackendUnavailableError(
            f"TensorRT-RTX is not installed ({error}); install it with: pip install 'fusenms[rtx]'"
        ) from error
    return Library(tensorrt_rtx, "TensorRT-RTX", CURES)
