"""A multi-process `map` that returns results in order."""

import contextlib
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Protocol, TypeVar

# What kills a worker.
WORKER_DEATHS = 'out of memory, or started by a script outside of its `if __name__ == "__main__"` block'

J = TypeVar("J")
R = TypeVar("R")


class Map(Protocol):
    """The builtin `map` over one iterable, or its equal in several processes."""

    def __call__(self, function: Callable[[J], R], jobs: Iterable[J], /) -> Iterator[R]:
        """Yield the result of each job, in order."""
        ...


@contextlib.contextmanager
def ordered_map(workers: int) -> Iterator[Map]:
    """Give a `map` that runs in `workers` processes, a little ahead of what is asked for; in this process for one."""
    if workers == 1:
        yield map
        return
    # spawn: a fork of a process in which JAX runs threads may hang
    executor = ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))

    def map_ahead(function: Callable[[J], R], jobs: Iterable[J], /) -> Iterator[R]:
        pending: deque[Future[R]] = deque()
        for job in jobs:
            pending.append(executor.submit(function, job))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    try:
        yield map_ahead
    finally:
        executor.shutdown(cancel_futures=True)
