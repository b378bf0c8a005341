"""The six steps of a JEPA put together: one LightningModule for every paper."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from jepa_audio.errors import UserError
from jepa_audio.steps.encoder.transformer import Block, Transformer
from jepa_audio.steps.front_ends import FrontEnd
from jepa_audio.steps.grid import AudioBatch, Grid, Masks, TokenSet
from jepa_audio.steps.losses import Distance
from jepa_audio.steps.masking.base import Masker
from jepa_audio.steps.predictor import Predictor
from jepa_audio.steps.targets import Targets
from jepa_audio.training.ema import TargetEncoderEMA
from jepa_audio.training.optimizer import clip_gradients, parameter_groups
from jepa_audio.training.schedules import Schedule
from jepa_audio.training.sharding import shard


@dataclass(frozen=True)
class JEPAOutput:
    """What one forward pass computes; rows shorter than the longest are told apart by the masks' `valid`."""

    loss: Float[Tensor, ""]
    context: Float[Tensor, "B K D"]
    prediction: Float[Tensor, "B M T D"]
    target: Float[Tensor, "B M T D"]


class JEPA(LightningModule):
    """A joint-embedding predictive architecture for audio (LeCun, 2022; Assran et al., 2023, arXiv:2301.08243).

    A recipe is a choice at each step; WavJEPA (arXiv:2509.23238) and PupuJEPA (arXiv:2606.25713)
    are two of them.

    Args:
        front_end: step 1, waveform → tokens on a grid.
        masker: step 2, grid → context tokens and target groups.
        encoder: step 3, context tokens → latents; its momentum copy is the target encoder.
        targets: step 4, what of the target encoder's latents is to be predicted.
        predictor: step 5, context latents → latents at the targets.
        distance: step 6, averaged over all targets of the optimizer step's batch.
        ema: the momentum update; handed to the Trainer by `configure_callbacks`, so that no
            configuration loses it.
        optimizer: makes the optimizer from parameter groups.
        lr_schedule: factor on the optimizer's learning rate.
        target_front_end: "shared": the target encoder reads the online front end's tokens, detached
            (the published WavJEPA and PupuJEPA code); "momentum": it owns a momentum copy of the
            front end too.
        decay_all: weight decay also on norms, biases and learned tokens (the published WavJEPA code
            does).
        compile: compile the transformer blocks; state-dict keys stay as they are.
        seed: of the initial weights and of the masks.
    """

    def __init__(
        self,
        front_end: FrontEnd,
        masker: Masker,
        encoder: Transformer,
        targets: Targets,
        predictor: Predictor,
        distance: Distance,
        ema: TargetEncoderEMA,
        optimizer: OptimizerCallable,
        lr_schedule: Schedule,
        target_front_end: Literal["shared", "momentum"] = "shared",
        decay_all: bool = False,
        compile: bool = False,  # noqa: A002
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[])
        if front_end.embed_dim != encoder.embed_dim:
            raise UserError(
                f"`front_end.embed_dim` ({front_end.embed_dim}) must equal `encoder.embed_dim` ({encoder.embed_dim})"
            )
        self.front_end, self.encoder, self.predictor = front_end, encoder, predictor
        self.masker, self.targets, self.distance = masker, targets, distance
        self.ema, self.optimizer, self.lr_schedule = ema, optimizer, lr_schedule
        self.decay_all, self.seed = decay_all, seed
        self.reset_parameters(seed)
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        own = target_front_end == "momentum"
        self.target_front_end = copy.deepcopy(front_end).requires_grad_(False) if own else None
        if compile:  # block by block: whatever calls the blocks gets compiled ones, and the token counts vary
            for block in (module for module in self.modules() if isinstance(module, Block)):
                block.compile(dynamic=True)

    def configure_model(self) -> None:
        """Shard what has parameters, if the strategy has a mesh for it."""
        if self.device_mesh is not None:
            shard(self, self.device_mesh)

    @property
    def online_modules(self) -> dict[str, nn.Module]:
        """The modules that have a momentum copy."""
        return {name: getattr(self, name) for name in self.target_modules}

    @property
    def target_modules(self) -> dict[str, nn.Module]:
        """The momentum copies, by the names of what they copy."""
        copies: dict[str, nn.Module] = {"encoder": self.target_encoder}
        return (
            copies
            if self.target_front_end is None
            else copies | {"front_end": self.target_front_end}
        )

    def reset_parameters(self, seed: int) -> None:
        """Draw the online weights from `seed` alone: those of step 0 can be had again, as a twin for the probes."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(
                seed
            )  # the CPU's alone: no other random state moves
            for part in (self.front_end, self.encoder, self.predictor):
                part.reset_parameters()

    def forward(self, waveform: Float[Tensor, "B C S"], masks: Masks) -> JEPAOutput:
        """Steps 3 to 6 for given masks: nothing random happens here."""
        grid = self.front_end.grid(waveform.shape[-1])
        tokens = self.front_end(waveform)
        context = self.encoder(tokens, grid, masks.context)
        prediction = self.predictor(context, masks, grid)
        target = self.target_latents(waveform, tokens, grid, masks.targets, masks.present)
        distance = self.distance(prediction, target)  # [B, M, T]
        if masks.targets.valid is not None:
            distance = distance * masks.targets.valid
        loss = distance.sum() / (masks.targets_per_clip * len(waveform))
        return JEPAOutput(loss, context, prediction, target)

    @torch.no_grad()
    def target_latents(
        self,
        waveform: Float[Tensor, "B C S"],
        tokens: Float[Tensor, "B N D"],
        grid: Grid,
        where: TokenSet,
        present: TokenSet | None = None,
    ) -> Float[Tensor, "B M T D"]:
        """What the target encoder says at `where`; `tokens` are the online front end's, `present` the clips'."""
        self.target_encoder.eval()
        if self.target_front_end is not None:
            tokens = self.target_front_end.eval()(waveform)
        return self.targets(self.target_encoder, tokens.detach(), grid, where, present)

    def loss(self, waveform: Float[Tensor, "B C S"], masks: Masks) -> Float[Tensor, ""]:
        """The loss for given masks."""
        return self.forward(waveform, masks).loss

    def draw_masks(self, batch: AudioBatch, rows_per_draw: int, stream: int = 0) -> Masks:
        """The masks that belong to the rows of a batch; see `Masker.for_rows`."""
        grid = self.front_end.grid(batch.waveform.shape[-1])
        num_time = None if batch.num_samples is None else self.front_end.num_time(batch.num_samples)
        masks = self.masker.for_rows(grid, batch.row, rows_per_draw, (self.seed, stream), num_time)
        return masks.to(batch.waveform.device)

    def training_step(self, batch: AudioBatch, batch_idx: int) -> Tensor:
        """Draw masks, compute the loss, log it; what the network draws (drop path) belongs to the rows too."""
        torch.manual_seed(hash((self.seed, int(batch.row[0]))))
        rows_per_step = (
            len(batch.waveform) * self.trainer.world_size * self.trainer.accumulate_grad_batches
        )
        loss = self.loss(batch.waveform, self.draw_masks(batch, rows_per_step))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.waveform))
        return loss

    def validation_step(self, batch: AudioBatch, batch_idx: int) -> None:
        """The loss on held-out clips, with the same masks at every validation."""
        self._log_held_out("valid/loss", batch)

    def test_step(self, batch: AudioBatch, batch_idx: int) -> None:
        """The loss on test clips, with the same masks at every test."""
        self._log_held_out("test/loss", batch)

    def _log_held_out(self, name: str, batch: AudioBatch) -> None:
        loss = self.loss(batch.waveform, self.draw_masks(batch, len(batch.waveform), stream=1))
        self.log(name, loss, prog_bar=True, sync_dist=True, batch_size=len(batch.waveform))

    def configure_callbacks(self) -> list[Callback]:
        """The momentum update."""
        return [self.ema]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Parameter groups (weight decay only on matrices, unless `decay_all`) and a schedule per optimizer step.

        Raises:
            UserError: if the run has no `max_steps`, on which every schedule depends.
        """
        max_steps = self.trainer.max_steps
        if max_steps < 1:
            raise UserError(
                f"set `trainer.max_steps` (now {max_steps}): schedules are functions of it"
            )
        optimizer = self.optimizer(parameter_groups(self, self.decay_all))
        scheduler = LambdaLR(
            optimizer, lambda step: self.lr_schedule(min(step, max_steps - 1), max_steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the total norm and log it; also with a fused optimizer under bf16, which Lightning refuses."""
        self.log(
            "train/gradient_norm", clip_gradients(self, gradient_clip_val, gradient_clip_algorithm)
        )
