"""The command `embed`: one row for each clip of a corpus, in a file that is read everywhere."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from jepa_audio.errors import UserError, printable
from jepa_audio.files import read_json, write_text
from jepa_audio.inference.embedding.files import ChunkDataset, files_hash, list_files
from jepa_audio.inference.embedding.predict import FileEmbedder, FileModule
from jepa_audio.inference.embedding.tables import (
    check_output,
    count_rows,
    read_metadata,
    read_reports,
    write_bad_files,
    write_output,
)
from jepa_audio.inference.encoder import state_hash
from jepa_audio.inference.load import load_encoder
from jepa_audio.inference.pooling import parse_pooling
from jepa_audio.parallel import file_lock

log = logging.getLogger(__name__)

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
_NUM_LOGGED = 20
# Settings on which the vectors do not depend; `weights` and `network` stand for the encoder.
_NOT_COMPARED = ("encoder", "max_windows", "version")


def embed(
    encoder: str,
    sources: list[str],
    output: Path = Path("embeddings.parquet"),
    *,
    which: Literal["context", "target", "random"] = "context",
    layers: list[int] | None = None,
    pooling: str = "mean",
    segment_seconds: float | None = None,
    hop_seconds: float | None = None,
    overlap: float = 0.0,
    windowing: Literal["exact", "wavjepa"] = "exact",
    max_windows: int = 64,
    num_workers: int | None = None,
    accelerator: str = "auto",
    devices: int | str = "auto",
    num_nodes: int = 1,
    precision: Precision = "32-true",
    overwrite: bool = False,
) -> str | None:
    """Embed all files of a corpus; write one row for each clip with path, start, end and vector.

    If the command is interrupted, the same command continues. Files that cannot be read are listed
    on the screen and in `OUTPUT.skipped.csv`.

    Args:
        encoder: the folder of a run, a checkpoint, an exported folder, or a name on the Hugging
            Face Hub.
        sources: see `jepa_audio.data.corpus.sources.discover_files`; also corpus tables.
        output: file that ends in .parquet, .npz or .h5 (-o).
        which: "context", "target" or "random" (the weights of step 0).
        layers: indices of layers, such as "[6, 12]", whose vectors are concatenated; 0 is the input
            of the first block; by default the last layer.
        pooling: as for `probe`: mean, thirds, regions_N, each also with _std, _change or both;
            "frames" writes one row for each time column. With "/concat" at the end, the frequency
            rows are concatenated instead of averaged.
        segment_seconds: length of segments, each of which is one row; the last segment of a file
            may be shorter. By default, a file is one row.
        hop_seconds: seconds from one segment to the next; by default `segment_seconds`.
        overlap: overlap of the windows in which a clip is encoded, as a share of a window.
        windowing: "wavjepa" for the windows of the published WavJEPA code.
        max_windows: largest number of windows in one forward pass; it limits the memory.
        num_workers: processes that read files, for each device; by default its share of the cores,
            at most 8, and none for a few files.
        accelerator: see Lightning's Trainer, as for the next options.
        devices: number of devices of a machine.
        num_nodes: number of machines.
        precision: "32-true", "bf16-mixed" or "16-mixed".
        overwrite: replace a file that holds other embeddings.

    Raises:
        UserError: if nothing can be embedded, or if an option is wrong.
    """
    check_output(output)
    if num_workers is not None and num_workers < 0:
        raise UserError(f"`num_workers` ({num_workers}) must be at least 0")
    trainer = _trainer(accelerator, devices, num_nodes, precision)
    model, metadata = _prepare_model(
        encoder,
        which,
        {"overlap": overlap, "windowing": windowing, "max_windows": max_windows},
        layers,
        pooling,
        segment_seconds,
        hop_seconds,
        output.with_name(f"{output.name}.parts"),
    )
    files = list_files(sources)
    metadata |= {"precision": precision, "files": files_hash(files)}
    data = ChunkDataset(files, model.encoder.sample_rate, model.encoder.num_channels)
    folder = model.folder
    is_first = not getattr(rank_zero_only, "rank", None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = output.with_name(f".{output.name}.lock")
    with _output_lock(lock) if is_first else nullcontext():
        if is_first and output.exists() and not overwrite:
            stored = read_metadata(output)
            if not (other := _differences(stored, metadata)):
                shutil.rmtree(folder, ignore_errors=True)
                return f"{output} is complete: it holds the embeddings of these files"
            found = f"other embeddings ({other})" if stored else "another kind of data"
            raise UserError(
                f"{output} exists and holds {found}: choose another name, or replace it with "
                "`--overwrite true`"
            )
        if is_first:
            _prepare_parts(folder, metadata, len(data), overwrite)
        _predict(trainer, model, data, num_workers)
        if not is_first:
            return None
        return _finish(model, len(data), output, metadata)


@contextmanager
def _output_lock(path: Path) -> Iterator[None]:
    """One command at a time for an output; its file is removed at the end.

    Only the command that holds the lock removes the file. Another one that waited for it then holds
    a lock of a file without a name, and starts again.
    """
    while True:
        path.touch()
        before = _file_number(path)
        with file_lock(path):
            if before is not None and _file_number(path) == before:
                try:
                    yield
                finally:
                    with suppress(OSError):
                        path.unlink()
                return


def _file_number(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _prepare_model(
    source: str,
    which: Literal["context", "target", "random"],
    options: dict[str, Any],
    layers: list[int] | None,
    pooling: str,
    segment_seconds: float | None,
    hop_seconds: float | None,
    folder: Path,
) -> tuple[FileEmbedder, dict[str, Any]]:
    """The model, and the settings on which the vectors depend."""
    parsed = parse_pooling(pooling)
    encoder = load_encoder(source, which, **options)
    indices = encoder.layer_indices([-1] if layers is None else layers) or []
    if hop_seconds is not None and segment_seconds is None:
        raise UserError(f"`hop_seconds` ({hop_seconds}) needs `segment_seconds`")
    rate = encoder.sample_rate
    lengths: list[int | None] = []
    for name, value in {"segment_seconds": segment_seconds, "hop_seconds": hop_seconds}.items():
        if value is not None and not 1 <= value * rate < float("inf"):
            raise UserError(f"`{name}` ({value:g}) must be at least one sample at {rate} Hz")
        lengths.append(None if value is None else round(value * rate))
    if hop_seconds is not None and segment_seconds is not None and hop_seconds > segment_seconds:
        gap = hop_seconds - segment_seconds
        log.warning("%g s between segments are not embedded: `hop_seconds` is the longer one", gap)
    model = FileEmbedder(encoder, indices, parsed, lengths[0], lengths[1], folder)
    network = encoder.settings, encoder.window_samples, encoder.loudness_dbfs
    metadata = {
        "encoder": encoder.source,
        "which": which,
        "weights": state_hash(encoder),
        "network": hashlib.sha256(json.dumps(network, sort_keys=True).encode()).hexdigest(),
        "layers": indices,
        "pooling": parsed.name,
        "width": model.width,
        "sample_rate": rate,
        "frame_seconds": encoder.frame_seconds,
        "segment_seconds": segment_seconds,
        "hop_seconds": hop_seconds,
        **options,
        "version": version("jepa-audio"),
    }
    return model, metadata


def _trainer(accelerator: str, devices: int | str, num_nodes: int, precision: Precision) -> Trainer:
    """Lightning's Trainer for predictions.

    Raises:
        UserError: if this machine has no such devices.
    """
    options: dict[str, Any] = {
        "accelerator": accelerator,
        "devices": devices,
        "num_nodes": num_nodes,
        "precision": precision,
    }
    has_bar = sys.stderr.isatty()
    try:
        return Trainer(
            **options,
            logger=False,
            callbacks=[RichProgressBar()] if has_bar else [],
            enable_progress_bar=has_bar,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        stated = ", ".join(f"`{name}` {value}" for name, value in options.items())
        reason = " ".join(str(error).split()).rstrip(".!")
        raise UserError(
            f"these devices cannot be used ({stated}): {reason}; `--accelerator cpu --devices 1` "
            "works on every machine"
        ) from error


def _predict(
    trainer: Trainer, model: FileEmbedder, data: ChunkDataset, num_workers: int | None
) -> None:
    """Write the parts that do not exist yet."""
    has_bar = trainer.progress_bar_callback is not None
    module = FileModule(data, lambda chunk: model.part_path(chunk).exists(), num_workers, has_bar)
    with _exit_at_sigterm():
        trainer.predict(model, datamodule=module, return_predictions=False)


@contextmanager
def _exit_at_sigterm() -> Iterator[None]:
    """End the process when it receives SIGTERM, which Lightning ignores in predictions.

    A handler of the program is kept.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _prepare_parts(
    folder: Path, metadata: dict[str, Any], num_chunks: int, overwrite: bool
) -> None:
    """Keep the parts of an interrupted command with the same settings.

    Raises:
        UserError: if the folder has parts with other settings, unless `overwrite`.
    """
    stated = folder / "settings.json"
    done = len(list(folder.glob("[0-9]*.parquet")))
    stored = _stored_settings(stated)
    other = _differences(stored, metadata) if stored else f"{stated.name} is missing or damaged"
    if not other:
        if done:
            log.info("%s has %d of %d parts: the work continues", folder, done, num_chunks)
        return
    if done and not overwrite:
        raise UserError(
            f"{folder} has {done} finished parts of an interrupted command with other settings "
            f"({other}): repeat that command to complete it, choose another output, or remove "
            "the parts with `--overwrite true`"
        )
    if folder.exists():
        if done:
            log.warning("%s is of a command with other settings (%s) and is removed", folder, other)
        shutil.rmtree(folder)
    write_text(stated, json.dumps(metadata, indent=2))


