"""Threads, processes, locks, signals and progress bars; the calls that not every system has."""

from __future__ import annotations

import atexit
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

# Options of `mallopt`, from the header malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

T = TypeVar("T")
R = TypeVar("R")

# Windows has no SIGUSR1.
STOP_SIGNALS = tuple(
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGUSR1")
    if name in signal.Signals.__members__
)


def num_cores() -> int:
    """Number of cores that this process may use; a container or a batch system can limit it."""
    # macOS has no `sched_getaffinity`.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reuse_freed_memory() -> None:
    """Let this process keep the memory of freed tensors for its next tensors, where glibc is used.

    By default, glibc returns each block of more than 32 MiB to the system. Its pages are then
    mapped and cleared again for the next tensor of this size: in a step of PupuJEPA base on a CPU,
    this takes a tenth of the time (`benchmarks/RESULTS.md`). The process keeps the memory of its
    largest step, and some gaps between tensors, until it ends.
    """
    if sys.platform == "linux" and (set_option := getattr(ctypes.CDLL(None), "mallopt", None)):
        set_option(_M_MMAP_MAX, 0)
        set_option(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def reusing_arrow_memory() -> Iterator[None]:
    """Let Arrow keep the memory of freed tables for its next tables in the block, where it can.

    Its usual pool, mimalloc, returns freed memory to the system at once. Mapping and clearing the
    pages again then takes two fifths of the time until a run has read its table of two million
    files (`benchmarks/RESULTS.md`). jemalloc returns it at the end of the block. A pool that the
    user has chosen (`ARROW_DEFAULT_MEMORY_POOL`) is not replaced.
    """
    import pyarrow as pa  # noqa: PLC0415 (every command imports this module)

    pool = usual = pa.default_memory_pool()
    is_chosen = "ARROW_DEFAULT_MEMORY_POOL" in os.environ
    if not is_chosen and "jemalloc" in pa.supported_memory_backends():
        pool = pa.jemalloc_memory_pool()
    pa.set_memory_pool(pool)
    try:
        yield
    finally:
        pa.set_memory_pool(usual)
        pool.release_unused()


def end_with_parent() -> None:
    """End this process soon after its parent process has ended, also if the parent was killed.

    The parent is the process that started this one through `multiprocessing`. For a process that
    was started in another way, it is the parent process of the operating system.
    """
    parent, number = multiprocessing.parent_process(), os.getppid()

    def watch() -> None:
        if parent is not None:  # With a fork server, `os.getppid` is the server.
            parent.join()
        else:
            while os.getppid() == number:
                time.sleep(1)
        os._exit(1)

    # The exit of an interpreter that has torch takes seconds, in which no thread runs.
    def end_at_once() -> None:
        if parent is None and os.getppid() != number:
            os._exit(1)

    atexit.register(end_at_once)
    threading.Thread(target=watch, name="end with parent", daemon=True).start()


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Let one process at a time execute the block; the end of a process frees its lock.

    Waits for the other process, and does not change the content of the file. On a file system
    without locks, a warning is logged.
    """
    with path.open("a") as file:
        try:
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log.warning(
                "%s cannot be locked (%s): run only one command at a time in this folder",
                path,
                error.strerror,
            )
        yield


def progress_bar() -> Progress:
    """A progress bar that disappears at the end, in a terminal or a notebook; otherwise no bar."""
    console = Console(stderr=True)
    is_shown = sys.stderr.isatty() or console.is_jupyter
    return Progress(console=console, transient=True, disable=not is_shown)


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
