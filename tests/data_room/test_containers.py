"""The number of frames of a file is that of its container, or the file is refused with a reason."""

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from jepa_audio.data.audio import read as read_module
from jepa_audio.data.audio.codec import INSTALL, CodecError, is_installed
from jepa_audio.data.audio.containers import examine
from jepa_audio.data.audio.location import AudioReadError, TarMember
from jepa_audio.data.audio.ogg import _ogg_pages
from jepa_audio.data.audio.read import inspect, read
from jepa_audio.data.audio.streams import crc
from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.shards import Packing, write_shards
from jepa_audio.data.corpus.survey import verify_corpus
from tests.sounds import tar

RATE = 16_000
LENGTH = 23_456


def encode(kind: str, subtype: str = "PCM_16", length: int = LENGTH, seed: int = 0) -> bytes:
    """Noise with a changing level, so that frames of mp3 have unequal sizes."""
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, (length, 2))
    level = np.where(np.arange(length) % 8000 < 5000, 0.001, 0.9)[:, None]
    buffer = io.BytesIO()
    sf.write(buffer, noise * level, RATE, format=kind, subtype=subtype)
    return buffer.getvalue()


def mp3(seed: int = 0, has_header: bool = True, bitrate_mode: str = "VARIABLE") -> bytes:
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, LENGTH)
    noise *= np.where(np.arange(LENGTH) < 8000, 0.001, 0.9)
    buffer = io.BytesIO()
    with sf.SoundFile(
        buffer, "w", 44_100, 1, format="MP3", subtype="MPEG_LAYER_III", bitrate_mode=bitrate_mode
    ) as file:
        file.write(noise)
    content = buffer.getvalue()
    frame = content.index(b"\xff\xfb")
    assert content[frame + 21 : frame + 25] in (b"Xing", b"Info")
    return content if has_header else content[content.index(b"\xff\xfb", frame + 4) :]


def sizes(content: bytes, riff: int, data: int) -> bytes:
    """A wav file with other sizes in its header."""
    at = content.index(b"data") + 4
    riff_size, data_size = struct.pack("<I", riff), struct.pack("<I", data)
    return content[:4] + riff_size + content[8:at] + data_size + content[at + 4 :]


def unknown_flac(length: int = LENGTH) -> bytes:
    """As from a pipe: the total number of samples is 0."""
    content = bytearray(encode("FLAC", length=length))
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    return bytes(content)


def unknown_caf() -> bytes:
    content = encode("CAF")
    at = content.index(b"data") + 4
    return content[:at] + b"\xff" * 8 + content[at + 8 :]


def unknown_au() -> bytes:
    content = encode("AU")
    return content[:8] + b"\xff" * 4 + content[12:]


def id3v2(size: int) -> bytes:
    return b"ID3\x04\0\0" + bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0)) + bytes(size)


def ape(size: int) -> bytes:
    return bytes(size) + b"APETAGEX" + struct.pack("<IIII", 2000, size + 32, 0, 0) + bytes(8)


def moved_pages(content: bytes | bytearray, frames: int) -> bytes:
    """As cut without encoding: the positions of the pages do not start with 0."""
    content = bytearray(content)
    start = 0
    for page in list(_ogg_pages(io.BytesIO(content), 0, len(content))):
        header = slice(start + 22, start + 26)
        if page.granule > 0:
            content[start + 6 : start + 14] = (page.granule + frames).to_bytes(8, "little")
        content[header] = bytes(4)
        content[header] = crc(content[start : page.end], 0x04C11DB7, 32).to_bytes(4, "little")
        start = page.end
    return bytes(content)


