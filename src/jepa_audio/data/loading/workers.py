"""The processes that read: how many, started how, and what signals mean to them."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import re
import signal
from functools import lru_cache, partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.synchronize import Event
from typing import Any

from jepa_audio.parallel import STOP_SIGNALS

_DEATH = re.compile(
    r"DataLoader worker \(pid[()s]* [\d, ]+\) (?:is killed by signal: (?P<signal>[^.]+)|exited)"
)


def worker_arguments(num_workers: int) -> dict[str, Any]:
    """What a `DataLoader` has to be told, so that its workers neither hang nor die of a signal meant for the run."""
    if num_workers == 0:
        return {}
    context = _context()
    start = partial(_leave_signals_to_the_trainer, _closing())
    return {"multiprocessing_context": context, "worker_init_fn": start}


def worker_crash_message(error: BaseException) -> str | None:
    """What became of a reading process, in one sentence, if that is what the error is about.

    PyTorch raises it wherever the training process happens to be.
    """
    match = _DEATH.search(str(error)) if isinstance(error, RuntimeError) else None
    if match is None:
        return None
    if match["signal"] == "Bus error":
        cause = "met a bus error, as it does when shared memory is full: enlarge /dev/shm (docker: `--shm-size`)"
    else:  # a fork server's child dies without telling us of what
        cause = "was killed, as the system does when memory runs out: give it more"
    return f"a reading process {cause} or lower `--data.num_workers`; then go on with `--ckpt_path last`"


@lru_cache(maxsize=1)
def _context() -> BaseContext:
    # Workers forked from a training process inherit locks that its other threads hold (loggers,
    # progress bars) and hang on them; a fork server is clean, and imports torch once for all of
    # them.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jepa_audio.data.loading.crops"])
    # The server and all its workers are born with the signals blocked: none finds a worker half
    # made.
    resource_tracker.ensure_running()  # it would unblock them when it is started by the server's start
    former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, former)
    return context


@lru_cache(maxsize=1)
def _closing() -> Event:
    """Set when this process ends; multiprocessing ends the workers after that."""
    closing = _context().Event()
    atexit.register(closing.set)
    return closing


def _leave_signals_to_the_trainer(closing: Event, worker: int) -> None:
    # A Ctrl-C or a scheduler reaches every process; the run stops when its step is done, and needs
    # them till then. At its end it ends them by SIGTERM itself.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.is_set() else None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
