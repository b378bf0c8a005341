"""The table of a corpus: one row for every audio file, with what it holds or why it cannot be used."""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float64

from jepa_audio.data.audio.read import AudioLocation, audio_location
from jepa_audio.errors import UserError

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    {
        "source": pa.string(),  # file on disk, relative to the root where it lies below it
        "member": pa.string(),  # name within it, if it is a tar
        "offset": pa.int64(),  # first byte of the audio in the source
        "num_bytes": pa.int64(),
        "source_bytes": pa.int64(),
        "mtime_ns": pa.int64(),
        "group": pa.string(),  # what must not be divided between training and test
        "split": pa.string(),  # train, valid, test or ""
        "num_frames": pa.int64(),
        "sample_rate": pa.int32(),
        "num_channels": pa.int32(),
        "peak": pa.float32(),
        "rms": pa.float32(),
        "status": pa.string(),  # ok or bad
        "reason": pa.string(),
    }
)
_VERSION, _ROOT = b"jepa_audio.index", b"jepa_audio.root"
_CURRENT = b"2"


class CorpusError(UserError):
    """A corpus that cannot be used for training."""


class Splits(NamedTuple):
    """The files of a corpus by their use; `test` is empty where nothing says which they are."""

    train: Corpus
    valid: Corpus
    test: Corpus


