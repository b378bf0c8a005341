"""Loaders for the Trainer: resumable training batches, and a counter of failed reads."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import chain, islice
from typing import Any

from torch.utils.data import DataLoader

from jepa_audio.data.corpus.table import CorpusError
from jepa_audio.data.loading.clips import BadRead, Batch, ClipDataset, WithBadReads
from jepa_audio.data.loading.file_table import FileTable
from jepa_audio.data.loading.order import GlobalOrderSampler, Progress
from jepa_audio.parallel import map_threads, num_cores
from jepa_audio.steps.grid import AudioBatch

log = logging.getLogger(__name__)

_MIN_READS = 100
_MAX_LISTED = 20


class BadReadCounter:
    """Counts failed reads, logs each file once, and stops the run above a limit.

    Args:
        max_bad_share: largest share of failed reads; checked from 100 reads on.
    """

    def __init__(self, max_bad_share: float) -> None:
        self.max_bad_share = max_bad_share
        self.num_reads = 0
        self.num_bad = 0
        self.reasons: dict[str, str] = {}

    def count(self, num_clips: int, bad_reads: list[BadRead]) -> None:
        """Add the reads of a batch.

        Raises:
            CorpusError: if the share of failed reads is above `max_bad_share`.
        """
        self.num_reads += num_clips + len(bad_reads)
        self.num_bad += len(bad_reads)
        for name, reason in bad_reads:
            if name not in self.reasons:
                log.warning("replaced %s by another file: %s", name, reason)
                self.reasons[name] = reason
        if self.num_reads < _MIN_READS or self.num_bad <= self.max_bad_share * self.num_reads:
            return
        listed = [f"{name} ({reason})" for name, reason in self.reasons.items()]
        if (num_more := len(listed) - _MAX_LISTED) > 0:
            listed[_MAX_LISTED:] = [f"and {num_more} more, named above"]
        raise CorpusError(
            f"{self.num_bad} of {self.num_reads} reads failed, more than `max_bad_share` "
            f"({self.max_bad_share:g}): {'; '.join(listed)}"
        )

    def summary(self) -> str:
        """One line for the end of the run; empty if no read failed."""
        if not self.num_bad:
            return ""
        reads = f"{self.num_bad} of {self.num_reads} reads"
        return f"{reads} failed and were replaced, of {len(self.reasons)} files"


class ResumableLoader:
    """Iterates over the batches of an endless sampler and counts those that it has returned.

    Batches that workers have prefetched are not counted, so the state is always exact. It is the
    same on all ranks (Lightning saves the state of rank 0 and restores it on all ranks) and remains
    valid for another number of processes or workers. The same workers serve the whole run: no time
    is lost between epochs.

    This class is not a `DataLoader`, because Lightning replaces the sampler of a `DataLoader` in
    runs with several processes.

    Args:
        loader: batches of the order; its `batch_sampler` is a `GlobalOrderSampler`.
        bad_reads: counter of failed reads.
        batches_per_epoch: micro-batches in an epoch.
        files: the files, whose fingerprint is part of the state; `None` for no fingerprint.
    """

    def __init__(
        self,
        loader: DataLoader[WithBadReads[Any]],
        bad_reads: BadReadCounter,
        batches_per_epoch: int,
        files: FileTable | None = None,
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
        self._batches_per_epoch = batches_per_epoch
        self._progress = sampler.progress
        self._batches: Iterator[WithBadReads[Any]] | None = None

    def __len__(self) -> int:
        return self._batches_per_epoch

    def __iter__(self) -> Iterator[AudioBatch]:
        """The next `len(self)` batches of the run."""
        for _ in range(self._batches_per_epoch):
            if self._batches is None:
                self._batches = iter(self._loader)
            batch, bad_reads = next(self._batches)
            self._bad_reads.count(self.order.batch_size, bad_reads)
            # Count before the yield: a checkpoint is written while the Trainer uses this batch.
            self._progress = self.order.after_batch(self._progress)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The samples that all ranks together have received, the step, and the fingerprint."""
        return {**asdict(self._progress), "files": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the samples of `state`, at its optimizer step."""
        # Checkpoints of earlier versions hold no fingerprint and no step.
        if state.get("files", self._fingerprint) != self._fingerprint:
            log.warning(
                "the files have changed since the checkpoint was written: the order of samples "
                "changes from here on. To keep the list of files, train from a table "
                "(`--data.root corpus.parquet`): files that become unreadable are replaced"
            )
        samples = state["samples_consumed"]
        micro_batches = state.get("micro_batches", samples // self.order.global_batch_size)
        step = state.get("step", micro_batches // self.order.accumulated)
        self._progress = Progress(samples, micro_batches, step)
        self.close()

    @cached_property
    def _fingerprint(self) -> str:
        """Computed for the first state: hashing the names of millions of files takes 0.2 s."""
        return self._files.fingerprint if self._files else ""

    def close(self) -> None:
        """Stop the workers; the next iteration reads their prefetched samples again."""
        self.order.progress = self._progress
        self._batches = None


class EvaluationLoader:
    """The batches of one rank, the same in each iteration; see `evaluation_batches`.

    This class is not a `DataLoader`, because Lightning repeats files of a `DataLoader` to give all
    ranks the same number.

    Attributes:
        num_own_batches: the batches after this number repeat batches of other ranks, and must not
            be counted.
    """

    def __init__(
        self,
        loader: DataLoader[WithBadReads[Any]],
        bad_reads: BadReadCounter,
        num_own_batches: int | None = None,
    ) -> None:
        self.num_own_batches = len(loader) if num_own_batches is None else num_own_batches
        self._loader = loader
        self._bad_reads = bad_reads

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[AudioBatch]:
        assert self._loader.batch_sampler is not None
        batches = zip(self._loader.batch_sampler, self._loader, strict=True)
        for indices, (batch, bad_reads) in batches:
            self._bad_reads.count(len(indices), bad_reads)
            yield batch


def first_batches(
    dataset: ClipDataset[Any, Batch], count: int, weights: Sequence[float] | None
) -> Iterator[Batch]:
    """The first `count` samples of the training order, each one as a batch; read in threads.

    They are the same on every rank. A file that cannot be read is replaced, as in training.
    """
    sizes, seed = dataset.files.sizes, dataset.settings.seed
    indices = chain.from_iterable(GlobalOrderSampler(sizes, 1, weights=weights, seed=seed))
    return map_threads(
        lambda index: dataset.collate([dataset[index]])[0],
        islice(indices, count),
        num_cores(),
        num_submitted=32,
    )
