import csv
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf
import torch

from jepa_audio.cli.main import main
from jepa_audio.cli.trainer import JEPACLI
from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.probing.intervals import Difference
from jepa_audio.probing.rows import ProbeRow, Score, append_rows
from jepa_audio.report.masks import draw_model_masks
from jepa_audio.report.page import write_report
from jepa_audio.report.run_pictures import draw_run, typical_clip
from jepa_audio.report.runs import _losses, find_runs
from jepa_audio.training.run.models import load_jepa
from tests.probing import rows

AHEAD, BEHIND, UNDECIDED = (
    Difference(0.1, 0.05, 0.15),
    Difference(-0.1, -0.15, -0.05),
    Difference(0.0, -0.05, 0.05),
)


def write_metrics(folder: Path, lines: list[dict[str, float]]) -> None:
    """Sparse rows, as Lightning's CSVLogger writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = sorted({key for line in lines for key in line})
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, keys, restval="")
        writer.writeheader()
        writer.writerows(lines)


def monitored(step: int, alarm: float = 0.0, loss: float = 0.5) -> dict[str, float]:
    trivial = {"train/loss_mean_target": 1.0, "train/loss_nearest_context": 2.0}
    return {
        "step": step,
        "collapse/alarm": alarm,
        "train/loss": loss,
        "collapse/context_rank": 3.0,
        **trivial,
    }


def a_run(folder: Path, **last_check: float) -> None:
    lines: list[dict[str, float]] = [
        {"step": step, "epoch": 0, "train/loss": 1 / (step + 1)} for step in range(10)
    ]
    lines += [{"step": 4, "valid/loss": 0.7}, monitored(1), monitored(9, **last_check)]
    write_metrics(folder, lines)


def a_row(encoder: str, task: str, against: Difference | None, **changes: object) -> ProbeRow:
    variant = "random" if against is None else "context"
    return rows.a_row(
        **(
            {"encoder": encoder, "task": task, "variant": variant, "against_random": against}
            | changes
        )
    )


def probed(directory: Path, *probe_rows: ProbeRow) -> None:
    append_rows(directory / "probe" / "results.jsonl", probe_rows)


def text_of(page: Path) -> str:
    """What a reader sees, without pictures and markup, whitespace collapsed."""
    body = page.read_text().split("</nav>")[1]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_page_needs_no_other_file(tmp_path):
    a_run(tmp_path / "mel")
    probed(tmp_path, a_row("mel", "pitch", None), a_row("mel", "pitch", AHEAD))
    page = write_report(tmp_path)
    assert page == tmp_path / "report.html"
    html = page.read_text()
    figures = sorted((tmp_path / "figures").iterdir())
    assert [figure.name for figure in figures] == ["layers.png", "mel-curves.png", "probe.png"]
    assert html.count("data:image/png;base64,") == len(figures)
    assert not re.search(r'src="(?!data:)|href="(?!#)', html)
    assert html.count("<table>") == html.count('<div class="scroll"><table>')
    assert "prefers-color-scheme: dark" in html
    assert set(re.findall(r'href="#([^"]*)"', html)) == set(re.findall(r'h2 id="([^"]*)"', html))


def test_runs_and_leaderboard_are_on_one_page(tmp_path):
    draws = np.random.default_rng(0).normal(0, 0.02, 400)
    a_run(tmp_path / "mel")
    a_run(tmp_path / "seeds" / "wave")
    for folder, encoder in (("probe", "mel"), ("seeds/probe", "wave")):
        results = tmp_path / folder / "results.jsonl"
        for task in ("nsynth_pitch", "nsynth_instrument"):
            rows.add(results, 0.5, 0.5 + draws, encoder=encoder, task=task)
    page = write_report(tmp_path)
    text, html = text_of(page), page.read_text()
    sections = ["Training curves", "Run: mel", "Run: seeds/wave", "Probes", "Averages over tasks"]
    assert set(sections) < set(re.findall(r"<h2[^>]*>([^<]*)</h2>", html))
    assert "linear, linear head, best epoch, 2 tasks" in text
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"curves.png", "mel-curves.png", "seeds-wave-curves.png"} < names
    pictures = list(tmp_path.rglob("pictures/*.png"))
    assert len(pictures) == 2 * 2 * 3
    assert html.count("data:image/png;base64,") == len(names) + len(pictures)
    average = html[html.index("Averages over tasks</h2>") :].split("</table>")[0]
    assert average.count('class="best"') == 2, "encoders of both files share a rank"


def test_missing_evidence_is_named_and_the_results_are_shown(tmp_path):
    probed(tmp_path, a_row("mel", "pitch", AHEAD))
    text = text_of(write_report(tmp_path))
    assert "Results are not compared or ranked: there is no" in text
    assert "evidence/0.npz" in text
    assert "0.350 [0.300, 0.400] block 1" in text


def test_both_verdicts_are_shown(tmp_path, empty_figures):
    a_run(tmp_path / "mel")
    verdicts = {"family": AHEAD, "pitch": BEHIND, "octave": UNDECIDED}
    for task, difference in verdicts.items():
        probed(tmp_path, a_row("mel", task, None), a_row("mel", task, difference))
    page = write_report(tmp_path)
    text = text_of(page)
    baseline = "its random-init baseline: context encoder on"
    assert f"Ahead of {baseline} family (+0.100 [+0.050, +0.150])." in text
    assert f"Behind {baseline} pitch (-0.100 [-0.150, -0.050])." in text
    assert f"No significant difference to {baseline} octave" in text
    assert "pitch accuracy, chance 0.200, 77 files" in text
    html = page.read_text()
    assert html.count('<span class="ahead">') == 1
    assert html.count('<span class="behind">') == 1
    assert "3 differences to random-init baselines were tested" in text


def test_badge_shows_the_verdict(tmp_path, empty_figures):
    verdicts = {
        "up": [AHEAD],
        "down": [BEHIND],
        "even": [UNDECIDED],
        "both": [AHEAD, BEHIND, UNDECIDED],
        "unprobed": [],
    }
    for name, differences in verdicts.items():
        write_metrics(tmp_path / name, [{"step": 1}])
        found = (a_row(name, str(number), each) for number, each in enumerate(differences))
        probed(tmp_path, *found)
    html = write_report(tmp_path).read_text()
    badges = dict(re.findall(r"<h3>(\w+) <span[^>]*>([^<]*)</span>", html))
    assert badges == {
        "up": "learned",
        "down": "worse than untrained",
        "even": "no significant difference to untrained",
        "both": "ahead and behind",
        "unprobed": "not probed",
    }


def test_run_below_log_mel_has_a_badge(tmp_path):
    a_run(tmp_path / "mel")
    log_mel = {"scores": {"accuracy": Score(0.36, 0.3, 0.4)}}
    probed(tmp_path, rows.baseline(task="pitch", **log_mel), rows.baseline(task="family"))
    probed(tmp_path, a_row("mel", "pitch", AHEAD), a_row("mel", "family", AHEAD))
    badges = re.findall(r'<span class="badge (\w+)">([^<]*)<', write_report(tmp_path).read_text())
    assert badges == [
        ("ahead", "learned"),
        ("behind", "below log-mel on 1 of 2 results"),
        ("behind", "below log-mel"),
    ]


def test_trained_heads_decide_and_the_last_result_counts(tmp_path):
    a_run(tmp_path / "mel")
    probed(tmp_path, a_row("mel", "pitch", AHEAD), a_row("mel", "pitch", AHEAD, head="knn"))
    probed(tmp_path, a_row("mel", "pitch", BEHIND, scores={"accuracy": Score(0.123, 0.1, 0.2)}))
    page = write_report(tmp_path)
    assert ">worse than untrained</span>" in page.read_text()
    assert "Ahead of its random-init baseline" not in text_of(page).split("Probes")[0]
    assert "0.350 [0.300, 0.400] block 1" in text_of(page), "the other head stays in the table"
    assert "0.123" in text_of(page)


def test_seeds_are_averaged_and_protocols_are_separate(tmp_path, empty_figures):
    a_run(tmp_path / "mel")
    seeds = [Difference(0.1, 0.05, 0.15), Difference(0.3, 0.25, 0.35)]
    probed(tmp_path, *(a_row("mel", "pitch", each, seed=seed) for seed, each in enumerate(seeds)))
    assert "context encoder on pitch (+0.200 [+0.150, +0.250])." in text_of(write_report(tmp_path))
    probed(tmp_path, a_row("mel", "pitch", BEHIND, preset="marble-v1", head="mlp"))
    text = text_of(write_report(tmp_path))
    assert "Ahead of its random-init baseline: context encoder on pitch, linear (+0.200" in text
    assert "Behind its random-init baseline: context encoder on pitch, marble-v1 (-0.100" in text
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert {"probe-linear", "probe-marble-v1", "layers-linear", "layers-marble-v1"} <= names


def test_losses_and_alarms_are_shown(tmp_path):
    a_run(tmp_path / "good", loss=1.5)
    a_run(tmp_path / "bad", alarm=1.0)
    text = text_of(write_report(tmp_path))
    assert "The last loss, 1.5, is not below that of predicting the mean target (1)" in text
    assert "and below that of copying the nearest context token (2)" in text
    assert "The last validation loss is 0.7." in text
    assert "Not collapsed: no alarm at any of 2 checks" in text
    assert "Collapse alarm at 1 of 2 checks, first at step 9, including the last" in text


def test_run_with_only_a_training_loss_has_a_page(tmp_path):
    write_metrics(
        tmp_path / "mel", [{"step": 0, "train/loss": 1.0}, {"step": 1, "train/loss": float("nan")}]
    )
    text = text_of(write_report(tmp_path))
    assert "not probed" in text
    assert "Collapse was not monitored. The last training loss is not a finite number." in text
    assert "validation" not in text.split("Probes")[0]
    assert "No figure of the masks, attention and latents: no checkpoint" in text


def test_online_probes_are_shown_if_nothing_was_probed(tmp_path):
    write_metrics(
        tmp_path / "mel", [{"step": 5, "probe/pitch/accuracy": 0.25, "probe/pitch/twin": 0.125}]
    )
    online = "online probe of pitch had accuracy 0.250, its random-init baseline 0.125."
    assert online in text_of(write_report(tmp_path))


def test_probe_results_without_runs_have_a_page(tmp_path):
    probed(
        tmp_path,
        a_row("elsewhere", "pitch", UNDECIDED),
        a_row("log-mel", "pitch", None, variant="statistics"),
    )
    text = text_of(write_report(tmp_path))
    assert "Verdict" not in text
    assert "log-mel statistics" in text


def test_resumed_run_replaces_steps_after_its_checkpoint(tmp_path):
    first = [{"step": step, "train/loss": 1.0, "valid/loss": 9.0} for step in range(8)]
    second = [{"step": step, "train/loss": 2.0} for step in range(4, 6)]
    tenth = [{"step": 6, "train/loss": 3.0}]
    for number, lines in ((0, first), (2, second), (10, tenth)):
        write_metrics(tmp_path / "mel" / "metrics" / f"version_{number}", lines)
    (tmp_path / "mel" / "metrics" / "version_10" / "config.yaml").write_text("seed: <7>")
    page = write_report(tmp_path)
    assert "6 optimizer steps logged" in text_of(page)
    assert "seed: &lt;7&gt;" in page.read_text()


def test_start_without_steps_keeps_the_logs_of_the_previous_start(tmp_path):
    versions = tmp_path / "mel" / "metrics"
    write_metrics(versions / "version_0", [{"step": 3, "train/loss": 1.0}])
    write_metrics(versions / "version_1", [])
    (run,) = find_runs(tmp_path)
    assert (run.name, run.label, run.last_step) == ("mel", "mel", 3)


def test_runs_of_one_name_without_weights_have_no_verdict_on_probes(tmp_path):
    for folder in ("a", "b"):
        write_metrics(tmp_path / folder / "mel", [{"step": 1}])
    probed(tmp_path, a_row("mel", "pitch", AHEAD))
    text = text_of(write_report(tmp_path))
    assert text.count("`mel` is the name of 2 runs: their probe scores are left out") == 2
    assert "Ahead of its random-init baseline" not in text


def test_folder_can_be_a_single_run(tmp_path):
    a_run(tmp_path / "mel")
    assert "1 run," in write_report(tmp_path / "mel").read_text()


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe: 1"])
def test_damaged_configuration_and_empty_metrics_are_named(tmp_path, content, empty_figures):
    a_run(tmp_path / "mel")
    (tmp_path / "mel" / "config.yaml").write_bytes(content)
    (tmp_path / "mel" / "metrics" / "version_0").mkdir(parents=True)
    (tmp_path / "mel" / "metrics" / "version_0" / "metrics.csv").touch()
    text = text_of(write_report(tmp_path))
    assert re.search(r"mel/config.yaml (is not YAML|cannot be read)", text)
    assert "version_0/metrics.csv is empty" in text
    assert "Command for the same run" not in text


@pytest.mark.parametrize("name", ["dam.html", "dam.HTML"])
def test_the_name_of_a_page_is_refused_as_the_folder_of_the_page(tmp_path, name):
    a_run(tmp_path / "mel")
    with pytest.raises(UserError, match=r"`output` .* is a folder.*give the folder, `-o .*dam`"):
        write_report(tmp_path, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_names_are_escaped(tmp_path):
    name = "<script>alert('&')"
    a_run(tmp_path / name)
    probed(tmp_path, a_row(name, "<b>pitch</b>", AHEAD, layer="<i>"))
    html = write_report(tmp_path).read_text()
    assert "<script" not in html
    assert "<b>pitch" not in html
    assert "<i>" not in html
    assert "&lt;script&gt;" in html


def test_missing_folder_and_folder_without_runs_are_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"no folder at .*nowhere"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "mel").mkdir()
    with pytest.raises(ValueError, match="holds no runs"):
        write_report(tmp_path)
    assert not (tmp_path / "figures").exists()


FIT = """
seed_everything: 0
run_dir: {folder}/runs/it
model:
  front_end: {front_end}
  masker: {masker}
  encoder: {{embed_dim: 8, depth: 1, num_heads: 2, positions: SinCosPositions}}
  targets: {{view: clip, top_k: 1, normalization: instance}}
  predictor: {{trunk: {{embed_dim: 8, depth: 1, num_heads: 2, positions: SinCosPositions}}}}
  distance: MSE
  ema: {{momentum: {{class_path: Linear, init_args: {{start: 0.9, end: 1.0}}}}}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 1.0e-3}}}}
  lr_schedule: {{class_path: WarmupCosine, init_args: {{warmup_steps: 1}}}}
