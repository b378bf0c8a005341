"""The vectors of a chunk of files, and their division over processes by Lightning's Trainer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from jepa_audio.data.audio.location import AudioReadError
from jepa_audio.data.loading.workers import worker_arguments
from jepa_audio.inference.embedding.files import (
    LONG_SECONDS,
    Chunk,
    ChunkDataset,
    LoadedFile,
    read_slice,
    spans,
)
from jepa_audio.inference.embedding.running import RunningPool
from jepa_audio.inference.embedding.tables import PartWriter, write_part
from jepa_audio.inference.encoder import Encoder
from jepa_audio.inference.features import LayerFeatures
from jepa_audio.inference.pooling import Pooling
from jepa_audio.parallel import num_cores

log = logging.getLogger(__name__)

_LINE_EVERY_SECONDS = 60.0

# Start and end in seconds, and vectors, of some rows of a file.
Rows = tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"], Float32[np.ndarray, "N E"]]


class FileEmbedder(LightningModule):
    """Embeds chunks of files, and writes the rows of each chunk to a part.

    Args:
        encoder: the encoder.
        layers: indices of its layers.
        pooling: how columns become vectors; "frames" keeps each column.
        segment: samples of a segment of a file; `None` for complete files.
        hop: samples from one segment to the next; `None` for `segment`.
        folder: folder of the parts.
    """

    def __init__(
        self,
        encoder: Encoder,
        layers: Sequence[int],
        pooling: Pooling,
        segment: int | None,
        hop: int | None,
        folder: Path,
    ) -> None:
        super().__init__()
        self.encoder, self.layers, self.pooling = encoder, list(layers), pooling
        self.segment, self.hop, self.folder = segment, hop, folder
        silence = torch.zeros(encoder.num_channels, encoder.min_samples)
        ((_, features),) = encoder.encode_clips([silence], self.layers)
        self.width = pooling.vectors(features).shape[-1]
        self._started = self._last_line = time.monotonic()
        self._num_done = 0

    @override
    def predict_step(self, batch: Chunk, batch_idx: int) -> int:
        number, files = batch
        with write_part(self.part_path(number), self.width) as part:
            for file in files:
                if file.reason:
                    part.bad[file.name] = file.reason
            rows = self._embed_whole([file for file in files if file.waveform is not None])
            for file in files:
                if file.long is not None:
                    self._embed_long(file, part)
                elif file.waveform is not None:
                    self._add(file, part, next(rows))
        self._log_line(len(files))
        return number

    def part_path(self, chunk: int) -> Path:
        """Path of the part of a chunk."""
        return self.folder / f"{chunk:07d}.parquet"

    def _embed_whole(self, files: Sequence[LoadedFile]) -> Iterator[Rows]:
        """The rows of each file that is in memory; all files are embedded before the first."""
        segments = [
            (number, start, file.waveform[:, start:stop])
            for number, file in enumerate(files)
            for start, stop in spans(file.num_samples, self.segment, self.hop)
            if file.waveform is not None
        ]
        batches = self._in_batches(clip for _, _, clip in segments)
        rows = (rows for batch in batches for rows in self._embed_clips(batch))
        collected: list[list[Rows]] = [[] for _ in files]
        for (number, first, _), (start, end, vectors) in zip(segments, rows, strict=True):
            offset = first / self.encoder.sample_rate
            collected[number].append((start + offset, end + offset, vectors))
        for rows_of_file in collected:
            start, end, vectors = map(np.concatenate, zip(*rows_of_file, strict=True))
            yield start, end, vectors

    def _in_batches(self, clips: Iterator[Tensor]) -> Iterator[list[Tensor]]:
        """Lists of clips with as many samples as one forward pass takes, or of one clip."""
        batch: list[Tensor] = []
        num_samples, limit = 0, self.encoder.max_windows * self.encoder.window_samples
        for clip in clips:
            if batch and num_samples + clip.shape[-1] > limit:
                yield batch
                batch, num_samples = [], 0
            batch.append(clip)
            num_samples += clip.shape[-1]
        if batch:
            yield batch

    def _embed_clips(self, clips: Sequence[Tensor]) -> list[Rows]:
        """The rows of each clip, in order."""
        found: dict[int, Rows] = {}
        on_device = [clip.to(self.device) for clip in clips]
        for rows, features in self.encoder.encode_clips(on_device, self.layers):
            vectors = self.pooling.vectors(features).float().cpu().numpy()
            times = features.times.double().cpu().numpy()
            counts = features.valid.sum(dim=1).tolist()
            for row, own, own_times, count in zip(rows, vectors, times, counts, strict=True):
                seconds = clips[row].shape[-1] / self.encoder.sample_rate
                start, end = np.zeros(1), np.array([seconds])
                if self.pooling.regions == 0:
                    own, (start, end) = own[:count], self._frame_spans(own_times[:count])  # noqa: PLW2901
                found[row] = start, end, own
        return [found[row] for row in range(len(clips))]

    def _frame_spans(
        self, times: Float[np.ndarray, " T"]
    ) -> tuple[Float[np.ndarray, " T"], Float[np.ndarray, " T"]]:
        half = self.encoder.frame_seconds / 2
        return np.maximum(times - half, 0), times + half

    def _embed_long(self, file: LoadedFile, part: PartWriter) -> None:
        """Embed a long file in parts; the rows before an error are already written."""
        rate = self.encoder.sample_rate
        limit = LONG_SECONDS * rate
        try:
            for start, stop in spans(file.num_samples, self.segment, self.hop):
                if stop - start <= limit:
                    clip = self._slice(file, start, stop)
                    ((first, end, vectors),) = self._embed_clips([clip])
                    offset = start / rate
                    self._add(file, part, (first + offset, end + offset, vectors))
                else:
                    for rows in self._stream(file, start, stop):
                        self._add(file, part, rows)
        except AudioReadError as error:
            part.bad[file.name] = f"{error.reason}; the rows before this place are in the table"

    def _slice(self, file: LoadedFile, start: int, stop: int) -> Float32[Tensor, "C S"]:
        assert file.long is not None
        encoder = self.encoder
        waveform = read_slice(file.long, start, stop, encoder.sample_rate, encoder.num_channels)
        return waveform.to(self.device)

    def _stream(self, file: LoadedFile, start: int, stop: int) -> Iterator[Rows]:
        """The rows of a segment that does not fit into memory."""
        offset = start / self.encoder.sample_rate

        def read(first: int, end: int) -> Tensor:
            return self._slice(file, start + first, start + end)[None]

        pool: RunningPool | None = None
        total = self.encoder.num_columns(stop - start)
        for layers, times in self.encoder.stream(read, stop - start, self.layers):
            ones = torch.ones(1, len(times), dtype=torch.bool, device=self.device)
            features = LayerFeatures(tuple(layers), torch.zeros_like(ones, dtype=torch.float), ones)
            columns = [layer[0] for layer in features.over_time(self.pooling.frequency)]
            if self.pooling.regions == 0:
                first, end = self._frame_spans(times)
                yield first + offset, end + offset, torch.cat(columns, -1).float().cpu().numpy()
            else:
                pool = pool or RunningPool(self.pooling, total)
                pool.add(columns)
        if pool is not None:
            seconds = stop / self.encoder.sample_rate
            yield np.array([offset]), np.array([seconds]), pool.vector()[None].numpy()

    def _add(self, file: LoadedFile, part: PartWriter, rows: Rows) -> None:
        start, end, vectors = rows
        if not np.isfinite(vectors).all():
            part.bad[file.name] = "the encoder gives vectors that are not finite"
            return
        is_padded = file.num_samples < self.encoder.min_samples
        if file.name not in part.names:
            part.names.add(file.name)
            part.notes.update(file.notes)
            if is_padded:
                part.notes["shorter than one token, padded with zeros"] += 1
        part.add(file.name, start, end, is_padded, vectors)

    def _log_line(self, num_files: int) -> None:
        """Log the progress every minute if the output is not a terminal; on the first process."""
        self._num_done += num_files
        now = time.monotonic()
        data = getattr(self.trainer, "datamodule", None)
        if self.global_rank != 0 or data is None or data.has_bar:
            return
        if now - self._last_line < _LINE_EVERY_SECONDS:
            return
        self._last_line = now
        speed = self._num_done / (now - self._started)
        left = timedelta(seconds=round((data.num_own_files - self._num_done) / speed))
        log.info(
            "%d of %d files of this process, %.3g files/s, %s left",
            self._num_done,
            data.num_own_files,
            speed,
            left,
        )


class FileModule(LightningDataModule):
    """The chunks of each process: every `world_size`-th one that is not done.

    Args:
        dataset: all chunks.
        is_done: whether a chunk is done.
        num_workers: worker processes; `None` for the share of the cores of a process.
        has_bar: whether a progress bar is shown.
    """

    def __init__(
        self,
        dataset: ChunkDataset,
        is_done: Callable[[int], bool],
        num_workers: int | None,
        has_bar: bool,
    ) -> None:
        super().__init__()
        self.dataset, self.is_done, self.num_workers = dataset, is_done, num_workers
        self.has_bar, self.num_own_files = has_bar, 0
        # A process has nothing to do if there are few files, or if its part was done before.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    @override
    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Keep the chunk on the CPU: parts of it are moved when they are encoded."""
        return batch

    @override
    def predict_dataloader(self) -> DataLoader[Chunk]:
        assert self.trainer is not None
        # The division does not depend on what is done, because other processes already work.
        own = range(self.trainer.global_rank, len(self.dataset), self.trainer.world_size)
        chunks = [chunk for chunk in own if not self.is_done(chunk)]
        self.num_own_files = sum(len(self.dataset.chunks[chunk]) for chunk in chunks)
        num_workers = self.num_workers
        if num_workers is None:
            share = max(1, num_cores() // self.trainer.num_devices)
            # A worker takes seconds to start: this process reads a few chunks itself.
            num_workers = min(8, share, len(chunks) // 4)
        return DataLoader(
            self.dataset,
            sampler=chunks,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=num_workers,
            **worker_arguments(num_workers),
        )


def _unchanged(chunk: Any) -> Any:
    """The collation of a loader whose samples are complete chunks."""
    return chunk
