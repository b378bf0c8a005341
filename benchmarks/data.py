"""How many crops per second does one core deliver, and how many cores does a GPU need?

The script reads the same music-like clips (44.1 kHz, stereo) from different sources, with the code
of training: from single flac and mp3 files, and from our shards, which are mono and have the sample
rate of the crops. For comparison, it runs a plain pipeline of the `webdataset` package, which
decodes every file completely:

- from tars of the same flac files, with a new `torchaudio.transforms.Resample` for every sample
- the same, optimised: channels are averaged first and the resampler is created once
- from our shards

The script uses one thread and no workers. It measures the computation and not the disk: the files
are in the page cache, because the script has just written them.

A round reads the same number of clips from every source, one source after the other. Ratios are
medians over the rounds. "CPU" is the CPU time per second: 1.00 if no other process used the core.

    python -m benchmarks.data [--clips 60] [--repeats 7] [--gpu_crops_per_second 200 500 1000 2000]
"""

from __future__ import annotations

import argparse
import io
import itertools
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import soundfile as sf
import torch
import torchaudio
import webdataset as wds
from jaxtyping import Float32
from torch import Tensor
from torchaudio.transforms import Resample

from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.shards import Packing, write_shards
from jepa_audio.data.datamodule import AudioDataModule
from jepa_audio.parallel import map_threads, num_cores

RATE = 44_100
NOISE = 0.0035  # white noise; with music at -26 dBFS, flac reduces the size to about 60 %
SHARDS = 4
PLAIN = "webdataset, flac tars"


@dataclass(frozen=True)
class Setting:
    """The crops of a recipe, from files of one length."""

    name: str
    sample_rate: int
    crop_seconds: float
    file_seconds: int
    crops_per_clip: int = 1

    @property
    def num_samples(self) -> int:
        """Samples of a crop."""
        return round(self.crop_seconds * self.sample_rate)


class Round(NamedTuple):
    """The measurements of a source in one round."""

    crops_per_second: float
    cpu: float
    mb_per_crop: float


def music(
    number: int, seconds: int, bank: Float32[np.ndarray, "notes S"]
) -> Float32[np.ndarray, "S 2"]:
    """Four decaying notes per second, panned between the channels, and noise."""
    rng = np.random.default_rng(number)
    clip = np.zeros((seconds * RATE, 2), np.float32)
    for start in rng.integers(len(clip), size=4 * seconds):
        note, right = bank[rng.integers(len(bank))], rng.uniform(0.2, 0.8)
        segment = clip[start : start + len(note)]
        segment += note[: len(segment), None] * np.array([1 - right, right], np.float32)
    return clip + NOISE * rng.standard_normal(clip.shape, dtype=np.float32)


def note_bank(count: int = 48, seconds: float = 2.0) -> Float32[np.ndarray, "notes S"]:
    """Notes over four octaves with decaying partials up to 17 kHz; high partials decay faster."""
    rng = np.random.default_rng(0)
    t = np.arange(round(seconds * RATE)) / RATE
    notes = np.zeros((count, len(t)), np.float32)
    for number in range(count):
        pitch = 55 * 2 ** (number / 12)
        for partial_ in range(1, min(12, int(0.4 * RATE / pitch)) + 1):
            wave = np.sin(2 * np.pi * (pitch * partial_ * t + rng.uniform()))
            notes[number] += (
                0.1 * rng.uniform(0.5, 1) / partial_ * wave * np.exp(-(1 + partial_ / 3) * t)
            )
    return notes


def write_clips(folder: Path, count: int, seconds: int) -> str:
    """Write the same clips as flac, mp3 and tars of flac; return a text with their sizes."""
    (folder / "flac").mkdir(parents=True)
    (folder / "mp3").mkdir()
    (folder / "tars").mkdir()
    bank = note_bank()

    def write(number: int) -> None:
        clip = music(number, seconds, bank)
        sf.write(folder / "flac" / f"clip_{number:04d}.flac", clip, RATE, subtype="PCM_16")
        sf.write(
            folder / "mp3" / f"clip_{number:04d}.mp3",
            clip,
            RATE,
            bitrate_mode="CONSTANT",
            compression_level=0.4,
        )

    for _ in map_threads(write, range(count), num_cores()):
        pass
    files = sorted((folder / "flac").iterdir())
    for shard in range(SHARDS):
        with wds.TarWriter(str(folder / "tars" / f"clips-{shard:03d}.tar")) as tar:
            for path in files[shard::SHARDS]:
                tar.write({"__key__": path.stem, "flac": path.read_bytes()})
    flac, mp3 = (
        sum(path.stat().st_size for path in (folder / kind).iterdir()) for kind in ("flac", "mp3")
    )
    share, kbps = flac / (count * seconds * RATE * 4), mp3 * 8 / (count * seconds) / 1000
    return f"flac {share:.0%} of the size, mp3 {kbps:.0f} kbit/s"


