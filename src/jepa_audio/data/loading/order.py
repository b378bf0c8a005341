"""The order of a run: one endless shuffle for all processes, of one corpus or of a mixture of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Int64
from torch.utils.data import Sampler

from jepa_audio.errors import UserError

SampleIndex = tuple[int, int]
"""(position in the order of the whole run, file to read there)."""

_BLOCK = 10_000


class GlobalOrderSampler(Sampler[list[SampleIndex]]):
    """Batches of one rank, cut out of one endless order that no rank owns.

    The order is one permutation of the files after the other, each a function of (seed, epoch)
    alone. Global micro-batch m holds the next `world_size * batch_size` positions, and rank r takes
    the r-th block of them. A batch may reach over the border of two epochs: nothing is dropped and
    nothing is padded. Iteration never ends, so there is no length; the loader says what it calls an
    epoch.

    A mixture gives every corpus such an order of its own. Each stretch of 10,000 positions takes
    the same number of files of a corpus, in proportion to the weights, and shuffles whose turn it
    is: which file stands at a position is a matter of arithmetic there too.

    Args:
        num_files: files in the corpus; several numbers for several corpora, whose files are
            numbered in a row.
        batch_size: clips of one rank's micro-batch.
        weights: share of each corpus in the clips, in any unit; `None` for one shuffle over the
            files of all.
        rank: of this process.
        world_size: number of processes.
        seed: of the shuffle.
        shuffle: `False` for the order of the table, again and again.
    """

    def __init__(
        self,
        num_files: int | Sequence[int],
        batch_size: int,
        *,
        weights: Sequence[float] | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        sizes = [num_files] if isinstance(num_files, int) else list(num_files)
        if weights is None:
            sizes = [sum(sizes)]
        if min(sizes) < 1 or batch_size < 1:
            raise UserError(
                f"`num_files` ({num_files}) and `batch_size` ({batch_size}) must be >= 1"
            )
        if not 0 <= rank < world_size:
            raise UserError(
                f"`rank` ({rank}) must be in [0, world_size), `world_size` is {world_size}"
            )
        if seed < 0:
            raise UserError(f"`seed` ({seed}) must be >= 0")
        self.num_files = sum(sizes)
        self.batch_size = batch_size
        self.rank = rank
        self.global_batch_size = world_size * batch_size
        self.samples_consumed = 0
        self._seed = seed
        self._shuffle = shuffle
        self._sizes = sizes
        self._first = np.concatenate(
            [[0], np.cumsum(sizes)[:-1]]
        )  # of every corpus, its first file
        self._permutations: dict[
            int, tuple[int, np.ndarray]
        ] = {}  # of every corpus, that of the running epoch
        self._quota = _quota([1.0] if weights is None else weights, len(sizes))

    @property
    def batches_per_pass(self) -> int:
        """Micro-batches in which all ranks together see about every file once, at least one."""
        return max(1, self.num_files // self.global_batch_size)

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        """Endless, from `samples_consumed` on."""
        start = self.samples_consumed + self.rank * self.batch_size
        while True:
            yield [
                (position, self.file_at(position))
                for position in range(start, start + self.batch_size)
            ]
            start += self.global_batch_size

    def file_at(self, position: int) -> int:
        """The file that stands at a position of the order."""
        corpus, turn = (0, position) if len(self._sizes) == 1 else self._turn(position)
        epoch, place = divmod(turn, self._sizes[corpus])
        if self._shuffle:
            place = self._shuffled(corpus, epoch)[place]
        return int(self._first[corpus] + place)

    def _shuffled(self, corpus: int, epoch: int) -> Int64[np.ndarray, " files"]:
        known = self._permutations.get(corpus)
        if known is None or known[0] != epoch:
            # The number of the first corpus, 0, draws what no number would.
            rng = np.random.default_rng([self._seed, epoch, corpus])
            known = self._permutations[corpus] = epoch, rng.permutation(self._sizes[corpus])
        return known[1]

    def _turn(self, position: int) -> tuple[int, int]:
        """Which corpus a position takes, and which of the files it takes from it, counted from the run's start."""
        block, place = divmod(position, _BLOCK)
        corpora, turns = _shuffled_block(self._seed, block, self._quota)
        corpus = int(corpora[place])
        return corpus, block * self._quota[corpus] + int(turns[place])


def _quota(weights: Sequence[float], num_corpora: int) -> tuple[int, ...]:
    """Files of every corpus in a block: the largest remainders round up."""
    if len(weights) != num_corpora or min(weights) <= 0:
        raise UserError(
            f"`weights` {list(weights)} must be {num_corpora} positive numbers, one for each corpus"
        )
    exact = np.array(weights, dtype=np.float64) / sum(weights) * _BLOCK
    quota = np.floor(exact).astype(int)
    quota[np.argsort(quota - exact, kind="stable")[: _BLOCK - quota.sum()]] += 1
    if quota.min() < 1:
        raise UserError(
            f"`weights` {list(weights)}: the smallest share must be at least 1 in {_BLOCK}"
        )
    return tuple(quota.tolist())


@lru_cache(maxsize=4)
def _shuffled_block(
    seed: int, block: int, quota: tuple[int, ...]
) -> tuple[Int64[np.ndarray, " block"], Int64[np.ndarray, " block"]]:
    """For each place of a block: its corpus, and how many places before it took the same one."""
    corpora = np.repeat(np.arange(len(quota)), quota)
    np.random.default_rng([seed, block, 1]).shuffle(corpora)
    turns = np.empty(_BLOCK, dtype=np.int64)
    for corpus, count in enumerate(quota):
        turns[corpora == corpus] = np.arange(count)
    return corpora, turns


class EveryNthBatch(Sampler[SampleIndex]):
    """The files of batches rank, rank + world_size, ... of the table: every batch whole, on one rank.

    Whole, because validation masks are drawn for a batch at once: the loss does not depend on the
    number of processes. With fewer batches than ranks one is repeated, for a rank without a batch
    would leave the others waiting.

    Args:
        num_files: in the table.
        batch_size: files of a batch.
        rank: of this process.
        world_size: number of processes.
        even: give every rank as many batches as any other and leave out the last ones: processes
            that hold shares of the weights need each other at every batch.
    """

    def __init__(
        self,
        num_files: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        even: bool = False,
    ) -> None:
        batches = [
            range(i, min(i + batch_size, num_files)) for i in range(0, num_files, batch_size)
        ]
        if even and len(batches) > world_size:
            batches = batches[: len(batches) // world_size * world_size]
        own = batches[rank::world_size] or [batches[rank % len(batches)]]
        self._files = [index for batch in own for index in batch]

    def __iter__(self) -> Iterator[SampleIndex]:
        return ((index, index) for index in self._files)

    def __len__(self) -> int:
        return len(self._files)
