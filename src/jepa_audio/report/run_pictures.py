"""The pictures of a run, from its last checkpoint and its own corpus."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from jepa_audio.data.audio.read import read
from jepa_audio.data.audio.resample import resample
from jepa_audio.data.corpus.table import load_corpus
from jepa_audio.data.loading.clips import fit_length
from jepa_audio.data.loading.file_table import FileTable
from jepa_audio.errors import UserError
from jepa_audio.inference.encoder import Encoder
from jepa_audio.inference.load import num_crop_samples
from jepa_audio.report.attention import attention_maps, draw_attention, find_query
from jepa_audio.report.embeddings import embed_files, join
from jepa_audio.report.latents import draw_latents
from jepa_audio.report.masks import draw_model_masks
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.run.load import DamagedCheckpointError, read_checkpoint
from jepa_audio.training.run.models import load_jepa

log = logging.getLogger(__name__)

NUM_CLIPS = 128
"""Clips of a map of latents."""
EVERYTHING = "masks, attention and latents"


def draw_run(folder: Path) -> tuple[dict[str, Figure], dict[str, UserError]]:
    """Draw masks, attention and latents of a run.

    Masks and attention are those of a crop of the file with the median level; the map of latents
    has one crop of each of up to `NUM_CLIPS` files.

    Returns:
        The figures by kind, and for each kind without a figure the reason.
    """
    path = folder / "checkpoints" / "last.ckpt"
    kinds: dict[str, Callable[[Path, JEPA, dict[str, Any]], Figure]] = {
        "masks": _draw_masks,
        "attention": _draw_attention,
        "latents": _draw_latents,
    }
    figures: dict[str, Figure] = {}
    missing: dict[str, UserError] = {}
    try:
        jepa, data = _open(path)
    except UserError as error:
        return {}, {EVERYTHING: error}
    for kind, draw in kinds.items():
        try:
            figures[kind] = draw(path, jepa, data)
        except UserError as error:
            missing[kind] = error
    if len(missing) == len(kinds) and len(set(map(str, missing.values()))) == 1:
        return {}, {EVERYTHING: missing["masks"]}
    return figures, missing


def _open(path: Path) -> tuple[JEPA, dict[str, Any]]:
    """The model of a checkpoint, and the settings of its data with the optimizer `step`."""
    checkpoint = read_checkpoint(path)
    data = checkpoint.get("datamodule_hyper_parameters", {})
    if not {"root", "crop_seconds"} <= data.keys():
        raise UserError(f"{path} does not contain `root` and `crop_seconds` of the corpus")
    return load_jepa(path).eval(), {**data, "step": checkpoint.get("global_step", 0)}


def is_damage(reason: UserError) -> bool:
    """Whether a reason of `draw_run` is a damaged checkpoint."""
    return isinstance(reason, DamagedCheckpointError)


def _draw_masks(path: Path, jepa: JEPA, data: dict[str, Any]) -> Figure:
    return draw_model_masks(jepa, typical_clip(path, jepa, data["root"]), data["step"])


def _draw_attention(path: Path, jepa: JEPA, data: dict[str, Any]) -> Figure:
    front_end = jepa.front_end
    clip = typical_clip(path, jepa, data["root"]).expand(front_end.num_channels, -1)
    maps = attention_maps(front_end, jepa.encoder, clip, query=find_query(front_end, clip))
    title = f"Attention of the context encoder at step {data['step']}"
    return draw_attention(front_end, clip, maps, title)


def _draw_latents(path: Path, jepa: JEPA, data: dict[str, Any]) -> Figure:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_samples = num_crop_samples(path, jepa.front_end.sample_rate)
    encoder = Encoder(jepa.front_end, jepa.encoder, num_samples).to(device)
    sources = [data["root"]] if isinstance(data["root"], str) else list(data["root"])
    each = -(-NUM_CLIPS // len(sources))
    parts = []
    for source in sources:
        corpus = load_corpus(source).usable().shuffled()
        if encoder.num_channels > 1:
            channels = corpus.table["num_channels"].to_numpy()
            corpus = corpus.take((channels == 1) | (channels == encoder.num_channels))
        if len(corpus):
            parts.append(embed_files(encoder, corpus.take(np.arange(min(each, len(corpus))))))
    if sum(map(len, parts)) < 3:
        raise UserError(f"{', '.join(sources)}: fewer than 3 files can be embedded")
    return draw_latents(join(parts), f"Latents of the context encoder at step {data['step']}")


def typical_clip(path: Path, jepa: JEPA, root: Any) -> Float[Tensor, "1 S"]:
    """A training crop, mono, from the middle of the file with the median level of a run's corpus.

    If all files are shorter than a crop, the longest is padded with zeros, as in training.

    Args:
        path: the checkpoint.
        jepa: its model.
        root: `data.root` of the run; of a list or a mixture, the first source is used.

    Raises:
        UserError: if the corpus is missing, or has no usable file.
    """
    source = root if isinstance(root, str) else next(iter(root))
    sample_rate = jepa.front_end.sample_rate
    num_samples = num_crop_samples(path, sample_rate)
    seconds = num_samples / sample_rate
    usable = load_corpus(source).usable()
    corpus = usable.mark_unfit(min_seconds=seconds).usable()
    if not len(usable):
        raise UserError(f"{source} has no usable audio file")
    if len(corpus):
        # The median among the files that are long enough.
        row = int(np.argsort(corpus.table["rms"].to_numpy())[len(corpus) // 2])
    else:
        corpus = usable
        lengths = corpus.table["num_frames"].to_numpy() / corpus.table["sample_rate"].to_numpy()
        row = int(lengths.argmax())
    file = FileTable([corpus])[row]
    num_frames = min(math.ceil(seconds * file.sample_rate) + 1, file.num_frames)
    samples, rate = read(file.audio, (file.num_frames - num_frames) // 2, num_frames, file.decoder)
    mono = torch.from_numpy(samples).mean(dim=0, keepdim=True)
    return fit_length(resample(mono, rate, sample_rate), num_samples)
