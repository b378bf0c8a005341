"""How many crops a second does one core give, and how many cores does a GPU need?

Reads the same music-like clips, 44.1 kHz stereo, from loose flac and mp3 files and from our shards
packed mono at the rate of the crops, as training does. Beside them a plain pipeline of the
`webdataset` package, which decodes every file
whole: from tars of the same flac files, resampled by a `torchaudio.transforms.Resample` made for
    every sample; the same
"with care", the channels averaged first and the resampler made once; and from our shards. One
thread, no workers, the files in the page cache (they have just been written): it is the arithmetic
that is timed, not the disk.

A round takes the same number of clips from every source in turn. Ratios are medians over the
rounds; "CPU" is the processor time per second, 1.00 if the core was ours alone.

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
NOISE = 0.0035  # white, on music of about -26 dBFS: flac then keeps about 60 % of the bytes
SHARDS = 4
PLAIN = "webdataset, flac tars"


@dataclass(frozen=True)
class Setting:
    """What is read: crops of a recipe, from files of one length."""

    name: str
    sample_rate: int
    crop_seconds: float
    file_seconds: int
    crops_per_clip: int = 1

    @property
    def num_samples(self) -> int:
        """Of a crop."""
        return round(self.crop_seconds * self.sample_rate)


class Round(NamedTuple):
    """What a source gave in one round, per second or per crop."""

    crops_per_second: float
    cpu: float
    mb_per_crop: float


def music(
    number: int, seconds: int, bank: Float32[np.ndarray, "notes S"]
) -> Float32[np.ndarray, "S 2"]:
    """Four decaying notes a second, placed between the ears, and noise."""
    rng = np.random.default_rng(number)
    clip = np.zeros((seconds * RATE, 2), np.float32)
    for start in rng.integers(len(clip), size=4 * seconds):
        note, right = bank[rng.integers(len(bank))], rng.uniform(0.2, 0.8)
        heard = clip[start : start + len(note)]
        heard += note[: len(heard), None] * np.array([1 - right, right], np.float32)
    return clip + NOISE * rng.standard_normal(clip.shape, dtype=np.float32)


def note_bank(count: int = 48, seconds: float = 2.0) -> Float32[np.ndarray, "notes S"]:
    """Notes over four octaves: partials up to 17 kHz that die away, the high ones sooner."""
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
    """The same clips as flac, mp3 and tars of flac; what they weigh."""
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
    return f"flac keeps {share:.0%} of the bytes, mp3 {kbps:.0f} kbit/s"


def write_clip_shards(folder: Path, setting: Setting) -> None:
    """Our shards of the clips, mono and at the rate of the crops."""
    corpus = index_corpus(folder / "flac", num_workers=num_cores())
    size = corpus.seconds.sum() * setting.sample_rate * 2 * 0.6 / SHARDS / 1e6
    packing = Packing(sample_rate=setting.sample_rate, mono=True, shard_mb=max(1, math.ceil(size)))
    write_shards(corpus, folder / f"shards_{setting.sample_rate}", packing, num_cores())


def ours(root: Path, setting: Setting, batch_size: int) -> Iterator[Tensor]:
    """Training batches without end, as a run gets them."""
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


def plain(
    folder: Path, setting: Setting, batch_size: int, clip_of: Callable[[bytes], Tensor]
) -> Iterator[Tensor]:
    """Batches of whole files decoded from tars, without end."""
    rng = np.random.default_rng(0)

    def crops_of(sample: dict[str, Any]) -> Tensor:
        clip = clip_of(sample["flac"])
        starts = rng.integers(
            max(clip.shape[-1] - setting.num_samples, 0), size=setting.crops_per_clip, endpoint=True
        )
        return torch.stack([clip[:, start : start + setting.num_samples] for start in starts])

    tars = sorted(map(str, folder.glob("*.tar")))
    clips = (
        wds.WebDataset(tars, shardshuffle=False, resampled=True)
        .shuffle(2 * batch_size)
        .map(crops_of)
    )
    batches = clips.batched(batch_size, collation_fn=torch.cat)
    return iter(wds.WebLoader(batches, batch_size=None, num_workers=0))


def decoded(content: bytes) -> tuple[Tensor, int]:
    samples, rate = sf.read(io.BytesIO(content), dtype="float32", always_2d=True)
    return torch.from_numpy(samples.T), rate


def resampled_each(content: bytes, sample_rate: int) -> Tensor:
    waveform, rate = decoded(content)
    return Resample(rate, sample_rate)(waveform).mean(0, keepdim=True)


def resampled_with_care(content: bytes, resampler: Resample) -> Tensor:
    return resampler(decoded(content)[0].mean(0, keepdim=True))


def as_it_is(content: bytes) -> Tensor:
    return decoded(content)[0]


def streams(folder: Path, setting: Setting, batch_size: int) -> dict[str, Iterator[Tensor]]:
    """Every source, in the order of a round."""
    tars, shards = folder / "tars", folder / f"shards_{setting.sample_rate}"
    resampler = Resample(RATE, setting.sample_rate)
    return {
        "flac files": ours(folder / "flac", setting, batch_size),
        "mp3 files": ours(folder / "mp3", setting, batch_size),
        "packed shards": ours(shards, setting, batch_size),
        PLAIN: plain(
            tars, setting, batch_size, partial(resampled_each, sample_rate=setting.sample_rate)
        ),
        "webdataset, flac tars, with care": plain(
            tars, setting, batch_size, partial(resampled_with_care, resampler=resampler)
        ),
        "webdataset, packed shards": plain(shards, setting, batch_size, as_it_is),
    }


def bytes_read() -> int:
    """By this process so far, from the page cache too."""
    return int(Path("/proc/self/io").read_text().split()[1])


def timed(stream: Iterator[Tensor], num_batches: int, shape: tuple[int, ...]) -> Round:
    """Draw batches, and look that they are what they should be."""
    start, cpu, before = time.perf_counter(), time.process_time(), bytes_read()
    batches = list(itertools.islice(stream, num_batches))
    seconds = time.perf_counter() - start
    cpu, content = time.process_time() - cpu, bytes_read() - before
    for batch in batches:
        if batch.shape != shape or not (0.005 < batch.square().mean().sqrt() < 0.2):
            raise RuntimeError(
                f"a batch of {tuple(batch.shape)}, {shape} was expected, or no music in it"
            )
    num_crops = num_batches * shape[0]
    return Round(num_crops / seconds, cpu / seconds, content / num_crops / 1e6)


def measure(folder: Path, setting: Setting, num_clips: int, repeats: int) -> dict[str, list[Round]]:
    """Rounds of every source, taking turns, so that a slow minute of the machine hits all alike."""
    batch_size = max(1, 32 // setting.crops_per_clip)
    num_batches = -(-num_clips // batch_size)
    shape = (batch_size * setting.crops_per_clip, 1, setting.num_samples)
    sources = streams(folder, setting, batch_size)
    for stream in sources.values():
        timed(stream, 1, shape)
    rounds: dict[str, list[Round]] = {name: [] for name in sources}
    for _ in range(repeats):
        for name, stream in sources.items():
            rounds[name].append(timed(stream, num_batches, shape))
    return rounds


def report(setting: Setting, rounds: dict[str, list[Round]]) -> dict[str, float]:
    """Print the table; the median of every source."""
    print(
        "| source | crops/s of a core | min | max | ratio | seconds of audio/s | MB read per crop | CPU |"
    )
    print("|---|---|---|---|---|---|---|---|")
    medians = {}
    for name, own in rounds.items():
        rates = [one.crops_per_second for one in own]
        ratio = median(
            one.crops_per_second / other.crops_per_second
            for one, other in zip(own, rounds[PLAIN], strict=True)
        )
        medians[name] = median(rates)
        print(
            f"| {name} | {medians[name]:.1f} | {min(rates):.1f} | {max(rates):.1f} | {ratio:.2f} | "
            f"{medians[name] * setting.crop_seconds:.0f} | {median(one.mb_per_crop for one in own):.3f} | "
            f"{median(one.cpu for one in own):.2f} |"
        )
    return medians


def report_cores(medians: dict[str, float], gpus: list[float]) -> None:
    """Print how many cores keep a GPU busy that takes so many crops."""
    print("\n| cores for a GPU of | " + " | ".join(f"{gpu:g} crops/s" for gpu in gpus) + " |")
    print("|---|" + "---|" * len(gpus))
    for name, rate in medians.items():
        print(f"| {name} | " + " | ".join(f"{math.ceil(gpu / rate)}" for gpu in gpus) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--clips", type=int, default=60, help="files of each length; also clips of a round"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--crops_per_clip", type=int, default=16, help="of the setting with several crops"
    )
    parser.add_argument(
        "--gpu_crops_per_second", type=float, nargs="+", default=[200, 500, 1000, 2000]
    )
    args = parser.parse_args()
    logging.getLogger("jepa_audio").setLevel(logging.ERROR)
    settings = [
        Setting("WavJEPA, a crop of a clip", 16_000, 2.01, 10),
        Setting(
            f"WavJEPA, {args.crops_per_clip} crops of a 10 s clip",
            16_000,
            2.01,
            10,
            args.crops_per_clip,
        ),
        Setting("PupuJEPA, a crop of a clip", 24_000, 10.24, 12),
    ]
    print(
        f"torch {torch.__version__}, torchaudio {torchaudio.__version__}, libsndfile {sf.__libsndfile_version__}, "
        f"webdataset {wds.__version__}; {args.clips} clips a round, {args.repeats} rounds"
    )
    with tempfile.TemporaryDirectory(prefix="jepa_audio_data_") as name:
        folders = {}
        for setting in settings:
            if setting.file_seconds not in folders:
                folder = folders[setting.file_seconds] = (
                    Path(name) / f"clips_{setting.file_seconds}"
                )
                print(
                    f"clips of {setting.file_seconds} s: {write_clips(folder, args.clips, setting.file_seconds)}"
                )
                write_clip_shards(folder, setting)
        torch.set_num_threads(1)
        for setting in settings:
            print(f"\n{setting.name}: {setting.sample_rate} Hz, {setting.crop_seconds:g} s\n")
            rounds = measure(folders[setting.file_seconds], setting, args.clips, args.repeats)
            medians = report(setting, rounds)
            if setting.name.startswith("WavJEPA"):
                report_cores(medians, args.gpu_crops_per_second)


if __name__ == "__main__":
    main()
