"""One page about a folder of runs: what was learned, how that is known, and how it was run."""

from __future__ import annotations

import base64
import csv
import io
import logging
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from html import escape
from importlib.metadata import version
from pathlib import Path
from string import Template

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from jepa_audio.data.audio.read import read
from jepa_audio.data.audio.resample import resample
from jepa_audio.data.corpus.table import load_corpus
from jepa_audio.data.loading.file_table import FileTable
from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.probing.rows import ProbeRow, current, read_jsonl
from jepa_audio.report.pictures import VARIANTS, draw_layers, draw_probe
from jepa_audio.report.plots import Curve, draw_curves, draw_masks, is_online_score, standard_panels
from jepa_audio.steps.front_ends import FrontEnd, SpectrogramFrontEnd
from jepa_audio.steps.front_ends.transforms import LogMel
from jepa_audio.steps.grid import Grid, Masks
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.load import load_jepa, read_checkpoint

log = logging.getLogger(__name__)

NUM_DRAWS = 3
VERDICTS = {
    "ahead": "Ahead of its random-init twin",
    "behind": "Behind its random-init twin",
    "no significant difference": "No significant difference to its random-init baseline",
}
LIMITS = (
    "The intervals hold the noise of the test split, not that of training seeds: another seed can give"
    " another verdict. Repeat with three or more before claiming anything.",
    "{compared} differences were tested at 95 % each, uncorrected: by chance one in twenty excludes zero.",
    "Being ahead of an untrained twin is not being ahead of log-mel statistics; look at both.",
    "A low loss is no evidence of learning, nor is a high rank: the targets move with the encoder.",
    "The losses of the trivial predictors, and the loss compared with them, are of batches just trained on.",
    "Speed is that of the machine that trained, which may not be the one below.",
)
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.5 sans-serif; color: #222; max-width: 1010px; margin: 2rem auto; padding: 0 1em;
} h1 { font-size: 1.6rem; margin: 0 0 .2rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .6rem; border-top: 1px solid #ddd; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; } h2, h3, code, pre { overflow-wrap: anywhere; }
p, ul { max-width: 75ch; margin: .4rem 0; }
.quiet { color: #6a6a6a; font-size: .87rem; } .scroll { overflow-x: auto; }
.badge { font-size: .8rem; margin-left: .5rem; padding: .1rem .5rem; border-radius: 1rem;
background: #eee; } .ahead { color: #00507d; font-weight: 600; } .badge.ahead { background: #dcedf7;
    }
.behind { color: #9a4300; font-weight: 600; } .badge.behind { background: #fbe6d8; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; margin:
.8rem 0; } th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid #eee;
} td { vertical-align: top; white-space: nowrap; }
img { max-width: 100%; height: auto; display: block; margin: .8rem 0 1.6rem; }
code, pre { font: .85rem/1.45 ui-monospace, monospace; } summary { cursor: pointer; }
pre { background: #f6f6f6; padding: .8rem; white-space: pre-wrap; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="quiet">$subtitle</p>
$body
</body>
</html>
""")


@dataclass(frozen=True)
class RunRecord:
    """What a run left behind in its folder."""

    name: str
    folder: Path
    curves: Mapping[str, Curve]

    def curve(self, key: str) -> Curve:
        """Steps and values, empty if nothing was logged."""
        return self.curves.get(key, (np.empty(0), np.empty(0)))

    def last(self, key: str) -> float:
        """The last finite value, NaN if there is none."""
        values = self.curve(key)[1]
        return next((float(value) for value in values[::-1] if math.isfinite(value)), math.nan)


def write_report(directory: Path) -> Path:
    """Write `report.html` about the runs in a folder, and its pictures to `figures/`.

    Args:
        directory: one run, or a folder of runs with `probe/results.jsonl` if they were probed.

    Returns:
        The page; it holds its pictures and needs no other file.

    Raises:
        UserError: if there is no such folder.
        UserError: if nothing in it was written by a run or a probe.
    """
    if not directory.is_dir():
        raise MissingFileError(f"no folder at {directory}: give the folder that holds the runs")
    folders = [directory, *sorted(path for path in directory.iterdir() if path.is_dir())]
    runs = [_read_run(folder) for folder in folders if _metric_files(folder)]
    results = directory / "probe" / "results.jsonl"
    rows = current(read_jsonl(results)) if results.is_file() else []
    if not runs and not rows:
        raise UserError(
            f"{directory} holds no runs (sub-folders with a metrics.csv) and no probe results "
            f"(probe/results.jsonl): give the folder above the `--run_dir` of `jepa-audio fit`"
        )
    figures = directory / "figures"
    figures.mkdir(exist_ok=True)
    page = directory / "report.html"
    page.write_text(_page(directory.resolve().name, runs, rows, figures), encoding="utf-8")
    log.info("the report is %s", page)
    return page


def _page(name: str, runs: Sequence[RunRecord], rows: Sequence[ProbeRow], figures: Path) -> str:
    parts = ["<h2>Verdict</h2>", *(_verdict(run, rows) for run in runs)]
    parts += ["<h2>Probes</h2>", _probe_section(rows, figures)]
    for run in runs:
        curves = draw_curves(
            {run.name: run.curves}, standard_panels({run.name: run.curves}), "While training"
        )
        parts += [
            f"<h2>Run: {escape(run.name)}</h2>",
            _image(curves, figures, f"{run.name}-curves"),
        ]
        parts += [_masks_section(run, figures), _how_it_was_run(run)]
    compared = sum(row.against_random is not None for row in rows)
    limits = "".join(f"<li>{limit.format(compared=compared)}</li>" for limit in LIMITS)
    parts += ["<h2>What this does not show</h2>", f"<ul>{limits}</ul>"]
    parts += ["<h2>Where this page was written</h2>", _environment()]
    subtitle = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}, {datetime.now():%Y-%m-%d %H:%M}"
    return PAGE.substitute(
        title=escape(f"jepa-audio report: {name}"), subtitle=subtitle, body="\n".join(parts)
    )


def _metric_files(folder: Path) -> list[Path]:
    """One for each time that the run was started, in that order."""
    starts = sorted(
        folder.glob("metrics/version_*/metrics.csv"), key=lambda file: int(file.parent.name[8:])
    )
    return [file for file in (folder / "metrics.csv", *starts) if file.is_file()]


def _read_run(folder: Path) -> RunRecord:
    logged: dict[str, dict[int, float]] = {}
    for path in _metric_files(folder):
        with path.open(newline="") as file:
            lines = [
                (int(float(line.pop("step"))), line)
                for line in csv.DictReader(file)
                if line.get("step")
            ]
        # A resumed run goes back to its checkpoint: what was logged beyond that never happened.
        first = min((step for step, _ in lines), default=0)
        logged = {
            key: {step: v for step, v in at.items() if step < first} for key, at in logged.items()
        }
        for step, line in lines:
            for key, value in line.items():
                if value and key != "epoch":
                    logged.setdefault(key, {})[step] = float(value)
    points = {key: np.array(sorted(at.items())) for key, at in logged.items() if at}
    return RunRecord(
        folder.resolve().name, folder, {key: (at[:, 0], at[:, 1]) for key, at in points.items()}
    )


def _verdict(run: RunRecord, rows: Sequence[ProbeRow]) -> str:
    """One plain paragraph: learned or not, collapsed or not, better than a trivial predictor or not."""
    found: dict[str, list[str]] = {}
    own = [row for row in rows if row.encoder == run.name and row.against_random is not None]
    several = len({_protocol(row) for row in own}) > 1
    for row in [row for row in own if row.head != "knn"] or own:
        gap = row.against_random
        assert gap is not None
        task = row.task + (f", {_protocol(row)}" if several else "")
        said = f"{_name(row)} on {task} ({gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}])"
        found.setdefault(gap.verdict, []).append(said)
    sentences = [
        f"{VERDICTS[word]}: {'; '.join(found[word])}." for word in VERDICTS if word in found
    ]
    if not found:
        sentences = [
            "It was not probed, and nothing else tells whether it learned.",
            *_online_probes(run),
        ]
    text = " ".join([*sentences, _collapse(run), *_losses(run)])
    badge, color = _badge(found.keys())
    heading = f'<h3>{escape(run.name)} <span class="badge {color}">{badge}</span></h3>'
    return f"{heading}\n<p>{escape(text)}</p>"


def _badge(words: Set[str]) -> tuple[str, str]:
    if "ahead" in words:
        return ("ahead and behind", "") if "behind" in words else ("learned", "ahead")
    if "behind" in words:
        return "worse than untrained", "behind"
    return ("no significant difference to untrained" if words else "not probed"), ""


def _name(row: ProbeRow) -> str:
    return VARIANTS.get(row.variant, (row.variant,))[0]


def _protocol(row: ProbeRow) -> str:
    return row.preset if row.select == "best" else f"{row.preset}, {row.select} epoch"


def _online_probes(run: RunRecord) -> Iterator[str]:
    for key in sorted(run.curves):
        if is_online_score(key):
            _, task, metric = key.split("/")
            twin = run.last(f"probe/{task}/twin")
            yield f"While training, {task} was last at {run.last(key):.3f} ({metric}), its twin at {twin:.3f}."


def _collapse(run: RunRecord) -> str:
    steps, raised = run.curve("collapse/alarm")
    if not len(steps):
        return "Collapse was not watched."
    said = f"Not collapsed: no alarm at any of {len(steps)} looks"
    if (raised > 0).any():
        first = steps[raised > 0][0]
        end = "and still at the last" if raised[-1] > 0 else "but no longer at the last"
        said = f"Collapse alarm at {(raised > 0).sum()} of {len(steps)} looks, first at step {first:.0f}, {end}"
    ranks = [f"{rank:.1f}" for rank in run.curve("collapse/context_rank")[1]] or ["unknown"]
    return f"{said}; RankMe of the context went from {ranks[0]} to {ranks[-1]}."


def _losses(run: RunRecord) -> Iterator[str]:
    _, losses = run.curve("train/loss")
    if len(losses) and not math.isfinite(losses[-1]):
        yield "The last training loss is not a finite number."
    loss, mean = run.last("collapse/loss"), run.last("collapse/loss_mean_target")
    copied = run.last("collapse/loss_nearest_context")
    if all(map(math.isfinite, (loss, mean, copied))):
        by_mean, by_copy = ("below" if loss < other else "not below" for other in (mean, copied))
        yield f"The last loss, {loss:.3g}, is {by_mean} that of predicting the mean target ({mean:.3g})"
        yield f"and {by_copy} that of copying the nearest context token ({copied:.3g})."
    if math.isfinite(valid := run.last("valid/loss")):
        yield f"The last validation loss is {valid:.3g}."


def _probe_section(rows: Sequence[ProbeRow], figures: Path) -> str:
    if not rows:
        return "<p>No run was probed: <code>jepa-audio probe</code> tells whether they learned anything.</p>"
    note = (
        "Test scores with 95 % intervals, and the layer; below each, the difference to the random-init twin"
        " on the same test units, in colour only where its interval excludes zero; of several seeds of the head, the"
        " means. Layers and settings were chosen on the validation split."
    )
    parts = [f'<p class="quiet">{note}</p>']
    protocols = list(dict.fromkeys(map(_protocol, rows)))
    for protocol in protocols:
        own = [row for row in rows if _protocol(row) == protocol]
        several = len(protocols) > 1
        suffix = "-" + protocol.replace(", ", "-").replace(" ", "-") if several else ""
        parts += [f"<h3>{escape(protocol)}</h3>" if several else "", _probe_table(own)]
        parts.append(_image(draw_probe(own, "What the heads read off"), figures, f"probe{suffix}"))
        parts.append(_image(draw_layers(own, "Where in the network"), figures, f"layers{suffix}"))
    return "\n".join(parts)


def _probe_table(rows: Sequence[ProbeRow]) -> str:
    tasks = {row.task: _header(row) for row in rows}
    lines: dict[tuple[str, ...], dict[str, ProbeRow]] = {}
    for row in rows:
        line_of_row = (row.encoder, _name(row), row.pooling, row.head, row.encoder_hash)
        lines.setdefault(line_of_row, {})[row.task] = row
    header = ("encoder", "", "frequency", "head", *tasks.values())
    names = "".join(f"<th>{escape(name)}</th>" for name in header)
    body, former = "", ""
    for line, cells in sorted(lines.items(), key=lambda item: item[0][0]):
        encoder = "" if line[0] == former else f"<b>{escape(line[0])}</b>"
        shown = [encoder, *map(escape, line[1:4]), *(_cell(cells.get(task)) for task in tasks)]
        body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in shown) + "</tr>\n"
        former = line[0]
    return f'<div class="scroll"><table><tr>{names}</tr>\n{body}</table></div>'


def _header(row: ProbeRow) -> str:
    chance = "" if row.chance is None else f", chance {row.chance:.3f}"
    return f"{row.task}: {row.metric}{chance}, {row.num_test} {row.unit}s"


def _cell(row: ProbeRow | None) -> str:
    if row is None:
        return '<span class="quiet">not asked</span>'
    layer = f'<span class="quiet">{escape(row.layer)}</span>'
    score = f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}] {layer}"
    if (gap := row.against_random) is None:
        return score
    color = "quiet" if gap.verdict == "no significant difference" else gap.verdict
    said = f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] {gap.verdict}"
    return f'{score}<br><span class="{color}">{said}</span>'


def _masks_section(run: RunRecord, figures: Path) -> str:
    try:
        return _image(_draw_run_masks(run), figures, f"{run.name}-masks")
    except UserError as error:
        return f'<p class="quiet">No picture of the masks: {escape(str(error))}.</p>'


def _draw_run_masks(run: RunRecord) -> Figure:
    """Masks over a clip of the run's own corpus, from its checkpoint.

    Raises:
        UserError: if the checkpoint is gone.
        UserError: if the corpus is gone, or the checkpoint does not tell where it was.
    """
    path = run.folder / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(path)
    data, step = checkpoint.get("datamodule_hyper_parameters", {}), checkpoint["global_step"]
    if not {"root", "crop_seconds"} <= data.keys():
        raise UserError(f"{path} does not tell `root` and `crop_seconds` of the corpus")
    jepa = load_jepa(path)
    root = data["root"]
    source = (
        root if isinstance(root, str) else next(iter(root))
    )  # of a list or a mixture, the first
    waveform = _clip(source, data["crop_seconds"], jepa.front_end.sample_rate)
    return draw_masks_of(
        jepa, waveform, step, f"What is seen, and what is predicted from it, at step {step}"
    )


def draw_masks_of(jepa: JEPA, waveform: Float[Tensor, "1 S"], step: int, title: str) -> Figure:
    """Some draws of a model's masker over a clip at its sample rate."""
    grid = jepa.front_end.grid(waveform.shape[-1])
    generator = torch.Generator().manual_seed(0)
    masks = [jepa.masker(grid, 1, generator, step) for _ in range(NUM_DRAWS)]
    if not isinstance(
        jepa.front_end, SpectrogramFrontEnd
    ):  # rows are channels, no frequencies: the first one is drawn
        planes = [
            (each.context.to_mask(grid.num_tokens), each.targets.to_mask(grid.num_tokens))
            for each in masks
        ]
        masks = [
            Masks.from_bool(*(plane[..., :: grid.num_freq] for plane in both)) for both in planes
        ]
        grid = Grid(1, grid.num_time)
    image, seconds, band_hz = _spectrogram(jepa.front_end, waveform)
    return draw_masks(image, grid, masks, clip=0, seconds=seconds, title=title, band_hz=band_hz)


@torch.no_grad()
def _spectrogram(
    front_end: FrontEnd, waveform: Tensor
) -> tuple[np.ndarray, float, np.ndarray | None]:
    """The front end's own spectrogram as far as tokens reach, else a log-mel one; seconds; bands in Hz."""
    num_samples, sample_rate = waveform.shape[-1], front_end.sample_rate
    if isinstance(front_end, SpectrogramFrontEnd):
        transform = front_end.spectrogram
        num_frames = front_end.grid(num_samples).num_time * front_end.patch_frames
        seconds = num_frames * transform.hop_length / sample_rate
    else:
        transform = LogMel(sample_rate, n_fft=1024, hop_length=sample_rate // 100, n_mels=64)
        num_frames, seconds = transform.num_frames(num_samples), num_samples / sample_rate
    image = transform(waveform[None])[0, 0, :, :num_frames].numpy()
    if not isinstance(transform, LogMel):
        return image, seconds, None
    bins_hz = torch.linspace(0, sample_rate / 2, transform.bank.shape[1])
    return image, seconds, (transform.bank @ bins_hz / transform.bank.sum(dim=1)).numpy()


def _clip(source: str, seconds: float, sample_rate: int) -> Float[Tensor, "1 S"]:
    """The middle of the file of median level among those that are long enough."""
    corpus = load_corpus(source).mark_unfit(min_seconds=seconds).usable()
    if not len(corpus):
        raise UserError(f"no file under {source} is {seconds:g} s long")
    file = FileTable([corpus])[int(np.argsort(corpus.table["rms"].to_numpy())[len(corpus) // 2])]
    num_frames = min(math.ceil(seconds * file.sample_rate) + 1, file.num_frames)
    samples, rate = read(file.audio, (file.num_frames - num_frames) // 2, num_frames)
    mono = torch.from_numpy(samples).mean(dim=0, keepdim=True)
    return resample(mono, rate, sample_rate)[:, : round(seconds * sample_rate)]


def _how_it_was_run(run: RunRecord) -> str:
    metrics = _metric_files(run.folder)[-1]
    steps = max((steps[-1] for steps, _ in run.curves.values()), default=0)
    written = datetime.fromtimestamp(metrics.stat().st_mtime)
    said = f"<p>{steps:.0f} optimizer steps logged, the last on {written:%Y-%m-%d at %H:%M}.</p>"
    configs = (run.folder / "config.yaml", metrics.with_name("config.yaml"))
    if config := next((path for path in configs if path.is_file()), None):
        said += (
            f"\n<p>The same again: <code>jepa-audio fit --config {escape(str(config))}</code></p>"
        )
        text = escape(config.read_text(encoding="utf-8"))
        said += f"\n<details><summary>The whole configuration</summary><pre>{text}</pre></details>"
    return said


def _environment() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("jepa-audio", "torch", "lightning"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} CPU cores, {platform.machine()}, {device}"
    text = f"Python {platform.python_version()}, {packages}; {platform.system()}, {machine}."
    return f"<p>{escape(text)}</p>"


def _image(figure: Figure, folder: Path, name: str) -> str:
    """Save a picture and show it, inlined."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    (folder / f"{name}.png").write_bytes(buffer.getvalue())
    data = base64.b64encode(buffer.getvalue()).decode()
    width = round(96 * figure.get_figwidth())
    return f'<img width="{width}" alt="{escape(name)}" src="data:image/png;base64,{data}">'
