"""Test whether the IoU of two boxes exceeds a threshold: in the graph, for all pairs, with plain operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fusenms.boxes import PROBIOU_EPSILON, THINNEST
from fusenms.graph.builder import Graph, Tensor

SLACK = 2.0**-21
"""Relative. A threshold and a product are each rounded to 2^-24. The reference's limit for a close call is twenty times as large."""


def upright_limit(g: Graph, threshold: float | Tensor) -> Tensor:
    """The raised threshold, a number or ``[1]`` float32, for `overlap_upright`."""
    if isinstance(threshold, float):
        return g.floats(threshold * (1 + SLACK))
    return g.op("Mul", threshold, g.floats(1 + SLACK))


def oriented_limit(g: Graph, threshold: float | Tensor) -> Tensor:
    """Twice the Bhattacharyya distance at the threshold, a number or ``[1]`` float32, for `overlap_oriented`."""
    if isinstance(threshold, float):
        return g.floats(2 * farthest_overlapping(threshold))
    share = g.op("Mul", threshold, g.op("Sub", g.floats(2.0), threshold))  # 1 - (1 - t)^2 without its cancellation
    return g.op("Mul", g.op("Log", g.op("Add", share, g.floats(PROBIOU_EPSILON))), g.floats(-2.0))


def overlap_upright(g: Graph, boxes: Sequence[Tensor], others: Sequence[Tensor], limit: Tensor) -> Tensor:
    """Whether the IoU of boxes is above the threshold, ``[B, b, n]`` bool.

    The test is intersection > threshold * union. It avoids a division, which not every runtime rounds correctly (OpenVINO multiplies by a
    reciprocal). The threshold is raised by `SLACK`, so that rounding never puts an IoU equal to the threshold above it.

    Args:
        boxes: x1, y1, x2, y2, each ``[B, b, 1]``.
        others: x1, y1, x2, y2 of the other boxes, each ``[B, 1, n]``.
        limit: what `upright_limit` emits.
    """
    (x1, y1, x2, y2), (u1, v1, u2, v2) = boxes, others
    width = g.op("Relu", g.op("Sub", g.op("Min", x2, u2), g.op("Max", x1, u1)))
    height = g.op("Sub", g.op("Min", y2, v2), g.op("Max", y1, v1))  # if negative, so is the intersection
    area = g.op("Mul", g.op("Sub", x2, x1), g.op("Sub", y2, y1))
    other = g.op("Mul", g.op("Sub", u2, u1), g.op("Sub", v2, v1))
    shared = g.op("Mul", width, height)
    union = g.op("Sub", g.op("Add", area, other), shared)
    return g.op("Greater", shared, g.op("Mul", union, limit))


def overlap_oriented(g: Graph, boxes: Sequence[Tensor], others: Sequence[Tensor], limit: Tensor) -> Tensor:
    """Whether the probabilistic IoU of oriented boxes is above the threshold, ``[B, b, n]`` bool.

    A box is a normal distribution with variances w^2/12 and h^2/12 along its sides. The IoU is 1 minus the Hellinger distance of two such
    distributions (Llerena et al., "Gaussian Bounding Boxes and Probabilistic Intersection-over-Union", 2021). It decreases as their
    Bhattacharyya distance increases, so this distance is compared:

        N / (4 D) + ln(D / (4 sqrt(D1 D2))) / 2

    D is the determinant of the sum of the covariances, D1 and D2 are the determinants of the covariances, and N = d^T adj(sum) d, where d
    is the difference of the centers. The usual formulas compute D as a difference of products, which loses its precision in float32 for
    long thin boxes. Here D and N are sums of terms that are not negative:

        D = p1 q1 + p2 q2 + (p1 p2 + q1 q2) sin^2 + (p1 q2 + q1 p2) cos^2    of the angle between the boxes
        N = sum of q (d along the box)^2 + p (d across the box)^2            over both boxes; p and q are the variances

    Args:
        boxes: cx, cy, w, h in pixels and the angle in radians, each ``[B, b, 1]``.
        others: the same values of the other boxes, each ``[B, 1, n]``.
        limit: what `oriented_limit` emits.
    """
    one, two = (_gaussian(g, box) for box in (boxes, others))
    dx, dy = (g.op("Sub", one[i], two[i]) for i in ("x", "y"))

    def mul(*factors: Tensor) -> Tensor:
        product = factors[0]
        for factor in factors[1:]:
            product = g.op("Mul", product, factor)
        return product

    def terms(box: dict[str, Tensor]) -> Tensor:
        along = g.op("Add", mul(dx, box["cos"]), mul(dy, box["sin"]))
        across = g.op("Sub", mul(dy, box["cos"]), mul(dx, box["sin"]))
        return g.op("Add", mul(along, along, box["q"]), mul(across, across, box["p"]))

    sine = g.op("Sub", mul(one["sin"], two["cos"]), mul(one["cos"], two["sin"]))
    square = mul(sine, sine)
    parallel = g.op("Add", mul(one["p"], two["q"]), mul(one["q"], two["p"]))
    crossed = g.op("Add", mul(one["p"], two["p"]), mul(one["q"], two["q"]))
    mixed = g.op("Add", parallel, mul(square, g.op("Sub", crossed, parallel)))
    own = g.op("Add", mul(one["p"], one["q"]), mul(two["p"], two["q"]))
    determinant = g.op("Add", own, mixed)
    apart = g.op("Div", g.op("Add", terms(one), terms(two)), determinant)
    shape = g.op("Log", g.op("Div", determinant, mul(one["area"], two["area"])))  # includes the 4
    distance = g.op("Add", mul(apart, g.floats(0.5)), shape)  # twice the Bhattacharyya distance
    close = g.op("Less", distance, limit)
    return g.op("And", close, g.op("And", one["thick"], two["thick"]))


def farthest_overlapping(threshold: float) -> float:
    """Return the Bhattacharyya distance at which the probabilistic IoU equals the threshold."""
    return -math.log(1 + PROBIOU_EPSILON - (1 - threshold) ** 2)


def _gaussian(g: Graph, box: Sequence[Tensor]) -> dict[str, Tensor]:
    """Terms of one box of each pair: center, variances along and across the box, twice the root of its determinant, sine and cosine."""
    x, y, width, height, angle = box
    area = g.op(
        "Mul", g.op("Mul", width, height), g.floats(1 / 6)
    )  # 2 sqrt(p q), so that the product of two is 4 sqrt(D1 D2)
    along, across = (g.op("Mul", g.op("Mul", side, side), g.floats(1 / 12)) for side in (width, height))
    thick = g.op("Greater", g.op("Min", width, height), g.floats(THINNEST))
    return {
        "x": x, "y": y, "p": along, "q": across, "area": area, "thick": thick,
        "sin": g.op("Sin", angle), "cos": g.op("Cos", angle),
    }  # fmt: skip
