"""Worker processes of the loaders: how they start, react to signals, and end."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import re
import signal
import traceback
from functools import lru_cache, partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.synchronize import Event
from typing import Any

from jepa_audio.parallel import STOP_SIGNALS, end_with_parent

_WORKER_EXIT = re.compile(
    r"DataLoader worker \(pid[()s]* [\d, ]+\) (?:is killed by signal: (?P<signal>[^.]+)|exited)"
)

# PyTorch's module that receives the tensors of the workers.
_RECEIVER = "torch.multiprocessing.reductions"


def worker_arguments(num_workers: int) -> dict[str, Any]:
    """Arguments of `DataLoader` for workers without deadlocks.

    The workers ignore stop signals, and end when their training process ends or is killed.
    """
    if num_workers == 0:
        return {}
    return {
        "multiprocessing_context": _context(),
        "worker_init_fn": partial(_prepare_worker, _shutdown_event()),
    }


def worker_crash_message(error: BaseException) -> str | None:
    """One sentence about the crash of a worker process; `None` for any other error.

    PyTorch raises this error at an arbitrary line of the training process.
    """
    match = _WORKER_EXIT.search(str(error)) if isinstance(error, RuntimeError) else None
    if match is None and not _is_lost_connection(error):
        return None
    if match is not None and match["signal"] == "Bus error":
        cause = (
            "had a bus error; the usual reason is that shared memory is full: "
            "enlarge /dev/shm (docker: `--shm-size`)"
        )
    else:  # The exit status of a fork server's child is not reported.
        cause = "was killed; the usual reason is that memory is full: provide more memory"
    return (
        f"a worker process {cause} or lower `--data.num_workers`; "
        "then continue with `--ckpt_path last`"
    )


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a worker ended while the training process received a tensor from it."""
    if not isinstance(error, ConnectionError | EOFError | FileNotFoundError):
        return False
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == _RECEIVER for frame, _ in frames)


@lru_cache(maxsize=1)
def _context() -> BaseContext:
    # Workers forked from the training process inherit locks that its other threads hold (loggers,
    # progress bars) and can deadlock. A fork server has no such threads, and imports torch once for
    # all workers.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jepa_audio.data.loading.clips"])
    # The server and its workers start with the stop signals blocked, so no signal can reach a
    # worker before it ignores them. The resource tracker must run first: otherwise the server
    # starts it, which unblocks the signals.
    resource_tracker.ensure_running()
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
    return context


@lru_cache(maxsize=1)
def _shutdown_event() -> Event:
    """Set when this process ends, before multiprocessing terminates the workers."""
    event = _context().Event()
    atexit.register(event.set)
    return event


def _prepare_worker(shutdown: Event, worker: int) -> None:
    # PyTorch watches the parent process of a worker, which is the fork server, not the trainer.
    end_with_parent()
    # Ctrl-C and schedulers send a signal to all processes. The run finishes its optimizer step
    # first and needs its workers until then. At the end it terminates them with SIGTERM.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if shutdown.is_set() else None)
    if hasattr(signal, "pthread_sigmask"):  # Windows blocks no signals.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
