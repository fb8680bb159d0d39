"""Runs a job: tasks for a pool of actors, by Ray Data, and their rows as they come."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from typing import Any

import numpy as np

from fusenms.cluster.actor import DetectorActor, Job
from fusenms.cluster.dataset import IMAGE, Item
from fusenms.cluster.writer import Writer
from fusenms.errors import FusenmsError, RunError, first_line
from fusenms.safety.text import printable

BLOCK_BYTES = 2**18
"""Rows that an actor collects before it sends them, so that those of a long video come while it runs."""
MOST_IMAGES, TASKS_OF_AN_ACTOR = 256, 16
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
    tasks = list(_tasks(left, most, job.batch_size))
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        DetectorActor, fn_constructor_args=(job, [reference]), compute=strategy, num_cpus=job.cpus, batch_size=None, batch_format="pyarrow"
    )  # fmt: skip
    _configure(dataset.context)
    tables = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
    try:
        with closing(tables):  # which gives the actors back, also after an error or Ctrl-C
            for table in tables:
                writer.take(table)
    except FusenmsError:
        raise
    except Exception as error:  # Ray raises the errors of actors in several types
        raise RunError(f"the job failed on the cluster: {_reason(error)}") from error
    finally:
        writer.flush()


def _tasks(left: Left, actors: int, batch_size: int) -> Iterator[dict[str, Any]]:
    """Items of each task: a video or a row group alone and first, images together, in whole batches."""
    alone = [entry for entry in left if entry[0].kind != IMAGE]
    images = [entry for entry in left if entry[0].kind == IMAGE]
    share = -(-len(images) // (actors * TASKS_OF_AN_ACTOR))
    size = max(1, -(-min(share, MOST_IMAGES) // batch_size)) * batch_size
    for some in [[entry] for entry in alone] + [images[i : i + size] for i in range(0, len(images), size)]:
        yield {"items": [asdict(item) | {"done": done} for item, done in some]}


def _configure(context: Any) -> None:
    """Small blocks, and none of the progress bars and messages of Ray Data, as the package has its own."""
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if not logging.getLogger("ray").isEnabledFor(logging.INFO):
        logging.getLogger("ray.data").setLevel(logging.ERROR)


def _reason(error: BaseException) -> str:
    """The error of fusenms that an actor raised, or else what Ray says.

    An actor that fails when it starts leaves only the text of its error. Ray Data raises some errors from others that say nothing.
    """
    chain: list[BaseException] = [error]
    while (inner := getattr(chain[-1], "cause", None) or chain[-1].__cause__) is not None and inner not in chain:
        chain.append(inner)
    for each in reversed(chain):
        if isinstance(each, FusenmsError):
            return str(each)
    if found := re.findall(r"fusenms\.errors\.\w+: (.+)", "\n".join(map(str, chain))):
        return printable(found[-1])
    return f"{type(error).__name__}: {first_line(error)}"
