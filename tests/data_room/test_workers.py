"""Worker processes of the loaders, and the signals that they ignore."""

import multiprocessing
import os
import signal
import socket

import pytest
from torch.multiprocessing import reductions

from jepa_audio.data.loading.workers import _prepare_worker, worker_crash_message
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


@pytest.mark.parametrize("kind", [ConnectionResetError, EOFError, FileNotFoundError])
def test_a_worker_that_ends_while_it_sends_a_tensor_is_a_crash_of_a_worker(kind: type[Exception]):
    class LostConnection:
        def detach(self) -> int:
            raise kind

    with pytest.raises(kind) as raised:
        reductions.rebuild_storage_fd(None, LostConnection(), 4)
    message = worker_crash_message(raised.value)
    assert message is not None
    assert "a worker process was killed" in message
    assert "--ckpt_path last" in message


def test_a_lost_connection_elsewhere_is_not_a_crash_of_a_worker():
    with socket.socket() as unconnected, pytest.raises(ConnectionRefusedError) as raised:
        unconnected.connect(("127.0.0.1", 1))
    assert worker_crash_message(raised.value) is None
