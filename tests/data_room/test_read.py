"""Decoding one file returns what was written, and refuses every kind of damage."""

from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from jepa_audio.data.audio.formats import AUDIO_SUFFIXES
from jepa_audio.data.audio.location import AudioReadError
from jepa_audio.data.audio.read import inspect, read
from tests.damaged import declare_hours, encode

RATE = 16_000
FORMATS = {
    "8.wav": ("PCM_U8", 0.02),
    "16.wav": ("PCM_16", 1e-4),
    "24.wav": ("PCM_24", 1e-6),
    "float.wav": ("FLOAT", 0),
    "16.flac": ("PCM_16", 1e-4),
    "16.aiff": ("PCM_16", 1e-4),
    "vorbis.ogg": ("VORBIS", 0.05),
    "opus.opus": ("OPUS", 0.05),
    "layer3.mp3": ("MPEG_LAYER_III", 0.05),
}


def tones(num_channels: int = 2, seconds: float = 1.0, sample_rate: int = RATE) -> np.ndarray:
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    return np.stack(
        [0.3 * np.sin(2 * np.pi * 300 * (c + 1) * time) for c in range(num_channels)]
    ).astype(np.float32)


def written(
    path: Path, samples: np.ndarray, subtype: str = "FLOAT", sample_rate: int = RATE
) -> Path:
    container = {".opus": "OGG"}.get(path.suffix)
    sf.write(path, samples.T, sample_rate, subtype=subtype, format=container)
    return path


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_returns_what_was_written(tmp_path: Path, name: str):
    subtype, tolerance = FORMATS[name]
    path = written(tmp_path / name, tones(), subtype)
    assert path.suffix in AUDIO_SUFFIXES
    samples, sample_rate = read(path)
    assert sample_rate == (48_000 if name == "opus.opus" else RATE)  # as ffmpeg decodes it
    expected = tones(sample_rate=sample_rate)
    assert samples.dtype == np.float32
    assert samples.shape == expected.shape
    np.testing.assert_allclose(samples[:, 2000:-2000], expected[:, 2000:-2000], atol=tolerance)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("sample_rate", [8_000, 16_000, 48_000])