ODD_CHUNK = b"note" + struct.pack("<I", 5) + b"hello\0"
ID3V1 = b"TAG" + bytes(125)
WAV = encode("WAV")
WHOLE: dict[str, Callable[[], bytes]] = {
    "wav": lambda: WAV,
    "wav, both sizes 0": lambda: sizes(WAV, 0, 0),
    "wav, largest sizes": lambda: sizes(WAV, 2**32 - 1, 2**32 - 1),
    "wav, data size 2^31": lambda: sizes(WAV, 2**31, 2**31 - 36),
    "wav, wrong RIFF size": lambda: sizes(WAV, 77, 4 * LENGTH),
    "wav, odd chunk at the end": lambda: WAV + ODD_CHUNK,
    "wav, odd size without padding": lambda: encode("WAV", "PCM_U8")[: 44 + 2 * LENGTH],
    "wav, tags at the end": lambda: WAV + id3v2(9000),
    "wav, zeros at the end": lambda: WAV + bytes(9000),
    "RF64": lambda: encode("RF64"),
    "Wave64": lambda: encode("W64"),
    "AIFF": lambda: encode("AIFF"),
    "AU": lambda: encode("AU"),
    "AU of unknown size": unknown_au,
    "CAF": lambda: encode("CAF"),
    "CAF of unknown size": unknown_caf,
    "NIST": lambda: encode("NIST"),
    "FLAC": lambda: encode("FLAC"),
    "FLAC of unknown length": unknown_flac,
    "FLAC of unknown length, tags": lambda: id3v2(300) + unknown_flac() + ID3V1,
    "FLAC of unknown length, 24 bits": lambda: encode("FLAC", "PCM_24"),
    "Vorbis": lambda: encode("OGG", "VORBIS"),
    "Opus": lambda: encode("OGG", "OPUS"),
}
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "wav, truncated": (lambda: WAV[:-1000], "truncated: the header gives"),
    "wav, wrapped length": (lambda: sizes(WAV, 36 + 2000, 2000), "91824 bytes follow"),
    "wav, a second wav file": (lambda: WAV + encode("WAV"), "bytes follow"),
    "wav, only a header": (lambda: WAV[:44], "truncated"),
    "RF64, truncated": (lambda: encode("RF64")[:-1000], "truncated"),
    "Wave64, truncated": (lambda: encode("W64")[:-1000], "truncated"),
    "AIFF, truncated": (lambda: encode("AIFF")[:-1000], "truncated"),
    "AU, truncated": (lambda: encode("AU")[:-1000], "truncated"),
    "CAF, truncated": (lambda: encode("CAF")[:-1000], "truncated"),
    "NIST, truncated": (lambda: encode("NIST")[:-1000], "truncated"),
    "VOC, truncated": (lambda: encode("VOC")[:-1000], "truncated"),
    "FLAC, truncated": (lambda: encode("FLAC")[:-1000], "decode|truncated"),
    "FLAC of unknown length, truncated": (lambda: unknown_flac()[:-1000], "last frame"),
    "FLAC, joined": (lambda: encode("FLAC") + encode("FLAC", seed=1), "joined flac files"),
    "FLAC, too short length": (
        lambda: unknown_flac(2000)[:26] + unknown_flac()[26:],
        "last frame",
    ),
    "Vorbis, truncated": (lambda: encode("OGG", "VORBIS")[:-1000], "truncated or damaged"),
    "Vorbis, chained": (
        lambda: encode("OGG", "VORBIS") + encode("OGG", "VORBIS", seed=1),
        "2 joined Ogg streams",
    ),
    "Vorbis, cut at its start": (
        lambda: moved_pages(encode("OGG", "VORBIS"), -3000),
        f"decodes {LENGTH - 3000} of the {LENGTH} frames",
    ),
    "Opus, cut at its start": (
        lambda: moved_pages(encode("OGG", "OPUS", length=60_000), -3000),
        "decodes 177000 of the 180000 frames|malformed",
    ),
    "Opus, truncated": (lambda: encode("OGG", "OPUS")[:-1000], "truncated or damaged"),
    "mp3, joined": (lambda: mp3() + mp3(1), "joined files"),
    "mp3, truncated": (lambda: mp3()[:-3000], "truncated: the header gives"),
    "mp3, other bytes inside": (
        lambda: mp3()[:3000] + bytes(700) + mp3()[3000:],
        "joined or damaged at byte",
    ),
    "mp3 without Xing, joined with tags": (
        lambda: mp3(has_header=False) + ID3V1 + mp3(1, has_header=False),
        "joined or damaged at byte",
    ),
    "mp3, another rate after it": (
        lambda: mp3(has_header=False) + encode("MP3", "MPEG_LAYER_III"),
        "another stream|joined or damaged",
    ),
    "mp3 after other bytes": (lambda: bytes(3000) + mp3(), "do not start|Format not"),
}
LIBSNDFILE_READS_SHORT: dict[str, Callable[[], bytes]] = {
    "mp3 VBR without Xing": lambda: mp3(has_header=False),
    "mp3 without Xing, joined": lambda: mp3(has_header=False) + mp3(1, has_header=False),
    "Opus, chained": lambda: encode("OGG", "OPUS") + encode("OGG", "OPUS", seed=1),
}


