"""The six steps of a JEPA combined: one LightningModule for every paper."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from typing_extensions import override

from jepa_audio.errors import check_bounds
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.front_ends import FrontEnd
from jepa_audio.steps.front_ends.alignment import aligned_tokens
from jepa_audio.steps.grid import AudioBatch, Grid, Masks, TokenSet
from jepa_audio.steps.losses import Distance, JEPAOutput
from jepa_audio.steps.masking.base import Masker
from jepa_audio.steps.masking.source import MaskStream
from jepa_audio.steps.predictor import Predictor
from jepa_audio.steps.regularizers import Regularizer, active, regularized
from jepa_audio.steps.targets import Targets
from jepa_audio.training.checks import (
    check_target_gradient,
    check_trainer,
    describe_collapse,
    match_widths,
)
from jepa_audio.training.device import prepare_modules, use_fused_kernel
from jepa_audio.training.ema import TargetEncoderEMA
from jepa_audio.training.initialization import draw_weights
from jepa_audio.training.masks import MaskingModule
from jepa_audio.training.optimizer import ScalerAwareModule, add_schedule, parameter_groups
from jepa_audio.training.schedules import Schedule
from jepa_audio.training.sharding import shard
from jepa_audio.training.watching.loss_log import LossLog


class JEPA(MaskingModule, ScalerAwareModule):
    """Joint-embedding predictive architecture (LeCun, 2022; Assran et al., 2023, arXiv:2301.08243).

    A recipe is a choice at each of the six steps. WavJEPA (arXiv:2509.23238) and PupuJEPA
    (arXiv:2606.25713) are two recipes.

    Args:
        front_end: step 1, waveform → tokens on a grid.
        masker: step 2, grid → context tokens and target groups.
        encoder: step 3, context tokens → latents; its momentum copy is the target encoder.
        targets: step 4, latents of the target encoder → prediction targets.
        predictor: step 5, context latents → predicted latents at the targets.
        distance: step 6, at each target token; the loss is their sum / their expected number.
        ema: the momentum update; `configure_callbacks` adds it to every Trainer.
        optimizer: creates the optimizer from parameter groups.
        lr_schedule: factor on the optimizer's learning rate.
        target_front_end: "shared": the target encoder gets detached tokens of the front end (as in
            the published WavJEPA and PupuJEPA code); "momentum": tokens of a momentum copy. Another
            front end, which is never trained: its tokens, see `aligned_tokens`; with
            `targets.top_k: 0`, they are the targets themselves.
        masks_per_clip: masks of each clip; with `targets.view: clip`, one pass of the target
            encoder serves all of them (M2D, arXiv:2404.06095; data2vec 2.0, arXiv:2212.07525).
        regularizers: step 6, further terms of the loss, such as VICReg and SIGReg.
        target_gradient: True takes the targets from the encoder itself, with gradient (LeJEPA),
            instead of its momentum copy.
        decay_all: weight decay also for norms, biases and learned tokens (published WavJEPA code).
        compile: compile the transformer blocks and the front ends; state-dict keys do not change.
        packed: pack rows of unequal length in half precision on a GPU; False masks their padding.
        seed: seed of the initial weights and the masks.
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
        target_front_end: Literal["shared", "momentum"] | FrontEnd = "shared",
        masks_per_clip: int = 1,
        regularizers: Sequence[Regularizer] = (),
        target_gradient: bool = False,
        decay_all: bool = False,
        compile: bool = False,  # noqa: A002
        packed: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[])
        check_target_gradient(target_gradient, target_front_end, distance)
        steps = front_end, encoder, targets, predictor, distance
        self.fixed_front_end = match_widths(*steps, target_front_end)
        self.front_end, self.encoder, self.predictor = front_end, encoder, predictor
        self.masker, self.targets, self.distance = masker, targets, distance
        self.ema, self.optimizer, self.lr_schedule = ema, optimizer, lr_schedule
        self.masks_per_clip, self.decay_all, self.seed = masks_per_clip, decay_all, seed
        check_bounds(self, 1, 1024, "masks_per_clip")
        self.regularizers, self.target_gradient = active(regularizers), target_gradient
        # Called with each training batch, its masks and its output; returns more sums of losses.
        self.observe: Callable[[JEPA, AudioBatch, Masks, JEPAOutput], dict[str, Tensor]] | None
        self.observe = None
        self.reset_parameters(seed)
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.target_front_end: FrontEnd | None = None
        if target_front_end == "momentum":
            self.target_front_end = copy.deepcopy(front_end).requires_grad_(False)
        prepare_modules(self, packed, compile)

    def configure_model(self) -> None:
        """Shard the parameters if the strategy has a device mesh."""
        if self.device_mesh is not None:
            shard(self, self.device_mesh)

    @property
    def online_modules(self) -> dict[str, nn.Module]:
        """The modules that have a momentum copy."""
        return {name: getattr(self, name) for name in self.target_modules}

    @property
    def target_modules(self) -> dict[str, nn.Module]:
        """The momentum copies, by the names of the modules that they copy."""
        copies = {"encoder": self.target_encoder, "front_end": self.target_front_end}
        return {name: module for name, module in copies.items() if module is not None}

    def reset_parameters(self, seed: int) -> None:
        """Draw the weights of step 0; they depend on `seed` alone."""
        parts = self.front_end, self.encoder, self.predictor, self.distance, self.fixed_front_end
        draw_weights(filter(None, parts), seed)

    def forward(self, waveform: Float[Tensor, "B C S"], masks: Masks) -> JEPAOutput:
        """Steps 1 and 3 to 6 for given masks; only drop path draws random numbers."""
        grid = self.front_end.grid(waveform.shape[-1])
        tokens = self.front_end(waveform)
        context = self.encoder(masks.repeat(tokens), grid, masks.context)
        prediction = self.predictor(context, masks, grid)
        target = self.target_latents(waveform, tokens, grid, masks.targets, masks.present)
        distance = self.distance.at_targets(prediction, target, masks.targets, grid)  # [Q, M, L]
        if masks.targets.valid is not None:
            distance = distance * masks.targets.valid
        total = distance.sum()
        loss = total / (masks.targets_per_clip * masks.num_masks)
        num_targets = masks.targets.counts.sum()
        output = JEPAOutput(loss, total, num_targets, context, prediction, target)
        return regularized(output, self.regularizers, masks, self.seed)

    def target_latents(
        self,
        waveform: Float[Tensor, "B C S"],
        tokens: Float[Tensor, "B N D"],
        grid: Grid,
        where: TokenSet,
        present: TokenSet | None = None,
    ) -> Float[Tensor, "Q M L T"]:
        """The targets at `where`, from `tokens` of the front end; `present` excludes padding."""
        if self.target_gradient:
            return self.targets(self.encoder, tokens, grid, where, present)
        with torch.no_grad():
            if self.fixed_front_end is not None:
                tokens = aligned_tokens(self.fixed_front_end.eval(), self.front_end, waveform)
            elif self.target_front_end is not None:
                tokens = self.target_front_end.eval()(waveform)
            return self.targets(self.target_encoder.eval(), tokens, grid, where, present)

    def loss(self, waveform: Float[Tensor, "B C S"], masks: Masks) -> Float[Tensor, ""]:
        """The loss for given masks."""
        return self.forward(waveform, masks).loss

    def training_step(self, batch: AudioBatch, batch_idx: int) -> dict[str, Any]:
        """Compute the loss; masks and drop path depend on `seed`, step and `batch.row`."""
        torch.manual_seed(hash((self.seed, int(batch.row[0]))))
        masks = self.masks_of(batch)
        output = self.forward(batch.waveform, masks)
        observed = self.observe(self, batch, masks, output) if self.observe else {}
        return {"loss": output.loss, "sums": output.sums | observed}

    def validation_step(self, batch: AudioBatch, batch_idx: int) -> dict[str, Any]:
        """Compute the loss, with the same random numbers for the masks at every evaluation."""
        masks = self.masks_of(batch, MaskStream.EVALUATION)
        return {"sums": self.forward(batch.waveform, masks).sums}

    test_step = validation_step

    @override
    def configure_callbacks(self) -> list[Callback]:
        check_trainer(self.trainer)  # Lightning calls this method before it prepares the data.
        describe_collapse(self.trainer, self.regularizers, self.ema.momentum, self.target_gradient)
        return [self.ema, LossLog([regularizer.name for regularizer in self.regularizers])]

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.optimizer(parameter_groups(self, self.decay_all))
        use_fused_kernel(optimizer)
        return add_schedule(optimizer, self.lr_schedule, self.trainer.max_steps)
