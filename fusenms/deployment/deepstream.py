"""DeepStream: the file of `nvinfer`, with DeepStream's own parser for EfficientNMS.

`NvDsInferParseCustomEfficientNMS` reads four outputs by their place, whatever their names: the count (int32), boxes in pixels of the input
(float32, xyxy), scores (float32), labels (int32). Other outputs, and boxes with an angle, are none of those.
"""

from __future__ import annotations

from pathlib import Path

from fusenms import contract
from fusenms.artifacts.fused import FusedModel, refuse_frames
from fusenms.deployment.base import (
    BATCH,
    Deployment,
    Wanted,
    labels_file,
    model_name,
    outputs_of,
    read_fused,
    refuse_one_tensor,
    refuse_other_builders,
)
from fusenms.engines.running import ENGINES
from fusenms.errors import ConfigError, UnsupportedByBackendError
from fusenms.onnx_reading.tensors import TensorInfo
from fusenms.runtime.opening import EngineFile, read_engine
from fusenms.safety.files import write_folder

CONFIG, LABELS = "config_infer.txt", "labels.txt"
BACKENDS = ("trt", "portable")
"""Backends whose files DeepStream's TensorRT builds, without a library of ours."""
PARSER = "NvDsInferParseCustomEfficientNMS"
LIBRARY = "/opt/nvidia/deepstream/deepstream/lib/libnvds_infercustomparser.so"
MODES = {"fp32": 0, "int8": 1, "fp16": 2}


def deploy_deepstream(path: Path, output: Path, wanted: Wanted) -> Deployment:
    """Write the model, ``labels.txt`` and ``config_infer.txt``. Errors are those of `fusenms.deploy`."""
    name = model_name(path)
    if path.suffix.lower() in ENGINES:
        file = read_engine(path, wanted.limits)
        _check_engine(path, file)
        fused, data, model, most = file.fused, file.engine.data, f"{name}.engine", file.batches[1]
        if wanted.half:
            raise ConfigError(f"found half, but {path} is an engine, whose precision is fixed; leave it out")
        outputs = outputs_of(path, file)
    else:
        onnx_file = read_fused(path, wanted.limits)
        fused, data, model = onnx_file.fused, onnx_file.data, f"{name}.onnx"
        outputs = onnx_file.outputs
        _check_file(path, fused)
        most = fused.image.batch or wanted.batch or BATCH
    _check_model(path, fused, outputs)
    most = most if fused.image.independent else 1
    if wanted.batch is not None and wanted.batch > most:
        raise ConfigError(f"batch is {wanted.batch}, but {path} takes at most {most}; leave it out")
    values = settings(fused, model, wanted.batch or most, wanted.half)
    text = "\n".join(("[property]", *(f"{key}={value}" for key, value in values.items()), "", "[class-attrs-all]",
                      f"pre-cluster-threshold={fused.config.score_threshold!r}", ""))  # fmt: skip
    labels = labels_file(path, fused.class_names, without=";")
    files = write_folder(output, {model: data, LABELS: labels, CONFIG: text.encode()}, path)
    said = (
        f"outputs {', '.join(one.name for one in outputs)} are what {PARSER} reads · {len(fused.class_names)} classes"
    )
    return Deployment(output, tuple(files), (said,))


def settings(fused: FusedModel, model: str, batch: int, half: bool) -> dict[str, str | int]:
    """The group ``property`` of nvinfer's file. The model takes RGB from 0 to 1; nvinfer scales from 0 to 255."""
    mode = MODES["fp16" if half else fused.precision]
    engine = not model.endswith(".onnx")
    built = model if engine else f"{model}_b{batch}_gpu0_{'fp16' if mode else 'fp32'}.engine"
    return {
        "gpu-id": 0,
        "gie-unique-id": 1,
        "process-mode": 1,
        "network-type": 0,
        **({} if engine else {"onnx-file": model}),
        "model-engine-file": built,
        "labelfile-path": LABELS,
        "batch-size": batch,
        "network-mode": mode,
        "infer-dims": f"3;{fused.image.height};{fused.image.width}",
        "net-scale-factor": repr(1 / 255),
        "offsets": "0;0;0",
        "model-color-format": 0,
        "maintain-aspect-ratio": int(not fused.image.stretch),
        "symmetric-padding": 1,
        "scaling-filter": 1,
        "num-detected-classes": len(fused.class_names),
        "cluster-mode": 4,
        "parse-bbox-func-name": PARSER,
        "custom-lib-path": LIBRARY,
    }


def _check_engine(path: Path, file: EngineFile) -> None:
    """Refuse an engine that nvinfer does not run.

    Raises:
        UnsupportedByBackendError: it does not.
    """
    refuse_other_builders(path, file, "DeepStream")
    shapes = file.engine.info["inputs"][file.fused.image.tensor]
    if file.batches[0] != 1 or shapes["min"][1:] != shapes["max"][1:]:
        raise UnsupportedByBackendError(
            f"{path}: its profile is {shapes['min']} to {shapes['max']}; DeepStream needs batches from 1 and one image size"
        )


def _check_file(path: Path, fused: FusedModel) -> None:
    """Refuse an `.onnx` that nvinfer does not build.

    Raises:
        UnsupportedByBackendError: it does not.
    """
    refuse_frames(path, fused.image, "DeepStream")
    if fused.backend not in BACKENDS:
        raise UnsupportedByBackendError(
            f"{path}: its backend is {fused.backend}; expected {' or '.join(map(repr, BACKENDS))}, which DeepStream builds: convert it, or "
            "build an engine of TensorRT and deploy that"
        )
    if fused.image.dynamic_size:
        raise UnsupportedByBackendError(
            f"{path}: its image size is dynamic, and DeepStream needs one; fuse the weights without dynamic_size"
        )
    if fused.image.batch not in (None, 1):
        raise UnsupportedByBackendError(
            f"{path}: its batch is fixed at {fused.image.batch}, and DeepStream runs fewer images too; fuse the weights without batch"
        )
    if fused.config.runtime_thresholds:
        raise UnsupportedByBackendError(
            f"{path}: its thresholds are inputs, which DeepStream does not feed; fuse the weights without runtime_thresholds"
        )
    if fused.precision == "int8":
        raise UnsupportedByBackendError(
            f"{path}: its precision is int8, which DeepStream builds from calibration tables; build an engine of TensorRT, and deploy that"
        )


def _check_model(path: Path, fused: FusedModel, outputs: tuple[TensorInfo, ...]) -> None:
    """Refuse a model whose outputs the parser does not read.

    Raises:
        UnsupportedByBackendError: it does not.
    """
    refuse_one_tensor(path, fused, "DeepStream")
    if fused.task != "detect":
        raise UnsupportedByBackendError(
            f"{path}: is for the task {fused.task}; DeepStream's parser {PARSER} reads upright boxes alone"
        )
    expected = list(fused.config.output_names)
    found = [one.name for one in outputs]
    types = [str(output.dtype) for output in contract.OUTPUTS]
    if found != expected or [one.dtype for one in outputs] != types:
        more = [name for name in found if name not in expected]
        known = {contract.INDICES: "indices", contract.CONVERGED: "rounds"}
        cure = " and ".join(known[name] for name in more if name in known)
        raise UnsupportedByBackendError(
            f"{path}: its outputs are {', '.join(map(str, outputs))}; DeepStream's parser {PARSER} reads {', '.join(expected)}, of types "
            f"{', '.join(types)}, in this order, and no others{f': fuse the weights without {cure}' if cure else ''}"
        )
