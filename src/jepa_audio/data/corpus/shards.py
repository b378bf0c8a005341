"""A corpus → uncompressed tars in WebDataset's layout, `key.flac` beside `key.json`, which are read where they lie."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tarfile
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import soundfile as sf
import torch
from jaxtyping import Float32

from jepa_audio.data.audio.read import AudioReadError, read, read_bytes
from jepa_audio.data.audio.resample import resample, resampled_length, source_slice
from jepa_audio.data.corpus.index import index_file
from jepa_audio.data.corpus.sources import DiscoveredFile, list_tar_members
from jepa_audio.data.corpus.table import SCHEMA, Corpus, CorpusError, default_table_path
from jepa_audio.data.loading.file_table import FileTable, IndexedFile, check_unchanged
from jepa_audio.errors import UserError
from jepa_audio.parallel import map_threads, track_progress

log = logging.getLogger(__name__)

CHECKSUMS = "SHA256SUMS"

_BLOCK_SECONDS = 60
_FLAC_SHARE = 0.6  # of its samples' bytes, that a flac file has about
_FLAC_CHANNELS = 8
_COMPRESSION = 0.0  # of 0 to 1: decoded an eighth faster than the default, and 4 % larger
_DIGEST = b"jepa_audio.plan"
_SUM = b"jepa_audio.sha256"


@dataclass(frozen=True)
class Packing:
    """How audio is written into shards.

    Args:
        sample_rate: in Hz, to which all is resampled; `None` leaves every rate.
        mono: average the channels.
        bits: per sample of what is written anew, 16 or 24. A flac file that stays as it is is
            copied.
        shard_mb: size at which a shard is about full, in 10^6 bytes.
    """

    sample_rate: int | None = None
    mono: bool = False
    bits: int = 16
    shard_mb: int = 1000

    def __post_init__(self) -> None:
        if self.bits not in (16, 24):
            raise UserError(f"`bits` ({self.bits}) must be 16 or 24")
        if self.shard_mb < 1 or (self.sample_rate is not None and self.sample_rate < 1000):
            raise UserError(
                f"`shard_mb` ({self.shard_mb}) must be >= 1, `sample_rate` ({self.sample_rate}) >= 1000"
            )


def write_shards(corpus: Corpus, directory: Path, packing: Packing, num_workers: int = 2) -> Corpus:
    """Write the usable files of a corpus as shards, and the table of them.

    The files are shuffled by a hash of their names, so that a reader of whole shards gets a fair
    sample. The same corpus and settings give the same bytes, whatever the number of workers. Every
    shard is decoded once after it is written; an interrupted packing goes on with the shard at
    which it was.

    Args:
        corpus: to pack; its bad files are left out.
        directory: folder to write: `shard-000000.tar`, ..., `SHA256SUMS`, and the table where
            training looks for it.
        packing: rate, channels, sizes.
        num_workers: threads that encode.

    Raises:
        CorpusError: if nothing is usable, if the folder holds other shards, or if it cannot be
            written.
    """
    usable = corpus.usable().shuffled()
    if not len(usable):
        raise CorpusError(f"none of the {len(corpus)} files can be used")
    plan = _plan(usable, packing)
    records = directory / ".jepa_audio" / "packed"
    _refuse_foreign(directory, len(plan), usable)
    tables: list[pa.Table] = []
    progress = track_progress(range(len(usable)), f"Packing {directory}", len(usable))
    try:
        records.mkdir(parents=True, exist_ok=True)
        for number, rows in enumerate(plan):
            shard = _Shard(
                directory / _name(number), records / f"{number:06d}.parquet", usable, rows, packing
            )
            table = shard.finished()
            if table is None:
                table = shard.write(num_workers, lambda: next(progress, None))
            else:
                deque(islice(progress, len(rows)), maxlen=0)
            tables.append(table)
    except OSError as error:
        said = error.strerror or str(error)
        raise CorpusError(
            f"{directory} cannot be written: {said}; the same command again goes on there"
        ) from error
    sums = [
        f"{table.schema.metadata[_SUM].decode()}  {_name(number)}"
        for number, table in enumerate(tables)
    ]
    (directory / CHECKSUMS).write_text("\n".join([*sums, ""]))
    packed = Corpus(
        directory.absolute(),
        pa.concat_tables([table.replace_schema_metadata() for table in tables]),
    )
    packed.save(default_table_path(directory))
    return packed


def read_checksums(directory: Path) -> dict[str, str]:
    """SHA-256 of every shard, by its name; empty where there are none."""
    path = directory / CHECKSUMS
    if not path.exists():
        return {}
    lines = (line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip())
    return {name.lstrip("*"): digest for digest, name in lines}


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _plan(corpus: Corpus, packing: Packing) -> list[np.ndarray]:
    """The rows of every shard; sizes are estimated, for the files are not yet encoded."""
    rates = (
        corpus.table["sample_rate"].to_numpy()
        if packing.sample_rate is None
        else packing.sample_rate
    )
    channels = 1 if packing.mono else corpus.table["num_channels"].to_numpy()
    sizes = (
        corpus.seconds * rates * channels * packing.bits / 8 * _FLAC_SHARE + 3 * tarfile.BLOCKSIZE
    )
    shard = (np.cumsum(sizes) - sizes) // (packing.shard_mb * 1e6)
    return np.split(np.arange(len(corpus)), np.flatnonzero(np.diff(shard)) + 1)


def _refuse_foreign(directory: Path, num_shards: int, corpus: Corpus) -> None:
    if directory.is_file():
        raise CorpusError(f"{directory} is a file, a folder to write shards to was expected")
    sources = pc.unique(corpus.table["source"]).to_pylist()
    if any((corpus.root / source).parent.resolve() == directory.resolve() for source in sources):
        raise CorpusError(f"{directory} holds what is to be packed: give another folder")
    expected = {_name(number) for number in range(num_shards)}
    if foreign := sorted({path.name for path in directory.glob("*.tar")} - expected):
        raise CorpusError(
            f"{directory} holds other shards ({foreign[0]}): give another folder, or empty this one"
        )


class _Shard:
    """One tar: written beside its place, moved there when whole, then decoded and recorded."""

    def __init__(
        self, path: Path, record: Path, corpus: Corpus, rows: np.ndarray, packing: Packing
    ) -> None:
        self._path, self._record, self._first = path, record, int(rows[0])
        self._corpus, self._packing = corpus.take(rows), packing
        self._names = self._corpus.names.to_pylist()
        what = self._corpus.table.select(
            ["source", "member", "num_bytes", "mtime_ns", "group", "split"]
        ).to_pylist()
        self._digest = hashlib.sha256(
            json.dumps([asdict(packing), self._first, what]).encode()
        ).hexdigest()

    def finished(self) -> pa.Table | None:
        """The rows, if an earlier run has finished this shard and nothing has changed since."""
        if not (self._record.exists() and self._path.exists()):
            return None
        table = pq.read_table(self._record)
        stat = self._path.stat()
        same = {(stat.st_size, stat.st_mtime_ns)} == {
            *zip(table["source_bytes"].to_pylist(), table["mtime_ns"].to_pylist(), strict=True)
        }
        return (
            table if same and table.schema.metadata.get(_DIGEST) == self._digest.encode() else None
        )

    def write(self, num_workers: int, tick: Callable[[], object]) -> pa.Table:
        """Encode the files, calling `tick` after each; the rows of the table."""
        part = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}.part")
        skipped: list[DiscoveredFile] = []
        try:
            with part.open("wb") as file:
                self._fill(file, num_workers, skipped, tick)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self._path)
        finally:
            part.unlink(missing_ok=True)
        stat = self._path.stat()
        tar = DiscoveredFile(self._path.name, "", 0, -1, stat.st_size, stat.st_mtime_ns)
        found = list_tar_members(tar, self._path.parent) if len(skipped) < len(self._corpus) else []
        found += [tar._replace(member=entry.member, reason=entry.reason) for entry in skipped]
        rows = list(
            map_threads(lambda entry: index_file(self._path.parent, entry), found, num_workers)
        )
        metadata = {_DIGEST: self._digest.encode(), _SUM: sha256_of(self._path).encode()}
        table = pa.Table.from_pylist(rows, schema=SCHEMA).replace_schema_metadata(metadata)
        pq.write_table(table, self._record.with_suffix(".tmp"))
        self._record.with_suffix(".tmp").replace(self._record)
        return table

    def _fill(
        self,
        file: io.BufferedWriter,
        num_workers: int,
        skipped: list[DiscoveredFile],
        tick: Callable[[], object],
    ) -> None:
        files = FileTable([self._corpus])
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            encoded = map_threads(
                partial(self._encoded, files), range(len(files)), num_workers, 4 * num_workers
            )
            for place, packed in enumerate(encoded):
                tick()
                key = f"{self._first + place:09d}"
                if isinstance(packed, AudioReadError):
                    log.warning("left out %s: %s", packed.audio, packed.reason)
                    skipped.append(
                        DiscoveredFile("", f"{key}.flac", reason=f"left out of the shard: {packed}")
                    )
                    continue
                content, facts = packed
                _add(archive, f"{key}.flac", content)
                _add(archive, f"{key}.json", json.dumps(facts).encode())

    def _encoded(
        self, files: FileTable, place: int
    ) -> tuple[bytes, dict[str, Any]] | AudioReadError:
        """A file as flac, and what is known of it; or why it cannot be read."""
        group, split = (self._corpus.table[name][place].as_py() for name in ("group", "split"))
        source = self._names[place]
        try:
            content, rate, gain = _flac(files[place], self._packing)
        except AudioReadError as error:
            return error
        return content, {
            "source": source,
            "group": group,
            "split": split,
            "sample_rate": rate,
            "gain": gain,
        }


def _flac(file: IndexedFile, packing: Packing) -> tuple[bytes, int, float]:
    """The file as flac, its rate, and the factor on its samples that keeps them from clipping."""
    rate = packing.sample_rate or file.sample_rate
    num_channels = 1 if packing.mono else file.num_channels
    if num_channels > _FLAC_CHANNELS:
        raise AudioReadError(
            file.audio, f"{num_channels} channels, flac holds {_FLAC_CHANNELS}: pack with `mono`"
        )
    if (rate, num_channels) == (
        file.sample_rate,
        file.num_channels,
    ) and file.audio.name.lower().endswith(".flac"):
        return read_bytes(file.audio), rate, 1.0
    content, peak = _encode(file, rate, num_channels, packing, gain=1.0)
    if peak <= 1:
        return content, rate, 1.0
    gain = (
        0.999 / peak
    )  # a resampled sound can be louder than the file; only now it is known by how much
    return _encode(file, rate, num_channels, packing, gain)[0], rate, gain


def _encode(
    file: IndexedFile, rate: int, num_channels: int, packing: Packing, gain: float
) -> tuple[bytes, float]:
    buffer, peak = io.BytesIO(), 0.0
    how = {"subtype": f"PCM_{packing.bits}", "format": "FLAC", "compression_level": _COMPRESSION}
    try:
        flac = sf.SoundFile(buffer, "w", rate, num_channels, **how)
    except sf.LibsndfileError as error:
        raise AudioReadError(
            file.audio, f"flac does not hold {rate} Hz: pack with a `sample_rate`"
        ) from error
    with flac:
        for block in _blocks(file, rate, packing.mono):
            # The largest integer is one step short of full scale, the smallest is not.
            peak = max(peak, float(block.max()) + 2.0 ** (1 - packing.bits), float(-block.min()))
            flac.write(gain * block.T)
    return buffer.getvalue(), peak


def _blocks(file: IndexedFile, rate: int, mono: bool) -> Iterator[Float32[np.ndarray, "C S"]]:
    """The file at another rate, in blocks: a day of sound takes no more memory than a minute."""
    length = resampled_length(file.num_frames, file.sample_rate, rate)
    block = _BLOCK_SECONDS * rate
    for start in range(0, length, block):
        wanted = min(block, length - start)
        source = source_slice(start, wanted, file.num_frames, file.sample_rate, rate)
        decoded, sample_rate = read(file.audio, source.start, source.num_frames)
        check_unchanged(file, decoded, sample_rate)
        samples = torch.from_numpy(decoded)
        samples = samples.mean(dim=0, keepdim=True) if mono else samples
        yield resample(samples, file.sample_rate, rate)[
            :, source.skip : source.skip + wanted
        ].numpy()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # without owner and time: the same corpus makes the same bytes
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
