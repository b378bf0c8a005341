"""Clips placed in rooms with noise: dry mono in, reverberant and noisy channels out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from scipy.fft import next_fast_len
from torch import Tensor
from torch.utils.data import default_collate
from typing_extensions import override

from jepa_audio.data.audio.location import AudioLocation, AudioReadError, TarMember
from jepa_audio.data.audio.read import read
from jepa_audio.data.audio.resample import resample
from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.indexed_file import IndexedFile
from jepa_audio.data.corpus.table import CorpusError, load_corpus
from jepa_audio.data.loading.clips import (
    BadRead,
    ClipDataset,
    ClipSettings,
    CropDataset,
    fit_length,
    rows_of,
)
from jepa_audio.data.loading.file_table import FileTable
from jepa_audio.data.loading.order import SampleIndex
from jepa_audio.data.scenes.rooms import write_rooms
from jepa_audio.errors import UserError, check_bounds
from jepa_audio.steps.grid import AudioBatch, Masks
from jepa_audio.steps.masking.source import MaskSource

log = logging.getLogger(__name__)

_MAX_ROOMS_TRIED = 20


@dataclass(frozen=True)
class SceneSettings:
    """How clips are placed in scenes, as in WavJEPA-Nat (Yuksel et al., 2025, arXiv:2509.23238).

    A clip is convolved with an impulse response of a room. Noise is convolved with other impulse
    responses of the same room and added at a random ratio. Localised noise has one source; diffuse
    noise has several, each with another segment of the noise.

    Differences from WavJEPA-Nat: there all noise sources play the same segment, the ratio is set
    for each ear separately, and scenes are mixed at 32 kHz.

    Attributes:
        rirs: folder of impulse responses with as many channels as the model takes; files in one
            folder belong to one room. `None` simulates shoebox rooms, see
            `jepa_audio.data.scenes.rooms`.
        noise: folder of noise recordings; `None` adds no noise.
        snr_db: range of the ratio of clip energy to noise energy over all channels, in decibels.
        diffuse_share: share of the scenes with diffuse noise.
        diffuse_sources: smallest and largest number of sources of diffuse noise.
        fade_seconds: length of the fade-in and fade-out of the noise.
        rir_seconds: longer impulse responses are cut.
        clean_share: share of the clips that stay dry and clean, the same on all channels.

    Raises:
        UserError: if a value is out of range.
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
        low, high = self.diffuse_sources
        if not 1 <= low <= high:
            bounds = "[smallest, largest], both >= 1"
            raise UserError(f"`diffuse_sources` {self.diffuse_sources} must be {bounds}")
        if self.snr_db[0] > self.snr_db[1]:
            raise UserError(f"`snr_db` {self.snr_db} must be [lowest, highest]")
        check_bounds(self, 0, 1, "diffuse_share", "clean_share")
        for name in ("fade_seconds", "rir_seconds"):
            if (seconds := getattr(self, name)) <= 0:
                raise UserError(f"`{name}` ({seconds}) must be > 0")


class Scene(NamedTuple):
    """Impulse responses and noise of a scene; unused noise sources have a response of zeros.

    Attributes:
        source_rir: impulse response from the clip to the C output channels.
        noise_rirs: the same from each of P noise sources.
        noise: noise of the length of the clip; a shorter recording is repeated.
        envelope: gain of the noise over time, with fade-in and fade-out.
        shift: circular shift of the noise of each source, in samples.
        snr_db: energy ratio of clip and noise, both after convolution.
        clean: True if the clip stays unchanged.
    """

    source_rir: Float32[Tensor, "*B C L"]
    noise_rirs: Float32[Tensor, "*B P C L"]
    noise: Float32[Tensor, "*B S"]
    envelope: Float32[Tensor, "*B S"]
    shift: Int[Tensor, "*B P"]
    snr_db: Float[Tensor, "*B"]
    clean: Bool[Tensor, "*B"]


class SceneSample(NamedTuple):
    """One clip of a `SceneBatch`."""

    clip: Float32[Tensor, "1 S"]
    scene: Scene
    starts: Int[Tensor, " crops"]
    position: int
    step: int


