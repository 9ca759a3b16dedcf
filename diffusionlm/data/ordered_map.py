"""A `map` over processes whose results come in order."""

import contextlib
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

DEATHS = 'out of memory, or started by a script outside of its `if __name__ == "__main__"` block'  # what kills a worker

J, R = TypeVar("J"), TypeVar("R")
Map = Callable[[Callable[[J], R], Iterable[J]], Iterator[R]]


@contextlib.contextmanager
def in_order_by(workers: int) -> Iterator[Map]:
    """A `map` whose results come in order: by `workers` processes and a little ahead, or in this process for one."""
    if workers == 1:
        yield map
        return
    # spawn: a fork of a process in which JAX runs threads may hang
    executor = ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))

    def in_order(function: Callable[[J], R], jobs: Iterable[J]) -> Iterator[R]:
        pending = deque()
        for job in jobs:
            pending.append(executor.submit(function, job))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    try:
        yield in_order
    finally:
        executor.shutdown(cancel_futures=True)
