"""Scenes: convolution, noise ratio, ranges of the random draws, and simulated rooms."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from scipy.signal import fftconvolve

from jepa_audio.cli.models import stats
from jepa_audio.data.corpus.table import CorpusError
from jepa_audio.data.datamodule import AudioDataModule
from jepa_audio.data.loading.order import SampleIndex
from jepa_audio.data.scenes.rooms import write_rooms
from jepa_audio.data.scenes.scenes import (
    Scene,
    SceneBatch,
    SceneDataset,
    SceneSettings,
    prepare_scenes,
    render_scenes,
)
from jepa_audio.errors import UserError
from jepa_audio.steps.front_ends import SpectrogramFrontEnd
from jepa_audio.steps.front_ends.transforms import LogMel

RATE = 8000
SECONDS = 0.5


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Three rooms of four sources, two noise files (one shorter than a clip), four audio files."""
    noise = np.random.default_rng(0)
    paths = {name: tmp_path / name for name in ("rirs", "noise", "sounds")}
    for room in range(3):
        (paths["rirs"] / f"room{room}").mkdir(parents=True)
        for place in range(4):
            response = np.zeros((200, 2), np.float32)
            response[5 + 3 * place, 0] = response[8 + 3 * place, 1] = 1.0
            response[50:, :] = 0.02 * noise.standard_normal((150, 2))
            sf.write(
                paths["rirs"] / f"room{room}" / f"{place}.wav", response, RATE, subtype="FLOAT"
            )
    for name, seconds in (("noise", (2.0, 0.2)), ("sounds", (1.0, 0.8, 0.6, 0.2))):
        paths[name].mkdir()
        for number, length in enumerate(seconds):
            sound = 0.1 * noise.standard_normal(round(length * RATE))
            sf.write(paths[name] / f"{number}.wav", sound, RATE, subtype="FLOAT")
    return paths


def scenes_of(folders: dict[str, Path], **settings: object) -> SceneSettings:
    return SceneSettings(rirs=str(folders["rirs"]), noise=str(folders["noise"]), **settings)


def data_of(folders: dict[str, Path], scenes: SceneSettings, **settings: object) -> AudioDataModule:
    sizes = {"crops_per_clip": 3, "clip_seconds": SECONDS, "batch_size": 4, "num_workers": 0}
    settings = {**sizes, "num_channels": 2, "valid_share": 0.0, **settings}
    data = AudioDataModule(folders["sounds"], RATE, 0.1, scenes=scenes, **settings)
    data.prepare_data()
    data.setup("fit")
    return data


def dataset_of(folders: dict[str, Path], **settings: object) -> SceneDataset:
    return data_of(folders, scenes_of(folders, **settings)).dataset("train", random_crops=True)


def draw_batch(dataset: SceneDataset, positions: Sequence[int]) -> SceneBatch:
    return dataset.collate_samples(
        [dataset[SampleIndex(position, position % 4)][0] for position in positions]
    )


def convolve(clip: np.ndarray, rirs: torch.Tensor) -> np.ndarray:
    return np.stack([fftconvolve(clip, rir)[:4000] for rir in rirs.numpy()])


def test_a_scene_is_a_sum_of_convolutions(folders: dict[str, Path]):
    batch = draw_batch(dataset_of(folders), range(6))
    audio = render_scenes(batch.clip, batch.scene)
    assert audio.shape == (6, 2, 4000)
    for row in range(6):
        scene = Scene(*(tensor[row] for tensor in batch.scene))
        source, noise = convolve(batch.clip[row, 0].numpy(), scene.source_rir), np.zeros((2, 4000))
        for rirs, shift in zip(scene.noise_rirs, scene.shift.tolist(), strict=True):
            noise += convolve(np.roll(scene.noise, -shift) * scene.envelope.numpy(), rirs)
        gain = np.sqrt(
            np.square(source).sum() / np.square(noise).sum() * 10 ** (-float(scene.snr_db) / 10)
        )
        np.testing.assert_allclose(audio[row].numpy(), source + gain * noise, rtol=1e-3, atol=1e-5)


def test_the_ratio_of_clip_and_noise_is_the_drawn_one(folders: dict[str, Path]):
    batch = draw_batch(dataset_of(folders, snr_db=(7.0, 7.0)), range(8))
    silent = batch.scene._replace(noise=torch.zeros_like(batch.scene.noise))
    source, both = render_scenes(batch.clip, silent), render_scenes(batch.clip, batch.scene)
    ratio = 10 * torch.log10(source.square().sum((1, 2)) / (both - source).square().sum((1, 2)))
    torch.testing.assert_close(ratio, torch.full((8,), 7.0), rtol=0, atol=0.01)


