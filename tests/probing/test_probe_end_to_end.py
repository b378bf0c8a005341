"""What a user may ask of a probe, on tiny data sets: protocols, seeds, conditions, layers; and what is refused."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from jepa_audio.probing.robustness import SWEEPS
from jepa_audio.probing.rows import ProbeRow, read_jsonl
from jepa_audio.probing.run import probe
from jepa_audio.probing.tasks import TASKS
from jepa_audio.report.pictures import draw_all
from tests.probing.tiny_sets import SET_OF, Probed, rows_of

ENCODERS = "tests.probing.oracle_encoders:"
MARBLES = {
    ("gtzan_genre", "marble-v1"): 0.95,
    ("gtzan_genre", "marble-v2"): 0.95,
    ("mtt", "marble-v1"): 0.85,
    ("mtt", "marble-v2"): 0.5,  # one step an epoch: it ends before it has learnt much
    ("emomusic", "marble-v1"): 0.9,
    ("emomusic", "marble-v2"): 0.9,
    ("chords1217", "marble-v1"): 0.85,
}
"""What is heard at least under MARBLE's presets, in a task for each kind of labels: classes, tags, numbers, frames."""


@pytest.mark.parametrize(("task", "preset"), MARBLES)
def test_marbles_protocols_hear_each_kind_of_label(
    task: str, preset: str, probed: Callable[[str], Probed], tmp_path: Path
):
    clean, tiny = probed(task), SET_OF[task]
    (tmp_path / "features").symlink_to(clean.output / "features")
    protocol = TASKS[task].protocols[preset]
    size = 1 if task == "chords1217" else None  # a song has every chord, and its frames take long
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


def test_heads_have_the_seeds_that_are_asked_for(probed: Callable[[str], Probed], tmp_path: Path):
    clean = probed("emomusic")
    (tmp_path / "features").symlink_to(clean.output / "features")
    encoder = ENCODERS + "loudness"
    chosen, usual = (
        rows_of(
            probe(encoder, "emomusic", clean.root, tmp_path, preset="marble-v2", **seeds),
            "emomusic",
            "loudness",
        )
        for seeds in ({"seeds": (0, 1, 2)}, {})
    )
    assert [row.seed for row in chosen] == [0, 1, 2]
    assert [row.seed for row in usual] == [
        1234,
        1235,
        1236,
    ]  # the default where the test split is small
    assert len({row.value for row in chosen}) == 3
    assert len({row.evidence for row in [*chosen, *usual]}) == 6
    assert len(read_jsonl(tmp_path / "results.jsonl")) == 12  # log-mel statistics beside


def test_fewer_training_units_are_taken_and_tasks_lie_in_several_folders(
    roots: Callable[[str], Path], tmp_path: Path
):
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


# What is heard, and how often


