"""Impulse responses of simulated shoebox rooms, for users without recorded ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile as sf
from jaxtyping import Float

from jepa_audio.errors import UserError
from jepa_audio.files import atomic_path
from jepa_audio.parallel import track_progress

_HEAD_RADIUS_M = 0.0875
# Reflections of higher orders are far below the others in level.
_MAX_REFLECTION_ORDER = 24


def write_rooms(
    directory: Path,
    num_rooms: int = 100,
    num_places: int = 6,
    num_channels: int = 2,
    sample_rate: int = 16_000,
    rt60_seconds: tuple[float, float] = (0.2, 0.5),
    distance_m: tuple[float, float] = (1.5, 5.0),
    seed: int = 0,
) -> None:
    """Write impulse responses (image-source method), one folder for each room; keep existing files.

    With two channels the receiver is a pair of subcardioid microphones that point outwards, at the
    distance of two ears. Arrival times and levels differ between them as between two ears, but the
    shadow and the shape of a head are not simulated. One channel is an omnidirectional microphone.

    Args:
        directory: output folder; equal settings give equal responses.
        num_rooms: rooms, with random sizes and reverberation times.
        num_places: sources in each room, at random distances and directions.
        num_channels: 1 or 2.
        sample_rate: in Hz.
        rt60_seconds: range of the reverberation time.
        distance_m: range of the distance between source and receiver; limited by the room size.
        seed: seed of all random draws.

    Raises:
        UserError: if the settings are impossible or pyroomacoustics is not installed.
    """
    if num_channels not in {1, 2}:
        raise UserError(
            f"`num_channels` ({num_channels}) of simulated rooms must be 1 or 2; "
            "set `scenes.rirs` to a folder of impulse responses"
        )
    for room in track_progress(range(num_rooms), "simulating rooms", num_rooms):
        folder = directory / f"room-{room:04}"
        paths = [folder / f"place-{place}.wav" for place in range(num_places)]
        if all(path.exists() for path in paths):
            continue
        rng = np.random.default_rng([seed, room])
        responses = _simulate(rng, num_places, num_channels, sample_rate, rt60_seconds, distance_m)
        for path, response in zip(paths, responses, strict=True):
            with atomic_path(path) as unfinished:
                sf.write(unfinished, response.T, sample_rate, subtype="FLOAT", format="WAV")


def _simulate(
    rng: np.random.Generator,
    num_places: int,
    num_channels: int,
    sample_rate: int,
    rt60_seconds: tuple[float, float],
    distance_m: tuple[float, float],
) -> Float[np.ndarray, "P C L"]:
    """Impulse responses from P sources in one room to the microphones."""
    try:
        # An optional dependency.
        import pyroomacoustics as pra  # noqa: PLC0415
        from pyroomacoustics.directivities import DirectionVector, SubCardioid  # noqa: PLC0415
    except ImportError as error:
        raise UserError(
            "simulated rooms need pyroomacoustics: `pip install jepa-audio[scenes]`"
        ) from error
    size = rng.uniform([4.0, 4.0, 2.5], [10.0, 10.0, 4.0])
    absorption, order = pra.inverse_sabine(rng.uniform(*rt60_seconds), size)
    room = pra.ShoeBox(
        size,
        fs=sample_rate,
        materials=pra.Material(absorption),
        max_order=min(order, _MAX_REFLECTION_ORDER),
    )
    head = size * [*rng.uniform(0.35, 0.65, 2), 0.0] + [0.0, 0.0, min(1.6, size[2] / 2)]
    if num_channels == 1:
        room.add_microphone(head)
    else:
        yaw = rng.uniform(0, 2 * np.pi)
        left = _HEAD_RADIUS_M * np.array([-np.sin(yaw), np.cos(yaw), 0.0])
        outwards = [
            SubCardioid(DirectionVector(yaw + side * np.pi / 2, np.pi / 2, degrees=False))
            for side in (1, -1)
        ]
        room.add_microphone_array(
            np.stack([head + left, head - left], axis=1), directivity=outwards
        )
    for _ in range(num_places):
        room.add_source(_draw_source(rng, head, size, distance_m))
    room.compute_rir()
    num_samples = max(len(response) for channel in room.rir for response in channel)
    responses = np.zeros((num_places, num_channels, num_samples), dtype=np.float32)
    for channel, of_channel in enumerate(room.rir):
        for place, response in enumerate(of_channel):
            responses[place, channel, : len(response)] = response
    return responses


def _draw_source(
    rng: np.random.Generator, head: np.ndarray, size: np.ndarray, distance_m: tuple[float, float]
) -> Float[np.ndarray, " 3"]:
    """A source at a random distance and direction, at least 0.3 m from each wall."""
    azimuth, elevation = rng.uniform(0, 2 * np.pi), rng.uniform(-0.4, 0.4)
    horizontal = np.cos(elevation)
    direction = [np.cos(azimuth) * horizontal, np.sin(azimuth) * horizontal, np.sin(elevation)]
    return np.clip(head + rng.uniform(*distance_m) * np.array(direction), 0.3, size - 0.3)