def test_a_slice_equals_that_slice_of_the_whole_file(tmp_path: Path, name: str, sample_rate: int):
    rng = np.random.default_rng(0)
    noise = rng.uniform(-0.4, 0.4, (1, round(3.3 * sample_rate))).astype(np.float32)
    path = written(tmp_path / name, noise, FORMATS[name][0], sample_rate)
    decoder = inspect(path).decoder
    full, _ = read(path)
    length = full.shape[1]
    near_end = length - rng.integers(1, 20_000, 20)
    for start in [0, *rng.integers(0, length, 20), *near_end, length - 1]:
        num_frames = min(70, length - int(start))
        samples, _ = read(path, int(start), num_frames, decoder)
        np.testing.assert_allclose(samples, full[:, start : start + num_frames], atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_inspect_measures_the_decoded_samples(tmp_path: Path, name: str):
    path = written(tmp_path / name, tones(num_channels=1, seconds=5), FORMATS[name][0])
    samples, _ = read(path)
    info = inspect(path)
    rate = 48_000 if name == "opus.opus" else RATE
    assert (info.num_frames, info.sample_rate, info.num_channels) == (samples.shape[1], rate, 1)
    assert info.peak == pytest.approx(np.abs(samples).max(), rel=1e-6)
    assert info.rms == pytest.approx(np.sqrt(np.mean(samples.astype(np.float64) ** 2)), rel=1e-5)


@pytest.mark.parametrize("name", ["layer3.mp3", "vorbis.ogg", "opus.opus"])
def test_samples_do_not_depend_on_the_block_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    path = written(tmp_path / name, tones(seconds=5), FORMATS[name][0])
    in_one_block, info = read(path)[0], inspect(path)
    for block_frames in (20_000, 4096):
        monkeypatch.setattr("jepa_audio.data.audio.read._BLOCK_FRAMES", block_frames)
        np.testing.assert_allclose(read(path)[0], in_one_block, atol=1e-6)
        assert inspect(path).rms == pytest.approx(info.rms, rel=1e-5)


def test_a_negative_sample_can_be_the_peak(tmp_path: Path):
    samples = np.zeros((1, 100), np.float32)
    samples[0, 7] = -0.75
    assert inspect(written(tmp_path / "dip.wav", samples)).peak == 0.75


@pytest.mark.parametrize(("name", "subtype"), [("a.wav", "PCM_16"), ("a.mp3", "MPEG_LAYER_III")])
def test_a_slice_after_a_truncation_is_an_error_and_not_an_empty_array(
    tmp_path: Path, name: str, subtype: str
):
    path = cut(written(tmp_path / name, tones(seconds=4), subtype), 0.4)
    with pytest.raises(AudioReadError, match=r"1000|49000"):
        read(path, 3 * RATE, 1000, "libsndfile")


def with_one_sample(value: float) -> np.ndarray:
    samples = tones()
    samples[1, 777] = value
    return samples


def declare_30_hours(path: Path) -> None:
    """A sparse file of 30 hours with 4 bits per sample."""
    sf.write(path, tones(1)[0], 8000, subtype="IMA_ADPCM")
    size = 30 * 3600 * 4055
    content = bytearray(path.read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = size.to_bytes(4, "little")
    path.write_bytes(content)
    with path.open("r+b") as file:
        file.truncate(at + 4 + size)


BAD = {
    "empty.wav": (lambda path: path.touch(), "empty"),
    "missing.wav": (lambda path: None, "No such file"),
    "text.wav": (lambda path: path.write_text("not audio " * 50), "not recognised"),
    "text.mp3": (lambda path: path.write_text("not audio " * 50), "not recognised"),
    "cut.flac": (lambda path: cut(written(path, tones(seconds=9), "PCM_16"), 0.5), "decode"),
    "cut.wav": (lambda path: cut(written(path, tones(), "PCM_16"), 0.5), "truncated|file has 79"),
    "cut.aiff": (lambda path: cut(written(path, tones(), "PCM_16"), 0.5), "truncated|file has 79"),
    "hours.flac": (
        lambda path: path.write_bytes(declare_hours(encode(tones()[0]), 200)),
        "the header gives 5760000000 samples, the last frame ends at 16000",
    ),
    "bomb.flac": (
        lambda path: path.write_bytes(declare_hours(encode(tones()[0, :99]), 20)),
        "the header gives 576000000 samples, the last frame ends at 99",
    ),
    "cut.ogg": (lambda path: cut(written(path, tones(), "VORBIS"), 0.5), "truncated"),
    "long.wav": (declare_30_hours, "30 hours, at most 24 are allowed"),
    "header.wav": (lambda path: written(path, np.zeros((1, 0), np.float32)), "no sample|has 0"),
    "nan.wav": (lambda path: written(path, with_one_sample(np.nan)), "non-finite"),
    "inf.wav": (lambda path: written(path, with_one_sample(-np.inf)), "non-finite"),
    "huge.wav": (lambda path: written(path, with_one_sample(-1e29)), "implausible samples"),
    "rate.wav": (
        lambda path: written(path, tones(), sample_rate=1),
        "implausible sample rate: 1 Hz",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_its_name_and_the_reason(tmp_path: Path, name: str):
    make, reason = BAD[name]
    path = tmp_path / name
    make(path)
    for operation in (read, inspect):
        with pytest.raises(AudioReadError, match=reason) as error:
            operation(path)
        assert str(path) in str(error.value)
        assert error.value.audio == path


def test_a_wav_of_unknown_length_is_read_to_its_end(tmp_path: Path):
    path = written(tmp_path / "pipe.wav", tones(), "PCM_16")
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = b"\xff" * 4
    path.write_bytes(content)
    assert inspect(path).num_frames == RATE


def test_a_read_error_can_be_pickled(tmp_path: Path):
    import pickle

    error = pickle.loads(pickle.dumps(AudioReadError(tmp_path, "empty")))
    assert (error.audio, error.reason) == (tmp_path, "empty")


def test_an_invalid_slice_is_refused(tmp_path: Path):
    for start, num_frames in [(-1, 5), (0, 0)]:
        with pytest.raises(ValueError, match="must be"):
            read(tmp_path / "a.wav", start, num_frames)
