"""Crops: the samples they contain, the seeds they depend on, and the replacement of bad files."""

from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from jepa_audio.data.audio.resample import resample
from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.table import CorpusError
from jepa_audio.data.loading.clips import BadRead, ClipSettings, CropDataset, Crops
from jepa_audio.data.loading.file_table import FileTable
from jepa_audio.data.loading.order import SampleIndex
from jepa_audio.errors import UserError

RATE = 8000


def write(path: Path, samples: np.ndarray, sample_rate: int = RATE) -> None:
    path.parent.mkdir(exist_ok=True)
    sf.write(path, samples.T, sample_rate, subtype="FLOAT")


def ramp(num_frames: int, num_channels: int = 1) -> np.ndarray:
    """Samples that encode their index: channel c at frame t is t / 2^15 + c."""
    return (np.arange(num_frames) / 2**15 + np.arange(num_channels)[:, None]).astype(np.float32)


def dataset(
    *roots: Path, num_samples: int = 100, random_crops: bool = True, **settings: object
) -> CropDataset:
    clips = ClipSettings(RATE, num_samples / RATE, **settings)
    files = FileTable([index_corpus(root).usable() for root in roots])
    return CropDataset(files, clips, random_crops)


def read_crops(crops: CropDataset, position: int, file: int) -> Crops:
    """The crops of a readable file."""
    sample, bad_reads = crops[SampleIndex(position, file)]
    assert bad_reads == []
    return sample


def read_waveform(crops: CropDataset, position: int, file: int) -> torch.Tensor:
    """The samples of the crops of a readable file, `[crops, C, S]`."""
    return torch.stack(read_crops(crops, position, file).waveforms)


def starts(crops: torch.Tensor) -> list[int]:
    """Index of the first sample of crops of a ramp."""
    return (crops[:, 0, 0] * 2**15).round().int().tolist()


def test_a_crop_is_a_slice_of_the_file(tmp_path: Path):
    write(tmp_path / "a.wav", ramp(4000))
    sample = read_crops(dataset(tmp_path), 7, 0)
    crops = torch.stack(sample.waveforms)
    (start,) = starts(crops)
    assert (sample.position, sample.step, sample.num_samples) == (7, 0, 100)
    assert crops.shape == (1, 1, 100)
    assert crops.dtype == torch.float32
    np.testing.assert_array_equal(crops[0].numpy(), ramp(4000)[:, start : start + 100])


