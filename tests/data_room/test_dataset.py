"""Laws of the crops: which samples they hold, from what they are drawn, and what happens to bad files."""

from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.table import CorpusError
from jepa_audio.data.loading.crops import BadRead, CropDataset, Crops, collate
from jepa_audio.data.loading.file_table import FileTable

RATE = 8000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


def write(path: Path, samples: np.ndarray, sample_rate: int = RATE) -> None:
    sf.write(path, samples.T, sample_rate, subtype="FLOAT")


def ramp(num_frames: int, num_channels: int = 1) -> np.ndarray:
    """Every sample tells its place: channel c at frame t is t / 2^15 + c."""
    return (np.arange(num_frames) / 2**15 + np.arange(num_channels)[:, None]).astype(np.float32)


def dataset(
    root: Path, num_samples: int = 100, sample_rate: int = RATE, **arguments: object
) -> CropDataset:
    return CropDataset(
        FileTable([index_corpus(root).usable()]), sample_rate, num_samples, **arguments
    )


def drawn(crops: CropDataset, position: int, file: int) -> Crops:
    """The crops alone, all files being good."""
    item, bad = crops[position, file]
    assert bad == []
    return item


def test_a_crop_is_a_slice_of_the_file(root: Path):
    write(root / "a.wav", ramp(4000))
    crops, position, num_samples = drawn(dataset(root), 7, 0)
    start = round(float(crops[0, 0, 0]) * 2**15)
    assert (position, num_samples) == (7, 100)
    assert crops.shape == (1, 1, 100)
    assert crops.dtype == torch.float32
    np.testing.assert_array_equal(crops[0].numpy(), ramp(4000)[:, start : start + 100])


def test_crops_belong_to_seed_and_position_and_reach_every_start(root: Path):
    write(root / "a.wav", ramp(103))
    one, same, other = dataset(root), dataset(root), dataset(root, seed=1)
    starts = [
        round(float(drawn(one, position, 0).waveform[0, 0, 0]) * 2**15) for position in range(60)
    ]
    assert set(starts) == {0, 1, 2, 3}
    heard, again, otherwise = (
        [drawn(crops, position, 0).waveform for position in range(60)]
        for crops in (one, same, other)
    )
    assert all(torch.equal(heard[position], again[position]) for position in (5, 0, 59))
    assert any(not torch.equal(a, b) for a, b in zip(heard, otherwise, strict=True))


def test_a_crop_of_another_rate_is_the_slice_of_the_resampled_file(root: Path):
    from jepa_audio.data.audio.resample import resample

    noise = np.random.default_rng(0).standard_normal((1, 44_100)).astype(np.float32) / 10
    write(root / "a.wav", noise, 44_100)
    whole = resample(torch.from_numpy(noise), 44_100, RATE)[0]
    for position in range(5):
        crop = drawn(dataset(root), position, 0).waveform[0, 0]
        windows = whole.unfold(0, 100, 1)
        assert (windows - crop).abs().amax(-1).min() < 1e-6


def test_a_file_shorter_than_the_crop_is_padded_with_zeros_at_its_end(root: Path):
    write(root / "a.wav", ramp(60) + 1)
    for clip_seconds in (None, 1.0):
        crop = drawn(dataset(root, clip_seconds=clip_seconds), 0, 0).waveform[0, 0]
        np.testing.assert_array_equal(crop[:60].numpy(), (ramp(60) + 1)[0])
        assert crop[60:].abs().max() == 0


def test_crops_of_a_clip_lie_in_one_window_drawn_anew_for_every_position(root: Path):
    write(root / "a.wav", ramp(20_000))
    windows = []
    for position in range(10):
        crops = drawn(
            dataset(root, clip_seconds=500 / RATE, crops_per_clip=8), position, 0
        ).waveform
        starts = (crops[:, 0, 0] * 2**15).round()
        assert crops.shape == (8, 1, 100)
        assert starts.unique().numel() > 1
        assert starts.max() - starts.min() <= 400
        windows.append(float(starts.min()))
    assert max(windows) - min(windows) > 2000


def test_crops_of_a_file_shorter_than_its_clip_hold_no_padding(root: Path):
    write(root / "a.wav", ramp(150) + 1)
    crops = drawn(dataset(root, clip_seconds=1.0, crops_per_clip=16), 0, 0).waveform
    assert crops.min() >= 1


def test_validation_takes_the_middle_and_spreads_several_crops_evenly(root: Path):
    write(root / "a.wav", ramp(500))
    middle = dataset(root, random_crops=False)
    assert torch.equal(drawn(middle, 0, 0).waveform, drawn(middle, 99, 0).waveform)
    assert round(float(drawn(middle, 0, 0).waveform[0, 0, 0]) * 2**15) == 200
    several = drawn(dataset(root, random_crops=False, crops_per_clip=4), 0, 0).waveform
    assert (several[:, 0, 0] * 2**15).round().tolist() == [50, 150, 250, 350]


