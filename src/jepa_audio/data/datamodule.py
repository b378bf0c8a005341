"""Corpora as training, validation and test batches."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader
from typing_extensions import override

from jepa_audio.data.corpus.index import check_bad_share, index_corpus
from jepa_audio.data.corpus.table import Corpus, CorpusError, load_corpus
from jepa_audio.data.loading.clips import (
    ChannelMode,
    ClipDataset,
    ClipSettings,
    CropDataset,
    WithBadReads,
    check_batch_size,
)
from jepa_audio.data.loading.file_table import FileTable
from jepa_audio.data.loading.limits import check_evaluation_limit, limit_order
from jepa_audio.data.loading.loader import BadReadCounter, EvaluationLoader, ResumableLoader
from jepa_audio.data.loading.order import (
    EvaluationOrder,
    GlobalOrderSampler,
    SampleIndex,
    count_files_per_block,
    evaluation_batches,
)
from jepa_audio.data.loading.workers import worker_arguments
from jepa_audio.data.scenes.scenes import SceneBatch, SceneDataset, SceneSettings, prepare_scenes
from jepa_audio.errors import UserError, check_bounds
from jepa_audio.parallel import num_cores, reusing_arrow_memory
from jepa_audio.steps.grid import AudioBatch
from jepa_audio.steps.masking.source import HasMasker, MaskSource, MaskStream

log = logging.getLogger(__name__)


class AudioDataModule(LightningDataModule):
    """Crops of all audio files of a corpus, of any sample rate, length and number of channels.

    Args:
        root: folder of audio files or tars, searched recursively; or another source, see
            `jepa_audio.data.corpus.sources.discover_files`; or a table (`.parquet`) that
            `jepa-audio data index` wrote, used without a search for new files. A list of sources is
            one corpus. A mapping from sources to weights is a mixture: the weights, not the numbers
            of files, determine the share of clips from each source.
        sample_rate: sample rate of the crops in Hz; files of other rates are resampled.
        crop_seconds: length of a crop; a shorter file is padded with zeros at its end.
        num_channels: channels of the crops; more than 1 requires `mono: keep`.
        mono: "mean" averages the channels of a file, "first" takes the first one, "random" takes a
            random one, "keep" keeps all and skips files without exactly `num_channels` channels.
        crops_per_clip: number of crops of each clip; all are in the same batch.
        clip_seconds: length of the clip that the crops of a file come from (WavJEPA: 10 s); `None`
            for the whole file. WavJEPA pads shorter files to this length; here they are not padded,
            because some crops would then be silent.
        loudness_dbfs: RMS level of all clips after scaling, in dBFS (WavJEPA: -14); without
            `clip_seconds`, of the crops of a file together. `None` keeps the level.
        mask_padding: True hides the padding of crops from the model, False presents it as silence.
        scenes: rooms and noise in which the clips are placed; `None` uses the clips alone.
        batch_size: clips in the micro-batch of one process; the micro-batch has
            `batch_size * crops_per_clip` rows.
        num_workers: worker processes of each training process; `None` for its share of the cores,
            at most 8.
        valid_share: share of the files held out for validation, for tables without a split, see
            `Corpus.split`; 0 holds out none.
        valid_root: source of the validation files; `valid_share` then has no effect. Validation and
            test files in the table of `root` are still excluded from training.
        test_root: source of the test files; `None` uses the test files of the table, or the
            validation files if it has none.
        num_valid_clips: maximum number of validation files, divided equally among the corpora and
            rounded up for each.
        min_seconds: shorter files are skipped.
        max_seconds: longer files are skipped; `None` for no limit.
        max_bad_share: the run stops with a list of files if a larger share of the files is skipped,
            or a larger share of the reads fails.
        seed: seed of the order and the crops.

    Raises:
        UserError: if a setting is out of range or contradicts another one.
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
        scenes: SceneSettings | None = None,
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
        # Loggers get the settings in `setup`, because Lightning would merge them with those of the
        # model, and both have a `seed`.
        self.save_hyperparameters(logger=False)
        self._make_settings_plain()
        self.sources = [*map(str, root)] if isinstance(root, list | dict) else [str(root)]
        self.weights = list(root.values()) if isinstance(root, dict) else None
        self.valid_root = None if valid_root is None else str(valid_root)
        self.test_root = None if test_root is None else str(test_root)
        self.clips = ClipSettings(
            sample_rate=sample_rate,
            crop_seconds=crop_seconds,
            # Scenes are rendered from mono clips to `num_channels` channels.
            num_channels=num_channels if scenes is None else 1,
            mono=mono,
            crops_per_clip=crops_per_clip,
            clip_seconds=clip_seconds,
            loudness_dbfs=loudness_dbfs,
            mask_padding=mask_padding,
            seed=seed,
        )
        self.num_channels = num_channels
        self.scenes = scenes
        self.batch_size, self.num_workers = batch_size, num_workers
        self.valid_share, self.num_valid_clips = valid_share, num_valid_clips
        self.min_seconds, self.max_seconds = min_seconds, max_seconds
        self.max_bad_share = max_bad_share
        self._validate_settings()
        # All nodes share the file system of audio and table, so one process of all nodes indexes.
        self.prepare_data_per_node = False
        self._files: dict[str, FileTable] = {}
        # One line about the training and validation files.
        self.summary = ""
        self._bad_reads = BadReadCounter(max_bad_share)
        self._train_loader: ResumableLoader | None = None

    def _make_settings_plain(self) -> None:
        """Checkpoints must contain only plain Python data."""
        for name in ("root", "valid_root", "test_root"):
            if isinstance(self.hparams[name], Path):
                self.hparams[name] = str(self.hparams[name])
        if isinstance(self.hparams["scenes"], SceneSettings):
            self.hparams["scenes"] = asdict(self.hparams["scenes"])

    def _validate_settings(self) -> None:
        """Check the settings that `ClipSettings` and `SceneSettings` do not check themselves."""
        if not (self.sources and all(self.sources)):
            raise UserError("`root` must be a source of audio, got an empty one")
        if self.weights is not None:
            count_files_per_block(self.weights, len(self.sources))
        check_bounds(self, 1, math.inf, "num_channels", "batch_size", "num_valid_clips")
        check_bounds(self, 0, 4096, "num_workers")
        check_bounds(self, 0, math.inf, "min_seconds")
        check_batch_size(self.clips, self.batch_size)
        check_bounds(self, self.min_seconds, math.inf, "max_seconds")
        check_bounds(self, 0, 1, "valid_share", "max_bad_share")
        if self.valid_share == 1:
            raise UserError("`valid_share` (1) must be < 1: no training files would remain")
        if self.scenes is None:
            return
        if self.clips.mask_padding:
            raise UserError("`mask_padding` must be false with `scenes`: scenes have no padding")
        if self.clips.mono == "keep":
            modes = "'mean', 'first' or 'random', not 'keep'"
            raise UserError(f"`scenes` need mono clips: set `mono` to {modes}")
        if self.clips.clip_seconds is None:
            raise UserError("`scenes` need `clip_seconds`: the length of a scene")

    @override
    def prepare_data(self) -> None:
        """Index all sources that are not tables; later runs decode only new and changed files."""
        for source in dict.fromkeys([*self.sources, self.valid_root, self.test_root]):
            if source and not source.endswith(".parquet"):
                index_corpus(
                    source,
                    num_workers=num_cores(),
                    max_bad_share=self.max_bad_share,
                    **self._requirements,
                )
        if self.scenes is not None:
            prepare_scenes(self.scenes, self.num_channels, self.clips.sample_rate, num_cores())

    @override
    def setup(self, stage: str) -> None:
        """Read the tables and split the files; all processes compute the same split."""
        # The tables, about 1 GB for millions of files, are released at the end of the block.
        with reusing_arrow_memory():
            num_usable = self._read_tables()
        if self._rank == 0:
            for logger in self.trainer.loggers if self.trainer else ():
                logger.log_hyperparams({"data": dict(self.hparams)})
            log.info(self.summary)
            if num_usable == 1 and self.valid_root is None and self.valid_share > 0:
                log.warning("%s: its 1 file is used for training and validation", self.sources[0])

    def _read_tables(self) -> int:
        """Make the list of files of each split; return the number of usable files."""
        indexed = [self._load(source) for source in self.sources]
        usable = [corpus.usable() for corpus in indexed]
        _validate_disjoint(self.sources, usable)
        parts = self._split(usable)
        self._files = {name: FileTable(files) for name, files in parts.items() if _num_files(files)}
        skipped = _num_files(indexed) - _num_files(usable)
        self.summary = _summarize(self.sources, parts, skipped, self.clips.crop_seconds)
        return _num_files(usable)

    def _load(self, source: str) -> Corpus:
        """The table of a source; files that do not meet the requirements are marked as bad."""
        corpus = load_corpus(source).mark_unfit(**self._requirements)
        hint = f"; see `jepa-audio data describe {source}`"
        check_bad_share(corpus, source, self.max_bad_share, hint)
        return corpus

    def _split(self, corpora: list[Corpus]) -> dict[str, list[Corpus]]:
        """Training, validation and test files of each corpus."""
        share = 0.0 if self.valid_root else self.valid_share
        splits = [corpus.for_reading().split(share) for corpus in corpora]
        train, valid, test = (list(files) for files in zip(*splits, strict=True))
        for source, files in zip(self.sources, train, strict=True):
            if not len(files):
                reason = "all files in its table have another split"
                raise CorpusError(f"{source} has no training file: {reason}")
        if self.valid_root is not None:
            valid = [self._load(self.valid_root).usable().shuffled()]
        if self.test_root is not None:
            test = [self._load(self.test_root).usable()]
        num_each = math.ceil(self.num_valid_clips / len(valid))
        valid = [corpus.take(np.arange(min(len(corpus), num_each))) for corpus in valid]
        return {"train": train, "valid": valid, "test": test if _num_files(test) else valid}

    @property
    def _requirements(self) -> dict[str, Any]:
        """Requirements on usable files, as arguments of `Corpus.mark_unfit` and `index_corpus`."""
        return {
            "min_seconds": self.min_seconds,
            "max_seconds": self.max_seconds,
            "num_channels": self.clips.num_channels if self.clips.mono == "keep" else None,
        }

    def find_row_files(self, rows: Sequence[int]) -> list[str]:
        """The files of the given rows of training batches, before unreadable ones are replaced."""
        if self._train_loader is None:
            return []
        files, order = self._files["train"], self._train_loader.order
        positions = dict.fromkeys(row // self.clips.crops_per_clip for row in rows)
        return [str(files[order.file_at(position)].audio) for position in positions]

    @override
    def train_dataloader(self) -> ResumableLoader:
        """An endless stream of crops; an epoch has `max_steps` optimizer steps, or is one pass."""
        dataset = self.dataset("train", random_crops=True)
        accumulated = self.trainer.accumulate_grad_batches if self.trainer else 1
        sampler = GlobalOrderSampler(
            dataset.files.sizes,
            self.batch_size,
            weights=self.weights,
            rank=self._rank,
            world_size=self._world_size,
            accumulated=accumulated,
            seed=self.clips.seed,
        )
        num_batches = limit_order(sampler, self.trainer)
        self._train_loader = ResumableLoader(
            self._loader(dataset, sampler), self._bad_reads, num_batches, dataset.files
        )
        return self._train_loader

    @override
    def val_dataloader(self) -> list[EvaluationLoader]:
        return self._evaluation_loaders("valid")

    @override
    def test_dataloader(self) -> list[EvaluationLoader]:
        return self._evaluation_loaders("test")

    @override
    def teardown(self, stage: str) -> None:
        """Stop the training workers and log the number of failed reads."""
        if summary := self._bad_reads.summary():
            log.warning("%s", summary)
        if stage == "fit" and self._train_loader is not None:
            self._train_loader.close()

    @override
    def on_after_batch_transfer(
        self, batch: AudioBatch | SceneBatch, dataloader_idx: int
    ) -> AudioBatch:
        """Render scenes on the device of the model."""
        return batch.render() if isinstance(batch, SceneBatch) else batch

    def _evaluation_loaders(self, part: str) -> list[EvaluationLoader]:
        """A loader of the same crops in each iteration; an empty list if there are no files."""
        if part not in self._files:
            return []
        dataset = self.dataset(part, random_crops=False)
        even = self.trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy)
        sizes = len(dataset), self.batch_size
        batches = evaluation_batches(*sizes, self._rank, self._world_size, even)
        check_evaluation_limit(self.trainer, part, len(batches))
        order = EvaluationOrder(batches, self._model.mask_step if self._model else None)
        loader = self._loader(dataset, order, persistent_workers=True)
        num_batches = math.ceil(len(dataset) / self.batch_size)
        num_own = len(range(self._rank, num_batches, self._world_size))
        return [EvaluationLoader(loader, self._bad_reads, num_own)]

    def dataset(self, part: str, random_crops: bool) -> ClipDataset[Any, Any]:
        """The clips of "train", "valid" or "test", after `setup`; with the masks of the model."""
        clips, model, masks = self.clips, self._model, None
        stream = MaskStream.TRAINING if random_crops else MaskStream.EVALUATION
        if model is not None:
            masks = MaskSource.of(model, clips.crop_samples, stream, clips.mask_padding)
        common = self._files[part], clips, random_crops, masks
        if self.scenes is None:
            return CropDataset(*common)
        return SceneDataset(*common, self.scenes, self.num_channels)

    @property
    def _model(self) -> HasMasker | None:
        model = self.trainer.lightning_module if self.trainer else None
        return model if isinstance(model, HasMasker) else None

    def _loader(
        self,
        dataset: ClipDataset[Any, Any],
        batches: Iterable[list[SampleIndex]],
        persistent_workers: bool = False,
    ) -> DataLoader[WithBadReads[Any]]:
        num_workers = self.workers_per_process()
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=num_workers,
            persistent_workers=persistent_workers and num_workers > 0,
            collate_fn=dataset.collate,
            pin_memory=torch.cuda.is_available(),
            # Otherwise the loader would use the global generator, and the random numbers of the
            # model would change.
            generator=torch.Generator(),
            **worker_arguments(num_workers),
        )

    def workers_per_process(self) -> int:
        """The number of worker processes of each training process."""
        num_processes = self.trainer.num_devices if self.trainer else 1
        share = min(8, max(1, num_cores() // num_processes))
        return share if self.num_workers is None else self.num_workers

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1


def _num_files(corpora: list[Corpus]) -> int:
    return sum(map(len, corpora))


def _validate_disjoint(sources: list[str], corpora: list[Corpus]) -> None:
    """Refuse a file in two sources: training would use it twice, validation might use it too."""
    if len(corpora) == 1:
        return
    names = [corpus.absolute_names for corpus in corpora]
    for (a, files), (b, others) in combinations(zip(sources, names, strict=True), 2):
        shared = files.filter(pc.is_in(files, others))
        if len(shared):
            raise CorpusError(f"{a} and {b} both contain {shared[0]}: remove it from one of them")


def _summarize(sources: list[str], parts: dict[str, Any], num_skipped: int, crop: float) -> str:
    train = parts["train"]
    seconds = np.concatenate([corpus.seconds for corpus in train])
    rates = np.concatenate([corpus.table["sample_rate"].to_numpy() for corpus in train])
    counts = zip(*np.unique(rates, return_counts=True), strict=True)
    return (
        f"{', '.join(sources)}: {_num_files(train)} training files, "
        f"{seconds.sum() / 3600:.2f} hours, {(seconds < crop).sum()} padded to {crop:g} s, "
        f"{', '.join(f'{count} at {rate} Hz' for rate, count in counts)}; "
        f"{_num_files(parts['valid'])} validation files, {num_skipped} files skipped"
    )