def write_clip_shards(folder: Path, setting: Setting) -> None:
    """Write our shards of the clips: mono, at the sample rate of the crops."""
    corpus = index_corpus(folder / "flac", num_workers=num_cores())
    size = corpus.seconds.sum() * setting.sample_rate * 2 * 0.6 / SHARDS / 1e6
    packing = Packing(sample_rate=setting.sample_rate, mono=True, shard_mb=max(1, math.ceil(size)))
    write_shards(corpus, folder / f"shards_{setting.sample_rate}", packing, num_cores())


def training_batches(root: Path, setting: Setting, batch_size: int) -> Iterator[Tensor]:
    """An endless iterator over training batches, as in a run."""
    window = setting.file_seconds if setting.crops_per_clip > 1 else None
    data = AudioDataModule(
        root,
        setting.sample_rate,
        setting.crop_seconds,
        crops_per_clip=setting.crops_per_clip,
        clip_seconds=window,
        batch_size=batch_size,
        num_workers=0,
        valid_share=0.0,
    )
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    while True:
        for batch in loader:
            yield batch.waveform


def webdataset_batches(
    folder: Path, setting: Setting, batch_size: int, decode_clip: Callable[[bytes], Tensor]
) -> Iterator[Tensor]:
    """An endless iterator over batches from tars, whose files are decoded completely."""
    rng = np.random.default_rng(0)

    def draw_crops(sample: dict[str, Any]) -> Tensor:
        clip = decode_clip(sample["flac"])
        starts = rng.integers(
            max(clip.shape[-1] - setting.num_samples, 0), size=setting.crops_per_clip, endpoint=True
        )
        return torch.stack([clip[:, start : start + setting.num_samples] for start in starts])

    tars = sorted(map(str, folder.glob("*.tar")))
    clips = (
        wds.WebDataset(tars, shardshuffle=False, resampled=True)
        .shuffle(2 * batch_size)
        .map(draw_crops)
    )
    batches = clips.batched(batch_size, collation_fn=torch.cat)
    return iter(wds.WebLoader(batches, batch_size=None, num_workers=0))


def decode(content: bytes) -> tuple[Tensor, int]:
    """Decode all samples `[C, S]` and the sample rate of a file."""
    samples, rate = sf.read(io.BytesIO(content), dtype="float32", always_2d=True)
    return torch.from_numpy(samples.T), rate


def decode_and_resample(content: bytes, sample_rate: int) -> Tensor:
    """Resample each channel with a new resampler, then average."""
    waveform, rate = decode(content)
    return Resample(rate, sample_rate)(waveform).mean(0, keepdim=True)


def decode_average_and_resample(content: bytes, resampler: Resample) -> Tensor:
    """Average the channels, then resample."""
    return resampler(decode(content)[0].mean(0, keepdim=True))


def decode_samples(content: bytes) -> Tensor:
    """Decode all samples, without resampling."""
    return decode(content)[0]


def make_streams(folder: Path, setting: Setting, batch_size: int) -> dict[str, Iterator[Tensor]]:
    """The batches of every source, in the order of a round."""
    tars, shards = folder / "tars", folder / f"shards_{setting.sample_rate}"
    simple = partial(decode_and_resample, sample_rate=setting.sample_rate)
    resampler = Resample(RATE, setting.sample_rate)
    optimized = partial(decode_average_and_resample, resampler=resampler)
    return {
        "flac files": training_batches(folder / "flac", setting, batch_size),
        "mp3 files": training_batches(folder / "mp3", setting, batch_size),
        "packed shards": training_batches(shards, setting, batch_size),
        PLAIN: webdataset_batches(tars, setting, batch_size, simple),
        "webdataset, flac tars, optimised": webdataset_batches(
            tars, setting, batch_size, optimized
        ),
        "webdataset, packed shards": webdataset_batches(
            shards, setting, batch_size, decode_samples
        ),
    }


def count_bytes_read() -> int:
    """Bytes that this process has read so far, including the page cache."""
    return int(Path("/proc/self/io").read_text().split()[1])