class SceneBatch(NamedTuple):
    """Clips, their scenes, the first samples of the crops and the crops' rows and masks.

    `render` gives the training batch.
    """

    clip: Float32[Tensor, "B 1 S"]
    scene: Scene
    starts: Int[Tensor, "B crops"]
    row: Int[Tensor, " R"]
    num_samples: int
    masks: Masks | None = None

    def to(self, device: torch.device) -> SceneBatch:
        """Move audio and masks to a device; rows stay on the CPU, where they are needed."""
        audio = (self.clip, self.starts, *self.scene)
        clip, starts, *scene = (tensor.to(device, non_blocking=True) for tensor in audio)
        masks = None if self.masks is None else self.masks.to(device)
        return self._replace(clip=clip, starts=starts, scene=Scene(*scene), masks=masks)

    def render(self) -> AudioBatch:
        """Render the scenes on the device of the batch and cut the crops."""
        audio = render_scenes(self.clip, self.scene)
        offsets = torch.arange(self.num_samples, device=audio.device)
        num_crops, num_channels = self.starts.shape[1], audio.shape[1]
        samples = self.starts[..., None, None] + offsets  # [B, crops, 1, S']
        index = samples.expand(-1, -1, num_channels, -1)
        crops = audio[:, None].expand(-1, num_crops, -1, -1).gather(-1, index)
        return AudioBatch(crops.flatten(0, 1), self.row, masks=self.masks)


def prepare_scenes(
    settings: SceneSettings, num_channels: int, sample_rate: int, num_workers: int
) -> None:
    """Index impulse responses and noise; simulate rooms if no impulse responses are given.

    Raises:
        CorpusError: if one of the folders contains no usable file.
    """
    if settings.noise is None:
        log.warning("scenes without noise: set `data.scenes.noise` to a folder of recordings")
    rirs = _rirs_folder(settings, num_channels, sample_rate)
    if settings.rirs is None:
        write_rooms(Path(rirs), num_channels=num_channels, sample_rate=sample_rate)
    for folder in (rirs, settings.noise):
        if folder is not None:
            index_corpus(folder, num_workers=num_workers)


def _rirs_folder(settings: SceneSettings, num_channels: int, sample_rate: int) -> str:
    cache = Path.home() / ".cache" / "jepa_audio" / "rooms"
    return settings.rirs or str(cache / f"{num_channels}-channels-{sample_rate}-hz")


def render_scenes(clip: Float[Tensor, "B 1 S"], scene: Scene) -> Float[Tensor, "B C S"]:
    """Render a batch of scenes; reverberation after the end of a clip is cut."""
    num_samples, num_channels = clip.shape[-1], scene.source_rir.shape[1]
    size = next_fast_len(num_samples + scene.source_rir.shape[-1] - 1, real=True)
    index = torch.arange(num_samples, device=clip.device) + scene.shift[..., None]  # [B, P, S]
    shifted = scene.noise[:, None].expand(-1, index.shape[1], -1).gather(-1, index % num_samples)
    noise_spectra = torch.fft.rfft(shifted * scene.envelope[:, None], size)[:, :, None]
    spectra = (
        torch.fft.rfft(clip, size) * torch.fft.rfft(scene.source_rir, size),
        (noise_spectra * torch.fft.rfft(scene.noise_rirs, size)).sum(dim=1),
    )
    source, noise = (torch.fft.irfft(spectrum, size)[..., :num_samples] for spectrum in spectra)
    energy, noise_energy = (audio.square().sum(dim=(1, 2)) for audio in (source, noise))
    gain = (energy / noise_energy.clamp(min=1e-20) * 10 ** (-scene.snr_db / 10)).sqrt()
    gain = torch.where(noise_energy > 0, gain, 0.0)
    dry = clip.expand(-1, num_channels, -1)
    return torch.where(scene.clean[:, None, None], dry, source + gain[:, None, None] * noise)


