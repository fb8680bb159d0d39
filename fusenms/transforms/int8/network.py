"""`to_int8`: a raw model whose network has Q/DQ pairs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import onnx

from fusenms.artifacts.raw import RawModel
from fusenms.errors import ConfigError, FusionError, first_line
from fusenms.graph.model import constants_as_initializers, sorted_model, with_only_outputs
from fusenms.graph.newer_opset import opset_of
from fusenms.layout import Layout
from fusenms.transforms.half_precision import refuse_unless_float32
from fusenms.transforms.int8.calibration import Calibrated, quiet
from fusenms.transforms.int8.places import Places

INT8 = "int8 up to the last convolutions, float32 from there on"
OLDEST = 13
"""The first opset whose Q/DQ operators have a scale for each channel."""


@dataclass(frozen=True)
class Scheme:
    """What is quantized, and how. Weights are always int8 with a scale for each output channel and zero point 0.

    Attributes:
        name: for messages.
        signed: activations are int8 with zero point 0, else uint8 with any zero point.
        inputs_only: only tensors that a convolution reads are quantized, and biases stay float32; else its result and the operators
            between convolutions too.
    """

    name: str
    signed: bool
    inputs_only: bool


SCHEMES = {
    "ort": Scheme("uint8 activations, int8 operators between convolutions", False, False),
    "tensorrt": Scheme("int8 activations around 0, what convolutions read", True, True),
}
"""For ONNX Runtime and OpenVINO on CPUs, whose kernels take uint8; for TensorRT and TensorRT-RTX, which take int8 with zero point 0."""


def network_of(raw: RawModel, layout: Layout) -> onnx.ModelProto:
    """Return the network up to the tensors of its head, as `places` and `to_int8` take it.

    Raises:
        ConfigError: the network is quantized or in half precision already, has operators of other domains, or an old opset.
    """
    refuse_unless_float32(raw, "int8")
    if opset_of(raw.model) < OLDEST:
        raise ConfigError(
            f"{raw.source}: opset {opset_of(raw.model)}; expected at least {OLDEST} for precision int8. Export again with a newer opset"
        )
    network = constants_as_initializers(sorted_model(with_only_outputs(raw.model, layout.sources)))
    return onnx.shape_inference.infer_shapes(network)


def to_int8(
    raw: RawModel,
    network: onnx.ModelProto,
    where: Places,
    calibrated: Calibrated,
    *,
    scheme: Scheme,
    keep_float: Collection[str] = (),
) -> RawModel:
    """Return the raw model with the network in int8.

    Args:
        network: what `network_of` returned.
        where: what `places` returned for it.
        keep_float: names of convolutions that stay float32, beside the first and the last.

    Raises:
        ConfigError: no convolution is left to quantize.
        FusionError: the quantized graph is not valid.
    """
    layers = [layer for layer in where.layers if layer.name not in keep_float]
    if not layers:
        raise ConfigError(
            f"{raw.source}: has no convolutions to quantize (the {len(where.first)} first, the {len(where.last)} last and "
            f"{len(where.layers)} more stay float32); leave precision int8 out"
        )
    kept = {name for layer in where.layers if layer.name in keep_float for name in layer.nodes}
    nodes = [layer.name for layer in layers]
    if not scheme.inputs_only:
        nodes += [name for name in where.between if name not in kept]
    model = _quantized(network, nodes, calibrated, scheme)
    try:
        onnx.checker.check_model(model)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise FusionError(f"{raw.source}: the graph in int8 is not valid ({error}); please report this") from error
    floats = len(where.first) + len(where.last) + len(where.layers) - len(layers)
    note = f"{INT8} · {len(layers)} convolutions in int8, {floats} in float32 · ranges from {calibrated.images} images"
    return replace(raw, model=model, notes=(*raw.notes, note), precision="int8")


def _quantized(network: onnx.ModelProto, nodes: list[str], calibrated: Calibrated, scheme: Scheme) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    copy = onnx.ModelProto()
    copy.CopyFrom(network)
    kinds = sorted({node.op_type for node in network.graph.node if node.name in set(nodes)})
    options = {"ActivationSymmetric": True} if scheme.signed else {}
    if scheme.inputs_only:
        options |= {"OpTypesToExcludeOutputQuantization": kinds, "QuantizeBias": False}  # type: ignore[dict-item]
    activations = QuantType.QInt8 if scheme.signed else QuantType.QUInt8
    with quiet():
        quantizer = QDQQuantizer(
            copy, True, False, QuantType.QInt8, activations, calibrated.ranges, nodes, [], kinds, options
        )  # per channel, all eight bits
        try:
            quantizer.quantize_model()
        except (ValueError, KeyError, TypeError) as error:
            raise FusionError(
                f"ONNX Runtime cannot quantize the network ({first_line(error)}); please report this"
            ) from error
    model: onnx.ModelProto = quantizer.model.model
    return sorted_model(model)
