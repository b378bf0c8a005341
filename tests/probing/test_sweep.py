"""The whole grid in one fit is what separate fits are: held against a plain network with torch's own optimizer."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jepa_audio.probing.features import Features
from jepa_audio.probing.heads import Source, choose, sweep
from jepa_audio.probing.heads.sweep import MLPHead, Training, fit_grid, make_heads
from jepa_audio.probing.metrics import AUROC, R2, Accuracy, Metric
from jepa_audio.probing.tasks import ProbeData, Task
from jepa_audio.probing.tasks.labels import ClipLabels, Multiclass, Multilabel, Regression, Rows
from jepa_audio.probing.tasks.records import Item, Split

SIZES = {"train": 45, "val": 21, "test": 17}  # the last batch of 22 + 22 + 1 is a single row
WIDTH, LAYERS = 12, 3
TRAINING = Training(
    (1e-3, 1e-2, 0.05),
    22,
    max_epochs=14,
    stop_patience=4,
    plateau_patience=1,
    hidden=16,
    dropout=0.0,
)
EACH = [Source(f"layer {i}", (i,)) for i in range(LAYERS)]
MIX = Source("weighted sum", (1, 2), "mix")
REDUCE = Source("all layers", (0, 1, 2), "reduce")


class Nearness(Metric):
    """Minus the loss of the answers: smooth, so that rounding decides nothing."""

    name = "nearness"

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

    def resampled(self, answers: np.ndarray, truth: np.ndarray, counts: np.ndarray) -> np.ndarray:
        raise NotImplementedError


def labels_and_values(
    kind: str, num: int, rng: np.random.Generator
) -> tuple[ClipLabels, Metric, list, np.ndarray]:
    """Labels as records hold them, and what the features shall tell of them."""
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
    towards = rng.standard_normal((LAYERS, direction, WIDTH))
    splits, features = {}, {}
    for split, size in SIZES.items():
        labels, metric, written, values = labels_and_values(kind, size, rng)
        splits[split] = Split(
            tuple(Item(Path("x"), label, f"{split} {i}", "here") for i, label in enumerate(written))
        )
        item = np.repeat(np.arange(size), 2) if several_windows else np.arange(size)
        noise = rng.standard_normal((LAYERS, len(item), WIDTH))
        layers = [
            (0.6 * values[item] @ towards[i] + noise[i]).astype(np.float32) for i in range(LAYERS)
        ]
        rows = Rows(item, np.arange(len(item)), np.zeros(len(item)))
        features[split] = Features(layers, np.arange(len(item)), rows)
    task = Task("toy", "toy", labels, (metric,), {})
    return ProbeData(task, labels.fitted(splits["train"]), splits, ""), features


class Plain(nn.Module):
    """The same head written plainly, with the weights that a group of heads begins with."""

    def __init__(self, source: Source, num_outputs: int, training: Training, seed: int) -> None:
        super().__init__()
        heads = make_heads([source], [WIDTH] * len(source.layers), num_outputs, 1, training, seed)
        self.source, self.kind, self.dropout = source, source.kind, training.dropout
        self.generator = heads.generator
        self.inner, self.outer = (
            nn.Linear(WIDTH, training.hidden),
            nn.Linear(training.hidden, num_outputs),
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
    source: Source,
    rate: float,
    seed: int,
    training: Training,
    data: ProbeData,
    features: dict[str, Features],
) -> tuple[list[float], nn.Module]:
    """One head by itself: its validation curve, and the network in its best state."""
    net = Plain(source, data.labels.num_outputs, training, seed)
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
                net([features["train"].of(layer, rows.numpy()) for layer in source.layers]),
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
    logits = net([features.of(layer) for layer in net.source.layers])
    split = data.splits["val"]
    answers = torch.stack([logits[features.rows.item == i].mean(0) for i in range(len(split))])
    return float(data.task.metrics[0](answers[:, None], data.labels.encode(split.items))[0])


@pytest.mark.parametrize(
    ("kind", "dropout"), [("class", 0.0), ("class", 0.3), ("tags", 0.0), ("numbers", 0.3)]
)
def test_the_grid_in_one_fit_is_the_separate_fits(
    kind: str, dropout: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sweep, "_GROUPS_LEFT", 1)  # so few layers would go to cores one by one
    data, features = task_of(kind, several_windows=kind == "numbers")
    data = replace(data, task=replace(data.task, metrics=(Nearness(kind),)))
    training = replace(TRAINING, dropout=dropout)
    heads = fit_grid(features, data, [*EACH, MIX, REDUCE], training, seeds=(7, 8))
    assert len(heads) == 2 * 5 * 3
    lengths = {len(head.curve) for head in heads}
    assert len(lengths) > 1, "some stop before others, else this test shows less than it says"
    for head in heads:
        curve, net = fit_plainly(head.source, head.setting, head.seed, training, data, features)
        np.testing.assert_allclose(
            head.curve, curve, rtol=2e-3, err_msg=f"{head.source} {head.setting} {head.seed}"
        )
        with torch.no_grad():
            expected = net.eval()([features["test"].of(layer) for layer in head.source.layers])
        torch.testing.assert_close(
            head.logits(features["test"])[:, 0], expected, atol=0.02, rtol=0.02
        )


def test_the_state_that_is_kept_is_that_of_the_best_epoch_or_of_the_last():
    data, features = task_of()
    best = fit_grid(features, data, EACH, TRAINING, seeds=(7,))
    last = fit_grid(features, data, EACH, replace(TRAINING, select="last"), seeds=(7,))
    assert any(len(head.curve) - 1 != int(np.argmax(head.curve)) for head in best)
    for one, other in zip(best, last, strict=True):
        assert one.curve == other.curve
        assert one.valid == max(one.curve)
        assert other.valid == other.curve[-1]
        assert score_head(one, data, features) == pytest.approx(max(one.curve))
        assert score_head(other, data, features) == pytest.approx(other.curve[-1])


def score_head(head: MLPHead, data: ProbeData, features: dict[str, Features]) -> float:
    logits = head.logits(features["val"])
    return float(
        (logits[:, 0].argmax(1).numpy() == data.labels.encode(data.splits["val"].items)).mean()
    )


def test_the_seed_draws_everything_and_nothing_else_does():
    data, features = task_of()
    training = replace(TRAINING, dropout=0.5)
    torch.manual_seed(1)
    one = fit_grid(features, data, [EACH[1]], training, seeds=(7,))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    same = fit_grid(features, data, [EACH[1]], training, seeds=(7,))
    assert torch.equal(torch.get_rng_state(), state)
    other = fit_grid(features, data, [EACH[1]], training, seeds=(8,))
    assert [head.curve for head in one] == [head.curve for head in same]
    assert [head.curve for head in one] != [head.curve for head in other]


def test_the_chosen_head_is_the_best_over_all_seeds():
    data, features = task_of()
    heads = fit_grid(features, data, EACH, TRAINING, seeds=(7, 8, 9))
    choice = choose(heads)
    assert choice.valid.shape == (3, 3)
    assert [head.seed for head in choice.heads] == [7, 8, 9]
    chosen = choice.heads[0]
    place = (
        [source.name for source in choice.sources].index(chosen.source.name),
        choice.settings.index(chosen.setting),
    )
    assert choice.valid[place] == choice.valid.max()
    assert choice.valid[place] == pytest.approx(np.mean([head.valid for head in choice.heads]))


def test_a_weighted_sum_finds_the_layer_that_knows():
    data, features = task_of()
    rng = np.random.default_rng(0)
    for split in features.values():
        split.layers[1][:] = rng.standard_normal(split.layers[1].shape)
    training = replace(TRAINING, learning_rates=(3e-2,), max_epochs=60, stop_patience=60)
    (head,) = fit_grid(features, data, [MIX], training, seeds=(0,))
    untrained = make_heads([MIX], [WIDTH, WIDTH], 4, 1, training, 0).mixing[0].softmax(0)
    assert head.state["mixing"][0].softmax(0)[1] > untrained[1]


def test_layers_of_unlike_width_are_not_summed():
    with pytest.raises(
        ValueError, match=r"weighted sum needs layers of one width, these have \[3, 4\]"
    ):
        make_heads([MIX], [3, 4], 2, 1, TRAINING, 0)


@pytest.mark.parametrize("memory", [1, 2**27])
def test_layers_share_products_by_width_and_memory_and_heads_do_not_notice(
    memory: int, monkeypatch: pytest.MonkeyPatch
):
    data, features = task_of()
    for split in features.values():
        split.layers[2] = split.layers[2][:, :7]
    alone = [
        head for source in EACH for head in fit_grid(features, data, [source], TRAINING, seeds=(7,))
    ]
    monkeypatch.setattr(sweep, "_NUMBERS_AT_ONCE", memory)
    monkeypatch.setattr(sweep, "_GROUPS_LEFT", 1)  # so few layers would go to cores one by one
    train = sweep.Batches(features["train"], data, "train", "cpu")
    groups = sweep.together([*EACH, MIX], train, TRAINING, apart=False)
    assert groups == (
        [[MIX], EACH[:2], EACH[2:]] if memory > 1 else [[MIX], *([source] for source in EACH)]
    )
    for head, lone in zip(fit_grid(features, data, EACH, TRAINING, seeds=(7,)), alone, strict=True):
        assert (head.source, head.setting) == (lone.source, lone.setting)
        assert head.curve == pytest.approx(lone.curve, abs=0.06), "one file of 21 by rounding"


def test_cores_get_groups_that_end_small():
    data, features = task_of()
    many = replace(features["train"], layers=[features["train"].layers[0]] * 13)
    train = sweep.Batches(many, data, "train", "cpu")
    groups = sweep.together(
        [*(Source(str(i), (i,)) for i in range(13)), MIX], train, TRAINING, apart=True
    )
    assert groups[0] == [MIX]
    assert [len(group) for group in groups[1:]] == [3, 3, 2, 2, 1, 1, 1]
    assert [source.layers for group in groups[1:] for source in group] == [(i,) for i in range(13)]


def test_what_fails_ends_the_rest_and_gives_torch_its_threads_back(monkeypatch: pytest.MonkeyPatch):
    data, features = task_of()
    step, steps = sweep.StackedAdam.step, []

    def fail_in_the_third(
        adam: sweep.StackedAdam, gradients: list[Tensor], rates: list[float]
    ) -> None:
        steps.append(threading.get_ident())
        if len(steps) == 3:
            raise RuntimeError("the third step")
        step(adam, gradients, rates)

    monkeypatch.setattr(sweep.StackedAdam, "step", fail_in_the_third)
    long = replace(TRAINING, max_epochs=100_000, stop_patience=100_000)
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="the third step"):
            fit_grid(features, data, EACH, long, seeds=(7,))
        assert torch.get_num_threads() == 2
        assert len(set(steps)) == 2
    finally:
        torch.set_num_threads(1)


def test_a_score_that_is_no_number_is_never_the_best():
    data, features = task_of("numbers")
    heads = fit_grid(
        features, data, [EACH[0]], replace(TRAINING, learning_rates=(1e-2, 1e30)), seeds=(0,)
    )
    assert choose(heads).heads[0].setting == 1e-2


def test_features_that_stay_on_disk_give_the_same_heads(tmp_path: Path):
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
        fit_grid(each, data, [*EACH, MIX], TRAINING, seeds=(7,)) for each in (features, on_disk)
    )
    assert [head.curve for head in one] == [head.curve for head in other]
