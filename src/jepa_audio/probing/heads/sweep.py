"""The whole grid of layers, learning rates and seeds in one fit; every head has its own schedule and stop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from rich.progress import track
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau

from jepa_audio.probing.features import Features
from jepa_audio.probing.heads.base import Head, Source
from jepa_audio.probing.heads.stacked import Heads, LayerHeads, MixHeads, ReduceHeads
from jepa_audio.probing.tasks.base import ProbeData

_ROWS_AT_ONCE = 8192  # of an evaluation
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

    def logits(self, features: Features, device: torch.device | str = "cpu") -> Float[Tensor, "rows 1 C"]:
        """See `Head`."""
        widths = features.widths(self.source.layers)
        num_outputs = self.state["outer_bias"].shape[1]
        heads = make_heads(self.source, widths, num_outputs, 1, self.training, self.seed).to(device)
        heads.load_state_dict(self.state)
        return read_all(heads, self.source, features, device)


class Batches:
    """Rows of one split and what they are held to, drawn in batches of whole windows.

    Args:
        features: of the split.
        data: the task.
        split: its name.
        device: on which batches are wanted.
    """

    def __init__(self, features: Features, data: ProbeData, split: str, device: torch.device | str) -> None:
        self.features, self.data, self.split, self.device = features, data, data.splits[split], device
        self.targets = data.labels.row_targets(self.split, features.rows)
        self._first = np.flatnonzero(np.diff(features.rows.window, prepend=-1))
        self._count = np.diff(self._first, append=len(features))

    def orders(self, batch_size: int, generator: torch.Generator) -> Iterator[Int64[np.ndarray, " rows"]]:
        """The rows of every batch of an epoch."""
        order = torch.randperm(len(self._first), generator=generator).numpy()
        for start in range(0, len(order), batch_size):
            windows = order[start : start + batch_size]
            if len(self._first) == len(self.features):
                yield windows
            else:
                yield np.concatenate([np.arange(self._first[w], self._first[w] + self._count[w]) for w in windows])

    def target(self, rows: Int64[np.ndarray, " n"]) -> Shaped[Tensor, "n ..."]:
        """What some rows are held to."""
        return self.targets[rows].to(self.device)

    def layer(self, layer: int, rows: Int64[np.ndarray, " n"] | slice) -> Float[Tensor, "n _"]:
        """Some rows of a layer."""
        return self.features.of(layer, rows).to(self.device)

    def scores(self, logits: Float[Tensor, "rows K C"]) -> Float[np.ndarray, " K"]:
        """What the first metric of the task says of K heads; a score that is no number is the worst."""
        task, unit = self.data.task, self.data.task.units[0]
        answers = self.data.labels.answers(logits, self.split, self.features.rows, unit)
        truth = self.data.labels.truth(self.split, self.features.rows, unit)
        return np.nan_to_num(task.metrics[0](answers, truth).double().cpu().numpy(), nan=-math.inf)


class _Contender:
    """A head while it is trained: its optimizer, schedule, best state and patience."""

    def __init__(self, learning_rate: float, training: Training, heads: Heads, place: int) -> None:
        self.learning_rate, self.training = learning_rate, training
        self.curve: list[float] = []
        self.best, self.waited = -math.inf, 0
        self.state: dict[str, Tensor] = {}
        self.weights = [nn.Parameter(parameter.data[place]) for parameter in heads.parameters()]
        self.optimizer = Adam(self.weights, lr=learning_rate, fused=True)
        self.schedule = ReduceLROnPlateau(
            self.optimizer, mode="max", factor=training.plateau_factor, patience=training.plateau_patience
        )

    def move(self, heads: Heads, place: int) -> None:
        """Train the weights at another place of stacked ones: they share the memory."""
        for weight, parameter in zip(self.weights, heads.parameters(), strict=True):
            weight.data = parameter.data[place]

    def step(self, gradients: Sequence[Tensor], place: int) -> None:
        """One step by the gradients at that place."""
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient[place].contiguous()  # fused Adam reads it as it lies; of one row it lies otherwise
        self.optimizer.step()

    def has_ended(self, score: float, heads: Heads, place: int) -> bool:
        """Take the score of an epoch; whether patience is at its end."""
        self.curve.append(score)
        self.schedule.step(score)
        self.waited = 0 if score > self.best else self.waited + 1
        if score > self.best or not self.state or self.training.select == "last":
            self.state = heads.state_of(place)
        self.best = max(self.best, score)
        return self.waited >= self.training.stop_patience or len(self.curve) >= self.training.max_epochs

    def trained(self, source: Source, seed: int) -> MLPHead:
        """The head as it is scored."""
        valid = self.best if self.training.select == "best" else self.curve[-1]
        return MLPHead(source, self.learning_rate, seed, valid, tuple(self.curve), self.state, self.training)


class _Group:
    """Heads on one source with one seed: one for each learning rate, fewer as they stop."""

    def __init__(self, source: Source, seed: int, training: Training, batches: Batches, num_outputs: int) -> None:
        self.source, self.seed = source, seed
        widths, rates = batches.features.widths(source.layers), training.learning_rates
        self.heads = make_heads(source, widths, num_outputs, len(rates), training, seed).to(batches.device)
        self.contenders = [_Contender(rate, training, self.heads, place) for place, rate in enumerate(rates)]

    def train(self, train: Batches, valid: Batches, batch_size: int) -> list[MLPHead]:
        """All epochs, until the last head stops."""
        order = torch.Generator().manual_seed(self.seed)
        done: list[MLPHead] = []
        while self.contenders:
            for rows in train.orders(batch_size, order):
                self._step([train.layer(layer, rows) for layer in self.source.layers], train.target(rows), train.data)
            done += self._close_epoch(valid)
        return done

    def _step(self, rows: Sequence[Float[Tensor, "n _"]], targets: Shaped[Tensor, "n ..."], data: ProbeData) -> None:
        """One step of every head."""
        parameters = list(self.heads.parameters())
        gradients = torch.autograd.grad(data.labels.losses(self.heads(rows), targets).sum(), parameters)
        for place, contender in enumerate(self.contenders):
            contender.step(gradients, place)

    def _close_epoch(self, valid: Batches) -> list[MLPHead]:
        """Score every head; those that have ended leave."""
        scores = valid.scores(read_all(self.heads, self.source, valid.features, valid.device))
        left, staying = [], []
        for place, (contender, score) in enumerate(zip(self.contenders, scores.tolist(), strict=True)):
            if contender.has_ended(score, self.heads, place):
                left.append(contender.trained(self.source, self.seed))
            else:
                staying.append(place)
        if left:
            self.heads.keep(staying)
            self.contenders = [self.contenders[place] for place in staying]
            for place, contender in enumerate(self.contenders):
                contender.move(self.heads, place)
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

    All heads of a seed see the same batches and begin alike, as separate runs with that seed do; each has an optimizer,
    a plateau schedule, an early stop and a best state of its own, and leaves when it stops. Heads on one layer share
    the products; layers are trained side by side, each on one core. The result is that of separate runs, but for the
    rounding of sums.

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
    largest_first = sorted(product(seeds, sources), key=lambda point: -len(point[1].layers))

    def trained(point: tuple[int, Source]) -> list[MLPHead]:
        seed, source = point
        group = _Group(source, seed, training, train, data.labels.num_outputs)
        return group.train(train, valid, training.batch_size)

    with _one_core_each(device, in_time=data.task.grid_hz is not None) as pool:
        of_groups = track(pool.map(trained, largest_first), description, total=len(largest_first), transient=True)
        done = {(head.seed, head.source, head.setting): head for heads in of_groups for head in heads}
    return [done[point] for point in product(seeds, sources, training.learning_rates)]


@contextmanager
def _one_core_each(device: torch.device | str, in_time: bool) -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has, of which each computes by itself: products of 64 rows are too small to divide.

    On another device, and for the thousands of rows of annotations in time, one thread hands out the work.
    """
    num_threads = torch.get_num_threads()
    apart = torch.device(device).type == "cpu" and not in_time
    try:
        torch.set_num_threads(1 if apart else num_threads)
        with ThreadPoolExecutor(num_threads if apart else 1) as pool:
            yield pool
    finally:
        torch.set_num_threads(num_threads)


@torch.no_grad()
def read_all(heads: Heads, source: Source, features: Features, device: torch.device | str) -> Float[Tensor, "rows K C"]:
    """What heads say of every row of a split."""
    heads.eval()
    parts = []
    for start in range(0, len(features), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        parts.append(heads([features.of(layer, some).to(device) for layer in source.layers]))
    heads.train()
    return torch.cat(parts)


def make_heads(
    source: Source, widths: Sequence[int], num_outputs: int, num_heads: int, training: Training, seed: int
) -> Heads:
    """Untrained heads on a source whose layers have these widths.

    Raises:
        ValueError: if layers of unlike widths are to be summed.
    """
    generator = torch.Generator().manual_seed(seed)
    rest = (training.hidden, num_outputs, num_heads, training.dropout, generator)
    if source.kind == "layer":
        return LayerHeads(widths[0], *rest)
    if source.kind == "reduce":
        return ReduceHeads(sum(widths), max(widths), *rest)
    if len(set(widths)) > 1:
        raise ValueError(f"{source.name} needs layers of one width, these have {list(widths)}")
    return MixHeads(len(widths), widths[0], *rest)
