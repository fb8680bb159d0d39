"""Which tensors of two runs hold the same values, and which of the others stand at the same place.

Names say nothing: exporters, optimizers and runtimes name tensors as they like, fold BatchNorm into convolutions and split one operator
into several. So tensors are paired by value, and the rest by their order, shape and operator.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fusenms.comparison.runs import Place

COLUMNS = 61
"""Numbers of a sketch. The columns are prime, so that they mix the channels of a tensor."""
HUGE = np.float32(1e15)
FAR = 0.7
"""Sketches farther from each other are not those of one tensor; as a share of its norm."""


@dataclass(frozen=True)
class Sketch:
    """A tensor of several images in a few numbers. Distances between sketches estimate those between tensors of one size."""

    shapes: tuple[tuple[int, ...], ...]
    sums: np.ndarray
    norm: float
    finite: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape for one image, without dimensions of 1."""
        return tuple(side for side in self.shapes[0] if side != 1)


def sketch(value: np.ndarray) -> Sketch:
    """Return the sketch of a tensor of one image: sums of its numbers with random signs."""
    flat = value.ravel().astype(np.float32, copy=False)
    finite = bool(np.isfinite(flat.min(initial=0)) and np.isfinite(flat.max(initial=0)))
    if not finite:
        flat = np.where(np.isfinite(flat), flat, np.float32(0))
    flat = np.clip(flat, -HUGE, HUGE)
    whole = flat.size // COLUMNS * COLUMNS
    signed = flat * _random_signs(1 << max(flat.size - 1, 1).bit_length())[: flat.size]
    sums = signed[:whole].reshape(-1, COLUMNS).sum(0, dtype=np.float64)
    sums[: flat.size - whole] += signed[whole:]
    return Sketch((value.shape,), sums, float(np.linalg.norm(flat)), finite)


def joined(parts: Sequence[Sketch]) -> Sketch:
    """The sketch of a tensor of several images."""
    return Sketch(
        tuple(part.shapes[0] for part in parts),
        np.concatenate([part.sums for part in parts]),
        float(np.linalg.norm([part.norm for part in parts])),
        all(part.finite for part in parts),
    )


@lru_cache(maxsize=4)
def _random_signs(size: int) -> np.ndarray:
    return np.random.default_rng(7).choice(np.array([-1.0, 1.0], np.float32), size)


def distances(one: Sequence[Sketch], two: Sequence[Sketch]) -> np.ndarray:
    """Estimate the distances between tensors of one size, as shares of the larger norm: ``[len(one), len(two)]``."""
    a, b = np.stack([s.sums for s in one]), np.stack([s.sums for s in two])
    norms = np.maximum(np.array([s.norm for s in one])[:, None], np.array([s.norm for s in two])[None])
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0)) / np.maximum(norms, 1e-30)


def candidates(one: Mapping[int, Sketch], two: Mapping[int, Sketch]) -> list[tuple[int, int]]:
    """Pairs of tensors of one size whose values may be the same: of each tensor, the nearest of the other run."""
    by_size: dict[tuple[int, ...], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for side, sketches in enumerate((one, two)):
        for number, found in sketches.items():
            by_size[found.sizes][side].append(number)
    pairs = set()
    for mine, others in by_size.values():
        if not mine or not others:
            continue
        far = distances([one[i] for i in mine], [two[j] for j in others])
        near = {(i, int(j)) for i, j in enumerate(far.argmin(1))} | {(int(i), j) for j, i in enumerate(far.argmin(0))}
        pairs |= {(mine[i], others[j]) for i, j in near if far[i, j] < FAR}
    return sorted(pairs, key=lambda pair: (pair[1], pair[0]))


def largest_share(one: np.ndarray, two: np.ndarray) -> float:
    """Largest difference of two tensors of one size, as a share of the largest value of the first. Infinite if only one is finite there."""
    if one.size != two.size:
        return float("inf")
    a, b = one.ravel(), two.ravel()
    if a.dtype == b.dtype == np.float32:
        with np.errstate(invalid="ignore", over="ignore"):
            worst, scale = float(np.abs(a - b).max(initial=0)), float(np.abs(a).max(initial=0))
        if np.isfinite(worst) and scale:
            return worst / scale
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, np.abs(a - b))
    worst = float(np.where(np.isnan(apart), np.inf, apart).max(initial=0))
    scale = float(np.abs(a[np.isfinite(a)]).max(initial=0)) or float(np.abs(b[np.isfinite(b)]).max(initial=0))
    return worst / scale if scale else worst


KINDS = {
    "upsample_nearest2d": "resize", "upsample_bilinear2d": "resize", "upsample_bicubic2d": "resize", "upsample": "resize",
    "max_pool2d_with_indices": "maxpool", "max_pool2d": "maxpool", "avg_pool2d": "averagepool", "mean": "reducemean",
    "convolution": "conv", "_convolution": "conv", "mkldnn_convolution": "conv", "addmm": "gemm", "linear": "gemm",
    "bmm": "matmul", "mm": "matmul", "_softmax": "softmax", "cat": "concat", "permute": "transpose", "t": "transpose",
    "view": "reshape", "_unsafe_view": "reshape", "flatten": "reshape", "native_layer_norm": "layernormalization",
    "hardtanh": "clip", "clamp": "clip", "constant_pad_nd": "pad", "select": "gather", "index": "gather", "silu": "mul",
    "native_batch_norm": "batchnormalization", "_native_batch_norm_legit_no_training": "batchnormalization", "topk": "topk",
    "grid_sampler_2d": "gridsample", "amax": "reducemax", "sum": "reducesum",
}  # fmt: skip
"""ATen operators by the ONNX operators that exporters make of them, where the names differ."""


def kind_of(place: Place) -> str:
    """The kind of an operator, in one spelling for PyTorch and ONNX."""
    name = place.operator.removeprefix("aten::").rstrip("_").lower()
    return KINDS.get(name, name)


def in_order(
    one: Sequence[tuple[Place, Sketch]], two: Sequence[tuple[Place, Sketch]], step: float = 0.1
) -> Iterator[tuple[int, int]]:
    """Pair tensors of one shape along both orders, so that near values and equal operators count most; yield the numbers of each pair."""
    if not one or not two:
        return
    gain = np.zeros((len(one), len(two)))
    by_shape: dict[tuple[int, ...], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for side, places in enumerate((one, two)):
        for i, (_, found) in enumerate(places):
            by_shape[found.shape][side].append(i)
    for mine, others in by_shape.values():
        if mine and others:
            far = distances([one[i][1] for i in mine], [two[j][1] for j in others])
            kinds = np.array([[kind_of(one[i][0]) == kind_of(two[j][0]) for j in others] for i in mine])
            gain[np.ix_(mine, others)] = 3 * np.maximum(0, 1 - far) ** 2 + 0.5 * kinds + step
    best = np.zeros((len(one) + 1, len(two) + 1))
    for i in range(len(one)):
        best[i + 1, 1:] = np.maximum(best[i, 1:], np.where(gain[i] > 0, best[i, :-1] + gain[i], 0))
        best[i + 1] = np.maximum.accumulate(best[i + 1])
    i, j = len(one), len(two)
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            yield one[i][0].number, two[j][0].number
