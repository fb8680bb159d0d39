"""Jobs run in batches, each gets its own result or error, and what nobody waits for does not run."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import pytest

from fusenms.serving.batching import Batcher


class Runs:
    """A function for a batcher that notes its batches, and stops in each until it may go on."""

    def __init__(self) -> None:
        self.batches: list[list] = []
        self.go, self.started = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, items):
        self.batches.append(list(items))
        self.started.release()
        assert self.go.acquire(timeout=60)
        if "bad" in items:
            raise ValueError("of this job")
        return [f"{item}!" for item in items]

    def allow(self, count=100):
        self.go.release(count)


@pytest.fixture
def runs():
    return Runs()


def batcher(runs, **settings):
    """A batcher whose first job is already in a run, and holds it."""
    made = Batcher(runs, **{"batch_size": 4} | settings)
    first = made.submit("first", "fits")
    assert runs.started.acquire(timeout=60)
    return made, first


def results(futures):
    return [future.result(60) for future in futures]


def test_jobs_that_come_during_a_run_share_the_next(runs):
    made, first = batcher(runs)
    futures = [first, *(made.submit(i, "fits") for i in range(6))]
    runs.allow()
    assert results(futures) == ["first!", *(f"{i}!" for i in range(6))]
    assert runs.batches == [["first"], [0, 1, 2, 3], [4, 5]]


def test_jobs_that_do_not_fit_run_apart_in_the_order_of_the_oldest(runs):
    made, first = batcher(runs)
    futures = [first, *(made.submit(f"{kind}{i}", kind) for i in range(2) for kind in "abc")]
    runs.allow()
    results(futures)
    assert runs.batches == [["first"], ["a0", "a1"], ["b0", "b1"], ["c0", "c1"]]


def test_jobs_of_several_images_fill_a_batch(runs):
    made, first = batcher(runs)
    futures = [first, *(made.submit(size, "fits", size) for size in (3, 2, 2, 9, 1))]
    runs.allow()
    results(futures)
    assert runs.batches == [["first"], [3], [2, 2], [9], [1]]


def test_error_is_that_of_its_job(runs):
    made, _ = batcher(runs)
    futures = [made.submit(item, "fits") for item in (1, "bad", 2)]
    runs.allow()
    assert [futures[0].result(60), futures[2].result(60)] == ["1!", "2!"]
    with pytest.raises(ValueError, match="of this job"):
        futures[1].result(60)
    assert made.submit("later", "fits").result(60) == "later!"


def test_cancelled_job_does_not_run_and_does_not_pile_up(runs):
    made, _ = batcher(runs)
    for _ in range(100):
        assert made.submit("cancelled", "fits").cancel()
    last = made.submit("last", "fits")
    assert made.waiting == 1 and len(made._jobs) == 1
    runs.allow()
    assert last.result(60) == "last!" and runs.batches == [["first"], ["last"]]


def test_job_that_is_cancelled_alone_leaves_the_others(runs):
    made, _ = batcher(runs)
    futures = [made.submit(i, "fits") for i in range(3)]
    futures[0].cancel()
    runs.allow()
    assert results(futures[1:]) == ["1!", "2!"] and runs.batches[1] == [1, 2]
    with pytest.raises(CancelledError):
        futures[0].result(60)


def test_first_job_waits_for_others_until_the_batch_is_full(runs):
    runs.allow()
    made = Batcher(runs, batch_size=3, delay=3600)
    futures = [made.submit(i, "fits") for i in range(3)]
    assert results(futures) == ["0!", "1!", "2!"] and runs.batches == [[0, 1, 2]]


def test_first_job_runs_alone_after_the_delay(runs):
    runs.allow()
    made = Batcher(runs, batch_size=3, delay=0.01)
    assert made.submit("one", "fits").result(60) == "one!"


def test_closed_batcher_runs_what_it_has(runs):
    made = Batcher(runs, batch_size=8, delay=3600)
    futures = [made.submit(i, "fits") for i in range(3)]
    made.close()
    runs.allow()
    assert results(futures) == ["0!", "1!", "2!"]
    made.join(60)
    assert not made._thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        made.submit(1, "fits")