def test_channels_are_averaged_or_picked_or_kept(root: Path):
    write(root / "a.wav", ramp(100, num_channels=3))
    mean, first = (drawn(dataset(root, mono=mono), 0, 0).waveform for mono in ("mean", "first"))
    kept = drawn(dataset(root, num_channels=3, mono="keep"), 0, 0).waveform
    torch.testing.assert_close(mean[0, 0], torch.from_numpy(ramp(100)[0] + 1))
    np.testing.assert_array_equal(first[0].numpy(), ramp(100))
    np.testing.assert_array_equal(kept[0].numpy(), ramp(100, num_channels=3))
    random = dataset(root, mono="random")
    picked = [round(float(drawn(random, position, 0).waveform[0, 0, 0])) for position in range(30)]
    assert set(picked) == {0, 1, 2}
    assert picked == [
        round(float(drawn(random, position, 0).waveform[0, 0, 0])) for position in range(30)
    ]


@pytest.mark.parametrize("clip_seconds", [None, 0.25])
def test_a_clip_gets_the_loudness_asked_for(root: Path, clip_seconds: float | None):
    noise = np.random.default_rng(0).standard_normal((1, 2000)).astype(np.float32)
    write(root / "loud.wav", noise / 3)
    write(root / "quiet.wav", noise / 1000)
    clips = dataset(root, num_samples=2000, loudness_dbfs=-14.0, clip_seconds=clip_seconds)
    loud, quiet = (drawn(clips, 0, file).waveform for file in (0, 1))
    assert 20 * torch.log10(loud.square().mean().sqrt()) == pytest.approx(-14, abs=1e-3)
    torch.testing.assert_close(loud, quiet, atol=1e-5, rtol=1e-3)


def test_silence_within_a_file_is_not_made_loud(root: Path):
    samples = np.zeros((1, 2000), np.float32)
    samples[0, 0] = 0.5
    write(root / "a.wav", samples)
    clips = dataset(root, clip_seconds=0.0125, loudness_dbfs=-14.0)
    crops = torch.stack([drawn(clips, position, 0).waveform for position in range(10)])
    assert crops.isfinite().all()
    assert crops.abs().max() == 0


def broken_corpus(root: Path) -> CropDataset:
    """Five files, two of which are spoilt after they were indexed."""
    for file in range(5):
        write(root / f"{file}.wav", np.full((1, 300), (file + 1) / 10, np.float32))
    crops = dataset(root)
    (root / "1.wav").write_bytes(b"")
    write(root / "2.wav", np.full((2, 300), 0.9, np.float32))
    return crops


def test_a_file_turned_bad_is_replaced_by_the_same_one_everywhere(root: Path):
    crops = broken_corpus(root)
    heard = [crops[position, position % 5][0].waveform for position in range(40)]
    assert {round(float(crop.mean()) * 10) for crop in heard} == {1, 4, 5}
    again = [crops[position, position % 5][0].waveform for position in range(39, -1, -1)]
    assert all(torch.equal(first, second) for first, second in zip(heard, again[::-1], strict=True))


def test_every_file_that_could_not_be_read_is_told_with_its_reason(root: Path):
    crops = broken_corpus(root)
    assert crops[0, 0][1] == []
    told = [bad for position in range(40) for bad in crops[position, 1][1]]
    assert told[0] == BadRead(str(root / "1.wav"), "the file is empty (0 bytes)")
    assert set(told) == {
        told[0],
        BadRead(str(root / "2.wav"), "changed since it was indexed: other size"),
    }
    assert told.count(told[0]) >= 40


def test_a_corpus_that_went_away_stops_the_run(root: Path):
    crops = broken_corpus(root)
    for path in root.glob("*.wav"):
        path.unlink()
    with pytest.raises(CorpusError, match="20 files in a row"):
        crops[0, 0]


def test_a_batch_numbers_its_rows_by_position_and_crop():
    items = [
        Crops(torch.full((3, 2, 5), float(position)), position, position - 36)
        for position in (40, 41)
    ]
    batch = collate(items)
    assert batch.num_samples is None
    assert collate(items, mask_padding=True).num_samples.tolist() == [4, 4, 4, 5, 5, 5]
    assert batch.waveform.shape == (6, 2, 5)
    assert batch.row.tolist() == [120, 121, 122, 123, 124, 125]
    assert batch.row.dtype == torch.int64
    assert torch.equal(batch.waveform[:, 0, 0], torch.tensor([40.0, 40, 40, 41, 41, 41]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"num_channels": 2}, "keep"),
        ({"num_channels": 2, "mono": "keep"}, r"the table has \[1\]"),
        ({"clip_seconds": 0.01}, "clip_seconds"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    root: Path, arguments: dict[str, object], message: str
):
    write(root / "a.wav", ramp(100))
    with pytest.raises(ValueError, match=message):
        dataset(root, **arguments)
