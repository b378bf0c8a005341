"""The LightningModule of fine-tuning."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.inference.encoder import Encoder
from jepa_audio.inference.features import Frequency
from jepa_audio.inference.load import load_encoder
from jepa_audio.probing.encoders import state_hash
from jepa_audio.probing.finetuning.augmentations import SpecAugment, check_options, loss_of
from jepa_audio.probing.finetuning.clips import CropBatch, WindowBatch
from jepa_audio.probing.finetuning.data import LabelledClips
from jepa_audio.probing.finetuning.evaluation import WindowLogits, measure_scale, save_logits
from jepa_audio.probing.finetuning.network import Backbone, ClipNetwork
from jepa_audio.probing.finetuning.tuning import Tuning, freeze_statistics, merge_adapters
from jepa_audio.probing.tasks.labels import Rows
from jepa_audio.training.optimizer import ScalerAwareModule, add_schedule
from jepa_audio.training.schedules import WarmupCosine

log = logging.getLogger(__name__)


class FineTuning(ScalerAwareModule):
    """Train an encoder and a head on a labelled task. The data module must be `LabelledClips`.

    The optimizer is AdamW. The learning rates rise linearly, then fall to 0 in half a cosine.

    Args:
        encoder: a run, a checkpoint, or another encoder that `load_encoder` opens.
        mode: what is trained besides the head: "head" (nothing), "full" (everything), "last_N" (the
            last N blocks, as in last_2) or "lora" (low-rank adapters of all blocks).
        variant: "context" or "target" encoder, or "random", the random-init baseline.
        head: "linear": a linear map of the mean over time; "attentive": four learned queries weight
            the time columns, then a linear map.
        frequency: how the frequency rows of a time column become one vector.
        lr: learning rate of the encoder; `None` for 1e-3 with lora, else 1e-4.
        head_lr: learning rate of the head.
        weight_decay: of matrices; norms, biases and registers have none.
        layer_decay: factor on `lr` from each block to the block before it; `None` for 0.75. Modes
            full and last_N.
        warmup: share of the run in which the learning rates rise.
        lora_rank: rank of the adapters; `None` for 8. Mode lora.
        time_mask: SpecAugment: largest masked share of the time of a window; 0 for none.
        freq_mask: SpecAugment: largest masked share of the bands of a spectrogram; 0 for none.
        seed: of the weights of head and adapters.

    Attributes:
        results: after a test, its rows and their logits.
        results_file: `.npz` file into which the results of a test are written.
    """

    valid_score: Tensor

    def __init__(
        self,
        encoder: str,
        mode: str = "full",
        *,
        variant: Literal["context", "target", "random"] = "context",
        head: Literal["linear", "attentive"] = "linear",
        frequency: Frequency = "mean",
        lr: float | None = None,
        head_lr: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        warmup: float = 0.1,
        lora_rank: int | None = None,
        time_mask: float = 0.0,
        freq_mask: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tuning = Tuning(mode, layer_decay, lora_rank)
        if lr is not None and mode == "head":
            raise UserError(
                f"`model.lr` ({lr}) has no effect in the mode head: set `model.head_lr`"
            )
        default = 1e-3 if mode == "lora" else 1e-4
        self.lr = default if lr is None else lr
        self.head_lr, self.weight_decay, self.warmup = head_lr, weight_decay, warmup
        check_options("model", self, 0, math.inf, "lr", "head_lr", "weight_decay")
        check_options("model", self, 0, 0.99, "warmup")
        self.kind, self.frequency, self.seed = head, frequency, seed
        self.pretrained: Encoder = load_encoder(encoder, variant)
        self.encoder_hash = state_hash(self.pretrained)
        self.augment = SpecAugment(time_mask, freq_mask) if time_mask or freq_mask else None
        if self.augment is not None:
            self.augment.check(self.pretrained.front_end)
        self.results: tuple[Rows, Tensor] | None = None
        self.results_file: Path | None = None
        # The score of the best epoch is stored with its weights.
        self.register_buffer("valid_score", torch.tensor(math.nan, dtype=torch.float64))
        self._logits = WindowLogits()

    def set_task(self, data: LabelledClips) -> None:
        """Make the network for the labels of a task."""
        grid_hz, self._task = data.data.task.grid_hz, data.data.task.name
        if self.kind == "attentive" and grid_hz is not None:
            raise UserError(
                f"`model.head` is attentive, for clips, but {data.data.task.name} has labels"
                " in time: use linear"
            )
        backbone = Backbone(self.pretrained)
        self.tuning.apply(backbone, self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        head = self.kind, data.data.labels.num_outputs, self.frequency, grid_hz, generator
        self.network = ClipNetwork(backbone, *head)
        # Its modules are those of the network.
        self._pretrained = [self.pretrained]
        del self.pretrained
        self.train()

    def encoder(self) -> Encoder:
        """The fine-tuned encoder, with merged adapters; the network cannot be trained any more."""
        merge_adapters(self.network.backbone)
        (encoder,) = self._pretrained
        if self.tuning.mode != "head":  # in this mode, the encoder is the pretrained one
            how = f"in the mode {self.tuning.mode} on {self._task}"
            encoder.source = f"{encoder.source}, fine-tuned {how}"
        return encoder.freeze()

    @property
    def pooling(self) -> str:
        """Name of the pooling in results, see `ProbeRow`."""
        time = "mean" if self.kind == "linear" and self.network.grid_hz is None else "frames"
        return f"{time}/{self.frequency}"

    @property
    def clips(self) -> LabelledClips:
        """The data module."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, LabelledClips)
        return data

    @override
    def on_fit_start(self) -> None:
        """Measure the means and deviations of the head on training clips, unless it is resumed."""
        if self.network.is_measured:
            return
        measure_scale(self.network, self.clips.crops(), self.device)
        self.train()

    @override
    def train(self, mode: bool = True) -> FineTuning:
        super().train(mode)
        freeze_statistics(self.modules())
        return self

    def training_step(self, batch: CropBatch, batch_idx: int) -> Tensor:
        """The loss of the clips; together, all processes have the loss of the global batch."""
        torch.manual_seed(hash((self.seed, self.trainer.global_step, self.global_rank)))
        rows = self.network(batch.waveform, batch.lengths, self.augment, batch.seeds)
        loss, size = loss_of(self.clips.data.labels, torch.cat(rows), batch.targets)
        mean = self.trainer.strategy.reduce(size.clone(), reduce_op="mean")
        loss = loss * size / mean.clamp_min(1e-9)
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: WindowBatch, batch_idx: int) -> None:
        """Keep the logits of windows."""
        rows = self.network(batch.waveform, batch.lengths)
        self._logits.add(batch, rows)

    test_step = validation_step

    @override
    def on_validation_epoch_end(self) -> None:
        data = self.clips.data
        rows, logits = self._gather()
        score = float(data.scores(logits[:, None], data.splits["val"], rows))
        self.valid_score.fill_(score)
        self.log("valid/score", score, prog_bar=True)
        if not self.trainer.sanity_checking:
            loss = self.trainer.callback_metrics.get("train/loss", torch.tensor(math.nan))
            name, epochs = data.task.metrics[0].name, self.trainer.max_epochs
            rank_zero_only(log.info)(
                f"epoch {self.current_epoch + 1} of {epochs}: training loss {float(loss):.4g}, "
                f"validation {name} {score:.4f}"
            )

    @override
    def on_train_end(self) -> None:
        """State why training ends before the last epoch."""
        num_epochs, max_epochs = self.current_epoch, self.trainer.max_epochs or 0
        if self.trainer.should_stop and num_epochs < max_epochs:
            rank_zero_only(log.info)(
                f"training stops after {num_epochs} of {max_epochs} epochs: the validation score "
                "has not increased in the last `patience` epochs"
            )

    @override
    def on_test_epoch_end(self) -> None:
        self.results = rows, logits = self._gather()
        if self.results_file is not None and self.trainer.is_global_zero:
            save_logits(self.results_file, rows, logits)

    def _gather(self) -> tuple[Rows, Tensor]:
        """The rows and logits of a split, from all processes, in the order of its windows."""
        rows, logits = self._logits.gather(self.clips.format)
        if not logits.isfinite().all():
            raise UserError(
                f"the logits are not finite after epoch {self.current_epoch + 1}: lower "
                f"`--model.lr` ({self.lr:g}) and `--model.head_lr` ({self.head_lr:g}), or use "
                "`--trainer.precision 32-true`"
            )
        return rows, logits

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise UserError("set `trainer.max_epochs`: the learning rates depend on it")
        rates = self.lr, self.head_lr, self.weight_decay
        groups = self.tuning.parameter_groups(self.network, *rates)
        schedule = WarmupCosine(min(round(self.warmup * steps), int(steps) - 1))
        return add_schedule(torch.optim.AdamW(groups), schedule, int(steps))