def contents(folder: Path) -> dict[Path, object]:
    """When each index was last written, and what the tables hold."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {
        path: path.stat().st_mtime_ns if path.name == "index.jsonl" else path.read_bytes()
        for path in files
    }


def test_nothing_is_heard_twice_and_degraded_clips_leave_the_clean_score_alone(
    roots: Callable[[str], Path], tmp_path: Path
):
    def ask(tasks: str, **settings: list[str]) -> list[ProbeRow]:
        return probe(
            ENCODERS + "spectrum",
            tasks,
            roots("nsynth_pitch"),
            tmp_path,
            preset="linear",
            **settings,
        )

    first = ask("nsynth_pitch")
    heard = contents(tmp_path / "features")
    assert heard
    second = ask("nsynth_pitch,nsynth_instrument")
    assert contents(tmp_path / "features") == heard
    assert [row for row in second if row.task == "nsynth_pitch"] == first
    degraded = ask("nsynth_pitch,nsynth_instrument", robustness=["gain", "low_pass"])
    assert heard.items() <= contents(tmp_path / "features").items()
    assert read_jsonl(tmp_path / "results.jsonl") == [*first, *second, *degraded]
    for clean, row in zip(second, degraded, strict=True):
        assert (clean.value, clean.low, clean.high, clean.valid) == (
            row.value,
            row.low,
            row.high,
            row.valid,
        )
        assert {name: [level for level, _ in curve] for name, curve in row.robustness.items()} == {
            name: [condition.level for condition in SWEEPS[name]] for name in ("gain", "low_pass")
        }
    pitch, family = (
        rows_of(degraded, f"nsynth_{name}", "spectrum")[0] for name in ("pitch", "instrument")
    )
    assert {score for _, score in pitch.robustness["gain"]} == {
        1.0
    }  # shares of the power do not know the level
    low_pass = dict(family.robustness["low_pass"])
    assert low_pass[8000.0] == low_pass[4000.0] == family.value  # nothing is there to lose
    assert low_pass[500.0] < 0.5  # families are told apart by what is higher,
    assert dict(pitch.robustness["low_pass"])[500.0] > 0.9  # and pitches by what is not
    assert low_pass[500.0] < family.robustness_area["low_pass"] < family.value


# Refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tasks": "nsynth_mood"}, "'nsynth_mood'; there are gtzan_genre"),
        (
            {"preset": "marble-v3"},
            "`preset` is 'marble-v3', must be one of marble-v1, linear, marble-v2",
        ),
        ({"preset": "marble-v2"}, "nsynth_pitch has no protocol marble-v2"),
        ({"preset": "linear", "select": "last"}, "`select` is 'last'"),
        ({"robustness": ["rain"]}, "`robustness` holds rain; there are white_noise"),
        ({"encoder": ENCODERS + "nobody"}, "nobody"),
        ({"encoder": ENCODERS + "RATE"}, "RATE"),
        ({"max_train": 0}, "at least one unit, got 0"),
    ],
)
def test_what_is_not_there_is_refused_by_name(
    settings: dict[str, str], said: str, roots: Callable[[str], Path], tmp_path: Path
):
    usual = {
        "encoder": ENCODERS + "constant",
        "tasks": "nsynth_pitch",
        "data": roots("nsynth_pitch"),
    }
    with pytest.raises(ValueError, match=said):
        probe(**{**usual, "output": tmp_path / "results", **settings})
    assert not (tmp_path / "results").exists()


def test_layers_of_a_checkpoint_are_chosen_by_their_places(
    tiny_cli: Callable, fit: Callable, roots: Callable[[str], Path], tmp_path: Path
):
    cli = tiny_cli("mel", "--trainer.max_steps=2")
    fit(cli)
    checkpoint = tmp_path / "mel.ckpt"
    cli.trainer.save_checkpoint(checkpoint)

    def ask(*layers: int) -> list[ProbeRow]:
        root = roots("nsynth_pitch")
        settings = {"preset": "linear", "variants": ("target",), "layers": layers}
        return probe(str(checkpoint), "nsynth_pitch", root, tmp_path / "out", **settings)

    rows = ask(0, 2)
    assert {row.variant for row in rows} == {"random", "target", "statistics"}
    for row in rows:
        assert row.layers == (
            ("statistics",) if row.variant == "statistics" else ("input", "block 2")
        )
        assert (row.against_random is not None) == (row.variant == "target")
    with pytest.raises(ValueError, match=r"`layers` is \[3\]"):
        ask(3)


def test_layers_of_a_function_are_chosen_by_their_places(
    roots: Callable[[str], Path], tmp_path: Path
):
    rows = probe(
        ENCODERS + "spectrum",
        "nsynth_pitch",
        roots("nsynth_pitch"),
        tmp_path,
        preset="linear",
        layers=(0,),
    )
    assert rows[0].layers == ("nothing",)


# Pictures


def results_with_curves(of: Probed, folder: Path) -> Path:
    (folder / "evidence").symlink_to(of.output / "evidence")
    rows = [replace(row, robustness={"gain": ((10.0, 0.5), (-10.0, 0.4))}) for row in of.rows]
    results = folder / "results.jsonl"
    results.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return results


@pytest.mark.parametrize("task", ["chords1217", "gtzan_beat"])
def test_pictures_of_annotations_in_time_are_drawn(task: str, probed: Callable[[str], Probed]):
    drawn = draw_all(probed(task).output / "results.jsonl")
    assert len(drawn) == 2, "of the oracle and of the constant encoder, one grid each"
    assert all(path.stat().st_size > 1000 for path in drawn)


def test_pictures_of_conditions_are_drawn(probed: Callable[[str], Probed], tmp_path: Path):
    assert draw_all(results_with_curves(probed("chords1217"), tmp_path))