def test_random_draws_cover_their_ranges(folders: dict[str, Path]):
    dataset = dataset_of(folders, snr_db=(5.0, 40.0), diffuse_sources=(2, 3), clean_share=0.3)
    scenes = [dataset[SampleIndex(position, 0)][0].scene for position in range(200)]
    snr = torch.stack([scene.snr_db for scene in scenes])
    assert 5 <= snr.min() < 8
    assert 37 < snr.max() <= 40
    places = torch.tensor([int(scene.noise_rirs.flatten(1).any(1).sum()) for scene in scenes])
    assert set(places.tolist()) == {1, 2, 3}
    assert 0.4 < float((places > 1).float().mean()) < 0.6
    assert 0.2 < float(torch.stack([scene.clean for scene in scenes]).float().mean()) < 0.4


def test_clip_and_noise_sources_are_different_places_in_one_room(folders: dict[str, Path]):
    responses = {}
    for file in folders["rirs"].rglob("*.wav"):
        responses[sf.read(file, dtype="float32")[0].T.tobytes()] = (file.parent.name, file.name)
    dataset = dataset_of(folders, diffuse_share=1.0, diffuse_sources=(3, 3), rir_seconds=200 / RATE)
    rooms = set()
    for position in range(30):
        scene = dataset[SampleIndex(position, 0)][0].scene
        used = [responses[rir.numpy().tobytes()] for rir in (scene.source_rir, *scene.noise_rirs)]
        assert len({room for room, _ in used}) == 1
        assert len(set(used)) == 4
        rooms.add(used[0][0])
    assert rooms == {"room0", "room1", "room2"}


def test_rendered_noise_fades_in_and_out_and_short_noise_is_within_the_clip(
    folders: dict[str, Path],
):
    dataset = dataset_of(folders, fade_seconds=0.05, diffuse_share=0.5)
    fade = round(0.05 * RATE)
    batch = draw_batch(dataset, range(24))
    direct = torch.zeros_like(batch.scene.noise_rirs)
    direct[..., 0] = batch.scene.noise_rirs.abs().sum(-1) > 0
    # A quiet dry clip defines the level of the noise and is subtracted again.
    source_rir = torch.zeros_like(batch.scene.source_rir)
    source_rir[..., 0] = 1e-3
    scene = batch.scene._replace(noise_rirs=direct, source_rir=source_rir)
    noise = render_scenes(batch.clip, scene)[:, 0] - 1e-3 * batch.clip[:, 0]
    lengths = set()
    for row, rendered in enumerate(noise):
        (inside,) = batch.scene.envelope[row].nonzero(as_tuple=True)
        first, last = int(inside[0]), int(inside[-1]) + 1
        lengths.add(last - first)
        middle = rendered[first + fade : last - fade].square().mean()
        for edge in (rendered[first : first + fade // 4], rendered[last - fade // 4 : last]):
            assert edge.square().mean() < 0.1 * middle
        assert not rendered[:first].abs().gt(1e-6).any()
    assert lengths == {4000, 1600}


def test_a_clean_clip_is_the_dry_clip_on_all_channels(folders: dict[str, Path]):
    batch = draw_batch(dataset_of(folders, clean_share=1.0), range(3))
    audio = render_scenes(batch.clip, batch.scene)
    assert torch.equal(audio, batch.clip.expand(-1, 2, -1))


def test_crops_are_cut_from_the_scene_and_rows_are_numbered(folders: dict[str, Path]):
    batch = draw_batch(dataset_of(folders), (5, 2))
    audio, rendered = render_scenes(batch.clip, batch.scene), batch.render()
    assert rendered.row.tolist() == [15, 16, 17, 6, 7, 8]
    crops = [
        audio[clip, :, start : start + 800] for clip in range(2) for start in batch.starts[clip]
    ]
    torch.testing.assert_close(rendered.waveform, torch.stack(crops))


def test_a_scene_depends_on_position_and_seed(folders: dict[str, Path]):
    one, same = dataset_of(folders), dataset_of(folders)
    for position in (7, 0):
        left, right = (dataset[SampleIndex(position, 1)][0] for dataset in (one, same))
        assert torch.equal(left.clip, right.clip)
        assert torch.equal(left.starts, right.starts)
        assert all(torch.equal(a, b) for a, b in zip(left.scene, right.scene, strict=True))
    other = data_of(folders, scenes_of(folders), seed=1).dataset("train", random_crops=True)
    first, second = (dataset[SampleIndex(7, 1)][0].scene for dataset in (one, other))
    assert float(first.snr_db) != float(second.snr_db)


def test_the_data_module_renders_scenes_after_the_transfer(folders: dict[str, Path]):
    data = data_of(folders, scenes_of(folders))
    raw = next(iter(data.train_dataloader()))
    batch = data.on_after_batch_transfer(raw.to(torch.device("cpu")), 0)
    assert batch.waveform.shape == (12, 2, 800)
    assert batch.row.tolist() == list(range(12))
    assert not torch.equal(batch.waveform[:, 0], batch.waveform[:, 1])
    assert data.on_after_batch_transfer(batch, 0) is batch


def test_without_noise_a_scene_is_one_convolution(folders: dict[str, Path]):
    scenes = SceneSettings(rirs=str(folders["rirs"]))
    dataset = data_of(folders, scenes).dataset("train", random_crops=True)
    batch = draw_batch(dataset, [0])
    expected = convolve(batch.clip[0, 0].numpy(), batch.scene.source_rir[0])
    audio = render_scenes(batch.clip, batch.scene)[0].numpy()
    np.testing.assert_allclose(audio, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"snr_db": (10.0, 5.0)}, "`snr_db`"),
        ({"diffuse_sources": (0, 3)}, "`diffuse_sources`"),
        ({"diffuse_sources": (4, 3)}, "`diffuse_sources`"),
        ({"diffuse_share": 1.5}, "`diffuse_share`"),
        ({"clean_share": -0.1}, "`clean_share`"),
        ({"fade_seconds": 0.0}, "`fade_seconds`"),
        ({"rir_seconds": 0.0}, "`rir_seconds`"),
    ],
)
def test_invalid_scene_settings_are_refused(settings: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        SceneSettings(**settings)


def test_an_unreadable_impulse_response_is_reported_and_another_room_is_drawn(
    folders: dict[str, Path],
):
    dataset = dataset_of(folders)
    expected = dataset[SampleIndex(3, 1)][0].clip
    for file in (folders["rirs"] / "room0").iterdir():
        file.write_bytes(b"")
    bad_reads = [
        bad_read for position in range(20) for bad_read in dataset[SampleIndex(position, 0)][1]
    ]
    assert {Path(bad_read.name).parent for bad_read in bad_reads} == {folders["rirs"] / "room0"}
    assert {bad_read.reason for bad_read in bad_reads} == {"the file is empty (0 bytes)"}
    assert torch.equal(dataset[SampleIndex(3, 1)][0].clip, expected)


def test_a_checkpoint_contains_scene_settings_as_plain_data(
    folders: dict[str, Path], tmp_path: Path
):
    torch.save(dict(data_of(folders, scenes_of(folders)).hparams), tmp_path / "hparams.pt")
    stored = torch.load(tmp_path / "hparams.pt", weights_only=True)
    assert SceneSettings(**stored["scenes"]) == scenes_of(folders)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_padding": True}, "`mask_padding` must be false"),
        ({"clip_seconds": None}, "`scenes` need `clip_seconds`"),
        ({"mono": "keep"}, "set `mono`"),
    ],
)
def test_settings_that_contradict_scenes_are_refused(
    folders: dict[str, Path], settings: dict[str, object], message: str
):
    with pytest.raises(UserError, match=message):
        data_of(folders, scenes_of(folders), **settings)


