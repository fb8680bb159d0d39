"""Where a third-party file can be cut before its suppression: the tensors that its head may be, the most likely first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from fusenms.artifacts.raw import RawModel
from fusenms.conversion.suppressions import Found, ancestors, producers_of
from fusenms.graph.model import part_before
from fusenms.graph.session import Session
from fusenms.heads.probe import probe_image

FEWEST = 16
"""Candidates that a head has at least."""
MOST_SINGLE, MOST_PAIRS = 6, 8
"""Cuts that are tried at most, of each kind."""
COMPARISONS = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")
FAR_BACK = 200
"""Nodes before the suppression among which a tensor of unknown rank is looked at."""


@dataclass(frozen=True)
class Cut:
    """Tensors that a head may be, and other outputs of the file that do not depend on the suppression, such as prototypes."""

    tensors: tuple[str, ...]
    kept: tuple[str, ...]


class Around:
    """What lies before the suppression of a file. The network runs once, on the test image.

    Attributes:
        values: values of the tensors of rank 3 before the suppression, and of the constants that it reads.
    """

    def __init__(self, raw: RawModel, found: Found) -> None:
        """``raw`` is the whole file, with images as float32.

        Raises:
            SourceError: the network does not run.
        """
        self.raw, self.found, self.model = raw, found, raw.model
        self.producers = producers_of(self.model)
        self.place = {name: i for i, node in enumerate(self.model.graph.node) for name in node.output}
        self.behind = ancestors(self.producers, [*found.boxes, *found.scores])
        made = ancestors(self.producers, [entry.name for entry in self.model.graph.output])
        self.stored = {item.name for item in self.model.graph.initializer}
        scalars = {name for node in found.nodes for name in node.input[2:] if name}
        self.compared = self._compared(made)
        tensors = self._of_rank_3()
        wanted = list(dict.fromkeys([*tensors, *(scalars | set(self.compared) & set(self.place)) - self.stored]))
        self.values = self._run(wanted) | {
            item.name: onnx.numpy_helper.to_array(item)
            for item in self.model.graph.initializer
            if item.name in scalars or item.name in self.compared
        }
        self.tensors = [name for name in tensors if self._may_be_head(name)]

    def cuts(self) -> list[Cut]:
        """The cuts to try. A plugin's own inputs come first, since it says what they are."""
        singles = [(name,) for name in self._dominators()][:MOST_SINGLE]
        pairs = self._pairs()[:MOST_PAIRS]
        order = [*pairs, *singles] if self.found.is_plugin else [*singles, *pairs]
        return [Cut(tensors, self.independent()) for tensors in order]

    def has_offset(self, tensors: Sequence[str]) -> bool:
        """Whether boxes that the suppression reads depend on the number of the best class, behind these tensors."""
        way = ancestors(self.producers, self.found.boxes[:1], tensors)
        makers = {self.producers[name].op_type for name in way if name in self.producers and name not in tensors}
        return bool(makers & {"ArgMax"} and "Add" in makers)

    def selected_before(self, tensors: Sequence[str]) -> int | None:
        """Number of boxes of an image that a top-k leaves before the suppression; None if there is none."""
        way = ancestors(self.producers, [self.found.boxes[0], self.found.scores[0]], tensors)
        if not any(name in self.producers and self.producers[name].op_type == "TopK" for name in way - set(tensors)):
            return None
        shape = self._shape(self.found.boxes[0])
        return shape[1] if len(shape) == 3 else None

    def constants_compared(self) -> tuple[float, ...]:
        """Constants between 0 and 1 that something before the suppression is compared with."""
        values = [self.values[name] for name in self.compared if name in self.values]
        return tuple(float(value.reshape(-1)[0]) for value in values if value.size == 1)

    def rows_of_suppression(self) -> int:
        """Number of classes that the operator tells apart."""
        shape = self._shape(self.found.scores[0])
        if len(shape) != 3:
            return 1
        return shape[2] if self.found.is_plugin else shape[1]

    def rows_of_output(self) -> int | None:
        """Rows of the first output of rank 3, ``[B, K, ...]``, at most; None if there is none."""
        for entry in self.model.graph.output:
            dims = entry.type.tensor_type.shape.dim
            if len(dims) == 3:
                return dims[1].dim_value or self._most_rows(entry.name) or self._run([entry.name])[entry.name].shape[1]
        return None

    def _most_rows(self, name: str) -> int | None:
        """The constant that a top-k between the suppression and an output is limited by: its k, or the lower of that and the rows.

        The second is what mmdeploy writes.
        """
        shapes = [output for node in self.model.graph.node if node.op_type == "Shape" for output in node.output]
        found = []
        for node in {
            self.place[one]: self.producers[one] for one in ancestors(self.producers, [name]) if one in self.place
        }.values():
            if node.op_type == "TopK" and not set(node.output) & self.behind:
                names = ancestors(self.producers, [node.input[1]], shapes)
                found += [value for value in map(self._whole_number, names) if value is not None and value > 1]
        return min(found, default=None)

    def _whole_number(self, name: str) -> int | None:
        """A stored whole number; None if the tensor is something else."""
        values = [onnx.numpy_helper.to_array(item) for item in self.model.graph.initializer if item.name == name]
        node = self.producers.get(name)
        if node is not None and node.op_type == "Constant":
            values = [onnx.numpy_helper.to_array(one.t) for one in node.attribute if one.name == "value"]
        return int(values[0].reshape(-1)[0]) if values and values[0].size == 1 and values[0].dtype.kind == "i" else None

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.values[name].shape if name in self.values else ()

    def _compared(self, made: set[str]) -> list[str]:
        nodes = [n for n in self.model.graph.node if n.op_type in COMPARISONS and set(n.output) & made]
        return [
            name
            for node in nodes
            for name in node.input
            if name in self.stored or self.producers.get(name, onnx.NodeProto()).op_type == "Constant"
        ]

    def _of_rank_3(self) -> list[str]:
        """Tensors before the suppression that have rank 3, or an unknown one and are near; those that it reads are among them."""
        try:
            inferred = onnx.shape_inference.infer_shapes(self.model)
        except Exception:  # an operator of another domain, a model above 2 GB
            inferred = self.model
        types = {entry.name: entry.type.tensor_type for entry in (*inferred.graph.value_info, *inferred.graph.output)}
        last = max((self.place[name] for name in self.behind if name in self.place), default=0)
        chosen = []
        for name in sorted(self.behind & set(self.place), key=self.place.__getitem__, reverse=True):
            kind = types.get(name)
            if kind is None or not kind.HasField("shape"):
                wanted = last - self.place[name] < FAR_BACK
            else:
                wanted = len(kind.shape.dim) == 3 and kind.elem_type in (0, 1, 10)
            if wanted and self.producers[name].op_type != "Constant":
                chosen.append(name)
        return list(dict.fromkeys([*(n for n in (*self.found.boxes, *self.found.scores) if n in self.place), *chosen]))

    def _run(self, names: list[str]) -> dict[str, np.ndarray]:
        image = self.raw.image
        session = Session(
            part_before(self.model, names), source=self.raw.source, max_seconds=self.raw.limits.max_run_seconds
        )
        batch = self.raw.frozen_batch or 1
        images = probe_image(image.height, image.width).repeat(batch, 0)
        values = session.run({image.tensor: images} if image.tensor in session.inputs else {}, names)
        session.close()
        return {n: v for n, v in zip(names, values, strict=True) if isinstance(v, np.ndarray)}

    def _may_be_head(self, name: str) -> bool:
        value = self.values.get(name)
        batch = self.raw.frozen_batch or 1
        return (
            value is not None and value.ndim == 3 and value.dtype.kind == "f" and len(value) == batch
            and max(value.shape[1:]) >= FEWEST and not self._has_best_class(name)
        )  # fmt: skip

    def _has_best_class(self, name: str) -> bool:
        """Whether a tensor depends on the number of the best class, as moved boxes do."""
        makers = (self.producers[one].op_type for one in ancestors(self.producers, [name]) if one in self.producers)
        return "ArgMax" in makers

    def _dominators(self) -> list[str]:
        """Tensors that everything goes through from the images to the suppression, the last first."""
        ends = [*self.found.boxes, *self.found.scores]
        image = self.raw.image.tensor
        return [
            name
            for name in self.tensors
            if min(self.values[name].shape[1:]) > 4 and not self._reaches(ends, name, image)
        ]

    def _reaches(self, ends: Sequence[str], without: str, image: str) -> bool:
        """Whether values of the images reach the suppression without a tensor. A shape is no value."""
        todo, seen = [name for name in ends if name != without], set[str]()
        while todo:
            name = todo.pop()
            if name == image:
                return True
            node = self.producers.get(name)
            if name in seen or name == without or node is None or node.op_type in ("Shape", "Size"):
                continue
            seen.add(name)
            todo += [one for one in node.input if one]
        return False

    def _pairs(self) -> list[tuple[str, ...]]:
        """Boxes of four channels and scores of as many candidates; most candidates first, then several classes, then the nearest."""
        before_boxes = ancestors(self.producers, self.found.boxes)
        before_scores = ancestors(self.producers, self.found.scores)
        boxes = [n for n in self.tensors if n in before_boxes and self.values[n].shape[2] == 4]
        scores = [n for n in self.tensors if n in before_scores and n not in boxes]
        found = []
        for box in boxes:
            count = self.values[box].shape[1]
            for score in scores:
                shape = self.values[score].shape
                if count in shape[1:] and min(shape[1:]) < count:
                    several = min(shape[1:]) > 1
                    found.append((count, several, self.place[box] + self.place[score], (box, score)))
        found.sort(reverse=True)
        return [pair for *_, pair in found]

    def independent(self) -> tuple[str, ...]:
        """Outputs of the file that do not depend on the suppression."""
        results = {name for node in self.found.nodes for name in node.output}
        return tuple(
            entry.name
            for entry in self.model.graph.output
            if not results & ancestors(self.producers, [entry.name]) and len(entry.type.tensor_type.shape.dim) == 4
        )
