"""What does it save to fit all heads of a grid at once, and are they the heads that separate fits give?

The `marble-v1` grid, every layer and the weighted sum by six learning rates, on the same features
in memory:

grid           all heads in one `fit_grid`, timed first, between and last; the median counts
plain loop     each head by itself in the leanest loop: tensors indexed, fused Adam, validation in
one pass Lightning fit  each head by itself as is usual: LightningModule, DataLoaders on
TensorDatasets (batch 64, no workers),
               Adam with its defaults, early stop, checkpoint of the best epoch, torchmetrics, CSV
               logger; no progress bar, no summary. The best checkpoint of every head is loaded and
               tested
own process    the same Lightning fit as a command for each head, as MARBLE's scripts do: a process
that starts Python,
               reads the features of its layers from a file, fits, tests and ends; one after the
               other

A separate head has the first weights, batches and dropout of its twin in the grid, so the choices
must be equal: the same layer and learning rate, and no head's best validation score off by more
than `--files_off`. If not, the exit code is 1. Rounding alone moves heads of high learning rates by
some files within hundreds of steps. A tiny fit of each kind goes before, so that no import is
timed. Features are drawn, one row a file.

    python -m benchmarks.probe_grid [--size gtzan|nsynth] [--threads 2]
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from jepa_audio.probing.features import Features
from jepa_audio.probing.heads import FitContext, HeadInput
from jepa_audio.probing.heads.stacked import StackedHeads
from jepa_audio.probing.heads.sweep import MLPHead
from jepa_audio.probing.presets import MarbleV1
from jepa_audio.probing.tasks.base import ProbeData, Protocol, Task
from jepa_audio.probing.tasks.gtzan import GTZAN_GENRE
from jepa_audio.probing.tasks.labels import Multiclass, Rows
from jepa_audio.probing.tasks.nsynth import NSYNTH_INSTRUMENT
from jepa_audio.probing.tasks.records import SPLITS, Item, Split

SEED = 1234
WANTED = 20  # times as fast
MARGINS = 0.2, 1.9  # of the worst and the best layer, see `strength`
COLUMNS = (
    *(
        "wall s",
        "times the median grid",
        "CPU s",
        "ms a head-epoch",
        "chosen head",
        "valid",
        "test",
    ),
    *(
        "curves equal",
        "files off (best score)",
        "files off (any epoch)",
        "same choice",
        "equal scores",
    ),
)
Tables = dict[str, TensorDataset]


@dataclass(frozen=True)
class Size:
    """Of a task: rows of train, val and test, and how heads are trained on it."""

    num_rows: tuple[int, int, int]
    num_classes: int
    protocol: Protocol


SIZES = {
    "gtzan": Size((443, 197, 290), 10, GTZAN_GENRE.protocols["marble-v1"]),
    # fewer rows and epochs than NSynth
    "nsynth": Size(
        (20_000, 2_000, 4_096), 11, replace(NSYNTH_INSTRUMENT.protocols["marble-v1"], max_epochs=5)
    ),
}


@dataclass(frozen=True)
class Turn:
    """What one way to fit heads gave; `test` is the score of the best, `num_epochs` those of all heads together."""

    name: str
    heads: Sequence[MLPHead]
    test: float
    num_epochs: int
    seconds: float
    cpu_seconds: float


def best_of(heads: Sequence[MLPHead]) -> MLPHead:
    """As `choose` does: of equally good ones, the first."""
    return max(heads, key=lambda head: head.valid)


def strength(margin: float, num_numbers: float) -> float:
    """Length of class centres whose estimates from so many numbers a row part classes by a margin, in deviations."""
    return math.sqrt(margin**2 + math.sqrt(margin**4 + 2 * margin**2 * num_numbers))


def drawn_fit(size: Size, num_layers: int, width: int) -> FitContext:
    """A task of some size, and features: unit noise around class centres that stand out most behind the middle."""
    rng = np.random.default_rng(SEED)
    splits, features = {}, {}
    for split, num in zip(SPLITS, size.num_rows, strict=True):
        labels, place = rng.permutation(np.arange(num) % size.num_classes), np.arange(num)
        splits[split] = Split(
            tuple(Item(Path("drawn"), int(k), str(i), split) for i, k in enumerate(labels))
        )
        layers = [rng.standard_normal((num, width), dtype=np.float32) for _ in range(num_layers)]
        features[split] = Features(layers, place, Rows(place, place, np.zeros(num)))
    peak, (worst, best) = round(0.65 * (num_layers - 1)), MARGINS
    for layer in range(num_layers):
        margin = worst + (best - worst) * math.exp(-(((layer - peak) / (0.35 * num_layers)) ** 2))
        centres = rng.standard_normal((size.num_classes, width))
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
        centres *= strength(margin, width * size.num_classes / size.num_rows[0])
        for split, of_split in features.items():
            of_split.layers[layer][:] += centres[[item.label for item in splits[split].items]]
    task = Task("drawn", "drawn", Multiclass(), GTZAN_GENRE.metrics, {"marble-v1": size.protocol})
    data = ProbeData(task, task.labels.fitted(splits["train"]), splits, "")
    names = ("input", *(f"block {i}" for i in range(1, num_layers)))
    return FitContext(features, data, names, (SEED,), "cpu", "grid")


def fit_at_once(fit: FitContext) -> tuple[list[MLPHead], float]:
    """The grid, and what its best head scores on the test split."""
    heads = [head for head in MarbleV1().fit(fit)["mlp"] if isinstance(head, MLPHead)]
    test = fit.features["test"]
    return heads, float(
        fit.data.scores(best_of(heads).logits(test), fit.data.splits["test"], test.rows)
    )


class SeparateHead(nn.Module):
    """One head plainly written, with the first weights and the dropout of its twin in the grid."""

    def __init__(self, twin: MLPHead, tables: Tables) -> None:
        super().__init__()
        rows, labels = tables["train"].tensors
        settings, width, num_classes = twin.settings, rows.shape[-1], int(labels.max()) + 1
        widths = [width] * len(twin.input.layers)
        drawn = StackedHeads([twin.input], widths, num_classes, 1, settings, twin.seed)
        first = {
            name: nn.Parameter(value.detach()[0].clone())
            for name, value in drawn.named_parameters()
        }
        self.inner, self.outer = (
            nn.Linear(width, settings.hidden),
            nn.Linear(settings.hidden, num_classes),
        )
        self.inner.weight, self.inner.bias = first["inner.weight"], first["inner.bias"]
        self.outer.weight, self.outer.bias = first["outer.weight"], first["outer.bias"]
        self.mixing = first.get("mixing")
        self.generator, self.dropout = drawn.generator, settings.dropout

    def forward(self, rows: Float[Tensor, "n D"] | Float[Tensor, "n L D"]) -> Float[Tensor, "n C"]:
        """Logits."""
        mixed = rows if self.mixing is None else torch.matmul(self.mixing.softmax(0), rows)
        units = self.inner(mixed).relu()
        if self.training:
            kept = torch.rand(units.shape, generator=self.generator) >= self.dropout
            units = units * (kept / (1 - self.dropout))
        return self.outer(units)


def tables_of(fit: FitContext, source: HeadInput) -> Tables:
    """Rows and labels of every split as tensors; several layers are stacked."""
    tables = {}
    for split, features in fit.features.items():
        layers = [features.read(layer) for layer in source.layers]
        rows = layers[0] if source.kind == "layer" else torch.stack(layers, dim=1)
        tables[split] = TensorDataset(
            rows, fit.data.labels.row_targets(fit.data.splits[split], features.rows)
        )
    return tables


def plateau(optimizer: Adam, protocol: Protocol) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(
        optimizer, mode="max", factor=protocol.plateau_factor, patience=protocol.plateau_patience
    )


@torch.no_grad()
def accuracy(net: SeparateHead, table: TensorDataset) -> float:
    rows, labels = table.tensors
    net.eval()
    right = (net(rows).argmax(1) == labels).sum().item()
    net.train()
    return right / len(labels)


def fit_in_a_loop(twin: MLPHead, tables: Tables) -> tuple[MLPHead, SeparateHead]:
    """One head in a plain loop, and its network in the best state."""
    training, (rows, labels) = twin.settings.protocol, tables["train"].tensors
    net = SeparateHead(twin, tables)
    optimizer = Adam(net.parameters(), lr=twin.setting, fused=True)
    schedule, order = plateau(optimizer, training), torch.Generator().manual_seed(twin.seed)
    curve: list[float] = []
    best, waited, state = -math.inf, 0, {}
    while len(curve) < training.max_epochs and waited < training.stop_patience:
        for some in torch.randperm(len(labels), generator=order).split(training.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(net(rows[some]), labels[some]).backward()
            optimizer.step()
        curve.append(accuracy(net, tables["val"]))
        schedule.step(curve[-1])
        waited = 0 if curve[-1] > best else waited + 1
        if curve[-1] > best:
            best, state = (
                curve[-1],
                {name: value.clone() for name, value in net.state_dict().items()},
            )
    net.load_state_dict(state)
    return replace(twin, valid=best, curve=tuple(curve)), net


def fit_in_loops(
    twins: Sequence[MLPHead], tables: Mapping[HeadInput, Tables]
) -> tuple[list[MLPHead], float]:
    """Every head in a plain loop, and what the best scores on the test split."""
    fitted = [fit_in_a_loop(twin, tables[twin.input]) for twin in twins]
    best, net = max(fitted, key=lambda pair: pair[0].valid)
    return [head for head, _ in fitted], accuracy(net, tables[best.input]["test"])


class Shuffled(Sampler[int]):
    """The order of the grid; torch's own sampler draws a second permutation behind every epoch."""

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows, self.generator = num_rows, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.num_rows, generator=self.generator).tolist())


