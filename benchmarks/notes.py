"""Notes of General-MIDI instruments: rendering by fluidsynth, recordings that instruments share."""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from jaxtyping import Float32

from jepa_audio.data.audio.resample import resample
from jepa_audio.errors import UserError

SAMPLE_RATE = 16_000
SECONDS, HELD_SECONDS = 2.0, 1.5  # length of a file; time from note-on to note-off
_RENDER_RATE = 44_100  # of the samples in FluidR3: fluidsynth's interpolation has no low-pass
_GAIN = 1.0
_NOTES_PER_CALL = 500
_SILENT = 1e-4
_TICKS = 500  # ticks per quarter note; at MIDI's default tempo, a tick is 1 ms
# Numbers of the generators in SoundFont 2.01, section 8.1.2.
_INSTRUMENT, _SAMPLE_ID = 41, 53


@dataclass(frozen=True, order=True)
class Note:
    """A note; `program` counts from 0, `pitch` and `velocity` are MIDI numbers."""

    program: int
    pitch: int
    velocity: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.program:03d}-{self.pitch:03d}-{self.velocity:03d}.wav"


def read_samples(soundfont: Path) -> dict[int, set[str]]:
    """The checksums of the recordings that each program of bank 0 uses.

    Source: SoundFont technical specification 2.01, section 7.

    Raises:
        UserError: if the file is not a SoundFont.
    """
    data = soundfont.read_bytes()
    if data[:4] != b"RIFF" or data[8:12] != b"sfbk":
        raise UserError(f"{soundfont} is not a SoundFont file (.sf2)")
    chunks: dict[bytes, memoryview] = {}
    for name, content in _chunks(memoryview(data)[12:]):
        if name == b"LIST":
            chunks.update(_chunks(content[4:]))

    def records(name: bytes, layout: str) -> list[tuple]:
        return list(struct.iter_unpack(layout, chunks[name]))

    def find(
        owners: Sequence[int], bags: list[tuple], generators: list[tuple], kind: int
    ) -> list[set[int]]:
        """The values of one generator of each preset or instrument, from its first bag."""
        return [
            {
                value
                for bag in range(start, end)
                for number, value in generators[bags[bag][0] : bags[bag + 1][0]]
                if number == kind
            }
            for start, end in pairwise(owners)
        ]

    presets, instruments = records(b"phdr", "<20sHHHIII"), records(b"inst", "<20sH")
    of_presets = find(
        [preset[3] for preset in presets],
        records(b"pbag", "<HH"),
        records(b"pgen", "<HH"),
        _INSTRUMENT,
    )
    of_instruments = find(
        [instrument[1] for instrument in instruments],
        records(b"ibag", "<HH"),
        records(b"igen", "<HH"),
        _SAMPLE_ID,
    )
    checksums = [
        hashlib.sha256(chunks[b"smpl"][2 * start : 2 * end]).hexdigest()
        for _, start, end, *_ in records(b"shdr", "<20sIIIIIBbHH")
    ]
    return {
        preset[1]: {
            checksums[sample] for instrument in used for sample in of_instruments[instrument]
        }
        for preset, used in zip(presets, of_presets, strict=False)
        if preset[2] == 0
    }


def _chunks(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """The chunks of RIFF data: name and content."""
    start = 0
    while start + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, start)
        yield name, data[start + 8 : start + 8 + size]
        start += 8 + size + size % 2


def midi_file(notes: Sequence[Note]) -> bytes:
    """A standard MIDI file with one track: a note begins every `SECONDS`.

    A note ends after `HELD_SECONDS`. 10 ms before the next note, all sound is switched off
    (controller 120), so that no note sounds in the file of another note.
    """
    track = bytearray()
    last = 0

    def add(milliseconds: int, *message: int) -> None:
        nonlocal last
        delta, last = milliseconds - last, milliseconds
        groups = [delta & 0x7F]
        while delta := delta >> 7:
            groups.insert(0, 0x80 | (delta & 0x7F))
        track.extend([*groups, *message])

    for index, note in enumerate(notes):
        start, end = round(1000 * SECONDS * index), round(1000 * SECONDS * (index + 1))
        add(start, 0xC0, note.program)
        add(start, 0x90, note.pitch, note.velocity)
        add(start + round(1000 * HELD_SECONDS), 0x80, note.pitch, 0)
        add(end - 10, 0xB0, 120, 0)
    add(round(1000 * SECONDS * len(notes)) + 500, 0xFF, 0x2F, 0)
    header = struct.pack(">4sIHHH", b"MThd", 6, 0, 1, _TICKS)
    return header + struct.pack(">4sI", b"MTrk", len(track)) + bytes(track)


def render(soundfont: Path, notes: Sequence[Note], folder: Path) -> list[Note]:
    """Write each note as a mono wav file of 16 bits; return the silent notes.

    fluidsynth renders without reverberation and chorus. Silent notes are not written.

    Raises:
        UserError: if fluidsynth is missing or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    silent = []
    for start in range(0, len(notes), _NOTES_PER_CALL):
        group = notes[start : start + _NOTES_PER_CALL]
        for note, waveform in zip(group, _render_group(soundfont, group), strict=True):
            peak = np.abs(waveform).max()
            if peak < _SILENT:
                silent.append(note)
                continue
            if peak > 1:
                raise UserError(f"{note.name} of {soundfont} is clipped: lower `_GAIN`")
            resampled = resample(torch.from_numpy(waveform)[None], _RENDER_RATE, SAMPLE_RATE)[0]
            sf.write(folder / note.name, resampled.numpy(), SAMPLE_RATE, subtype="PCM_16")
    return silent


def _render_group(soundfont: Path, notes: Sequence[Note]) -> Iterator[Float32[np.ndarray, " S"]]:
    """The notes of one call of fluidsynth; the two channels are averaged."""
    command = shutil.which("fluidsynth")
    if command is None:
        raise UserError("fluidsynth is not installed: apt install fluidsynth")
    num_samples = round(SECONDS * _RENDER_RATE)
    with tempfile.TemporaryDirectory() as name:
        midi, audio = Path(name) / "notes.mid", Path(name) / "notes.wav"
        midi.write_bytes(midi_file(notes))
        settings = ["-n", "-i", "-q", "-R", "0", "-C", "0", "-g", str(_GAIN)]
        output = ["-r", str(_RENDER_RATE), "-T", "wav", "-O", "float", "-F", str(audio)]
        result = subprocess.run(
            [command, *settings, *output, str(soundfont), str(midi)],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode or not audio.exists():
            message = " ".join(result.stderr.split())[-300:]
            raise UserError(f"{command} failed ({result.returncode}) with {soundfont}: {message}")
        with sf.SoundFile(audio) as file:
            for note in notes:
                frames = file.read(num_samples, dtype="float32", always_2d=True)
                if len(frames) < num_samples:
                    raise UserError(f"{command} stopped before {note.name} of {len(notes)} notes")
                yield frames.mean(axis=1)
