"""Training of a grid of MLP heads: all inputs, learning rates and seeds in one call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from threading import Event

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

from jepa_audio.parallel import progress_bar
from jepa_audio.probing.features import Features
from jepa_audio.probing.heads import Device, FitContext, Head, HeadInput
from jepa_audio.probing.heads.stacked import MLPSettings, StackedAdam, StackedHeads
from jepa_audio.probing.tasks.labels import Labels

# Values of the hidden units of all heads that are computed at once: 512 MiB.
_MAX_HIDDEN_VALUES = 2**27
# Groups of layers are trained together (see `group_inputs`). On one core, larger groups are not
# faster for each layer.
_MAX_LAYERS_PER_GROUP = 3
# A group takes at most a quarter of the layers that are left. The last groups are then small, and
# all cores end at nearly the same time. The cores compute in 95 % of the wall time; before this
# limit, in 87 %.
_MIN_GROUPS_LEFT = 4


@dataclass(frozen=True)
class MLPHead(Head):
    """A trained head with one hidden layer.

    Attributes:
        curve: validation score after every epoch.
        state: weights of the selected epoch.
    """

    setting_name = "learning rate"

    curve: tuple[float, ...]
    state: dict[str, Tensor]
    settings: MLPSettings

    @override
    def logits(self, features: Features, device: Device = "cpu") -> Float[Tensor, "rows 1 C"]:
        layers, num_outputs = self.input.layers, self.state["outer.bias"].shape[1]
        widths = features.widths(layers)
        heads = StackedHeads([self.input], widths, num_outputs, 1, self.settings, self.seed)
        heads.load_state_dict(self.state)
        return compute_logits(heads.to(device), layers, features, device)


class TrainingRows:
    """Rows of the training split and their targets, drawn in batches of whole windows."""

    def __init__(self, fit: FitContext) -> None:
        self.features = fit.features["train"]
        self.targets = fit.data.labels.row_targets(fit.data.splits["train"], self.features.rows)
        starts = np.flatnonzero(np.diff(self.features.rows.window, prepend=-1))
        self._windows = np.split(np.arange(len(self.features)), starts[1:])
        self.max_rows_per_window = max(map(len, self._windows))

    def batches(
        self, batch_size: int, generator: torch.Generator
    ) -> Iterator[Int64[np.ndarray, " rows"]]:
        """Row indices of every batch of one epoch; `batch_size` counts windows."""
        for batch in torch.randperm(len(self._windows), generator=generator).split(batch_size):
            yield np.concatenate([self._windows[window] for window in batch.tolist()])


class _HeadTraining:
    """A head in training, with the schedule of its learning rate and its early stopping."""

    def __init__(self, head: MLPHead) -> None:
        self.head, self.best, self.epochs_since_best = head, -math.inf, 0
        protocol = head.settings.protocol
        # A schedule needs an optimizer; only its learning rate is used.
        self._optimizer = Optimizer([torch.empty(0)], {"lr": head.setting})
        self._schedule = ReduceLROnPlateau(
            self._optimizer, "max", protocol.plateau_factor, protocol.plateau_patience
        )

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def end_epoch(self, score: float, heads: StackedHeads, index: int) -> bool:
        """Record the validation score of an epoch; True if the training of this head ends."""
        head, protocol = self.head, self.head.settings.protocol
        is_best, keeps_last = score > self.best, head.settings.select == "last"
        self.best = max(self.best, score)
        self.epochs_since_best = 0 if is_best else self.epochs_since_best + 1
        self._schedule.step(score)
        self.head = replace(
            head,
            valid=score if keeps_last else self.best,
            curve=(*head.curve, score),
            state=heads.state_of(index) if is_best or keeps_last or not head.state else head.state,
        )
        is_stopped = self.epochs_since_best >= protocol.stop_patience
        return is_stopped or len(self.head.curve) >= protocol.max_epochs


def fit_grid(fit: FitContext, inputs: Sequence[HeadInput], settings: MLPSettings) -> list[MLPHead]:
    """Train one head for every seed, input and learning rate, in this order.

    All heads of a seed get the same initial weights and the same batches, as in separate runs with
    that seed. Each head has its own learning rate, plateau schedule, early stopping and best state.
    When a head stops, it is removed from the stacked parameters. Heads on layers of the same width
    share batched matrix products; each core trains the heads of a few layers. The result is that of
    separate runs, except for the rounding of sums.
    """
    train, protocol = TrainingRows(fit), settings.protocol
    # A batch of frames has thousands of rows, and one product uses all cores. A batch of clips has
    # 64 rows; each core then trains its own group.
    by_core = torch.device(fit.device).type == "cpu" and fit.data.task.grid_hz is None
    groups = group_inputs(inputs, train, settings, by_core)
    grid = list(product(fit.seeds, inputs, protocol.learning_rates))

    def train_group(seed: int, group: Sequence[HeadInput]) -> list[MLPHead]:
        heads: list[MLPHead] = []
        num_heads = len(group) * len(protocol.learning_rates)
        for stopped in _train_stack(fit, train, group, seed, settings, stop):
            skipped = sum(protocol.max_epochs - len(head.curve) for head in stopped)
            progress.advance(bar, num_heads - len(heads) + skipped)
            heads += stopped
        return heads

    with progress_bar() as progress, _thread_pool(by_core) as (pool, stop):
        bar = progress.add_task(fit.description, total=len(grid) * protocol.max_epochs)
        running = [pool.submit(train_group, *work) for work in product(fit.seeds, groups)]
        heads = [head for group in as_completed(running) for head in group.result()]
    by_point = {(head.seed, head.input, head.setting): head for head in heads}
    return [by_point[point] for point in grid]


def _train_stack(
    fit: FitContext,
    train: TrainingRows,
    inputs: Sequence[HeadInput],
    seed: int,
    settings: MLPSettings,
    stop: Event,
) -> Iterator[list[MLPHead]]:
    """Train the heads of a group, and yield after each epoch the heads that have stopped."""
    layers = [layer for head_input in inputs for layer in head_input.layers]
    labels, rates = fit.data.labels, settings.protocol.learning_rates
    widths = train.features.widths(layers)
    heads = StackedHeads(inputs, widths, labels.num_outputs, len(rates), settings, seed)
    heads.to(fit.device)
    adam = StackedAdam(heads)
    trainings = [
        _HeadTraining(MLPHead(head_input, rate, (), {}, settings, seed=seed))
        for head_input, rate in product(inputs, rates)
    ]
    order = torch.Generator().manual_seed(seed)
    while trainings:
        for rows in train.batches(settings.protocol.batch_size, order):
            if stop.is_set():
                return
            batch = [train.features.read(layer, rows).to(fit.device) for layer in layers]
            gradients = _gradients(heads, batch, train.targets[rows].to(fit.device), labels)
            adam.step(gradients, [training.learning_rate for training in trainings])
        logits = compute_logits(heads, layers, fit.features["val"], fit.device)
        scores = fit.validation_scores(logits).tolist()
        stopped: list[int] = []
        kept: list[int] = []
        for i, (training, score) in enumerate(zip(trainings, scores, strict=True)):
            (stopped if training.end_epoch(score, heads, i) else kept).append(i)
        yield [trainings[i].head for i in stopped]
        if stopped:
            heads.keep(kept)
            adam.keep(kept, heads)
            trainings = [trainings[i] for i in kept]


def _gradients(
    heads: StackedHeads, batch: Sequence[Tensor], targets: Tensor, labels: Labels
) -> tuple[Tensor, ...]:
    # The graph must be freed before `heads.keep`: it holds the shapes of the parameters.
    loss = labels.losses(heads(batch), targets).sum()
    return torch.autograd.grad(loss, list(heads.parameters()))


def group_inputs(
    inputs: Sequence[HeadInput], train: TrainingRows, settings: MLPSettings, by_core: bool
) -> list[list[HeadInput]]:
    """Divide the inputs into groups whose heads are trained in the same products.

    A group contains layers of one width, as many as memory allows, or one input of another kind,
    such as a weighted sum. With `by_core`, every core trains its own group: the groups are smaller,
    the slowest groups come first and the smallest last.
    """
    protocol = settings.protocol
    rows = protocol.batch_size * train.max_rows_per_window
    values_per_layer = len(protocol.learning_rates) * rows * settings.hidden
    max_layers = max(1, _MAX_HIDDEN_VALUES // values_per_layer)
    by_width: dict[int, list[HeadInput]] = {}
    for head_input in inputs:
        if head_input.kind == "layer":
            (width,) = train.features.widths(head_input.layers)
            by_width.setdefault(width, []).append(head_input)
    groups = [[head_input] for head_input in inputs if head_input.kind != "layer"]
    for left in by_width.values():
        while left:
            size = max_layers
            if by_core:
                quarter = math.ceil(len(left) / _MIN_GROUPS_LEFT)
                size = min(max_layers, _MAX_LAYERS_PER_GROUP, quarter)
            groups.append(left[:size])
            del left[:size]
    return groups


@contextmanager
def _thread_pool(by_core: bool) -> Iterator[tuple[ThreadPoolExecutor, Event]]:
    """A pool with one single-threaded worker for each of torch's threads, and a stop event.

    Matrix products of 64 rows are too small to be divided among threads. Without `by_core`, the
    pool has one worker that uses all threads. The event is set at the end of the block, so running
    workers stop after an error or an interrupt.
    """
    num_threads, stop = torch.get_num_threads(), Event()
    torch.set_num_threads(1 if by_core else num_threads)
    pool = ThreadPoolExecutor(num_threads if by_core else 1)
    try:
        yield pool, stop
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)


@torch.no_grad()
def compute_logits(
    heads: StackedHeads, layers: Sequence[int], features: Features, device: Device
) -> Float[Tensor, "rows K C"]:
    """Logits of all heads for every row of a split, in evaluation mode."""
    heads.eval()
    size = max(1, _MAX_HIDDEN_VALUES // (heads.num_heads * heads.hidden))
    slices = [slice(start, start + size) for start in range(0, len(features), size)]
    logits = [heads([features.read(i, rows).to(device) for i in layers]) for rows in slices]
    heads.train()
    return torch.cat(logits)