class LightningHead(lightning.LightningModule):
    """One head as one would write it for Lightning."""

    def __init__(self, twin: MLPHead, tables: Tables) -> None:
        super().__init__()
        self.twin, self.net = twin, SeparateHead(twin, tables)
        self.accuracy = MulticlassAccuracy(self.net.outer.out_features, average="micro")
        self.curve: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """See `LightningModule`."""
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """See `LightningModule`."""
        self.accuracy.update(self.net(batch[0]), batch[1])
        self.log("valid_acc", self.accuracy)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """See `LightningModule`."""
        self.accuracy.update(self.net(batch[0]), batch[1])
        self.log("test_acc", self.accuracy)

    def on_train_epoch_end(self) -> None:
        """Keep the curve."""
        self.curve.append(self.trainer.callback_metrics["valid_acc"].item())

    def configure_optimizers(self) -> Any:
        """See `LightningModule`."""
        optimizer = Adam(self.parameters(), lr=self.twin.setting)
        schedule = {
            "scheduler": plateau(optimizer, self.twin.settings.protocol),
            "monitor": "valid_acc",
        }
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def fit_in_lightning(twin: MLPHead, tables: Tables, folder: Path) -> tuple[MLPHead, float]:
    """One head, and what its best checkpoint scores on the test split."""
    module, training, of_train = (
        LightningHead(twin, tables),
        twin.settings.protocol,
        tables["train"],
    )
    train = DataLoader(of_train, training.batch_size, sampler=Shuffled(len(of_train), twin.seed))
    valid, test = (DataLoader(tables[split], training.batch_size) for split in ("val", "test"))
    checkpoint = ModelCheckpoint(monitor="valid_acc", mode="max", save_top_k=1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=training.max_epochs,
        callbacks=[
            EarlyStopping("valid_acc", mode="max", patience=training.stop_patience),
            checkpoint,
        ],
        logger=CSVLogger(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, train, valid)
    (scores,) = trainer.test(module, test, ckpt_path=checkpoint.best_model_path, verbose=False)
    return replace(twin, valid=max(module.curve), curve=tuple(module.curve)), scores["test_acc"]


def fit_in_trainers(
    twins: Sequence[MLPHead], tables: Mapping[HeadInput, Tables]
) -> tuple[list[MLPHead], float]:
    """Every head in a trainer of its own, and what the best scores on the test split."""
    fitted = []
    for twin in twins:
        with tempfile.TemporaryDirectory(prefix="jepa_audio_probe_") as folder:
            fitted.append(fit_in_lightning(twin, tables[twin.input], Path(folder)))
    _, test = max(fitted, key=lambda pair: pair[0].valid)
    return [head for head, _ in fitted], test


def fit_in_processes(
    twins: Sequence[MLPHead], tables: Mapping[HeadInput, Tables], threads: int
) -> tuple[list[MLPHead], float]:
    """Every head in a process of its own, one after the other, and what the best scores on the test split."""
    fitted = []
    with tempfile.TemporaryDirectory(prefix="jepa_audio_probe_") as folder:
        files = {source: Path(folder) / f"{number}.pt" for number, source in enumerate(tables)}
        for source, file in files.items():
            torch.save(tables[source], file)
        for twin in twins:
            asked, answer = Path(folder) / "asked.pt", Path(folder) / "answer.pt"
            torch.save((replace(twin, state={}), files[twin.input], answer), asked)
            command = [
                sys.executable,
                "-m",
                "benchmarks.probe_grid",
                "--one",
                str(asked),
                "--threads",
                str(threads),
            ]
            subprocess.run(
                command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            fitted.append(torch.load(answer, weights_only=False))
    _, test = max(fitted, key=lambda pair: pair[0].valid)
    return [head for head, _ in fitted], test


def fit_one(asked: Path) -> None:
    """What such a process does."""
    twin, file, answer = torch.load(asked, weights_only=False)
    torch.save(
        fit_in_lightning(twin, torch.load(file, weights_only=False), asked.parent / "run"), answer
    )


def timed(name: str, fit: Callable[[], tuple[list[MLPHead], float]]) -> Turn:
    """One way to fit heads; its time is said at once."""
    gc.collect()
    start, cpu = time.perf_counter(), sum(os.times()[:4])  # of the process and of its children
    heads, test = fit()
    seconds, cpu = time.perf_counter() - start, sum(os.times()[:4]) - cpu
    num_epochs = sum(len(head.curve) for head in heads)
    print(f"{name}: {seconds:.1f} s, {len(heads)} heads, {num_epochs} head-epochs", flush=True)
    return Turn(name, heads, test, num_epochs, seconds, cpu)


def take_turns(fit: FitContext, num_heads: int | None, threads: int) -> list[Turn]:
    """Grid, plain loops, Lightning fits and processes (of some random heads, if so asked), the grid thrice."""
    first = timed("grid", lambda: fit_at_once(fit))
    twins, sources = first.heads, {head.input for head in first.heads}
    tables = {source: tables_of(fit, source) for source in sources}
    plain = timed("plain loop", lambda: fit_in_loops(twins, tables))
    between = timed("grid, between", lambda: fit_at_once(fit))
    some = sorted(random.Random(SEED).sample(range(len(twins)), num_heads or len(twins)))
    chosen = [twins[i] for i in some]
    usual = timed("Lightning fit", lambda: fit_in_trainers(chosen, tables))
    apart = timed("own process", lambda: fit_in_processes(chosen, tables, threads))
    if len(some) < len(twins):
        usual, apart = (_extrapolated(turn, plain, some) for turn in (usual, apart))
    return [first, plain, between, usual, apart, timed("grid, last", lambda: fit_at_once(fit))]


def _extrapolated(turn: Turn, plain: Turn, some: Sequence[int]) -> Turn:
    """To all heads, by the epochs that plain loops took."""
    times = plain.num_epochs / sum(len(plain.heads[i].curve) for i in some)
    name, num_epochs = (
        f"{turn.name} (extrapolated from {len(some)} heads)",
        round(turn.num_epochs * times),
    )
    return Turn(
        name, turn.heads, turn.test, num_epochs, turn.seconds * times, turn.cpu_seconds * times
    )


def likeness(
    heads: Sequence[MLPHead], grid: Sequence[MLPHead], num_files: int
) -> tuple[bool, int, int, int]:
    """Of heads to their twins: same choice, equal curves, most files that a head's best score or any score is off."""
    points = {(head.input, head.setting): head for head in grid}
    twins = [points[head.input, head.setting] for head in heads]
    best, best_twin = best_of(heads), best_of(twins)
    curves, others = (
        [np.rint(np.array(head.curve) * num_files) for head in some] for some in (heads, twins)
    )
    pairs = list(zip(curves, others, strict=True))
    return (
        (best.input, best.setting) == (best_twin.input, best_twin.setting),
        sum(np.array_equal(one, other) for one, other in pairs),
        max(int(abs(one.max() - other.max())) for one, other in pairs),
        max(int(abs(one[: len(other)] - other[: len(one)]).max()) for one, other in pairs),
    )


def report(turns: Sequence[Turn], num_files: int, tolerated: int) -> bool:
    """Print table and verdict; whether all choose the same and no best score is off by more than is tolerated."""
    grids = sorted(turn.seconds for turn in turns if turn.name.startswith("grid"))
    middle = median(grids)
    print(f"\n| | {' | '.join(COLUMNS)} |\n|---|" + "---|" * len(COLUMNS))
    all_equal = True
    for turn in turns:
        best = best_of(turn.heads)
        same_choice, num_equal, files_off, files_off_anywhere = likeness(
            turn.heads, turns[0].heads, num_files
        )
        all_equal &= same_choice and files_off <= tolerated
        print(
            f"| {turn.name} | {turn.seconds:.1f} | {turn.seconds / middle:.1f} | "
            f"{turn.cpu_seconds:.1f} | {1000 * turn.seconds / turn.num_epochs:.2f} | {best.input.name}, "
            f"{best.setting:g} | {best.valid:.4f} | {turn.test:.4f} | {num_equal} of {len(turn.heads)} | {files_off} | "
            f"{files_off_anywhere} | {'yes' if same_choice else 'NO'} | {'yes' if files_off <= tolerated else 'NO'} |"
        )
    print()
    for turn in turns:
        if not turn.name.startswith("grid"):
            reached = "reached" if turn.seconds >= WANTED * middle else "NOT reached"
            spread = f"{turn.seconds / grids[-1]:.1f} to {turn.seconds / grids[0]:.1f}"
            print(
                f"{WANTED} times as fast as {turn.name}: {reached} ({turn.seconds / middle:.1f} times, {spread})"
            )
    print(f"choices and scores are {'' if all_equal else 'NOT '}equal")
    return all_equal


def warm_up() -> None:
    """A tiny fit of each kind: what is imported or set up once is not timed."""
    protocol = replace(GTZAN_GENRE.protocols["marble-v1"], max_epochs=1, learning_rates=(1e-3,))
    fit = drawn_fit(Size((66, 16, 16), 2, protocol), num_layers=3, width=8)
    twins, _ = fit_at_once(fit)
    tables = {twin.input: tables_of(fit, twin.input) for twin in twins}
    fit_in_loops(twins, tables)
    fit_in_trainers(twins, tables)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="gtzan")
    for name, default in {"layers": 13, "width": 768, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--epochs", type=int, help="of a head at most; by default those of the protocol"
    )
    parser.add_argument(
        "--patience", type=int, help="epochs before a head stops; by default those of the protocol"
    )
    parser.add_argument(
        "--files_off", type=int, default=3, help="that a best validation score may differ by"
    )
    parser.add_argument(
        "--heads", type=int, help="fit only so many random heads in Lightning, and extrapolate"
    )
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(args.threads)
    if args.one:
        fit_one(args.one)
        return
    size, protocol = SIZES[args.size], SIZES[args.size].protocol
    epochs, patience = args.epochs or protocol.max_epochs, args.patience or protocol.stop_patience
    size = replace(size, protocol=replace(protocol, max_epochs=epochs, stop_patience=patience))
    cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or ["unknown CPU"]
    print(
        f"{cpu[0]}, {args.threads} threads, torch {torch.__version__}, lightning {lightning.__version__}; rows "
        f"{size.num_rows}, {args.layers} layers of {args.width}; at most {epochs} epochs, patience {patience}"
    )
    warm_up()
    turns = take_turns(drawn_fit(size, args.layers, args.width), args.heads, args.threads)
    scores = sorted(head.valid for head in turns[0].heads)
    print(
        f"best validation accuracy of heads: {scores[0]:.3f} to {scores[-1]:.3f}, chance {1 / size.num_classes:.3f}"
    )
    raise SystemExit(int(not report(turns, size.num_rows[1], args.files_off)))


if __name__ == "__main__":
    main()
