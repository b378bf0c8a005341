"""`PictureLog`: pictures in TensorBoard and Weights & Biases during training."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from typing_extensions import override

from jepa_audio.data.datamodule import AudioDataModule
from jepa_audio.data.loading.order import SampleIndex
from jepa_audio.errors import UserError, check_bounds
from jepa_audio.report.attention import attention_maps, draw_attention, find_query
from jepa_audio.report.embeddings import Embeddings, folders
from jepa_audio.report.latents import draw_latents, draw_singular_values
from jepa_audio.report.masks import draw_model_masks
from jepa_audio.steps.grid import AudioBatch
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.sharding import is_sharded
from jepa_audio.training.watching.collapse_monitor import (
    MAX_CLIPS,
    encode_all_tokens,
    evaluation_mode,
)
from jepa_audio.training.watching.latent_statistics import MAX_LATENTS

log = logging.getLogger(__name__)

_DPI = 100


class PictureLog(Callback):
    """Log pictures to TensorBoard, Weights & Biases, and other loggers with a `log_image`.

    At every multiple of `every_n_steps`, the process of rank zero draws:

    - `pictures/masks`: three masks over one validation clip;
    - `pictures/attention`: the attention of the context encoder in the same clip, without masks;
    - `pictures/latents`: the PCA of validation clips (the mean of all tokens of the context encoder
      without masks), coloured by folder, with the explained variance;
    - `pictures/singular_values`: the spectrum of the same latents, of tokens and of clips, with
      RankMe, and the first one of this start for comparison.

    The clips are the first ones of the validation files (of the training files, if there are none);
    they are read once. Training waits while the pictures are drawn; one line states for how long.
    The pictures change nothing of the training.

    Args:
        every_n_steps: optimizer steps between two sets of pictures; 0 for none.
        num_clips: number of validation clips.
    """

    def __init__(self, every_n_steps: int = 1000, num_clips: int = 64) -> None:
        self.every_n_steps, self.num_clips = every_n_steps, num_clips
        check_bounds(self, 0, 10**12, "every_n_steps")
        check_bounds(self, 3, 10_000, "num_clips")
        self._step = 0
        self._started = time.perf_counter()
        self._batch: AudioBatch | None = None
        self._paths: list[str] = []
        self._first: tuple[int, list[np.ndarray]] | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; state if no pictures can be drawn."""
        self._step, self._batch, self._first = trainer.global_step, None, None
        self._started = time.perf_counter()
        if self.every_n_steps and is_sharded(pl_module) and _image_loggers(trainer):
            log.warning("no pictures are logged: the weights are sharded over the processes")

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: AudioBatch,
        batch_idx: int,
    ) -> None:
        """Draw and log the pictures if an optimizer step has just ended and they are due."""
        step, before = trainer.global_step, self._step
        self._step = step
        is_due = step != before and self.every_n_steps > 0 and step % self.every_n_steps == 0
        if not (is_due and trainer.is_global_zero) or is_sharded(pl_module):
            return
        loggers = _image_loggers(trainer)
        if not loggers:
            return
        assert isinstance(pl_module, JEPA)
        start = time.perf_counter()
        try:
            figures = self._draw(trainer, pl_module, batch)
        except UserError as error:
            log.warning("step %d: no pictures: %s", step, error)
            return
        for name, figure in figures.items():
            log_image(loggers, f"pictures/{name}", to_image(figure), step)
        end = time.perf_counter()
        share = (end - start) / (end - self._started)
        log.info(
            "step %d: pictures drawn in %.1f s, %.1f %% of the time since the last ones",
            step,
            end - start,
            100 * share,
        )
        self._started = end

    def _draw(self, trainer: Trainer, jepa: JEPA, training: AudioBatch) -> dict[str, Figure]:
        if self._batch is None:
            self._batch, self._paths = self._load(trainer, training)
        batch, step = self._batch, trainer.global_step
        tokens, clips = encode_clips(jepa, batch)
        if not clips.isfinite().all():
            raise UserError("latents are not finite")
        spans = np.zeros((len(clips), 2))
        embeddings = Embeddings(self._paths, spans, clips.numpy(), folders(self._paths))
        spectra = [singular_values(latents) for latents in (tokens, clips)]
        self._first = self._first or (step, spectra)
        return {
            "masks": draw_model_masks(jepa, batch.waveform[0, :1].cpu(), step),
            "attention": _draw_attention(jepa, batch.waveform[0], step),
            "latents": draw_latents(embeddings, f"Latents at step {step}"),
            "singular_values": draw_singular_values(spectra, step, self._first),
        }

    def _load(self, trainer: Trainer, training: AudioBatch) -> tuple[AudioBatch, list[str]]:
        """The clips of the pictures, on the CPU, and the file of each one."""
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, AudioDataModule):
            names = [f"clip {row}" for row in training.row.tolist()]
            return training.to(torch.device("cpu")), names
        try:
            dataset = data.dataset("valid", random_crops=False)
        except KeyError:  # there are no validation files
            dataset = data.dataset("train", random_crops=False)
        count = min(len(dataset), self.num_clips)
        samples = [dataset[SampleIndex(index, index)] for index in range(count)]
        batch = data.on_after_batch_transfer(dataset.collate(samples)[0], 0)
        repeats = len(batch.waveform) // count
        paths = [str(dataset.files[index].audio) for index in range(count)]
        return batch, [path for path in paths for _ in range(repeats)]


