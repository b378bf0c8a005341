"""The command `data convert`: raw labelled data sets to MARBLE's JSON lines."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

import soundfile as sf

from jepa_audio.data.audio.location import AudioReadError
from jepa_audio.data.audio.read import inspect
from jepa_audio.errors import MissingFileError, UserError, did_you_mean, printable
from jepa_audio.files import write_text
from jepa_audio.parallel import map_threads, num_cores, track_progress
from jepa_audio.probing.tasks import DATA_SETS, TASKS
from jepa_audio.probing.tasks.base import differ_from_published
from jepa_audio.probing.tasks.records import SPLITS, Record, unit_of, write_records

log = logging.getLogger(__name__)

MAX_BAD_SHARE = 0.05
"""Largest share of files that cannot be decoded; with more it is not the same data set."""

_MAX_BAD_LOGGED = 10
_BITS = {"S8": 8, "U8": 8, "16": 16, "24": 24, "32": 32, "FLOAT": 32, "DOUBLE": 64}


def convert(
    name: str, raw: Path, output: Path | None = None, num_workers: int = num_cores()
) -> None:
    """Write the records of a labelled data set as MARBLE's JSON lines, for `probe`.

    Every file is decoded once. Files that cannot be decoded are left out, and listed with their
    reasons in OUTPUT/NAME.bad.txt.

    Args:
        name: name of the data set, such as "gtzan" or "nsynth".
        raw: folder of the data set as downloaded and unpacked.
        output: root of the records (-o), such as `OUTPUT/GTZAN/GTZANGenre.train.jsonl`; the default
            is `raw`. If it contains `raw`, both can be moved together.
        num_workers: files decoded at the same time.

    Raises:
        MissingFileError: if a file or folder of the data set is missing.
        UserError: for an unknown name, for a wrong line of the data set, and if more than 5 % of
            the files cannot be decoded.
    """
    if name not in DATA_SETS:
        known = ", ".join(sorted(DATA_SETS))
        hint = did_you_mean(name, DATA_SETS)
        raise UserError(f"there is no data set {name!r}, only {known}{hint}")
    if not raw.is_dir():
        raise MissingFileError(f"there is no folder {raw}: give the folder of the data set {name}")
    output = output or raw
    conversion = DATA_SETS[name].convert(raw)
    all_records = chain.from_iterable(chain(*splits.values()) for splits in conversion.values())
    paths = list(dict.fromkeys(str(record["audio_path"]) for record in all_records))
    inspected = map_threads(lambda path: _inspect(raw / path), paths, num_workers)
    files = dict(zip(paths, track_progress(inspected, f"Decoding {name}", len(paths)), strict=True))
    bad = {raw / path: reason for path, reason in files.items() if isinstance(reason, str)}
    _report_bad(name, output, bad, len(files))
    for stem, splits in conversion.items():
        written = {}
        for split in SPLITS:
            written[split] = [
                _complete(record, audio, raw, output)
                for record in splits[split]
                if not isinstance(audio := files[str(record["audio_path"])], str)
            ]
            if not written[split]:
                raise UserError(f"{name}: no file of the split {split!r} of {stem} can be decoded")
            write_records(output / f"{stem}.{split}.jsonl", written[split])
        print(printable(_summary(stem, written, output)))


def _inspect(path: Path) -> Record | str:
    """MARBLE's keys for an audio file, or the reason why it cannot be decoded."""
    try:
        info = inspect(path)
    except AudioReadError as error:
        return error.reason
    return {
        "duration": info.num_frames / info.sample_rate,
        "sample_rate": info.sample_rate,
        "num_samples": info.num_frames,
        # Formats such as mp3 have no bit depth.
        "bit_depth": None
        if info.decoder == "torchcodec"
        else _BITS.get(sf.info(path).subtype.removeprefix("PCM_")),
        "channels": info.num_channels,
    }


def _report_bad(name: str, output: Path, bad: Mapping[Path, str], num_files: int) -> None:
    report = output / f"{name}.bad.txt"
    report.unlink(missing_ok=True)
    if not bad:
        return
    write_text(report, "".join(f"{path}\t{reason}\n" for path, reason in bad.items()))
    if len(bad) > MAX_BAD_SHARE * num_files:
        path, reason = next(iter(bad.items()))
        raise UserError(
            f"{name}: {len(bad)} of {num_files} files are missing or cannot be decoded, more than "
            f"{MAX_BAD_SHARE:.0%}; all are in {report}, first {path}: {reason}"
        )
    for path, reason in islice(bad.items(), _MAX_BAD_LOGGED):
        log.warning("%s is left out: %s", path, reason)
    if len(bad) > _MAX_BAD_LOGGED:
        log.warning("%d more are left out, all are in %s", len(bad) - _MAX_BAD_LOGGED, report)


def _complete(record: Record, audio: Record, raw: Path, output: Path) -> Record:
    """Add MARBLE's keys; make the path relative to the folder of the records if `raw` is inside."""
    # Path.resolve would follow links out of the folder that contains both.
    parts = (raw / record["audio_path"], raw, output)
    path, folder, root = (Path(os.path.abspath(part)) for part in parts)  # noqa: PTH100
    shown = path.relative_to(root) if folder.is_relative_to(root) else path
    return {**record, "audio_path": shown.as_posix(), **audio}


def _summary(stem: str, splits: Mapping[str, Sequence[Record]], output: Path) -> str:
    """Number of units of each split, compared with the published numbers."""
    task = next(task for task in TASKS.values() if task.stem == stem)
    sizes = [len({unit_of(record, task.group_by) for record in splits[s]}) for s in splits]
    counts = ", ".join(f"{size} {split}" for size, split in zip(sizes, splits, strict=True))
    if task.num_units[2] is None:
        published = "the published sizes are not known"
    elif differ_from_published(sizes, task.num_units):
        published = f"not comparable with published scores, which are for {task.num_units}"
    else:
        published = "as published"
    return f"{output / stem}.*.jsonl: {counts} ({published})"
