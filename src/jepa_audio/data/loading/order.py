"""The order of samples: an endless shuffle for training, the order of the table for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from torch.utils.data import Sampler
from typing_extensions import override

from jepa_audio.errors import UserError


class SampleIndex(NamedTuple):
    """Which sample to load: position in the order of the run, file to read, optimizer step."""

    position: int
    file: int
    step: int = 0


@dataclass(frozen=True)
class Progress:
    """How far a run is: what all ranks together have consumed, and the completed optimizer steps.

    Attributes:
        samples_consumed: number of samples.
        micro_batches: number of micro-batches of each rank.
        step: optimizer step of the next micro-batch, from 0.
    """

    samples_consumed: int = 0
    micro_batches: int = 0
    step: int = 0

    def advance(self, num_samples: int, accumulated: int) -> Progress:
        """The progress after one more micro-batch of `num_samples` on all ranks.

        Like in Lightning, an optimizer step ends with each micro-batch whose number is a multiple
        of `accumulated`, also if the number was another one earlier in the run.
        """
        micro_batches = self.micro_batches + 1
        step = self.step + (micro_batches % accumulated == 0)
        return Progress(self.samples_consumed + num_samples, micro_batches, step)


_BLOCK_SIZE = 10_000


class GlobalOrderSampler(Sampler[list[SampleIndex]]):
    """The batches of one rank, cut from one endless order that all ranks share.

    The order is a sequence of permutations of the files, each a function of (seed, epoch) alone.
    Global micro-batch m takes the next `world_size * batch_size` positions, and rank r takes the
    r-th block of them. A batch may cross the border of two epochs: no file is dropped or repeated.
    Iteration never ends, so the sampler has no length; `ResumableLoader` defines an epoch.

    In a mixture each corpus has such an order of its own. Each block of 10,000 positions takes
    a fixed number of files from each corpus, in proportion to the weights, and shuffles which
    position takes which corpus. So the file at any position can be computed directly.

    Args:
        num_files: number of files of the corpus; for several corpora a list. Files are numbered
            consecutively over all corpora.
        batch_size: clips in one rank's micro-batch.
        weights: relative share of each corpus in the clips; `None` shuffles all files together.
        rank: rank of this process.
        world_size: number of processes.
        accumulated: micro-batches in one optimizer step.
        seed: seed of the shuffle.

    Raises:
        UserError: if an argument is out of range.
    """

    def __init__(
        self,
        num_files: int | Sequence[int],
        batch_size: int,
        *,
        weights: Sequence[float] | None = None,
        rank: int = 0,
        world_size: int = 1,
        accumulated: int = 1,
        seed: int = 0,
    ) -> None:
        sizes = [num_files] if isinstance(num_files, int) else list(num_files)
        if weights is None:
            sizes = [sum(sizes)]
        if min(sizes) < 1 or batch_size < 1 or seed < 0:
            sizes_rule = f"`num_files` ({num_files}) and `batch_size` ({batch_size}) must be >= 1"
            raise UserError(f"{sizes_rule}, `seed` ({seed}) must be >= 0")
        if not 0 <= rank < world_size:
            raise UserError(f"`rank` ({rank}) must be in [0, `world_size` ({world_size}))")
        self.num_files = sum(sizes)
        self.batch_size = batch_size
        self.rank = rank
        self.global_batch_size = world_size * batch_size
        self.accumulated = accumulated
        self.progress = Progress()
        # The order starts again at position 0 after this number of micro-batches of each rank.
        self.num_repeated: int | None = None
        self._seed = seed
        self._sizes = sizes
        # For each corpus: (epoch, permutation of its files in this epoch).
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}
        self._block_counts = count_files_per_block(weights or [1.0], len(sizes))

    @property
    def batches_per_pass(self) -> int:
        """Micro-batches in which all ranks together read each file about once; at least 1."""
        return max(1, self.num_files // self.global_batch_size)

    @override
    def __iter__(self) -> Iterator[list[SampleIndex]]:
        """Endless batches from `progress` on."""
        progress = self.progress
        while True:
            start = progress.samples_consumed + self.rank * self.batch_size
            if self.num_repeated:
                start %= self.num_repeated * self.global_batch_size
            batch = range(start, start + self.batch_size)
            yield [SampleIndex(place, self.file_at(place), progress.step) for place in batch]
            progress = self.after_batch(progress)

    def after_batch(self, progress: Progress) -> Progress:
        """The progress after one more micro-batch of this size."""
        return progress.advance(self.global_batch_size, self.accumulated)

    def file_at(self, position: int) -> int:
        """Index of the file at a position of the order."""
        corpus, draw = (0, position) if len(self._sizes) == 1 else self._draw_at(position)
        epoch, index = divmod(draw, self._sizes[corpus])
        return sum(self._sizes[:corpus]) + int(self._permutation(corpus, epoch)[index])

    def _permutation(self, corpus: int, epoch: int) -> Int64[np.ndarray, " files"]:
        cached = self._permutations.get(corpus)
        if cached is None or cached[0] != epoch:
            # numpy treats [seed, epoch, 0] like [seed, epoch]: the order of a single corpus is the
            # one of versions without mixtures.
            rng = np.random.default_rng([self._seed, epoch, corpus])
            cached = self._permutations[corpus] = epoch, rng.permutation(self._sizes[corpus])
        return cached[1]

    def _draw_at(self, position: int) -> tuple[int, int]:
        """(corpus at a position, number of earlier positions in the run with this corpus)."""
        block, place = divmod(position, _BLOCK_SIZE)
        corpora, draws = _shuffled_block(self._seed, block, self._block_counts)
        corpus = int(corpora[place])
        return corpus, block * self._block_counts[corpus] + int(draws[place])


def count_files_per_block(weights: Sequence[float], num_corpora: int) -> tuple[int, ...]:
    """Files of each corpus in a block of 10,000 positions; the largest remainders round up.

    Raises:
        UserError: if a weight is missing, not positive or below 1 in 10,000 of the sum.
    """
    if len(weights) != num_corpora or min(weights) <= 0:
        rule = f"must be {num_corpora} positive numbers, one for each source"
        raise UserError(f"`weights` {list(weights)} {rule}")
    exact = np.array(weights, dtype=np.float64) / sum(weights) * _BLOCK_SIZE
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: _BLOCK_SIZE - counts.sum()]] += 1
    if counts.min() < 1:
        rule = f"the smallest share must be at least 1 in {_BLOCK_SIZE}"
        raise UserError(f"`weights` {list(weights)}: {rule}")
    return tuple(counts.tolist())


@lru_cache(maxsize=4)
def _shuffled_block(
    seed: int, block: int, counts: tuple[int, ...]
) -> tuple[Int64[np.ndarray, " block"], Int64[np.ndarray, " block"]]:
    """For each position of a block: its corpus, and how many earlier positions have this corpus."""
    corpora = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng([seed, block, 1]).shuffle(corpora)
    draws = np.empty(_BLOCK_SIZE, dtype=np.int64)
    for corpus, count in enumerate(counts):
        draws[corpora == corpus] = np.arange(count)
    return corpora, draws


def evaluation_batches(
    num_files: int, batch_size: int, rank: int = 0, world_size: int = 1, even: bool = False
) -> list[list[SampleIndex]]:
    """The batches of one rank: batches rank, rank + world_size, ... of the table, for step 0.

    A batch is never divided between ranks: validation masks are drawn for a batch at once, so the
    loss does not depend on the number of processes. With fewer batches than ranks a batch is
    repeated, because a rank without a batch would block the others.

    `even` gives all ranks the same number of batches and repeats one for this. Processes that hold
    shares of the weights need this, because they synchronise at each batch. Repeated batches come
    last, after `EvaluationLoader.num_own_batches`.
    """
    files = [SampleIndex(index, index, step=0) for index in range(num_files)]
    batches = [files[start : start + batch_size] for start in range(0, num_files, batch_size)]
    own = batches[rank::world_size]
    num_batches = len(batches[::world_size]) if even else max(1, len(own))
    return own + [batches[rank % len(batches)]] * (num_batches - len(own))


class EvaluationOrder(Sampler[list[SampleIndex]]):
    """The same batches in each iteration, for the optimizer step at its start.

    Args:
        batches: see `evaluation_batches`.
        current_step: gives the optimizer step; `None` for step 0.
    """

    def __init__(
        self, batches: list[list[SampleIndex]], current_step: Callable[[], int] | None = None
    ) -> None:
        self._batches = batches
        self._current_step = current_step

    def __len__(self) -> int:
        return len(self._batches)

    @override
    def __iter__(self) -> Iterator[list[SampleIndex]]:
        step = self._current_step() if self._current_step else 0
        for batch in self._batches:
            yield [index._replace(step=step) for index in batch]
