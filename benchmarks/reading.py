"""Compare the number of frames in a corpus table with the number that `ffmpeg` decodes.

About 30 kinds of files are made with `ffmpeg`: codecs, headers, joined and truncated files, wrong
lengths. A row of the table must have the number of frames of `ffmpeg`, or be bad with a reason. The
same files are indexed as members of a tar, and slices of each usable file are compared with the
complete decoded file.

    python -m benchmarks.reading [FOLDER] [--per_kind 7]
"""

from __future__ import annotations

import argparse
import shutil
import struct
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jepa_audio.data.audio.location import AudioReadError
from jepa_audio.data.audio.read import read
from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.table import Corpus

Make = Callable[[np.random.Generator, Path], None]
_FFMPEG = ("ffmpeg", "-v", "error", "-nostdin", "-y")
_SLICES = 12


def encode(rng: np.random.Generator, path: Path, *options: str, pipe: str = "") -> None:
    """Write pink noise of a random length with `ffmpeg`; through a pipe for the format `pipe`."""
    seconds, seed = rng.uniform(1.5, 8), rng.integers(1 << 30)
    rate = rng.choice([16_000, 22_050, 44_100, 48_000])
    source = f"anoisesrc=d={seconds:.4f}:c=pink:r={rate}:seed={seed}:a=0.5,tremolo=f=0.7:d=0.9"
    channels = () if "-ac" in options else ("-ac", str(rng.integers(1, 3)))
    command = [*_FFMPEG, "-f", "lavfi", "-i", source, *channels, *options]
    if pipe:
        content = subprocess.run([*command, "-f", pipe, "-"], check=True, capture_output=True)
        path.write_bytes(content.stdout)
    else:
        subprocess.run([*command, str(path)], check=True)


def encoder(*options: str, pipe: str = "") -> Make:
    return lambda rng, path: encode(rng, path, *options, pipe=pipe)


def joined(*options: str) -> Make:
    """Several files with the same rate and channels, one after the other."""

    def make(rng: np.random.Generator, path: Path) -> None:
        content = b""
        for _ in range(rng.integers(2, 4)):
            encode(rng, path, "-ar", "44100", "-ac", "2", *options)
            content += path.read_bytes()
        path.write_bytes(content)

    return make


def cut_stream(*options: str) -> Make:
    """The packets of a file from a random time to its end."""

    def make(rng: np.random.Generator, path: Path) -> None:
        whole = path.with_name(f".whole{path.suffix}")
        encode(rng, whole, *options)
        start = ("-ss", f"{rng.uniform(0.2, 1.3):.3f}")
        subprocess.run([*_FFMPEG, *start, "-i", str(whole), "-c", "copy", str(path)], check=True)
        whole.unlink()

    return make


def changed(make: Make, change: Callable[[np.random.Generator, bytes], bytes]) -> Make:
    def make_changed(rng: np.random.Generator, path: Path) -> None:
        make(rng, path)
        path.write_bytes(change(rng, path.read_bytes()))

    return make_changed


def cut(rng: np.random.Generator, content: bytes) -> bytes:
    return content[: int(len(content) * rng.uniform(0.3, 0.95))]


def zero_sizes(rng: np.random.Generator, content: bytes) -> bytes:
    at = content.index(b"data")
    return content[:4] + bytes(4) + content[8 : at + 4] + bytes(4) + content[at + 8 :]


