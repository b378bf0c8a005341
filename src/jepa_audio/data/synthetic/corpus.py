"""Plans, renders and writes the synthetic corpus; equal settings give equal bytes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from math import inf, log, prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from threadpoolctl import threadpool_limits

from jepa_audio.data.synthetic.instruments import FAMILIES, NoteSignals, Signal
from jepa_audio.errors import MAX_RATE, UserError, check_bounds
from jepa_audio.files import read_json, write_text
from jepa_audio.parallel import end_with_parent, track_progress

PITCHES = range(36, 85)
VELOCITIES = (25, 50, 75, 100, 127)
# Numbers of the instruments in each family.
INSTRUMENTS = {"train": range(64), "valid": range(64, 80), "test": range(80, 112)}

# Increase with each change of the audio, so that one corpus never mixes two versions.
_RECIPE = 1
# Seeds of random numbers; 0 to 2 are the notes of the splits.
_INSTRUMENT_STREAM, _PLAN_STREAM = 3, 4

# An entry in NSynth's `examples.json`.
Example = dict[str, Any]

# Ranges of the properties that are drawn for each note and are independent of its labels.
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
    "brightness": (-0.1, 0.1),  # added to the brightness of the velocity
    "tilt_db": (-2.5, 2.5),  # per octave
    "ripple_db": (0, 3),
    "room_seconds": (0.02, 0.4),
    "room_level": (0, 0.8),
    "snr_db": (12, 40),
    "noise_slope": (0, 2),  # noise power falls with this power of the frequency
    "level_db": (-15, -1),  # of the peak at full velocity
}


class Note(NamedTuple):
    """The labels of one file."""

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


@dataclass(frozen=True)
class CorpusSettings:
    """Settings of a corpus; `corpus.json` contains them.

    Raises:
        UserError: if a value is out of range.
    """

    counts: dict[str, int]
    seconds: float
    sample_rate: int
    seed: int
    recipe: int = _RECIPE

    def __post_init__(self) -> None:
        for split, count in self.counts.items():
            num_notes = prod(map(len, _label_choices(split)))
            if not 0 <= count <= num_notes:
                raise UserError(f"`num_{split}` ({count}) must be in [0, {num_notes}]")
        check_bounds(self, 0.2, 600, "seconds")
        check_bounds(self, 8000, MAX_RATE, "sample_rate")
        check_bounds(self, 0, inf, "seed")

    def notes(self, split: str) -> list[Note]:
        """Distinct notes of a split; a smaller corpus is the beginning of a larger one."""
        number, choices = list(INSTRUMENTS).index(split), _label_choices(split)
        sizes = [len(values) for values in choices]
        order = np.random.default_rng([self.seed, _PLAN_STREAM, number]).permutation(prod(sizes))
        chosen = np.stack(np.unravel_index(order[: self.counts[split]], sizes), axis=1).tolist()
        return [
            Note(number, i, *(values[k] for values, k in zip(choices, indices, strict=True)))
            for i, indices in enumerate(chosen)
        ]


def _label_choices(split: str) -> tuple[Sequence[int], ...]:
    """Families, instruments, pitches and velocities of the notes of a split."""
    return range(len(FAMILIES)), INSTRUMENTS[split], PITCHES, VELOCITIES


def _note_signals(
    note: Note, drawn: dict[str, float], settings: CorpusSettings, rng: np.random.Generator
) -> NoteSignals:
    rate, seconds = settings.sample_rate, settings.seconds
    time = np.maximum(np.arange(round(seconds * rate)) / rate - drawn["onset"] * seconds, 0)
    lengths = [0, np.exp(drawn["attack"]), drawn["decay"], drawn["hold"], drawn["release"]]
    heights = [0, 1, drawn["sustain"], 0.7 * drawn["sustain"], 0]
    envelope = np.interp(time, np.cumsum(lengths) * seconds, heights)
    vibrato_hz, depth = drawn["vibrato_hz"], max(drawn["vibrato_cents"], 0) / 1200 * log(2)
    vibrato = 2 * np.pi * vibrato_hz * time + rng.uniform(0, 2 * np.pi)
    instrument_seed = [settings.seed, _INSTRUMENT_STREAM, note.family, note.instrument]
    f0_hz = 440 * 2 ** ((note.pitch - 69 + drawn["detune_cents"] / 100) / 12)
    return NoteSignals(
        time=time,
        phase=2 * np.pi * f0_hz * (time - depth / (2 * np.pi * vibrato_hz) * np.cos(vibrato)),
        envelope=envelope * (1 + max(drawn["tremolo"], 0) * np.sin(vibrato)),
        noise=rng.standard_normal(time.size),
        harmonics=np.arange(1.0, 0.48 * rate / f0_hz),
        f0_hz=f0_hz,
        brightness=0.15 + 0.7 * note.velocity / 127 + drawn["brightness"],
        sample_rate=rate,
        timbre=np.random.default_rng(instrument_seed),
        rng=rng,
    )


def _record(
    dry: Signal, drawn: dict[str, float], sample_rate: int, rng: np.random.Generator
) -> Signal:
    """Simulate the recording of a note: a room, an uneven microphone and coloured noise."""
    tail = np.arange(1, round(drawn["room_seconds"] * sample_rate)) / sample_rate
    echoes = rng.standard_normal(tail.size) * np.exp(-6.9 * tail / drawn["room_seconds"])
    room = np.concatenate([[1], drawn["room_level"] * echoes / np.linalg.norm(echoes)])
    size = next_fast_len(dry.size + room.size, real=True)
    hz = np.arange(size // 2 + 1) * sample_rate / size
    octaves = np.log2(np.maximum(hz, 50) / 1000)
    ripple = drawn["ripple_db"] * np.sin(octaves * rng.uniform(1, 4) + rng.uniform(0, 2 * np.pi))
    gain = 10 ** ((drawn["tilt_db"] * octaves + ripple) / 20)
    gain *= hz > 25  # removes a constant offset of the wave
    wet = irfft(rfft(dry, size) * rfft(room, size) * gain, size)[: dry.size]
    colour = 2 ** (-0.5 * drawn["noise_slope"] * octaves)
    noise = irfft(rfft(rng.standard_normal(size)) * colour, size)[: dry.size]
    noise_level = 10 ** (-drawn["snr_db"] / 20)
    return wet / np.linalg.norm(wet) + noise / np.linalg.norm(noise) * noise_level


def render_note(note: Note, settings: CorpusSettings) -> tuple[NDArray[np.int16], Example]:
    """The samples `[S]` of a note, and its entry in NSynth's `examples.json`."""
    rng = np.random.default_rng([settings.seed, note.split, note.number])
    drawn = {name: float(rng.uniform(low, high)) for name, (low, high) in _RANGES.items()}
    family, synthesise = list(FAMILIES.items())[note.family]
    dry = synthesise(_note_signals(note, drawn, settings, rng))
    wave = _record(dry, drawn, settings.sample_rate, rng)
    peak = 10 ** (drawn["level_db"] / 20) * (note.velocity / 127) ** 0.5
    qualities = {
        "bright": drawn["tilt_db"] > 1.5,
        "dark": drawn["tilt_db"] < -1.5,
        "distortion": False,
        "fast_decay": drawn["sustain"] < 0.3,
        "long_release": drawn["release"] > drawn["hold"],
        "multiphonic": False,
        "nonlinear_env": False,
        "percussive": drawn["attack"] < log(0.004),
        "reverb": drawn["room_seconds"] * drawn["room_level"] > 0.15,
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


def _prepare_worker() -> None:
    end_with_parent()
    threadpool_limits(1)


def _write_note(note: Note, directory: Path, settings: CorpusSettings) -> Example:
    samples, example = render_note(note, settings)
    path = directory / f"nsynth-{list(INSTRUMENTS)[note.split]}" / "audio" / f"{note.note_str}.wav"
    soundfile.write(path, samples, settings.sample_rate, subtype="PCM_16")
    return example


def _report_progress(examples: Iterable[Example], total: int) -> Iterator[Example]:
    """The examples, with a progress bar, or with a line for each tenth without a terminal."""
    for done, example in enumerate(track_progress(examples, "synthesising notes", total), 1):
        yield example
        if not sys.stderr.isatty() and 10 * done // total > 10 * (done - 1) // total:
            print(f"synthesised {done} of {total} notes", file=sys.stderr)


def _is_complete(directory: Path, settings: CorpusSettings) -> bool:
    """Whether the directory contains the corpus of these settings; refuse any other corpus."""
    where = f"`directory` ({directory}) contains"
    for name in ("corpus.json", "corpus.partial.json"):
        if (directory / name).exists():
            if (found := read_json(directory / name)) != asdict(settings):
                remedy = "delete it or choose another directory"
                raise UserError(f"{where} a corpus with other settings ({found}): {remedy}")
            return name == "corpus.json"
    if names := [path.name for path in directory.glob("nsynth-*")]:
        problem = f"{names}, which this command did not write"
        raise UserError(f"{where} {problem}: choose another directory")
    return False


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
    """Write labelled notes as 16-bit wav files and `examples.json`, in the layout of NSynth.

    Each note has its own random numbers, so the files do not depend on the number of workers.
    A complete corpus with the same settings stays unchanged; an unfinished one is written again.

    Args:
        directory: output folder of `nsynth-train`, `nsynth-valid` and `nsynth-test`, and of
            `corpus.json`, which is written last.
        num_train: number of notes of 64 instruments per family.
        num_valid: number of notes of 16 other instruments per family.
        num_test: number of notes of 32 other instruments per family.
        seed: seed of all random draws, also of the instruments.
        seconds: length of each file.
        sample_rate: sample rate in Hz.
        num_workers: number of processes; 0 uses this process. They are spawned, so a script needs
            its `__main__` guard.

    Raises:
        UserError: if a setting is out of range or the directory contains other data.
    """
    counts = {"train": num_train, "valid": num_valid, "test": num_test}
    settings = CorpusSettings(counts, seconds, sample_rate, seed)
    if _is_complete(directory, settings):
        return
    partial_marker = directory / "corpus.partial.json"
    write_text(partial_marker, json.dumps(asdict(settings), indent=2))
    for split in INSTRUMENTS:
        (directory / f"nsynth-{split}" / "audio").mkdir(parents=True, exist_ok=True)
    notes = [note for split in INSTRUMENTS for note in settings.notes(split)]
    write = partial(_write_note, directory=directory, settings=settings)
    spawn = get_context("spawn")
    with ProcessPoolExecutor(max(num_workers, 1), spawn, _prepare_worker) as pool:
        results = pool.map(write, notes, chunksize=16) if num_workers > 0 else map(write, notes)
        examples = list(_report_progress(results, len(notes)))
    for number, split in enumerate(INSTRUMENTS):
        labelled = zip(notes, examples, strict=True)
        entries = {note.note_str: entry for note, entry in labelled if note.split == number}
        write_text(directory / f"nsynth-{split}" / "examples.json", json.dumps(entries, indent=2))
    partial_marker.rename(directory / "corpus.json")