@pytest.mark.parametrize("in_tar", [False, True], ids=["single", "in a tar"])
@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_file_has_all_frames_also_in_slices(tmp_path: Path, kind: str, in_tar: bool):
    content = WHOLE[kind]()
    path = tmp_path / "a"
    path.write_bytes(content)
    audio: Path | TarMember = path
    if in_tar:
        audio = TarMember(tar(tmp_path / "a.tar", {"x.wav": content}), "x.wav", 512, len(content))
    info = inspect(audio)
    complete, rate = read(audio)
    factor = 3 if kind == "Opus" else 1  # Opus has 48,000 samples per second
    length = factor * LENGTH
    assert (info.num_frames, rate, info.num_channels) == (length, factor * RATE, 2)
    assert complete.shape == (2, length)
    for start in (0, 9_999, length - 700, length - 1):
        part, _ = read(audio, start, min(500, length - start), info.decoder)
        np.testing.assert_allclose(part, complete[:, start : start + 500], atol=1e-6)


@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT", "AVERAGE"])
@pytest.mark.parametrize("tags", ["", "before", "after"])
def test_an_mp3_has_the_frames_that_were_encoded(tmp_path: Path, mode: str, tags: str):
    content = mp3(bitrate_mode=mode)
    before = id3v2(5000) if tags == "before" else b""
    after = ape(99) + ID3V1 if tags == "after" else b""
    (tmp_path / "a.mp3").write_bytes(before + content + after)
    assert inspect(tmp_path / "a.mp3").num_frames == LENGTH


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_not_whole_is_refused_with_a_reason(tmp_path: Path, kind: str):
    make, reason = REFUSED[kind]
    path = tmp_path / "a"
    path.write_bytes(make())
    for operation in (inspect, read):
        with pytest.raises(AudioReadError, match=reason):
            operation(path)


