"""Does a run on two million files start as fast, and step as fast, as one on a thousand?

Writes a few short files and reaches them by as many paths as asked for, through folders that are
links: a table of N different sources without N files on the disk. What a cold disk adds to a
    million real ones is not measured.

In fresh processes, taking turns over N: the seconds from `AudioDataModule(...)` to the first
training batch, imports left out; the time of a batch without workers, wall and CPU; the memory of
the main process; and what workers weigh after 20 batches: their private pages (USS; the mapped
table is not theirs), and their share of all pages (PSS; with the table). A worker imports the main
module of the process that starts it: every process is started as `jepa-audio` is.

    python -m benchmarks.corpus_size [--files 1000 100000 2000000] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import soundfile as sf

RATE, SECONDS, CROP_SECONDS = 16_000, 3, 2.01
ALBUMS, TRACKS = 200, 50  # of an artist, of an album
BATCH_SIZE, WARM_UP, BATCHES = 32, 20, 300
WORKERS = (1, 2, 4)

# What pip writes for a command, but for what it calls.
COMMAND = """
import sys
from {module} import {function}
if __name__ == "__main__":
    from benchmarks.corpus_size import measure
    measure(sys.argv[1], int(sys.argv[2]))
"""


def write_files(root: Path, num_files: int) -> list[str]:
    """Tracks in one real folder, albums that are links to it, artists that are links to the albums; all paths."""
    tracks = [f"{number:02d} - a title as long as titles are.wav" for number in range(TRACKS)]
    albums = [f"album_{number:06d}_with_a_name" for number in range(ALBUMS)]
    artists = [f"artist_{number:06d}" for number in range(-(-num_files // (ALBUMS * TRACKS)))]
    (root / ".tracks").mkdir()
    (root / ".albums").mkdir()
    rng = np.random.default_rng(0)
    for track in tracks:
        sf.write(
            root / ".tracks" / track,
            0.1 * rng.standard_normal(SECONDS * RATE),
            RATE,
            subtype="PCM_16",
        )
    for album in albums:
        (root / ".albums" / album).symlink_to("../.tracks")
    for artist in artists:
        (root / artist).symlink_to(".albums")
    paths = [
        f"{artist}/{album}/{track}" for artist in artists for album in albums for track in tracks
    ]
    return paths[:num_files]


def write_table(root: Path, paths: list[str]) -> Path:
    """The table that an index of these files would be."""
    from jepa_audio.data.corpus.index import index_file  # noqa: PLC0415
    from jepa_audio.data.corpus.sources import DiscoveredFile  # noqa: PLC0415
    from jepa_audio.data.corpus.table import SCHEMA, Corpus  # noqa: PLC0415 (a worker would import it with this module)

    stat = (root / paths[0]).stat()
    row = index_file(
        root, DiscoveredFile(paths[0], "", 0, stat.st_size, stat.st_size, stat.st_mtime_ns)
    )
    columns = {
        name: pa.repeat(pa.scalar(row[name], SCHEMA.field(name).type), len(paths))
        for name in SCHEMA.names
    }
    table = root / f"{len(paths)}.parquet"
    Corpus(root, pa.table({**columns, "source": pa.array(paths, pa.string())}, SCHEMA)).save(table)
    return table


def workers_of(process: int) -> list[Path]:
    """Where `/proc` keeps the reading processes: the children of the fork server, which is a child of the run."""
    parents = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(place.name)] = int(
                (place / "stat").read_text().rpartition(")")[2].split()[1]
            )
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    return [
        Path(f"/proc/{child}")
        for child, server in parents.items()
        if parents.get(server) == process
    ]


def mib(path: Path, *fields: str) -> float:
    """The sum of fields of a file of `/proc` that are given in kB."""
    lines = (line.split() for line in path.read_text().splitlines())
    return sum(int(words[1]) for words in lines if words[0].rstrip(":") in fields) / 1024


def own_mib(process: Path) -> float:
    """Pages that nobody else has; those of a shared mapping lie in the page cache, whoever has looked at them."""
    kibibytes, is_private = 0, False
    for line in (process / "smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            is_private = words[1].endswith("p")
        elif is_private and words[0] in ("Private_Clean:", "Private_Dirty:"):
            kibibytes += int(words[1])
    return kibibytes / 1024


def measure(table: str, num_workers: int) -> None:
    """What one process sees of a run, printed as JSON."""
    import torch  # noqa: PLC0415

    from jepa_audio.data.datamodule import AudioDataModule  # noqa: PLC0415

    logging.getLogger("jepa_audio").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    status = Path("/proc/self/status")
    seen = {"imported": mib(status, "VmRSS")}
    start = time.perf_counter()
    data = AudioDataModule(
        table, RATE, CROP_SECONDS, batch_size=BATCH_SIZE, num_workers=num_workers
    )
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    batches = endless(loader)
    next(batches)
    seen["start"] = time.perf_counter() - start
    for _ in range(WARM_UP):
        next(batches)
    if num_workers:
        workers = workers_of(os.getpid())
        if len(workers) != num_workers:
            raise RuntimeError(f"{len(workers)} workers were found, {num_workers} were started")
        seen["uss"] = sum(map(own_mib, workers))
        seen["pss"] = sum(mib(worker / "smaps_rollup", "Pss") for worker in workers)
    else:
        seconds, cpu = [], time.process_time()
        for _ in range(BATCHES):
            start = time.perf_counter()
            next(batches)
            seconds.append(time.perf_counter() - start)
        seen["cpu"] = 1000 * (time.process_time() - cpu) / BATCHES
        seen["batch"] = 1000 * median(seconds)
    seen["peak"], seen["resident"] = mib(status, "VmHWM"), mib(status, "VmRSS")
    loader.close()
    print(json.dumps(seen))


def endless(loader: object) -> Iterator[object]:
    """Batches over the borders of what is called an epoch."""
    while True:
        yield from loader


def in_own_process(command: Path, table: Path, num_workers: int) -> dict[str, float]:
    """`measure` in a fresh process that looks to its workers as `jepa-audio` would."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "PYTHONWARNINGS": "ignore",
    }
    run = [sys.executable, str(command), str(table), str(num_workers)]
    said = subprocess.run(
        run, check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    return json.loads(said.splitlines()[-1])


def report(size: int, runs: dict[int, list[dict[str, float]]]) -> str:
    """A row of the table."""

    def of(name: str, num_workers: int = 0) -> float:
        return median(run[name] for run in runs[num_workers])

    few, many = WORKERS[0], WORKERS[-1]
    further = [(of(name, many) - of(name, few)) / (many - few) for name in ("uss", "pss")]
    sums = [" / ".join(f"{of(name, num):.0f}" for num in WORKERS) for name in ("uss", "pss")]
    starts = sorted(run["start"] for run in runs[0])
    cells = [
        f"{size:,}",
        f"{of('start'):.2f} ({starts[0]:.2f} to {starts[-1]:.2f})",
        f"{of('start', 2):.1f}",
        f"{of('batch'):.1f}",
        f"{of('cpu'):.1f}",
        *(f"{of(name):.0f}" for name in ("imported", "peak", "resident")),
        *sums,
        *(f"{mebibytes:.0f}" for mebibytes in further),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, nargs="+", default=[1_000, 100_000, 2_000_000])
    parser.add_argument(
        "--repeats", type=int, default=3, help="of the times; the memory of 1 and 4 workers: once"
    )
    args = parser.parse_args()
    (installed,) = entry_points(group="console_scripts", name="jepa-audio")
    with tempfile.TemporaryDirectory(prefix="jepa_audio_size_") as name:
        root = Path(name)
        command = root / "command.py"
        command.write_text(COMMAND.format(module=installed.module, function=installed.attr))
        paths = write_files(root, max(args.files))
        tables = {size: write_table(root, paths[:size]) for size in args.files}
        print(
            f"{', '.join(f'{size:,} files' for size in tables)}, such as {paths[0]}; command {installed.value}"
        )
        runs: dict[int, dict[int, list[dict[str, float]]]]
        runs = {size: {num_workers: [] for num_workers in (0, *WORKERS)} for size in tables}
        for repeat in range(args.repeats):
            for num_workers in (0, *WORKERS) if repeat == 0 else (0, 2):
                for size, table in tables.items():
                    runs[size][num_workers].append(in_own_process(command, table, num_workers))
    columns = [
        "files",
        "s to the first batch",
        "with 2 workers",
        "ms a batch",
        "CPU",
        "MiB after imports",
        "peak",
        "at the end",
        f"USS of {' / '.join(map(str, WORKERS))} workers",
        "PSS",
        "USS of a further worker",
        "PSS",
    ]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for size, own in runs.items():
        print(report(size, own))


if __name__ == "__main__":
    main()
