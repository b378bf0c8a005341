"""The commands `plot ...` for pictures; their docstrings are their `--help`."""

from __future__ import annotations

import logging
import zipfile
from collections import Counter
from pathlib import Path

import torch

from jepa_audio.errors import UserError
from jepa_audio.files import write_text
from jepa_audio.inference.load import Which, find_encoder, load_encoder
from jepa_audio.inference.windowed import scale_loudness
from jepa_audio.report.attention import Kind, attention_maps, draw_attention, find_query
from jepa_audio.report.clips import read_clip
from jepa_audio.report.curves import draw_overlay
from jepa_audio.report.embeddings import Embeddings, embed_corpus, read_embeddings
from jepa_audio.report.figures import check_format, write_picture
from jepa_audio.report.latents import draw_latents, umap_layout
from jepa_audio.report.neighbours import AudioPlayers, build_page, choose_queries
from jepa_audio.report.page import render
from jepa_audio.report.results import current, read_results
from jepa_audio.report.run_scores import results_of_runs
from jepa_audio.report.runs import find_several
from jepa_audio.report.spectrogram import clip_spectrogram

log = logging.getLogger(__name__)


def attention(
    encoder: str,
    audio: Path,
    output: Path = Path("attention.png"),
    layers: list[int] | None = None,
    heads: list[int] | None = None,
    kind: Kind = "both",
    start: float = 0.0,
    query_seconds: float | None = None,
    query_hz: float | None = None,
    which: Which = "context",
) -> None:
    """Draw where an encoder attends in a clip, on the spectrogram of the clip.

    Args:
        encoder: a run folder, a checkpoint, an exported folder, or a model of the Hub.
        audio: audio file; the clip is at most as long as a training crop.
        output: output file (-o): .png, .svg, .pdf or .html.
        layers: numbers of the layers, "[1, 4]"; -1 is the last. The default is up to 4, evenly
            spaced.
        heads: numbers of the heads, from 1. The default is the mean over all heads.
        kind: "query": attention of one query token to all tokens; "received": attention that each
            token receives, mean over all queries; "both".
        start: start of the clip in seconds.
        query_seconds: time of the query token, in seconds from the start of the clip. The default
            is the loudest token.
        query_hz: frequency of the query token in Hz, for spectrogram front ends.
        which: "context", "target" or "random" (the weights of step 0) encoder.
    """
    check_format(output)
    opened = load_encoder(encoder, which)
    seconds = opened.window_samples / opened.sample_rate
    clip = read_clip(audio, opened.sample_rate, opened.num_channels, start, seconds)
    if clip.shape[-1] < opened.min_samples:
        raise UserError(
            f"{audio}: the clip of {clip.shape[-1] / opened.sample_rate:.3g} s is shorter than one "
            f"token of the encoder ({opened.min_samples / opened.sample_rate:.3g} s)"
        )
    clip = scale_loudness(clip[None], opened.loudness_dbfs)[0]
    front_end, transformer = opened.front_end, opened.encoder
    maps = attention_maps(
        front_end,
        transformer,
        clip,
        layers=layers or (),
        heads=heads or (),
        kind=kind,
        query=find_query(front_end, clip, query_seconds, query_hz),
    )
    covered = clip_spectrogram(front_end, clip).seconds
    if (rest := clip.shape[-1] / opened.sample_rate - covered) > 5e-3:
        log.info("the last %.3g s of the clip fill no token and are not drawn", rest)
    end = start + covered
    title = (
        f"Attention of {encoder_name(encoder)}, {which}: {audio.name}, {start:.2f} to {end:.2f} s"
    )
    columns = min(4, len(heads or ())) or 2
    write_picture(draw_attention(front_end, clip, maps, title, columns), output, title)


def latents(
    source: str,
    corpus: str | None = None,
    output: Path = Path("latents.png"),
    labels: Path | None = None,
    label_column: str = "label",
    max_clips: int = 2000,
    umap: bool = True,
    layer: int = -1,
    which: Which = "context",
) -> None:
    """Draw a map of embeddings: PCA with explained variance, and UMAP if it is installed.

    Points have the colour of their label, or of their source folder.

    Args:
        source: a file of `jepa-audio embed` (.parquet, .npz or .h5), or an encoder: a run folder, a
            checkpoint, or an exported folder.
        corpus: for an encoder, the audio: a folder, a table (.parquet), or another source.
        output: output file (-o): .png, .svg, .pdf or .html.
        labels: table of labels: a column `path`, relative to the folder of the table, and a column
            of labels.
        label_column: the column of the labels.
        max_clips: largest number of clips; a random sample of them is drawn.
        umap: False leaves UMAP out.
        layer: for an encoder, the layer; -1 is the last.
        which: for an encoder, "context", "target" or "random".
    """
    check_format(output)
    embeddings = find_embeddings(source, corpus, labels, label_column, max_clips, layer, which)
    title = f"Latents of {encoder_name(source)}"
    layout = umap_layout(embeddings.vectors) if umap else None
    write_picture(draw_latents(embeddings, title, layout), output, title)


