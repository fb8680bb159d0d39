"""Check that a layout accounts for everything that a model gives: each output, and each channel of the head's tensors.

An output is accounted for if the layout uses it, if it is computed from what the layout uses, or if what the layout uses is computed from
it. What is left over may be an objectness, a centerness or an angle that would silently be lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx

from fusenms.graph.model import SHAPE_OPS, captured
from fusenms.heads.probe import MOVING_OPS, Probe, channels_of, producers_of, sum_to_one
from fusenms.layout import Layout

NEARLY_ALL = 0.99


def left_over(probe: Probe, layout: Layout) -> str | None:
    """Return what a layout of the model leaves over, as a clause; None if it leaves nothing."""
    graph = probe.raw.model.graph
    producers, sources = producers_of(graph), set(layout.sources)
    used = _ancestors(sources, producers)
    image, outputs = probe.raw.image.tensor, [entry.name for entry in graph.output if entry.name not in used]
    left = [name for name in outputs if image in _ancestors([name], producers, sources)]
    if left:
        sources |= _held(probe, sources, _moved_from(sources, producers))
    for name in left:
        if image in _ancestors([name], producers, sources):
            return (
                f"output {name!r} would not be used, and is not computed from what is used; if it means nothing, ignore it "
                f"(ignore={name!r})"
            )
    return channels_left_over(layout, probe.head(layout))


def channels_left_over(layout: Layout, head: Mapping[str, np.ndarray]) -> str | None:
    """Return which channels of the head's tensors ``[1, …]`` a layout leaves over; None if it leaves none.

    The background of scores that sum to 1 is computed from the others, and so are the best score of a candidate, times the objectness, and
    its class.
    """
    classes = channels_of(head, layout.classes)
    computed = [classes.max(1), classes.argmax(1)]
    if layout.objectness is not None:
        computed.append(computed[0] * channels_of(head, layout.objectness)[:, 0])
    for tensor in layout.tensors:
        taps = [tap for tap in layout.taps if tap.tensor == tensor]
        if not taps:
            continue  # prototypes
        axis = taps[0].channel_axis
        rows = head[tensor][0].T if axis == 1 else head[tensor][0]
        used = {channel for tap in taps for channel in range(tap.start, tap.stop)}
        left = [
            channel
            for channel in range(rows.shape[1])
            if channel not in used and not any(np.array_equal(rows[:, channel], values) for values in computed)
        ]
        if left and not sum_to_one(rows[:, min(layout.classes.start, *left) : max(layout.classes.stop, left[-1] + 1)]):
            return f"channels {left[0]} to {left[-1]} of {tensor!r} would not be used"
    return None


def _ancestors(names: Iterable[str], producers: Mapping[str, onnx.NodeProto], stop: Iterable[str] = ()) -> set[str]:
    """The tensors that these are computed from by value, with themselves, back to those in ``stop``."""
    found, todo, end = set[str](), list(names), set(stop)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        node = producers.get(name)
        if name in end or node is None or node.op_type in SHAPE_OPS:
            continue
        todo += [*node.input, *captured(node)]
    return found


def _held(probe: Probe, sources: Iterable[str], names: Iterable[str]) -> set[str]:
    """Those of these tensors whose values are all in the sources. A Concat may hold others, which a Split then takes away."""
    values = probe.values([*sources, *(name for name in names if name not in sources)])
    known = np.concatenate([values[name].ravel() for name in sources])
    return {name for name in names if np.isin(values[name], known).mean() > NEARLY_ALL}


def _moved_from(names: Iterable[str], producers: Mapping[str, onnx.NodeProto]) -> set[str]:
    """The tensors that these are parts of, with only operators that move values in between."""
    found, todo = set[str](), list(names)
    while todo:
        node = producers.get(todo.pop())
        if node is not None and node.op_type in MOVING_OPS:
            moved = list(node.input) if node.op_type == "Concat" else [node.input[0]]
            todo += [name for name in moved if name not in found]
            found |= set(moved)
    return found
