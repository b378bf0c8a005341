"""The command `jepa-audio`: LightningCLI for fit, validate and test, plain functions for all that needs no Trainer."""

from __future__ import annotations

import inspect
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.logging import RichHandler

from jepa_audio.cli.data import describe, index, pack, split, synth, verify
from jepa_audio.cli.models import export_published, import_published, stats
from jepa_audio.cli.parser import HelpfulParser
from jepa_audio.data.corpus.table import CorpusError
from jepa_audio.data.datamodule import AudioDataModule
from jepa_audio.data.loading.workers import worker_crash_message
from jepa_audio.errors import UserError
from jepa_audio.interop.convert import load_weights
from jepa_audio.probing.convert import convert
from jepa_audio.probing.online import OnlineProbe  # noqa: F401
from jepa_audio.probing.rows import table
from jepa_audio.probing.run import probe
from jepa_audio.report.leaderboard import write_leaderboard
from jepa_audio.report.pictures import draw_all
from jepa_audio.report.runs import write_report
from jepa_audio.steps import losses, masking  # noqa: F401
from jepa_audio.steps.encoder import positions  # noqa: F401
from jepa_audio.training import schedules  # noqa: F401 (their classes get short names)
from jepa_audio.training.checkpointing import (
    AtomicCheckpointIO,
    CheckpointWriteError,
    RunCheckpoint,
)
from jepa_audio.training.collapse_monitor import CollapseMonitor
from jepa_audio.training.finite_guard import FiniteGuard, NonFiniteError
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.progress import RunProgressBar

REPORT_A_FAULT = (
    "jepa-audio: this is a fault of jepa-audio, not of your input. Please report it with the command, "
    "the traceback below and the output of `jepa-audio --version`."
)
TRAINER_COMMANDS = ("fit", "validate", "test")
FUNCTIONS: dict[tuple[str, ...], Callable[..., object]] = {
    ("data", "index"): index,
    ("data", "describe"): describe,
    ("data", "verify"): verify,
    ("data", "split"): split,
    ("data", "pack"): pack,
    ("data", "synth"): synth,
    ("data", "convert"): convert,
    ("import",): import_published,
    ("export",): export_published,
    ("probe",): probe,
    ("report",): write_report,
}

HELP = """usage: jepa-audio COMMAND ...

  fit         pretrain:  jepa-audio fit --config configs/wavjepa.yaml --data.root DIR
  validate    the loss on held-out files
  test        the loss on test files
  probe       what frozen encoders know, beside their random-init twins and log-mel statistics
  import      a checkpoint of published weights of WavJEPA or PupuJEPA
  export      a checkpoint in their published layout
  report      curves, masks and probe results of the runs in a folder, as one HTML page

  data index     look at every file of a corpus once: folders, tars, manifests
  data describe  hours, rates, lengths, levels, and the worst files of a corpus
  data verify    read every file of a corpus anew, and check its shards' checksums
  data split     divide a corpus into train, valid and test, never a group
  data pack      write a corpus as tars in WebDataset's layout, resampled once
  data stats     mean and standard deviation of a spectrogram front end on a corpus
  data synth     write a labelled corpus of synthetic notes in NSynth's layout
  data convert   records of a labelled data set as it is downloaded, for `probe`

`jepa-audio COMMAND --help` tells more; `jepa-audio fit --print_config` shows every setting."""


class SaveRunConfig(SaveConfigCallback):
    """Keeps the exact configuration in the folder of the run; a resumed run writes it again."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `config.yaml` into `run_dir`, of a training run only."""
        if stage == "fit":
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(
                self.config,
                folder / "config.yaml",
                skip_none=False,
                overwrite=True,
                multifile=False,
            )