def neighbours(
    source: str,
    corpus: str | None = None,
    output: Path = Path("neighbours.html"),
    labels: Path | None = None,
    label_column: str = "label",
    k: int = 5,
    num_queries: int = 8,
    queries: list[str] | None = None,
    link: bool = False,
    max_megabytes: float = 20.0,
    max_seconds: float = 10.0,
    max_clips: int = 20_000,
    layer: int = -1,
    which: Which = "context",
    seed: int = 0,
) -> None:
    """Write a page with players: some clips and their nearest clips by cosine similarity.

    With labels, the page has the precision at k over all clips, and its chance level.

    Args:
        source: a file of `jepa-audio embed` (.parquet, .npz or .h5), or an encoder, as for `plot
            latents`.
        corpus: for an encoder, the audio.
        output: output file (-o): .html.
        labels: table of labels, as for `plot latents`. The default is the source folder.
        label_column: the column of the labels.
        k: number of neighbours of each query.
        num_queries: number of queries, of each label in turn.
        queries: ends of the paths of the queries, "[dog/1.wav, 2.wav]", instead of a choice.
        link: link the audio files by relative paths; the default puts the audio into the page.
        max_megabytes: limit of the audio in the page; further clips are linked.
        max_seconds: longer clips are cut.
        max_clips: largest number of clips to compare.
        layer: for an encoder, the layer; -1 is the last.
        which: for an encoder, "context", "target" or "random".
        seed: seed of the choice of the queries.
    """
    if output.suffix != ".html":
        raise UserError(f"`output` ({output}) must end with .html: only a page can play audio")
    if k < 1 or num_queries < 1:
        raise UserError(f"`k` ({k}) and `num_queries` ({num_queries}) must be at least 1")
    embeddings = find_embeddings(source, corpus, labels, label_column, max_clips, layer, which)
    num_others = len(embeddings) - min(Counter(embeddings.paths).values())
    if k > num_others:
        log.warning("`k` (%d) is limited to the %d clips of other files", k, num_others)
        k = max(1, num_others)
    rows = choose_queries(embeddings, num_queries, queries or (), seed)
    players = AudioPlayers(output, link, max_megabytes, max_seconds)
    content = build_page(embeddings, rows, k, players) | {"source": encoder_name(source)}
    write_text(output, render("neighbours.html", content))
    log.info("the page is %s", output)


def runs(
    folders: list[str],
    output: Path = Path("runs.png"),
    keys: list[str] | None = None,
) -> None:
    """Draw the curves of several runs over each other: loss, rank, scores of probes.

    Args:
        folders: runs, or folders with runs; `run_function` defines the help.
        output: output file (-o): .png, .svg, .pdf or .html.
        keys: patterns of metric keys, "[train/loss, 'collapse/*']"; "['*']" for all. The default
            is losses, rank and probe scores.
    """
    check_format(output)
    found, files = find_several(list(map(Path, folders)))
    title = ", ".join(folders) if len(folders) < 4 else f"{len(found)} runs"
    try:
        table = read_results(files)
    except UserError as error:
        log.warning("no scores of probes: %s", error)
        table = read_results([])
    results = results_of_runs(found, table)
    problems = [line for run in found for line in (*run.damage, results[run.folder].problem)]
    for problem in dict.fromkeys(filter(None, problems)):
        log.warning("%s", problem)
    lines = {folder: current(own.table) for folder, own in results.items()}
    write_picture(draw_overlay(found, lines, keys, title), output, title)


def find_embeddings(
    source: str,
    corpus: str | None,
    labels: Path | None,
    label_column: str,
    max_clips: int,
    layer: int,
    which: Which,
) -> Embeddings:
    """The embeddings of a file, or of an encoder and a corpus, with labels."""
    if max_clips < 2:
        raise UserError(f"`max_clips` ({max_clips}) must be at least 2")
    is_file = source.endswith((".parquet", ".npz", ".h5"))
    if is_file and corpus is not None:
        raise UserError(f"`corpus` ({corpus}) is for an encoder: {source} has embeddings already")
    if not is_file:
        _check_encoder(source)
    if is_file:
        embeddings = read_embeddings(Path(source))
    elif corpus is None:
        raise UserError(
            f"{source} is an encoder: give the audio with `--corpus DIR`, or the file that "
            f"`jepa-audio embed {source} DIR -o embeddings.parquet` writes"
        )
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        opened = load_encoder(source, which).to(device)
        embeddings = embed_corpus(opened, corpus, max_clips, layer)
    if labels is not None:
        embeddings = embeddings.labelled(labels, label_column)
    return embeddings.sample(max_clips)


def _check_encoder(source: str) -> None:
    """Refuse a file or folder that is no encoder; names of models on the Hub are not checked."""
    path = Path(source).expanduser()
    detail = ""
    if path.is_file():
        if path.suffix in (".ckpt", ".safetensors") or zipfile.is_zipfile(path):
            return
    elif path.parent.exists():
        try:
            find_encoder(source)
        except UserError as error:
            detail = f": {error}"
        else:
            return
    else:
        return
    raise UserError(
        f"`{source}` is neither a file of `jepa-audio embed` (.parquet, .npz, .h5) nor an encoder"
        f"{detail}"
    )


def encoder_name(name: str) -> str:
    """A short name for titles: that of the run, if the checkpoint is in the folder of a run."""
    path = Path(name)
    if path.suffix == ".ckpt" and path.parent.name == "checkpoints":
        path = path.parent.parent
    return path.resolve().name
