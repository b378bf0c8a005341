"""The command `data convert`: raw data sets of labelled tasks → MARBLE's JSON lines, every file decoded once."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import soundfile as sf

from jepa_audio.data.audio.read import AudioReadError, inspect
from jepa_audio.errors import MissingFileError, UserError, did_you_mean
from jepa_audio.parallel import map_threads, num_cores, track_progress
from jepa_audio.probing.tasks import DATA_SETS, TASKS
from jepa_audio.probing.tasks.base import Conversion, differ_from_published
from jepa_audio.probing.tasks.records import Record, write_records

log = logging.getLogger(__name__)

MAX_BAD_SHARE = 0.05
"""Above this share of files that cannot be decoded it is not the data set any more."""

_BAD_SHOWN = 10
_BITS = {"S8": 8, "U8": 8, "16": 16, "24": 24, "32": 32, "FLOAT": 32, "DOUBLE": 64}


def convert(
    name: str, raw: Path, output: Path | None = None, num_workers: int = num_cores()
) -> None:
    """Write the records of a labelled data set as MARBLE's JSON lines, which `probe` reads; every file is decoded once.

    Files that cannot be decoded are left out, and listed with their reasons in OUTPUT/NAME.bad.txt.

    Args:
        name: of the data set, such as "gtzan" or "nsynth".
        raw: folder of the data set as it is downloaded and unpacked.
        output: folder to write (-o), the root of all records:
            `OUTPUT/GTZAN/GTZANGenre.train.jsonl`; `raw` itself if not given. If `raw` lies in it,
            both can be moved together.
        num_workers: files decoded at the same time.

    Raises:
        UserError: naming the file or folder of the data set that is missing.
        UserError: for a name that is unknown, for a line of the data set that is wrong, and if
            more than 5 % of the files cannot be decoded.
    """
    if name not in DATA_SETS:
        known = ", ".join(sorted(DATA_SETS))
        raise UserError(
            f"there is no data set called {name!r}, only {known}{did_you_mean(name, DATA_SETS)}"
        )
    if not raw.is_dir():
        raise MissingFileError(f"there is no folder {raw}: give that of the raw data set {name}")
    output = output or raw
    conversion = DATA_SETS[name].convert(raw)
    paths = list(dict.fromkeys(str(record["audio_path"]) for record in _all_records(conversion)))
    inspected = map_threads(lambda path: _inspect(raw / path), paths, num_workers)
    files = dict(zip(paths, track_progress(inspected, f"Decoding {name}", len(paths)), strict=True))
    _report_bad(
        name,
        raw,
        output,
        {path: file for path, file in files.items() if isinstance(file, str)},
        len(files),
    )
    good = {path: file for path, file in files.items() if isinstance(file, _File)}
    for stem, splits in conversion.items():
        kept = {
            split: [r for r in records if str(r["audio_path"]) in good]
            for split, records in splits.items()
        }
        for split, records in kept.items():
            if not records:
                raise UserError(
                    f"{name}: no file of the split {split!r} of {stem} in {raw} can be used"
                )
            path = output / f"{stem}.{split}.jsonl"
            write_records(
                path,
                [
                    _whole(record, good[str(record["audio_path"])], raw, output)
                    for record in records
                ],
            )
        print(_summary(stem, kept, output))


@dataclass(frozen=True)
class _File:
    """What is written of an audio file."""

    sample_rate: int
    num_samples: int
    channels: int
    bit_depth: int | None


def _all_records(conversion: Conversion) -> list[Record]:
    return [
        record
        for splits in conversion.values()
        for records in splits.values()
        for record in records
    ]


def _inspect(path: Path) -> _File | str:
    """What it holds, or why it cannot be used."""
    try:
        info = inspect(path)
    except AudioReadError as error:
        return error.reason
    return _File(info.sample_rate, info.num_frames, info.num_channels, _bit_depth(path))


def _bit_depth(path: Path) -> int | None:
    """Bits of a sample, `None` where there are none, as in an mp3."""
    return _BITS.get(sf.info(path).subtype.removeprefix("PCM_"))


def _report_bad(name: str, raw: Path, output: Path, bad: Mapping[str, str], num_files: int) -> None:
    report = output / f"{name}.bad.txt"
    report.unlink(missing_ok=True)
    if not bad:
        return
    output.mkdir(parents=True, exist_ok=True)
    report.write_text(
        "".join(f"{raw / path}\t{reason}\n" for path, reason in bad.items()), encoding="utf-8"
    )
    if len(bad) > MAX_BAD_SHARE * num_files:
        path, reason = next(iter(bad.items()))
        raise UserError(
            f"{name}: {len(bad)} of {num_files} files are missing or cannot be decoded, more than {MAX_BAD_SHARE:.0%}; "
            f"all are in {report}, first {raw / path}: {reason}"
        )
    for path, reason in islice(bad.items(), _BAD_SHOWN):
        log.warning("%s is left out: %s", raw / path, reason)
    if len(bad) > _BAD_SHOWN:
        log.warning("%d more are left out, all are in %s", len(bad) - _BAD_SHOWN, report)


def _whole(record: Record, file: _File, raw: Path, output: Path) -> Record:
    """The record with all of MARBLE's keys, and with a path that can be found from the folder of the records."""
    of_audio = {
        "duration": file.num_samples / file.sample_rate,
        "sample_rate": file.sample_rate,
        "num_samples": file.num_samples,
        "bit_depth": file.bit_depth,
        "channels": file.channels,
    }
    # Path.resolve would follow links, out of the folder that both are in.
    path, root = Path(os.path.abspath(raw / record["audio_path"])), Path(os.path.abspath(output))  # noqa: PTH100
    shown = path.relative_to(root) if Path(os.path.abspath(raw)).is_relative_to(root) else path  # noqa: PTH100
    return {**record, "audio_path": shown.as_posix(), **of_audio}


def _summary(stem: str, splits: Mapping[str, list[Record]], output: Path) -> str:
    """Units of every split, and whether they are those of published numbers."""
    task = next(task for task in TASKS.values() if task.stem == stem)
    sizes = tuple(
        len({str(r.get("uid", r.get(task.group_by, r["audio_path"]))) for r in splits[s]})
        for s in splits
    )
    said = ", ".join(f"{size} {split}" for size, split in zip(sizes, splits, strict=True))
    if task.num_units[2] is None:
        published = "the published sizes are not known"
    elif differ_from_published(sizes, task.num_units):
        published = f"not comparable with published numbers, which are of {task.num_units}"
    else:
        published = "as published"
    return f"{output / stem}.*.jsonl: {said} ({published})"
