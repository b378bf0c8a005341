"""Do start time and step time depend on the number of files of a corpus?

The script writes a few short files and creates as many paths to them as requested, with links to
folders. The table then has N different sources, but the disk does not have N files. The script does
not measure the additional time of a disk that is not in the page cache, with a million real files.

Each measurement runs in a new process; the values of N alternate. The script measures:

- the seconds from `AudioDataModule(...)` to the first training batch, without imports
- the wall time and CPU time of a batch without workers
- the memory of the main process
- the memory of the workers after 20 batches: their private pages (USS, without the mapped table)
  and their share of all pages (PSS, with the table)

A worker imports the main module of the process that starts it, so every process is started in the
same way as `jepa-audio`.

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
ALBUMS, TRACKS = 200, 50  # albums per artist, tracks per album
BATCH_SIZE, WARM_UP, BATCHES = 32, 20, 300
WORKERS = (1, 2, 4)

# The script that pip writes for a command, but with a call of `measure`.
COMMAND = """
import sys
from {module} import {function}
if __name__ == "__main__":
    from benchmarks.corpus_size import measure
    measure(sys.argv[1], int(sys.argv[2]))
"""


def write_files(root: Path, num_files: int) -> list[str]:
    """Write tracks to one folder, albums and artists as links to folders; return all paths."""
    tracks = [f"{number:02d} - a title as long as titles are.wav" for number in range(TRACKS)]
    albums = [f"album_{number:06d}_with_a_name" for number in range(ALBUMS)]
    artists = [f"artist_{number:06d}" for number in range(-(-num_files // (ALBUMS * TRACKS)))]
    (root / ".tracks").mkdir()
    (root / ".albums").mkdir()
    rng = np.random.default_rng(0)
    for track in tracks:
        samples = 0.1 * rng.standard_normal(SECONDS * RATE)
        sf.write(root / ".tracks" / track, samples, RATE, subtype="PCM_16")
    for album in albums:
        (root / ".albums" / album).symlink_to("../.tracks")
    for artist in artists:
        (root / artist).symlink_to(".albums")
    paths = [
        f"{artist}/{album}/{track}" for artist in artists for album in albums for track in tracks
    ]
    return paths[:num_files]


def write_table(root: Path, paths: list[str]) -> Path:
    """Write the table that indexing these files would give."""
    # These imports are not at the top, because a worker would import them with this module.
    from jepa_audio.data.corpus.index import index_file  # noqa: PLC0415
    from jepa_audio.data.corpus.sources import DiscoveredFile  # noqa: PLC0415
    from jepa_audio.data.corpus.table import SCHEMA, Corpus  # noqa: PLC0415

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


def find_workers(process: int) -> list[Path]:
    """The folders in `/proc` of the workers, which are children of the fork server."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process has ended
        parents[int(folder.name)] = int(fields[1])
    return [
        Path(f"/proc/{child}")
        for child, server in parents.items()
        if parents.get(server) == process
    ]


def sum_mib(path: Path, *fields: str) -> float:
    """The sum of fields in kB of a file in `/proc`, in MiB."""
    lines = (line.split() for line in path.read_text().splitlines())
    return sum(int(words[1]) for words in lines if words[0].rstrip(":") in fields) / 1024