@dataclass(frozen=True)
class Corpus:
    """A table and the folder that its sources are relative to.

    Attributes:
        root: folder.
        table: one row a file, see `SCHEMA`.
    """

    root: Path
    table: pa.Table

    def __len__(self) -> int:
        return len(self.table)

    @classmethod
    def load(cls, path: Path) -> Corpus:
        """Read the table at `path`.

        Raises:
            CorpusError: if there is none, or another kind of file.
        """
        if not path.exists():
            raise CorpusError(
                f"there is no table {path}; `jepa-audio data index SOURCE -o {path}` makes one"
            )
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise CorpusError(
                f"{path} cannot be read as a table of a corpus ({error}): index the corpus anew"
            ) from error
        metadata = table.schema.metadata or {}
        if metadata.get(_VERSION) != _CURRENT or not table.schema.equals(SCHEMA):
            raise CorpusError(
                f"{path} is no table of this version of jepa-audio: index the corpus anew"
            )
        root = Path(os.path.normpath(path.absolute().parent / metadata[_ROOT].decode()))
        return cls(root, table.replace_schema_metadata())

    def save(self, path: Path) -> None:
        """Write the table, whole or not at all; it can be moved together with the audio if one contains the other.

        Raises:
            CorpusError: if it cannot be written.
        """
        folder = path.absolute().parent
        moves_along = folder.is_relative_to(self.root) or self.root.is_relative_to(folder)
        root = os.path.relpath(self.root, folder) if moves_along else str(self.root)
        unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(
                self.table.replace_schema_metadata({_VERSION: _CURRENT, _ROOT: root.encode()}),
                unfinished,
            )
            unfinished.replace(path)
        except OSError as error:
            raise CorpusError(
                f"the table {path} cannot be written: {error.strerror or error}. Make one elsewhere: "
                "`jepa-audio data index SOURCE -o TABLE.parquet`, then `--data.root TABLE.parquet`"
            ) from error
        finally:
            with suppress(OSError):
                unfinished.unlink()

    def audio(self, row: int) -> AudioLocation:
        """Where the file of a row lies."""
        source, member, offset, num_bytes = (
            self.table[name][row].as_py() for name in ("source", "member", "offset", "num_bytes")
        )
        return audio_location(self.root / source, member, offset, num_bytes)

    @property
    def names(self) -> pa.ChunkedArray:
        """What each file is called in a message: its source, and its name within it."""
        source, member = self.table["source"], self.table["member"]
        if not pc.any(pc.not_equal(member, "")).as_py():
            return source
        return pc.if_else(
            pc.equal(member, ""), source, pc.binary_join_element_wise(source, member, ":")
        )

    @property
    def absolute_names(self) -> pa.ChunkedArray:
        """The same with the whole path."""
        names = self.names
        below = pc.binary_join_element_wise(f"{self.root}{os.sep}", names, "")
        return pc.if_else(pc.starts_with(names, os.sep), names, below)

    @property
    def seconds(self) -> Float64[np.ndarray, " N"]:
        """Length of every file, 0 where it is not known."""
        return self.table["num_frames"].to_numpy() / np.maximum(
            self.table["sample_rate"].to_numpy(), 1
        )

    @property
    def is_usable(self) -> Bool[np.ndarray, " N"]:
        """Which files can be trained on."""
        return pc.equal(self.table["status"], "ok").to_numpy()

    def mark_unfit(
        self,
        min_seconds: float = 0.0,
        max_seconds: float | None = None,
        num_channels: int | None = None,
    ) -> Corpus:
        """The table with files that are good, but not for this use, turned to 'bad' with the reason.

        Args:
            min_seconds: shorter files are not used.
            max_seconds: longer files are not used; `None` for no bound.
            num_channels: files with another number of channels are not used; `None` takes any.
        """
        seconds, channels = self.seconds, self.table["num_channels"].to_numpy()
        other = (
            np.zeros(len(self), dtype=bool) if num_channels is None else channels != num_channels
        )
        short, long = (
            seconds < min_seconds,
            seconds > (np.inf if max_seconds is None else max_seconds),
        )
        unfit = self.is_usable & (short | long | other)
        reasons = [
            f"too short: {seconds[row]:.4f} s, at least {min_seconds:g} s are needed"
            if short[row]
            else f"too long: {seconds[row]:.0f} s, at most {max_seconds:g} s are wanted"
            if long[row]
            else f"{channels[row]} channels, {num_channels} are needed"
            for row in np.flatnonzero(unfit)
        ]
        bad = pa.array(unfit)
        reason = pc.replace_with_mask(
            self.table["reason"].combine_chunks(), bad, pa.array(reasons, pa.string())
        )
        return self._with(status=pc.if_else(bad, "bad", self.table["status"]), reason=reason)

    def usable(
        self,
        min_seconds: float = 0.0,
        max_seconds: float | None = None,
        num_channels: int | None = None,
    ) -> Corpus:
        """The files that can be used; the arguments are those of `mark_unfit`."""
        fit = self.mark_unfit(min_seconds, max_seconds, num_channels)
        return self.take(fit.is_usable)

    def take(self, rows: np.ndarray) -> Corpus:
        """The rows at these places, or where the mask is true."""
        if rows.dtype == bool and rows.all():  # no copy of millions of rows
            return self
        chosen = self.table.filter(pa.array(rows)) if rows.dtype == bool else self.table.take(rows)
        return replace(self, table=chosen.combine_chunks())

    def shuffled(self) -> Corpus:
        """The files in the order of a hash of their names: any first few of them are a fair sample."""
        return self.take(np.argsort([_hash(name) for name in self.names.to_pylist()]))

    def split(self, valid_share: float) -> Splits:
        """Training, validation and test files: as the table says, or else divided by a hash.

        A table that names validation files is believed, and files without a split are then left
        out. In any other, a share of the files that are not for the test is held out, chosen by a
        hash of the group or of the name, so that a file stays where it is when others are added,
        and no group is on both sides. Neither side is empty if `valid_share` is positive: of two
        files one is held out, a single one is on both.

        Args:
            valid_share: share of the files held out where the table does not say which.
        """
        split = self.table["split"].to_numpy(zero_copy_only=False)
        test = self.take(split == "test")
        if (split == "valid").any():
            if without := int((split == "").sum()):
                log.warning(
                    "%d files have no split and are left out; `jepa-audio data split` gives them one",
                    without,
                )
            return Splits(self.take(split == "train"), self.take(split == "valid").shuffled(), test)
        rest = self.take(split != "test")
        if len(rest) == 0 or valid_share == 0:
            return Splits(rest, rest.take(np.arange(0)), test)
        if len(rest) == 1:
            return Splits(rest, rest, test)
        held_out = _held_out(rest, valid_share)
        return Splits(rest.take(~held_out), rest.take(held_out).shuffled(), test)

    def assign_splits(
        self, shares: dict[str, float], groups: Sequence[str] | None = None
    ) -> Corpus:
        """Give every file that has none a split; a group is never divided.

        Args:
            shares: of "train", "valid" and "test"; together 1. They hold for groups on average, not
                exactly.
            groups: the group of every file; `None` for those of the table, a file by itself where
                it has none.
        """
        possible = set(shares) <= {"train", "valid", "test"} and all(
            0 <= share <= 1 for share in shares.values()
        )
        if not possible or abs(sum(shares.values()) - 1) > 1e-6:
            raise UserError(f"`shares` {shares} must be of train, valid and test, and together 1")
        table = self if groups is None else self._with(group=pa.array(groups, pa.string()))
        table._check_groups()
        names, former = table._group_names(), table.table["split"].to_pylist()
        chosen: dict[str, str] = {}  # a group that is already on one side stays there as a whole
        for name, split in zip(names, former, strict=True):
            if split and chosen.setdefault(name, split) != split:
                raise CorpusError(
                    f"the group {name!r} holds files for {chosen[name]} and for {split}: divide it with `--anew true`"
                )
        order = [name for name in ("train", "valid", "test") if name in shares]
        bounds = np.cumsum([shares[name] for name in order])
        drawn = np.minimum(
            np.searchsorted(bounds, table._group_hashes(), side="right"), len(order) - 1
        )
        splits = [
            split or chosen.get(name, order[place])
            for name, split, place in zip(names, former, drawn, strict=True)
        ]
        return table._with(split=pa.array(splits, pa.string()))

    def clear_splits(self) -> Corpus:
        """The table as if it had never been divided."""
        return self._with(split=pa.array([""] * len(self), pa.string()))

    def _check_groups(self) -> None:
        ungrouped = pc.sum(pc.equal(self.table["group"], "")).as_py() or 0
        if 0 < ungrouped < len(self):
            raise CorpusError(
                f"{ungrouped} of {len(self)} files have no group, the others have: say again how they are grouped, "
                "with `--group folder` or `--pattern`"
            )

    def _group_names(self) -> list[str]:
        group = self.table["group"]
        return pc.if_else(pc.equal(group, ""), self.names, group).to_pylist()

    def _group_hashes(self) -> Float64[np.ndarray, " N"]:
        return np.array([_hash(name) for name in self._group_names()])

    def _with(self, **columns: pa.Array | pa.ChunkedArray) -> Corpus:
        table = self.table
        for name, values in columns.items():
            table = table.set_column(table.schema.get_field_index(name), name, values)
        return replace(self, table=table)


