"""Clips put into rooms with noise: dry mono in, reverberant and noisy out, one or several channels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from scipy.fft import next_fast_len
from torch import Tensor

from jepa_audio.data.audio.read import AudioLocation, AudioReadError, TarMember, read
from jepa_audio.data.audio.resample import resample
from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.table import CorpusError, IndexedFile, load_corpus
from jepa_audio.data.loading.crops import (
    BadRead,
    ChannelMode,
    ClipDataset,
    CropDataset,
    checked_clip,
    cut,
)
from jepa_audio.data.loading.file_table import FileTable
from jepa_audio.data.scenes.rooms import default_rooms, write_rooms
from jepa_audio.errors import UserError
from jepa_audio.steps.grid import AudioBatch

log = logging.getLogger(__name__)

_ROOMS_TRIED = 20


@dataclass(frozen=True)
class Scenes:
    """How clips are put into scenes, as WavJEPA-Nat is trained (Yuksel et al., 2025, arXiv:2509.23238).

    A clip is convolved with an impulse response of a room; noise, convolved with others of the same
    room, is added at a drawn ratio. Localised noise comes from one place; diffuse noise from
    several, each with another stretch of it. In WavJEPA-Nat all places give the same noise, the
    ratio is of each ear by itself, and all is mixed at 32 kHz.

    Args:
        rirs: folder of impulse responses with as many channels as the model takes; the files of one
            folder are places in one room. `None` for simulated shoebox rooms, see
            `jepa_audio.data.scenes.rooms`.
        noise: folder of noise recordings; `None` for none.
        snr_db: bounds of the drawn ratio of the clip's energy to the noise's, over all channels, in
            decibels.
        diffuse_share: share of the scenes whose noise is diffuse.
        diffuse_sources: fewest and most places of diffuse noise.
        fade_seconds: of the noise, in and out.
        rir_seconds: longer impulse responses are cut.
        clean_share: share of the clips that stay dry and clean, the same on every channel.
    """

    rirs: str | None = None
    noise: str | None = None
    snr_db: tuple[float, float] = (5.0, 40.0)
    diffuse_share: float = 0.5
    diffuse_sources: tuple[int, int] = (3, 5)
    fade_seconds: float = 0.2
    rir_seconds: float = 1.0
    clean_share: float = 0.0

    def __post_init__(self) -> None:
        fewest, most = self.diffuse_sources
        if not 1 <= fewest <= most:
            raise UserError(
                f"`diffuse_sources` {self.diffuse_sources} must be [fewest, most], both at least 1"
            )
        if self.snr_db[0] > self.snr_db[1]:
            raise UserError(f"`snr_db` {self.snr_db} must be [lowest, highest]")
        for name in ("diffuse_share", "clean_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"`{name}` ({getattr(self, name)}) must be in [0, 1]")
        if self.fade_seconds <= 0 or self.rir_seconds <= 0:
            raise UserError(
                f"`fade_seconds` ({self.fade_seconds}) and `rir_seconds` ({self.rir_seconds}) must be > 0"
            )


class Scene(NamedTuple):
    """What clips are put into; places that no noise comes from have an impulse response of zeros.

    Attributes:
        source_rir: from the clip's place to the ears.
        noise_rirs: the same for each of P places of noise.
        noise: as long as the clip, a shorter recording again and again.
        envelope: how loud the noise is, faded in and out.
        shift: samples by which the noise of each place is shifted around.
        snr_db: energy of the clip over that of the noise, both at the ears.
        clean: True where the clip stays as it is.
    """

    source_rir: Float32[Tensor, "*B C L"]
    noise_rirs: Float32[Tensor, "*B P C L"]
    noise: Float32[Tensor, "*B S"]
    envelope: Float32[Tensor, "*B S"]
    shift: Int[Tensor, "*B P"]
    snr_db: Float[Tensor, "*B"]
    clean: Bool[Tensor, "*B"]


class PlacedClip(NamedTuple):
    """One clip of a `SceneBatch`."""

    clip: Float32[Tensor, "1 S"]
    scene: Scene
    starts: list[int]
    position: int


class SceneBatch(NamedTuple):
    """Clips, their scenes, and where in them the crops begin; `render` makes the training batch, on any device."""

    clip: Float32[Tensor, "B 1 S"]
    scene: Scene
    starts: Int[Tensor, "B crops"]
    position: Int[Tensor, " B"]
    num_samples: int

    def to(self, device: torch.device) -> SceneBatch:
        """The sounds on another device; positions are read on the CPU."""
        clip, starts = (tensor.to(device, non_blocking=True) for tensor in (self.clip, self.starts))
        scene = Scene(*(tensor.to(device, non_blocking=True) for tensor in self.scene))
        return SceneBatch(clip, scene, starts, self.position, self.num_samples)

    def render(self) -> AudioBatch:
        """The crops of the scenes, numbered by their place in the order of the run."""
        sound = render(self.clip, self.scene)
        within = self.starts[..., None] + torch.arange(
            self.num_samples, device=sound.device
        )  # [B, crops, S']
        index = within[:, :, None].expand(-1, -1, sound.shape[1], -1)
        crops = sound[:, None].expand(-1, within.shape[1], -1, -1).gather(-1, index)
        row = self.position[:, None] * within.shape[1] + torch.arange(within.shape[1])
        return AudioBatch(crops.flatten(0, 1), row.flatten())


def prepare_scenes(scenes: Scenes, num_channels: int, sample_rate: int, num_workers: int) -> None:
    """Look at every impulse response and noise file once; simulate rooms where no folder is given.

    Raises:
        CorpusError: if one of the folders holds nothing usable.
    """
    if scenes.noise is None:
        log.warning("scenes without noise: set `data.scenes.noise` to a folder of recordings")
    if scenes.rirs is None:
        write_rooms(
            default_rooms(num_channels, sample_rate),
            num_channels=num_channels,
            sample_rate=sample_rate,
        )
    for folder in _folders(scenes, num_channels, sample_rate):
        index_corpus(folder, num_workers=num_workers)


def _folders(scenes: Scenes, num_channels: int, sample_rate: int) -> list[Path]:
    rirs = default_rooms(num_channels, sample_rate) if scenes.rirs is None else Path(scenes.rirs)
    return [rirs] if scenes.noise is None else [rirs, Path(scenes.noise)]


def render(clip: Float[Tensor, "B 1 S"], scene: Scene) -> Float[Tensor, "B C S"]:
    """Clips in their scenes, no longer than they are; a whole batch at once."""
    num_samples, num_channels = clip.shape[-1], scene.source_rir.shape[1]
    size = next_fast_len(num_samples + scene.source_rir.shape[-1] - 1, real=True)
    place = (
        torch.arange(num_samples, device=clip.device) + scene.shift[..., None]
    ) % num_samples  # [B, P, S]
    heard = (
        scene.noise[:, None].expand(-1, place.shape[1], -1).gather(-1, place)
        * scene.envelope[:, None]
    )
    source = torch.fft.rfft(clip, size) * torch.fft.rfft(scene.source_rir, size)
    noise = (torch.fft.rfft(heard, size)[:, :, None] * torch.fft.rfft(scene.noise_rirs, size)).sum(
        dim=1
    )
    source, noise = (
        torch.fft.irfft(spectrum, size)[..., :num_samples] for spectrum in (source, noise)
    )
    energy, noise_energy = (sound.square().sum(dim=(1, 2)) for sound in (source, noise))
    gain = (energy / noise_energy.clamp(min=1e-20) * 10 ** (-scene.snr_db / 10)).sqrt()
    gain = torch.where(noise_energy > 0, gain, 0.0)
    dry = clip.expand(-1, num_channels, -1)
    return torch.where(scene.clean[:, None, None], dry, source + gain[:, None, None] * noise)


class SceneDataset(ClipDataset[PlacedClip]):
    """Clips with all that their scenes are made of; the scenes are rendered for a whole batch, see `SceneBatch`.

    Args:
        scenes: what to draw.
        files: see `ClipDataset`.
        sample_rate: see `ClipDataset`.
        num_samples: length of the crops that will be cut from a scene.
        clip_seconds: length of a scene.
        num_channels: of the impulse responses.
        crops_per_clip: crops of one scene.
        mono: see `ClipDataset`.
        loudness_dbfs: of the clips, see `ClipDataset`.
        seed: see `ClipDataset`.
        random_crops: see `ClipDataset`.
    """

    def __init__(
        self,
        scenes: Scenes,
        files: FileTable,
        sample_rate: int,
        num_samples: int,
        *,
        clip_seconds: float | None,
        num_channels: int = 1,
        crops_per_clip: int = 1,
        mono: ChannelMode = "mean",
        loudness_dbfs: float | None = None,
        seed: int = 0,
        random_crops: bool = True,
    ) -> None:
        if mono == "keep":
            raise UserError(
                "`scenes` are made of one channel: set `mono` to 'mean', 'first' or 'random'"
            )
        super().__init__(
            files,
            sample_rate,
            mono=mono,
            loudness_dbfs=loudness_dbfs,
            seed=seed,
            random_crops=random_crops,
        )
        clip_samples = checked_clip(sample_rate, num_samples, crops_per_clip, clip_seconds)
        if clip_samples is None:
            raise UserError(
                "`scenes` need `clip_seconds`: a scene is rendered for a clip, the crops are cut from it"
            )
        self.num_samples = num_samples
        self.clip_samples = clip_samples
        self.crops_per_clip = crops_per_clip
        self._scenes = scenes
        self._num_ears = num_channels
        rirs, *noise = _folders(scenes, num_channels, sample_rate)
        self._rooms = _rooms(rirs, num_channels)
        self._noise = None
        if noise:
            recordings = FileTable([load_corpus(noise[0]).usable()])
            self._noise = CropDataset(
                recordings, sample_rate, clip_samples, mono="random", seed=seed
            )

    def draw(
        self, file: IndexedFile, position: int, rng: np.random.Generator, bad: list[BadRead]
    ) -> PlacedClip:
        """A clip of the file, and what it is put into."""
        clip = self.clip(file, self.clip_samples, rng)
        starts = self.starts(clip.shape[-1], self.num_samples, self.crops_per_clip, rng)
        return PlacedClip(cut(clip, self.clip_samples), self._scene(rng, bad), starts, position)

    def _scene(self, rng: np.random.Generator, bad: list[BadRead]) -> Scene:
        fewest, most = self._scenes.diffuse_sources
        diffuse = rng.random() < self._scenes.diffuse_share
        num_places = int(rng.integers(fewest, most, endpoint=True)) if diffuse else 1
        source, *places = self._responses(1 + num_places, rng, bad)
        noise, envelope = self._noise_clip(rng, bad)
        return Scene(
            source,
            torch.stack([*places, *[torch.zeros_like(source)] * (most - num_places)]),
            noise,
            envelope,
            torch.from_numpy(rng.integers(len(noise), size=most)),
            torch.tensor(rng.uniform(*self._scenes.snr_db)),
            torch.tensor(rng.random() < self._scenes.clean_share),
        )

    def _responses(
        self, count: int, rng: np.random.Generator, bad: list[BadRead]
    ) -> list[Float32[Tensor, "C L"]]:
        """Impulse responses of places in one room; where one cannot be read, of another room."""
        for _ in range(_ROOMS_TRIED):
            room = self._rooms[int(rng.integers(len(self._rooms)))]
            chosen = rng.choice(len(room), count, replace=len(room) < count)
            try:
                return [self._response(room[place]) for place in chosen]
            except AudioReadError as error:
                bad.append(BadRead(str(error.audio), error.reason))
        raise CorpusError(f"impulse responses of {_ROOMS_TRIED} rooms in a row cannot be read")

    def _response(self, audio: AudioLocation) -> Float32[Tensor, "C L"]:
        samples, rate = read(audio)
        response = resample(torch.from_numpy(samples), rate, self.sample_rate)
        if len(response) != self._num_ears:
            raise AudioReadError(
                audio, f"{len(response)} channels, the model takes {self._num_ears}"
            )
        return cut(response, round(self._scenes.rir_seconds * self.sample_rate))

    def _noise_clip(
        self, rng: np.random.Generator, bad: list[BadRead]
    ) -> tuple[Float32[Tensor, " S"], Float32[Tensor, " S"]]:
        if self._noise is None:
            silence = torch.zeros(self.clip_samples)
            return silence, silence
        crops, unread = self._noise[int(rng.integers(2**62)), int(rng.integers(len(self._noise)))]
        bad += unread
        num_samples = crops.num_samples
        again = crops.waveform[0, 0, :num_samples].repeat(-(-self.clip_samples // num_samples))[
            : self.clip_samples
        ]
        fade = round(self._scenes.fade_seconds * self.sample_rate)
        start = int(rng.integers(self.clip_samples - num_samples, endpoint=True))
        place = torch.arange(self.clip_samples) - start  # from the noise's first sample
        envelope = (torch.minimum(place + 1, num_samples - place) / max(fade, 1)).clamp(0, 1)
        return again, envelope


def collate_scenes(items: Sequence[PlacedClip], num_samples: int) -> SceneBatch:
    """A batch of clips with their scenes; crops of them will have `num_samples`."""
    return SceneBatch(
        torch.stack([item.clip for item in items]),
        Scene(*map(torch.stack, zip(*(item.scene for item in items), strict=True))),
        torch.tensor([item.starts for item in items]),
        torch.tensor([item.position for item in items]),
        num_samples,
    )


def _rooms(folder: Path, num_channels: int) -> list[list[AudioLocation]]:
    rooms: dict[Path, list[AudioLocation]] = {}
    responses = load_corpus(folder).mark_unfit(num_channels=num_channels).usable()
    for row in range(len(responses)):
        response = responses.file(row).audio
        rooms.setdefault(
            response.path if isinstance(response, TarMember) else response.parent, []
        ).append(response)
    if not rooms:
        raise CorpusError(f"no usable impulse response of {num_channels} channels under {folder}")
    return list(rooms.values())
