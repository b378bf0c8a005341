"""Nearest neighbours of clips by cosine similarity, and a page on which they can be played."""

from __future__ import annotations

import base64
import io
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import soundfile as sf
import torch
from jaxtyping import Float, Int
from PIL import Image

from jepa_audio.errors import UserError
from jepa_audio.report.clips import open_audio, read_clip
from jepa_audio.report.embeddings import Embeddings
from jepa_audio.report.spectrogram import log_mel

log = logging.getLogger(__name__)

MAX_RATE_HZ = 24_000
_CHUNK = 1024
# Size of the picture of a clip, in pixels.
_WIDTH, _HEIGHT = 168, 56


@dataclass(frozen=True)
class Agreement:
    """How often neighbours have the label of their clip.

    Attributes:
        precision: mean share of the k nearest neighbours with the label of the clip, over all clips
            whose label occurs again in another file; NaN if there are none.
        chance: the same share for neighbours that are drawn at random.
        num_clips: number of these clips.
    """

    precision: float
    chance: float
    num_clips: int


def nearest(
    embeddings: Embeddings, rows: Int[np.ndarray, " Q"], k: int
) -> tuple[Int[np.ndarray, "Q k"], Float[np.ndarray, "Q k"]]:
    """The k nearest clips of each row by cosine similarity, without clips of the same file.

    Returns:
        Rows of the neighbours, nearest first, and their similarities; -1 and NaN where there are
        fewer than k clips of other files.
    """
    unit = torch.from_numpy(np.ascontiguousarray(embeddings.vectors, dtype=np.float32))
    unit = unit / unit.norm(dim=1, keepdim=True).clamp_min(1e-12)
    file = torch.from_numpy(np.unique(np.array(embeddings.paths), return_inverse=True)[1])
    k = min(k, len(embeddings))
    found, similar = [], []
    for chunk in torch.from_numpy(np.asarray(rows)).split(_CHUNK):
        cosine = unit[chunk] @ unit.T
        cosine[file[chunk, None] == file] = -torch.inf
        values, indices = cosine.topk(k, dim=1)
        is_clip = values.isfinite()
        found.append(torch.where(is_clip, indices, -1))
        similar.append(torch.where(is_clip, values, torch.nan))
    return torch.cat(found).numpy(), torch.cat(similar).numpy()


def label_agreement(embeddings: Embeddings, k: int) -> Agreement:
    """The precision at k of the labels over all clips, see `Agreement`."""
    labels = np.unique(np.array(embeddings.labels), return_inverse=True)[1]
    files = np.unique(np.array(embeddings.paths), return_inverse=True)[1]
    of_label, of_file = Counter(labels.tolist()), Counter(files.tolist())
    of_both = Counter(zip(labels.tolist(), files.tolist(), strict=True))
    pairs = list(zip(labels.tolist(), files.tolist(), strict=True))
    # Other clips with the same label, and all other clips, without those of the same file.
    same = np.array([of_label[label] - of_both[label, file] for label, file in pairs])
    others = np.array([len(pairs) - of_file[file] for _, file in pairs])
    rows = np.flatnonzero(same > 0)
    if not len(rows):
        return Agreement(float("nan"), float("nan"), 0)
    neighbours, _ = nearest(embeddings, rows, k)
    is_clip = neighbours >= 0
    agree = (labels[neighbours] == labels[rows, None]) & is_clip
    precision = (agree.sum(axis=1) / is_clip.sum(axis=1)).mean()
    return Agreement(float(precision), float((same / others)[rows].mean()), len(rows))


def choose_queries(
    embeddings: Embeddings, count: int, names: Sequence[str], seed: int
) -> Int[np.ndarray, " Q"]:
    """Rows of the clips whose path ends with a name; without names, one clip of each label in turn.

    Raises:
        UserError: if no path ends with a name.
    """
    if names:
        rows = []
        for name in names:
            matches = [row for row, path in enumerate(embeddings.paths) if path.endswith(name)]
            if not matches:
                raise UserError(f"`queries`: none of {len(embeddings)} clips is of a file {name}")
            rows.append(matches[0])
        return np.array(rows)
    order = np.random.default_rng(seed).permutation(len(embeddings))
    seen: Counter[str] = Counter()
    turns = []
    for row in order.tolist():
        seen[embeddings.labels[row]] += 1
        turns.append(seen[embeddings.labels[row]])
    return order[np.argsort(turns, kind="stable")][: min(count, len(order))]


