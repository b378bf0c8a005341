"""How much faster is fitting all heads of a grid together, and are the heads the same?

The script fits the `marble-v1` grid: every layer and the weighted sum, with six learning rates, on
the same features in memory. It compares:

- grid: all heads in one `fit_grid`; the time is the median of three measurements, at the start, in
  the middle and at the end
- plain loop: each head in a minimal loop, with indexed tensors, fused Adam and validation in one
  pass
- Lightning fit: each head in the usual way: LightningModule, DataLoaders on TensorDatasets (batch
  64, no workers), Adam with its defaults, early stopping, checkpoint of the best epoch,
  torchmetrics, CSV logger, no progress bar, no summary; the best checkpoint of every head is loaded
  and tested
- separate process: the same Lightning fit as one command per head, as in the scripts of MARBLE: a
  process starts Python, reads the features of its layers from a file, fits, tests and ends; one
  process at a time

A separate head has the same initial weights, batches and dropout as its counterpart in the grid.
Therefore, both must choose the same layer and learning rate, and the best validation scores of each
head must differ by at most `--files_off` files. Otherwise the exit code is 1. For heads with high
learning rates, rounding errors alone change the results of some files within hundreds of steps. A
very small fit of each kind runs first, so that imports are not measured. Features are random, with
one row per file.

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
from typing_extensions import override

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
MIN_SPEEDUP = 20
MARGINS = 0.2, 1.9  # class margins of the worst and the best layer, see `centre_length`
COLUMNS = (
    "wall s",
    "times the median grid",
    "CPU s",
    "ms per head-epoch",
    "chosen head",
    "valid",
    "test",
    "curves equal",
    "files off (best score)",
    "files off (any epoch)",
    "same choice",
    "equal scores",
)
Tables = dict[str, TensorDataset]


@dataclass(frozen=True)
class Size:
    """The size of a task: rows of train, val and test, and how heads are trained."""

    num_rows: tuple[int, int, int]
    num_classes: int
    protocol: Protocol


SIZES = {
    "gtzan": Size((443, 197, 290), 10, GTZAN_GENRE.protocols["marble-v1"]),
    # This size has fewer rows and epochs than NSynth.
    "nsynth": Size(
        (20_000, 2_000, 4_096), 11, replace(NSYNTH_INSTRUMENT.protocols["marble-v1"], max_epochs=5)
    ),
}


@dataclass(frozen=True)
class Result:
    """The result of one method to fit heads.

    Attributes:
        name: the method.
        heads: the fitted heads.
        test: test score of the best head.
        num_epochs: sum of the epochs of all heads.
        seconds: wall time.
        cpu_seconds: CPU time.
    """

    name: str
    heads: Sequence[MLPHead]
    test: float
    num_epochs: int
    seconds: float
    cpu_seconds: float


def best_of(heads: Sequence[MLPHead]) -> MLPHead:
    """The first head with the best validation score, as in `choose`."""
    return max(heads, key=lambda head: head.valid)


def centre_length(margin: float, num_numbers: float) -> float:
    """Length of class centres, in standard deviations, that gives a margin between the classes.

    The centres are estimated from `num_numbers` numbers per row.
    """
    return math.sqrt(margin**2 + math.sqrt(margin**4 + 2 * margin**2 * num_numbers))


def make_fit(size: Size, num_layers: int, width: int) -> FitContext:
    """A task and random features: unit noise around class centres.

    The layer at 65 % of the depth separates the classes best.
    """
    rng = np.random.default_rng(SEED)
    splits, features = {}, {}
    for split, num in zip(SPLITS, size.num_rows, strict=True):
        labels, index = rng.permutation(np.arange(num) % size.num_classes), np.arange(num)
        splits[split] = Split(
            tuple(Item(Path("random"), int(k), str(i), split) for i, k in enumerate(labels))
        )
        layers = [rng.standard_normal((num, width), dtype=np.float32) for _ in range(num_layers)]
        features[split] = Features(layers, index, Rows(index, index, np.zeros(num)))
    peak, (worst, best) = round(0.65 * (num_layers - 1)), MARGINS
    for layer in range(num_layers):
        margin = worst + (best - worst) * math.exp(-(((layer - peak) / (0.35 * num_layers)) ** 2))
        centres = rng.standard_normal((size.num_classes, width))
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
        centres *= centre_length(margin, width * size.num_classes / size.num_rows[0])
        for split, split_features in features.items():
            split_features.layers[layer][:] += centres[[item.label for item in splits[split].items]]
    task = Task("random", "random", Multiclass(), GTZAN_GENRE.metrics, {"marble-v1": size.protocol})
    data = ProbeData(task, task.labels.fitted(splits["train"]), splits, "")
    names = ("input", *(f"block {i}" for i in range(1, num_layers)))
    return FitContext(features, data, names, (SEED,), "cpu", "grid")


def fit_grid(fit: FitContext) -> tuple[list[MLPHead], float]:
    """The heads of the grid, and the test score of the best head."""
    heads = [head for head in MarbleV1().fit(fit)["mlp"] if isinstance(head, MLPHead)]
    test = fit.features["test"]
    scores = fit.data.scores(best_of(heads).logits(test), fit.data.splits["test"], test.rows)
    return heads, float(scores)


class SeparateHead(nn.Module):
    """One head with the initial weights and the dropout of its counterpart in the grid."""

    def __init__(self, head: MLPHead, tables: Tables) -> None:
        super().__init__()
        rows, labels = tables["train"].tensors
        settings, width, num_classes = head.settings, rows.shape[-1], int(labels.max()) + 1
        widths = [width] * len(head.input.layers)
        grid_head = StackedHeads([head.input], widths, num_classes, 1, settings, head.seed)
        initial = {
            name: nn.Parameter(value.detach()[0].clone())
            for name, value in grid_head.named_parameters()
        }
        self.inner, self.outer = (
            nn.Linear(width, settings.hidden),
            nn.Linear(settings.hidden, num_classes),
        )
        self.inner.weight, self.inner.bias = initial["inner.weight"], initial["inner.bias"]
        self.outer.weight, self.outer.bias = initial["outer.weight"], initial["outer.bias"]
        self.mixing = initial.get("mixing")
        self.generator, self.dropout = grid_head.generator, settings.dropout

    def forward(self, rows: Float[Tensor, "n D"] | Float[Tensor, "n L D"]) -> Float[Tensor, "n C"]:
        """The logits of the rows."""
        mixed = rows if self.mixing is None else torch.matmul(self.mixing.softmax(0), rows)
        units = self.inner(mixed).relu()
        if self.training:
            keep = torch.rand(units.shape, generator=self.generator) >= self.dropout
            units = units * (keep / (1 - self.dropout))
        return self.outer(units)


def make_tables(fit: FitContext, source: HeadInput) -> Tables:
    """Rows and labels of every split as tensors; several layers are stacked."""
    tables = {}
    for split, features in fit.features.items():
        layers = [features.read(layer) for layer in source.layers]
        rows = layers[0] if source.kind == "layer" else torch.stack(layers, dim=1)
        tables[split] = TensorDataset(
            rows, fit.data.labels.row_targets(fit.data.splits[split], features.rows)
        )
    return tables


def make_schedule(optimizer: Adam, protocol: Protocol) -> ReduceLROnPlateau:
    """The learning-rate schedule of the grid."""
    return ReduceLROnPlateau(
        optimizer, mode="max", factor=protocol.plateau_factor, patience=protocol.plateau_patience
    )


@torch.no_grad()
def accuracy(net: SeparateHead, table: TensorDataset) -> float:
    """The share of correct predictions, in evaluation mode."""
    rows, labels = table.tensors
    net.eval()
    num_correct = (net(rows).argmax(1) == labels).sum().item()
    net.train()
    return num_correct / len(labels)


def fit_in_loop(head: MLPHead, tables: Tables) -> tuple[MLPHead, SeparateHead]:
    """Fit one head in a plain loop; also return its network with the best weights."""
    training, (rows, labels) = head.settings.protocol, tables["train"].tensors
    net = SeparateHead(head, tables)
    optimizer = Adam(net.parameters(), lr=head.setting, fused=True)
    schedule, order = make_schedule(optimizer, training), torch.Generator().manual_seed(head.seed)
    curve: list[float] = []
    best, num_worse, state = -math.inf, 0, {}
    while len(curve) < training.max_epochs and num_worse < training.stop_patience:
        for batch in torch.randperm(len(labels), generator=order).split(training.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(net(rows[batch]), labels[batch]).backward()
            optimizer.step()
        curve.append(accuracy(net, tables["val"]))
        schedule.step(curve[-1])
        num_worse = 0 if curve[-1] > best else num_worse + 1
        if curve[-1] > best:
            best = curve[-1]
            state = {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(state)
    return replace(head, valid=best, curve=tuple(curve)), net


def fit_in_loops(
    grid_heads: Sequence[MLPHead], tables: Mapping[HeadInput, Tables]
) -> tuple[list[MLPHead], float]:
    """Fit every head in a plain loop; also return the test score of the best head."""
    fitted = [fit_in_loop(head, tables[head.input]) for head in grid_heads]
    best, net = max(fitted, key=lambda pair: pair[0].valid)
    return [head for head, _ in fitted], accuracy(net, tables[best.input]["test"])


class Shuffled(Sampler[int]):
    """The row order of the grid; torch's sampler would draw a second permutation per epoch."""

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows, self.generator = num_rows, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.num_rows, generator=self.generator).tolist())


