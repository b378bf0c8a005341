"""The commands `fit`, `validate`, `test` and `data stats`, based on LightningCLI."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich import get_console

from jepa_audio.class_paths import other_modules
from jepa_audio.cli.choices import choices_help
from jepa_audio.cli.estimate import SWITCHED_OFF, Form, prepare_trial, print_estimate
from jepa_audio.cli.models import stats
from jepa_audio.cli.next_commands import next_commands
from jepa_audio.cli.parser import RECIPE_FOLDERS, HelpfulParser, recipe_path
from jepa_audio.cli.saved_config import SaveRunConfig
from jepa_audio.cli.settings import check_options, fit_short_run, make_paths_absolute
from jepa_audio.data.datamodule import AudioDataModule
from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.interop.convert import load_weights
from jepa_audio.old_paths import current_path
from jepa_audio.parallel import reuse_freed_memory
from jepa_audio.probing.online import OnlineProbe  # noqa: F401 (YAML can name the imported class)
from jepa_audio.recipes import find_recipe
from jepa_audio.report.picture_log import PictureLog
from jepa_audio.steps.front_ends import filterbank  # noqa: F401 (YAML can name its class)
from jepa_audio.training.checks import check_crop
from jepa_audio.training.cost import describe_parameters
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.normalization import MeasureNormalization
from jepa_audio.training.run.checkpointing import AtomicCheckpointIO, RunCheckpoint
from jepa_audio.training.run.folder import (
    LAST,
    REQUEUE_WAIT,
    RunFolder,
    RunFolderError,
    open_checkpoint,
)
from jepa_audio.training.run.resume import (
    ResumedSettings,
    describe_changes,
    find_changes,
    refuse_changes,
)
from jepa_audio.training.watching.collapse_monitor import CollapseMonitor
from jepa_audio.training.watching.finite_guard import FiniteGuard
from jepa_audio.training.watching.progress import ProgressLines, RunProgressBar

log = logging.getLogger(__name__)

TRAINER_COMMANDS = ("fit", "validate", "test")


class RunParser(HelpfulParser, LightningArgumentParser):
    """The parser of `fit`, `validate` and `test`."""


class JEPACLI(LightningCLI):
    """LightningCLI with a folder for all files of a run, and with the callbacks of every run.

    Args:
        args: command line; starts with a subcommand if `run` is True.
        run: True runs the subcommand; False only builds `model`, `datamodule` and `trainer`.
    """

    def __init__(self, args: Sequence[str], run: bool = True) -> None:
        self._has_subcommands = run
        options = list(with_recipe_paths(args))
        check_options(options)
        super().__init__(
            JEPA,
            AudioDataModule,
            args=options,
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
        """The subcommands of Lightning without `predict`."""
        return {
            name: skip
            for name, skip in LightningCLI.subcommands().items()
            if name in TRAINER_COMMANDS
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run, and link the settings that must be equal."""
        parser.add_argument(
            "--run_dir",
            type=str,
            default="runs/default",
            help="Folder of the run: checkpoints, metrics, config.yaml.",
        )
        parser.add_argument(
            "--overwrite",
            type=bool,
            default=False,
            nargs="?",
            const=True,
            help="Remove the run in `run_dir`: its checkpoints, metrics, logs and config.yaml.",
        )
        parser.add_argument(
            "--estimate",
            type=Form | None,
            default=None,
            nargs="?",
            const="table",
            help="Train nothing; print what the run costs: time, memory, disk. `fit` only.",
        )
        parser.add_argument(
            "--weights",
            type=str | None,
            default=None,
            help="Checkpoint with the initial weights of a new run; a resumed run ignores it.",
        )
        if not self._has_subcommands:
            # The `config.yaml` of a run has these keys. Lightning adds them only to subcommands.
            for name in ("ckpt_path", "weights_only"):
                parser.add_argument(
                    f"--{name}", type=str | bool | None, default=None, help="Not used."
                )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(PictureLog, "pictures")  # its time is not `data_wait`
        parser.add_lightning_class_args(CollapseMonitor, "monitor")
        parser.add_lightning_class_args(ProgressLines, "progress")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("run_dir", "checkpoint.dirpath", compute_fn=_checkpoint_folder)
        for part in ("front_end", "predictor", "target_front_end"):
            parser.link_arguments(
                "model.encoder.init_args.embed_dim", f"model.{part}.init_args.embed_dim"
            )
        for name, compute in (("sample_rate", _sample_rate), ("num_channels", _num_channels)):
            parser.link_arguments(
                "model", f"data.{name}", compute_fn=compute, apply_on="instantiate"
            )

    def before_instantiate_classes(self) -> None:
        """Make paths absolute, and fit warm-ups and intervals to a short run."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        make_paths_absolute(config)
        lines = [*fit_short_run(config)] if self.subcommand in (None, "fit") else []
        if config.estimate and self.subcommand in ("validate", "test"):
            raise UserError(f"`--estimate` belongs to `fit`; `{self.subcommand}` is not estimated")
        if config.estimate:
            lines += prepare_trial(config)
        for line in lines:
            rank_zero_only(log.warning)(line)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create a Trainer with atomic checkpoints, CSV and TensorBoard logs.

        Loggers of the configuration are added, and `logger: false` disables all.
        """
        if self._has_subcommands:
            self._check_crops()
        config = self.config_init[self.subcommand] if self.subcommand else self.config_init
        folder, settings = config["run_dir"], config["trainer"]
        callbacks = [FiniteGuard(), ResumedSettings(), self._normalization()]
        callbacks += settings["callbacks"] or []
        # Lightning counts the time of earlier starts too, and stops between two optimizer steps.
        config["checkpoint"].set_max_time(settings["max_time"])
        kwargs["max_time"] = None
        if settings["logger"] is not False:
            loggers = settings["logger"]
            loggers = [] if loggers in (None, True) else loggers
            loggers = [*loggers] if isinstance(loggers, Iterable) else [loggers]
            # In the folder of a run, metrics of step 0 would replace those of the training.
            if self.subcommand not in ("validate", "test"):
                loggers[:0] = [
                    CSVLogger(folder, name="metrics"),
                    TensorBoardLogger(folder, name="tensorboard", default_hp_metric=False),
                ]
            kwargs["logger"] = loggers or False
        # Lightning's table has zero operations for every part; `fit` logs a line instead.
        kwargs["enable_model_summary"] = settings["enable_model_summary"] or False
        if settings["enable_progress_bar"] is not False and get_console().is_terminal:
            callbacks.append(RunProgressBar())
            config["progress"].is_enabled = False
        else:
            kwargs["enable_progress_bar"] = False
        plugins = (
            settings["plugins"] if isinstance(settings["plugins"], list) else [settings["plugins"]]
        )
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [AtomicCheckpointIO(), *filter(None, plugins)]
        try:
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (MisconfigurationException, ValueError, ImportError) as error:
            raise UserError(f"`trainer`: {error}") from error

    def _check_crops(self) -> None:
        """Refuse crops that do not fit the model before a Trainer exists."""
        model = self.model
        transformers = [model.encoder, model.predictor.trunk]
        num_samples = self.datamodule.clips.crop_samples
        fixed = model.fixed_front_end
        check_crop(model.front_end, model.masker, transformers, num_samples, fixed)

    def _normalization(self) -> MeasureNormalization:
        ckpt_path = self._get(self.config, "ckpt_path")
        last = RunFolder(Path(self._get(self.config, "run_dir"))).checkpoints / LAST
        is_resumed = last.exists() if ckpt_path == "last" else ckpt_path is not None
        config = self.config[self.subcommand] if self.subcommand else self.config
        return MeasureNormalization(config, is_resumed, self._get(self.config, "weights"))

    def fit(self, ckpt_path: str | None, **arguments: Any) -> None:
        """Train in a folder that no other run uses, from the start or from a checkpoint.

        Raises:
            RunFolderError: if the folder holds another run, the checkpoint is damaged, or a
                changed setting cannot be in force.
        """
        folder = RunFolder(Path(self._get(self.config_init, "run_dir")))
        estimate = self._get(self.config, "estimate")
        writes = not (self.trainer.fast_dev_run or estimate)  # type: ignore[attr-defined]
        if isinstance(self.trainer.accelerator, CPUAccelerator):
            reuse_freed_memory()
        with ExitStack() as stack:
            if writes and self.trainer.is_global_zero:
                wait = REQUEUE_WAIT if "SLURM_RESTART_COUNT" in os.environ else 0.0
                stack.enter_context(folder.lock(wait))
            checkpoint = folder.find_checkpoint(ckpt_path)
            if writes:
                folder.admit(checkpoint, self._get(self.config, "overwrite"))
            if checkpoint is not None:
                self._check_resume(checkpoint)
            elif ckpt_path is not None:
                rank_zero_only(log.info)("%s has no checkpoint: a new run starts", folder.path)
            self._load_weights(is_resumed=checkpoint is not None)
            if estimate:
                config = self.config[self.subcommand]
                parts = self.trainer, self.model, self.datamodule, config
                print_estimate(*parts, checkpoint, estimate)
                return
            if self._get(self.config_init, "trainer")["enable_model_summary"] is None:
                rank_zero_only(log.info)(describe_parameters(self.model))
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, SaveRunConfig):
                    callback.folder = folder
            self.trainer.fit(ckpt_path=checkpoint, **arguments)

    def _check_resume(self, path: Path) -> None:
        """Refuse a damaged checkpoint and changed settings; log the changes that are in force."""
        checkpoint = open_checkpoint(path)
        if not {"optimizer_states", "lr_schedulers", "loops"} <= checkpoint.keys():
            raise RunFolderError(
                f"{path} has only weights, and no run can continue from it: start a new run from "
                f"its weights with `--weights {path}`"
            )
        config = {**self.config_dump, "num_processes": self.trainer.world_size}
        changes = find_changes(checkpoint, config)
        refuse_changes(changes)
        if self._get(self.config, "estimate"):
            replaced = {f"trainer.{name}" for name in SWITCHED_OFF}
            changes = [change for change in changes if change.key not in replaced]
        for line in describe_changes(changes, checkpoint, config):
            rank_zero_only(log.info)(line)

    def _load_weights(self, is_resumed: bool) -> None:
        weights = self._get(self.config, "weights")
        if weights is not None and is_resumed:
            rank_zero_only(log.info)("`--weights` is not used: the run continues from a checkpoint")
        elif weights is not None:
            load_weights(self.model, Path(weights))

    def validate(self, ckpt_path: str | None, **arguments: Any) -> None:
        """Compute the loss on validation files; see `_evaluate`."""
        self._evaluate(self.trainer.validate, ckpt_path, **arguments)

    def test(self, ckpt_path: str | None, **arguments: Any) -> None:
        """Compute the loss on test files; see `_evaluate`."""
        self._evaluate(self.trainer.test, ckpt_path, **arguments)

    def _evaluate(
        self, function: Callable[..., Any], ckpt_path: str | None, **arguments: Any
    ) -> None:
        """Validate or test with the weights of `--weights` or of a checkpoint.

        Raises:
            MissingFileError: if `--ckpt_path last` is given and the run has no checkpoint.
            RunFolderError: if the checkpoint is damaged, or is of another model.
        """
        folder = RunFolder(Path(self._get(self.config_init, "run_dir")))
        checkpoint = folder.find_checkpoint(ckpt_path)
        if checkpoint is None and ckpt_path is not None:
            raise MissingFileError(
                f"`--ckpt_path last`: there is no checkpoint in {folder.checkpoints}; "
                "check `--run_dir`"
            )
        if checkpoint is not None:
            changes = find_changes(open_checkpoint(checkpoint), self.config_dump)
            for part in ("front_end", "encoder", "predictor", "target_front_end", "distance"):
                refuse_changes(changes, f"model.{part}*")
        self._load_weights(is_resumed=checkpoint is not None)
        function(ckpt_path=checkpoint, **arguments)

    def after_fit(self) -> None:
        """Print the commands that continue; exit with 128 + signal if one stopped the run.

        Only the process of rank zero exits with this code. If another process exits with a code
        other than 0, Lightning kills all processes.
        """
        wrote = not (self.trainer.fast_dev_run or self._get(self.config, "estimate"))  # type: ignore[attr-defined]
        folder = Path(self._get(self.config, "run_dir"))
        if wrote and self.trainer.is_global_zero:
            modules = other_modules(self.config_dump["model"])
            print(next_commands(folder, self.datamodule.sources, modules))
        stopped_by = self._get(self.config_init, "checkpoint").stopped_by
        if stopped_by is not None and self.trainer.is_global_zero:
            raise SystemExit(128 + stopped_by)

    def _parse_ckpt_path(self) -> None:
        """Do nothing, because Lightning would replace the options by those of the checkpoint."""