@dataclass
class AudioPlayers:
    """The players of a page: the audio is in the page up to a limit, and linked above it.

    Attributes:
        page: the HTML file; links are relative to its folder.
        link: link all clips, instead of embedding them.
        max_megabytes: limit of the embedded audio and pictures of the page, in 10^6 bytes.
        max_seconds: longer clips are cut.
    """

    page: Path
    link: bool = False
    max_megabytes: float = 20.0
    max_seconds: float = 10.0
    num_bytes: int = 0
    num_linked: int = 0

    def player(self, path: str, start: float, end: float) -> dict[str, Any]:
        """The source of an `<audio>` element, a picture, or the reason why there is none."""
        if not Path(path).is_file():
            return {"missing": "no file at this path (or it is in a tar)", "cut": False}
        rate = min(MAX_RATE_HZ, open_audio(Path(path)).sample_rate)
        length = min(end - start, self.max_seconds)
        clip = read_clip(Path(path), rate, 1, start, length).numpy()[0]
        picture = _picture(clip, rate)
        shown = {"picture": _data_uri("image/png", picture), "missing": ""}
        found = {**shown, "cut": end - start > self.max_seconds + 1e-6}
        audio = io.BytesIO()
        sf.write(audio, clip.clip(-1, 1), rate, format="FLAC", subtype="PCM_16")
        size = len(audio.getvalue()) + len(picture)
        if self.link or self.num_bytes + size > 1e6 * self.max_megabytes:
            self.num_linked += 1
            relative = os.path.relpath(Path(path).absolute(), self.page.absolute().parent)
            return {**found, "source": f"{quote(relative)}#t={start:g},{start + length:g}"}
        self.num_bytes += size
        return {**found, "source": _data_uri("audio/flac", audio.getvalue())}


def build_page(
    embeddings: Embeddings, rows: Int[np.ndarray, " Q"], k: int, players: AudioPlayers
) -> dict[str, Any]:
    """The values that the template `neighbours.html` shows."""
    found, similar = nearest(embeddings, rows, k)
    queries = [
        {
            **_card(embeddings, int(row), players),
            "neighbours": [
                {
                    **_card(embeddings, int(other), players),
                    "cosine": float(cosine),
                    "agrees": embeddings.labels[other] == embeddings.labels[row],
                }
                for other, cosine in zip(others, cosines, strict=True)
                if other >= 0
            ],
        }
        for row, others, cosines in zip(rows, found, similar, strict=True)
    ]
    if players.num_linked and not players.link:
        log.info(
            "%d clips are linked, not embedded: the page would have more than %g MB "
            "(`--max_megabytes`)",
            players.num_linked,
            players.max_megabytes,
        )
    return {
        "title": "Nearest neighbours",
        "label_name": embeddings.label_name,
        "k": k,
        "num_clips": len(embeddings),
        "num_labels": len(set(embeddings.labels)),
        "agreement": label_agreement(embeddings, k),
        "queries": queries,
        "players": players,
    }


def _card(embeddings: Embeddings, row: int, players: AudioPlayers) -> dict[str, Any]:
    path, (start, end) = embeddings.paths[row], embeddings.spans[row].tolist()
    span = {"start": start, "end": end, "label": embeddings.labels[row]}
    return {"path": path, "name": Path(path).name, **span, **players.player(path, start, end)}


def _picture(clip: Float[np.ndarray, " S"], rate: int) -> bytes:
    """A small log-mel spectrogram as PNG, dark where it is loud, up to 60 dB below the maximum."""
    # The transform needs one window of audio.
    padded = torch.from_numpy(np.pad(clip, (0, max(0, rate // 10 - len(clip)))))
    level = log_mel(len(padded), rate)(padded[None, None])[0, 0].numpy()
    share = ((level - level.max()) / np.log(1000) + 1).clip(0, 1)
    image = Image.fromarray((255 * (1 - share[::-1])).astype(np.uint8))
    file = io.BytesIO()
    image.resize((_WIDTH, _HEIGHT), Image.Resampling.BOX).save(file, "png", optimize=True)
    return file.getvalue()


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
