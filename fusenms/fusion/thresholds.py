"""The thresholds in the graph: constants, or optional inputs that a run may set (`PostprocessConfig.runtime_thresholds`).

The inputs and what is computed from them are used outside of loop bodies only: onnx-graphsurgeon takes an input with a default for a
constant, and writes a constant that a body uses into that body.
"""

from __future__ import annotations

import math

import numpy as np

from fusenms import contract
from fusenms.config import PostprocessConfig
from fusenms.graph.builder import DOUBLE, FLOAT, Graph, Tensor
from fusenms.layout import Activation, Layout


def declare_inputs(g: Graph, layout: Layout, config: PostprocessConfig) -> None:
    """Add the optional inputs of the settings to the graph."""
    for given in layout.runtime_inputs(config):
        g.add_optional_input(given.name, given.default, given.shape)


def iou_threshold(g: Graph, config: PostprocessConfig) -> float | Tensor:
    """The IoU threshold: a number, or an input ``[1]`` float32."""
    return g.tensor(contract.IOU_THRESHOLD) if config.runtime_thresholds else config.iou_threshold


def class_mask(g: Graph) -> Tensor:
    """The input that says which classes count, ``[C]`` bool."""
    return g.tensor(contract.CLASS_MASK)


def class_thresholds(g: Graph, layout: Layout, activation: Activation) -> Tensor:
    """Emit what the scores of each class are compared with, ``[C]`` float32: +infinity for a class that does not count.

    ``[1]`` for a head that gives labels itself. With a sigmoid, scores are logits.
    """
    given = g.tensor(contract.SCORE_THRESHOLD)
    compared = _strict_logits(g, given) if activation is Activation.SIGMOID else given
    return g.where(class_mask(g), compared, g.floats(np.inf)) if layout.labels is None else compared


def strict_threshold(score_threshold: float, activation: Activation) -> np.float32:
    """Return the float32 t such that a float32 score x is above the threshold exactly if ``x > t``.

    With a sigmoid, scores are logits, and t is the largest float32 not above the logit of the threshold.
    """
    value = float(np.float32(score_threshold))
    if activation is Activation.SIGMOID:
        if value <= 0 or value >= 1:
            return np.float32(-np.inf if value <= 0 else np.inf)
        value = 2 * math.atanh(2 * value - 1) if 0.25 < value < 0.75 else math.log(value) - math.log1p(-value)
    near = np.float32(value)
    return near if float(near) <= value else np.nextafter(near, np.float32(-np.inf))


_NEAR = 2.0**-6
"""How far 2 p - 1 is from 0 where a logit is the sum of a series: the difference of two logarithms has lost digits there."""


def _strict_logits(g: Graph, probabilities: Tensor) -> Tensor:
    """Emit `strict_threshold` with a sigmoid for probabilities ``[n]`` float32, in float64. A float64 holds 1 - p exactly, or nearly so.

    A rounded logit that is above the exact one is replaced by the float32 below it: less half of its last place and a little more,
    rounded again.
    """

    def number(value: float) -> Tensor:
        return g.const(value, np.float64)

    p = g.cast(probabilities, DOUBLE)
    x = g.op("Sub", g.op("Add", p, p), number(1))
    square = g.op("Mul", x, x)
    series = number(1 / 9)  # 2 atanh(x) = 2 x (1 + x^2 / 3 + x^4 / 5 + ...)
    for factor in (1 / 7, 1 / 5, 1 / 3, 1.0):
        series = g.op("Add", g.op("Mul", series, square), number(factor))
    near_half = g.op("Mul", g.op("Add", x, x), series)
    logs = g.op("Sub", g.op("Log", p), g.op("Log", g.op("Sub", number(1), p)))
    exact = g.where(g.op("Less", square, number(_NEAR**2)), near_half, logs)
    near = g.cast(exact, FLOAT)
    back = g.cast(near, DOUBLE)
    step = g.op("Mul", g.op("Abs", back), number(2**-24 * (1 + 2**-20)))
    return g.where(g.op("Greater", back, exact), g.cast(g.op("Sub", back, step), FLOAT), near)
