"""Thread pools, progress bars, the number of usable cores, and the signals that stop a run."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")
R = TypeVar("R")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SUBMITTED_AHEAD = 1024


def num_cores() -> int:
    """Cores that this process may use; a container or a batch system can allow fewer than exist."""
    # macOS has no `sched_getaffinity`.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def progress_bar() -> Progress:
    """A bar on standard error that disappears at the end; disabled if that is not a terminal."""
    return Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def track_progress(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """The items, with a progress bar on a terminal."""
    with progress_bar() as bar:
        yield from bar.track(items, total, description=description)


def map_threads(
    function: Callable[[T], R],
    items: Iterable[T],
    num_workers: int,
    num_submitted: int = _SUBMITTED_AHEAD,
) -> Iterator[R]:
    """Results in the order of the items, at most `num_submitted` of which are pending at a time.

    Threads are enough: libsndfile and numpy release the interpreter's lock while they compute.
    """
    waiting = iter(items)
    pool = ThreadPoolExecutor(num_workers)
    try:
        results = deque(pool.submit(function, item) for item in islice(waiting, num_submitted))
        while results:
            yield results.popleft().result()
            results.extend(pool.submit(function, item) for item in islice(waiting, 1))
    finally:
        pool.shutdown(cancel_futures=True)
