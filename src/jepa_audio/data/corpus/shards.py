"""Pack a corpus into uncompressed tars in WebDataset's layout: `KEY.flac` with `KEY.json`."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import soundfile as sf

from jepa_audio.data.audio.location import AudioReadError, read_bytes
from jepa_audio.data.audio.resample import resampled_length
from jepa_audio.data.corpus.index import index_file
from jepa_audio.data.corpus.indexed_file import IndexedFile
from jepa_audio.data.corpus.sources import DiscoveredFile
from jepa_audio.data.corpus.table import (
    SCHEMA,
    Corpus,
    CorpusError,
    default_table_path,
)
from jepa_audio.data.corpus.tars import list_tar_members
from jepa_audio.errors import MAX_RATE, UserError, check_bounds
from jepa_audio.files import atomic_path, write_text
from jepa_audio.parallel import map_threads, progress_bar

log = logging.getLogger(__name__)

CHECKSUMS = "SHA256SUMS"

_BLOCK_SECONDS = 60
# Estimated size of a flac file, as a share of the size of its samples.
_FLAC_SHARE = 0.6
_MAX_FLAC_CHANNELS = 8
# In [0, 1]. Files at level 0 decode 1/8 faster than at the default level and are 4 % larger.
_COMPRESSION = 0.0
_DIGEST = b"jepa_audio.plan"
_SUM = b"jepa_audio.sha256"


@dataclass(frozen=True)
class Packing:
    """Settings of `write_shards`.

    Attributes:
        sample_rate: in Hz; `None` keeps the rate of each file.
        mono: average the channels.
        bits: bits per sample of encoded files, 16 or 24. A flac file that keeps its rate and
            channels is not encoded again, and keeps its bits per sample.
        shard_mb: approximate size of a shard in 10^6 bytes.
    """

    sample_rate: int | None = None
    mono: bool = False
    bits: int = 16
    shard_mb: int = 1000

    def __post_init__(self) -> None:
        if self.bits not in (16, 24):
            raise UserError(f"`bits` ({self.bits}) must be 16 or 24")
        check_bounds(self, 1, inf, "shard_mb")
        check_bounds(self, 1000, MAX_RATE, "sample_rate")


def write_shards(corpus: Corpus, directory: Path, packing: Packing, num_workers: int = 2) -> Corpus:
    """Write the usable files of a corpus as shards, and the table of the shards.

    The files are ordered by a hash of their names: every shard is a random sample of the corpus.
    The same corpus and settings give the same bytes for any number of workers. Every shard is
    decoded once after it is written. After an interrupted call, the next call continues with the
    unfinished shard.

    The folder then contains `shard-000000.tar` and so on, `SHA256SUMS`, and the table at
    `default_table_path`. Files are encoded in `num_workers` threads.

    Raises:
        CorpusError: if no file is usable, or if the folder contains other shards or is not
            writable.
    """
    usable = corpus.usable().shuffled()
    if not len(usable):
        raise CorpusError(f"none of the {len(corpus)} files can be used")
    plan = _plan_shards(usable, packing)
    _check_directory(directory, len(plan), usable)
    tables: list[pa.Table] = []
    try:
        with progress_bar() as bar:
            task = bar.add_task(f"Packing {directory}", total=len(usable))
            for number, rows in enumerate(plan):
                shard = _Shard(directory, number, usable, rows, packing)
                table = shard.load_finished()
                if table is None:
                    table = shard.write(num_workers, partial(bar.advance, task))
                bar.update(task, completed=rows[-1] + 1)
                tables.append(table)
        sums = [table.schema.metadata[_SUM].decode() for table in tables]
        lines = [f"{digest}  {_shard_name(number)}\n" for number, digest in enumerate(sums)]
        write_text(directory / CHECKSUMS, "".join(lines))
    except OSError as error:
        raise CorpusError(
            f"{directory} cannot be written: {error.strerror or error}; run the same command again "
            "to continue"
        ) from error
    table = pa.concat_tables([table.replace_schema_metadata() for table in tables])
    packed = Corpus(directory.absolute(), table)
    packed.save(default_table_path(directory))
    return packed


def read_checksums(directory: Path) -> dict[str, str]:
    """SHA-256 of every shard by the name of the shard; empty if `SHA256SUMS` does not exist."""
    path = directory / CHECKSUMS
    if not path.exists():
        return {}
    lines = (line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip())
    return {name.lstrip("*"): digest for digest, name in lines}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _plan_shards(corpus: Corpus, packing: Packing) -> list[np.ndarray]:
    """The rows of the corpus in every shard, from the estimated sizes of the encoded files."""
    rates = packing.sample_rate or corpus.table["sample_rate"].to_numpy()
    channels = 1 if packing.mono else corpus.table["num_channels"].to_numpy()
    sizes = corpus.seconds * rates * channels * packing.bits / 8 * _FLAC_SHARE
    sizes += 3 * tarfile.BLOCKSIZE
    shard = (np.cumsum(sizes) - sizes) // (packing.shard_mb * 1e6)
    return np.split(np.arange(len(corpus)), np.flatnonzero(np.diff(shard)) + 1)


def _check_directory(directory: Path, num_shards: int, corpus: Corpus) -> None:
    if directory.is_file():
        raise CorpusError(f"{directory} is a file; give a folder for the shards")
    sources = pc.unique(corpus.table["source"]).to_pylist()
    if any((corpus.root / source).parent.resolve() == directory.resolve() for source in sources):
        raise CorpusError(f"{directory} contains files to pack; give another folder")
    expected = {_shard_name(number) for number in range(num_shards)}
    if foreign := sorted({path.name for path in directory.glob("*.tar")} - expected):
        raise CorpusError(f"{directory} contains other shards ({foreign[0]}); give an empty folder")


class _Shard:
    """One shard: the tar is written atomically and decoded, then its rows are written to a file."""

    def __init__(
        self, directory: Path, number: int, corpus: Corpus, rows: np.ndarray, packing: Packing
    ) -> None:
        self._path = directory / _shard_name(number)
        self._record = directory / ".jepa_audio" / "packed" / f"{number:06d}.parquet"
        self._first_row = int(rows[0])
        self._corpus, self._packing = corpus.take(rows), packing
        self._names = self._corpus.names.to_pylist()
        columns = ["source", "member", "num_bytes", "mtime_ns", "group", "split", "decoder"]
        content = [asdict(packing), self._first_row, self._corpus.table.select(columns).to_pylist()]
        self._digest = hashlib.sha256(json.dumps(content).encode()).hexdigest().encode()

    def load_finished(self) -> pa.Table | None:
        """The rows of the shard, if an earlier call finished the shard and nothing has changed."""
        if not (self._record.exists() and self._path.exists()):
            return None
        table = pq.read_table(self._record)
        stat = self._path.stat()
        recorded = table.select(["source_bytes", "mtime_ns"]).to_pydict().values()
        is_same = {*zip(*recorded, strict=True)} == {(stat.st_size, stat.st_mtime_ns)}
        return table if is_same and table.schema.metadata.get(_DIGEST) == self._digest else None

    def write(self, num_workers: int, advance: Callable[[], object]) -> pa.Table:
        """Encode the files and return the rows of the shard; call `advance` after each file."""
        with atomic_path(self._path) as unfinished, unfinished.open("wb") as file:
            skipped = self._write_tar(file, num_workers, advance)
        stat, folder = self._path.stat(), self._path.parent
        tar = DiscoveredFile(self._path.name, "", 0, -1, stat.st_size, stat.st_mtime_ns)
        files = list_tar_members(tar, folder) if len(skipped) < len(self._corpus) else []
        files += [tar._replace(member=name, reason=reason) for name, reason in skipped.items()]
        rows = list(map_threads(lambda file: index_file(folder, file), files, num_workers))
        metadata = {_DIGEST: self._digest, _SUM: sha256_of(self._path).encode()}
        table = pa.Table.from_pylist(rows, schema=SCHEMA).replace_schema_metadata(metadata)
        with atomic_path(self._record) as unfinished:
            pq.write_table(table, unfinished)
        return table

    def _write_tar(
        self, file: IO[bytes], num_workers: int, advance: Callable[[], object]
    ) -> dict[str, str]:
        """Write all readable files; return the reason for each unreadable file by member name."""
        skipped: dict[str, str] = {}
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            rows = range(len(self._corpus))
            encoded = map_threads(self._encode_row, rows, num_workers, 4 * num_workers)
            for row, packed in enumerate(encoded, start=self._first_row):
                advance()
                if isinstance(packed, AudioReadError):
                    log.warning("not packed: %s", packed)
                    skipped[f"{row:09d}.flac"] = f"not packed: {packed}"
                    continue
                content, metadata = packed
                _add(archive, f"{row:09d}.flac", content)
                _add(archive, f"{row:09d}.json", json.dumps(metadata).encode())
        return skipped

    def _encode_row(self, row: int) -> tuple[bytes, dict[str, Any]] | AudioReadError:
        """A file as flac with its metadata, or the error if the file cannot be read."""
        try:
            content, rate, gain = _encode_flac(self._corpus.file(row), self._packing)
        except AudioReadError as error:
            return error
        labels = {name: self._corpus.table[name][row].as_py() for name in ("group", "split")}
        return content, {"source": self._names[row], **labels, "sample_rate": rate, "gain": gain}


def _encode_flac(file: IndexedFile, packing: Packing) -> tuple[bytes, int, float]:
    """The file as flac, its sample rate, and the gain that was applied to avoid clipping."""
    rate = packing.sample_rate or file.sample_rate
    num_channels = 1 if packing.mono else file.num_channels
    if num_channels > _MAX_FLAC_CHANNELS:
        reason = f"{num_channels} channels, flac allows {_MAX_FLAC_CHANNELS}: pack with `mono`"
        raise AudioReadError(file.audio, reason)
    is_unchanged = (rate, num_channels) == (file.sample_rate, file.num_channels)
    is_whole = file.decoder == "libsndfile"
    if is_unchanged and is_whole and file.audio.name.lower().endswith(".flac"):
        return read_bytes(file.audio), rate, 1.0
    content, peak = _encode_scaled(file, rate, num_channels, packing, gain=1.0)
    if peak <= 1:
        return content, rate, 1.0
    # Resampling can raise the peak, so the peak is known only after a first encoding.
    gain = 0.999 / peak
    return _encode_scaled(file, rate, num_channels, packing, gain)[0], rate, gain


def _encode_scaled(
    file: IndexedFile, rate: int, num_channels: int, packing: Packing, gain: float
) -> tuple[bytes, float]:
    """The file as flac with its samples multiplied by `gain`, and the peak without the gain."""
    buffer, peak, subtype = io.BytesIO(), 0.0, f"PCM_{packing.bits}"
    options = {"subtype": subtype, "format": "FLAC", "compression_level": _COMPRESSION}
    try:
        flac = sf.SoundFile(buffer, "w", rate, num_channels, **options)
    except sf.LibsndfileError as error:
        reason = f"flac does not allow {rate} Hz: pack with a `sample_rate`"
        raise AudioReadError(file.audio, reason) from error
    length = resampled_length(file.num_frames, file.sample_rate, rate)
    block_samples = _BLOCK_SECONDS * rate
    with flac:
        # In blocks, so the memory does not depend on the length of the file.
        for start in range(0, length, block_samples):
            num_samples = min(block_samples, length - start)
            channel: Literal["mean"] | None = "mean" if packing.mono else None
            block = file.read_slice(start, num_samples, rate, channel).numpy()
            # The largest integer is one step below full scale, the smallest is at -1.
            peak = max(peak, float(block.max()) + 2.0 ** (1 - packing.bits), float(-block.min()))
            flac.write(gain * block.T)
    return buffer.getvalue(), peak


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    # Without owner and time, the same corpus gives the same bytes.
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
