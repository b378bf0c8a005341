"""A grid of heads in one fit equals separate fits of a plain network with torch's optimizer."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jepa_audio.probing.features import Features
from jepa_audio.probing.heads import FitContext, HeadInput, choose, sweep
from jepa_audio.probing.heads.stacked import MLPSettings, StackedAdam, StackedHeads
from jepa_audio.probing.heads.sweep import MLPHead, TrainingRows, group_inputs
from jepa_audio.probing.metrics import DrawScorer, Metric
from jepa_audio.probing.metrics.ranking import AUROC
from jepa_audio.probing.metrics.sums import R2, Accuracy
from jepa_audio.probing.tasks import ProbeData, Task
from jepa_audio.probing.tasks.base import Protocol, Windows
from jepa_audio.probing.tasks.labels import ClipLabels, Multiclass, Multilabel, Regression, Rows
from jepa_audio.probing.tasks.records import Item, Split

# The last of the training batches 22 + 22 + 1 has a single row.
SIZES = {"train": 45, "val": 21, "test": 17}
WIDTH, LAYERS = 12, 3
PROTOCOL = Protocol(
    Windows(),
    max_epochs=14,
    stop_patience=4,
    plateau_patience=1,
    learning_rates=(1e-3, 1e-2, 0.05),
    batch_size=22,
)
SETTINGS = MLPSettings(PROTOCOL, hidden=16, dropout=0.0)
LAYER_INPUTS = [HeadInput(f"layer {i}", (i,)) for i in range(LAYERS)]
MIX = HeadInput("weighted sum", (1, 2), "mix")
REDUCE = HeadInput("all layers", (0, 1, 2), "reduce")


class NegativeLoss(Metric):
    """The negative loss: smooth, so that rounding does not change which epoch is best."""

    name = "negative_loss"

    def __init__(self, kind: str) -> None:
        self.loss = {
            "class": F.cross_entropy,
            "tags": F.binary_cross_entropy_with_logits,
            "numbers": F.mse_loss,
        }[kind]

    def __call__(self, answers: Tensor, truth: np.ndarray) -> Tensor:
        return -torch.stack(
            [
                self.loss(answers[:, head], torch.from_numpy(truth))
                for head in range(answers.shape[1])
            ]
        )

    def draw_scorer(self, answers: np.ndarray, truth: np.ndarray) -> DrawScorer:
        raise NotImplementedError


def labels_and_values(
    kind: str, num: int, rng: np.random.Generator
) -> tuple[ClipLabels, Metric, list, np.ndarray]:
    """Labels as they are in records, and the values that the features encode."""
    if kind == "class":
        drawn = rng.integers(0, 4, num)
        return Multiclass(), Accuracy(), [f"class {i}" for i in drawn], np.eye(4)[drawn]
    if kind == "tags":
        tags = rng.random((num, 3)) < 0.4
        return (
            Multilabel(),
            AUROC(),
            [[f"tag {i}" for i in np.flatnonzero(row)] for row in tags],
            tags.astype(float),
        )
    numbers = rng.standard_normal((num, 2))
    return Regression(), R2(), numbers.tolist(), numbers


def task_of(
    kind: str = "class", several_windows: bool = False
) -> tuple[ProbeData, dict[str, Features]]:
    rng = np.random.default_rng(3)
    direction = {"class": 4, "tags": 3, "numbers": 2}[kind]
    directions = rng.standard_normal((LAYERS, direction, WIDTH))
    splits, features = {}, {}
    for split, size in SIZES.items():
        labels, metric, written, values = labels_and_values(kind, size, rng)
        splits[split] = Split(
            tuple(Item(Path("x"), label, f"{split} {i}", "here") for i, label in enumerate(written))
        )
        item = np.repeat(np.arange(size), 2) if several_windows else np.arange(size)
        noise = rng.standard_normal((LAYERS, len(item), WIDTH))
        layers = [
            (0.6 * values[item] @ directions[i] + noise[i]).astype(np.float32)
            for i in range(LAYERS)
        ]
        rows = Rows(item, np.arange(len(item)), np.zeros(len(item)))
        features[split] = Features(layers, np.arange(len(item)), rows)
    task = Task("toy", "toy", labels, (metric,), {})
    return ProbeData(task, labels.fitted(splits["train"]), splits, ""), features


def context_of(
    features: dict[str, Features], data: ProbeData, seeds: tuple[int, ...] = ()
) -> FitContext:
    return FitContext(features, data, (), seeds, "cpu", "heads")


def fit_grid(
    features: dict[str, Features],
    data: ProbeData,
    inputs: list[HeadInput],
    settings: MLPSettings,
    seeds: tuple[int, ...],
) -> list[MLPHead]:
    return sweep.fit_grid(context_of(features, data, seeds), inputs, settings)


def with_protocol(**changes: object) -> MLPSettings:
    return replace(SETTINGS, protocol=replace(PROTOCOL, **changes))


class Plain(nn.Module):
    """The same head as a plain network, with the initial weights of the stacked heads."""

    def __init__(
        self, source: HeadInput, num_outputs: int, settings: MLPSettings, seed: int
    ) -> None:
        super().__init__()
        widths = [WIDTH] * len(source.layers)
        heads = StackedHeads([source], widths, num_outputs, 1, settings, seed)
        self.source, self.kind, self.dropout = source, source.kind, settings.dropout
        self.generator = heads.generator
        self.inner, self.outer = (
            nn.Linear(WIDTH, settings.hidden),
            nn.Linear(settings.hidden, num_outputs),
        )
        state = {name: value[0].detach().clone() for name, value in heads.named_parameters()}
        for name, part in (("inner", self.inner), ("outer", self.outer)):
            part.weight.data, part.bias.data = state[f"{name}.weight"], state[f"{name}.bias"]
        if self.kind == "mix":
            self.mixing = nn.Parameter(state["mixing"])
        if self.kind == "reduce":
            self.reduce = nn.Linear(WIDTH * len(source.layers), WIDTH)
            self.reduce.weight.data, self.reduce.bias.data = (
                state["reduce.weight"],
                state["reduce.bias"],
            )

    def forward(self, layers: list[Tensor]) -> Tensor:
        if self.kind == "mix":
            x = sum(
                share * layer for share, layer in zip(self.mixing.softmax(0), layers, strict=True)
            )
        else:
            x = self.reduce(torch.cat(layers, 1)) if self.kind == "reduce" else layers[0]
        units = self.inner(x).relu()
        if self.training and self.dropout:
            kept = (
                torch.rand(len(units), 1, units.shape[1], generator=self.generator)[:, 0]
                >= self.dropout
            )
            units = units * kept / (1 - self.dropout)
        return self.outer(units)


def fit_plainly(
    source: HeadInput,
    rate: float,
    seed: int,
    settings: MLPSettings,
    data: ProbeData,
    features: dict[str, Features],
) -> tuple[list[float], nn.Module]:
    """Train one head alone: its validation curve, and the network of the best epoch."""
    training = settings.protocol
    net = Plain(source, data.labels.num_outputs, settings, seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=training.plateau_factor, patience=training.plateau_patience
    )
    loss = {
        "class": nn.CrossEntropyLoss(),
        "tags": nn.BCEWithLogitsLoss(),
        "numbers": nn.MSELoss(),
    }[data.labels.kind]
    targets = data.labels.row_targets(data.splits["train"], features["train"].rows)
    order = torch.Generator().manual_seed(seed)
    curve: list[float] = []
    best, waited, state = -np.inf, 0, {}
    while len(curve) < training.max_epochs and waited < training.stop_patience:
        net.train()
        for rows in torch.randperm(len(targets), generator=order).split(training.batch_size):
            optimizer.zero_grad()
            loss(
                net([features["train"].read(layer, rows.numpy()) for layer in source.layers]),
                targets[rows],
            ).backward()
            optimizer.step()
        net.eval()
        curve.append(score_plainly(net, data, features["val"]))
        schedule.step(curve[-1])
        waited = 0 if curve[-1] > best else waited + 1
        if curve[-1] > best:
            best, state = (
                curve[-1],
                {name: value.clone() for name, value in net.state_dict().items()},
            )
    net.load_state_dict(state)
    return curve, net


@torch.no_grad()
def score_plainly(net: nn.Module, data: ProbeData, features: Features) -> float:
    logits = net([features.read(layer) for layer in net.source.layers])
    split = data.splits["val"]
    answers = torch.stack([logits[features.rows.item == i].mean(0) for i in range(len(split))])
    return float(data.task.metrics[0](answers[:, None], data.labels.encode(split.items))[0])


@pytest.mark.parametrize(
    ("kind", "dropout"), [("class", 0.0), ("class", 0.3), ("tags", 0.0), ("numbers", 0.3)]
)
def test_the_grid_in_one_fit_equals_separate_fits(
    kind: str, dropout: float, monkeypatch: pytest.MonkeyPatch
):
    # Otherwise, each of these few layers would be a group.
    monkeypatch.setattr(sweep, "_MIN_GROUPS_LEFT", 1)
    data, features = task_of(kind, several_windows=kind == "numbers")
    data = replace(data, task=replace(data.task, metrics=(NegativeLoss(kind),)))
    settings = replace(SETTINGS, dropout=dropout)
    heads = fit_grid(features, data, [*LAYER_INPUTS, MIX, REDUCE], settings, seeds=(7, 8))
    assert len(heads) == 2 * 5 * 3
    lengths = {len(head.curve) for head in heads}
    assert len(lengths) > 1, "some heads must stop before others"
    for head in heads:
        curve, net = fit_plainly(head.input, head.setting, head.seed, settings, data, features)
        np.testing.assert_allclose(
            head.curve, curve, rtol=2e-3, err_msg=f"{head.input} {head.setting} {head.seed}"
        )
        with torch.no_grad():
            expected = net.eval()([features["test"].read(layer) for layer in head.input.layers])
        torch.testing.assert_close(
            head.logits(features["test"])[:, 0], expected, atol=0.02, rtol=0.02
        )


def test_the_weights_of_the_best_or_the_last_epoch_are_kept():
    data, features = task_of()
    best = fit_grid(features, data, LAYER_INPUTS, SETTINGS, seeds=(7,))
    last = fit_grid(features, data, LAYER_INPUTS, replace(SETTINGS, select="last"), seeds=(7,))
    assert any(len(head.curve) - 1 != int(np.argmax(head.curve)) for head in best)
    for one, other in zip(best, last, strict=True):
        assert one.curve == other.curve
        assert one.valid == max(one.curve)
        assert other.valid == other.curve[-1]
        assert accuracy(one, data, features) == pytest.approx(max(one.curve))
        assert accuracy(other, data, features) == pytest.approx(other.curve[-1])


def accuracy(head: MLPHead, data: ProbeData, features: dict[str, Features]) -> float:
    logits = head.logits(features["val"])
    return float(
        (logits[:, 0].argmax(1).numpy() == data.labels.encode(data.splits["val"].items)).mean()
    )


def test_random_draws_depend_on_the_seed_alone():
    data, features = task_of()
    settings = replace(SETTINGS, dropout=0.5)
    torch.manual_seed(1)
    one = fit_grid(features, data, [LAYER_INPUTS[1]], settings, seeds=(7,))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    same = fit_grid(features, data, [LAYER_INPUTS[1]], settings, seeds=(7,))
    assert torch.equal(torch.get_rng_state(), state)
    other = fit_grid(features, data, [LAYER_INPUTS[1]], settings, seeds=(8,))
    assert [head.curve for head in one] == [head.curve for head in same]
    assert [head.curve for head in one] != [head.curve for head in other]


def test_the_chosen_head_is_the_best_on_average_over_seeds():
    data, features = task_of()
    heads = fit_grid(features, data, LAYER_INPUTS, SETTINGS, seeds=(7, 8, 9))
    choice = choose(heads)
    assert choice.valid.shape == (3, 3)
    assert [head.seed for head in choice.heads] == [7, 8, 9]
    chosen = choice.heads[0]
    place = (
        choice.inputs.index(chosen.input),
        choice.settings.index(chosen.setting),
    )
    assert choice.valid[place] == choice.valid.max()
    assert choice.valid[place] == pytest.approx(np.mean([head.valid for head in choice.heads]))


def test_a_weighted_sum_prefers_the_informative_layer():
    data, features = task_of()
    rng = np.random.default_rng(0)
    for split in features.values():
        split.layers[1][:] = rng.standard_normal(split.layers[1].shape)
    settings = with_protocol(learning_rates=(3e-2,), max_epochs=60, stop_patience=60)
    (head,) = fit_grid(features, data, [MIX], settings, seeds=(0,))
    untrained = StackedHeads([MIX], [WIDTH, WIDTH], 4, 1, settings, 0).mixing[0].softmax(0)
    assert head.state["mixing"][0].softmax(0)[1] > untrained[1]


def test_layers_of_different_widths_cannot_be_summed():
    with pytest.raises(ValueError, match=r"weighted sum needs layers of one width, got \[3, 4\]"):
        StackedHeads([MIX], [3, 4], 2, 1, SETTINGS, 0)


@pytest.mark.parametrize("memory", [1, 2**27])
def test_groups_depend_on_width_and_memory_and_do_not_change_the_heads(
    memory: int, monkeypatch: pytest.MonkeyPatch
):
    data, features = task_of()
    for split in features.values():
        split.layers[2] = split.layers[2][:, :7]
    separate = [
        head
        for head_input in LAYER_INPUTS
        for head in fit_grid(features, data, [head_input], SETTINGS, seeds=(7,))
    ]
    monkeypatch.setattr(sweep, "_MAX_HIDDEN_VALUES", memory)
    # Otherwise, each of these few layers would be a group.
    monkeypatch.setattr(sweep, "_MIN_GROUPS_LEFT", 1)
    train = TrainingRows(context_of(features, data))
    groups = group_inputs([*LAYER_INPUTS, MIX], train, SETTINGS, by_core=False)
    one_each = [[head_input] for head_input in LAYER_INPUTS]
    by_width = [LAYER_INPUTS[:2], LAYER_INPUTS[2:]]
    assert groups == [[MIX], *(by_width if memory > 1 else one_each)]
    heads = fit_grid(features, data, LAYER_INPUTS, SETTINGS, seeds=(7,))
    for head, other in zip(heads, separate, strict=True):
        assert (head.input, head.setting) == (other.input, other.setting)
        assert head.curve == pytest.approx(other.curve, abs=0.06), "one file of 21 by rounding"


def test_the_last_groups_are_small():
    data, features = task_of()
    many = replace(features["train"], layers=[features["train"].layers[0]] * 13)
    train = TrainingRows(context_of({"train": many}, data))
    inputs = [HeadInput(str(i), (i,)) for i in range(13)]
    groups = group_inputs([*inputs, MIX], train, SETTINGS, by_core=True)
    assert groups[0] == [MIX]
    assert [len(group) for group in groups[1:]] == [3, 3, 2, 2, 1, 1, 1]
    assert [head_input for group in groups[1:] for head_input in group] == inputs


def test_an_error_stops_all_threads_and_restores_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
):
    data, features = task_of()
    step, threads = StackedAdam.step, set()
    both_started = threading.Barrier(2)

    def fail_in_one_thread(
        adam: StackedAdam, gradients: list[Tensor], learning_rates: list[float]
    ) -> None:
        if threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            if both_started.wait(timeout=300) == 0:
                raise RuntimeError("one of two threads")
        step(adam, gradients, learning_rates)

    monkeypatch.setattr(StackedAdam, "step", fail_in_one_thread)
    endless = with_protocol(max_epochs=10**9, stop_patience=10**9)
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="one of two threads"):
            fit_grid(features, data, LAYER_INPUTS, endless, seeds=(7,))
        assert torch.get_num_threads() == 2
        assert len(threads) == 2
    finally:
        torch.set_num_threads(1)


def test_nan_is_never_the_best_score():
    data, features = task_of("numbers")
    settings = with_protocol(learning_rates=(1e-2, 1e30))
    heads = fit_grid(features, data, [LAYER_INPUTS[0]], settings, seeds=(0,))
    assert choose(heads).heads[0].setting == 1e-2


def test_features_on_disk_give_the_same_heads(tmp_path: Path):
    data, features = task_of()
    on_disk = {}
    for split, of_split in features.items():
        scattered = np.random.default_rng(1).permutation(len(of_split))
        layers = []
        for i, layer in enumerate(of_split.layers):
            table = np.memmap(tmp_path / f"{split}-{i}", np.float32, "w+", shape=layer.shape)
            table[scattered] = layer
            layers.append(table)
        on_disk[split] = Features(layers, scattered, of_split.rows)
    one, other = (
        fit_grid(each, data, [*LAYER_INPUTS, MIX], SETTINGS, seeds=(7,))
        for each in (features, on_disk)
    )
    assert [head.curve for head in one] == [head.curve for head in other]