def _stored_settings(path: Path) -> dict[str, Any]:
    """The settings of an interrupted command; empty if they are missing or damaged."""
    try:
        stored = read_json(path)
    except UserError:
        return {}
    return stored if isinstance(stored, dict) else {}


def _differences(stored: dict[str, Any], metadata: dict[str, Any]) -> str:
    """The settings that change the vectors and differ; empty if none does."""
    # The settings of the file are JSON: without tuples.
    new = json.loads(json.dumps(metadata))
    keys = [key for key in {**new, **stored} if key not in _NOT_COMPARED]
    differing = [key for key in keys if stored.get(key) != new.get(key)]
    texts = {
        "weights": "other weights of the encoder",
        "network": "other settings of the encoder"
        if "network" in stored
        else "an earlier version of jepa-audio",
        "files": "other files",
    }
    return ", ".join(
        texts.get(key, f"`{key}` {stored.get(key)!r} instead of {new.get(key)!r}")
        for key in differing
    )


def _finish(model: FileEmbedder, num_chunks: int, output: Path, metadata: dict[str, Any]) -> str:
    """Wait for the parts of all processes, and write the final file."""
    parts = [model.part_path(chunk) for chunk in range(num_chunks)]
    while missing := [path for path in parts if not path.exists()]:
        log.info("waiting for %d parts of other processes", len(missing))
        time.sleep(2)
    bad, notes = read_reports(parts)
    for note, count in notes.items():
        log.info("%d %s: %s", count, "file" if count == 1 else "files", note)
    skipped = output.with_name(f"{output.name}.skipped.csv")
    for name, reason in list(bad.items())[:_NUM_LOGGED]:
        log.warning("skipped %s: %s", printable(name, one_line=True), reason)
    if len(bad) > _NUM_LOGGED:
        log.warning("skipped %d more files; %s lists all", len(bad) - _NUM_LOGGED, skipped)
    skipped.unlink(missing_ok=True)
    if bad:
        write_bad_files(skipped, bad)
    num_rows = count_rows(parts)
    if not num_rows:
        raise UserError(
            f"none of the {len(bad)} files could be embedded; {skipped} has the reasons"
        )
    write_output(parts, output, model.width, metadata)
    shutil.rmtree(model.folder)
    ending = f"; {len(bad)} files were skipped: {skipped}" if bad else ""
    return f"{output}: {num_rows} rows of {model.width} values{ending}"
