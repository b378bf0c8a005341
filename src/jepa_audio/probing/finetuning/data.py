"""The data module of fine-tuning: a task, its splits or folds, and the loaders."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from jepa_audio.data.audio.resample import resampled_length
from jepa_audio.errors import UserError
from jepa_audio.inference.encoder import Encoder
from jepa_audio.probing.clips import item_segment, map_items, read_header
from jepa_audio.probing.finetuning.augmentations import check_options
from jepa_audio.probing.finetuning.clips import (
    ClipFormat,
    CropSettings,
    EpochOrder,
    EvaluationWindows,
    TrainingCrops,
    collate_crops,
    collate_windows,
)
from jepa_audio.probing.finetuning.folds import FoldBy, assign_folds, fold_data
from jepa_audio.probing.tasks import ProbeData, load_task
from jepa_audio.probing.tasks.label_checks import check_labels
from jepa_audio.probing.tasks.labels import Rows
from jepa_audio.probing.tasks.records import Item
from jepa_audio.probing.tasks.table import LabelKind

log = logging.getLogger(__name__)


class LabelledClips(LightningDataModule):
    """The data of fine-tuning. An epoch has one random crop of each training clip.

    The validation and the test split are evaluated in all windows of the protocol of the task, as
    in a probe with the preset marble-v1.

    Args:
        task: name of a task, a table of your own (.csv, .tsv), or `my_package:function`.
        root: folders of records or of raw data sets, as `--data` of the command `probe`.
        table_kind: kind of the labels in your own table.
        crop_seconds: length of the training crops; `None` for that of the pretraining. Longer
            crops are encoded in several windows. Shorter clips are used as they are.
        batch_size: clips of a training step on each process.
        num_workers: processes that load clips.
        max_train: number of random training units; `None` for all.
        mixup: a of Beta(a, a), from which the shares in a mixture of two clips are drawn (Zhang et
            al., 2018, arXiv:1710.09412); 0 for no mixtures.
        gain_db: largest random change of the level of a training clip, up or down, in dB.
        time_shift: seconds that may be cut from the start of a training clip which is not longer
            than a crop. Longer clips have crops at random times.
        seed: of the order of clips, crops and augmentations.
        folds: divide all clips into folds by this key of their records, "group" or "fold"; `None`
            for the splits of the task.
        num_folds: number of folds for `folds: group`.
    """

    def __init__(
        self,
        task: str,
        root: list[Path] | Path | None = None,
        *,
        table_kind: LabelKind = "multiclass",
        crop_seconds: float | None = None,
        batch_size: int = 32,
        num_workers: int = 4,
        max_train: int | None = None,
        mixup: float = 0.0,
        gain_db: float = 0.0,
        time_shift: float = 0.0,
        seed: int = 0,
        folds: FoldBy | None = None,
        num_folds: int = 5,
    ) -> None:
        super().__init__()
        self.task, self.table_kind, self.max_train = task, table_kind, max_train
        self.roots = root if isinstance(root, list) else [] if root is None else [root]
        self.crop_seconds, self.batch_size, self.num_workers = crop_seconds, batch_size, num_workers
        self.mixup, self.gain_db, self.time_shift = mixup, gain_db, time_shift
        self.seed, self.folds, self.num_folds = seed, folds, num_folds
        self._has_logged = False
        check_options("data", self, 1, 1_000_000, "batch_size")
        check_options("data", self, 0, 1000, "num_workers", "mixup", "gain_db", "time_shift")
        check_options("data", self, 1e-3, 86_400, "crop_seconds")

    @cached_property
    def loaded(self) -> ProbeData:
        """The task with all its items."""
        return load_task(self.task, self.roots, self.table_kind, for_folds=self.folds is not None)

    @cached_property
    def fold_of_item(self) -> Int64[np.ndarray, " items"] | None:
        """The fold of each item; `None` without folds."""
        by = self.folds
        return None if by is None else assign_folds(self.loaded, by, self.num_folds)

    @property
    def num_runs(self) -> int:
        """Number of folds; 1 without folds."""
        return 1 if self.fold_of_item is None else int(self.fold_of_item.max()) + 1

    def select(self, fold: int, encoder: Encoder) -> None:
        """Use a fold, and the format and the crops of an encoder.

        Raises:
            UserError: if the labels cannot be learned.
            UnusableClipsError: if items cannot be used, or headers of files cannot be read.
        """
        data = self.loaded
        if self.fold_of_item is not None:
            data = fold_data(data, self.fold_of_item, fold)
        self.data = data.with_train(self.max_train)
        check_labels(self.data)
        self.format = ClipFormat.of(encoder, self.data)
        self.crop_samples = encoder.window_samples
        if self.crop_seconds is not None:
            self.crop_samples = max(1, round(self.crop_seconds * encoder.sample_rate))
        splits = self.data.splits.items()
        self.spans = {name: map_items(self._spans, s.items) for name, s in splits}

    def _spans(self, item: Item) -> list[tuple[int, int]]:
        """The windows of an item, from the header of its file."""
        frames, file_rate, file_channels = read_header(item.path)
        form = self.format
        segment = item_segment(item, frames, file_rate, file_channels, form.num_channels)
        num_samples = resampled_length(len(segment), file_rate, form.sample_rate)
        return form.windows.spans(num_samples, form.sample_rate)

    @property
    def num_padded(self) -> int:
        """Windows, of all splits, that are too short for one token and are padded."""
        spans = [span for split in self.spans.values() for of_item in split for span in of_item]
        return sum(stop - start < self.format.min_samples for start, stop in spans)

    def rows(self, split: str) -> Rows:
        """The rows of all windows of a split."""
        pairs = [(item, span) for item, spans in enumerate(self.spans[split]) for span in spans]
        places = [(item, start) for item, (start, _) in pairs]
        return self.format.rows(places, [stop - start for _, (start, stop) in pairs])

    def crops(self) -> TrainingCrops:
        """The training clips."""
        augmentations = self.mixup, self.gain_db, self.time_shift
        settings = CropSettings(self.crop_samples, *augmentations, self.seed)
        return TrainingCrops(self.data, self.format, settings)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        crops, (rank, world) = self.crops(), self._processes
        batch = min(self.batch_size, len(crops) // world)
        if batch < 1:
            raise UserError(f"{len(crops)} training clips are too few for {world} processes")
        rest = len(crops) % (batch * world)
        if self._has_logged:
            pass  # Lightning calls this method more than once.
        elif batch < self.batch_size:
            rank_zero_only(log.warning)(
                "`data.batch_size` is %d instead of %d: there are %d training clips",
                *(batch, self.batch_size, len(crops)),
            )
        elif rest:
            rank_zero_only(log.info)(
                "all batches are full: each epoch leaves out %d of %d training clips at random",
                *(rest, len(crops)),
            )
        self._has_logged = True
        order = EpochOrder(len(crops), batch * world, self.seed, rank, world)
        return self._loader(crops, batch, order, collate_crops)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self._evaluation("val")

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluation("test")

    def _evaluation(self, split: str) -> DataLoader[Any]:
        windows = EvaluationWindows(self.data.splits[split], self.format)
        rank, world = self._processes
        # All processes have equally many items; repeated ones are evaluated twice, counted once.
        size = math.ceil(len(windows) / world) * world
        items = [item % len(windows) for item in range(size)][rank::world]
        return self._loader(windows, self.batch_size, items, collate_windows)

    def _loader(
        self, clips: Dataset[Any], batch: int, order: Iterable[Any], collate: Callable[..., Any]
    ) -> DataLoader[Any]:
        return DataLoader(
            clips,
            batch,
            sampler=order,
            num_workers=self.num_workers,
            collate_fn=collate,
            persistent_workers=self.num_workers > 0,
        )

    @property
    def _processes(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
