"""Impulse responses of simulated shoebox rooms, for users who have none: the image-source method of pyroomacoustics."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import soundfile as sf
from jaxtyping import Float

from jepa_audio.errors import UserError
from jepa_audio.parallel import track_progress

_HEAD_RADIUS_M = 0.0875
_HIGHEST_ORDER = 24  # of reflections; what comes later is far below the rest


def default_rooms(num_channels: int, sample_rate: int) -> Path:
    """Where the rooms lie that are simulated when a user has none."""
    return (
        Path.home()
        / ".cache"
        / "jepa_audio"
        / "rooms"
        / f"{num_channels}-channels-{sample_rate}-hz"
    )


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
    """Write impulse responses, one folder a room; what is already there is kept.

    The listener is a pair of microphones at the distance of two ears, turned outwards and a little
    directional: arrival times and levels differ between them as they do for a head, its shadow and
        its shape do not. One channel is a
    microphone that hears all directions alike.

    Args:
        directory: folder to write; the same settings give the same responses.
        num_rooms: shoebox rooms of drawn sizes and reverberation times.
        num_places: sources in every room, at drawn distances and directions.
        num_channels: 1 or 2.
        sample_rate: in Hz.
        rt60_seconds: bounds of the reverberation time.
        distance_m: bounds of the distance from source to listener; a small room ends it earlier.
        seed: another seed, other rooms.

    Raises:
        UserError: if the settings are impossible or pyroomacoustics is not installed.
    """
    if num_channels not in (1, 2):
        raise UserError(
            f"`num_channels` ({num_channels}) of simulated rooms must be 1 or 2; give a folder in `scenes.rirs`"
        )
    for room in track_progress(range(num_rooms), "simulating rooms", num_rooms):
        folder = directory / f"room-{room:04}"
        if folder.exists():
            continue
        unfinished = directory / f".{folder.name}.{os.getpid()}"
        unfinished.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([seed, room])
        responses = _simulate(rng, num_places, num_channels, sample_rate, rt60_seconds, distance_m)
        for place, response in enumerate(responses):
            sf.write(unfinished / f"place-{place}.wav", response.T, sample_rate, subtype="FLOAT")
        try:
            unfinished.rename(folder)
        except OSError:  # another process has been faster
            shutil.rmtree(unfinished)


def _simulate(
    rng: np.random.Generator,
    num_places: int,
    num_channels: int,
    sample_rate: int,
    rt60_seconds: tuple[float, float],
    distance_m: tuple[float, float],
) -> list[Float[np.ndarray, "C L"]]:
    try:
        import pyroomacoustics as pra  # noqa: PLC0415 (an extra: only those without impulse responses need it)
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
        max_order=min(order, _HIGHEST_ORDER),
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
        room.add_source(_place(rng, head, size, distance_m))
    room.compute_rir()
    longest = max(
        len(room.rir[ear][place]) for ear in range(num_channels) for place in range(num_places)
    )
    responses = np.zeros((num_places, num_channels, longest), dtype=np.float32)
    for place in range(num_places):
        for ear in range(num_channels):
            response = room.rir[ear][place]
            responses[place, ear, : len(response)] = response
    return list(responses)


def _place(
    rng: np.random.Generator, head: np.ndarray, size: np.ndarray, distance_m: tuple[float, float]
) -> Float[np.ndarray, " 3"]:
    """A place at a drawn distance and direction, moved into the room where it lies outside."""
    azimuth, elevation = rng.uniform(0, 2 * np.pi), rng.uniform(-0.4, 0.4)
    direction = [
        np.cos(azimuth) * np.cos(elevation),
        np.sin(azimuth) * np.cos(elevation),
        np.sin(elevation),
    ]
    return np.clip(head + rng.uniform(*distance_m) * np.array(direction), 0.3, size - 0.3)
