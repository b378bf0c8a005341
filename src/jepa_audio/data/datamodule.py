"""Corpora as training, validation and test batches."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

from jepa_audio.data.corpus.index import check_bad_share, index_corpus
from jepa_audio.data.corpus.table import Corpus, CorpusError, load_corpus
from jepa_audio.data.loading.crops import (
    ChannelMode,
    ClipDataset,
    Collate,
    CropDataset,
    WithBadReads,
    collate,
)
from jepa_audio.data.loading.file_table import FileTable
from jepa_audio.data.loading.loader import BadReadCounter, EvaluationLoader, ResumableLoader
from jepa_audio.data.loading.order import EveryNthBatch, GlobalOrderSampler
from jepa_audio.data.loading.workers import worker_arguments
from jepa_audio.data.scenes.scenes import (
    SceneBatch,
    SceneDataset,
    Scenes,
    collate_scenes,
    prepare_scenes,
)
from jepa_audio.errors import UserError
from jepa_audio.parallel import num_cores
from jepa_audio.steps.grid import AudioBatch

log = logging.getLogger(__name__)


class AudioDataModule(LightningDataModule):
    """Crops of all audio files of a corpus: any rates, channels and lengths in, one shape out.

    Args:
        root: folder of audio files or tars, searched with its subfolders; or another source, see
            `jepa_audio.data.corpus.sources.discover_files`; or a table (`.parquet`) that `jepa-audio data
            index` has made, which is believed as it is. A list of sources is one corpus; a mapping
            from sources to weights is a mixture, whose clips come from each in that proportion,
            whatever their sizes.
        sample_rate: of the crops, in Hz; files of other rates are resampled.
        crop_seconds: length of a crop.
        num_channels: of the crops; for more than one see `mono`.
        mono: "mean", "first" or "random" channel of a file, or "keep" for files of `num_channels`
            channels.
        crops_per_clip: crops of one file that go into a batch together.
        clip_seconds: window of a file that its crops come from; `None` for the whole file.
        loudness_dbfs: RMS level given to every clip; `None` leaves the level.
        mask_padding: a file shorter than a crop is filled up with zeros; True keeps them from the
            model, False lets it hear them as silence.
        scenes: rooms and noise that the clips are put into; `None` leaves them as they are.
        batch_size: clips of one process's micro-batch; it has `batch_size * crops_per_clip` rows.
        num_workers: reading processes of each training process; `None` for its share of the cores,
            up to 8.
        valid_share: share of the files held out, where the table does not say which, see
            `Corpus.split`; 0 holds out none.
        valid_root: source of the validation files instead; then nothing of `root` is held out but
            what its table has for validation or test.
        test_root: source of the test files; if `None`, those of the table, or else the validation
            files.
        num_valid_clips: at most about so many of the held-out files are used in a validation, as
            many of each corpus.
        min_seconds: shorter files are skipped.
        max_seconds: longer files are skipped; `None` for no bound.
        max_bad_share: above this share of skipped files, or of failed reads, the run stops with a
            list.
        seed: of order and crops.
    """

    def __init__(
        self,
        root: dict[str, float] | list[str] | str | Path,
        sample_rate: int,
        crop_seconds: float,
        *,
        num_channels: int = 1,
        mono: ChannelMode = "mean",
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
        max_seconds: float | None = None,
        max_bad_share: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name in ("root", "valid_root", "test_root"):  # a checkpoint holds plain data only
            if isinstance(self.hparams[name], Path):
                self.hparams[name] = str(self.hparams[name])
        if isinstance(scenes, Scenes):
            self.hparams["scenes"] = asdict(scenes)
        if scenes is not None and mask_padding:
            raise UserError("`scenes` fill every clip with sound: leave `mask_padding` false")
        self.sources = (
            [str(source) for source in root] if isinstance(root, list | dict) else [str(root)]
        )
        self.weights = list(root.values()) if isinstance(root, dict) else None
        self.valid_root = None if valid_root is None else str(valid_root)
        self.test_root = None if test_root is None else str(test_root)
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
        self.max_seconds = max_seconds
        self.max_bad_share = max_bad_share
        self.seed = seed
        self._refuse_the_impossible()
        self.prepare_data_per_node = (
            False  # one process indexes; the table is shared as the audio is
        )
        self._files: dict[str, FileTable] = {}
        self._description = ""
        self._bad_reads = BadReadCounter(max_bad_share)
        self._train_loader: ResumableLoader | None = None

    def _refuse_the_impossible(self) -> None:
        if not (self.sources and all(self.sources)):
            raise UserError("`root` names no source of audio")
        if not 0 <= self.valid_share < 1:
            raise UserError(f"`valid_share` ({self.valid_share}) must be in [0, 1)")
        for name in ("batch_size", "num_valid_clips"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` ({getattr(self, name)}) must be >= 1")
        if self.num_samples < 1:
            raise UserError(f"`crop_seconds` must be at least a sample at {self.sample_rate} Hz")

    def prepare_data(self) -> None:
        """Index every source but tables; the first run decodes all files, a later one only what has changed."""
        for source in dict.fromkeys(
            source for source in (*self.sources, self.valid_root, self.test_root) if source
        ):
            if not source.endswith(".parquet"):
                index_corpus(
                    source,
                    num_workers=num_cores(),
                    max_bad_share=self.max_bad_share,
                    **self._fitness,
                )
        if self.scenes is not None:
            prepare_scenes(self.scenes, self.num_channels, self.sample_rate, num_cores())

    def setup(self, stage: str) -> None:
        """Read the tables and divide them; every process comes to the same division."""
        corpora = [load_corpus(source) for source in self.sources]
        usable = [
            self._usable(source, corpus)
            for source, corpus in zip(self.sources, corpora, strict=True)
        ]
        _refuse_overlap(self.sources, usable)
        parts = [corpus.split(0.0 if self.valid_root else self.valid_share) for corpus in usable]
        train, valid, test = (
            [getattr(part, name) for part in parts] for name in ("train", "valid", "test")
        )
        for source, corpus in zip(self.sources, train, strict=True):
            if not len(corpus):
                raise CorpusError(
                    f"no file of {source} is for training: its table puts them all elsewhere"
                )
        if self.valid_root is not None:
            valid = [self._usable(self.valid_root).shuffled()]
        num_each = -(-self.num_valid_clips // len(valid))
        valid = [corpus.take(np.arange(min(len(corpus), num_each))) for corpus in valid]
        if self.test_root is not None:
            test = [self._usable(self.test_root)]
        test = test if sum(map(len, test)) else valid
        chosen = {"train": train, "valid": valid, "test": test}
        self._files = {
            name: FileTable(part) for name, part in chosen.items() if sum(map(len, part))
        }
        num_usable = sum(map(len, usable))
        self._description = _described(
            self.sources, train, valid, sum(map(len, corpora)) - num_usable
        )
        del corpora, usable, parts, train, valid, test, chosen
        pa.default_memory_pool().release_unused()  # a gigabyte, of millions of files, that the run never needs again
        if self._rank == 0:
            log.info(self._description)
            if num_usable == 1 and self.valid_root is None and self.valid_share > 0:
                log.warning("%s holds one file: it is trained on and validated on", self.sources[0])

    def summary(self) -> str:
        """What there is to train on, in one line."""
        return self._description

    def find_row_files(self, rows: Sequence[int]) -> list[str]:
        """The files that stand behind rows of training batches; where one could not be read, that file itself."""
        if self._train_loader is None:
            return []
        files = self._files["train"]
        places = dict.fromkeys(row // self.crops_per_clip for row in rows)
        return [str(files[self._train_loader.order.file_at(place)].audio) for place in places]

    def train_dataloader(self) -> ResumableLoader:
        """Endless random crops; an epoch is the whole run of `max_steps`, or else about one pass."""
        dataset = self._dataset("train", random_crops=True)
        sampler = GlobalOrderSampler(
            dataset.files.sizes,
            self.batch_size,
            weights=self.weights,
            rank=self._rank,
            world_size=self._world_size,
            seed=self.seed,
        )
        accumulated = self.trainer.accumulate_grad_batches if self.trainer else 1
        num_steps = math.ceil(sampler.batches_per_pass / accumulated)
        if self.trainer and self.trainer.max_steps > 0:
            num_steps = self.trainer.max_steps
        batches_per_epoch = num_steps * accumulated
        loader = self._loader(dataset, batch_sampler=sampler)
        fingerprint = dataset.files.fingerprint
        self._train_loader = ResumableLoader(
            loader, self._bad_reads, batches_per_epoch, fingerprint
        )
        return self._train_loader

    def val_dataloader(self) -> list[EvaluationLoader]:
        """Crops from the middle of the held-out files, the same every time; no loader without such files."""
        return self._evaluation_loaders("valid")

    def test_dataloader(self) -> list[EvaluationLoader]:
        """The same of the test files."""
        return self._evaluation_loaders("test")

    def teardown(self, stage: str) -> None:
        """Let the training workers go, and say what could not be read."""
        if summary := self._bad_reads.summary():
            log.warning("%s", summary)
        if stage == "fit" and self._train_loader is not None:
            self._train_loader.close()

    def _evaluation_loaders(self, part: str) -> list[EvaluationLoader]:
        if part not in self._files:
            return []
        dataset = self._dataset(part, random_crops=False)
        even = self.trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy)
        sampler = EveryNthBatch(len(dataset), self.batch_size, self._rank, self._world_size, even)
        loader = self._loader(dataset, sampler=sampler, batch_size=self.batch_size)
        return [EvaluationLoader(loader, self._bad_reads)]

    def _dataset(self, part: str, random_crops: bool) -> ClipDataset[Any]:
        make = CropDataset if self.scenes is None else partial(SceneDataset, self.scenes)
        return make(
            files=self._files[part],
            sample_rate=self.sample_rate,
            num_samples=self.num_samples,
            num_channels=self.num_channels,
            mono=self.mono,
            crops_per_clip=self.crops_per_clip,
            clip_seconds=self.clip_seconds,
            loudness_dbfs=self.loudness_dbfs,
            seed=self.seed,
            random_crops=random_crops,
        )

    @property
    def _collate(self) -> Callable[[list[Any]], AudioBatch | SceneBatch]:
        if self.scenes is not None:
            return partial(collate_scenes, num_samples=self.num_samples)
        return partial(collate, mask_padding=self.mask_padding)

    def on_after_batch_transfer(
        self, batch: AudioBatch | SceneBatch, dataloader_idx: int
    ) -> AudioBatch:
        """Scenes are rendered where the model is."""
        return batch.render() if isinstance(batch, SceneBatch) else batch

    def _loader(
        self,
        dataset: ClipDataset[Any],
        sampler: EveryNthBatch | None = None,
        batch_sampler: GlobalOrderSampler | None = None,
        batch_size: int = 1,
    ) -> DataLoader[WithBadReads[Any]]:
        num_workers = self._worker_count()
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            collate_fn=Collate(self._collate),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0
            and sampler is not None,  # training has but one iterator
            # Else the workers' seeds are drawn from the global generator, and disturb the model's
            # numbers.
            generator=torch.Generator(),
            **worker_arguments(num_workers),
        )

    def _usable(self, source: str, corpus: Corpus | None = None) -> Corpus:
        fit = (corpus or load_corpus(source)).mark_unfit(**self._fitness)
        check_bad_share(
            fit, source, self.max_bad_share, f"; `jepa-audio data describe {source}` tells more"
        )
        return fit.usable()

    @property
    def _fitness(self) -> dict[str, Any]:
        channels = self.num_channels if self.mono == "keep" else None
        return {
            "min_seconds": self.min_seconds,
            "max_seconds": self.max_seconds,
            "num_channels": channels,
        }

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


def _refuse_overlap(sources: list[str], corpora: list[Corpus]) -> None:
    """A file in two sources would be trained on twice, and perhaps be validated on too."""
    for number, one in enumerate(corpora[:-1]):
        own = one.absolute_names
        for other, source in zip(corpora[number + 1 :], sources[number + 1 :], strict=True):
            both = own.filter(pc.is_in(own, other.absolute_names))
            if len(both):
                raise CorpusError(
                    f"{sources[number]} and {source} both hold {both[0]}: give every file once"
                )


def _described(
    sources: list[str], train: list[Corpus], valid: list[Corpus], num_skipped: int
) -> str:
    hours = sum(float(corpus.seconds.sum()) for corpus in train) / 3600
    rates, counts = np.unique(
        np.concatenate([corpus.table["sample_rate"].to_numpy() for corpus in train]),
        return_counts=True,
    )
    return (
        f"{', '.join(sources)}: {sum(map(len, train))} files to train on, {hours:.2f} hours, "
        + ", ".join(f"{count} at {rate} Hz" for rate, count in zip(rates, counts, strict=True))
        + f"; {sum(map(len, valid))} files to validate on, {num_skipped} files skipped"
    )
