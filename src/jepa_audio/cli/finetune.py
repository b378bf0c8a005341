"""The command `finetune`, based on LightningCLI: train, select on validation, test, report."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich import get_console
from rich.console import Console
from typing_extensions import override

from jepa_audio.cli.parser import HelpfulParser
from jepa_audio.errors import UserError, printable
from jepa_audio.probing.encoders import run_name
from jepa_audio.probing.finetuning.data import LabelledClips
from jepa_audio.probing.finetuning.folds import FoldBy
from jepa_audio.probing.finetuning.module import FineTuning
from jepa_audio.probing.finetuning.results import (
    Description,
    Tested,
    append_result,
    pooled,
    write_predictions,
)
from jepa_audio.probing.finetuning.run_folder import FineTuneFolder
from jepa_audio.probing.rows import RANDOM_INIT, Evidence, ProbeRow, prepare_results
from jepa_audio.report.page import write_leaderboard
from jepa_audio.report.results import terminal_table
from jepa_audio.training.run.checkpointing import AtomicCheckpointIO

log = logging.getLogger(__name__)


class FineTuneParser(HelpfulParser, LightningArgumentParser):
    """The parser of `finetune`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Name all missing arguments; a link to an argument without a value fails first."""
        match = re.match(r'Parser key "(encoder|task)":.*Got value: None', message, re.DOTALL)
        if match is not None:
            given = {word.partition("=")[0] for word in self._words}
            # A file can have the other one.
            names = ("encoder", "task") if "--config" not in given else (match[1],)
            missing = [name for name in names if name == match[1] or f"--{name}" not in given]
            message = f"the following arguments are required: {', '.join(missing)}"
        super().error(message, ex)


class FineTuneCLI(LightningCLI):
    """One command: train, select the epoch on the validation split, test, write the results.

    With `--baseline random`, the random-init baseline is trained first; with `--folds`, every fold
    is the test split once. Each of these runs has its own model and Trainer.
    """

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(
            FineTuning,
            LabelledClips,
            args=list(args),
            run=False,
            parser_class=FineTuneParser,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=None,
            trainer_defaults={
                "max_epochs": 50,
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the command, and link those that the classes share."""
        text = "Run, checkpoint or exported folder of the pretrained encoder, such as runs/NAME."
        parser.add_argument("--encoder", type=str, required=True, help=text)
        text = "Name of a task, a table (.csv, .tsv), or my_package:function for a task of yours."
        parser.add_argument("--task", type=str, required=True, help=text)
        text = "What is trained besides the head: head (nothing), full, last_N or lora."
        parser.add_argument("--mode", type=str, default="full", help=text)
        text = "Divide all clips into folds by `group` or `fold`: cross-validation."
        parser.add_argument("--folds", type=FoldBy | None, default=None, help=text)
        text = "Number of folds for `--folds group`."
        parser.add_argument("--num_folds", type=int, default=5, help=text)
        text = "Also train the random-init baseline of the encoder in the same way."
        parser.add_argument("--baseline", type=Literal["random"] | None, default=None, help=text)
        text = "Epochs without a better validation score after which training stops; 0 for never."
        parser.add_argument("--patience", type=int, default=10, help=text)
        text = "Folder of the run. The default is runs/finetune/ENCODER-TASK-MODE."
        parser.add_argument("--run_dir", type=Path | None, default=None, help=text)
        text = "Folder of the results, which may also have results of `probe`."
        parser.add_argument("--output", type=Path, default=Path("probe"), help=text)
        text = "Continue the run in `run_dir`: finished parts are not repeated."
        parser.add_argument("--resume", type=bool, default=False, nargs="?", const=True, help=text)
        for name, group in (
            ("encoder", "model"),
            ("mode", "model"),
            ("task", "data"),
            ("folds", "data"),
            ("num_folds", "data"),
        ):
            parser.link_arguments(name, f"{group}.{name}")
        for group in ("model", "data"):
            parser.link_arguments("seed_everything", f"{group}.seed", compute_fn=int)

    @override
    def instantiate_classes(self) -> None:
        """Do nothing: `run` makes the objects of each run."""

    def run(self) -> list[ProbeRow]:
        """Train and test all variants and folds; return the rows of the results."""
        config = self.config
        if config.patience < 0:
            raise UserError(f"`patience` ({config.patience}) must be at least 0")
        for key in ("max_epochs", "max_steps"):
            if config.trainer[key] == 0:
                raise UserError(f"`trainer.{key}` (0) must be at least 1, or -1 for no limit")
        name, task = run_name(Path(config.encoder)), Path(config.task.replace(":", "-")).stem
        default = Path("runs/finetune") / f"{name.replace('/', '-')}-{task}-{config.mode}"
        folder = FineTuneFolder(config.run_dir or default)
        results = config.output / "results.jsonl"
        settings = config.clone()
        settings.resume = False
        self._folder, self._config_text = folder, self.parser.dump(settings, skip_none=False)
        if _is_first_process():
            folder.check(self._config_text, config.resume)
            prepare_results(results)
        variant = config.model.variant
        variants = [variant] if config.baseline is None else [RANDOM_INIT, variant]
        rows: list[ProbeRow] = []
        baseline: tuple[float, Evidence] | None = None
        data: LabelledClips | None = None
        for each in dict.fromkeys(variants):
            place = folder if each == variant else folder.part(each)
            tests, data, description = self._fit_variant(each, place, data)
            if not _is_first_process():
                continue
            tested = pooled(tests)
            row, evidence = append_result(config.output, description, tested, baseline)
            if each == RANDOM_INIT:
                baseline = row.value, evidence
            write_predictions(place.path / "predictions.csv", tested)
            rows.append(row)
        if _is_first_process():
            write_leaderboard(results)
            Console().print(terminal_table(rows))
            print(printable(self._written(folder.path)))
        return rows

    def _written(self, folder: Path) -> str:
        """The last line of the command."""
        if self.config.folds is None:
            return f"{folder}: predictions of the test split, and the encoder"
        encoders = sorted(folder.glob("fold-*/encoder"), key=lambda path: int(path.parent.name[5:]))
        return (
            f"{folder}: predictions of all folds; the encoders of the {len(encoders)} folds are in "
            f"{encoders[0]} to {encoders[-1]}"
        )

    def _fit_variant(
        self, variant: str, folder: FineTuneFolder, data: LabelledClips | None
    ) -> tuple[list[Tested], LabelledClips, Description]:
        """Train and test a variant in every fold."""
        self.config.model.variant = variant
        tests: list[Tested] = []
        fold, number = 0, 1
        while fold < number:
            seed_everything(self.config.model.seed, verbose=False)
            place = folder
            if self.config.folds is not None:
                place = folder.part(f"fold-{fold}")
            self._place = place
            super().instantiate_classes()
            data = data or self.datamodule
            number = data.num_runs
            data.select(fold, self.model.pretrained)
            self.model.set_task(data)
            # Not earlier: a start that fails does not occupy the folder.
            if not tests and _is_first_process():
                self._folder.begin(self._config_text)
            if number > 1:
                rank_zero_only(log.info)("%s encoder, fold %d of %d", variant, fold + 1, number)
            tests.append(self._fit_and_test(place, data))
            fold += 1
        assert data is not None
        model, folds = self.model, self.config.folds
        description = Description(
            encoder=run_name(Path(self.config.encoder)),
            variant=variant,
            encoder_hash=model.encoder_hash,
            mode=self.config.mode,
            pooling=model.pooling,
            layer=f"block {model.network.backbone.encoder.depth}",
            lr=model.head_lr if self.config.mode == "head" else model.lr,
            seed=model.seed,
            folds=f"{number} folds by {folds}" if folds else "",
        )
        return tests, data, description

    def _fit_and_test(self, folder: FineTuneFolder, data: LabelledClips) -> Tested:
        model, trainer = self.model, self.trainer
        if not folder.is_finished:
            model.results_file = folder.results
            last = folder.last if folder.last.is_file() else None
            with warnings.catch_warnings():
                # Frozen modules are in evaluation mode, see `freeze_statistics`.
                warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")
                trainer.fit(model, data, ckpt_path=last)
            trainer.test(model, data, ckpt_path=folder.best, verbose=False)
            if trainer.is_global_zero:
                folder.finish(model)
            trainer.strategy.barrier("results")
        return folder.tested(data)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create a Trainer with early stopping, atomic checkpoints, CSV and TensorBoard logs."""
        settings, folder = self.config_init["trainer"], self._place
        callbacks = [*folder.checkpoint_callbacks(), *(settings["callbacks"] or [])]
        if self.config.patience:
            stop = {"mode": "max", "patience": self.config.patience, "strict": True}
            callbacks.append(EarlyStopping("valid/score", **stop))
        if settings["logger"] in (None, True):
            kwargs["logger"] = [
                CSVLogger(folder.path, name="metrics"),
                TensorBoardLogger(folder.path, name="tensorboard", default_hp_metric=False),
            ]
            callbacks.append(LearningRateMonitor(logging_interval="step"))
        if settings["enable_progress_bar"] is None and not get_console().is_terminal:
            kwargs["enable_progress_bar"] = False
        kwargs.setdefault("plugins", [AtomicCheckpointIO()])
        try:
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (MisconfigurationException, ValueError, ImportError) as error:
            raise UserError(f"`trainer`: {error}") from error

    def _parse_ckpt_path(self) -> None:
        """Do nothing: the command has no `--ckpt_path`."""


def finetune(args: Sequence[str]) -> None:
    """Run the command `finetune`."""
    FineTuneCLI(args[1:]).run()


def _is_first_process() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0