def _checkpoint_folder(run_dir: str) -> str:
    return str(Path(run_dir) / "checkpoints")


def _sample_rate(model: JEPA) -> int:
    return model.front_end.sample_rate


def _num_channels(model: JEPA) -> int:
    return model.front_end.num_channels


def run(args: Sequence[str]) -> None:
    """Run the command `fit`, `validate` or `test`."""
    roots = {"model": JEPA, "data": AudioDataModule, "trainer": Trainer}
    if (text := choices_help(args, roots)) is not None:
        print(text)
    else:
        JEPACLI(args)


def measure_stats(args: Sequence[str]) -> None:
    """Run the command `data stats` for the front end and the data of a configuration."""
    cli = JEPACLI(args[2:], run=False)
    stats(cli.model.front_end, cli.datamodule, num_clips=2000)


def with_recipe_paths(args: Sequence[str]) -> Iterator[str]:
    """Replace the names of recipes in a command line by the paths of their files.

    Names of front ends and class paths of earlier versions are also replaced.

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
    # The value of `--config` can also be YAML text.
    if option in ("--config", "-c") and not any(sign in value for sign in "{:\n"):
        return str(find_recipe(value))
    key = option.removeprefix("--model.")
    if key in RECIPE_FOLDERS and not Path(value).is_file():
        return str(recipe_path(key, value) or value)
    return current_path(value)
