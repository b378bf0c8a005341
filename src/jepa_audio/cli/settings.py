"""Settings of a run before its objects are made: paths, short runs, settings that are copies."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from jepa_audio.class_paths import parse_yaml
from jepa_audio.errors import UserError

# Settings that contain other settings.
_SECTIONS = {"model", "data", "trainer", "checkpoint", "monitor", "progress", "pictures"}
_PATHS = ("run_dir", "weights", "data.valid_root", "data.test_root")
# Settings that are copies of others → the setting that the user gives.
LINKED = {
    "trainer.default_root_dir": "run_dir",
    "checkpoint.dirpath": "run_dir",
    "data.sample_rate": "model.front_end.sample_rate",
    "data.num_channels": "model.front_end.num_channels",
    "model.front_end.embed_dim": "model.encoder.embed_dim",
    "model.predictor.embed_dim": "model.encoder.embed_dim",
    "model.target_front_end.embed_dim": "model.encoder.embed_dim",
}


def check_options(options: Sequence[str]) -> None:
    """Check command-line options, and the YAML files that they name, before they are parsed.

    A setting of `LINKED` is refused. A YAML file may repeat a width, if it is the width of the
    encoder in the same file. A section such as `trainer` without settings would replace all its
    earlier settings by their defaults.

    Raises:
        UserError: with the file, the setting and what to give instead.
    """
    for option, value in zip(options, [*options[1:], ""], strict=True):
        name, _, text = option.partition("=")
        key = name.removeprefix("--").replace(".init_args.", ".")
        if name.startswith("--") and key in LINKED:
            raise UserError(f"`{key}` is a copy of another setting: set `--{LINKED[key]}` instead")
        if key in _SECTIONS:
            _check_section(name, parse_yaml(text or value, name))
        if name in ("--config", "-c"):
            _check_file(Path(text or value))


def _check_section(key: str, settings: Any) -> None:
    if not isinstance(settings, dict | str):
        raise UserError(
            f"`{key}` ({settings}) must be a mapping of settings, or a file that contains one"
        )


def _check_file(path: Path) -> None:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8: `--config` takes YAML") from None
    except OSError:
        return  # The value is YAML text, or the parser reports what is wrong with the file.
    settings = parse_yaml(content, str(path))
    if not isinstance(settings, dict):
        problem = "has no settings" if settings is None else "is not a mapping of settings"
        raise UserError(f"{path} {problem}: `jepa-audio configs copy` writes an example")
    for key in _SECTIONS & settings.keys():
        try:
            _check_section(key, settings[key])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    for key, source in LINKED.items():
        value = _get(settings, key)
        is_repeated = key.endswith("embed_dim") and value == _get(settings, source)
        if value is not None and not is_repeated:
            raise UserError(
                f"{path}: `{key}` ({value}) is a copy of another setting: set `{source}` instead"
            )


def _get(settings: Any, key: str) -> Any:
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, dict) else None
        if isinstance(settings, dict) and "init_args" in settings:
            settings = settings["init_args"]
    return settings


def make_paths_absolute(config: Namespace) -> None:
    """Make all paths absolute, so that the saved configuration can be used in any folder.

    Raises:
        UserError: if the folder of the run is not local, or a source is given twice.
    """
    if "://" in str(config.get("run_dir")):
        raise UserError(
            f"`run_dir` ({config.run_dir}) must be a local or mounted folder: the folder of a run "
            "is locked, and searched for an earlier run"
        )
    for key in _PATHS:
        if config.get(key) is not None:
            config[key] = absolute(config[key])
    if config.get("ckpt_path") not in (None, "last", "best", "hpc"):
        config.ckpt_path = absolute(config.ckpt_path)
    if config.get("data.root") is not None:
        config.data.root = _absolute_root(config.data.root)
    for part in ("data.scenes", *_callbacks(config)):
        settings = config.get(part) if isinstance(part, str) else part
        for name in ("rirs", "noise", "corpus"):
            if isinstance(settings, Namespace) and settings.get(name) is not None:
                settings[name] = absolute(settings[name])
    if config.get("trainer.default_root_dir") is not None:
        config.trainer.default_root_dir = config.run_dir
    if config.get("checkpoint.dirpath") is not None:
        config.checkpoint.dirpath = str(Path(config.run_dir) / "checkpoints")


def _absolute_root(root: Any) -> Any:
    if isinstance(root, list):
        return [absolute(source) for source in root]
    if not isinstance(root, dict):
        return absolute(root)
    sources = {absolute(source): weight for source, weight in root.items()}
    if len(sources) < len(root):
        raise UserError(f"`data.root` names a source twice: {', '.join(map(str, root))}")
    return sources


def _callbacks(config: Namespace) -> Iterator[Any]:
    callbacks = config.get("trainer.callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        yield callback.get("init_args") if isinstance(callback, Namespace) else None


def absolute(path: Any) -> Any:
    """The absolute path of a file, folder or pattern; addresses like `s3://` stay as they are."""
    if not isinstance(path, str | Path) or not str(path) or "://" in str(path):
        return path
    # `Path.absolute` would keep `..`.
    text = os.path.abspath(os.path.expanduser(str(path)))  # noqa: PTH100, PTH111
    return text if isinstance(path, str) else Path(text)


def fit_short_run(config: Namespace) -> Iterator[str]:
    """Shorten warm-ups and the validation interval to the length of the run, in place.

    Yields:
        One line for each change, and for each setting without its usual effect.

    Raises:
        UserError: if `trainer.val_check_interval` is not a share of the run.
    """
    trainer = config.trainer
    num_steps = int(trainer.fast_dev_run) or trainer.max_steps
    if num_steps < 1:
        return
    length = f"the run has {num_steps} step{'s' * (num_steps > 1)}"
    for key, settings in _sections(config.model, "model"):
        if settings.get("warmup_steps", 0) >= num_steps:
            yield f"`{key}.warmup_steps` is {num_steps - 1}, not {settings.warmup_steps}: {length}"
            settings.warmup_steps = num_steps - 1
        if settings.get("warmup_end", 0) > num_steps:
            yield f"`{key}.warmup_end` is {num_steps}, not {settings.warmup_end}: {length}"
            settings.warmup_end = num_steps
            settings.warmup_start = min(settings.warmup_start, num_steps)
        if (settings.get("num_steps") or 0) > num_steps:
            yield f"`{key}.num_steps` is {settings.num_steps}, but {length}: it does not end"
    if not trainer.fast_dev_run:
        yield from _fit_intervals(trainer)


def _fit_intervals(trainer: Namespace) -> Iterator[str]:
    num_batches = trainer.max_steps * trainer.accumulate_grad_batches
    batches = f"the run has {num_batches} micro-batches"
    interval = trainer.val_check_interval
    if isinstance(interval, int) and interval > num_batches:
        yield f"`trainer.val_check_interval` is {num_batches}, not {interval}: {batches}"
        trainer.val_check_interval = num_batches
    elif trainer.check_val_every_n_epoch is None and isinstance(interval, float | None):
        share = 1.0 if interval is None else interval
        if not 0 < share <= 1:
            raise UserError(
                f"`trainer.val_check_interval` ({share}) must be a number of micro-batches, or a "
                "share of the run in (0, 1]"
            )
        trainer.val_check_interval = max(1, int(share * num_batches))
        yield (
            f"`trainer.val_check_interval` is {trainer.val_check_interval}, for {share:g} of the "
            f"run: {batches}"
        )
    limit = trainer.limit_train_batches
    if isinstance(limit, int):
        yield (
            f"`trainer.limit_train_batches` ({limit}) divides the run into epochs; its length is "
            f"`trainer.max_steps` ({trainer.max_steps})"
        )


def _sections(settings: Namespace, key: str) -> Iterator[tuple[str, Namespace]]:
    """The key and the settings of every section, without `init_args` in the key."""
    yield key, settings
    for name, value in vars(settings).items():
        if isinstance(value, Namespace):
            yield from _sections(value, key if name == "init_args" else f"{key}.{name}")
