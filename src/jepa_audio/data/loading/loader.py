"""Batches for the Trainer: training that can stop and go on, and files that turn bad on the way."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, TypedDict

from torch.utils.data import DataLoader

from jepa_audio.data.corpus.table import CorpusError
from jepa_audio.data.loading.crops import BadRead, WithBadReads
from jepa_audio.data.loading.order import GlobalOrderSampler
from jepa_audio.steps.grid import AudioBatch

log = logging.getLogger(__name__)

_READS_BEFORE_JUDGING = 100
_LISTED = 20


class BadReadCounter:
    """What could not be read when its turn came: counted, named once, and the end of the run when it is too much.

    Args:
        max_bad_share: above this share of failed reads the run stops.
    """

    def __init__(self, max_bad_share: float) -> None:
        self.max_bad_share = max_bad_share
        self.num_reads = 0
        self.num_bad = 0
        self.reasons: dict[str, str] = {}

    def count(self, num_clips: int, bad: list[BadRead]) -> None:
        """Add the reads of a batch.

        Raises:
            CorpusError: if too many have failed by now.
        """
        self.num_reads += num_clips + len(bad)
        self.num_bad += len(bad)
        for name, reason in bad:
            if name not in self.reasons:
                log.warning("replaced %s by another file: %s", name, reason)
                self.reasons[name] = reason
        if (
            self.num_reads >= _READS_BEFORE_JUDGING
            and self.num_bad > self.max_bad_share * self.num_reads
        ):
            listed = "; ".join(
                f"{name} ({reason})" for name, reason in [*self.reasons.items()][:_LISTED]
            )
            more = f"; and {len(self.reasons) - _LISTED} more, named above" * (
                len(self.reasons) > _LISTED
            )
            raise CorpusError(
                f"{self.num_bad} of {self.num_reads} reads failed, more than `max_bad_share` "
                f"({self.max_bad_share:g}): {listed}{more}"
            )

    def summary(self) -> str:
        """One line for the end of the run; empty if nothing was bad."""
        if not self.num_bad:
            return ""
        return f"{self.num_bad} of {self.num_reads} reads failed and were replaced, of {len(self.reasons)} files"


class LoaderState(TypedDict):
    """What a run needs to go on: the samples that all ranks together have been given."""

    samples_consumed: int
    files: str


class ResumableLoader:
    """Hands out the batches of an endless sampler, epoch after epoch, and knows how many it has handed out.

    Batches fetched ahead by workers do not count, so the state is exact whenever it is asked for.
    It is the same on every rank (Lightning saves that of rank 0 and gives it to all) and holds for
    another number of processes or workers. One stream of workers serves the whole run: an epoch
    border costs nothing.

    This is no `DataLoader`, on purpose: under several processes Lightning replaces the sampler of
    one.

    Args:
        loader: batches of the order; its `batch_sampler` is a `GlobalOrderSampler`.
        files: fingerprint of the files that the order is of.
        bad_reads: where reads are counted.
        batches_per_epoch: micro-batches that shall be called an epoch; `None` for about one pass.
    """

    def __init__(
        self,
        loader: DataLoader[WithBadReads[Any]],
        bad_reads: BadReadCounter,
        batches_per_epoch: int | None = None,
        files: str = "",
    ) -> None:
        sampler = loader.batch_sampler
        if not isinstance(sampler, GlobalOrderSampler):
            raise TypeError(
                f"`loader` must have a GlobalOrderSampler as batch_sampler, got {sampler!r}"
            )
        self.order = sampler
        self._loader = loader
        self._files = files
        self._bad_reads = bad_reads
        self._batches_per_epoch = (
            sampler.batches_per_pass if batches_per_epoch is None else batches_per_epoch
        )
        self._samples_consumed = sampler.samples_consumed
        self._batches: Iterator[WithBadReads[Any]] | None = None

    def __len__(self) -> int:
        return self._batches_per_epoch

    def __iter__(self) -> Iterator[AudioBatch]:
        """The next `len(self)` batches of the run."""
        for _ in range(len(self)):
            if self._batches is None:
                self._batches = iter(self._loader)
            batch, bad = next(self._batches)
            self._bad_reads.count(self.order.batch_size, bad)
            # Counted before it is handed out: a checkpoint is written while its receiver still
            # holds it.
            self._samples_consumed += self.order.global_batch_size
            yield batch

    def state_dict(self) -> LoaderState:
        """The same on every rank."""
        return {"samples_consumed": self._samples_consumed, "files": self._files}

    def load_state_dict(self, state: LoaderState) -> None:
        """Go on after the samples of `state`."""
        if (
            state.get("files", self._files) != self._files
        ):  # checkpoints of earlier versions do not say
            log.warning(
                "the corpus is not what it was when the checkpoint was written: from here on the order of samples is "
                "another one. A table (`--data.root corpus.parquet`) stays as it is: a file that turns bad is replaced"
            )
        self.close()
        self._samples_consumed = self.order.samples_consumed = state["samples_consumed"]

    def close(self) -> None:
        """Stop the workers; what they have fetched ahead is fetched anew by the next iteration."""
        self.order.samples_consumed = self._samples_consumed
        self._batches = None


class EvaluationLoader:
    """The same batches at every iteration. No `DataLoader` either: Lightning would repeat files to make ranks even.

    Args:
        loader: of the files of one rank.
        bad_reads: where reads are counted.
    """

    def __init__(self, loader: DataLoader[WithBadReads[Any]], bad_reads: BadReadCounter) -> None:
        self._loader = loader
        self._bad_reads = bad_reads

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[AudioBatch]:
        for batch, bad in self._loader:
            self._bad_reads.count(self._loader.batch_size or 1, bad)
            yield batch
