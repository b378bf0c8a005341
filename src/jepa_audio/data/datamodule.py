"""A folder of audio as training, validation and test batches."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from jepa_audio.data.dataset import CropDataset, Mono, collate
from jepa_audio.data.index import CorpusError, index_folder, load_index, usable
from jepa_audio.data.sampler import EveryNthBatch, GlobalOrderSampler, ResumableLoader
from jepa_audio.data.scenes import SceneBatch, SceneDataset, Scenes, collate_scenes, prepare_scenes
from jepa_audio.data.workers import num_cores, worker_arguments
from jepa_audio.grid import AudioBatch

log = logging.getLogger(__name__)


class AudioDataModule(LightningDataModule):
    """Crops of all audio files under a folder: any rates, channels and lengths in, one shape out.

    Args:
        root: folder of audio files, searched with its subfolders.
        sample_rate: of the crops, in Hz; files of other rates are resampled.
        crop_seconds: length of a crop.
        num_channels: of the crops; for more than one see `mono`.
        mono: "mean", "first" or "random" channel of a file, or "keep" for files of `num_channels` channels.
        crops_per_clip: crops of one file that go into a batch together.
        clip_seconds: window of a file that its crops come from; `None` for the whole file.
        loudness_dbfs: RMS level given to every clip; `None` leaves the level.
        mask_padding: a file shorter than a crop is filled up with zeros; True keeps them from the model, False lets it
            hear them as silence.
        scenes: rooms and noise that the clips are put into; `None` leaves them as they are.
        batch_size: clips of one process's micro-batch; it has `batch_size * crops_per_clip` rows.
        num_workers: reading processes of each training process; `None` for its share of the cores, up to 8.
        valid_share: share of the files held out, chosen by a hash of the path, so that a file stays where it
            is when others are added; 0 holds out none.
        valid_root: folder of the validation files instead; then nothing of `root` is held out.
        test_root: folder of the test files; the validation files if `None`.
        num_valid_clips: at most so many of the held-out files are used in a validation.
        min_seconds: shorter files are skipped.
        max_bad_share: above this share of skipped files, or of failed reads, the run stops with a list.
        seed: of order and crops.
    """

    def __init__(
        self,
        root: str | Path,
        sample_rate: int,
        crop_seconds: float,
        *,
        num_channels: int = 1,
        mono: Mono = "mean",
        crops_per_clip: int = 1,
        clip_seconds: float | None = None,
        loudness_dbfs: float | None = None,
        mask_padding: bool = False,
        scenes: Scenes | None = None,
        batch_size: int = 32,
        num_workers: int | None = None,
        valid_share: float = 0.05,
        valid_root: str | Path | None = None,
        test_root: str | Path | None = None,
        num_valid_clips: int = 512,
        min_seconds: float = 0.1,
        max_bad_share: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name in ("root", "valid_root", "test_root"):  # a checkpoint holds plain data only
            self.hparams[name] = None if self.hparams[name] is None else str(self.hparams[name])
        if isinstance(scenes, Scenes):
            self.hparams["scenes"] = asdict(scenes)
        if scenes is not None and mask_padding:
            raise ValueError("`scenes` fill every clip with sound: leave `mask_padding` false")
        if not 0 <= valid_share < 1:
            raise ValueError(f"`valid_share` ({valid_share}) must be in [0, 1)")
        if batch_size < 1 or num_valid_clips < 1:
            raise ValueError(f"`batch_size` ({batch_size}) and `num_valid_clips` ({num_valid_clips}) must be >= 1")
        if round(crop_seconds * sample_rate) < 1:
            raise ValueError(f"`crop_seconds` ({crop_seconds}) must be at least a sample at {sample_rate} Hz")
        self.root = Path(root)
        self.valid_root = None if valid_root is None else Path(valid_root)
        self.test_root = None if test_root is None else Path(test_root)
        self.sample_rate = sample_rate
        self.num_samples = round(crop_seconds * sample_rate)
        self.num_channels = num_channels
        self.mono = mono
        self.crops_per_clip = crops_per_clip
        self.clip_seconds = clip_seconds
        self.loudness_dbfs = loudness_dbfs
        self.mask_padding = mask_padding
        self.scenes = scenes
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.valid_share = valid_share
        self.num_valid_clips = num_valid_clips
        self.min_seconds = min_seconds
        self.max_bad_share = max_bad_share
        self.seed = seed
        self._tables: dict[str, tuple[Path, pa.Table]] = {}
        self._num_skipped = 0
        self._train_loader: ResumableLoader | None = None

    def prepare_data(self) -> None:
        """Index every folder; the first run decodes all files, a later one only what has changed."""
        for root in dict.fromkeys(root for root in (self.root, self.valid_root, self.test_root) if root):
            index_folder(
                root,
                num_workers=num_cores(),
                min_seconds=self.min_seconds,
                num_channels=self._needed_channels(),
                max_bad_share=self.max_bad_share,
            )
        if self.scenes is not None:
            prepare_scenes(self.scenes, self.num_channels, self.sample_rate, num_cores())

    def setup(self, stage: str) -> None:
        """Read the tables and divide them; every process comes to the same division."""
        index = load_index(self.root)
        files = self._usable(self.root, index)
        self._num_skipped = len(index) - len(files)
        if self.valid_root is not None:
            train, valid = files, _by_hash(self._usable(self.valid_root, load_index(self.valid_root)))
        else:
            train, valid = split(files, self.valid_share)
        valid = valid.slice(0, self.num_valid_clips)
        self._tables = {"train": (self.root, train), "valid": (self.valid_root or self.root, valid)}
        self._tables["test"] = self._tables["valid"]
        if self.test_root is not None:
            self._tables["test"] = (self.test_root, self._usable(self.test_root, load_index(self.test_root)))
        if self._rank == 0:
            log.info(self.describe())
            if len(files) == 1 and self.valid_root is None and self.valid_share > 0:
                log.warning("%s holds one file: it is trained on and validated on", self.root)

    def describe(self) -> str:
        """What there is to train on, in one line."""
        table = self._tables["train"][1]
        hours = float(np.sum(table["num_frames"].to_numpy() / table["sample_rate"].to_numpy())) / 3600
        rates = sorted((count["values"], count["counts"]) for count in table["sample_rate"].value_counts().to_pylist())
        return (
            f"{self.root}: {len(table)} files to train on, {hours:.2f} hours, "
            + ", ".join(f"{count} at {rate} Hz" for rate, count in rates)
            + f"; {len(self._tables['valid'][1])} files to validate on, {self._num_skipped} files skipped"
        )

    def train_dataloader(self) -> ResumableLoader:
        """Endless random crops; an epoch is the whole run of `max_steps`, or else about one pass."""
        dataset = self._dataset("train", random_crops=True)
        sampler = GlobalOrderSampler(
            len(dataset), self.batch_size, rank=self._rank, world_size=self._world_size, seed=self.seed
        )
        accumulated = self.trainer.accumulate_grad_batches if self.trainer else 1
        num_steps = math.ceil(sampler.batches_per_pass / accumulated)
        if self.trainer and self.trainer.max_steps > 0:
            num_steps = self.trainer.max_steps
        batches_per_epoch = num_steps * accumulated
        self._train_loader = ResumableLoader(self._loader(dataset, batch_sampler=sampler), batches_per_epoch)
        return self._train_loader

    def val_dataloader(self) -> list[DataLoader[AudioBatch]]:
        """Crops from the middle of the held-out files, the same every time; no loader without such files."""
        return self._evaluation_loaders("valid")

    def test_dataloader(self) -> list[DataLoader[AudioBatch]]:
        """The same of the test files."""
        return self._evaluation_loaders("test")

    def teardown(self, stage: str) -> None:
        """Let the training workers go."""
        if stage == "fit" and self._train_loader is not None:
            self._train_loader.close()

    def _evaluation_loaders(self, part: str) -> list[DataLoader[AudioBatch]]:
        if len(self._tables[part][1]) == 0:
            return []
        dataset = self._dataset(part, random_crops=False)
        sampler = EveryNthBatch(len(dataset), self.batch_size, self._rank, self._world_size)
        return [self._loader(dataset, sampler=sampler, batch_size=self.batch_size)]

    def _dataset(self, part: str, random_crops: bool) -> CropDataset:
        root, table = self._tables[part]
        make = CropDataset if self.scenes is None else partial(SceneDataset, self.scenes)
        return make(
            root=root,
            table=table,
            sample_rate=self.sample_rate,
            num_samples=self.num_samples,
            num_channels=self.num_channels,
            mono=self.mono,
            crops_per_clip=self.crops_per_clip,
            clip_seconds=self.clip_seconds,
            loudness_dbfs=self.loudness_dbfs,
            seed=self.seed,
            random_crops=random_crops,
            max_bad_share=self.max_bad_share,
        )

    @property
    def _collate(self) -> Callable[[list[Any]], AudioBatch | SceneBatch]:
        if self.scenes is not None:
            return partial(collate_scenes, num_samples=self.num_samples)
        return partial(collate, mask_padding=self.mask_padding)

    def on_after_batch_transfer(self, batch: AudioBatch | SceneBatch, dataloader_idx: int) -> AudioBatch:
        """Scenes are rendered where the model is."""
        return batch.render() if isinstance(batch, SceneBatch) else batch

    def _loader(
        self,
        dataset: CropDataset,
        sampler: EveryNthBatch | None = None,
        batch_sampler: GlobalOrderSampler | None = None,
        batch_size: int = 1,
    ) -> DataLoader[AudioBatch]:
        num_workers = self._worker_count()
        return DataLoader(
            dataset,  # type: ignore[arg-type]  # its items are crops, collate makes batches of them
            batch_size=batch_size,
            sampler=sampler,
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            collate_fn=self._collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0 and sampler is not None,  # training has but one iterator
            # Else the workers' seeds are drawn from the global generator, and disturb the model's numbers.
            generator=torch.Generator(),
            **worker_arguments(num_workers),
        )

    def _usable(self, root: Path, index: pa.Table) -> pa.Table:
        table = usable(index, self.min_seconds, self._needed_channels())
        if len(table) == 0:
            raise CorpusError(f"none of the {len(index)} audio files under {root} can be used")
        return table

    def _needed_channels(self) -> int | None:
        return self.num_channels if self.mono == "keep" else None

    def _worker_count(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        processes = self.trainer.num_devices if self.trainer else 1
        return min(8, max(1, num_cores() // processes))

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1


def split(table: pa.Table, valid_share: float) -> tuple[pa.Table, pa.Table]:
    """Training and validation files, told apart by a hash of the path; validation files in the hash's order.

    Neither part is empty if `valid_share` is positive: of two files one is held out, a single one is in both.
    """
    shuffled = _by_hash(table)
    if valid_share == 0:
        return table, table.slice(0, 0)
    if len(table) == 1:
        return table, table
    held_out = sum(_hash(path) < valid_share for path in table["path"].to_pylist())
    held_out = min(max(held_out, 1), len(table) - 1)
    return shuffled.slice(held_out).sort_by("path"), shuffled.slice(0, held_out)


def _by_hash(table: pa.Table) -> pa.Table:
    return table.take(np.argsort([_hash(path) for path in table["path"].to_pylist()]))


def _hash(path: str) -> float:
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest()) / 2**64
