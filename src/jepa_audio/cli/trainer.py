"""The commands that need a Trainer or the configuration of a run, by LightningCLI."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from jepa_audio.cli.models import stats
from jepa_audio.cli.parser import FRONT_ENDS, HelpfulParser
from jepa_audio.data.datamodule import AudioDataModule
from jepa_audio.interop.convert import load_weights
from jepa_audio.old_paths import current_path
from jepa_audio.probing.online import OnlineProbe  # noqa: F401 (its class gets a short name)
from jepa_audio.recipes import find_recipe, recipes
from jepa_audio.training.checkpointing import AtomicCheckpointIO, RunCheckpoint
from jepa_audio.training.collapse_monitor import CollapseMonitor
from jepa_audio.training.finite_guard import FiniteGuard
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.progress import RunProgressBar

TRAINER_COMMANDS = ("fit", "validate", "test")


class RunParser(HelpfulParser, LightningArgumentParser):
    """The parser of `fit`, `validate` and `test`."""


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
            args=list(with_recipe_paths(args)),
            run=run,
            parser_class=RunParser,
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


def run(args: Sequence[str]) -> None:
    """The commands `fit`, `validate` and `test`."""
    JEPACLI(args)


def measure_stats(args: Sequence[str]) -> None:
    """The command `data stats`: the statistics of the front end of a run's configuration."""
    cli = JEPACLI(args[2:], run=False)
    stats(cli.model.front_end, cli.datamodule, num_clips=2000)


def with_recipe_paths(args: Sequence[str]) -> Iterator[str]:
    """The command line with file paths instead of the names of recipes.

    Raises:
        MissingFileError: if `--config` names neither a file nor a recipe.
    """
    option = ""
    for arg in args:
        name, equals, value = arg.partition("=")
        if arg.startswith("--") and equals:
            yield f"{name}={_recipe_path(name, value)}"
        else:
            yield _recipe_path(option, arg)
        option = arg


def _recipe_path(option: str, value: str) -> str:
    # A configuration may also be given as text.
    if option in ("--config", "-c") and not any(sign in value for sign in "{:\n"):
        return str(find_recipe(value))
    if option == "--model.front_end" and not Path(value).is_file():
        known = recipes()
        name = value if value in known else FRONT_ENDS + value
        return str(known.get(name, value))
    return current_path(value)