class LightningHead(lightning.LightningModule):
    """A usual LightningModule with one head."""

    def __init__(self, head: MLPHead, tables: Tables) -> None:
        super().__init__()
        self.head, self.net = head, SeparateHead(head, tables)
        self.accuracy = MulticlassAccuracy(self.net.outer.out_features, average="micro")
        self.curve: list[float] = []

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    @override
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.accuracy.update(self.net(batch[0]), batch[1])
        self.log("valid_acc", self.accuracy)

    @override
    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.accuracy.update(self.net(batch[0]), batch[1])
        self.log("test_acc", self.accuracy)

    @override
    def on_train_epoch_end(self) -> None:
        self.curve.append(self.trainer.callback_metrics["valid_acc"].item())

    @override
    def configure_optimizers(self) -> Any:
        optimizer = Adam(self.parameters(), lr=self.head.setting)
        schedule = {
            "scheduler": make_schedule(optimizer, self.head.settings.protocol),
            "monitor": "valid_acc",
        }
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def fit_in_lightning(head: MLPHead, tables: Tables, folder: Path) -> tuple[MLPHead, float]:
    """Fit one head with Lightning; also return the test score of its best checkpoint."""
    module, training = LightningHead(head, tables), head.settings.protocol
    train_table = tables["train"]
    train = DataLoader(
        train_table, training.batch_size, sampler=Shuffled(len(train_table), head.seed)
    )
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
    return replace(head, valid=max(module.curve), curve=tuple(module.curve)), scores["test_acc"]


