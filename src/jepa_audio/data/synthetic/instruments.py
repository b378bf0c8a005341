"""Eleven instrument families, each with its own synthesis method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft
from scipy.signal import iirpeak, lfilter, sosfilt

Signal = NDArray[np.float64]
_TABLE_SIZE = 1 << 14
_FORMANTS_HZ = (
    (730, 1090, 2440),
    (270, 2290, 3010),
    (530, 1840, 2480),
    (570, 840, 2410),
    (300, 870, 2240),
)


@dataclass(frozen=True)
class NoteSignals:
    """The input of a synthesiser: one note as signals of S samples.

    Attributes:
        time: seconds since the onset; 0 before the onset.
        phase: phase of the fundamental in radians, with detuning and vibrato.
        envelope: loudness from 0 to 1.
        noise: white noise.
        harmonics: numbers of the harmonics below the Nyquist frequency.
        f0_hz: fundamental frequency without vibrato.
        brightness: about 0 to 1.
        sample_rate: sample rate in Hz.
        timbre: generator with the same draws for all notes of an instrument.
        rng: generator of this note alone.
    """

    time: Signal
    phase: Signal
    envelope: Signal
    noise: Signal
    harmonics: Signal
    f0_hz: float
    brightness: float
    sample_rate: int
    timbre: np.random.Generator
    rng: np.random.Generator


def _sum_harmonics(phase: Signal, amplitudes: Signal) -> Signal:
    """Sum of sine harmonics with these amplitudes, read from a table of one period."""
    table = irfft(np.concatenate([[0], -0.5j * _TABLE_SIZE * amplitudes]), _TABLE_SIZE)
    return table[(phase * (_TABLE_SIZE / (2 * np.pi))).astype(np.int64) & (_TABLE_SIZE - 1)]


def _resonate(
    wave: Signal, frequencies_hz: Signal, q: float, gains: Signal, sample_rate: int
) -> Signal:
    """Parallel resonators; those near or above the Nyquist frequency are omitted."""
    total = np.zeros_like(wave)
    for hz, gain in zip(frequencies_hz, gains, strict=True):
        if hz < 0.48 * sample_rate:
            total += gain * lfilter(*iirpeak(hz, q, fs=sample_rate), wave)
    return total


def _sweep_low_pass(wave: Signal, cutoffs_hz: Signal, q: float, sample_rate: int) -> Signal:
    """Resonant two-pole low-pass with one cutoff frequency per block."""
    omega = 2 * np.pi * np.minimum(cutoffs_hz, 0.45 * sample_rate) / sample_rate
    cos, alpha = np.cos(omega), np.sin(omega) / (2 * q)
    rows = [0.5 - 0.5 * cos, 1 - cos, 0.5 - 0.5 * cos, 1 + alpha, -2 * cos, 1 - alpha]
    sections = np.stack(rows, axis=1) / (1 + alpha[:, None])
    blocks, state = [], np.zeros((1, 2))
    for section, block in zip(sections, np.array_split(wave, cutoffs_hz.size), strict=True):
        filtered, state = sosfilt(section[None], block, zi=state)
        blocks.append(filtered)
    return np.concatenate(blocks)


def bass(s: NoteSignals) -> Signal:
    """Subtractive synthesis: a pulse wave through a low-pass filter that closes."""
    width, octaves, q = s.timbre.uniform(0.15, 0.5), s.timbre.uniform(3, 6), s.timbre.uniform(2, 8)
    rising = _sum_harmonics(s.phase, 1 / s.harmonics)
    falling = _sum_harmonics(s.phase + 2 * np.pi * width, 1 / s.harmonics)
    closing = np.exp(-s.time[:: s.time.size // 64][:64] * s.timbre.uniform(1, 8))
    cutoffs = s.f0_hz * 2 ** (s.timbre.uniform(-1, 1) + octaves * s.brightness * closing)
    return s.envelope * _sweep_low_pass(rising - falling, cutoffs, q, s.sample_rate)


def brass(s: NoteSignals) -> Signal:
    """Modified frequency modulation: louder notes have more harmonics."""
    depth = s.timbre.uniform(2, 6) * (0.3 + s.brightness) * s.envelope ** s.timbre.uniform(0.5, 2)
    depth = np.minimum(depth, 0.05 * s.harmonics.size**2)  # the limit prevents aliasing
    carrier = np.sin(s.phase + s.timbre.uniform(0, np.pi))
    return s.envelope * np.exp(depth * (np.cos(s.phase) - 1)) * carrier


def flute(s: NoteSignals) -> Signal:
    """A few harmonics, and breath noise with resonances at the pitch."""
    amplitudes = np.exp(-s.timbre.uniform(0.8, 2) * (1.6 - s.brightness) * (s.harmonics - 1))
    resonances, q = s.f0_hz * np.arange(1.0, 4), s.timbre.uniform(4, 30)
    breath = _resonate(s.noise, resonances, q, 0.5 ** np.arange(3.0), s.sample_rate)
    return s.envelope * (_sum_harmonics(s.phase, amplitudes) + s.timbre.uniform(0.3, 3) * breath)


def guitar(s: NoteSignals) -> Signal:
    """Karplus-Strong synthesis: a noise burst in a delay line with losses."""
    damping = s.timbre.uniform(0.05, 0.5) * (1.2 - s.brightness)
    # The loss filter delays by one sample.
    delay, fraction = divmod(s.sample_rate / s.f0_hz - 1, 1)
    loop = np.convolve([damping / 2, 1 - damping, damping / 2], [1 - fraction, fraction])
    denominator = np.zeros(int(delay) + 4)
    denominator[0] = 1
    denominator[int(delay) :] = -loop * 10 ** (-3 / (s.f0_hz * s.timbre.uniform(1, 6)))
    burst = s.noise * (s.time > 0) * (s.time < s.timbre.uniform(0.5, 1) / s.f0_hz)
    burst = lfilter([s.brightness], [1, s.brightness - 1], burst)
    return s.envelope * lfilter([1.0], denominator, burst)


def keyboard(s: NoteSignals) -> Signal:
    """Frequency modulation: a body and a bright attack, both decaying."""
    ratio, tine_ratio = float(s.timbre.integers(1, 4)), float(s.timbre.integers(5, 12))
    index = s.timbre.uniform(0.5, 3) * s.brightness * np.exp(-s.time * s.timbre.uniform(1, 6))
    tine = s.timbre.uniform(0.1, 0.8) * s.brightness * np.exp(-s.time * s.timbre.uniform(8, 30))
    tine *= tine_ratio * s.f0_hz < 0.48 * s.sample_rate
    body = np.sin(s.phase + index * np.sin(ratio * s.phase)) + tine * np.sin(tine_ratio * s.phase)
    return s.envelope * np.exp(-s.time * s.timbre.uniform(0.3, 3)) * body


def mallet(s: NoteSignals) -> Signal:
    """Inharmonic modes between those of a free bar and a bell; high modes decay first."""
    bar, bell = np.array([1, 2.76, 5.40, 8.93, 13.3]), np.array([1, 1.19, 1.5, 2.0, 2.67])
    ratios = bar + s.timbre.uniform(0, 1) * (bell - bar)
    gains = s.timbre.uniform(0.3, 1, 5)
    gains *= (s.timbre.uniform(0.2, 0.7) * (0.6 + s.brightness)) ** np.arange(5)
    gains *= ratios * s.f0_hz < 0.48 * s.sample_rate
    losses = s.timbre.uniform(1, 8) * ratios ** s.timbre.uniform(0.3, 1)
    decays = np.exp(-np.outer(losses, s.time))
    modes = gains[:, None] * decays * np.sin(np.outer(ratios, s.phase))  # [5, S]
    return s.envelope**0.5 * modes.sum(axis=0)


def organ(s: NoteSignals) -> Signal:
    """Nine drawbars, the lowest an octave below the pitch, and a rotating loudspeaker."""
    # Harmonics of the octave below the pitch.
    drawbars = np.array([1, 3, 2, 4, 6, 8, 10, 12, 16])
    levels = s.timbre.uniform(0, 1, 9) ** 2 * (0.4 + s.brightness) ** np.arange(9)
    levels += 0.5 * (drawbars == 2)
    amplitudes = np.zeros(17)
    amplitudes[drawbars] = levels * (drawbars * s.f0_hz / 2 < 0.48 * s.sample_rate)
    rotation = 1 + s.timbre.uniform(0, 0.4) * np.sin(2 * np.pi * s.timbre.uniform(0.8, 7) * s.time)
    return s.envelope**0.3 * rotation * _sum_harmonics(s.phase / 2, amplitudes[1:])


def reed(s: NoteSignals) -> Signal:
    """A waveshaped sine: odd harmonics, and a few even ones because of a bias."""
    drive = s.timbre.uniform(1, 5) * (0.2 + s.brightness) * (0.3 + s.envelope)
    drive, bias = np.minimum(drive, 0.3 * s.harmonics.size), s.timbre.uniform(0, 0.6)
    wave = np.tanh(drive * np.sin(s.phase) + bias) - np.tanh(bias)
    return s.envelope * wave * (1 + s.timbre.uniform(0, 0.2) * s.noise)


def string(s: NoteSignals) -> Signal:
    """A bowed sawtooth through the resonances of a body."""
    amplitudes = s.harmonics ** -s.timbre.uniform(0.8, 1.4) * s.brightness ** (s.harmonics / 40)
    bowed = _sum_harmonics(s.phase, amplitudes) + s.timbre.uniform(0, 0.15) * s.noise
    modes = s.timbre.uniform(0.6, 1.5) * np.array([280, 460, 700, 1200, 2300, 3200])
    q, gains = s.timbre.uniform(3, 8), s.timbre.uniform(0.5, 3, 6)
    return s.envelope * (0.3 * bowed + _resonate(bowed, modes, q, gains, s.sample_rate))


def synth_lead(s: NoteSignals) -> Signal:
    """Five detuned voices in unison."""
    cents = s.timbre.uniform(10, 35) * np.linspace(-1, 1, 5)
    amplitudes = s.harmonics ** -(s.timbre.uniform(0.5, 1.5) + 0.8 * (1 - s.brightness))
    phases = np.outer(2 ** (cents / 1200), s.phase) + s.rng.uniform(0, 2 * np.pi, (5, 1))  # [5, S]
    return s.envelope * _sum_harmonics(phases, amplitudes).sum(axis=0)


def vocal(s: NoteSignals) -> Signal:
    """Glottal pulses through the formants of a vowel."""
    size = s.timbre.uniform(0.85, 1.25)
    formants = size * np.array(_FORMANTS_HZ[s.rng.integers(len(_FORMANTS_HZ))])
    pulses = _sum_harmonics(s.phase, s.harmonics ** -(1.6 - 0.8 * s.brightness))
    pulses += s.timbre.uniform(0, 0.1) * s.noise
    q, gains = s.timbre.uniform(4, 12), np.array([1, 0.7, 0.4]) * s.timbre.uniform(0.6, 1.4, 3)
    return s.envelope * (0.05 * pulses + _resonate(pulses, formants, q, gains, s.sample_rate))


_FUNCTIONS = (bass, brass, flute, guitar, keyboard, mallet, organ, reed, string, synth_lead, vocal)
FAMILIES: dict[str, Callable[[NoteSignals], Signal]] = {f.__name__: f for f in _FUNCTIONS}
"""NSynth's eleven families in NSynth's order, and their synthesisers."""