def test_crops_depend_on_seed_and_position_and_reach_every_start(tmp_path: Path):
    write(tmp_path / "a.wav", ramp(103))
    first, same, other = (
        [read_waveform(crops, position, 0) for position in order]
        for crops, order in (
            (dataset(tmp_path, seed=0), range(60)),
            (dataset(tmp_path, seed=0), range(59, -1, -1)),
            (dataset(tmp_path, seed=1), range(60)),
        )
    )
    assert {start for crops in first for start in starts(crops)} == {0, 1, 2, 3}
    assert all(torch.equal(a, b) for a, b in zip(first, same[::-1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_crop_of_another_rate_is_a_slice_of_the_resampled_file(tmp_path: Path):
    noise = np.random.default_rng(0).standard_normal((1, 44_100)).astype(np.float32) / 10
    write(tmp_path / "a.wav", noise, 44_100)
    resampled = resample(torch.from_numpy(noise), 44_100, RATE)[0]
    crops = dataset(tmp_path)
    for position in range(5):
        crop = read_waveform(crops, position, 0)[0, 0]
        assert (resampled.unfold(0, 100, 1) - crop).abs().amax(-1).min() < 1e-6


@pytest.mark.parametrize("clip_seconds", [None, 1.0])
def test_a_file_shorter_than_a_crop_is_padded_with_zeros(
    tmp_path: Path, clip_seconds: float | None
):
    write(tmp_path / "a.wav", ramp(60) + 1)
    crops = read_crops(dataset(tmp_path, clip_seconds=clip_seconds), 0, 0)
    crop = crops.waveforms[0][0]
    assert crops.num_samples == 60
    np.testing.assert_array_equal(crop[:60].numpy(), (ramp(60) + 1)[0])
    assert crop[60:].abs().max() == 0


def test_crops_of_a_position_come_from_one_clip(tmp_path: Path):
    write(tmp_path / "a.wav", ramp(20_000))
    crops = dataset(tmp_path, clip_seconds=500 / RATE, crops_per_clip=8)
    clip_starts = []
    for position in range(10):
        waveform = read_waveform(crops, position, 0)
        assert waveform.shape == (8, 1, 100)
        assert len(set(starts(waveform))) > 1
        assert max(starts(waveform)) - min(starts(waveform)) <= 400
        clip_starts.append(min(starts(waveform)))
    assert max(clip_starts) - min(clip_starts) > 2000


def test_crops_of_a_file_shorter_than_its_clip_have_no_padding(tmp_path: Path):
    write(tmp_path / "a.wav", ramp(150) + 1)
    crops = read_waveform(dataset(tmp_path, clip_seconds=1.0, crops_per_clip=16), 0, 0)
    assert crops.min() >= 1


def test_validation_crops_are_in_the_middle_or_evenly_spaced(tmp_path: Path):
    write(tmp_path / "a.wav", ramp(500))
    middle = dataset(tmp_path, random_crops=False)
    assert [starts(read_waveform(middle, position, 0)) for position in (0, 99)] == [[200]] * 2
    several = dataset(tmp_path, random_crops=False, crops_per_clip=4)
    assert starts(read_waveform(several, 0, 0)) == [50, 150, 250, 350]


def test_channels_are_averaged_or_chosen_or_kept(tmp_path: Path):
    write(tmp_path / "a.wav", ramp(100, num_channels=3))
    mean, first = (read_waveform(dataset(tmp_path, mono=mono), 0, 0) for mono in ("mean", "first"))
    kept = read_waveform(dataset(tmp_path, num_channels=3, mono="keep"), 0, 0)
    torch.testing.assert_close(mean[0, 0], torch.from_numpy(ramp(100)[0] + 1))
    np.testing.assert_array_equal(first[0].numpy(), ramp(100))
    np.testing.assert_array_equal(kept[0].numpy(), ramp(100, num_channels=3))
    random = dataset(tmp_path, mono="random")
    chosen, again = (
        [round(float(read_waveform(random, position, 0)[0, 0, 0])) for position in range(30)]
        for _ in range(2)
    )
    assert set(chosen) == {0, 1, 2}
    assert chosen == again


@pytest.mark.parametrize("clip_seconds", [None, 0.25])
def test_clips_are_scaled_to_the_loudness(tmp_path: Path, clip_seconds: float | None):
    noise = np.random.default_rng(0).standard_normal((1, 2000)).astype(np.float32)
    write(tmp_path / "loud.wav", noise / 3)
    write(tmp_path / "quiet.wav", noise / 1000)
    clips = dataset(tmp_path, num_samples=2000, loudness_dbfs=-14.0, clip_seconds=clip_seconds)
    loud, quiet = (read_waveform(clips, 0, file) for file in (0, 1))
    assert 20 * torch.log10(loud.square().mean().sqrt()) == pytest.approx(-14, abs=1e-3)
    torch.testing.assert_close(loud, quiet, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("clip_seconds", [None, 0.25])
@pytest.mark.parametrize("mono", ["mean", "first", "random", "keep"])
def test_the_loudness_is_that_of_the_samples_that_are_taken(
    tmp_path: Path, clip_seconds: float | None, mono: str
):
    """The channels have other levels than their average, the file than its resampled band."""
    noise = np.random.default_rng(0).standard_normal((1, 33_075)).astype(np.float32)
    left = 0.1 * noise + 0.3 * np.sin(2 * np.pi * 15_000 * np.arange(33_075) / 44_100)
    channels = np.concatenate([left, -0.999 * left + 0.0003 * noise]).astype(np.float32)
    write(tmp_path / "a.wav", channels, 44_100)
    kept = {"num_channels": 2} if mono == "keep" else {}
    crops = dataset(
        tmp_path,
        num_samples=2000,
        mono=mono,
        loudness_dbfs=-20.0,
        clip_seconds=clip_seconds,
        **kept,
    )
    levels = [float(read_waveform(crops, position, 0).square().mean()) for position in (0, 1)]
    assert 10 * np.log10(levels) == pytest.approx([-20, -20], abs=1e-3)


def test_without_clip_seconds_all_crops_of_a_file_have_one_gain(tmp_path: Path):
    write(tmp_path / "a.wav", np.linspace(0.1, 1, 4000, dtype=np.float32)[None])
    crops, plain = (
        read_waveform(dataset(tmp_path, crops_per_clip=3, loudness_dbfs=level), 0, 0)
        for level in (-14.0, None)
    )
    gain = crops / plain
    assert float(gain.max() - gain.min()) < 1e-5
    assert 10 * torch.log10(crops.square().mean()) == pytest.approx(-14, abs=1e-3)


def test_a_silent_clip_is_not_amplified(tmp_path: Path):
    samples = np.zeros((1, 2000), np.float32)
    samples[0, 0] = 0.5
    write(tmp_path / "a.wav", samples)
    clips = dataset(tmp_path, clip_seconds=0.0125, loudness_dbfs=-14.0)
    crops = torch.stack([read_waveform(clips, position, 0) for position in range(10)])
    assert crops.isfinite().all()
    assert crops.abs().max() == 0


def damaged_dataset(root: Path) -> CropDataset:
    """Five files of levels 0.1 to 0.5; files 1 and 2 change after they were indexed."""
    for file in range(5):
        write(root / f"{file}.wav", np.full((1, 300), (file + 1) / 10, np.float32))
    crops = dataset(root)
    (root / "1.wav").write_bytes(b"")
    write(root / "2.wav", np.full((2, 300), 0.9, np.float32))
    return crops


def level_of(crops: Crops) -> int:
    return round(float(torch.stack(crops.waveforms).mean()) * 10)


def test_the_replacement_of_a_bad_file_is_always_the_same(tmp_path: Path):
    crops = damaged_dataset(tmp_path)
    levels, again = (
        {position: level_of(crops[SampleIndex(position, position % 5)][0]) for position in order}
        for order in (range(40), range(39, -1, -1))
    )
    assert set(levels.values()) == {1, 4, 5}
    assert levels == again


def test_a_bad_file_of_a_mixture_is_replaced_from_the_same_corpus(tmp_path: Path):
    corpora = [tmp_path / name for name in ("low", "middle", "high")]
    for number, corpus in enumerate(corpora):
        for file in range(4):
            write(corpus / f"{file}.wav", np.full((1, 300), (3 * number + 1) / 10, np.float32))
    crops = dataset(*corpora)
    for number, corpus in enumerate(corpora):
        (corpus / "0.wav").write_bytes(b"")
        samples = [
            crops[SampleIndex(position, 4 * number + file)]
            for position in range(20)
            for file in (0, 3)
        ]
        assert {level_of(sample) for sample, _ in samples} == {3 * number + 1}
        bad_files = {Path(bad_read.name) for _, bad_reads in samples for bad_read in bad_reads}
        assert bad_files == {corpus / "0.wav"}


def test_each_bad_read_is_reported_with_its_reason(tmp_path: Path):
    crops = damaged_dataset(tmp_path)
    assert crops[SampleIndex(0, 0)][1] == []
    bad_reads = [
        bad_read for position in range(40) for bad_read in crops[SampleIndex(position, 1)][1]
    ]
    empty = BadRead(str(tmp_path / "1.wav"), "the file is empty (0 bytes)")
    changed = BadRead(str(tmp_path / "2.wav"), "changed since it was indexed: other size")
    assert bad_reads[0] == empty
    assert set(bad_reads) == {empty, changed}
    assert bad_reads.count(empty) >= 40


def test_a_corpus_of_deleted_files_stops_the_run(tmp_path: Path):
    crops = damaged_dataset(tmp_path)
    for path in tmp_path.glob("*.wav"):
        path.unlink()
    with pytest.raises(CorpusError, match="20 files in a row"):
        crops[SampleIndex(0, 0)]


def test_rows_of_a_batch_are_numbered_by_position_and_crop(tmp_path: Path):
    write(tmp_path / "a.wav", ramp(100))
    samples = [
        Crops([torch.full((2, 5), float(position))] * 3, position, 0, position - 36)
        for position in (40, 41)
    ]
    batch = dataset(tmp_path).collate_samples(samples)
    assert batch.num_samples is None
    masked = dataset(tmp_path, mask_padding=True).collate_samples(samples)
    assert masked.num_samples.tolist() == [4, 4, 4, 5, 5, 5]
    assert batch.waveform.shape == (6, 2, 5)
    assert batch.row.tolist() == [120, 121, 122, 123, 124, 125]
    assert batch.row.dtype == torch.int64
    assert torch.equal(batch.waveform[:, 0, 0], torch.tensor([40.0, 40, 40, 41, 41, 41]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_seconds": 0.0}, r"`crop_seconds` \(0.0\) must be at least one sample"),
        ({"crops_per_clip": 0}, r"`crops_per_clip` \(0\) must be in \[1, "),
        ({"sample_rate": 0}, r"`sample_rate` \(0\) must be in \[1, "),
        ({"num_channels": 2}, "`mono='mean'` gives 1 channel; set `mono='keep'`"),
        ({"clip_seconds": 0.01}, r"`clip_seconds` \(0.01\) must be at least `crop_seconds`"),
        ({"seed": -1}, r"`seed` \(-1\) must be >= 0"),
    ],
)
def test_invalid_clip_settings_are_refused(settings: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        ClipSettings(**{"sample_rate": RATE, "crop_seconds": 0.0125, **settings})


def test_kept_channels_need_files_with_as_many_channels(tmp_path: Path):
    write(tmp_path / "a.wav", ramp(100))
    with pytest.raises(UserError, match=r"`num_channels` \(2\) channels, but the table has \[1\]"):
        dataset(tmp_path, num_channels=2, mono="keep")