class JEPACLI(LightningCLI):
    """LightningCLI with one folder for all that a run writes, and with callbacks that no configuration can lose."""

    def __init__(self, args: Sequence[str], run: bool = True) -> None:
        super().__init__(
            JEPA,
            AudioDataModule,
            args=list(args),
            run=run,
            parser_class=HelpfulParser,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False, "overwrite": True},
            trainer_defaults={
                "log_every_n_steps": 10,
                "check_val_every_n_epoch": None,
                "val_check_interval": 1000,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
                "max_epochs": -1,
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without `predict`."""
        return {
            name: skip
            for name, skip in LightningCLI.subcommands().items()
            if name in TRAINER_COMMANDS
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One truth for every width and rate, and the callbacks of every run."""
        parser.add_argument(
            "--run_dir",
            type=str,
            default="runs/default",
            help="Folder of the run: checkpoints, metrics, config.yaml.",
        )
        parser.add_argument(
            "--weights",
            type=str | None,
            default=None,
            help="Checkpoint whose weights a new run starts from; a resumed run has its own.",
        )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(CollapseMonitor, "monitor")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("run_dir", "checkpoint.dirpath", compute_fn=_checkpoint_folder)
        for part in ("front_end", "predictor"):
            parser.link_arguments(
                "model.encoder.init_args.embed_dim", f"model.{part}.init_args.embed_dim"
            )
        for name, of_model in (("sample_rate", _sample_rate), ("num_channels", _num_channels)):
            parser.link_arguments(
                "model", f"data.{name}", compute_fn=of_model, apply_on="instantiate"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer that logs to CSV and TensorBoard, unless told otherwise, and writes whole checkpoints."""
        config = self.config_init[self.subcommand] if self.subcommand else self.config_init
        folder, settings = config["run_dir"], config["trainer"]
        callbacks = [FiniteGuard(), *(settings["callbacks"] or [])]
        if settings["logger"] in (None, True):
            kwargs["logger"] = [
                CSVLogger(folder, name="metrics"),
                TensorBoardLogger(folder, name="tensorboard", default_hp_metric=False),
            ]
        if settings["logger"] is not False:
            callbacks.append(LearningRateMonitor(logging_interval="step"))
        if settings["enable_progress_bar"] is not False:
            callbacks.append(RunProgressBar())
        plugins = (
            settings["plugins"] if isinstance(settings["plugins"], list) else [settings["plugins"]]
        )
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [AtomicCheckpointIO(), *filter(None, plugins)]
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def before_fit(self) -> None:
        """Take the weights asked for, unless a checkpoint brings its own."""
        weights, resumed_from = (
            self._get(self.config, "weights"),
            self._get(self.config, "ckpt_path"),
        )
        folder = Path(self._get(self.config_init, "checkpoint").dirpath)
        if resumed_from == "last" and not list(
            folder.glob("last*.ckpt")
        ):  # the first start of a job that may be requeued
            resumed_from = None
        if weights is not None and resumed_from is None:
            load_weights(self.model, Path(weights))

    before_validate = before_test = before_fit

    def after_fit(self) -> None:
        """Leave as a signal that stopped the run would have made it leave: 128 and its number.

        Of the process of rank zero alone: a process that leaves otherwise than with 0 has Lightning
        kill the others.
        """
        stopped_by = self._get(self.config_init, "checkpoint").stopped_by
        if stopped_by is not None and self.trainer.is_global_zero:
            raise SystemExit(128 + stopped_by)

    def _parse_ckpt_path(self) -> None:
        """Leave the command line alone: Lightning would silently override it by what the checkpoint was run with."""


def _checkpoint_folder(run_dir: str) -> str:
    return str(Path(run_dir) / "checkpoints")


def _sample_rate(model: JEPA) -> int:
    return model.front_end.sample_rate


def _num_channels(model: JEPA) -> int:
    return model.front_end.num_channels


def measure_stats(args: Sequence[str]) -> None:
    """The command `data stats`: the configuration of a run, and how many crops to measure."""
    cli = JEPACLI(args, run=False)
    stats(cli.model.front_end, cli.datamodule, num_clips=2000)


def run_function(words: tuple[str, ...], args: Sequence[str]) -> None:
    """A command that is a function: its required arguments by place or by name, the others by name."""
    function = FUNCTIONS[words]
    about = str(inspect.getdoc(function)).partition("\n\nArgs:")[0]
    parser = ArgumentParser(prog=" ".join(("jepa-audio", *words)), description=about)
    several = "sources" in inspect.signature(function).parameters
    if several:
        parser.add_argument("sources", nargs="+", type=str, help="what to look at")
    parser.add_function_arguments(
        function, as_positional=words[0] != "probe", skip={"sources"} if several else None
    )
    args = ["--output" if arg == "-o" else arg for arg in args]
    settings = parser.parse_args(args).as_dict()
    result = function(**settings)
    if words == ("probe",):
        results = Path(settings["output"]) / "results.jsonl"
        write_leaderboard(results)
        draw_all(results)
    if isinstance(result, list):
        Console().print(table(result))
    elif result is not None:
        print(result)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake ends in one sentence, not in a traceback."""
    args = list(sys.argv[1:] if args is None else args)
    # A file is searched line by line: nothing is wrapped there.
    handler = RichHandler(show_path=False) if sys.stderr.isatty() else logging.StreamHandler()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    warnings.filterwarnings("ignore", module="lightning|torch")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "💡" not in record.getMessage()
    )
    try:
        if not args or args[0] in ("-h", "--help"):
            print(HELP)
        elif args[:2] == ["data", "stats"]:
            measure_stats(args[2:])
        elif words := next(
            (words for words in FUNCTIONS if tuple(args[: len(words)]) == words), None
        ):
            run_function(words, args[len(words) :])
        elif args[0] == "data":
            raise UserError(  # noqa: TRY301
                "`data` takes one of convert, describe, index, pack, split, stats, synth, verify"
            )
        else:
            JEPACLI(args)
    except KeyboardInterrupt:
        Console(stderr=True).print("jepa-audio: stopped", style="red")
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        message, on_all_processes = user_message(error)
        if message is None:
            print(REPORT_A_FAULT, file=sys.stderr)
            raise
        if on_all_processes and getattr(rank_zero_only, "rank", None):  # rank zero prints it
            return
        Console(stderr=True).print(
            f"jepa-audio: {message}", style="red", highlight=False, markup=False, soft_wrap=True
        )
        raise SystemExit(1) from None


def user_message(error: BaseException) -> tuple[str | None, bool]:
    """The message of a mistake that the user can correct, `None` for any other error.

    The second value is whether every process of the run raises the same error.
    """
    chain = [error]  # a logger that cannot close its files raises another error on top of the first
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for link in chain:
        if isinstance(link, NonFiniteError | CheckpointWriteError):
            return str(link), True
        if isinstance(link, CorpusError):  # from a loader process it starts with its traceback
            return str(link).rpartition("CorpusError: ")[2], False
        if (message := worker_crash_message(link)) is not None:
            return message, False
    return (str(error), False) if isinstance(error, UserError) else (None, False)