def test_statistics_are_measured_on_the_scenes(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
):
    mel = LogMel(RATE, n_fft=128, hop_length=64, n_mels=16)
    front_end = SpectrogramFrontEnd(mel, 8, num_channels=2)
    stats(front_end, data_of(folders, scenes_of(folders)), num_clips=3)
    assert "mean: " in capsys.readouterr().out


def test_impulse_responses_with_other_channels_are_refused(folders: dict[str, Path]):
    scenes = SceneSettings(rirs=str(folders["noise"]))
    with pytest.raises(CorpusError, match="no usable impulse response of 2 channels"):
        data_of(folders, scenes).dataset("train", random_crops=True)


def test_simulated_rooms_differ_between_the_channels_and_are_reproducible(tmp_path: Path):
    pytest.importorskip("pyroomacoustics")
    write_rooms(tmp_path / "rooms", num_rooms=2, num_places=2, sample_rate=RATE)
    files = sorted((tmp_path / "rooms").rglob("*.wav"))
    assert [file.relative_to(tmp_path / "rooms").as_posix() for file in files] == [
        f"room-000{room}/place-{place}.wav" for room in (0, 1) for place in (0, 1)
    ]
    # Compare samples, because the header of a float wav contains the time of writing.
    before = [sf.read(file)[0] for file in files]
    for file in files:
        response, rate = sf.read(file)
        assert rate == RATE
        assert response.shape[1] == 2
        assert np.abs(response[:, 0] - response[:, 1]).max() > 0.1 * np.abs(response).max()
        energy = np.square(response).sum(1)[::-1].cumsum()[::-1]
        decay = 10 * np.log10(energy / energy[0])
        thirty = np.flatnonzero(decay < -30)[0] / RATE
        assert 0.05 < thirty < 0.5, "a reverberation time of 0.2 to 0.5 s"
    shutil.rmtree(files[0].parent)
    write_rooms(tmp_path / "rooms", num_rooms=2, num_places=2, sample_rate=RATE)
    for file, response in zip(files, before, strict=True):
        np.testing.assert_array_equal(sf.read(file)[0], response)


def test_rooms_are_simulated_without_a_folder_of_impulse_responses(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(
        "jepa_audio.data.scenes.scenes.write_rooms",
        lambda directory, **settings: (
            calls.append(settings),
            folders["rirs"].rename(directory.parent.mkdir(parents=True) or directory),
        ),
    )
    prepare_scenes(SceneSettings(), num_channels=2, sample_rate=RATE, num_workers=1)
    assert calls == [{"num_channels": 2, "sample_rate": RATE}]
    with pytest.raises(ValueError, match="must be 1 or 2"):
        write_rooms(tmp_path / "many", num_channels=3)