def private_mib(process: Path) -> float:
    """The size of the private pages of a process; shared mappings are in the page cache."""
    kibibytes, is_private = 0, False
    for line in (process / "smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            is_private = words[1].endswith("p")
        elif is_private and words[0] in ("Private_Clean:", "Private_Dirty:"):
            kibibytes += int(words[1])
    return kibibytes / 1024


def measure(table: str, num_workers: int) -> None:
    """Measure one process of a run and print the result as JSON."""
    import torch  # noqa: PLC0415

    from jepa_audio.data.datamodule import AudioDataModule  # noqa: PLC0415

    logging.getLogger("jepa_audio").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    status = Path("/proc/self/status")
    result = {"imported": sum_mib(status, "VmRSS")}
    start = time.perf_counter()
    data = AudioDataModule(
        table, RATE, CROP_SECONDS, batch_size=BATCH_SIZE, num_workers=num_workers
    )
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    batches = repeat(loader)
    next(batches)
    result["start"] = time.perf_counter() - start
    for _ in range(WARM_UP):
        next(batches)
    if num_workers:
        workers = find_workers(os.getpid())
        if len(workers) != num_workers:
            raise RuntimeError(f"found {len(workers)} workers, started {num_workers}")
        result["uss"] = sum(map(private_mib, workers))
        result["pss"] = sum(sum_mib(worker / "smaps_rollup", "Pss") for worker in workers)
    else:
        seconds, cpu = [], time.process_time()
        for _ in range(BATCHES):
            start = time.perf_counter()
            next(batches)
            seconds.append(time.perf_counter() - start)
        result["cpu"] = 1000 * (time.process_time() - cpu) / BATCHES
        result["batch"] = 1000 * median(seconds)
    result["peak"], result["resident"] = sum_mib(status, "VmHWM"), sum_mib(status, "VmRSS")
    loader.close()
    print(json.dumps(result))


def repeat(loader: object) -> Iterator[object]:
    """The batches of all epochs."""
    while True:
        yield from loader


def measure_in_process(command: Path, table: Path, num_workers: int) -> dict[str, float]:
    """Run `measure` in a new process that is started in the same way as `jepa-audio`."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "PYTHONWARNINGS": "ignore",
    }
    run = [sys.executable, str(command), str(table), str(num_workers)]
    result = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


def format_row(size: int, runs: dict[int, list[dict[str, float]]]) -> str:
    """One row of the table."""

    def middle(name: str, num_workers: int = 0) -> float:
        return median(run[name] for run in runs[num_workers])

    low, high = WORKERS[0], WORKERS[-1]
    further = [(middle(name, high) - middle(name, low)) / (high - low) for name in ("uss", "pss")]
    sums = [" / ".join(f"{middle(name, num):.0f}" for num in WORKERS) for name in ("uss", "pss")]
    starts = sorted(run["start"] for run in runs[0])
    cells = [
        f"{size:,}",
        f"{middle('start'):.2f} ({starts[0]:.2f} to {starts[-1]:.2f})",
        f"{middle('start', 2):.1f}",
        f"{middle('batch'):.1f}",
        f"{middle('cpu'):.1f}",
        *(f"{middle(name):.0f}" for name in ("imported", "peak", "resident")),
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
        "--repeats",
        type=int,
        default=3,
        help="of times; memory of 1 and 4 workers is measured once",
    )
    args = parser.parse_args()
    (installed,) = entry_points(group="console_scripts", name="jepa-audio")
    with tempfile.TemporaryDirectory(prefix="jepa_audio_size_") as name:
        root = Path(name)
        command = root / "command.py"
        command.write_text(COMMAND.format(module=installed.module, function=installed.attr))
        paths = write_files(root, max(args.files))
        tables = {size: write_table(root, paths[:size]) for size in args.files}
        sizes = ", ".join(f"{size:,} files" for size in tables)
        print(f"{sizes}, for example {paths[0]}; command {installed.value}")
        runs: dict[int, dict[int, list[dict[str, float]]]]
        runs = {size: {num_workers: [] for num_workers in (0, *WORKERS)} for size in tables}
        for repetition in range(args.repeats):
            for num_workers in (0, *WORKERS) if repetition == 0 else (0, 2):
                for size, table in tables.items():
                    runs[size][num_workers].append(measure_in_process(command, table, num_workers))
    columns = [
        "files",
        "s to the first batch",
        "with 2 workers",
        "ms per batch",
        "CPU",
        "MiB after imports",
        "peak",
        "at the end",
        f"USS of {' / '.join(map(str, WORKERS))} workers",
        "PSS",
        "USS per additional worker",
        "PSS",
    ]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for size, size_runs in runs.items():
        print(format_row(size, size_runs))


if __name__ == "__main__":
    main()
