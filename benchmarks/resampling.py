"""How do resamplers compare in passband, aliases and cost, and can a probe separate their clips?

Three tables:

- the gain of a sine at 0.9 of the lower Nyquist frequency, and the level of the alias of a sine at
  1.02, 1.1 and 1.2 of it (for a higher output rate: of the image of a sine at 0.98, 0.9 and 0.8)
- CPU time on one core for a second of mono audio
- the accuracy of a linear probe that separates clips of one resampler from the same clips of
  libsoxr at its highest quality (VHQ), from the mean and the deviation of each log-mel band over
  time. Files are disjoint between training and test. The 95 % interval is a bootstrap over clips.

`jepa-audio` is the resampler of training, encoding and probing, applied to slices of files.

    python -m benchmarks.resampling [--audio FOLDER_OR_TAR] [--to_rate 16000] [--clips 1000]

The probe needs files of another rate than `--to_rate`, for example the music of Debian's package
wesnoth-1.16-music (44.1 kHz). Without `--audio`, it uses bursts of coloured noise.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import soxr
import torch
import torchaudio
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torchaudio.transforms import Resample

from jepa_audio.data.audio.read import read
from jepa_audio.data.audio.resample import resample, source_slice
from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.table import Corpus
from jepa_audio.probing.intervals import draw_counts, interval
from jepa_audio.steps.front_ends.transforms import LogMel

Resampler = Callable[[Tensor, int, int], Tensor]

CONVERSIONS = ((44_100, 16_000), (48_000, 24_000), (22_050, 16_000), (8000, 16_000))
SHARES = (0.9, 1.02, 1.1, 1.2)
# The settings of resampy's `kaiser_best`.
KAISER = {"lowpass_filter_width": 64, "rolloff": 0.9475937167399596, "beta": 14.769656459379492}
SECONDS, MARGIN_SECONDS = 1.0, 0.25


def by_torchaudio(**settings: Any) -> Resampler:
    resamplers: dict[tuple[int, int], Resample] = {}

    def apply(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
        ratio = Fraction(from_rate, to_rate)
        key = ratio.numerator, ratio.denominator
        if key not in resamplers:
            resamplers[key] = Resample(*key, **settings)
        return resamplers[key](waveform)

    return apply


def by_soxr(quality: str) -> Resampler:
    def apply(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
        return torch.from_numpy(soxr.resample(waveform[0].numpy(), from_rate, to_rate, quality))[
            None
        ]

    return apply


RESAMPLERS: dict[str, Resampler] = {
    "jepa-audio": resample,
    "soxr VHQ": by_soxr("VHQ"),
    "soxr HQ": by_soxr("HQ"),
    "soxr MQ": by_soxr("MQ"),
    "torchaudio, 64 zero crossings": by_torchaudio(
        resampling_method="sinc_interp_kaiser", **KAISER
    ),
    "torchaudio, default (used before)": by_torchaudio(),
}


def level(resampler: Resampler, from_rate: int, to_rate: int, share: float) -> float:
    """Level in dB of a sine at `share` of the lower Nyquist frequency, or of its image above it."""
    nyquist = min(from_rate, to_rate) / 2
    is_image = from_rate < to_rate and share > 1
    times = torch.arange(4 * from_rate, dtype=torch.float64) / from_rate
    sine = torch.sin(2 * math.pi * nyquist * (2 - share if is_image else share) * times)
    output = resampler(sine.float()[None], from_rate, to_rate)[0, to_rate:-to_rate].double()
    if is_image:
        spectrum = torch.fft.rfft(output * torch.signal.windows.blackman(len(output)).double())
        border = round(nyquist / to_rate * len(output))
        ratio = spectrum[border + 8 :].abs().max() / spectrum[: border - 8].abs().max()
        return 20 * math.log10(float(ratio) + 1e-12)
    return 10 * math.log10(2 * float(output.square().mean()) + 1e-24)


def cost(resampler: Resampler, from_rate: int, to_rate: int, seconds: int = 10) -> float:
    """CPU time in ms for a second of mono audio: the best of several runs."""
    waveform = torch.randn(1, seconds * from_rate, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(8):
        start = time.process_time()
        resampler(waveform, from_rate, to_rate)
        times.append(time.process_time() - start)
    return 1000 * min(times) / seconds


def report_response_and_cost() -> None:
    for from_rate, to_rate in CONVERSIONS:
        print(f"\n{from_rate} → {to_rate} Hz\n")
        names = " | ".join(f"dB at {share:g}" for share in SHARES)
        print(f"| resampler | {names} | ms per second |\n|---|{'---|' * (len(SHARES) + 1)}")
        for name, resampler in RESAMPLERS.items():
            levels = [f"{level(resampler, from_rate, to_rate, share):.2f}" for share in SHARES]
            print(f"| {name} | {' | '.join(levels)} | {cost(resampler, from_rate, to_rate):.3f} |")


def clips_of(corpus: Corpus, to_rate: int, count: int) -> Iterator[tuple[int, int, Tensor]]:
    """(number of the file, its rate, a mono clip with a margin on both sides) of random files."""
    rng = np.random.default_rng(0)
    rates = corpus.table["sample_rate"].to_numpy()
    long_enough = corpus.seconds >= SECONDS + 2 * MARGIN_SECONDS
    numbers = np.flatnonzero((rates != to_rate) & long_enough)
    drawn, counts = np.unique(rng.choice(numbers, count), return_counts=True)
    for number, num_clips in zip(drawn.tolist(), counts.tolist(), strict=True):
        samples, rate = read(corpus.file(number).audio)  # once; seeking is slow in some formats
        length = round((SECONDS + 2 * MARGIN_SECONDS) * rate)
        for start in rng.integers(samples.shape[1] - length, size=num_clips, endpoint=True):
            waveform = torch.from_numpy(samples[:, start : start + length]).mean(0, keepdim=True)
            if float(waveform.square().mean()) > 1e-8:  # -80 dBFS
                yield number, rate, waveform


def noise_bursts(count: int, from_rate: int = 44_100) -> Iterator[tuple[int, int, Tensor]]:
    """Noise with a random spectral slope, in bursts; four clips share a number."""
    rng = np.random.default_rng(0)
    length = round((SECONDS + 2 * MARGIN_SECONDS) * from_rate)
    for number in range(count):
        spectrum = np.fft.rfft(rng.standard_normal(length))
        spectrum *= np.arange(1, len(spectrum) + 1) ** -rng.uniform(0, 1)
        gate = np.repeat(rng.uniform(0, 1, 12) ** 2, -(-length // 12))[:length]
        burst = np.fft.irfft(spectrum, length) * gate
        yield number // 4, from_rate, torch.from_numpy(0.1 * burst / burst.std()).float()[None]


def middle(resampler: Resampler, waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """The clip without its margins; for jepa-audio, from the frames that it would read."""
    start, length = round(MARGIN_SECONDS * to_rate), round(SECONDS * to_rate)
    if resampler is not resample:
        return resampler(waveform, from_rate, to_rate)[:, start : start + length]
    begin, num_frames, skip = source_slice(start, length, waveform.shape[1], from_rate, to_rate)
    frames = waveform[:, begin : begin + num_frames]
    return resample(frames, from_rate, to_rate)[:, skip : skip + length]


def features(log_mel: LogMel, clip: Tensor) -> Float[np.ndarray, " D"]:
    bands = log_mel(clip[None])[0, 0]  # [F, T]
    return torch.cat([bands.mean(1), bands.std(1)]).numpy()


def report_probe(clips: list[tuple[int, int, Tensor]], to_rate: int) -> None:
    log_mel = LogMel(to_rate, n_fft=1024, hop_length=to_rate // 100, n_mels=128)
    numbers = np.array([number for number, _, _ in clips])
    files = np.unique(numbers)
    is_test = np.isin(numbers, np.random.default_rng(1).permutation(files)[: 2 * len(files) // 5])
    counts = draw_counts(int(is_test.sum()))
    computed = {
        name: np.stack(
            [features(log_mel, middle(resampler, clip, rate, to_rate)) for _, rate, clip in clips]
        )
        for name, resampler in RESAMPLERS.items()
    }
    reference = computed["soxr VHQ"]
    print(f"\n{len(clips)} clips of {len(files)} files, {is_test.sum()} of them for the test\n")
    print(
        "| resampler | accuracy against soxr VHQ | largest difference of log-mel |\n|---|---|---|"
    )
    for name, values in computed.items():
        if name == "soxr VHQ":
            continue
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=10, max_iter=2000))
        train = ~is_test
        labels = np.repeat([0, 1], train.sum())
        probe.fit(np.concatenate([reference[train], values[train]]), labels)
        # Each test clip counts with both of its versions.
        correct = (probe.predict(reference[is_test]) == 0).astype(float)
        correct += probe.predict(values[is_test]) == 1
        low, high = interval(counts @ correct / (2 * len(correct)))
        difference = np.abs(values - reference).max()
        accuracy = correct.mean() / 2
        print(f"| {name} | {accuracy:.3f} [{low:.3f}, {high:.3f}] | {difference:.2g} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--audio", help="folder, tar or other source of the clips for the probe")
    parser.add_argument("--to_rate", type=int, default=16_000)
    parser.add_argument("--clips", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"soxr {soxr.__version__}, torchaudio {torchaudio.__version__}, torch {torch.__version__}"
    )
    report_response_and_cost()
    if args.audio is None:
        clips = list(noise_bursts(args.clips))
    else:
        with TemporaryDirectory(prefix="jepa_audio_resampling_") as folder:
            corpus = index_corpus(args.audio, Path(folder) / "t.parquet").usable()
            clips = list(clips_of(corpus, args.to_rate, args.clips))
    report_probe(clips, args.to_rate)


if __name__ == "__main__":
    main()
