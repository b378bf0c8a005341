"""The commands `fit`, `validate`, `test` and `data stats`, based on LightningCLI."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from jepa_audio.cli.models import stats
from jepa_audio.cli.parser import FRONT_ENDS, HelpfulParser
from jepa_audio.data.datamodule import AudioDataModule
from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.interop.convert import load_weights
from jepa_audio.old_paths import current_path
from jepa_audio.probing.online import OnlineProbe  # noqa: F401 (YAML can name the imported class)
from jepa_audio.recipes import find_recipe, recipes
from jepa_audio.training.checkpointing import AtomicCheckpointIO, RunCheckpoint
from jepa_audio.training.checks import check_crop
from jepa_audio.training.collapse_monitor import CollapseMonitor
from jepa_audio.training.finite_guard import FiniteGuard
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.normalization import MeasureNormalization
from jepa_audio.training.progress import RunProgressBar

TRAINER_COMMANDS = ("fit", "validate", "test")


class RunParser(HelpfulParser, LightningArgumentParser):
    """The parser of `fit`, `validate` and `test`."""


class SaveRunConfig(SaveConfigCallback):
    """Writes `config.yaml` into the folder of a training run, also when the run is resumed."""

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
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
    """LightningCLI with a folder for all files of a run, and with the callbacks of every run.

    Args:
        args: command line; starts with a subcommand if `run` is True.
        run: True runs the subcommand; False only builds `model`, `datamodule` and `trainer`.
    """

    def __init__(self, args: Sequence[str], run: bool = True) -> None:
        self._has_subcommands = run
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
        parser.add_lightning_class_args(CollapseMonitor, "monitor")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("run_dir", "checkpoint.dirpath", compute_fn=_checkpoint_folder)
        for part in ("front_end", "predictor"):
            parser.link_arguments(
                "model.encoder.init_args.embed_dim", f"model.{part}.init_args.embed_dim"
            )
        for name, compute in (("sample_rate", _sample_rate), ("num_channels", _num_channels)):
            parser.link_arguments(
                "model", f"data.{name}", compute_fn=compute, apply_on="instantiate"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create a Trainer with atomic checkpoints and, by default, CSV and TensorBoard logs."""
        if self._has_subcommands:
            self._check_crops()
        config = self.config_init[self.subcommand] if self.subcommand else self.config_init
        folder, settings = config["run_dir"], config["trainer"]
        callbacks = [FiniteGuard(), self._normalization(), *(settings["callbacks"] or [])]
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
        try:
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except MisconfigurationException as error:
            raise UserError(f"`trainer`: {error}") from error

    def _check_crops(self) -> None:
        """Refuse crops that do not fit the model before a Trainer exists."""
        model = self.model
        transformers = [model.encoder, model.predictor.trunk]
        num_samples = self.datamodule.clips.crop_samples
        check_crop(model.front_end, model.masker, transformers, num_samples)

    def _normalization(self) -> MeasureNormalization:
        is_resumed = self._get(self.config, "ckpt_path") is not None and not self._lacks_last()
        config = self.config[self.subcommand] if self.subcommand else self.config
        return MeasureNormalization(config, is_resumed, self._get(self.config, "weights"))

    def before_fit(self) -> None:
        """Load the weights of `--weights`, unless the run resumes from a checkpoint."""
        weights = self._get(self.config, "weights")
        # A job that can be requeued always gives `--ckpt_path last`, also at its first start, when
        # there is no checkpoint.
        is_resumed = self._get(self.config, "ckpt_path") is not None and not self._lacks_last()
        if weights is not None and not is_resumed:
            load_weights(self.model, Path(weights))

    def before_validate(self) -> None:
        """Load the weights of `--weights`, and check that the checkpoint exists.

        Raises:
            MissingFileError: if `--ckpt_path last` is given and the run has no checkpoint.
                Lightning would only show a warning.
        """
        if self._lacks_last():
            raise MissingFileError(
                f"`--ckpt_path last`: there is no checkpoint in {self._checkpoints()}; "
                "check `--run_dir`"
            )
        self.before_fit()

    before_test = before_validate

    def after_fit(self) -> None:
        """Exit with 128 plus the number of the signal that stopped the run, as shells expect.

        Only the process of rank zero exits with this code. If another process exits with a code
        other than 0, Lightning kills all processes.
        """
        stopped_by = self._get(self.config_init, "checkpoint").stopped_by
        if stopped_by is not None and self.trainer.is_global_zero:
            raise SystemExit(128 + stopped_by)

    def _checkpoints(self) -> Path:
        return Path(self._get(self.config_init, "checkpoint").dirpath)

    def _lacks_last(self) -> bool:
        """Whether `--ckpt_path last` is given and the run has no checkpoint."""
        is_last = self._get(self.config, "ckpt_path") == "last"
        return is_last and not list(self._checkpoints().glob("last*.ckpt"))

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
    if option == "--model.front_end" and not Path(value).is_file():
        known = recipes()
        name = value if value in known else FRONT_ENDS + value
        return str(known.get(name, value))
    return current_path(value)