def wrapped_size(rng: np.random.Generator, content: bytes) -> bytes:
    """The header counts a part of the samples, as after a length above 4 GiB."""
    at = content.index(b"data")
    size = struct.pack("<I", (len(content) - at) // 4 // 4 * 4)
    return content[: at + 4] + size + content[at + 8 :]


def odd_chunk(rng: np.random.Generator, content: bytes) -> bytes:
    """A chunk of odd size after the samples."""
    return content + b"\0" * (len(content) % 2) + b"note" + struct.pack("<I", 5) + b"hello\0"


def tagged(rng: np.random.Generator, content: bytes) -> bytes:
    """An ID3v2 tag with a picture before the audio; APE and ID3v1 tags after it."""
    picture = rng.bytes(int(rng.integers(2000, 9000)))
    size = bytes(len(picture) >> shift & 0x7F for shift in (21, 14, 7, 0))
    ape = b"APETAGEX" + struct.pack("<IIII", 2000, 32 + 40, 0, 0) + bytes(8)
    return b"ID3\x04\0\0" + size + picture + content + bytes(40) + ape + b"TAG" + bytes(125)


def junk_inside(rng: np.random.Generator, content: bytes) -> bytes:
    at = int(len(content) * rng.uniform(0.2, 0.8))
    return content[:at] + rng.bytes(int(rng.integers(10, 4000))) + content[at:]


_XING = ("-write_xing", "0", "-id3v2_version", "0")
MP3, VORBIS, OPUS = ("-c:a", "libmp3lame"), ("-c:a", "libvorbis"), ("-c:a", "libopus")
KINDS: dict[str, tuple[str, Make]] = {
    "wav 16 bit": (".wav", encoder()),
    "wav float, upper case": (".WAV", encoder("-c:a", "pcm_f32le", "-f", "wav")),
    "wav 24 bit, extensible": (".bwf", encoder("-c:a", "pcm_s24le", "-f", "wav")),
    "wav ADPCM": (".wave", encoder("-c:a", "adpcm_ima_wav", "-f", "wav")),
    "wav from a pipe": (".wav", encoder(pipe="wav")),
    "wav, both sizes 0": (".wav", changed(encoder(), zero_sizes)),
    "wav, wrapped length": (".wav", changed(encoder(), wrapped_size)),
    "wav, odd chunk": (".wav", changed(encoder("-c:a", "pcm_u8"), odd_chunk)),
    "wav, truncated": (".wav", changed(encoder(), cut)),
    "mp3 in wav": (".wav", encoder(*MP3, "-q:a", "5")),
    "RF64": (".rf64", encoder("-f", "wav", "-rf64", "always")),
    "Wave64": (".w64", encoder()),
    "AIFF, AIFF-C": (".aifc", encoder("-c:a", "pcm_s16le", "-f", "aiff")),
    "AIFF, truncated": (".aif", changed(encoder("-f", "aiff"), cut)),
    "AU": (".au", encoder()),
    "AU from a pipe": (".snd", encoder(pipe="au")),
    "CAF": (".caf", encoder()),
    "CAF from a pipe": (".caf", encoder(pipe="caf")),
    "FLAC": (".flac", encoder()),
    "FLAC from a pipe": (".flac", encoder(pipe="flac")),
    "FLAC, joined": (".flac", joined()),
    "FLAC, truncated": (".flac", changed(encoder(pipe="flac"), cut)),
    "Ogg FLAC": (".oga", encoder("-c:a", "flac")),
    "Vorbis": (".ogg", encoder(*VORBIS)),
    "Vorbis, cut without encoding": (".ogg", cut_stream(*VORBIS)),
    "Vorbis, chained": (".ogg", joined(*VORBIS)),
    "Vorbis, truncated": (".ogg", changed(encoder(*VORBIS), cut)),
    "Opus": (".opus", encoder(*OPUS, "-ar", "48000")),
    "Opus, from 16 kHz": (".opus", encoder(*OPUS, "-ar", "16000")),
    "Opus, cut without encoding": (".opus", cut_stream(*OPUS, "-ar", "48000")),
    "Opus, chained": (".opus", joined(*OPUS, "-ar", "48000")),
    "Opus, truncated": (".opus", changed(encoder(*OPUS, "-ar", "48000"), cut)),
    "mp3 VBR": (".mp3", encoder(*MP3, "-q:a", "4")),
    "mp3 CBR, 8 kHz": (".mp3", encoder(*MP3, "-ar", "8000", "-b:a", "16k")),
    "mp3 VBR without Xing": (".mp3", encoder(*MP3, "-q:a", "4", *_XING)),
    "mp3 CBR without Xing": (".mp3", encoder(*MP3, "-b:a", "64k", *_XING)),
    "mp3 with tags": (".mp3", changed(encoder(*MP3, "-q:a", "4"), tagged)),
    "mp3, joined": (".mp3", joined(*MP3, "-q:a", "4")),
    "mp3 without Xing, joined": (".mp3", joined(*MP3, "-q:a", "4", *_XING)),
    "mp3, truncated": (".mp3", changed(encoder(*MP3, "-q:a", "4"), cut)),
    "mp3 without Xing, truncated": (".mp3", changed(encoder(*MP3, "-q:a", "4", *_XING), cut)),
    "mp3, junk inside": (".mp3", changed(encoder(*MP3, "-b:a", "64k", *_XING), junk_inside)),
    "mp2": (".mp2", encoder("-c:a", "mp2", "-ar", "48000")),
    "AAC in m4a": (".m4a", encoder("-c:a", "aac")),
    "AAC, truncated": (".m4a", changed(encoder("-c:a", "aac", "-movflags", "+faststart"), cut)),
    "AAC frames": (".aac", encoder("-c:a", "aac")),
    "Opus in WebM": (".webm", encoder(*OPUS, "-ar", "48000")),
    "WebM, truncated": (".webm", changed(encoder(*OPUS, "-ar", "48000"), cut)),
}


def decoded_frames(path: Path) -> int | None:
    """Number of frames that `ffmpeg` decodes; `None` if it decodes nothing."""
    show = ("-select_streams", "a:0", "-show_entries", "stream=channels", "-of", "csv=p=0")
    probe = subprocess.run(
        ["ffprobe", "-v", "quiet", *show, str(path)], check=False, capture_output=True
    )
    command = [*_FFMPEG, "-i", str(path), "-map", "0:a:0", "-f", "s16le", "-"]
    samples = subprocess.run(command, check=False, capture_output=True).stdout
    channels = probe.stdout.strip().strip(b",")
    return len(samples) // 2 // int(channels) if samples and channels else None


def wrong_slices(corpus: Corpus, row: int, rng: np.random.Generator) -> int:
    """Number of random slices that differ from the complete decoded file."""
    file = corpus.file(row)
    complete, _ = read(file.audio)
    last = file.num_frames - 1
    near_end = np.maximum(last - rng.integers(0, 9000, _SLICES // 2), 0)
    wrong = 0
    for start in [0, *rng.integers(0, last, _SLICES // 2).tolist(), *near_end.tolist(), last]:
        num_frames = min(700, file.num_frames - start)
        part = file.read_slice(start, num_frames, file.sample_rate).numpy()
        wrong += not np.allclose(part, complete[:, start : start + num_frames], atol=1e-6)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="keep the files here")
    parser.add_argument("--per_kind", type=int, default=5, help="files of each kind")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.folder or Path(temporary)
        compare(folder, settings.per_kind)


def compare(folder: Path, per_kind: int) -> None:
    files, tars = folder / "files", folder / "tars"
    shutil.rmtree(folder, ignore_errors=True)
    files.mkdir(parents=True)
    tars.mkdir()
    kind_of: dict[str, str] = {}
    for number, (kind, (suffix, make)) in enumerate(KINDS.items()):
        for copy in range(per_kind):
            path = files / f"{number:02}-{copy}{suffix}"
            make(np.random.default_rng([number, copy]), path)
            kind_of[path.name] = kind
    manifest = folder / "all.csv"
    manifest.write_text("path\n" + "".join(f"files/{name}\n" for name in kind_of))
    with tarfile.open(tars / "all.tar", "w") as archive:
        for name in kind_of:
            archive.add(files / name, name)
    started = time.perf_counter()
    corpus = index_corpus(manifest, folder / "all.parquet", max_bad_share=1.0)
    seconds = time.perf_counter() - started
    in_tar = {row["member"]: row for row in index_corpus(tars, max_bad_share=1.0).table.to_pylist()}
    counts = {kind: dict.fromkeys(("equal", "refused", "longer", "short"), 0) for kind in KINDS}
    slices = dict.fromkeys(KINDS, 0)
    reasons: dict[str, str] = {}
    for row, values in enumerate(corpus.table.to_pylist()):
        name = Path(values["source"]).name
        kind = kind_of[name]
        for key in ("status", "num_frames", "reason", "decoder"):
            assert values[key] == in_tar[name][key], (name, values, in_tar[name])
        if values["status"] == "bad":
            counts[kind]["refused"] += 1
            reasons[kind] = values["reason"]
            continue
        decoded = decoded_frames(files / name)
        difference = 1 if decoded is None else values["num_frames"] - decoded
        counts[kind][("short", "equal", "longer")[int(np.sign(difference)) + 1]] += 1
        try:
            slices[kind] += wrong_slices(corpus, row, np.random.default_rng(row))
        except AudioReadError as error:
            slices[kind] += 1
            reasons[kind] = str(error)
    report(counts, slices, reasons)
    total = {key: sum(count[key] for count in counts.values()) for key in ("equal", "refused")}
    short = sum(count["short"] for count in counts.values())
    print(f"\n{len(kind_of)} files of {len(KINDS)} kinds: {total}, short: {short}")
    print(f"wrong slices: {sum(slices.values())}; indexed in {seconds:.1f} s")
    if short or any(slices.values()):
        raise SystemExit(1)


def report(
    counts: dict[str, dict[str, int]], slices: dict[str, int], reasons: dict[str, str]
) -> None:
    print("| kind | files | equal | refused | longer | short | wrong slices | reason |")
    print("|---|---|---|---|---|---|---|---|")
    for kind, count in counts.items():
        cells = [kind, sum(count.values()), *count.values(), slices[kind], reasons.get(kind, "")]
        print("|", " | ".join(map(str, cells)), "|")


if __name__ == "__main__":
    main()
