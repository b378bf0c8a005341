"""The files of any corpus source, and their audio in chunks of consecutive files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from glob import has_magic
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

import soundfile as sf
import torch
from jaxtyping import Float32
from torch import Tensor
from torch.utils.data import Dataset

from jepa_audio.data.audio.location import AudioLocation, AudioReadError, TarMember, audio_location
from jepa_audio.data.audio.read import inspect, read
from jepa_audio.data.audio.resample import resampled_length
from jepa_audio.data.corpus.indexed_file import IndexedFile
from jepa_audio.data.corpus.sources import DiscoveredFile, discover_files
from jepa_audio.data.corpus.table import Corpus, CorpusError
from jepa_audio.data.corpus.tars import list_tar_members
from jepa_audio.errors import UserError
from jepa_audio.files import similar_name
from jepa_audio.inference.audio import convert

LONG_SECONDS = 600
"""Longer files are read and encoded in parts."""
# Files of this size are decoded once to find their length.
_LARGE_BYTES = 1 << 24
_CHUNK_FILES = 32
_CHUNK_BYTES = 1 << 25


class EmbedFile(NamedTuple):
    """A file to embed.

    Attributes:
        name: path relative to the working directory if it is below, "tar:member" in a tar.
        audio: where it is.
        num_bytes: its size, -1 if unknown.
        mtime_ns: modification time.
        reason: why it cannot be used, or "".
    """

    name: str
    audio: AudioLocation
    num_bytes: int
    mtime_ns: int
    reason: str


def list_files(sources: Sequence[str]) -> list[EmbedFile]:
    """The files of all sources in the order of their names, each once.

    Args:
        sources: see `discover_files`; also corpus tables (`.parquet`).

    Raises:
        UserError: if a source does not exist, or contains no audio.
    """
    root = Path.cwd()
    found: dict[AudioLocation, EmbedFile] = {}
    for file in _discover_all(sources, root):
        path = root / file.source
        audio = audio_location(path, file.member, file.offset, file.num_bytes)
        name = f"{file.source}:{file.member}" if file.member else file.source
        found.setdefault(audio, EmbedFile(name, audio, file.num_bytes, file.mtime_ns, file.reason))
    return sorted(found.values(), key=lambda file: file.name)


def _discover_all(sources: Sequence[str], root: Path) -> Iterator[DiscoveredFile]:
    for source in sources:
        try:
            yield from _discover(source, root)
        except CorpusError as error:
            is_pattern = "{" in source or has_magic(source)
            # `Path.exists` raises an error for names that are too long.
            is_there = os.path.exists(source)  # noqa: PTH110
            if is_pattern or is_there or "does not exist" not in str(error):
                raise
            raise CorpusError(f"{error}{similar_name(Path(source))}") from error


def _discover(source: str, root: Path) -> Iterator[DiscoveredFile]:
    if source.endswith(".parquet"):
        corpus = Corpus.load(Path(source))
        names = [*DiscoveredFile._fields]
        for batch in corpus.table.select(names).to_batches(1024):
            for row in batch.to_pylist():
                path = os.path.relpath(corpus.root / row["source"], root)
                path = str(root / path) if path.startswith("..") else path
                yield DiscoveredFile(**row | {"source": path})
        return
    for file in discover_files([source], root):
        yield from list_tar_members(file, root) if file.is_tar else [file]


def files_hash(files: Sequence[EmbedFile]) -> str:
    """Hash of the places, sizes and times of files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.audio!r} {file.num_bytes} {file.mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def chunk_files(files: Sequence[EmbedFile]) -> list[range]:
    """Divide files into chunks of consecutive files, which are limited in number and size."""
    sizes = list(accumulate((max(file.num_bytes, 0) for file in files), initial=0))
    chunks, start = [], 0
    for end in range(1, len(files) + 1):
        is_full = end - start == _CHUNK_FILES or sizes[end] - sizes[start] >= _CHUNK_BYTES
        if is_full or end == len(files):
            chunks.append(range(start, end))
            start = end
    return chunks


@dataclass(frozen=True)
class LoadedFile:
    """The audio of a file at the rate of an encoder.

    Attributes:
        name: see `EmbedFile`.
        waveform: all samples; `None` for a long file, or one that cannot be read.
        long: a long file, whose parts `read_slice` reads.
        num_samples: length at the rate of the encoder.
        reason: why the file cannot be used, or "".
        notes: what was done to the samples.
    """

    name: str
    waveform: Float32[Tensor, "C S"] | None = None
    long: IndexedFile | None = None
    num_samples: int = 0
    reason: str = ""
    notes: list[str] = field(default_factory=list)


class Chunk(NamedTuple):
    """Consecutive files, and the number of the chunk."""

    number: int
    files: list[LoadedFile]


class ChunkDataset(Dataset[Chunk]):
    """Chunks of files, loaded in worker processes.

    Args:
        files: all files.
        sample_rate: of the encoder, in Hz.
        num_channels: of the encoder.
    """

    def __init__(self, files: Sequence[EmbedFile], sample_rate: int, num_channels: int) -> None:
        self.files, self.chunks = files, chunk_files(files)
        self.sample_rate, self.num_channels = sample_rate, num_channels

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> Chunk:
        """The files of a chunk."""
        return Chunk(index, [self._load(self.files[number]) for number in self.chunks[index]])

    def _load(self, file: EmbedFile) -> LoadedFile:
        if file.reason:
            return LoadedFile(file.name, reason=file.reason)
        try:
            if _may_be_long(file):
                info = inspect(file.audio)
                numbers = info.num_frames, info.sample_rate, info.num_channels
                long = IndexedFile(file.audio, file.num_bytes, *numbers, info.decoder)
                if long.num_frames > LONG_SECONDS * long.sample_rate:
                    notes: list[str] = []
                    example = torch.zeros(long.num_channels, 1)
                    rates = long.sample_rate, self.sample_rate
                    convert(example, *rates, self.num_channels, file.name, notes.append)
                    length = resampled_length(long.num_frames, *rates)
                    return LoadedFile(file.name, None, long, length, notes=notes)
            samples, rate = read(file.audio)
            notes = []
            waveform = convert(
                torch.from_numpy(samples),
                rate,
                self.sample_rate,
                self.num_channels,
                file.name,
                notes.append,
            )
            return LoadedFile(file.name, waveform, None, waveform.shape[-1], notes=notes)
        except AudioReadError as error:
            return LoadedFile(file.name, reason=error.reason)
        except UserError as error:
            return LoadedFile(file.name, reason=str(error))


def read_slice(
    file: IndexedFile, start: int, stop: int, sample_rate: int, num_channels: int
) -> Float32[Tensor, "C S"]:
    """Samples of a long file with the rate and channels of an encoder."""
    channel: Literal["mean"] | None = "mean" if num_channels == 1 else None
    waveform = file.read_slice(start, stop - start, sample_rate, channel)
    return waveform.expand(num_channels, -1)


def _may_be_long(file: EmbedFile) -> bool:
    if file.num_bytes >= _LARGE_BYTES or isinstance(file.audio, TarMember):
        return file.num_bytes >= _LARGE_BYTES
    try:
        info = sf.info(file.audio)
    except (sf.LibsndfileError, OSError):
        return False  # `read` has other decoders, and names the file in its error
    return info.frames > LONG_SECONDS * info.samplerate


def spans(num_samples: int, segment: int | None, hop: int | None) -> list[tuple[int, int]]:
    """First sample and end of every segment; the last one ends with the clip and may be shorter."""
    if segment is None or segment >= num_samples:
        return [(0, num_samples)]
    step = hop or segment
    starts = range(0, num_samples - segment + step, step)
    return [(s, min(s + segment, num_samples)) for s in starts if s < num_samples]
