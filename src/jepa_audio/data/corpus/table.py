"""The table of a corpus: one row for each file, with measurements, or the reason if it is bad."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float64

from jepa_audio.data.corpus.hashes import name_hashes, short_digest
from jepa_audio.data.corpus.impossible import SPLITS, cast_types, describe_types, mark_impossible
from jepa_audio.data.corpus.indexed_file import IndexedFile
from jepa_audio.errors import UserError
from jepa_audio.files import atomic_path

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    {
        "source": pa.string(),  # file on disk, relative to the root if it is below the root
        "member": pa.string(),  # name of the audio file in `source` if `source` is a tar, else ""
        "offset": pa.int64(),  # first byte of the audio file in `source`
        "num_bytes": pa.int64(),  # size of the audio file
        "source_bytes": pa.int64(),  # size of `source`
        "mtime_ns": pa.int64(),  # modification time of `source`
        "group": pa.string(),  # name of the group, or ""; files of one group are in one split
        "split": pa.string(),  # train, valid, test or ""
        "num_frames": pa.int64(),
        "sample_rate": pa.int32(),
        "num_channels": pa.int32(),
        "peak": pa.float32(),
        "rms": pa.float32(),
        "status": pa.string(),  # ok or bad
        "reason": pa.string(),  # why the file is bad
        "decoder": pa.string(),  # libsndfile, repaired, torchcodec, unchecked or "", see `read`
    }
)
# In files only: computing the hashes of millions of names takes seconds.
_HASH = pa.field("name_hash", pa.float64())
_CHOOSING = ["source_bytes", "mtime_ns", "peak", "rms", "status", "reason"]
_VERSION_KEY, _ROOT_KEY = b"jepa_audio.index", b"jepa_audio.root"
_CURRENT_VERSION = b"3"
_VERSION_BEFORE_DECODERS = b"2"
UNCHECKED = "unchecked"
"""The decoder in rows of earlier versions, which did not compare files with their containers."""
_REMEDY = "which read some mp3 and ogg files too short; index the corpus again"


class CorpusError(UserError):
    """A corpus cannot be used, or cannot be written."""


@dataclass(frozen=True)
class Corpus:
    """A table of audio files, see `SCHEMA`; relative paths in it start at the folder `root`."""

    root: Path
    table: pa.Table
    _hashes: Float64[np.ndarray, " N"] | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.table)

    @classmethod
    def load(cls, path: Path) -> Corpus:
        """Read a table.

        Raises:
            CorpusError: if the file does not exist or is not a corpus table of this version.
        """
        if not path.exists():
            command = f"jepa-audio data index SOURCE -o {path}"
            raise CorpusError(f"the corpus table {path} does not exist; create it with `{command}`")
        try:
            table = pq.read_table(path)
            table.validate(full=True)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            problem = f"{path} cannot be read as a corpus table ({reason})"
            raise CorpusError(f"{problem}; index the corpus again") from error
        metadata = table.schema.metadata or {}
        version = metadata.get(_VERSION_KEY)
        if version == _VERSION_BEFORE_DECODERS and "decoder" not in table.column_names:
            table = table.append_column("decoder", pa.array([UNCHECKED] * len(table), pa.string()))
            log.warning("%s is of an earlier version, %s", path, _REMEDY)
            version = _CURRENT_VERSION
        problem = f"{path} is not a corpus table of this version of jepa-audio"
        if version != _CURRENT_VERSION or _ROOT_KEY not in metadata:
            raise CorpusError(f"{problem}; index the corpus again")
        hashes, table = _split_hashes(table)
        table = cast_types(table, SCHEMA)
        if difference := describe_types(table, SCHEMA):
            raise CorpusError(f"{problem}: {difference}; index the corpus again")
        root = Path(os.path.normpath(path.absolute().parent / metadata[_ROOT_KEY].decode()))
        corpus = cls(root, mark_impossible(table.replace_schema_metadata()), hashes)
        return corpus if corpus._are_hashes_valid() else replace(corpus, _hashes=None)

    def save(self, path: Path) -> None:
        """Write the table atomically.

        The table stores `root` as a relative path if the folder of the table is above, below or
        equal to `root`. Audio and table can then be moved together.

        Raises:
            CorpusError: if the table cannot be written.
        """
        folder = path.absolute().parent
        is_relative = folder.is_relative_to(self.root) or self.root.is_relative_to(folder)
        root = os.path.relpath(self.root, folder) if is_relative else str(self.root)
        metadata = {_VERSION_KEY: _CURRENT_VERSION, _ROOT_KEY: root.encode()}
        table = self.table.append_column(_HASH, pa.array(name_hashes(self.names)))
        table = table.replace_schema_metadata(metadata)
        try:
            with atomic_path(path) as unfinished:
                pq.write_table(table, unfinished)
        except OSError as error:
            raise CorpusError(
                f"the table {path} cannot be written: {error.strerror or error}. Write it to "
                "another folder with `jepa-audio data index SOURCE -o TABLE.parquet`, then train "
                "with `--data.root TABLE.parquet`"
            ) from error

    def file(self, row: int) -> IndexedFile:
        """The file in a row."""
        return IndexedFile.from_row(self.root, self.table.slice(row, 1).to_pylist()[0])

    @property
    def names(self) -> pa.ChunkedArray:
        """Name of every file in messages: `source`, or `source:member` in a tar."""
        source, member = self.table["source"], self.table["member"]
        in_tar = pc.not_equal(member, "")
        if not pc.any(in_tar).as_py():
            return source
        return pc.if_else(in_tar, pc.binary_join_element_wise(source, member, ":"), source)

    @property
    def name_hashes(self) -> Float64[np.ndarray, " N"]:
        """A hash in [0, 1) of every file's name."""
        return name_hashes(self.names) if self._hashes is None else self._hashes

    @property
    def absolute_names(self) -> pa.ChunkedArray:
        """Name of every file with its absolute path."""
        names = self.names
        below_root = pc.binary_join_element_wise(f"{self.root}{os.sep}", names, "")
        return pc.if_else(pc.starts_with(names, os.sep), names, below_root)

    @property
    def seconds(self) -> Float64[np.ndarray, " N"]:
        """Length of every file in seconds; 0 if the length is unknown."""
        rates = self.table["sample_rate"].to_numpy().clip(1)
        return self.table["num_frames"].to_numpy() / rates

    @property
    def is_usable(self) -> Bool[np.ndarray, " N"]:
        """Mask of the files that can be used."""
        return pc.equal(self.table["status"], "ok").to_numpy()

    def mark_unfit(
        self,
        min_seconds: float = 0.0,
        max_seconds: float | None = None,
        num_channels: int | None = None,
    ) -> Corpus:
        """Mark usable files outside the given limits as bad, with a reason; `None` is no limit."""
        seconds, channels = self.seconds, self.table["num_channels"].to_numpy()
        is_short = seconds < min_seconds
        is_long = seconds > (np.inf if max_seconds is None else max_seconds)
        has_other_channels = channels != (channels if num_channels is None else num_channels)
        is_unfit = self.is_usable & (is_short | is_long | has_other_channels)
        if not is_unfit.any():
            return self

        def reason(row: int) -> str:
            if is_short[row]:
                return f"too short: {seconds[row]:.4f} s, at least {min_seconds:g} s are required"
            if is_long[row]:
                return f"too long: {seconds[row]:.0f} s, at most {max_seconds:g} s are allowed"
            return f"{channels[row]} channels, {num_channels} required"

        unfit = pa.array(is_unfit)
        reasons = pa.array([reason(row) for row in np.flatnonzero(is_unfit).tolist()], pa.string())
        reasons = pc.replace_with_mask(self.table["reason"].combine_chunks(), unfit, reasons)
        return self._with(status=pc.if_else(unfit, "bad", self.table["status"]), reason=reasons)

    def usable(self) -> Corpus:
        """The files that can be used."""
        return self.take(self.is_usable)

    def for_reading(self) -> Corpus:
        """The same files without the columns that only choose files: faster to copy."""
        return replace(self, table=self.table.drop_columns(_CHOOSING))

    def take(self, rows: np.ndarray) -> Corpus:
        """The files at the given row numbers, or where a mask is true."""
        # Do not copy millions of rows if all are selected.
        if rows.dtype == bool and rows.all():
            return self
        chosen = self.table.filter(pa.array(rows)) if rows.dtype == bool else self.table.take(rows)
        hashes = None if self._hashes is None else self._hashes[rows]
        return replace(self, table=chosen, _hashes=hashes)

    def shuffled(self) -> Corpus:
        """The files in the order of a hash of their names; the first n are a random sample."""
        return self.take(np.argsort(self.name_hashes))

    def split(self, valid_share: float) -> tuple[Corpus, Corpus, Corpus]:
        """Return (training files, validation files, test files).

        If the table has validation files, its splits are used, and files without a split are left
        out. Otherwise `valid_share` of all files except the test files becomes validation files.
        They are chosen by a hash of the group, or of the name if there is no group. A file
        therefore keeps its split when other files are added, and all files of a group are in one
        split.

        If `valid_share` is positive, the training and the validation split are never empty. With
        two files, one is a validation file. A single file is in both splits.
        """
        is_in = {name: self._equals("split", name) for name in ("", *SPLITS)}
        test = self.take(is_in["test"])
        if is_in["valid"].any():
            if num_unassigned := int(is_in[""].sum()):
                remedy = "assign one with `jepa-audio data split`"
                log.warning("%d files without a split are left out; %s", num_unassigned, remedy)
            return self.take(is_in["train"]), self.take(is_in["valid"]).shuffled(), test
        rest = self.take(~is_in["test"])
        if len(rest) == 0 or valid_share == 0:
            return rest, rest.take(np.arange(0)), test
        if len(rest) == 1:
            return rest, rest, test
        is_held_out = rest._draw_held_out(valid_share)
        return rest.take(~is_held_out), rest.take(is_held_out).shuffled(), test

    def assign_splits(
        self, shares: dict[str, float], groups: Sequence[str] | None = None
    ) -> Corpus:
        """Assign a split to every file without one; all files of a group get the same split.

        Args:
            shares: share of the groups that "train", "valid" and "test" receive; the sum is 1.
                Groups are assigned by a hash: with few groups, the shares are approximate.
            groups: group of every file; `None` uses the groups of the table. A file without a group
                forms a group by itself.

        Raises:
            UserError: if the shares are invalid.
            CorpusError: if a group already has files in two splits, or if some files have a group
                and others have none.
        """
        is_valid = set(shares) <= set(SPLITS) and all(0 <= share <= 1 for share in shares.values())
        if not is_valid or abs(sum(shares.values()) - 1) > 1e-6:
            rule = "must be in [0, 1] for train, valid or test, and their sum must be 1"
            raise UserError(f"`shares` ({shares}) {rule}")
        corpus = self if groups is None else self._with(group=pa.array(groups, pa.string()))
        num_ungrouped = pc.sum(pc.equal(corpus.table["group"], "")).as_py() or 0
        if 0 < num_ungrouped < len(corpus):
            remedy = "define the groups of all files with `--group folder` or `--pattern`"
            raise CorpusError(f"{num_ungrouped} of {len(corpus)} files have no group; {remedy}")
        group_names = corpus._group_names().to_pylist()
        splits = corpus.table["split"].to_pylist()
        split_of_group: dict[str, str] = {}
        for group, split in zip(group_names, splits, strict=True):
            if split and split_of_group.setdefault(group, split) != split:
                problem = f"has files in {split_of_group[group]} and in {split}"
                remedy = "assign all splits again with `--reassign true`"
                raise CorpusError(f"the group {group!r} {problem}; {remedy}")
        names = np.array([name for name in SPLITS if name in shares])
        bounds = np.cumsum([shares[name] for name in names])[:-1]
        drawn = names[np.searchsorted(bounds, corpus._group_hashes(), side="right")].tolist()
        pairs = zip(group_names, drawn, strict=True)
        splits = [split_of_group.get(group, split) for group, split in pairs]
        return corpus._with(split=pa.array(splits, pa.string()))

    def clear_splits(self) -> Corpus:
        """The corpus without any splits."""
        return self._with(split=pa.array([""] * len(self), pa.string()))

    def _draw_held_out(self, share: float) -> Bool[np.ndarray, " N"]:
        hashes = self._group_hashes()
        if (hashes == hashes[0]).all():
            log.warning(
                "all files are in one group; its files are divided into training and validation"
            )
            hashes = self.name_hashes
        # The lowest hash is always in the validation split, the highest hash never.
        return (hashes <= max(np.nextafter(share, 0), hashes.min())) & (hashes < hashes.max())

    def _equals(self, column: str, value: str) -> Bool[np.ndarray, " N"]:
        return pc.equal(self.table[column], value).to_numpy(zero_copy_only=False)

    def _group_names(self) -> pa.ChunkedArray:
        group, is_alone = self.table["group"], pc.equal(self.table["group"], "")
        return self.names if pc.all(is_alone).as_py() else pc.if_else(is_alone, self.names, group)

    def _group_hashes(self) -> Float64[np.ndarray, " N"]:
        group = self.table["group"]
        is_alone = pc.equal(group, "").to_numpy()
        if is_alone.all():
            return self.name_hashes
        groups = group.combine_chunks().dictionary_encode()
        hashes = name_hashes(pa.chunked_array([groups.dictionary]))[groups.indices.to_numpy()]
        return np.where(is_alone, self.name_hashes, hashes)

    def _are_hashes_valid(self) -> bool:
        """Whether the hashes are those of the names, checked for about 1,000 rows.

        Another program may have changed the table.
        """
        if self._hashes is None:
            return True
        is_checked = np.zeros(len(self), dtype=bool)
        is_checked[:: max(1, len(self) // 1000)] = True
        expected = name_hashes(self.names.filter(pa.array(is_checked)))
        return np.array_equal(expected, self._hashes[is_checked])

    def _with(self, **columns: pa.Array | pa.ChunkedArray) -> Corpus:
        return replace(self, table=set_columns(self.table, **columns))


def _split_hashes(table: pa.Table) -> tuple[np.ndarray | None, pa.Table]:
    """The hashes of the names, and the table without them; `None` for a table of old versions."""
    if _HASH.name not in table.column_names:
        return None, table
    hashes, table = table[_HASH.name], table.drop_columns(_HASH.name)
    is_complete = hashes.type == _HASH.type and hashes.null_count == 0
    return hashes.to_numpy() if is_complete else None, table


def set_columns(table: pa.Table, **columns: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Replace columns of a table; the order of the columns does not change."""
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    return table


def default_table_path(source: str | Path) -> Path:
    """Path of the table of a source: in `.jepa_audio/` in the folder of the source.

    If this folder is not writable, the table is in the user's cache.
    """
    source = Path(source)
    if source.suffix == ".parquet":
        return source
    folder, name = source, "index"
    if not source.is_dir():  # a tar, a manifest, a pattern of tars
        folder, name = source.parent, f"index-{short_digest(source.name)}"
    hidden = folder / ".jepa_audio"
    path = hidden / f"{name}.parquet"
    if path.exists() or os.access(hidden if hidden.exists() else folder, os.W_OK):
        return path
    cache = Path.home() / ".cache" / "jepa_audio" / short_digest(str(folder.resolve()))
    return cache / f"{name}.parquet"


def is_table(path: Path) -> bool:
    """Whether a file is a corpus table of any version."""
    try:
        return _VERSION_KEY in (pq.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError):
        return False


def load_corpus(source: str | Path) -> Corpus:
    """Load a table, or the table of a source that has been indexed.

    Raises:
        CorpusError: if the table does not exist or cannot be read.
    """
    path = default_table_path(source)
    if not path.exists() and path != Path(source):
        command = f"jepa-audio data index {source}"
        raise CorpusError(f"{source} is not indexed (no table {path}); run `{command}` first")
    return Corpus.load(path)