def time_batches(stream: Iterator[Tensor], num_batches: int, shape: tuple[int, ...]) -> Round:
    """Time `num_batches` batches of a source, and check their shape and level."""
    start, cpu, before = time.perf_counter(), time.process_time(), count_bytes_read()
    batches = list(itertools.islice(stream, num_batches))
    seconds = time.perf_counter() - start
    cpu, content = time.process_time() - cpu, count_bytes_read() - before
    for batch in batches:
        if batch.shape != shape or not (0.005 < batch.square().mean().sqrt() < 0.2):
            raise RuntimeError(
                f"expected a batch of shape {shape} with music, got {tuple(batch.shape)} with "
                f"level {float(batch.square().mean().sqrt()):.3g}"
            )
    num_crops = num_batches * shape[0]
    return Round(num_crops / seconds, cpu / seconds, content / num_crops / 1e6)


def measure(folder: Path, setting: Setting, num_clips: int, repeats: int) -> dict[str, list[Round]]:
    """Measure all rounds; sources alternate, so that a slow minute affects every source."""
    batch_size = max(1, 32 // setting.crops_per_clip)
    num_batches = -(-num_clips // batch_size)
    shape = (batch_size * setting.crops_per_clip, 1, setting.num_samples)
    sources = make_streams(folder, setting, batch_size)
    for stream in sources.values():
        time_batches(stream, 1, shape)
    rounds: dict[str, list[Round]] = {name: [] for name in sources}
    for _ in range(repeats):
        for name, stream in sources.items():
            rounds[name].append(time_batches(stream, num_batches, shape))
    return rounds


def report(setting: Setting, rounds: dict[str, list[Round]]) -> dict[str, float]:
    """Print the table, and return the median of every source."""
    columns = ["source", "crops/s per core", "min", "max", "ratio", "seconds of audio/s"]
    columns += ["MB read per crop", "CPU"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    medians = {}
    for name, results in rounds.items():
        rates = [result.crops_per_second for result in results]
        ratio = median(
            result.crops_per_second / plain.crops_per_second
            for result, plain in zip(results, rounds[PLAIN], strict=True)
        )
        medians[name] = median(rates)
        print(
            f"| {name} | {medians[name]:.1f} | {min(rates):.1f} | {max(rates):.1f} | {ratio:.2f} | "
            f"{medians[name] * setting.crop_seconds:.0f} | "
            f"{median(result.mb_per_crop for result in results):.3f} | "
            f"{median(result.cpu for result in results):.2f} |"
        )
    return medians


def report_cores(medians: dict[str, float], gpus: list[float]) -> None:
    """Print how many cores a GPU needs, for several numbers of crops per second."""
    print("\n| cores for a GPU of | " + " | ".join(f"{gpu:g} crops/s" for gpu in gpus) + " |")
    print("|---|" + "---|" * len(gpus))
    for name, rate in medians.items():
        print(f"| {name} | " + " | ".join(f"{math.ceil(gpu / rate)}" for gpu in gpus) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--clips", type=int, default=60, help="files of each length, and clips per round"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--crops_per_clip", type=int, default=16, help="in the setting with several crops"
    )
    parser.add_argument(
        "--gpu_crops_per_second", type=float, nargs="+", default=[200, 500, 1000, 2000]
    )
    args = parser.parse_args()
    logging.getLogger("jepa_audio").setLevel(logging.ERROR)
    settings = [
        Setting("WavJEPA, one crop per clip", 16_000, 2.01, 10),
        Setting(
            f"WavJEPA, {args.crops_per_clip} crops per 10 s clip",
            16_000,
            2.01,
            10,
            args.crops_per_clip,
        ),
        Setting("PupuJEPA, one crop per clip", 24_000, 10.24, 12),
    ]
    print(
        f"torch {torch.__version__}, torchaudio {torchaudio.__version__}, "
        f"libsndfile {sf.__libsndfile_version__}, webdataset {wds.__version__}; "
        f"{args.clips} clips per round, {args.repeats} rounds"
    )
    with tempfile.TemporaryDirectory(prefix="jepa_audio_data_") as name:
        folders: dict[int, Path] = {}
        for setting in settings:
            seconds = setting.file_seconds
            if seconds not in folders:
                folders[seconds] = Path(name) / f"clips_{seconds}"
                sizes = write_clips(folders[seconds], args.clips, seconds)
                print(f"clips of {seconds} s: {sizes}")
                write_clip_shards(folders[seconds], setting)
        torch.set_num_threads(1)
        for setting in settings:
            print(f"\n{setting.name}: {setting.sample_rate} Hz, {setting.crop_seconds:g} s\n")
            rounds = measure(folders[setting.file_seconds], setting, args.clips, args.repeats)
            medians = report(setting, rounds)
            if setting.name.startswith("WavJEPA"):
                report_cores(medians, args.gpu_crops_per_second)


if __name__ == "__main__":
    main()
