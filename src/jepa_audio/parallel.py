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


def num_cores() -> int:
    """Number of cores that this process may use; a container or a batch system can limit it."""
    # macOS has no `sched_getaffinity`.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def progress_bar() -> Progress:
    """A progress bar that disappears at the end; no bar if standard error is not a terminal."""
    return Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def track_progress(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Iterate over items with a progress bar; no bar if standard error is not a terminal."""
    with progress_bar() as bar:
        yield from bar.track(items, total, description=description)


def map_threads(
    function: Callable[[T], R], items: Iterable[T], num_workers: int, num_submitted: int = 1024
) -> Iterator[R]:
    """Apply a function in threads; yield the results in the order of the items.

    At most `num_submitted` items are submitted and not yet yielded, so an endless or very large
    iterable needs little memory. Decoding and arithmetic run in parallel, because libsndfile and
    numpy release the global interpreter lock.
    """
    remaining = iter(items)
    pool = ThreadPoolExecutor(num_workers)
    try:
        results = deque(pool.submit(function, item) for item in islice(remaining, num_submitted))
        while results:
            yield results.popleft().result()
            results.extend(pool.submit(function, item) for item in islice(remaining, 1))
    finally:
        pool.shutdown(cancel_futures=True)