def fit_in_trainers(
    grid_heads: Sequence[MLPHead], tables: Mapping[HeadInput, Tables]
) -> tuple[list[MLPHead], float]:
    """Fit every head with Lightning; also return the test score of the best head."""
    fitted = []
    for head in grid_heads:
        with tempfile.TemporaryDirectory(prefix="jepa_audio_probe_") as folder:
            fitted.append(fit_in_lightning(head, tables[head.input], Path(folder)))
    _, test = max(fitted, key=lambda pair: pair[0].valid)
    return [head for head, _ in fitted], test


def fit_in_processes(
    grid_heads: Sequence[MLPHead], tables: Mapping[HeadInput, Tables], threads: int
) -> tuple[list[MLPHead], float]:
    """As `fit_in_trainers`, but each head is fitted in a separate process, one after the other."""
    fitted = []
    with tempfile.TemporaryDirectory(prefix="jepa_audio_probe_") as folder:
        files = {source: Path(folder) / f"{number}.pt" for number, source in enumerate(tables)}
        for source, file in files.items():
            torch.save(tables[source], file)
        for head in grid_heads:
            task_file, result_file = Path(folder) / "task.pt", Path(folder) / "result.pt"
            torch.save((replace(head, state={}), files[head.input], result_file), task_file)
            command = [
                sys.executable,
                "-m",
                "benchmarks.probe_grid",
                "--one",
                str(task_file),
                "--threads",
                str(threads),
            ]
            subprocess.run(
                command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            fitted.append(torch.load(result_file, weights_only=False))
    _, test = max(fitted, key=lambda pair: pair[0].valid)
    return [head for head, _ in fitted], test


def fit_one(task_file: Path) -> None:
    """Fit one head: the work of a process that `fit_in_processes` starts."""
    head, file, result_file = torch.load(task_file, weights_only=False)
    tables = torch.load(file, weights_only=False)
    torch.save(fit_in_lightning(head, tables, task_file.parent / "run"), result_file)


def run_timed(name: str, fit: Callable[[], tuple[list[MLPHead], float]]) -> Result:
    """Fit heads with one method, and print its time."""
    gc.collect()
    # The CPU time includes the children of the process.
    start, cpu = time.perf_counter(), sum(os.times()[:4])
    heads, test = fit()
    seconds, cpu = time.perf_counter() - start, sum(os.times()[:4]) - cpu
    num_epochs = sum(len(head.curve) for head in heads)
    print(f"{name}: {seconds:.1f} s, {len(heads)} heads, {num_epochs} head-epochs", flush=True)
    return Result(name, heads, test, num_epochs, seconds, cpu)


def run_methods(fit: FitContext, num_heads: int | None, threads: int) -> list[Result]:
    """Run all methods; if `num_heads` is given, slow methods fit only so many random heads."""
    first = run_timed("grid", lambda: fit_grid(fit))
    heads, sources = first.heads, {head.input for head in first.heads}
    tables = {source: make_tables(fit, source) for source in sources}
    loop = run_timed("plain loop", lambda: fit_in_loops(heads, tables))
    between = run_timed("grid, between", lambda: fit_grid(fit))
    index = sorted(random.Random(SEED).sample(range(len(heads)), num_heads or len(heads)))
    sample = [heads[i] for i in index]
    trainers = run_timed("Lightning fit", lambda: fit_in_trainers(sample, tables))
    processes = run_timed("separate process", lambda: fit_in_processes(sample, tables, threads))
    if len(index) < len(heads):
        trainers, processes = (
            _extrapolate(result, loop, index) for result in (trainers, processes)
        )
    last = run_timed("grid, last", lambda: fit_grid(fit))
    return [first, loop, between, trainers, processes, last]


def _extrapolate(result: Result, loop: Result, index: Sequence[int]) -> Result:
    """Extrapolate a result to all heads, in proportion to the epochs of the plain loops."""
    factor = loop.num_epochs / sum(len(loop.heads[i].curve) for i in index)
    return replace(
        result,
        name=f"{result.name} (extrapolated from {len(index)} heads)",
        num_epochs=round(result.num_epochs * factor),
        seconds=result.seconds * factor,
        cpu_seconds=result.cpu_seconds * factor,
    )


@dataclass(frozen=True)
class Comparison:
    """A comparison of separate heads with their counterparts in the grid.

    Attributes:
        same_choice: whether the best heads have the same layer and learning rate.
        num_equal: number of equal validation curves.
        files_off: largest difference of the best validation scores of a head, in files.
        files_off_any: largest difference in any epoch, in files.
    """

    same_choice: bool
    num_equal: int
    files_off: int
    files_off_any: int


def compare(heads: Sequence[MLPHead], grid: Sequence[MLPHead], num_files: int) -> Comparison:
    """Compare heads with their counterparts in the grid."""
    by_setting = {(head.input, head.setting): head for head in grid}
    grid_heads = [by_setting[head.input, head.setting] for head in heads]
    best, grid_best = best_of(heads), best_of(grid_heads)
    curves, grid_curves = (
        [np.rint(np.array(head.curve) * num_files) for head in group]
        for group in (heads, grid_heads)
    )
    pairs = list(zip(curves, grid_curves, strict=True))
    return Comparison(
        (best.input, best.setting) == (grid_best.input, grid_best.setting),
        sum(np.array_equal(one, other) for one, other in pairs),
        max(int(abs(one.max() - other.max())) for one, other in pairs),
        max(int(abs(one[: len(other)] - other[: len(one)]).max()) for one, other in pairs),
    )


def report(results: Sequence[Result], num_files: int, max_files_off: int) -> bool:
    """Print the results; return whether all choices and scores are equal, see the module."""
    grids = sorted(result.seconds for result in results if result.name.startswith("grid"))
    middle = median(grids)
    print(f"\n| | {' | '.join(COLUMNS)} |\n|---|" + "---|" * len(COLUMNS))
    all_equal = True
    for result in results:
        best = best_of(result.heads)
        comparison = compare(result.heads, results[0].heads, num_files)
        is_close = comparison.files_off <= max_files_off
        all_equal &= comparison.same_choice and is_close
        cells = [
            f"{result.seconds:.1f}",
            f"{result.seconds / middle:.1f}",
            f"{result.cpu_seconds:.1f}",
            f"{1000 * result.seconds / result.num_epochs:.2f}",
            f"{best.input.name}, {best.setting:g}",
            f"{best.valid:.4f}",
            f"{result.test:.4f}",
            f"{comparison.num_equal} of {len(result.heads)}",
            f"{comparison.files_off}",
            f"{comparison.files_off_any}",
            "yes" if comparison.same_choice else "NO",
            "yes" if is_close else "NO",
        ]
        print(f"| {result.name} | {' | '.join(cells)} |")
    print()
    for result in results:
        if not result.name.startswith("grid"):
            reached = "reached" if result.seconds >= MIN_SPEEDUP * middle else "NOT reached"
            spread = f"{result.seconds / grids[-1]:.1f} to {result.seconds / grids[0]:.1f}"
            speedup = f"{result.seconds / middle:.1f} times, {spread}"
            print(f"{MIN_SPEEDUP} times as fast as {result.name}: {reached} ({speedup})")
    print(f"choices and scores are {'' if all_equal else 'NOT '}equal")
    return all_equal


def warm_up() -> None:
    """Run a very small fit of each kind, so that imports and setup are not measured."""
    protocol = replace(GTZAN_GENRE.protocols["marble-v1"], max_epochs=1, learning_rates=(1e-3,))
    fit = make_fit(Size((66, 16, 16), 2, protocol), num_layers=3, width=8)
    grid_heads, _ = fit_grid(fit)
    tables = {head.input: make_tables(fit, head.input) for head in grid_heads}
    fit_in_loops(grid_heads, tables)
    fit_in_trainers(grid_heads, tables)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="gtzan")
    for name, default in {"layers": 13, "width": 768, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--epochs", type=int, help="maximum number of epochs of a head; default: as in the protocol"
    )
    parser.add_argument(
        "--patience", type=int, help="epochs of early stopping; default: as in the protocol"
    )
    parser.add_argument(
        "--files_off", type=int, default=3, help="allowed difference of a best validation score"
    )
    parser.add_argument(
        "--heads",
        type=int,
        help="fit only this number of random heads in Lightning, and extrapolate",
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
        f"{cpu[0]}, {args.threads} threads, torch {torch.__version__}, lightning "
        f"{lightning.__version__}; rows {size.num_rows}, {args.layers} layers of width "
        f"{args.width}; at most {epochs} epochs, patience {patience}"
    )
    warm_up()
    results = run_methods(make_fit(size, args.layers, args.width), args.heads, args.threads)
    scores = sorted(head.valid for head in results[0].heads)
    print(
        f"best validation accuracy of heads: {scores[0]:.3f} to {scores[-1]:.3f}, "
        f"chance {1 / size.num_classes:.3f}"
    )
    raise SystemExit(int(not report(results, size.num_rows[1], args.files_off)))


if __name__ == "__main__":
    main()
