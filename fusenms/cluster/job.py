"""Runs a job: tasks for a pool of actors, by Ray Data, and their rows as they come."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from fusenms.cluster.actor import DetectorActor, Job
from fusenms.cluster.dataset import IMAGE, Item
from fusenms.cluster.writer import Writer
from fusenms.errors import FusenmsError, RunError, first_line

BLOCK_BYTES = 2**18
"""Rows that an actor collects before it sends them, so that those of a long video come while it runs."""
MOST_IMAGES, TASKS_OF_AN_ACTOR = 256, 6
"""Images of one task: few enough that each actor gets several tasks, so that none waits long for the last one."""

Left = list[tuple[Item, list[int]]]
"""Items, and the numbers of their rows or frames that are done."""


def run_job(ray: Any, job: Job, model: bytes, left: Left, most: int, writer: Writer) -> None:
    """Detect in what is left, and give the rows to the writer.

    Ray Data runs the tasks again of an actor or a node that is lost, and gives each row once. It starts no more tasks than the writer
    takes rows of.

    Args:
        most: number of actors, if the cluster has room for them.

    Raises:
        RunError: the model fails, or the job fails on the cluster. The writer has what was done before.
        SourceError: the output cannot be written.
    """
    strategy = ray.data.ActorPoolStrategy(min_size=1, max_size=most, max_tasks_in_flight_per_actor=2)
    reference = ray.put(np.frombuffer(model, np.uint8))
    dataset = ray.data.from_arrow(list(_tasks(left, most, job.batch_size))).map_batches(
        DetectorActor, fn_constructor_args=(job, [reference]), compute=strategy, num_cpus=job.cpus, batch_size=None, batch_format="pyarrow"
    )  # fmt: skip
    _configure(dataset.context)
    try:
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            writer.take(table)
    except FusenmsError:
        raise
    except Exception as error:  # Ray raises the errors of actors in several types
        raise RunError(f"the job failed on the cluster: {_reason(error)}") from error
    finally:
        writer.flush()


def _tasks(left: Left, actors: int, batch_size: int) -> Iterator[Any]:
    """Tables of items, one for each task: a video or a row group alone and first, images together, in whole batches."""
    alone = [entry for entry in left if entry[0].kind != IMAGE]
    images = [entry for entry in left if entry[0].kind == IMAGE]
    share = -(-len(images) // (actors * TASKS_OF_AN_ACTOR))
    size = max(1, -(-min(share, MOST_IMAGES) // batch_size)) * batch_size
    for entry in alone:
        yield _table([entry])
    for start in range(0, len(images), size):
        yield _table(images[start : start + size])


def _table(some: Left) -> Any:
    import pyarrow as pa

    kinds = {
        "path": pa.string(),
        "kind": pa.string(),
        "group": pa.int64(),
        "first": pa.int64(),
        "rows": pa.int64(),
        "done": pa.list_(pa.int64()),
    }
    columns = {name: [getattr(item, name) for item, _ in some] for name in list(kinds)[:-1]}
    return pa.table(columns | {"done": [done for _, done in some]}, pa.schema(kinds))


def _configure(context: Any) -> None:
    """Small blocks, and none of the progress bars and messages of Ray Data, as the package has its own."""
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if not logging.getLogger("ray").isEnabledFor(logging.INFO):
        logging.getLogger("ray.data").setLevel(logging.ERROR)


def _reason(error: BaseException) -> str:
    """The error of fusenms that an actor raised, or else the innermost one."""
    chain: list[BaseException] = [error]
    while (inner := getattr(chain[-1], "cause", None) or chain[-1].__cause__) is not None and inner not in chain:
        chain.append(inner)
    ours = [each for each in chain if isinstance(each, FusenmsError)]
    return str(ours[-1]) if ours else f"{type(chain[-1]).__name__}: {first_line(chain[-1])}"