def _draw_attention(jepa: JEPA, clip: Float[Tensor, "C S"], step: int) -> Figure:
    """Attention from the loudest token, and to every token."""
    clip = clip.to(jepa.device)
    with evaluation_mode(jepa.front_end, jepa.encoder):
        query = find_query(jepa.front_end, clip)
        maps = attention_maps(jepa.front_end, jepa.encoder, clip, query=query)
        return draw_attention(jepa.front_end, clip, maps, f"Attention at step {step}")


@torch.no_grad()
def encode_clips(jepa: JEPA, batch: AudioBatch) -> tuple[Tensor, Tensor]:
    """Latents of the context encoder for complete clips: at most `MAX_LATENTS` tokens, clip means.

    Returns:
        `[n, D]` tokens and `[B, D]` means over the tokens of each clip, float32 on the CPU.
    """
    # Only clips with masked padding have tokens that are not `present`.
    masks = jepa.masks_of(batch) if batch.num_samples is not None else None
    tokens, clips = [], []
    for first in range(0, len(batch.waveform), MAX_CLIPS):
        rows = slice(first, first + MAX_CLIPS)
        latents = encode_all_tokens(jepa, batch.waveform[rows].to(jepa.device)).float().cpu()
        valid = torch.ones_like(latents[..., 0], dtype=torch.bool)
        if masks is not None and masks.present is not None:
            valid = masks.present.rows(rows).to_mask(latents.shape[1]).cpu()
        tokens.append(latents[valid])
        weights = valid[..., None].float()
        clips.append((latents * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1))
    flat = torch.cat(tokens)
    return flat[:: -(-len(flat) // MAX_LATENTS)], torch.cat(clips)


def singular_values(latents: Float[Tensor, "n D"]) -> Float[np.ndarray, " R"]:
    """The singular values of latents that are not centred, as in RankMe, as shares of their sum."""
    values = torch.linalg.svdvals(latents)
    return (values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)).numpy()


def to_image(figure: Figure) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of a figure."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI)
    return np.asarray(Image.open(content).convert("RGB"))


def _image_loggers(trainer: Trainer) -> list[Logger]:
    """The loggers that show images."""
    return [
        logger
        for logger in trainer.loggers
        if isinstance(logger, TensorBoardLogger) or hasattr(logger, "log_image")
    ]


def log_image(
    loggers: Sequence[Logger], name: str, image: UInt8[np.ndarray, "H W 3"], step: int
) -> None:
    """Log an image, as `TensorBoardLogger` and `WandbLogger` take it."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, image, step, dataformats="HWC")
        else:
            logger.log_image(key=name, images=[image], step=step)  # type: ignore[attr-defined]
