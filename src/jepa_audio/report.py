"""One page about a folder of runs: what was learned, how that is known, and how it was run."""

from __future__ import annotations

import base64
import csv
import io
import logging
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from jepa_audio.data.index import load_index, usable
from jepa_audio.data.read import AudioReadError, read
from jepa_audio.data.resample import resample
from jepa_audio.front_ends import FrontEnd, SpectrogramFrontEnd
from jepa_audio.front_ends.transforms import LogMel
from jepa_audio.jepa import JEPA
from jepa_audio.plots import Curve, draw_curves, draw_layers, draw_masks, draw_probe, standard_panels
from jepa_audio.probing.results import ProbeRow, read_jsonl

log = logging.getLogger(__name__)

NUM_DRAWS = 3
VARIANT_NAMES = {"context": "context encoder", "target": "target encoder", "random": "random twin"}
VERDICTS = {
    "ahead": "Ahead of its random-init twin",
    "behind": "Behind its random-init twin",
    "not told apart": "Not told apart from its random-init twin",
}

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #222; max-width: 1010px; margin: 2.5rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .6rem; border-top: 1px solid #ddd; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; overflow-wrap: anywhere; }
p, ul { max-width: 75ch; margin: .4rem 0; }
.quiet { color: #6a6a6a; font-size: .87rem; }
.badge { font-size: .8rem; font-weight: 600; margin-left: .5rem; padding: .1rem .5rem; border-radius: 1rem;
  background: #eee; color: #555; white-space: nowrap; }
.ahead { color: #00507d; font-weight: 600; } .badge.ahead { background: #dcedf7; }
.behind { color: #9a4300; font-weight: 600; } .badge.behind { background: #fbe6d8; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; margin: .8rem 0; }
th, td { text-align: left; padding: .25rem 1.1rem .25rem 0; border-bottom: 1px solid #e6e6e6; vertical-align: top; }
th { font-weight: 600; } tr.first td { border-top: 1px solid #999; }
img { max-width: 100%; height: auto; display: block; margin: .8rem 0 1.6rem; }
code, pre { font: .85rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; } summary { cursor: pointer; }
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

    @property
    def checkpoint(self) -> Path:
        """The last one."""
        return self.folder / "checkpoints" / "last.ckpt"

    def last(self, key: str) -> float:
        """The last finite value logged, NaN if there is none."""
        _, values = self.curves.get(key, (np.empty(0), np.empty(0)))
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if len(finite) else math.nan


def write_report(directory: Path) -> Path:
    """Write `report.html` about the runs in a folder, and its pictures to `figures/`.

    Args:
        directory: folder whose sub-folders are runs, with `probe/results.jsonl` if they were probed; or one run.

    Returns:
        The page; it holds its pictures and needs no other file.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if nothing in it was written by a run or a probe.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"no folder at {directory}: give the folder that holds the runs")
    runs = [
        _read_run(folder) for folder in (directory, *sorted(directory.iterdir())) if _metric_files(folder)
    ]
    results = directory / "probe" / "results.jsonl"
    rows = _latest(read_jsonl(results)) if results.is_file() else []
    if not runs and not rows:
        raise ValueError(
            f"{directory} holds no runs (sub-folders with a metrics.csv) and no probe results "
            f"(probe/results.jsonl): give the folder above the `--run_dir` of `jepa-audio fit`"
        )
    figures = directory / "figures"
    figures.mkdir(exist_ok=True)
    page = directory / "report.html"
    page.write_text(_page(directory, runs, rows, figures), encoding="utf-8")
    log.info("the report is %s", page)
    return page


def _page(directory: Path, runs: Sequence[RunRecord], rows: Sequence[ProbeRow], figures: Path) -> str:
    sections = ["<h2>Verdict</h2>", *(_verdict(run, rows) for run in runs)]
    sections += ["<h2>Probes</h2>", _probe_section(rows, figures)]
    for run in runs:
        sections.append(f"<h2>Run: {escape(run.name)}</h2>")
        curves = {run.name: run.curves}
        title = f"{run.name}: while training"
        sections.append(
            _image(draw_curves(curves, standard_panels(curves), title), figures, f"{run.name}-curves")
        )
        sections += [_masks_section(run, figures), _how_it_was_run(run)]
    sections += [
        "<h2>What this does not show</h2>",
        _limits(rows),
        "<h2>Where it was written</h2>",
        _environment(),
    ]
    return PAGE.substitute(
        title=escape(f"Runs in {directory.resolve().name}"),
        subtitle=escape(
            f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}, {datetime.now():%Y-%m-%d %H:%M}"
        ),
        body="\n".join(sections),
    )


def _metric_files(folder: Path) -> list[Path]:
    """One for each time that the run was started, in that order."""
    if not folder.is_dir():
        return []
    versions = sorted(
        folder.glob("metrics/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])
    )
    return [path for path in (folder / "metrics.csv", *versions) if path.is_file()]


def _read_run(folder: Path) -> RunRecord:
    logged: dict[str, dict[int, float]] = {}
    for path in _metric_files(folder):
        with path.open(newline="") as file:
            lines = [line for line in csv.DictReader(file) if line.get("step")]
        first = min((int(float(line["step"])) for line in lines), default=0)
        # A resumed run goes back to its checkpoint: what was logged beyond that never happened.
        logged = {key: {step: v for step, v in at.items() if step < first} for key, at in logged.items()}
        for line in lines:
            for key in line.keys() - {"step", "epoch", None}:
                if line[key]:
                    logged.setdefault(key, {})[int(float(line["step"]))] = float(line[key])
    curves = {key: sorted(at.items()) for key, at in logged.items() if at}
    arrays = {key: (np.array(at)[:, 0], np.array(at)[:, 1]) for key, at in curves.items()}
    return RunRecord(folder.resolve().name, folder, arrays)


def _latest(rows: Iterable[ProbeRow]) -> list[ProbeRow]:
    """The last answer to every question: a file of results grows with each call of `probe`."""
    latest = {}
    for row in rows:
        sample_rate = row.encoder_hash if row.variant == "statistics" else ""
        latest[row.encoder, row.variant, sample_rate, row.pooling, row.head, row.task] = row
    return list(latest.values())


def _verdict(run: RunRecord, rows: Sequence[ProbeRow]) -> str:
    """One plain paragraph: learned or not, collapsed or not, better than no learning or not."""
    own = [row for row in rows if row.encoder == run.name and row.against_random is not None]
    own = [row for row in own if row.head == "linear"] or own
    by_word = {word: [row for row in own if _word(row) == word] for word in VERDICTS}
    badge, mark = _badge({word for word, found in by_word.items() if found})
    sentences = [
        f"{VERDICTS[word]}: {'; '.join(map(_difference, found))}." for word, found in by_word.items() if found
    ]
    if not own:
        sentences = ["It was not probed, and nothing else tells whether it learned anything."]
        sentences += _online_probes(run)
    sentences += [_collapse(run), _losses(run)]
    heading = f'<h3>{escape(run.name)} <span class="badge {mark}">{badge}</span></h3>'
    return f"{heading}\n<p>{escape(' '.join(filter(None, sentences)))}</p>"


def _word(row: ProbeRow) -> str:
    return "" if row.against_random is None else row.against_random.verdict


def _badge(words: set[str]) -> tuple[str, str]:
    if {"ahead", "behind"} <= words:
        return "learned something, lost something", ""
    if "ahead" in words:
        return "learned", "ahead"
    if "behind" in words:
        return "worse than untrained", "behind"
    return ("no learning shown" if words else "not probed"), ""


def _difference(row: ProbeRow) -> str:
    gap = row.against_random
    assert gap is not None
    return f"{_name(row)} on {row.task} by {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


def _name(row: ProbeRow) -> str:
    return VARIANT_NAMES.get(row.variant, row.variant)


def _online_probes(run: RunRecord) -> Iterator[str]:
    for key in sorted(run.curves):
        if key.startswith("probe/") and key.endswith("/accuracy"):
            task = key.split("/")[1]
            now, twin = run.last(key), run.last(f"probe/{task}/twin")
            yield f"While training, the online probe of {task} last read {now:.3f}, of the random twin {twin:.3f}."


def _collapse(run: RunRecord) -> str:
    steps, raised = run.curves.get("collapse/alarm", (np.empty(0), np.empty(0)))
    if not len(steps):
        return "Collapse was not watched."
    alarms = steps[raised > 0]
    if len(alarms):
        end = (
            "and it still stood at the last one: collapsed"
            if raised[-1] > 0
            else "and it was over at the last one"
        )
        said = f"The collapse alarm was raised at {len(alarms)} of {len(steps)} looks, first at step {alarms[0]:.0f}, {end}."
    else:
        said = f"Not collapsed: no alarm at any of {len(steps)} looks."
    _, ranks = run.curves.get("collapse/context_rank", (np.empty(0), np.empty(0)))
    return (
        f"{said} RankMe of the context went from {ranks[0]:.1f} to {ranks[-1]:.1f}." if len(ranks) else said
    )


def _losses(run: RunRecord) -> str:
    _, losses = run.curves.get("train/loss", (np.empty(0), np.empty(0)))
    if len(losses) and not math.isfinite(losses[-1]):
        return "The last training loss is not a finite number."
    loss = run.last("collapse/loss")
    trivial = {
        "predicting the mean target": run.last("collapse/loss_mean_target"),
        "copying the nearest context token": run.last("collapse/loss_nearest_context"),
    }
    compared = [
        f"{'below' if loss < other else 'not below'} that of {what} ({other:.3g})"
        for what, other in trivial.items()
        if math.isfinite(loss) and math.isfinite(other)
    ]
    said = [f"The last loss is {loss:.3g}, {' and '.join(compared)}."] if compared else []
    if math.isfinite(valid := run.last("valid/loss")):
        said.append(f"The last validation loss is {valid:.3g}.")
    return " ".join(said)


def _probe_section(rows: Sequence[ProbeRow], figures: Path) -> str:
    if not rows:
        return "<p>No run was probed: <code>jepa-audio probe</code> tells whether they learned anything.</p>"
    note = (
        "Test scores with 95 % intervals; below each, the difference to the random-init twin of the same run on the "
        "same clips, in colour where its interval excludes zero. Layer and setting were chosen on validation clips."
    )
    pictures = [_image(draw_probe(rows, "What the heads read off"), figures, "probe")]
    pictures.append(_image(draw_layers(rows, "Where in the network"), figures, "layers"))
    return f'<p class="quiet">{note}</p>\n{_probe_table(rows)}\n' + "\n".join(pictures)


def _probe_table(rows: Sequence[ProbeRow]) -> str:
    tasks = {row.task: row for row in rows}
    lines: dict[tuple[str, ...], dict[str, ProbeRow]] = {}
    for row in rows:
        lines.setdefault((row.encoder, _name(row), row.pooling, row.head, row.encoder_hash), {})[row.task] = (
            row
        )
    head = ["encoder", "which", "frequency", "head"]
    head += [f"{task}, chance {row.chance:.3f}, {row.num_test} clips" for task, row in tasks.items()]
    body, former = [], ""
    for line, cells in sorted(lines.items(), key=lambda item: item[0][0]):
        shown = [escape(word) for word in line[:4]] + [_cell(cells.get(task)) for task in tasks]
        opening = "<tr>" if line[0] == former else '<tr class="first">'
        body.append(opening + "".join(f"<td>{cell}</td>" for cell in shown) + "</tr>")
        former = line[0]
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><tr>{names}</tr>\n' + "\n".join(body) + "\n</table></div>"


def _cell(row: ProbeRow | None) -> str:
    if row is None:
        return '<span class="quiet">not asked</span>'
    score = f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"
    score += f' <span class="quiet">{escape(row.layer_name)}</span>'
    gap = row.against_random
    if gap is None:
        return score
    mark = gap.verdict if gap.verdict in {"ahead", "behind"} else "quiet"
    text = f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] {gap.verdict}"
    return f'{score}<br><span class="{mark}">{text}</span>'


def _masks_section(run: RunRecord, figures: Path) -> str:
    try:
        figure = _draw_run_masks(run)
    except (FileNotFoundError, ValueError, AudioReadError) as error:
        return f'<p class="quiet">No picture of the masks: {escape(str(error))}.</p>'
    return _image(figure, figures, f"{run.name}-masks")


def _draw_run_masks(run: RunRecord) -> Figure:
    """Masks over a clip of the run's own corpus, from its checkpoint.

    Raises:
        FileNotFoundError: if the checkpoint is gone.
        ValueError: if the corpus is gone, or the checkpoint does not tell where it was.
    """
    if not run.checkpoint.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {run.checkpoint}")
    checkpoint = torch.load(run.checkpoint, map_location="cpu", weights_only=True)
    data = checkpoint.get("datamodule_hyper_parameters", {})
    if not {"root", "crop_seconds"} <= data.keys():
        raise ValueError("the checkpoint does not tell `root` and `crop_seconds` of the corpus")
    jepa = JEPA.load_from_checkpoint(run.checkpoint, map_location="cpu")
    waveform = _clip(Path(data["root"]), data["crop_seconds"], jepa.front_end.sample_rate)
    step = checkpoint["global_step"]
    return draw_masks_of(
        jepa, waveform, step, f"{run.name}: what is seen and what is predicted, at step {step}"
    )


def draw_masks_of(jepa: JEPA, waveform: Float[Tensor, "1 S"], step: int, title: str) -> Figure:
    """Some draws of a model's masker over a clip at its sample rate."""
    grid = jepa.front_end.grid(waveform.shape[-1])
    generator = torch.Generator().manual_seed(0)
    masks = [jepa.masker(grid, 1, generator, step) for _ in range(NUM_DRAWS)]
    image, seconds, band_hz = _spectrogram(jepa.front_end, waveform)
    return draw_masks(image, grid, masks, clip=0, seconds=seconds, title=title, band_hz=band_hz)


@torch.no_grad()
def _spectrogram(front_end: FrontEnd, waveform: Tensor) -> tuple[np.ndarray, float, np.ndarray | None]:
    """The front end's own spectrogram as far as its tokens reach, a log-mel one for waveforms; seconds; bands in Hz."""
    num_samples, sample_rate = waveform.shape[-1], front_end.sample_rate
    if isinstance(front_end, SpectrogramFrontEnd):
        transform = front_end.spectrogram
        num_columns = front_end.grid(num_samples).num_time
        num_frames, seconds = (
            num_columns * front_end.patch_frames,
            num_columns * front_end.stride / sample_rate,
        )
    else:
        transform = LogMel(sample_rate, n_fft=1024, hop_length=sample_rate // 100, n_mels=64)
        num_frames, seconds = transform.num_frames(num_samples), num_samples / sample_rate
    image = transform(waveform[None])[0, 0, :, :num_frames].numpy()
    if not isinstance(transform, LogMel):
        return image, seconds, None
    bins_hz = torch.linspace(0, sample_rate / 2, transform.bank.shape[1])
    return image, seconds, (transform.bank @ bins_hz / transform.bank.sum(dim=1)).numpy()


def _clip(root: Path, seconds: float, sample_rate: int) -> Float[Tensor, "1 S"]:
    """The middle of the file of median level among those that are long enough."""
    files = usable(load_index(root), min_seconds=seconds).sort_by("rms").to_pylist()
    if not files:
        raise ValueError(f"no file under {root} is {seconds:g} s long")
    file = files[len(files) // 2]
    num_frames = min(math.ceil(seconds * file["sample_rate"]) + 1, file["num_frames"])
    samples, rate = read(root / file["path"], (file["num_frames"] - num_frames) // 2, num_frames)
    mono = torch.from_numpy(samples).mean(dim=0, keepdim=True)
    return resample(mono, rate, sample_rate)[:, : round(seconds * sample_rate)]


def _how_it_was_run(run: RunRecord) -> str:
    config = run.folder / "config.yaml"
    steps = max((curve[0][-1] for curve in run.curves.values()), default=0)
    written = datetime.fromtimestamp(_metric_files(run.folder)[-1].stat().st_mtime)
    said = [f"<p>{steps:.0f} optimizer steps logged, the last on {written:%Y-%m-%d at %H:%M}.</p>"]
    if config.is_file():
        command = f"jepa-audio fit --config {config}"
        said.append(f"<p>The same again: <code>{escape(command)}</code></p>")
        text = escape(config.read_text(encoding="utf-8"))
        said.append(f"<details><summary>The whole configuration</summary><pre>{text}</pre></details>")
    return "\n".join(said)


def _limits(rows: Sequence[ProbeRow]) -> str:
    compared = sum(row.against_random is not None for row in rows)
    limits = [
        "The intervals hold the noise of the test clips, not that of training seeds: another seed can give another "
        "verdict. Repeat with three or more before claiming anything.",
        f"{compared} differences were tested at 95 % each, uncorrected: about one in twenty excludes zero by chance.",
        "Being ahead of an untrained twin is not being ahead of log-mel statistics; look at both.",
        "A low loss is no evidence of learning, nor is a high rank: the targets move with the encoder.",
        "The losses of the trivial predictors belong to batches just trained on.",
        "Speed is that of the machine that trained, which may not be the one below.",
    ]
    return (
        "<ul>"
        + "".join(f"<li>{escape(limit)}</li>" for limit in limits if compared or "tested" not in limit)
        + "</ul>"
    )


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
