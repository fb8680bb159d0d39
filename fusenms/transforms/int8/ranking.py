"""What each convolution costs in int8: how far the head moves if it alone is quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from fusenms.artifacts.raw import RawModel
from fusenms.graph.session import Session
from fusenms.layout import Layout
from fusenms.transforms.int8.calibration import Calibrated
from fusenms.transforms.int8.network import Scheme, to_int8
from fusenms.transforms.int8.places import Places


@dataclass(frozen=True)
class Cost:
    """What one convolution costs: the root mean square of what it changes in the head, as a share of the head's standard deviation."""

    layer: str
    error: float


def rank(
    raw: RawModel,
    layout: Layout,
    network: onnx.ModelProto,
    where: Places,
    *,
    calibrated: Calibrated,
    scheme: Scheme,
    images: Sequence[np.ndarray],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Cost]:
    """Quantize each convolution alone, run images, and compare the head with that of float32. The dearest comes first.

    Args:
        images: inputs of the network ``[B, 3, height, width]`` float32.

    Raises:
        RunError: the network does not run.
    """
    names = layout.sources

    def heads(model: onnx.ModelProto) -> list[list[np.ndarray]]:
        session = Session(model, source=raw.source, max_seconds=raw.limits.max_run_seconds)
        values = [session.run({raw.image.tensor: image}, names) for image in images]
        session.close()
        return values

    exact = heads(network)
    scales = [float(np.std([run[i] for run in exact])) or 1.0 for i in range(len(names))]
    costs, every = [], {layer.name for layer in where.layers}
    for done, layer in enumerate(where.layers):
        own = tuple(name for name in layer.activation if name in where.between)
        only = replace(where, between=own)
        alone = to_int8(raw, network, only, calibrated, scheme=scheme, keep_float=every - {layer.name})
        changed = heads(alone.model)
        shares = [
            np.mean(np.square((new[i] - old[i]) / scales[i]))
            for new, old in zip(changed, exact, strict=True)
            for i in range(len(names))
        ]
        costs.append(Cost(layer.name, float(np.sqrt(np.mean(shares)))))
        progress(done + 1, len(where.layers))
    return sorted(costs, key=lambda cost: -cost.error)