@pytest.mark.parametrize("kind", LIBSNDFILE_READS_SHORT)
def test_what_libsndfile_reads_too_short_needs_torchcodec(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a"
    path.write_bytes(LIBSNDFILE_READS_SHORT[kind]())
    with path.open("rb") as file:
        expected = examine(file, path.stat().st_size).num_frames
    assert expected is not None
    with sf.SoundFile(path) as file:
        assert len(file.read(2 * expected)) < expected

    def missing(source: Path | bytes) -> None:
        raise CodecError(INSTALL)

    with monkeypatch.context() as patch, pytest.raises(AudioReadError) as error:
        patch.setattr(read_module, "torchcodec_decode", missing)
        inspect(path)
    assert "frames of the file" in error.value.reason
    assert "jepa-audio[codec]" in error.value.reason


@pytest.mark.parametrize("missing", [0, 1])
def test_the_frames_of_torchcodec_are_counted_too(
    tmp_path: Path, missing: int, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.mp3"
    path.write_bytes(mp3(has_header=False))
    with path.open("rb") as file:
        expected = examine(file, path.stat().st_size).num_frames
    assert expected is not None
    samples = np.linspace(-0.5, 0.5, expected - missing, dtype=np.float32)[None]
    monkeypatch.setattr(read_module, "torchcodec_decode", lambda source: (samples, RATE))
    if missing:
        with pytest.raises(AudioReadError, match=f"torchcodec decodes {expected - 1}"):
            inspect(path)
        return
    info = inspect(path)
    assert (info.num_frames, info.decoder) == (expected, "torchcodec")
    part, _ = read(path, 100, 50, info.decoder)
    np.testing.assert_array_equal(part, samples[:, 100:150])


@pytest.mark.skipif(not is_installed(), reason="torchcodec is not installed")
@pytest.mark.parametrize("kind", LIBSNDFILE_READS_SHORT)
def test_torchcodec_reads_all_frames_also_in_slices(tmp_path: Path, kind: str):
    path = tmp_path / "a"
    path.write_bytes(LIBSNDFILE_READS_SHORT[kind]())
    with path.open("rb") as file:
        expected = examine(file, path.stat().st_size).num_frames
    info = inspect(path)
    assert (info.num_frames, info.decoder) == (expected, "torchcodec")
    complete, _ = read(path)
    part, _ = read(path, info.num_frames - 600, 500, info.decoder)
    np.testing.assert_array_equal(part, complete[:, -600:-100])


def test_packed_and_verified_files_keep_exact_lengths_and_samples(tmp_path: Path):
    (tmp_path / "in").mkdir()
    kinds = {"a.ogg": "Vorbis", "b.opus": "Opus", "c.flac": "FLAC of unknown length"}
    kinds |= {"d.wav": "wav, both sizes 0", "e.caf": "CAF of unknown size"}
    for name, kind in kinds.items():
        (tmp_path / "in" / name).write_bytes(WHOLE[kind]())
    (tmp_path / "in" / "f.mp3").write_bytes(mp3())
    corpus = index_corpus(tmp_path / "in")
    assert verify_corpus(corpus) == []
    packed = write_shards(corpus, tmp_path / "out", Packing(bits=24))
    in_order = corpus.shuffled()
    assert packed.is_usable.all()
    for column in ("num_frames", "sample_rate", "num_channels"):
        assert packed.table[column].to_pylist() == in_order.table[column].to_pylist()
    for row in range(len(packed)):
        original, _ = read(in_order.file(row).audio)
        file = packed.file(row)
        gain = min(0.999 / np.abs(original).max(), 1)  # above full scale
        np.testing.assert_allclose(read(file.audio)[0], gain * original, atol=1e-4)
        # Packed flac has its length in the header, also if the original did not.
        assert file.decoder == "libsndfile"


def test_a_file_that_was_cut_after_the_index_gives_an_error_and_no_samples(tmp_path: Path):
    for name, kind in {"a.ogg": "Vorbis", "c.flac": "FLAC of unknown length"}.items():
        (tmp_path / name).write_bytes(WHOLE[kind]())
    corpus = index_corpus(tmp_path)
    for row in range(2):
        file = corpus.file(row)
        file.audio.write_bytes(file.audio.read_bytes()[:-1000])
        for start in (0, file.num_frames - 100):
            with pytest.raises(AudioReadError):
                file.read_slice(start, 100, RATE)
    assert len(verify_corpus(corpus)) == 2


@pytest.mark.parametrize("kind", ["wav", "AIFF", "AU", "CAF", "Wave64", "FLAC", "Vorbis", "NIST"])
def test_any_truncation_is_refused_and_ends_in_one_sentence(tmp_path: Path, kind: str):
    content = WHOLE[kind]()
    path = tmp_path / "a"
    for share in np.linspace(0, 0.999, 25):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(AudioReadError):
            inspect(path)


@pytest.mark.parametrize("size", [2**32 + 10**6, 2**33 + 10**6])
def test_a_wav_file_above_4_gib_with_a_wrapped_length_is_refused(tmp_path: Path, size: int):
    path = tmp_path / "a.wav"
    path.write_bytes(sizes(WAV, (size + 36) % 2**32, size % 2**32))
    with path.open("r+b") as file:
        file.truncate(44 + size)  # a sparse file
    with pytest.raises(AudioReadError, match="bytes follow after the samples; repair the header"):
        inspect(path)


def test_random_bytes_in_a_header_end_in_one_sentence(tmp_path: Path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a"
    for make in WHOLE.values():
        content = make()
        for _ in range(15):
            damaged = bytearray(content)
            for at in rng.integers(0, 100, 3):
                damaged[at] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                assert inspect(path).num_frames > 0
            except AudioReadError as error:
                assert error.reason
