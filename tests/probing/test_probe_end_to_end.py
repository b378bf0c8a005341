"""`probe` on tiny data sets: protocols, seeds, conditions, layers, pictures and errors."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from jepa_audio.probing.robustness import SWEEPS
from jepa_audio.probing.rows import ProbeRow, read_rows
from jepa_audio.probing.run import probe
from jepa_audio.probing.tasks import TASKS
from jepa_audio.report.figures import draw_close_ups, draw_conditions
from jepa_audio.report.results import read_results
from tests.probing.tiny_sets import SET_OF, Probed, rows_of

ENCODERS = "tests.probing.oracle_encoders:"
MARBLES = {
    ("gtzan_genre", "marble-v1"): 0.95,
    ("gtzan_genre", "marble-v2"): 0.95,
    ("mtt", "marble-v1"): 0.85,
    # One step per epoch: training ends before it has converged.
    ("mtt", "marble-v2"): 0.5,
    ("emomusic", "marble-v1"): 0.9,
    ("emomusic", "marble-v2"): 0.9,
    ("chords1217", "marble-v1"): 0.85,
}
"""Least score with MARBLE's presets, for one task of each kind of labels."""


@pytest.mark.parametrize(("task", "preset"), MARBLES)
def test_marble_protocols_score_each_kind_of_label(
    task: str, preset: str, probed: Callable[[str], Probed], tmp_path: Path
):
    clean, tiny = probed(task), SET_OF[task]
    (tmp_path / "features").symlink_to(clean.output / "features")
    protocol = TASKS[task].protocols[preset]
    # Every song has all chords, and training on frames is slow.
    size = 1 if task == "chords1217" else None
    (row,) = rows_of(
        probe(
            ENCODERS + tiny.oracle,
            task,
            clean.root,
            tmp_path,
            preset=preset,
            seeds=(0,),
            max_train=size,
        ),
        task,
        tiny.oracle,
    )
    assert row.value > MARBLES[task, preset]
    assert (row.preset, row.head, row.setting_name) == (preset, "mlp", "learning rate")
    assert row.settings == protocol.learning_rates
    assert np.shape(row.valid_grid) == (len(row.layers), len(row.settings))
    if preset == "marble-v2":
        assert row.layers == ("all layers",)
    elif TASKS[task].grid_hz is None:
        assert row.layers == ("nothing", tiny.oracle, "weighted sum")
        assert row.layer != "nothing"
    else:
        assert row.layers == ("weighted sum",)


def test_heads_have_the_requested_seeds(probed: Callable[[str], Probed], tmp_path: Path):
    clean = probed("emomusic")
    (tmp_path / "features").symlink_to(clean.output / "features")
    encoder = ENCODERS + "loudness"
    chosen, default = (
        rows_of(
            probe(encoder, "emomusic", clean.root, tmp_path, preset="marble-v2", **seeds),
            "emomusic",
            "loudness",
        )
        for seeds in ({"seeds": (0, 1, 2)}, {})
    )
    assert [row.seed for row in chosen] == [0, 1, 2]
    # The default for tasks with a small test split.
    assert [row.seed for row in default] == [1234, 1235, 1236]
    assert len({row.value for row in chosen}) == 3
    assert len({row.evidence for row in [*chosen, *default]}) == 6
    assert len(read_rows(tmp_path / "results.jsonl")) == 18  # with two poolings of log-mel


def test_max_train_with_tasks_in_several_folders(roots: Callable[[str], Path], tmp_path: Path):
    rows = probe(
        ENCODERS + "spectrum",
        "gtzan_genre,nsynth_pitch",
        [roots("nsynth_pitch"), roots("gtzan_genre")],
        tmp_path,
        preset="linear",
        max_train=15,
    )
    assert {row.task for row in rows} == {"gtzan_genre", "nsynth_pitch"}
    assert {(row.num_train, row.num_test) for row in rows} == {(15, 30), (15, 72)}
    assert rows_of(rows, "nsynth_pitch", "spectrum")[0].value < 1


# Caching