data: {{root: {folder}/corpus, crop_seconds: 0.5, batch_size: 2, num_workers: 0}}
trainer: {{max_steps: 2, accelerator: cpu}}
"""
WAVE = """
    class_path: WaveformFrontEnd
    init_args: {conv_layers: [[4, 160, 80], [4, 2, 2]], sample_rate: 8000}
"""
MEL = """
    class_path: SpectrogramFrontEnd
    init_args:
      spectrogram:
        class_path: LogMel
        init_args: {sample_rate: 8000, n_fft: 256, hop_length: 80, n_mels: 16}
      patch_frames: 4
      patch_bands: 8
"""


def test_masks_attention_and_latents_of_a_run_are_drawn_on_its_corpus(tmp_path):
    (tmp_path / "corpus").mkdir()
    generator = np.random.default_rng(0)
    for number in range(4):
        sf.write(tmp_path / "corpus" / f"{number}.wav", 0.1 * generator.normal(size=12_000), 16_000)
    config, run = tmp_path / "run.yaml", tmp_path / "runs" / "it"
    config.write_text(FIT.format(folder=tmp_path, front_end=MEL, masker="RandomMasker"))
    JEPACLI(["fit", "--config", str(config)])
    (logged,) = run.glob("metrics/version_*/metrics.csv")
    logged.write_text("step,train/loss\n1,1.0\n")
    text = text_of(write_report(tmp_path / "runs"))
    assert "No figure" not in text
    assert "jepa-audio fit --config" in text
    for kind in ("masks", "attention", "latents"):
        assert (tmp_path / "runs" / "figures" / f"it-{kind}.png").stat().st_size > 10_000
    (tmp_path / "corpus").rename(tmp_path / "moved")
    text = text_of(write_report(tmp_path / "runs"))
    assert "No figure of the masks, attention and latents" in text


def test_a_corpus_of_files_shorter_than_a_crop_has_pictures_of_the_longest_padded(tmp_path):
    (tmp_path / "corpus").mkdir()
    noise = 0.1 * np.random.default_rng(0).normal(size=3_000)
    for number in range(4):
        sf.write(tmp_path / "corpus" / f"{number}.wav", noise[: 2_500 + 100 * number], 8_000)
    config, run = tmp_path / "run.yaml", tmp_path / "runs" / "it"
    config.write_text(FIT.format(folder=tmp_path, front_end=WAVE, masker="SpanMasker"))
    JEPACLI(["fit", "--config", str(config)])
    figures, missing = draw_run(run)
    assert figures.keys() == {"masks", "attention", "latents"}
    assert not missing
    path = run / "checkpoints" / "last.ckpt"
    clip = typical_clip(path, load_jepa(path), str(tmp_path / "corpus"))
    assert clip.shape == (1, 4_000)
    np.testing.assert_allclose(clip[0, :2_800], noise[:2_800], atol=1e-4)
    assert not clip[0, 2_800:].any()


def test_latents_are_missing_alone_if_the_corpus_has_too_few_files(tmp_path):
    (tmp_path / "corpus").mkdir()
    noise = 0.1 * np.random.default_rng(0).normal(size=12_000)
    for number in range(2):
        sf.write(tmp_path / "corpus" / f"{number}.wav", noise, 16_000)
    config = tmp_path / "run.yaml"
    config.write_text(FIT.format(folder=tmp_path, front_end=WAVE, masker="SpanMasker"))
    JEPACLI(["fit", "--config", str(config)])
    figures, missing = draw_run(tmp_path / "runs" / "it")
    assert figures.keys() == {"masks", "attention"}
    assert "fewer than 3 files" in str(missing["latents"])


def test_several_folders_are_one_report(tmp_path, monkeypatch, empty_figures):
    for folder in ("a", "b"):
        a_run(tmp_path / folder / "mel")
    probed(tmp_path / "b", a_row("mel", "pitch", AHEAD))
    monkeypatch.chdir(tmp_path)
    main(["report", "a", "b", "b/mel"])
    text = text_of(tmp_path / "report.html")
    assert "Run: a/mel" in text
    assert "Run: b/mel" in text
    assert "pitch" in text
    main(["report", "a", "b", "-o", "c"])
    assert (tmp_path / "c" / "report.html").is_file()
    assert (tmp_path / "c" / "figures" / "curves.png").is_file()


def test_embeddings_in_the_folder_are_drawn(tmp_path, caplog, empty_figures):
    a_run(tmp_path / "mel")
    vectors = np.random.default_rng(0).normal(size=(12, 4)).tolist()
    clips = {
        "path": [f"{i % 3}/{i}.wav" for i in range(12)],
        "start": [0.0] * 12,
        "end": [1.0] * 12,
    }
    pq.write_table(pa.table({**clips, "vector": vectors}), tmp_path / "mel" / "clips.parquet")
    frames = pa.table({**clips, "vector": [vectors] * 12})
    pq.write_table(frames, tmp_path / "mel" / "frames.parquet")
    pq.write_table(pa.table({"path": ["a"]}), tmp_path / "mel" / "other.parquet")
    text = text_of(write_report(tmp_path))
    assert "Maps of embeddings" in text
    assert (tmp_path / "figures" / "mel-clips-latents.png").is_file()
    assert len(list((tmp_path / "figures").glob("*latents.png"))) == 1
    assert any("frames.parquet" in message for message in caplog.messages)


def test_masks_of_a_waveform_model_are_drawn_on_a_log_mel_spectrogram(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(FIT.format(folder=tmp_path, front_end=WAVE, masker="SpanMasker"))
    model = JEPACLI(["--config", str(config)], run=False).model
    waveform = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    figure = draw_model_masks(model, waveform, step=0)
    assert len(figure.axes) == 3
    image, overlay = figure.axes[0].images
    assert image.get_extent() == [0.0, 0.5, 0.0, 64.0]
    assert np.asarray(overlay.get_array()).shape == (4, model.front_end.grid(4000).num_time, 4)


def test_masks_of_two_channels_are_drawn_once_over_all_frequencies(tiny_jepa):
    channels = (
        "--model.front_end.init_args.num_channels=2",
        "--model.front_end.init_args.separate_channels=true",
        "--data.mono=keep",
    )
    places = [
        f"--model.{part}.positions=BinauralPositions"
        for part in ("encoder", "predictor.trunk.init_args")
    ]
    model = tiny_jepa("wave", *channels, *places)
    drawn = draw_model_masks(model, torch.randn(1, 1000), step=0)
    mono = draw_model_masks(tiny_jepa("wave"), torch.randn(1, 1000), step=0)
    assert [ax.get_title(loc="left") for ax in drawn.axes] == [
        ax.get_title(loc="left") for ax in mono.axes
    ]


def test_losses_of_earlier_versions_have_other_keys(tmp_path: Path):
    old = {"collapse/loss_mean_target": 1.0, "collapse/loss_nearest_context": 2.0}
    write_metrics(tmp_path / "old", [{"step": 1, "train/loss": 0.9, "collapse/loss": 0.5, **old}])
    (run,) = find_runs(tmp_path / "old")
    verdict = " ".join(_losses(run))
    assert "The last loss, 0.5, is below that of predicting the mean target (1)" in verdict


def test_a_run_without_a_baseline_of_copies_is_compared_with_the_mean_target(tmp_path: Path):
    write_metrics(tmp_path, [{"step": 1, "train/loss": 2.5, "train/loss_mean_target": 3.0}])
    (run,) = find_runs(tmp_path)
    verdict = " ".join(_losses(run))
    assert "The last loss, 2.5, is below that of predicting the mean target (3)." in verdict
