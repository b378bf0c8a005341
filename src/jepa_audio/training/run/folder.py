"""The folder of a run: its files, its lock, and the checkpoint that continues the run."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.files import write_text
from jepa_audio.training.run.load import (
    DamagedCheckpointError,
    check_sums,
    find_whole_checkpoint,
    read_checkpoint,
)

log = logging.getLogger(__name__)

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
# Seconds that a requeued job waits for the lock: a file server frees the lock of a lost machine
# after about 90 s.
REQUEUE_WAIT = 120.0

# A folder with one of these files holds a run.
_RESULTS = ("checkpoints/*.ckpt", "hpc_ckpt_*.ckpt", "metrics/version_*/metrics.csv", "metrics.csv")
# The files that a run writes.
_WRITTEN = (
    f"checkpoints/{LAST}",
    f"checkpoints/{PREVIOUS}",
    "checkpoints/step=*.ckpt",
    "checkpoints/.*.ckpt.part",
    "hpc_ckpt_*.ckpt",
    "metrics.csv",
    "metrics/version_*/metrics.csv",
    "metrics/version_*/hparams.yaml",
    "tensorboard/version_*/events.out.tfevents.*",
    "tensorboard/version_*/hparams.yaml",
)
_SAVED_CONFIGS = ("config.yaml", "config.[0-9]*.yaml")
# The first words of a configuration that a run has saved.
CONFIG_HEADER = "# lightning.pytorch=="


class RunFolderError(UserError):
    """A folder or a checkpoint that a run cannot use; all processes of the run raise this error."""


class RunFolder:
    """The folder of a run.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        # Files of an earlier run that `begin` removes.
        self._replaced: list[Path] = []

    @contextmanager
    def lock(self, wait_seconds: float = 0.0) -> Iterator[None]:
        """Keep other runs out of the folder; the lock ends with the process, also after a kill.

        Only the process of rank zero, which writes the files, needs the lock. The lock works on
        several machines if their shared file system supports `flock`; if not, a warning is logged.

        Raises:
            RunFolderError: if another run has the lock, with its process and machine; or if the
                folder cannot be written.
        """
        path, end = self.path / ".lock", time.monotonic() + wait_seconds
        while True:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                file = path.open("a+", encoding="utf-8")
            except OSError as error:
                raise RunFolderError(
                    f"`--run_dir`: {self.path} cannot be written: {error.strerror}"
                ) from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                if time.monotonic() >= end:
                    raise RunFolderError(
                        f"another run is writing into {self.path} ({holder}): wait for its end, "
                        "stop it, or give another folder with `--run_dir`"
                    ) from None
                time.sleep(min(1.0, wait_seconds))
                continue
            except OSError as error:
                log.warning(
                    "%s cannot be locked (%s): do not start two runs in this folder at once",
                    self.path,
                    error.strerror,
                )
            # The holder removes the file at its end: this may be a file that no longer has a name.
            if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                break
            file.close()
        with file:
            file.truncate(0)
            since = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    @property
    def holder(self) -> str | None:
        """The process that runs in the folder now, as text; `None` if there is none."""
        try:
            file = (self.path / ".lock").open(encoding="utf-8", errors="replace")
        except OSError:
            return None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another process"
            except OSError:  # The file system has no locks.
                return None
        return None

    def admit(self, checkpoint: Path | None, overwrite: bool) -> None:
        """Check that a new run, or a run that continues `checkpoint`, may write into the folder.

        Nothing is written: every process of the run calls this method.

        Raises:
            RunFolderError: if the folder holds another run, and `overwrite` is false.
        """
        results = [path for pattern in _RESULTS for path in sorted(self.path.glob(pattern))]
        continues = checkpoint is not None and checkpoint.resolve().is_relative_to(
            self.path.resolve()
        )
        if overwrite:
            if continues:
                raise RunFolderError(
                    f"`--overwrite` removes the run in {self.path}, and `--ckpt_path {checkpoint}` "
                    "continues it: give one of them"
                )
            self._replaced = self._files_of_run()
        elif results and not continues:
            raise RunFolderError(
                f"{self.path} holds a run ({results[0].relative_to(self.path)}): continue it with "
                "`--ckpt_path last`, give another folder with `--run_dir`, or remove it with "
                "`--overwrite`"
            )

    def _files_of_run(self) -> list[Path]:
        """The files of the run in the folder; other files are the user's."""
        files = [path for pattern in _WRITTEN for path in self.path.glob(pattern)]
        for pattern in _SAVED_CONFIGS:
            for path in self.path.glob(pattern):
                with path.open("rb") as file:
                    if file.read(len(CONFIG_HEADER)) == CONFIG_HEADER.encode():
                        files.append(path)
        return files

    def begin(self, config: str) -> None:
        """Remove the run that `--overwrite` replaces, and write `config.yaml`.

        The configurations of earlier starts are kept as `config.1.yaml`, `config.2.yaml` and so on.
        """
        for path in self._replaced:
            path.unlink(missing_ok=True)
        for folder in {path.parent for path in self._replaced}:
            while folder != self.path and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
                folder = folder.parent  # noqa: PLW2901
        if self._replaced:
            log.warning("removed %d files of the earlier run in %s", len(self._replaced), self.path)
        self._replaced = []
        current = self.path / "config.yaml"
        if current.is_file():
            numbered = (self.path / f"config.{number}.yaml" for number in count(1))
            write_text(
                next(path for path in numbered if not path.exists()),
                current.read_text(encoding="utf-8"),
            )
        write_text(current, config)

    def find_checkpoint(self, ckpt_path: str | None) -> Path | None:
        """The file of `--ckpt_path`; `None` for a new run.

        `last` is `None` if the folder has no checkpoint, because a job that can be requeued always
        gives `--ckpt_path last`, also at its first start.

        Raises:
            MissingFileError: if the file does not exist.
            RunFolderError: if the folder has checkpoints, but no `last.ckpt`.
        """
        if ckpt_path is None:
            return None
        if ckpt_path != "last":
            if not Path(ckpt_path).is_file():
                hint = "" if ckpt_path.endswith(".ckpt") else "; give `last` or a file"
                hint = "; copy it to this machine first" if "://" in ckpt_path else hint
                raise MissingFileError(f"`--ckpt_path`: no checkpoint at {ckpt_path}{hint}")
            return Path(ckpt_path)
        if (self.checkpoints / LAST).exists():
            return self.checkpoints / LAST
        if any(self.checkpoints.glob("*.ckpt")):
            raise RunFolderError(
                f"`--ckpt_path last`: there is no {LAST} in {self.checkpoints}; "
                f"{_advice(self.checkpoints)}"
            )
        return None


def open_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a complete checkpoint; the weights are memory-mapped.

    Raises:
        RunFolderError: if the file is damaged; the message names the newest complete checkpoint.
    """
    try:
        check_sums(path)
        return read_checkpoint(path)
    except DamagedCheckpointError as error:
        raise RunFolderError(f"{error}; {_advice(path.parent)}") from error


def _advice(folder: Path) -> str:
    newest = find_whole_checkpoint(folder)
    if newest is None:
        return f"{folder} has no complete checkpoint: start a new run"
    return f"the newest complete checkpoint, of step {newest[1]}: `--ckpt_path {newest[0]}`"
