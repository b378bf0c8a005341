"""Embeddings of clips: read from a file of `jepa-audio embed`, or computed from a corpus."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch.nn.utils.rnn import pad_sequence

from jepa_audio.data.audio.resample import resampled_length
from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.table import Corpus, load_corpus
from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.inference.encoder import Encoder
from jepa_audio.parallel import num_cores, track_progress
from jepa_audio.probing.tasks.raw_data import find_column, read_table
from jepa_audio.probing.tasks.table import PATH_COLUMNS

log = logging.getLogger(__name__)

COLUMNS = ("path", "start", "end", "vector")
_BATCH = 16


@dataclass(frozen=True, eq=False)
class Embeddings:
    """One vector for each clip.

    Attributes:
        paths: audio file of each clip.
        spans: start and end of each clip in its file, in seconds.
        vectors: the embeddings.
        labels: label of each clip, or its source folder.
        label_name: what the labels are.
    """

    paths: list[str]
    spans: Float[np.ndarray, "N 2"]
    vectors: Float[np.ndarray, "N D"]
    labels: list[str]
    label_name: str = "folder"

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: np.ndarray) -> Embeddings:
        """The clips of the given rows."""
        chosen = rows.tolist()
        return replace(
            self,
            paths=[self.paths[row] for row in chosen],
            spans=self.spans[rows],
            vectors=self.vectors[rows],
            labels=[self.labels[row] for row in chosen],
        )

    def sample(self, count: int, seed: int = 0) -> Embeddings:
        """At most `count` clips, drawn at random; a line states if some are left out."""
        if len(self) <= count:
            return self
        log.info("%d of %d clips are used: see `--max_clips`", count, len(self))
        chosen = np.random.default_rng(seed).choice(len(self), count, replace=False)
        return self.take(np.sort(chosen))

    def labelled(self, table: Path, column: str = "label") -> Embeddings:
        """The clips that have a label in a table: `.csv` with commas, other files with tabs.

        The table has a column `path` (or another name of `jepa-audio probe`), relative to its
        folder, and the column of the labels. Clips without a label are left out, and a line states
        their number.

        Raises:
            UserError: if the table has no such columns, or no label for any of the clips.
        """
        rows = list(read_table(table, [column], "," if table.suffix.lower() == ".csv" else "\t"))
        file = find_column(table, rows[0].cells, PATH_COLUMNS)
        folder = table.absolute().parent
        known = {str((folder / row.text(file)).resolve()): row.text(column) for row in rows}
        found = [known.get(str(Path(path).resolve()), "") for path in self.paths]
        chosen = np.flatnonzero(np.array([bool(label) for label in found]))
        if not len(chosen):
            raise UserError(
                f"{table} has no label for any of {len(self)} clips, such as {self.paths[0]}: its "
                f"column `{file}` must be relative to the folder of the table"
            )
        if len(chosen) < len(self):
            log.info("%d of %d clips have a label in %s", len(chosen), len(self), table)
        return replace(self, labels=found, label_name=column).take(chosen)


def join(parts: Sequence[Embeddings]) -> Embeddings:
    """The clips of several corpora, labelled by folder."""
    paths = [path for part in parts for path in part.paths]
    spans, vectors = ([getattr(part, name) for part in parts] for name in ("spans", "vectors"))
    return Embeddings(paths, np.concatenate(spans), np.concatenate(vectors), folders(paths))


def read_embeddings(path: Path) -> Embeddings:
    """Read a `.parquet`, `.npz` or `.h5` file with the columns path, start, end and vector.

    Raises:
        UserError: if a column is missing or has another type, vectors differ in length or are not
            finite, or there is no row.
    """
    if not path.is_file():
        raise MissingFileError(f"no embeddings at {path}: `jepa-audio embed` writes them")
    readers = {".npz": _read_npz, ".h5": _read_h5}
    columns = readers.get(path.suffix, _read_parquet)(path)
    try:
        vectors = np.asarray(columns["vector"], dtype=np.float32)
        spans = np.stack([np.asarray(columns[name], float) for name in ("start", "end")], axis=1)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: `vector`, `start` and `end` must be numbers: {error}") from error
    paths = [str(name) for name in columns["path"]]
    if vectors.ndim != 2 or not len(vectors) == len(paths) == len(spans) > 0:
        raise UserError(
            f"{path}: `vector` has the shape {vectors.shape} for {len(paths)} paths; it must have "
            "one vector for each clip (no frames), and at least one clip"
        )
    if not np.isfinite(vectors).all():
        raise UserError(f"{path}: {(~np.isfinite(vectors)).any(1).sum()} vectors are not finite")
    # Paths are relative to the working directory of `jepa-audio embed`, or the folder was moved.
    folder = path.absolute().parent
    if not Path(paths[0]).is_file() and (folder / paths[0]).is_file():
        paths = [str(folder / name) for name in paths]
    return Embeddings(paths, spans, vectors, folders(paths))


def is_embeddings(path: Path) -> bool:
    """Whether a parquet file has the columns of embeddings."""
    try:
        return set(COLUMNS) <= set(pq.read_schema(path).names)
    except (pa.ArrowException, OSError):
        return False


def _read_parquet(path: Path) -> dict[str, Any]:
    try:
        names = pq.read_schema(path).names
        _check_columns(path, names)
        table = pq.read_table(path, columns=list(COLUMNS))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} cannot be read as a parquet file: {reason}") from error
    return {name: table[name].to_pylist() for name in COLUMNS}


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            _check_columns(path, file.files)
            return {name: file[name] for name in COLUMNS}
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read as an npz file: {error}") from error


def _read_h5(path: Path) -> dict[str, Any]:
    if find_spec("h5py") is None:
        raise UserError(f"{path} needs h5py: install it with `pip install 'jepa-audio[h5]'`")
    import h5py  # noqa: PLC0415 (an optional package)

    try:
        with h5py.File(path) as file:
            _check_columns(path, list(file))
            columns = {name: file[name][:] for name in COLUMNS}
    except OSError as error:
        raise UserError(f"{path} cannot be read as an HDF5 file: {error}") from error
    names = columns["path"]
    texts = [name.decode() if isinstance(name, bytes) else str(name) for name in names]
    return {**columns, "path": texts}


def _check_columns(path: Path, names: Sequence[str]) -> None:
    if missing := [name for name in COLUMNS if name not in names]:
        raise UserError(
            f"{path} has no column `{missing[0]}`, only {', '.join(names)}: give a file of "
            f"`jepa-audio embed`, with {', '.join(COLUMNS)}"
        )


def folders(paths: Sequence[str]) -> list[str]:
    """The folder of each file, without the part of the path that all folders share."""
    parts = [Path(path).parts[:-1] for path in paths]
    shared = 0
    while all(len(part) > shared + 1 for part in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return ["/".join(part[shared:]) or "." for part in parts]


def embed_corpus(
    encoder: Encoder, source: str, max_clips: int, layer: int = -1, seconds: float | None = None
) -> Embeddings:
    """Embed the middle of some files of a corpus: the mean of all tokens of a layer.

    Args:
        encoder: on the device that computes.
        source: a table (.parquet) or a source of audio; it is indexed if needed.
        max_clips: the number of files; they are chosen by a hash of their names.
        layer: -1 for the last.
        seconds: length of a clip; `None` for that of a training crop. Shorter files are one clip.
    """
    if not source.endswith(".parquet"):
        index_corpus(source, num_workers=num_cores())
    corpus = load_corpus(source).usable()
    if not len(corpus):
        raise UserError(f"{source} has no usable audio file")
    if len(corpus) > max_clips:
        log.info("%d of %d files are used", max_clips, len(corpus))
    chosen = corpus.shuffled().take(np.arange(min(max_clips, len(corpus))))
    return embed_files(encoder, chosen, layer, seconds)


def embed_files(
    encoder: Encoder, corpus: Corpus, layer: int = -1, seconds: float | None = None
) -> Embeddings:
    """Embed the middle of every file of a corpus, see `embed_corpus`."""
    rate, channels = encoder.sample_rate, encoder.num_channels
    length = encoder.window_samples if seconds is None else round(seconds * rate)
    device = next(encoder.parameters()).device
    spans, vectors = [], []
    batches = [range(len(corpus))[i : i + _BATCH] for i in range(0, len(corpus), _BATCH)]
    for rows in track_progress(batches, "embedding", len(batches)):
        clips = []
        for row in rows:
            file = corpus.file(row)
            available = resampled_length(file.num_frames, file.sample_rate, rate)
            start = max(0, available - length) // 2
            mix: Literal["mean"] | None = "mean" if channels == 1 else None
            clip = file.read_slice(start, min(length, available), rate, mix)
            clips.append(clip.expand(channels, -1).T)
            spans.append((start / rate, (start + len(clips[-1])) / rate))
        lengths = torch.tensor([len(clip) for clip in clips])
        padded = pad_sequence(clips, batch_first=True).mT.to(device)
        features = encoder.encode_batch(padded, lengths, [layer])
        vectors.append(features.pool()[0].float().cpu().numpy())
    paths = corpus.absolute_names.to_pylist()
    return Embeddings(paths, np.array(spans), np.concatenate(vectors), folders(paths))
