"""A labelled corpus that anyone can make: notes of eleven ways of synthesis, in NSynth's layout on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from math import log, prod
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from scipy.fft import irfft, next_fast_len, rfft
from scipy.signal import iirpeak, lfilter, sosfilt
from threadpoolctl import threadpool_limits

from jepa_audio.errors import UserError

PITCHES = range(36, 85)
VELOCITIES = (25, 50, 75, 100, 127)
INSTRUMENTS = {
    "train": range(64),
    "valid": range(64, 80),
    "test": range(80, 112),
}  # of every family

_RECIPE = (
    1  # has to grow with every change of the sound, so that corpora of two recipes are never mixed
)
_INSTRUMENT_STREAM, _PLAN_STREAM = 3, 4  # of random numbers, after the three of the splits
_TABLE_SIZE = 1 << 14
Signal = NDArray[np.float64]


@dataclass(frozen=True)
class Note:
    """What one file is said to hold."""

    split: int
    number: int
    family: int
    instrument: int
    pitch: int
    velocity: int

    @property
    def note_str(self) -> str:
        """NSynth's name of the note, and of its file."""
        instrument = f"{list(FAMILIES)[self.family]}_synthetic_{self.instrument:03d}"
        return f"{instrument}-{self.pitch:03d}-{self.velocity:03d}"


_RANGES = {
    "onset": (0, 0.2),  # in clip lengths, as `decay`, `hold` and `release`
    "attack": (log(0.002), log(0.08)),  # logarithm of clip lengths
    "decay": (0.05, 0.4),
    "sustain": (0.1, 1),
    "hold": (0.2, 0.7),
    "release": (0.02, 0.3),
    "detune_cents": (-20, 20),
    "vibrato_hz": (4, 7),
    "vibrato_cents": (-30, 30),  # none below 0
    "tremolo": (-0.4, 0.4),  # none below 0
    "brightness": (-0.1, 0.1),  # added to what the velocity says
    "tilt_db": (-2.5, 2.5),  # per octave
    "ripple_db": (0, 3),
    "room_seconds": (0.02, 0.4),
    "room_level": (0, 0.8),
    "snr_db": (12, 40),
    "noise_slope": (0, 2),  # noise power falls as this power of the frequency
    "level_db": (-15, -1),  # of the peak at full velocity
}
"""Between what all that the label does not tell is drawn for every note."""


@dataclass(frozen=True)
class Score:
    """What a synthesiser plays from: one note as signals of S samples."""

    time: Signal  # seconds since the onset, 0 before it
    phase: Signal  # of the fundamental in radians, with detuning and vibrato
    envelope: Signal  # loudness from 0 to 1
    noise: Signal  # white
    harmonics: Signal  # numbers of those below the Nyquist frequency
    f0_hz: float  # without vibrato
    brightness: float  # about 0 to 1
    sample_rate: int
    timbre: np.random.Generator  # the same draws for all notes of an instrument
    rng: np.random.Generator  # of this note alone


def _cycle(phase: Signal, amplitudes: Signal) -> Signal:
    """Sum of the sine harmonics with these amplitudes, read from a table of one cycle."""
    table = irfft(np.concatenate([[0], -0.5j * _TABLE_SIZE * amplitudes]), _TABLE_SIZE)
    return table[(phase * (_TABLE_SIZE / (2 * np.pi))).astype(np.int64) & (_TABLE_SIZE - 1)]


def _resonate(
    wave: Signal, frequencies_hz: Signal, q: float, gains: Signal, sample_rate: int
) -> Signal:
    """Parallel resonators; those above the Nyquist frequency are silent."""
    heard = [(f, g) for f, g in zip(frequencies_hz, gains, strict=True) if f < 0.48 * sample_rate]
    return sum((g * lfilter(*iirpeak(f, q, fs=sample_rate), wave) for f, g in heard), 0 * wave)