class SceneDataset(ClipDataset[SceneSample, SceneBatch]):
    """Clips and random scenes; `SceneBatch` renders them for a whole batch.

    Args:
        files: files of the clips.
        settings: settings of the dry mono clips; `clip_seconds` is the length of a scene.
        random_crops: see `ClipDataset`.
        masks: see `ClipDataset`.
        scenes: settings of the scenes.
        num_channels: channels of the impulse responses.

    Raises:
        CorpusError: if no impulse response with this number of channels is usable.
    """

    def __init__(
        self,
        files: FileTable,
        settings: ClipSettings,
        random_crops: bool,
        masks: MaskSource | None,
        scenes: SceneSettings,
        num_channels: int,
    ) -> None:
        super().__init__(files, settings, random_crops, masks)
        assert settings.clip_seconds is not None and settings.clip_samples is not None
        assert settings.num_channels == 1
        self.clip_samples = settings.clip_samples
        self._scenes = scenes
        self._num_channels = num_channels
        rirs = _rirs_folder(scenes, num_channels, settings.sample_rate)
        self._rooms = _load_rooms(rirs, num_channels)
        self._noise = None
        if scenes.noise is not None:
            noise_settings = ClipSettings(
                settings.sample_rate, settings.clip_seconds, mono="random", seed=settings.seed
            )
            recordings = FileTable([load_corpus(scenes.noise).usable()])
            self._noise = CropDataset(recordings, noise_settings)

    @override
    def draw_sample(
        self, file: IndexedFile, index: SampleIndex, rng: np.random.Generator, bad: list[BadRead]
    ) -> SceneSample:
        clip = self.read_clip(file, self.clip_samples, rng)
        starts = self.draw_starts(
            clip.shape[-1], self.settings.crop_samples, self.settings.crops_per_clip, rng
        )
        scene = self._draw_scene(rng, bad)
        clip = fit_length(clip, self.clip_samples)
        return SceneSample(clip, scene, torch.tensor(starts), index.position, index.step)

    @override
    def collate_samples(self, samples: list[SceneSample]) -> SceneBatch:
        clip, scene, starts, position, step = default_collate(samples)
        row = rows_of(position, starts.shape[1])
        masks = self.draw_masks(row, step)
        return SceneBatch(clip, scene, starts, row, self.settings.crop_samples, masks)

    def _draw_scene(self, rng: np.random.Generator, bad_reads: list[BadRead]) -> Scene:
        low, high = self._scenes.diffuse_sources
        is_diffuse = rng.random() < self._scenes.diffuse_share
        num_sources = int(rng.integers(low, high, endpoint=True)) if is_diffuse else 1
        source, *noise_rirs = self._draw_responses(1 + num_sources, rng, bad_reads)
        noise, envelope = self._draw_noise(rng, bad_reads)
        return Scene(
            source,
            torch.stack([*noise_rirs, *[torch.zeros_like(source)] * (high - num_sources)]),
            noise,
            envelope,
            torch.from_numpy(rng.integers(len(noise), size=high)),
            torch.tensor(rng.uniform(*self._scenes.snr_db)),
            torch.tensor(rng.random() < self._scenes.clean_share),
        )

    def _draw_responses(
        self, count: int, rng: np.random.Generator, bad_reads: list[BadRead]
    ) -> list[Float32[Tensor, "C L"]]:
        """Draw impulse responses of one room; if one is unreadable, draw another room."""
        for _ in range(_MAX_ROOMS_TRIED):
            room = self._rooms[int(rng.integers(len(self._rooms)))]
            chosen = rng.choice(len(room), count, replace=len(room) < count)
            try:
                return [self._read_response(room[number]) for number in chosen]
            except AudioReadError as error:
                bad_reads.append(BadRead(str(error.audio), error.reason))
        raise CorpusError(f"impulse responses of {_MAX_ROOMS_TRIED} rooms in a row cannot be read")

    def _read_response(self, audio: AudioLocation) -> Float32[Tensor, "C L"]:
        samples, rate = read(audio)
        if len(samples) != self._num_channels:
            reason = f"{len(samples)} channels, the model takes {self._num_channels}"
            raise AudioReadError(audio, reason)
        sample_rate = self.settings.sample_rate
        response = resample(torch.from_numpy(samples), rate, sample_rate)
        return fit_length(response, round(self._scenes.rir_seconds * sample_rate))

    def _draw_noise(
        self, rng: np.random.Generator, bad_reads: list[BadRead]
    ) -> tuple[Float32[Tensor, " S"], Float32[Tensor, " S"]]:
        """Draw noise of the length of a clip, and its envelope; silence if there is no noise."""
        if self._noise is None:
            silence = torch.zeros(self.clip_samples)
            return silence, silence
        position, file = int(rng.integers(2**62)), int(rng.integers(len(self._noise)))
        sample, unread = self._noise[SampleIndex(position, file, step=0)]
        bad_reads += unread
        num_samples = sample.num_samples
        num_repeats = -(-self.clip_samples // num_samples)
        noise = sample.waveforms[0][0, :num_samples].repeat(num_repeats)[: self.clip_samples]
        fade_samples = max(round(self._scenes.fade_seconds * self.settings.sample_rate), 1)
        start = int(rng.integers(self.clip_samples - num_samples, endpoint=True))
        age = torch.arange(self.clip_samples) - start  # samples since the start of the noise
        envelope = (torch.minimum(age + 1, num_samples - age) / fade_samples).clamp(0, 1)
        return noise, envelope


def _load_rooms(folder: str, num_channels: int) -> list[list[AudioLocation]]:
    """Impulse responses by room: by folder, or by tar."""
    rooms: dict[Path, list[AudioLocation]] = {}
    responses = load_corpus(folder).mark_unfit(num_channels=num_channels).usable()
    for row in range(len(responses)):
        audio = responses.file(row).audio
        room = audio.path if isinstance(audio, TarMember) else audio.parent
        rooms.setdefault(room, []).append(audio)
    if not rooms:
        raise CorpusError(f"no usable impulse response of {num_channels} channels under {folder}")
    return list(rooms.values())
