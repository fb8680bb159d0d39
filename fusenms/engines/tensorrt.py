"""Engines of TensorRT 8.5 to 11, built on a machine with an NVIDIA GPU from fused files with or without plugins."""

from __future__ import annotations

from fusenms.engines.base import Engine, EngineSettings
from fusenms.engines.nvidia import Library, build
from fusenms.errors import BackendUnavailableError
from fusenms.verification.checks import OnProgress

CURES = {
    "DynamicQuantizeLinear": "dynamic int8 files are for CPUs: take the float file that this one was made from",
    "ConvInteger": "dynamic int8 files are for CPUs: take the float file that this one was made from",
    "EfficientNMS_TRT": "fuse the weights again with backend='portable'",
    "TopK": "TensorRT's TopK needs a fixed number of at most 3840: lower max_candidates",
}
"""Advice for each operator that the parser or the builder refuses."""


def build_tensorrt(path: str, settings: EngineSettings, progress: OnProgress | None = None) -> Engine:
    """Build an engine from an ONNX file, for the GPU of this machine.

    Raises:
        BackendUnavailableError: TensorRT is not installed.
        UnsupportedByBackendError, EngineBuildError, ConfigError, SourceError: as in `fusenms.engines.nvidia.build`.
    """
    return build(load_tensorrt(), path, settings, progress)


def load_tensorrt() -> Library:
    """Import TensorRT.

    Raises:
        BackendUnavailableError: TensorRT is not installed.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise BackendUnavailableError(
            f"TensorRT is not installed ({error}); install it with: pip install 'fusenms[trt]', on a machine with an NVIDIA GPU"
        ) from error
    return Library(tensorrt, "TensorRT", CURES)