def _sweep_low_pass(wave: Signal, cutoffs_hz: Signal, q: float, sample_rate: int) -> Signal:
    """Resonant two-pole low-pass whose cutoff moves from block to block."""
    omega = 2 * np.pi * np.minimum(cutoffs_hz, 0.45 * sample_rate) / sample_rate
    cos, alpha = np.cos(omega), np.sin(omega) / (2 * q)
    rows = [0.5 - 0.5 * cos, 1 - cos, 0.5 - 0.5 * cos, 1 + alpha, -2 * cos, 1 - alpha]
    sections = np.stack(rows, axis=1) / (1 + alpha[:, None])
    blocks, state = [], np.zeros((1, 2))
    for section, block in zip(sections, np.array_split(wave, cutoffs_hz.size), strict=True):
        filtered, state = sosfilt(section[None], block, zi=state)
        blocks.append(filtered)
    return np.concatenate(blocks)


def _bass(s: Score) -> Signal:
    """Subtractive: a pulse of some width through a low-pass that closes."""
    width, octaves, q = s.timbre.uniform(0.15, 0.5), s.timbre.uniform(3, 6), s.timbre.uniform(2, 8)
    pulse = _cycle(s.phase, 1 / s.harmonics) - _cycle(s.phase + 2 * np.pi * width, 1 / s.harmonics)
    closing = np.exp(-s.time[:: s.time.size // 64][:64] * s.timbre.uniform(1, 8))
    cutoffs = s.f0_hz * 2 ** (s.timbre.uniform(-1, 1) + octaves * s.brightness * closing)
    return s.envelope * _sweep_low_pass(pulse, cutoffs, q, s.sample_rate)


def _brass(s: Score) -> Signal:
    """Modified FM: the louder, the more harmonics."""
    depth = s.timbre.uniform(2, 6) * (0.3 + s.brightness) * s.envelope ** s.timbre.uniform(0.5, 2)
    depth = np.minimum(depth, 0.05 * s.harmonics.size**2)  # or it aliases
    return (
        s.envelope
        * np.exp(depth * (np.cos(s.phase) - 1))
        * np.sin(s.phase + s.timbre.uniform(0, np.pi))
    )


def _flute(s: Score) -> Signal:
    """A few harmonics, and breath noise that resonates at the pitch."""
    amplitudes = np.exp(-s.timbre.uniform(0.8, 2) * (1.6 - s.brightness) * (s.harmonics - 1))
    resonances, q = s.f0_hz * np.arange(1.0, 4), s.timbre.uniform(4, 30)
    breath = _resonate(s.noise, resonances, q, 0.5 ** np.arange(3.0), s.sample_rate)
    return s.envelope * (_cycle(s.phase, amplitudes) + s.timbre.uniform(0.3, 3) * breath)


def _guitar(s: Score) -> Signal:
    """Karplus-Strong: a noise burst in a delay line with losses."""
    damping = s.timbre.uniform(0.05, 0.5) * (1.2 - s.brightness)
    whole, fraction = divmod(s.sample_rate / s.f0_hz - 1, 1)  # the loss filter delays by one sample
    loop = np.convolve([damping / 2, 1 - damping, damping / 2], [1 - fraction, fraction])
    denominator = np.zeros(int(whole) + 4)
    denominator[0], denominator[int(whole) :] = (
        1,
        -loop * 10 ** (-3 / (s.f0_hz * s.timbre.uniform(1, 6))),
    )
    burst = s.noise * (s.time > 0) * (s.time < s.timbre.uniform(0.5, 1) / s.f0_hz)
    burst = lfilter([s.brightness], [1, s.brightness - 1], burst)
    return s.envelope * lfilter([1.0], denominator, burst)


def _keyboard(s: Score) -> Signal:
    """Frequency modulation: a body and a bright strike, both dying away."""
    ratio, strike = float(s.timbre.integers(1, 4)), float(s.timbre.integers(5, 12))
    index = s.timbre.uniform(0.5, 3) * s.brightness * np.exp(-s.time * s.timbre.uniform(1, 6))
    tine = s.timbre.uniform(0.1, 0.8) * s.brightness * np.exp(-s.time * s.timbre.uniform(8, 30))
    tine *= strike * s.f0_hz < 0.48 * s.sample_rate
    body = np.sin(s.phase + index * np.sin(ratio * s.phase)) + tine * np.sin(strike * s.phase)
    return s.envelope * np.exp(-s.time * s.timbre.uniform(0.3, 3)) * body


def _mallet(s: Score) -> Signal:
    """Modes of a struck body, from a free bar to a bell: inharmonic, high ones dying first."""
    bar, bell = np.array([1, 2.76, 5.40, 8.93, 13.3]), np.array([1, 1.19, 1.5, 2.0, 2.67])
    ratios = bar + s.timbre.uniform(0, 1) * (bell - bar)
    gains = s.timbre.uniform(0.3, 1, 5) * (
        s.timbre.uniform(0.2, 0.7) * (0.6 + s.brightness)
    ) ** np.arange(5)
    gains *= ratios * s.f0_hz < 0.48 * s.sample_rate
    losses = s.timbre.uniform(1, 8) * ratios ** s.timbre.uniform(0.3, 1)
    modes = (
        gains[:, None] * np.exp(-np.outer(losses, s.time)) * np.sin(np.outer(ratios, s.phase))
    )  # [5, S]
    return s.envelope**0.5 * modes.sum(axis=0)


def _organ(s: Score) -> Signal:
    """Nine drawbars, the lowest an octave below the pitch, and a rotating loudspeaker."""
    feet = np.array([1, 3, 2, 4, 6, 8, 10, 12, 16])  # in harmonics of that octave below
    bars = s.timbre.uniform(0, 1, 9) ** 2 * (0.4 + s.brightness) ** np.arange(9) + 0.5 * (feet == 2)
    amplitudes = np.zeros(17)
    amplitudes[feet] = bars * (feet * s.f0_hz / 2 < 0.48 * s.sample_rate)
    rotation = 1 + s.timbre.uniform(0, 0.4) * np.sin(2 * np.pi * s.timbre.uniform(0.8, 7) * s.time)
    return s.envelope**0.3 * rotation * _cycle(s.phase / 2, amplitudes[1:])


def _reed(s: Score) -> Signal:
    """A waveshaped sine: odd harmonics, and a few even ones by a bias."""
    drive, bias = (
        s.timbre.uniform(1, 5) * (0.2 + s.brightness) * (0.3 + s.envelope),
        s.timbre.uniform(0, 0.6),
    )
    reed = np.tanh(np.minimum(drive, 0.3 * s.harmonics.size) * np.sin(s.phase) + bias) - np.tanh(
        bias
    )
    return s.envelope * reed * (1 + s.timbre.uniform(0, 0.2) * s.noise)


def _string(s: Score) -> Signal:
    """A bowed sawtooth through the resonances of a body."""
    saw = _cycle(
        s.phase, s.harmonics ** -s.timbre.uniform(0.8, 1.4) * s.brightness ** (s.harmonics / 40)
    )
    bowed = saw + s.timbre.uniform(0, 0.15) * s.noise
    modes = s.timbre.uniform(0.6, 1.5) * np.array([280, 460, 700, 1200, 2300, 3200])
    body = _resonate(
        bowed, modes, s.timbre.uniform(3, 8), s.timbre.uniform(0.5, 3, 6), s.sample_rate
    )
    return s.envelope * (0.3 * bowed + body)


def _synth_lead(s: Score) -> Signal:
    """A pad of detuned voices in unison."""
    cents = s.timbre.uniform(10, 35) * np.linspace(-1, 1, 5)
    amplitudes = s.harmonics ** -(s.timbre.uniform(0.5, 1.5) + 0.8 * (1 - s.brightness))
    phases = np.outer(2 ** (cents / 1200), s.phase) + s.rng.uniform(0, 2 * np.pi, (5, 1))  # [5, S]
    return s.envelope * _cycle(phases, amplitudes).sum(axis=0)


def _vocal(s: Score) -> Signal:
    """Glottal pulses through the formants of a vowel."""
    vowels = [
        (730, 1090, 2440),
        (270, 2290, 3010),
        (530, 1840, 2480),
        (570, 840, 2410),
        (300, 870, 2240),
    ]
    formants = s.timbre.uniform(0.85, 1.25) * np.array(vowels[s.rng.integers(5)])
    pulses = (
        _cycle(s.phase, s.harmonics ** -(1.6 - 0.8 * s.brightness))
        + s.timbre.uniform(0, 0.1) * s.noise
    )
    q, gains = s.timbre.uniform(4, 12), np.array([1, 0.7, 0.4]) * s.timbre.uniform(0.6, 1.4, 3)
    return s.envelope * (0.05 * pulses + _resonate(pulses, formants, q, gains, s.sample_rate))


_VOICES = (
    _bass,
    _brass,
    _flute,
    _guitar,
    _keyboard,
    _mallet,
    _organ,
    _reed,
    _string,
    _synth_lead,
    _vocal,
)
FAMILIES: dict[str, Callable[[Score], Signal]] = {voice.__name__[1:]: voice for voice in _VOICES}
"""NSynth's eleven families in NSynth's order, each with a way of synthesis of its own."""


@dataclass(frozen=True)
class Settings:
    """What a corpus is made of: equal settings give equal bytes."""

    counts: dict[str, int]
    seconds: float
    sample_rate: int
    seed: int
    recipe: int = _RECIPE

    def __post_init__(self) -> None:
        for split, count in self.counts.items():
            if not 0 <= count <= (available := prod(self._choices(split))):
                raise UserError(
                    f"`num_{split}` ({count}) must be 0 to {available}: ask for fewer notes"
                )
        if self.seconds < 0.2:
            raise UserError(
                f"`seconds` ({self.seconds}) must be at least 0.2: ask for longer clips"
            )
        if self.sample_rate < 8000:
            raise UserError(
                f"`sample_rate` ({self.sample_rate}) must be at least 8000: ask for more"
            )

    def notes(self, split: str) -> list[Note]:
        """The notes of a split, none twice; a smaller corpus holds the first notes of a larger one."""
        number, choices = list(INSTRUMENTS).index(split), self._choices(split)
        order = np.random.default_rng([self.seed, _PLAN_STREAM, number]).permutation(prod(choices))
        chosen = np.stack(np.unravel_index(order[: self.counts[split]], choices), axis=1).tolist()
        return [
            Note(
                number,
                i,
                family,
                INSTRUMENTS[split][instrument],
                PITCHES[pitch],
                VELOCITIES[velocity],
            )
            for i, (family, instrument, pitch, velocity) in enumerate(chosen)
        ]

    @staticmethod
    def _choices(split: str) -> tuple[int, int, int, int]:
        return len(FAMILIES), len(INSTRUMENTS[split]), len(PITCHES), len(VELOCITIES)


def _score(
    note: Note, play: dict[str, float], settings: Settings, rng: np.random.Generator
) -> Score:
    rate, seconds = settings.sample_rate, settings.seconds
    time = np.maximum(np.arange(round(seconds * rate)) / rate - play["onset"] * seconds, 0)
    lengths = [0, np.exp(play["attack"]), play["decay"], play["hold"], play["release"]]
    heights = [0, 1, play["sustain"], 0.7 * play["sustain"], 0]
    envelope = np.interp(time, np.cumsum(lengths) * seconds, heights)
    vibrato_hz, depth = play["vibrato_hz"], max(play["vibrato_cents"], 0) / 1200 * log(2)
    turn = 2 * np.pi * vibrato_hz * time + rng.uniform(0, 2 * np.pi)
    f0_hz = 440 * 2 ** ((note.pitch - 69 + play["detune_cents"] / 100) / 12)
    return Score(
        time=time,
        phase=2 * np.pi * f0_hz * (time - depth / (2 * np.pi * vibrato_hz) * np.cos(turn)),
        envelope=envelope * (1 + max(play["tremolo"], 0) * np.sin(turn)),
        noise=rng.standard_normal(time.size),
        harmonics=np.arange(1.0, 0.48 * rate / f0_hz),
        f0_hz=f0_hz,
        brightness=0.15 + 0.7 * note.velocity / 127 + play["brightness"],
        sample_rate=rate,
        timbre=np.random.default_rng(
            [settings.seed, _INSTRUMENT_STREAM, note.family, note.instrument]
        ),
        rng=rng,
    )


def _record(
    dry: Signal, play: dict[str, float], sample_rate: int, rng: np.random.Generator
) -> Signal:
    """The note in a room, through an uneven microphone, over coloured noise."""
    tail = np.arange(1, round(play["room_seconds"] * sample_rate)) / sample_rate
    echoes = rng.standard_normal(tail.size) * np.exp(-6.9 * tail / play["room_seconds"])
    room = np.concatenate([[1], play["room_level"] * echoes / np.linalg.norm(echoes)])
    size = next_fast_len(dry.size + room.size, real=True)
    hz = np.arange(size // 2 + 1) * sample_rate / size
    octaves = np.log2(np.maximum(hz, 50) / 1000)
    ripple = play["ripple_db"] * np.sin(octaves * rng.uniform(1, 4) + rng.uniform(0, 2 * np.pi))
    gain = 10 ** ((play["tilt_db"] * octaves + ripple) / 20) * (
        hz > 25
    )  # a bias in the wave is not heard
    wet = irfft(rfft(dry, size) * rfft(room, size) * gain, size)[: dry.size]
    colour = 2 ** (-0.5 * play["noise_slope"] * octaves)
    noise = irfft(rfft(rng.standard_normal(size)) * colour, size)[: dry.size]
    return wet / np.linalg.norm(wet) + noise / np.linalg.norm(noise) * 10 ** (-play["snr_db"] / 20)


def render(note: Note, settings: Settings) -> tuple[NDArray[np.int16], dict[str, object]]:
    """The samples `[S]` of a note, and what NSynth's `examples.json` says of it."""
    rng = np.random.default_rng([settings.seed, note.split, note.number])
    play = {name: float(rng.uniform(low, high)) for name, (low, high) in _RANGES.items()}
    family, synthesise = list(FAMILIES.items())[note.family]
    wave = _record(synthesise(_score(note, play, settings, rng)), play, settings.sample_rate, rng)
    peak = 10 ** (play["level_db"] / 20) * (note.velocity / 127) ** 0.5
    qualities = {
        "bright": play["tilt_db"] > 1.5,
        "dark": play["tilt_db"] < -1.5,
        "distortion": False,
        "fast_decay": play["sustain"] < 0.3,
        "long_release": play["release"] > play["hold"],
        "multiphonic": False,
        "nonlinear_env": False,
        "percussive": play["attack"] < log(0.004),
        "reverb": play["room_seconds"] * play["room_level"] > 0.15,
        "tempo-synced": False,
    }
    return np.round(wave * (peak * 32767 / np.abs(wave).max())).astype(np.int16), {
        "note": note.split * 1_000_000 + note.number,
        "note_str": note.note_str,
        "instrument": note.family * sum(map(len, INSTRUMENTS.values())) + note.instrument,
        "instrument_str": note.note_str.split("-")[0],
        "instrument_family": note.family,
        "instrument_family_str": family,
        "instrument_source": 2,
        "instrument_source_str": "synthetic",
        "pitch": note.pitch,
        "velocity": note.velocity,
        "sample_rate": settings.sample_rate,
        "qualities": [int(flag) for flag in qualities.values()],
        "qualities_str": [name for name, flag in qualities.items() if flag],
    }


def _write(note: Note, directory: Path, settings: Settings) -> dict[str, object]:
    samples, example = render(note, settings)
    path = directory / f"nsynth-{list(INSTRUMENTS)[note.split]}" / "audio" / f"{note.note_str}.wav"
    soundfile.write(path, samples, settings.sample_rate, subtype="PCM_16")
    return example


def _watch(examples: Iterable[dict[str, object]], total: int) -> Iterator[dict[str, object]]:
    """The same examples, while a bar or, away from a terminal, a line every tenth of the way says how far."""
    console = Console(stderr=True)
    bar = track(
        examples, "synthesising notes", total, console=console, disable=not console.is_terminal
    )
    for done, example in enumerate(bar, 1):
        yield example
        if not console.is_terminal and 10 * done // total > 10 * (done - 1) // total:
            console.print(f"synthesised {done} of {total} notes")


def _claim(directory: Path, settings: Settings) -> bool:
    """Whether notes have to be written; refuses a directory that holds other ones."""
    wanted = asdict(settings)
    for name in ("corpus.json", "corpus.partial.json"):
        if (directory / name).exists():
            if (found := json.loads((directory / name).read_text())) != wanted:
                raise UserError(
                    f"`directory` ({directory}) holds {found}: delete it or name another one"
                )
            return name != "corpus.json"
    if strange := [path.name for path in directory.glob("nsynth-*")]:
        raise UserError(
            f"`directory` ({directory}) holds {strange} of another origin: name another one"
        )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "corpus.partial.json").write_text(json.dumps(wanted, indent=2))
    return True


def synthesize_corpus(
    directory: Path,
    *,
    num_train: int = 4000,
    num_valid: int = 500,
    num_test: int = 1000,
    seconds: float = 2.0,
    sample_rate: int = 16000,
    seed: int = 0,
    num_workers: int = 2,
) -> None:
    """Write labelled notes as 16-bit wav files and `examples.json`, in NSynth's layout.

    Every note has random numbers of its own, so the files do not depend on the number of workers. A
    complete corpus of the same settings is left as it is, an unfinished one is written anew, any
    other is refused.

    Args:
        directory: gets `nsynth-train`, `nsynth-valid` and `nsynth-test`, and at the very end
            `corpus.json`.
        num_train: notes of 64 instruments a family.
        num_valid: notes of 16 others.
        num_test: notes of 32 others again.
        seed: another seed is another corpus, instruments included.
        seconds: length of every clip.
        sample_rate: in Hz.
        num_workers: processes, 0 for none. They are spawned, so a script needs its `__main__`
            guard.
    """
    settings = Settings(
        {"train": num_train, "valid": num_valid, "test": num_test}, seconds, sample_rate, seed
    )
    if not _claim(directory, settings):
        return
    for split in INSTRUMENTS:
        (directory / f"nsynth-{split}" / "audio").mkdir(parents=True, exist_ok=True)
    notes = [note for split in INSTRUMENTS for note in settings.notes(split)]
    write = partial(_write, directory=directory, settings=settings)
    with ProcessPoolExecutor(
        max(num_workers, 1), get_context("spawn"), threadpool_limits, (1,)
    ) as pool:
        written = pool.map(write, notes, chunksize=16) if num_workers > 0 else map(write, notes)
        examples = list(_watch(written, len(notes)))
    for i, split in enumerate(INSTRUMENTS):
        of_split = {
            e["note_str"]: e for note, e in zip(notes, examples, strict=True) if note.split == i
        }
        (directory / f"nsynth-{split}" / "examples.json").write_text(json.dumps(of_split, indent=2))
    (directory / "corpus.partial.json").rename(directory / "corpus.json")
