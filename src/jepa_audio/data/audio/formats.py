"""Suffixes of audio files: what is read, what needs an extra, and what is only counted."""

from __future__ import annotations

import soundfile as sf

from jepa_audio.data.audio.codec import INSTALL, is_installed

# libsndfile also opens formats of measurements, instruments and samplers, and RAW files without a
# header. These are not searched for: their suffixes often belong to other files.
_BY_FORMAT = {
    "WAV": ".wav .wave .bwf",
    "RF64": ".rf64 .bw64",
    "W64": ".w64",
    "AIFF": ".aif .aiff .aifc .afc",
    "AU": ".au .snd",
    "CAF": ".caf",
    "FLAC": ".flac",
    "OGG": ".ogg .oga .opus",
    "MP3": ".mp3 .mp2 .mp1 .mpa .mpga .m1a .m2a .m3a",
    "NIST": ".sph .nist",
    "VOC": ".voc",
    "IRCAM": ".sf .ircam",
    "PAF": ".paf .fap",
    "PVF": ".pvf",
}
AUDIO_SUFFIXES = frozenset(
    suffix
    for name, suffixes in _BY_FORMAT.items()
    if name in sf.available_formats()
    for suffix in suffixes.split()
)
"""Suffixes of the formats that libsndfile can open, in lower case."""

CODEC_SUFFIXES = frozenset(
    {".m4a", ".m4b", ".mp4", ".m4v", ".mov", ".aac", ".webm", ".mka", ".mkv", ".wv"}
)
"""Suffixes of audio and video files that torchcodec can read."""

OTHER_SUFFIXES = frozenset({
    ".wma", ".ape", ".amr", ".ac3", ".eac3", ".dts", ".mpc", ".tta", ".tak", ".ra", ".rm", ".gsm",
    ".avi", ".wmv", ".flv", ".3gp", ".mpg", ".mpeg", ".dsf", ".dff", ".mid", ".midi", ".vox",
    ".avr", ".8svx", ".svx", ".iff", ".sds", ".sd2", ".xi", ".wve", ".htk", ".raw", ".pcm",
    ".spx",
})  # fmt: skip
"""Suffixes of audio and video files that are not read."""


def audio_suffixes() -> frozenset[str]:
    """Suffixes of the files that can be read here; more if torchcodec is installed."""
    return AUDIO_SUFFIXES | CODEC_SUFFIXES if is_installed() else AUDIO_SUFFIXES


def describe_unread(counts: dict[str, int]) -> str:
    """One sentence on the files that are not read, from their number by suffix."""
    listed = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
    remedies = []
    if counts.keys() & CODEC_SUFFIXES:
        remedies.append(INSTALL)
    if counts.keys() - CODEC_SUFFIXES:
        remedies.append("convert other formats to .flac")
    return f"{sum(counts.values())} files are not read: {listed} ({'; '.join(remedies)})"
