"""`Writer`: takes the rows that actors send, puts them together to parts of the output, and counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fusenms.cluster.output import Output
from fusenms.cluster.rows import schema

PART_ROWS, PART_BYTES, PART_SECONDS = 20_000, 64 * 2**20, 30.0
"""A part is written when it has so many rows or bytes, or when its first row is so old: what a killed run loses is younger."""


class Writer:
    """Writes rows as they come.

    Attributes:
        skipped: number of inputs that earlier runs had done.
        images, failed, detections: number of rows that were taken, of those with an error, and of detections in them.
        actors, nodes: that sent rows.
        first, last: when the first and the last rows came, by `time.perf_counter`.
    """

    def __init__(self, output: Output, skipped: int, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._output, self._total, self._progress = output, total, progress
        self.skipped, self.images, self.failed, self.detections = skipped, 0, 0, 0
        self.actors: set[str] = set()
        self.nodes: set[str] = set()
        self.first = self.last = 0.0
        self._inputs = skipped
        self._parts: list[Any] = []
        self._ended: list[str] = []
        self._since = 0.0

    def take(self, table: Any) -> None:
        """Take a table of `fusenms.cluster.rows.worker_schema`, and write a part when there is enough.

        Raises:
            SourceError: the output cannot be written.
        """
        from pyarrow import compute

        self.last = time.perf_counter()
        self.first = self.first or self.last
        for name, seen in (("_actor", self.actors), ("_node", self.nodes)):
            seen.update(compute.unique(table[name]).to_pylist())
        ends = compute.is_valid(table["_ended"])
        ended = table.filter(ends)["image"].to_pylist()
        rows = table.filter(compute.invert(ends)).select(schema().names)
        if not self._parts and not self._ended:
            self._since = self.last
        self._ended += ended
        self._parts.append(rows)
        self.images += rows.num_rows
        self.failed += rows.num_rows - rows["error"].null_count
        self.detections += compute.sum(compute.list_value_length(rows["detections"])).as_py() or 0
        self._inputs += rows["frame"].null_count + len(ended)
        if self._progress is not None:
            self._progress(self._inputs, self._total)
        count, size = sum(part.num_rows for part in self._parts), sum(part.nbytes for part in self._parts)
        if count >= PART_ROWS or size >= PART_BYTES or self.last - self._since >= PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was taken.

        Raises:
            SourceError: the output cannot be written.
        """
        import pyarrow as pa

        parts, ended, self._parts, self._ended = self._parts, self._ended, [], []
        if parts:
            self._output.write(pa.concat_tables(parts).cast(schema()), ended)