def contents(folder: Path) -> dict[Path, object]:
    """Modification times of the indices, and contents of the tables."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {
        path: path.stat().st_mtime_ns if path.name == "index.jsonl" else path.read_bytes()
        for path in files
    }


def test_clips_are_encoded_once_and_degradations_do_not_change_the_clean_score(
    roots: Callable[[str], Path], tmp_path: Path
):
    def run(tasks: str, **settings: list[str]) -> list[ProbeRow]:
        return probe(
            ENCODERS + "spectrum",
            tasks,
            roots("nsynth_pitch"),
            tmp_path,
            preset="linear",
            **settings,
        )

    first = run("nsynth_pitch")
    stored = contents(tmp_path / "features")
    assert stored
    second = run("nsynth_pitch,nsynth_instrument")
    assert contents(tmp_path / "features") == stored
    assert [row for row in second if row.task == "nsynth_pitch"] == first
    degraded = run("nsynth_pitch,nsynth_instrument", robustness=["gain", "low_pass"])
    assert stored.items() <= contents(tmp_path / "features").items()
    assert read_rows(tmp_path / "results.jsonl") == [*first, *second, *degraded]
    for clean, row in zip(second, degraded, strict=True):
        assert (clean.score, clean.valid) == (row.score, row.valid)
        assert {name: [level for level, _ in curve] for name, curve in row.robustness.items()} == {
            name: [condition.level for condition in SWEEPS[name]] for name in ("gain", "low_pass")
        }
    pitch, family = (
        rows_of(degraded, f"nsynth_{name}", "spectrum")[0] for name in ("pitch", "instrument")
    )
    # Shares of the power do not depend on the level.
    assert {score for _, score in pitch.robustness["gain"]} == {1.0}
    low_pass = dict(family.robustness["low_pass"])
    assert low_pass[8000.0] == low_pass[4000.0] == family.value
    # Families differ above 500 Hz, pitches below.
    assert low_pass[500.0] < 0.5
    assert dict(pitch.robustness["low_pass"])[500.0] > 0.9
    assert low_pass[500.0] < family.robustness_area["low_pass"] < family.value


# Layers


def test_layers_of_a_checkpoint_are_chosen_by_index(
    tiny_cli: Callable, fit: Callable, roots: Callable[[str], Path], tmp_path: Path
):
    cli = tiny_cli("mel", "--trainer.max_steps=2")
    fit(cli)
    checkpoint = tmp_path / "mel.ckpt"
    cli.trainer.save_checkpoint(checkpoint)

    def run(*layers: int) -> list[ProbeRow]:
        root = roots("nsynth_pitch")
        settings = {"preset": "linear", "variants": ("target",), "layers": layers}
        return probe(str(checkpoint), "nsynth_pitch", root, tmp_path / "out", **settings)

    rows = run(0, 2)
    assert {row.variant for row in rows} == {"random", "target", "statistics"}
    for row in rows:
        assert row.layers == (
            ("statistics",) if row.variant == "statistics" else ("input", "block 2")
        )
        assert (row.against_random is not None) == (row.variant == "target")
    with pytest.raises(
        ValueError, match=r"`layers` is \[3\], mel has 0 \(input\), 1 \(block 1\), 2"
    ):
        run(3)


def test_layers_of_a_function_are_chosen_by_index(roots: Callable[[str], Path], tmp_path: Path):
    rows = probe(
        ENCODERS + "spectrum",
        "nsynth_pitch",
        roots("nsynth_pitch"),
        tmp_path,
        preset="linear",
        layers=(0,),
    )
    assert rows[0].layers == ("nothing",)


# Figures


def results_with_curves(of: Probed, folder: Path) -> Path:
    (folder / "evidence").symlink_to(of.output / "evidence")
    rows = [replace(row, robustness={"gain": ((10.0, 0.5), (-10.0, 0.4))}) for row in of.rows]
    results = folder / "results.jsonl"
    results.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return results


@pytest.mark.parametrize("task", ["chords1217", "gtzan_beat"])
def test_figures_of_annotations_in_time_are_drawn(task: str, probed: Callable[[str], Probed]):
    files = draw_close_ups(read_results([probed(task).output / "results.jsonl"]))
    grids = [file.path for of_result in files[task] for file in of_result]
    assert len(grids) == 2, "one grid each of the oracle and of the constant encoder"
    assert all(path.stat().st_size > 1000 for path in grids)


def test_figures_of_conditions_are_drawn(probed: Callable[[str], Probed], tmp_path: Path):
    results = results_with_curves(probed("chords1217"), tmp_path)
    assert draw_conditions(read_results([results]), tmp_path)
