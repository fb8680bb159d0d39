"""Half precision as a typed graph: the network is float16 from its input to its head; everything after it stays float32.

TensorRT 11 and TensorRT-RTX compute in the types of the graph, so a half-precision engine needs a half-precision graph. The decode and the
suppression are always float32: float16 resolves the pixels of a large image only to a half, and it cannot hold the offsets of 80 classes.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace

import onnx

from fusenms.artifacts.raw import RawModel
from fusenms.errors import ConfigError, FusionError
from fusenms.graph.custom_ops import foreign_operators
from fusenms.graph.model import constants_as_initializers, sorted_model, with_only_outputs
from fusenms.layout import Layout

PRECISIONS = ("fp32", "fp16", "int8")
PRECISION_TYPES = {"fp16": "float16", "int8": "int8"}
HALF = "float16 up to the head, float32 from there on"
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that take most of a network's time. Everything after the last of them on every path to the head stays float32."""


def to_half(raw: RawModel, layout: Layout) -> RawModel:
    """Convert the network to float16 up to the head's tensors, which are float32 again. Input and other weights keep their types.

    ONNX Runtime's converter (`onnxruntime.transformers.float16`) does the conversion.

    Raises:
        ConfigError: the network is quantized, or in half precision already.
        FusionError: the converted graph is not valid.
    """
    refuse_unless_float32(raw, "fp16")
    half = _joined(*_split(constants_as_initializers(sorted_model(with_only_outputs(raw.model, layout.sources)))))
    try:
        onnx.shape_inference.infer_shapes(half, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise FusionError(
            f"{raw.source}: the graph in half precision is not valid ({error}); please report this"
        ) from error
    return replace(raw, model=half, notes=(*raw.notes, HALF), precision="fp16")


def refuse_unless_float32(raw: RawModel, precision: str) -> None:
    """Refuse a network that is not float32 in standard operators, for a precision that it is to be converted to.

    Raises:
        ConfigError: it is quantized or in half precision already, or has operators of other domains.
    """
    operators = {node.op_type for node in raw.model.graph.node}
    if quantized := sorted(op for op in operators if "Quantize" in op or "Integer" in op):
        raise ConfigError(
            f"{raw.source}: is quantized ({', '.join(quantized)}); precision {precision} is for float32 models: leave it out"
        )
    if any(item.data_type == onnx.TensorProto.FLOAT16 for item in raw.model.graph.initializer):
        raise ConfigError(f"{raw.source}: has weights in half precision already; leave precision {precision} out")
    if foreign := foreign_operators(raw.model):
        raise ConfigError(
            f"{raw.source}: has operators of other domains ({', '.join(foreign)}), which may not take {PRECISION_TYPES[precision]}; leave "
            f"precision {precision} out"
        )


def _split(model: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Return the part with the weights, which ends in the tensors that the rest reads, and the model itself.

    The converter would add casts around each node that it is told to skip, so the rest is not given to it.
    """
    after = nodes_after_weights(model)
    given = {entry.name for entry in model.graph.input} | {item.name for item in model.graph.initializer}
    made_after = {name for node in model.graph.node if node.name in after for name in node.output}
    read = [name for node in model.graph.node if node.name in after for name in node.input if name]
    ends = [name for name in dict.fromkeys(read) if name not in made_after | given]
    ends += [entry.name for entry in model.graph.output if entry.name not in made_after and entry.name not in ends]
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {entry.name: entry for entry in (*inferred.value_info, *inferred.output)}
    network = onnx.ModelProto()
    network.CopyFrom(model)
    del network.graph.output[:]
    network.graph.output.extend(
        types.get(name, onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)) for name in ends
    )
    return sorted_model(network), model


def _joined(network: onnx.ModelProto, model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert the network to half precision and append the rest of the model."""
    from onnxruntime.transformers import float16

    logging.getLogger(float16.__name__).setLevel(logging.ERROR)  # no warning per weight too small for float16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        half = float16.convert_float_to_float16(network, keep_io_types=True)
    after = set(nodes_after_weights(model))
    kept = [node for node in model.graph.node if node.name in after]
    taken = {item.name for item in half.graph.initializer}
    constants = {item.name: item for item in model.graph.initializer}
    for node in kept:
        for i, name in enumerate(node.input):
            if name in constants:
                own = f"{name}/float32"  # the network's constant of that name may be float16 now
                node.input[i] = own
                if own not in taken:
                    taken.add(own)
                    item = half.graph.initializer.add()
                    item.CopyFrom(constants[name])
                    item.name = own
    half.graph.node.extend(kept)
    del half.graph.output[:], half.graph.value_info[:]
    half.graph.output.extend(model.graph.output)
    return sorted_model(half)


def nodes_after_weights(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes from which no weighted operator is reached: the head's decode, if the model contains it.

    A convolution into one channel does not count as weighted: it is the mean over a box distribution, or the head of one class.
    """
    shapes = {item.name: tuple(item.dims) for item in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def weighted(node: onnx.NodeProto) -> bool:
        into_one = any(shapes.get(name, ())[:1] == (1,) for name in node.input[1:2])
        return node.op_type in WEIGHTED and not (node.op_type == "Conv" and into_one)

    leads: dict[str, bool] = {}
    for node in reversed(model.graph.node):
        leads[node.name] = any(
            weighted(reader) or leads[reader.name] for name in node.output for reader in readers.get(name, [])
        )
    return [node.name for node in model.graph.node if not leads[node.name] and not weighted(node)]
