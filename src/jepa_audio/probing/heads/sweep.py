"""The whole grid of layers, learning rates and seeds in one fit; every head has its own schedule and stop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from threading import Event
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from jepa_audio.errors import UserError
from jepa_audio.parallel import progress_bar
from jepa_audio.probing.features import Features
from jepa_audio.probing.heads.adam import StackedAdam
from jepa_audio.probing.heads.base import Head, Source
from jepa_audio.probing.heads.stacked import Heads, LayerHeads, MixHeads, ReduceHeads, Shape
from jepa_audio.probing.tasks.base import ProbeData

_NUMBERS_AT_ONCE = 2**27  # of the hidden units of all heads: half a gigabyte
_LAYERS_ON_A_CORE = 3  # more are no faster
_GROUPS_LEFT = (
    4  # into which, at least, the layers that are left are divided: no core waits long for the last
)
Select = Literal["best", "last"]


@dataclass(frozen=True)
class Training:
    """How heads are trained.

    Args:
        learning_rates: of Adam; one head for each.
        batch_size: windows of a step.
        max_epochs: of a head.
        stop_patience: epochs without a better validation score after which a head stops.
        plateau_patience: epochs without a better one after which its learning rate falls.
        plateau_factor: by which it falls.
        hidden: units of the hidden layer.
        dropout: probability.
        select: the state that is scored: that of the best epoch, or of the last.
    """

    learning_rates: tuple[float, ...]
    batch_size: int
    max_epochs: int
    stop_patience: int
    plateau_patience: int
    plateau_factor: float = 0.5
    hidden: int = 512
    dropout: float = 0.2
    select: Select = "best"


@dataclass(frozen=True)
class MLPHead(Head):
    """A head of one hidden layer.

    Attributes:
        curve: validation score after every epoch.
        state: its weights.
        training: how it was trained.
    """

    curve: tuple[float, ...]
    state: dict[str, Tensor]
    training: Training

    def logits(
        self, features: Features, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "rows 1 C"]:
        """See `Head`."""
        widths = features.widths(self.source.layers)
        num_outputs = self.state["outer.bias"].shape[1]
        heads = make_heads([self.source], widths, num_outputs, 1, self.training, self.seed).to(
            device
        )
        heads.load_state_dict(self.state)
        return read_all(heads, self.source.layers, features, device)


class Batches:
    """Rows of one split and what they are held to, drawn in batches of whole windows.

    Args:
        features: of the split.
        data: the task.
        split: its name.
        device: on which batches are wanted.
    """

    def __init__(
        self, features: Features, data: ProbeData, split: str, device: torch.device | str
    ) -> None:
        self.features, self.data, self.split, self.device = (
            features,
            data,
            data.splits[split],
            device,
        )
        self.targets = data.labels.row_targets(self.split, features.rows)
        self._first = np.flatnonzero(np.diff(features.rows.window, prepend=-1))
        self._count = np.diff(self._first, append=len(features))

    def orders(
        self, batch_size: int, generator: torch.Generator
    ) -> Iterator[Int64[np.ndarray, " rows"]]:
        """The rows of every batch of an epoch."""
        order = torch.randperm(len(self._first), generator=generator).numpy()
        for start in range(0, len(order), batch_size):
            windows = order[start : start + batch_size]
            if len(self._first) == len(self.features):
                yield windows
            else:
                yield np.concatenate(
                    [np.arange(self._first[w], self._first[w] + self._count[w]) for w in windows]
                )

    @property
    def rows_of_a_window(self) -> int:
        """The most of any."""
        return int(self._count.max())

    def target(self, rows: Int64[np.ndarray, " n"]) -> Shaped[Tensor, "n ..."]:
        """What some rows are held to."""
        return self.targets[rows].to(self.device)

    def layer(self, layer: int, rows: Int64[np.ndarray, " n"] | slice) -> Float[Tensor, "n _"]:
        """Some rows of a layer."""
        return self.features.of(layer, rows).to(self.device)

    def scores(self, logits: Float[Tensor, "rows K C"]) -> Float[np.ndarray, " K"]:
        """What the first metric of the task says of K heads; a score that is no number is the worst."""
        scores = self.data.scores(logits, self.split, self.features.rows)
        return np.nan_to_num(scores.double().cpu().numpy(), nan=-math.inf)


class _Contender:
    """A head while it is trained: its place in the grid, schedule, best state and patience."""

    def __init__(self, source: Source, seed: int, learning_rate: float, training: Training) -> None:
        self.source, self.seed, self.setting, self.training = source, seed, learning_rate, training
        self.curve: list[float] = []
        self.best, self.waited = -math.inf, 0
        self.state: dict[str, Tensor] = {}
        self._rate = Optimizer(
            [torch.empty(0)], {"lr": learning_rate}
        )  # all that a schedule needs of an optimizer
        self._schedule = ReduceLROnPlateau(
            self._rate,
            mode="max",
            factor=training.plateau_factor,
            patience=training.plateau_patience,
        )

    @property
    def learning_rate(self) -> float:
        """That of its next step."""
        return float(self._rate.param_groups[0]["lr"])

    def has_ended(self, score: float, heads: Heads, place: int) -> bool:
        """Take the score of an epoch; whether patience is at its end."""
        self.curve.append(score)
        self._schedule.step(score)
        self.waited = 0 if score > self.best else self.waited + 1
        if score > self.best or not self.state or self.training.select == "last":
            self.state = heads.state_of(place)
        self.best = max(self.best, score)
        return (
            self.waited >= self.training.stop_patience
            or len(self.curve) >= self.training.max_epochs
        )

    def trained(self) -> MLPHead:
        """The head as it is scored."""
        valid = self.best if self.training.select == "best" else self.curve[-1]
        return MLPHead(
            self.source,
            self.setting,
            self.seed,
            valid,
            tuple(self.curve),
            self.state,
            self.training,
        )


class _Group:
    """Heads of one kind with one seed: one for each source and learning rate, fewer as they stop."""

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        training: Training,
        train: Batches,
        valid: Batches,
    ) -> None:
        self.seed, self.train, self.valid, self.batch_size = seed, train, valid, training.batch_size
        self.layers = [layer for source in sources for layer in source.layers]
        widths, num_rates = train.features.widths(self.layers), len(training.learning_rates)
        self.heads = make_heads(
            sources, widths, train.data.labels.num_outputs, num_rates, training, seed
        )
        self.heads.to(train.device)
        self.adam = StackedAdam(self.heads)
        grid = product(sources, training.learning_rates)
        self.contenders = [_Contender(source, seed, rate, training) for source, rate in grid]

    def epochs(self, ended: Event) -> Iterator[list[MLPHead]]:
        """Train until the last head stops, or everything ends; the heads that stop with each epoch."""
        order = torch.Generator().manual_seed(self.seed)
        while self.contenders:
            for rows in self.train.orders(self.batch_size, order):
                if ended.is_set():
                    return
                self._step(
                    [self.train.layer(layer, rows) for layer in self.layers],
                    self.train.target(rows),
                )
            yield self._close_epoch()

    def _step(self, rows: Sequence[Float[Tensor, "n _"]], targets: Shaped[Tensor, "n ..."]) -> None:
        """One step of every head."""
        loss = self.train.data.labels.losses(self.heads(rows), targets).sum()
        gradients = torch.autograd.grad(loss, list(self.heads.parameters()))
        self.adam.step(gradients, [contender.learning_rate for contender in self.contenders])

    def _close_epoch(self) -> list[MLPHead]:
        """Score every head; those that have ended leave."""
        scores = self.valid.scores(
            read_all(self.heads, self.layers, self.valid.features, self.valid.device)
        )
        left, staying = [], []
        for place, (contender, score) in enumerate(
            zip(self.contenders, scores.tolist(), strict=True)
        ):
            if contender.has_ended(score, self.heads, place):
                left.append(contender.trained())
            else:
                staying.append(place)
        if left:
            self.heads.keep(staying)
            self.adam.keep(staying, self.heads)
            self.contenders = [self.contenders[place] for place in staying]
        return left


def fit_grid(
    features: Mapping[str, Features],
    data: ProbeData,
    sources: Sequence[Source],
    training: Training,
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
    description: str = "heads",
) -> list[MLPHead]:
    """Train a head for every source, learning rate and seed.

    All heads of a seed see the same batches and begin alike, as separate runs with that seed do;
    each has a learning rate, a plateau schedule, an early stop and a best state of its own, and
    leaves when it stops. Those that read one layer, whichever, share products, a few layers on each
    core. The result is that of separate runs, but for the rounding of sums.

    Args:
        features: of the splits "train" and "val".
        data: the task.
        sources: what heads read.
        training: how they are trained.
        seeds: of weights, batches and dropout.
        device: where they are trained.
        description: of the progress bar.
    """
    train, valid = (Batches(features[split], data, split, device) for split in ("train", "val"))
    total = len(seeds) * len(sources) * len(training.learning_rates) * training.max_epochs

    def trained(seed: int, some: Sequence[Source]) -> list[MLPHead]:
        fitting, done = _Group(some, seed, training, train, valid), []
        for left in fitting.epochs(ended):
            done += left
            spared = sum(training.max_epochs - len(head.curve) for head in left)
            progress.advance(bar, len(fitting.contenders) + len(left) + spared)
        return done

    apart = torch.device(device).type == "cpu" and data.task.grid_hz is None
    alike = together(sources, train, training, apart)
    with progress_bar() as progress, _cores(apart) as (pool, ended):
        bar = progress.add_task(description, total=total)
        running = [pool.submit(trained, seed, some) for seed, some in product(seeds, alike)]
        heads = [head for group in as_completed(running) for head in group.result()]
    at = {(head.seed, head.source, head.setting): head for head in heads}
    return [at[point] for point in product(seeds, sources, training.learning_rates)]


def together(
    sources: Sequence[Source], train: Batches, training: Training, apart: bool
) -> list[list[Source]]:
    """The sources whose heads are trained in the same products: some layers of one width, as many as memory bears.

    If they go to cores apart, they are fewer, what takes longest comes first, and the last are the
    smallest.
    """
    numbers_of_a_layer = (
        len(training.learning_rates)
        * training.batch_size
        * train.rows_of_a_window
        * training.hidden
    )
    at_once = max(1, _NUMBERS_AT_ONCE // numbers_of_a_layer)
    by_width: dict[int, list[Source]] = {}
    groups = []
    for source in sources:
        if source.kind == "layer":
            (width,) = train.features.widths(source.layers)
            by_width.setdefault(width, []).append(source)
        else:
            groups.append([source])
    for alike in by_width.values():
        while alike:
            share = (
                min(at_once, _LAYERS_ON_A_CORE, math.ceil(len(alike) / _GROUPS_LEFT))
                if apart
                else at_once
            )
            groups.append(alike[:share])
            del alike[:share]
    return groups


@contextmanager
def _cores(apart: bool) -> Iterator[tuple[ThreadPoolExecutor, Event]]:
    """As many threads as torch has, of which each computes by itself: products of 64 rows are too small to divide.

    If not apart (on another device, and for the thousands of rows of annotations in time), one
    hands out the work. Work that still runs at the end, as something failed or was interrupted, is
    told so.
    """
    num_threads, ended = torch.get_num_threads(), Event()
    try:
        torch.set_num_threads(1 if apart else num_threads)
        with ThreadPoolExecutor(num_threads if apart else 1) as pool:
            try:
                yield pool, ended
            finally:
                ended.set()
                pool.shutdown(wait=False, cancel_futures=True)
    finally:
        torch.set_num_threads(num_threads)


@torch.no_grad()
def read_all(
    heads: Heads, layers: Sequence[int], features: Features, device: torch.device | str
) -> Float[Tensor, "rows K C"]:
    """What heads say of every row of a split, of which they are given some layers."""
    heads.eval()
    at_once = max(1, _NUMBERS_AT_ONCE // (heads.num_heads * heads.hidden))
    parts = []
    for start in range(0, len(features), at_once):
        some = slice(start, start + at_once)
        parts.append(heads([features.of(layer, some).to(device) for layer in layers]))
    heads.train()
    return torch.cat(parts)


def make_heads(
    sources: Sequence[Source],
    widths: Sequence[int],
    num_outputs: int,
    num_heads: int,
    training: Training,
    seed: int,
) -> Heads:
    """Untrained heads, so many on each source.

    Args:
        sources: several layers, or one source of another kind.
        widths: of all their layers.
        num_outputs: numbers a head gives.
        num_heads: on each source.
        training: how they will be trained.
        seed: of their weights and dropout.

    Raises:
        UserError: if layers of unlike widths are to be summed.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = Shape(training.hidden, num_outputs, len(sources) * num_heads, training.dropout)
    source = sources[0]
    if source.kind == "reduce":
        return ReduceHeads(sum(widths), max(widths), shape, generator)
    if len(set(widths)) > 1:
        raise UserError(f"{source.name} needs layers of one width, these have {list(widths)}")
    if source.kind == "mix":
        return MixHeads(len(widths), widths[0], shape, generator)
    return LayerHeads(
        [place for place in range(len(sources)) for _ in range(num_heads)],
        widths[0],
        shape,
        generator,
    )
