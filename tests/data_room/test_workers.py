"""Worker processes of the loaders, and the signals that they ignore."""

import multiprocessing
import os
import signal

from jepa_audio.data.loading.workers import _prepare_worker
from jepa_audio.parallel import STOP_SIGNALS


def test_a_worker_ignores_stop_signals_until_the_training_process_ends():
    context = multiprocessing.get_context("fork")
    shutdown, reports = context.Event(), context.SimpleQueue()

    def work() -> None:
        _prepare_worker(shutdown, 0)
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
        reports.put("alive")
        shutdown.set()
        os.kill(os.getpid(), signal.SIGTERM)
        reports.put("alive after the end")

    worker = context.Process(target=work)
    worker.start()
    worker.join(30)
    assert worker.exitcode == 0
    assert reports.get() == "alive"
    assert reports.empty()
