"""Checks before a run: crops, masks and positions fit together; Trainer settings have effect."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from jepa_audio.errors import UserError
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.front_ends import FrontEnd
from jepa_audio.steps.front_ends.alignment import aligned_width, column_weights
from jepa_audio.steps.losses import CrossEntropy, Distance
from jepa_audio.steps.masking.base import Masker
from jepa_audio.steps.predictor import Predictor
from jepa_audio.steps.regularizers import Regularizer
from jepa_audio.steps.targets import Targets
from jepa_audio.training.schedules import Schedule

log = logging.getLogger(__name__)

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
# Masks and attention of more tokens do not fit into memory.
MAX_TOKENS = 2**20


def check_target_gradient(target_gradient: bool, target_front_end: Any, distance: Distance) -> None:
    """Raise `UserError` if a gradient of the targets cannot have an effect."""
    if target_gradient and isinstance(distance, CrossEntropy):
        raise UserError(
            "`target_gradient` (true) would have no effect with `distance: CrossEntropy`, because "
            "classes have no gradient: set `target_gradient: false`; with `ema.momentum` Constant "
            "0, the targets are those of the encoder"
        )
    if target_gradient and target_front_end != "shared":
        is_word = isinstance(target_front_end, str)
        name = target_front_end if is_word else type(target_front_end).__name__
        raise UserError(
            f"`target_front_end` ({name}) would have no effect with `target_gradient: "
            "true`, which takes the targets from the encoder itself: set `target_front_end: shared`"
        )


def check_crop(
    front_end: FrontEnd,
    masker: Masker,
    transformers: list[Transformer],
    num_samples: int,
    fixed_front_end: FrontEnd | None = None,
) -> None:
    """Check that crops of `num_samples` have a grid, masks, positions and targets.

    Raises:
        UserError: if a part does not fit the crops; the message names the setting.
    """
    try:
        grid = front_end.grid(num_samples)
        if fixed_front_end is not None:
            column_weights(fixed_front_end, front_end, num_samples)
    except UserError as error:
        raise UserError(f"raise `data.crop_seconds`: {error}") from error
    if grid.num_tokens > MAX_TOKENS:
        raise UserError(
            f"a crop has {grid.num_tokens} tokens, more than {MAX_TOKENS}: lower "
            "`data.crop_seconds`"
        )
    for transformer in transformers:
        transformer.positions.additive(grid, transformer.embed_dim, torch.device("cpu"))
        transformer.positions.rotary(grid, transformer.head_dim, torch.device("cpu"))
    # A mixture draws one of its maskers.
    for part in getattr(masker, "maskers", [masker]):
        part(grid, torch.zeros(1, dtype=torch.int64), seed=0, step=0)


def match_widths(
    front_end: FrontEnd,
    encoder: Transformer,
    targets: Targets,
    predictor: Predictor,
    distance: Distance,
    target_front_end: str | FrontEnd,
) -> FrontEnd | None:
    """Prepare predictor and distance for the width of the targets.

    Args:
        front_end: step 1 of a JEPA, as the next arguments are its steps 3 to 6.
        encoder: the context encoder.
        targets: the settings of the targets.
        predictor: its predictions get the width that the distance needs.
        distance: gets the widths of predictions and targets.
        target_front_end: the front end of the targets, or a word for `front_end` and its copy.

    Returns:
        The front end of the targets without gradients; `None` for `front_end` and its copy.

    Raises:
        UserError: if parts do not fit each other; the message names the settings.
    """
    for name, part in {"front_end": front_end, "predictor": predictor}.items():
        if part.embed_dim != encoder.embed_dim:
            raise UserError(
                f"`{name}.embed_dim` ({part.embed_dim}) must equal `encoder.embed_dim` "
                f"({encoder.embed_dim})"
            )
    fixed, token_dim = None, encoder.embed_dim
    if isinstance(target_front_end, FrontEnd):
        fixed = target_front_end.requires_grad_(False)
        token_dim = aligned_width(fixed, front_end)
    target_dim = targets.width(encoder, token_dim)
    predictor.set_width(distance.set_widths(predictor.embed_dim, target_dim))
    return fixed


def check_trainer(trainer: Trainer) -> None:
    """Check the settings of a Trainer whose module trains a JEPA.

    An epoch of the data loader is the complete run, so that settings in epochs have no meaning.

    Raises:
        UserError: if a setting cannot have the effect that Lightning documents.
    """
    if trainer.precision not in PRECISIONS:
        raise UserError(
            f"`trainer.precision` ({trainer.precision}) is not supported, because spectrograms and "
            f"the momentum copy need float32 weights: use one of {', '.join(PRECISIONS)}"
        )
    if trainer.state.fn != TrainerFn.FITTING or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    for name, problem in _problems(trainer).items():
        value = getattr(trainer, name)
        raise UserError(f"`trainer.{name}` ({value}): {problem}")


def _problems(trainer: Trainer) -> dict[str, str]:
    """Name of each unusable setting → the reason and the remedy."""
    one_epoch = "one epoch is the complete run"
    accumulated = trainer.accumulate_grad_batches
    multiple = f"must be a multiple of `trainer.accumulate_grad_batches` ({accumulated})"
    overfit, limit = trainer.overfit_batches, trainer.limit_train_batches  # type: ignore[attr-defined]
    is_fraction = isinstance(limit, float) and limit != 1.0
    interval, num_batches = trainer.val_check_interval, trainer.max_steps * accumulated
    checks = {
        "max_epochs": (trainer.max_epochs not in (None, -1), f"{one_epoch}; set `max_steps`"),
        "min_steps": (
            trainer.min_steps,
            "stop signals would have no effect before this step; leave it out",
        ),
        "min_epochs": (trainer.min_epochs, f"{one_epoch}; leave it out"),
        "reload_dataloaders_every_n_epochs": (
            trainer.reload_dataloaders_every_n_epochs,  # type: ignore[attr-defined]
            "a new loader would repeat the first samples of the run; leave it out",
        ),
        "check_val_every_n_epoch": (
            (trainer.check_val_every_n_epoch or 1) > 1,
            f"{one_epoch}; leave it out and set `trainer.val_check_interval`, in micro-batches",
        ),
        "val_check_interval": (
            trainer.check_val_every_n_epoch == 1
            and isinstance(interval, int)
            and interval > num_batches > 0,
            f"the run has {num_batches} micro-batches; set a smaller number, or "
            "`trainer.limit_val_batches 0` for a run without validation",
        ),
        "overfit_batches": (isinstance(overfit, int) and overfit % accumulated, multiple),
        "limit_train_batches": (
            not overfit
            and (limit == 0 or is_fraction or (isinstance(limit, int) and limit % accumulated)),
            f"{multiple}, above 0; `trainer.max_steps` sets the length of a run, "
            "`trainer.overfit_batches` repeats the same batches",
        ),
        "gradient_clip_val": ((trainer.gradient_clip_val or 0) < 0, "must not be negative"),
    }
    return {name: problem for name, (is_wrong, problem) in checks.items() if is_wrong}


def describe_collapse(
    trainer: Trainer,
    regularizers: Sequence[Regularizer],
    momentum: Schedule,
    target_gradient: bool,
) -> None:
    """Before a training, log what works against a collapse if this is less than expected."""
    accumulated, last = trainer.accumulate_grad_batches, max(trainer.max_steps - 1, 0)
    has_no_momentum = momentum(0, trainer.max_steps) == momentum(last, trainer.max_steps) == 0
    remedy = "add one, for example `--model.regularizers+=SIGReg`"
    if regularizers and accumulated > 1:
        line = (
            f"`trainer.accumulate_grad_batches` ({accumulated}): "
            f"{', '.join(regularizer.name for regularizer in regularizers)} is computed for each "
            f"micro-batch over all processes, not for the {accumulated} micro-batches of a step"
        )
    elif not regularizers and target_gradient:
        line = (
            "`model.target_gradient` (true) without a regularizer: nothing prevents a collapse "
            f"of the latents; {remedy}"
        )
    elif not regularizers and has_no_momentum:
        line = (
            "the momentum is 0 and there is no regularizer: only the predictor and targets "
            f"without gradient work against a collapse of the latents; {remedy}"
        )
    else:
        return
    if trainer.state.fn == TrainerFn.FITTING:
        rank_zero_only(log.warning)(line)
