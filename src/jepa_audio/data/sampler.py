"""The order of a run: one endless shuffle for all processes, and a loader that can stop and go on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TypedDict

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from jepa_audio.grid import AudioBatch

Place = tuple[int, int]
"""(position in the order of the whole run, file to read there)."""


class GlobalOrderSampler(Sampler[list[Place]]):
    """Batches of one rank, cut out of one endless order that no rank owns.

    The order is one permutation of the files after the other, each a function of (seed, epoch) alone. Global
    micro-batch m holds the next `world_size * batch_size` positions, and rank r takes the r-th block of them.
    A batch may reach over the border of two epochs: nothing is dropped and nothing is padded. Iteration never
    ends, so there is no length; the loader says what it calls an epoch.

    Args:
        num_files: files in the corpus.
        batch_size: clips of one rank's micro-batch.
        rank: of this process.
        world_size: number of processes.
        seed: of the shuffle.
        shuffle: `False` for the order of the table, again and again.
    """

    def __init__(
        self,
        num_files: int,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if num_files < 1 or batch_size < 1:
            raise ValueError(f"`num_files` ({num_files}) and `batch_size` ({batch_size}) must be >= 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` ({rank}) must be in [0, world_size), `world_size` is {world_size}")
        if seed < 0:
            raise ValueError(f"`seed` ({seed}) must be >= 0")
        self.num_files = num_files
        self.batch_size = batch_size
        self.rank = rank
        self.global_batch_size = world_size * batch_size
        self.samples_consumed = 0
        self._seed = seed
        self._shuffle = shuffle

    @property
    def batches_per_pass(self) -> int:
        """Micro-batches in which all ranks together see about every file once, at least one."""
        return max(1, self.num_files // self.global_batch_size)

    def __iter__(self) -> Iterator[list[Place]]:
        """Endless, from `samples_consumed` on."""
        start = self.samples_consumed + self.rank * self.batch_size
        while True:
            yield [(position, self._file_at(position)) for position in range(start, start + self.batch_size)]
            start += self.global_batch_size

    def _file_at(self, position: int) -> int:
        epoch, place = divmod(position, self.num_files)
        return int(_permutation(self._seed, epoch, self.num_files)[place]) if self._shuffle else place


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_files: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_files)


class EveryNthBatch(DistributedSampler[Place]):
    """The files of batches rank, rank + world_size, ... of the table: every batch whole, on one rank.

    Whole, because validation masks are drawn for a batch at once: the loss does not depend on the number of processes.
    The base class serves only to be recognised: over any other sampler Lightning puts its own, which repeats
    files to make the ranks even. With fewer batches than ranks one is repeated, for a rank without a batch
    would leave the others waiting.
    """

    def __init__(self, num_files: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(num_files), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        batches = [range(i, min(i + batch_size, num_files)) for i in range(0, num_files, batch_size)]
        own = batches[rank::world_size] or [batches[rank % len(batches)]]
        self._files = [index for batch in own for index in batch]

    def __iter__(self) -> Iterator[Place]:
        return ((index, index) for index in self._files)

    def __len__(self) -> int:
        return len(self._files)


class LoaderState(TypedDict):
    """What a run needs to go on: the samples that all ranks together have been given."""

    samples_consumed: int


class ResumableLoader:
    """Hands out the batches of an endless sampler, epoch after epoch, and knows how many it has handed out.

    Batches fetched ahead by workers do not count, so the state is exact whenever it is asked for. It is the
    same on every rank (Lightning saves that of rank 0 and gives it to all) and holds for another number of
    processes or workers. One stream of workers serves the whole run: an epoch border costs nothing.

    This is no `DataLoader`, on purpose: under several processes Lightning replaces the sampler of one.

    Args:
        loader: batches of the order; its `batch_sampler` is a `GlobalOrderSampler`.
        batches_per_epoch: micro-batches that shall be called an epoch; `None` for about one pass.
    """

    def __init__(self, loader: DataLoader[AudioBatch], batches_per_epoch: int | None = None) -> None:
        sampler = loader.batch_sampler
        if not isinstance(sampler, GlobalOrderSampler):
            raise TypeError(f"`loader` must have a GlobalOrderSampler as batch_sampler, got {sampler!r}")
        self._loader = loader
        self._sampler = sampler
        self._batches_per_epoch = sampler.batches_per_pass if batches_per_epoch is None else batches_per_epoch
        self._samples_consumed = sampler.samples_consumed
        self._batches: Iterator[AudioBatch] | None = None

    def __len__(self) -> int:
        return self._batches_per_epoch

    def __iter__(self) -> Iterator[AudioBatch]:
        """The next `len(self)` batches of the run."""
        for _ in range(len(self)):
            if self._batches is None:
                self._batches = iter(self._loader)
            batch = next(self._batches)
            # Counted before it is handed out: a checkpoint is written while its receiver still holds it.
            self._samples_consumed += self._sampler.global_batch_size
            yield batch

    def state_dict(self) -> LoaderState:
        """The same on every rank."""
        return {"samples_consumed": self._samples_consumed}

    def load_state_dict(self, state: LoaderState) -> None:
        """Go on after the samples of `state`."""
        self.close()
        self._samples_consumed = self._sampler.samples_consumed = state["samples_consumed"]

    def close(self) -> None:
        """Stop the workers; what they have fetched ahead is fetched anew by the next iteration."""
        self._sampler.samples_consumed = self._samples_consumed
        self._batches = None