def default_table_path(source: str | Path) -> Path:
    """Where the table of a source lies: inside or beside it, or in the user's cache where that cannot be written."""
    source = Path(source)
    if source.suffix == ".parquet":
        return source
    if source.is_dir():
        folder, name = source, "index"
    else:  # a tar, a manifest, a pattern of tars
        folder, name = (
            source.parent,
            f"index-{hashlib.sha256(source.name.encode()).hexdigest()[:16]}",
        )
    hidden = folder / ".jepa_audio"
    inside = hidden / f"{name}.parquet"
    if inside.exists() or os.access(hidden if hidden.exists() else folder, os.W_OK):
        return inside
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "jepa_audio" / place / f"{name}.parquet"


def is_table(path: Path) -> bool:
    """Whether a file is a table of a corpus, of whatever version."""
    try:
        return _VERSION in (pq.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError):
        return False


def load_corpus(source: str | Path) -> Corpus:
    """The table of a source as it is on disk: its own, or that of an index.

    Raises:
        CorpusError: if there is none.
    """
    path = default_table_path(source)
    if not path.exists() and path != Path(source):
        raise CorpusError(
            f"{source} has no table at {path}; `jepa-audio data index {source}` makes one"
        )
    return Corpus.load(path)


def _held_out(corpus: Corpus, share: float) -> Bool[np.ndarray, " N"]:
    hashes = corpus._group_hashes()
    if (hashes == hashes[0]).all():
        log.warning("all files are of one group: it is divided into training and validation")
        hashes = np.array([_hash(name) for name in corpus.names.to_pylist()])
    # At least the lowest, and never the highest.
    return (hashes <= max(np.nextafter(share, 0), hashes.min())) & (hashes < hashes.max())


def _hash(name: str) -> float:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64
