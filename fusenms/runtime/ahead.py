"""`work_ahead`: does work on the items of an iterable in other threads, a bounded number of items ahead."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_END = object()


def work_ahead(items: Iterable[Item], work: Callable[[Item], Result], ahead: int, threads: int) -> Iterator[Result]:
    """Yield the result of ``work`` for each item, in order.

    At most ``ahead`` results wait. The items are taken in the other threads too, one at a time, so that an iterable which reads them, as of
    a video, does so ahead. An error of the iterable or of the work is raised where its result would be.
    """
    source, taking, numbers = iter(items), threading.Lock(), iter(range(2**63))

    def step() -> tuple[int, object]:
        with taking:
            number = next(numbers)
            try:
                item = next(source)
            except StopIteration:
                return number, _END
            except Exception as error:  # of the user's own iterable
                return number, _Raised(error)
        try:
            return number, work(item)
        except Exception as error:
            return number, _Raised(error)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="fusenms-ahead")
    try:
        waiting: deque[Future[tuple[int, object]]] = deque(pool.submit(step) for _ in range(ahead))
        done: dict[int, object] = {}
        expected = 0
        while True:
            while expected not in done:
                number, result = waiting.popleft().result()
                done[number] = result
            result = done.pop(expected)
            expected += 1
            if result is _END:
                return
            if isinstance(result, _Raised):
                raise result.error
            yield result  # type: ignore[misc]
            waiting.append(pool.submit(step))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Raised:
    def __init__(self, error: Exception) -> None:
        self.error = error
