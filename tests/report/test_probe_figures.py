import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from sklearn.metrics import average_precision_score

from jepa_audio.errors import MissingFileError
from jepa_audio.probing.rows import Evidence, ProbeRow, Score, append_rows, save_evidence
from jepa_audio.report.figures import draw_close_ups, draw_conditions
from jepa_audio.report.head_figures import draw_grid, draw_head, label_kind
from jepa_audio.report.probe_figures import draw_layers, draw_probe, draw_robustness
from jepa_audio.report.results import read_results
from jepa_audio.report.style import GREY, ORANGE
from tests.probing.rows import a_row, baseline

VARIANTS = ("random", "context", "target", "statistics")


def legend_texts(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def titles(figure: Figure) -> list[str]:
    return [ax.get_title(loc="left") for ax in figure.axes]


def ticks(figure: Figure, axis: str = "y") -> list[str]:
    return [
        text.get_text() for ax in figure.axes for text in getattr(ax, f"get_{axis}ticklabels")()
    ]


def of(variant: str, task: str, **changes: object) -> ProbeRow:
    make = baseline if variant == "statistics" else a_row
    return make(variant=variant, task=task, **changes)


def test_probe_figure_has_a_panel_for_each_task_and_a_line_for_each_variant():
    rows = [
        of(v, task, head=head)
        for v in VARIANTS
        for task in ("pitch", "family")
        for head in ("logistic", "knn")
    ]
    figure = draw_probe(rows, "probe")
    assert titles(figure) == ["pitch", "family"]
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == [
        "log-mel statistics",
        "mel",
        "random-init baseline",
        "context encoder",
        "target encoder",
    ]
    intervals = [line for line in figure.axes[0].lines if list(line.get_xdata()) == [0.3, 0.4]]
    assert len(intervals) == 4 * 2
    assert {"chance", "logistic regression", "k nearest neighbours"} <= set(legend_texts(figure))


def test_each_task_shows_its_metric_and_chance_if_known():
    rows = [a_row(task="genre"), a_row(task="chords", metric="majmin", chance=None)]
    figure = draw_probe(rows)
    assert [ax.get_xlabel().split(",")[0] for ax in figure.axes] == ["test accuracy", "test majmin"]
    dotted = [
        [line for line in ax.lines if list(line.get_xdata()) == [0.2, 0.2]] for ax in figure.axes
    ]
    assert list(map(len, dotted)) == [1, 0]


def test_runs_poolings_and_seeds_of_baselines_have_separate_lines():
    rows = [
        of(v, "pitch", encoder=e, pooling=p)
        for v in VARIANTS[:3]
        for e in "ab"
        for p in ("mean/mean", "mean/concat")
    ]
    rows.append(a_row(variant="random-3", encoder="a"))
    labels = ticks(draw_probe(rows))
    assert labels.count("random-init baseline, mean/mean") == 2
    assert labels.count("random-init baseline, mean/concat") == 2
    assert labels.count("random-init baseline, seed 3, mean/mean") == 1
    assert {"a", "b"} < set(labels)


def test_layer_figure_marks_the_selected_layer_and_draws_log_mel_as_a_line():
    figure = draw_layers([of(v, task) for v in VARIANTS for task in ("pitch", "family")], "layers")
    assert titles(figure) == ["pitch", "family"]
    lines = figure.axes[0].lines
    curves = [line for line in lines if len(line.get_xdata()) == 3]
    assert [list(line.get_ydata()) for line in curves] == [[0.2, 0.4, 0.3]] * 3, (
        "the weighted sum is no layer"
    )
    marks = [
        (line.get_xdata()[0], line.get_ydata()[0]) for line in lines if line.get_marker() == "D"
    ]
    assert marks == [(1.0, 0.4)] * 3
    sums = [line for line in lines if line.get_marker() == "_"]
    assert [list(line.get_ydata()) for line in sums] == [[0.35]] * 3
    assert all(line.get_xdata()[0] > 2 for line in sums)
    assert [list(line.get_ydata()) for line in lines if len(line.get_xdata()) == 2] == [[0.3, 0.3]]
    assert ticks(figure, "x")[:3] == ["in", "1", "sum"]
    handles = [handle for handle in figure.legends[0].legend_handles if isinstance(handle, Patch)]
    assert len(handles) == len(VARIANTS)


def test_each_task_of_each_encoder_has_a_panel():
    tasks = [f"task {number}" for number in range(5)]
    figure = draw_layers([a_row(task=task, encoder=encoder) for encoder in "ab" for task in tasks])
    assert titles(figure) == [f"{task}: {encoder}, mean/mean" for encoder in "ab" for task in tasks]


def test_layer_figure_of_log_mel_alone_has_a_note():
    figure = draw_layers([baseline()])
    assert not figure.axes
    assert "was probed" in figure.texts[0].get_text()


def test_dollar_signs_in_names_are_no_math(tmp_path):
    row = a_row(
        task="cost $x_1$ and $", encoder="run $a^b$ …", class_names=("$a", "b$", "$c^$", "d", "e")
    )
    evidence = multiclass(5)
    drawn = [draw_probe([row]), draw_layers([row]), *draw_head(row, evidence).values()]
    for place, figure in enumerate(drawn):
        figure.savefig(tmp_path / f"{place}.png", dpi=20)
    assert drawn[0].axes[0].get_title(loc="left") == r"cost \$x\_1\$ and \$".replace(r"\_", "_")
    assert r"\$a (4)" in ticks(drawn[4])


def test_grid_shows_every_score_and_frames_the_selected_one():
    figure = draw_grid(a_row(settings=(5e-5, 1e-2), setting=1e-2))
    combined, single = figure.axes
    assert [text.get_text() for text in combined.get_yticklabels()] == ["weighted sum"]
    assert [text.get_text() for text in single.get_yticklabels()] == ["block 2", "block 1", "input"]
    assert [text.get_text() for text in combined.texts] == ["0.350", "0.100"]
    assert [text.get_text() for text in single.texts] == [
        "0.200",
        "0.300",
        "0.300",
        "0.400",
        "0.100",
        "0.200",
    ]
    assert [text.get_text() for text in single.get_xticklabels()] == ["5e-5", "0.01"]
    frames = [patch for ax in figure.axes for patch in ax.patches if isinstance(patch, Rectangle)]
    assert [frame.get_xy() for frame in frames] == [(0.5, 0.5)], "block 1, second setting"
    assert frames[0] in single.patches


def test_diverged_heads_do_not_stretch_the_colour_scale():
    grid = ((0.1, float("nan")), (0.3, 0.4), (0.2, -1e6), (0.35, 0.1))
    _, single = draw_grid(a_row(valid_grid=grid)).axes
    shades = np.ma.filled(single.images[0].get_array(), -1)  # block 2, block 1, input
    assert shades[1, 1] == 1
    assert 0.3 < shades[1, 0] < 1
    assert shades[0, 1] == 0
    assert shades[2, 1] == -1, "not finite: no colour"
    assert "not finite" in [text.get_text() for text in single.texts]


def multiclass(num_classes: int, num_each: int = 4) -> Evidence:
    """The first unit of every class is predicted as the next class."""
    labels = np.repeat(np.arange(num_classes), num_each)
    predicted = labels.copy()
    predicted[::num_each] = (predicted[::num_each] + 1) % num_classes
    predictions = np.eye(num_classes, dtype=np.float32)[predicted]
    return Evidence(predictions, labels, tuple(map(str, range(len(labels)))), {})


def test_confusions_are_percent_of_the_true_class():
    evidence = multiclass(5)
    figure = draw_head(a_row(), evidence)["confusion"]
    shares = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_allclose(
        shares / 100, 0.75 * np.eye(5) + 0.25 * np.roll(np.eye(5), 1, axis=1)
    )
    assert ticks(figure)[:2] == ["a (4)", "b (4)"]
    assert {text.get_text() for text in figure.axes[0].texts} == {"75", "25"}


def test_only_the_most_confused_of_many_classes_are_drawn():
    labels = np.repeat(np.arange(128), 3)
    predicted = labels.copy()
    predicted[(labels >= 40) & (labels < 60)] += 20  # 40 classes err or are named by error
    evidence = Evidence(
        np.eye(128, dtype=np.float32)[predicted], labels, tuple(map(str, labels)), {}
    )
    row = a_row(class_names=tuple(f"note {i}" for i in range(128)))
    figure = draw_head(row, evidence)["confusion"]
    names = ticks(figure)
    assert len(names) == 30
    assert all(40 <= int(name.split()[1]) < 80 for name in names)
    assert titles(figure) == ["the 30 of 128 classes with most errors"]


def test_units_of_an_unknown_class_are_left_out_of_confusions():
    evidence = multiclass(5)
    unknown = Evidence(
        evidence.predictions, np.where(evidence.labels == 4, -1, evidence.labels), evidence.uids, {}
    )
    figure = draw_head(a_row(), unknown)["confusion"]
    assert ticks(figure)[4] == "e (0)"
    assert ticks(draw_head(a_row(), unknown)["classes"])[-1] == "e (0)"


def test_recall_bars_go_from_the_best_class_to_the_worst():
    labels = np.array([0, 0, 1, 1, 1, 1, 2, 2, 3])
    predicted = np.array([1, 1, 1, 1, 1, 0, 2, 2, 0])
    evidence = Evidence(
        np.eye(5, dtype=np.float32)[predicted], labels, tuple(map(str, range(9))), {}
    )
    figure = draw_head(a_row(), evidence)["classes"]
    assert ticks(figure) == ["c (2)", "b (4)", "a (2)", "d (1)", "e (0)"]
    assert [bar.get_width() for bar in figure.axes[0].patches] == [1, 0.75, 0, 0, 0]
    low, high = figure.axes[0].lines[1].get_xdata()
    assert low < 0.75 < high


def test_tags_show_average_precision_and_chance():
    rng = np.random.default_rng(0)
    tags = tuple(f"genre---{'long ' * 8}{i}" for i in range(87))
    labels = (rng.random((200, 87)) < 0.2).astype(np.float32)
    labels[:, 3] = 0
    predictions = (labels + rng.normal(size=labels.shape)).astype(np.float32)
    row = a_row(class_names=tags, metric="ap", task="mtg_genre")
    evidence = Evidence(predictions, labels, tuple(map(str, range(200))), {})
    figure = draw_head(row, evidence)["classes"]
    bars = [bar.get_width() for ax in figure.axes for bar in ax.patches]
    expected = [
        average_precision_score(labels[:, i], predictions[:, i]) for i in range(87) if i != 3
    ]
    np.testing.assert_allclose(bars, [*sorted(expected, reverse=True), 0])
    names = ticks(figure)
    assert len(names) == 87
    assert names[-1].endswith("(0)")
    assert not any("genre---" in name for name in names)
    assert all(len(name) < 35 for name in names)
    orange = [
        line
        for ax in figure.axes
        for line in ax.lines
        if to_hex(line.get_color()) == ORANGE.lower()
    ]
    assert len(orange) == 87


def test_regression_shows_predictions_against_labels():
    rng = np.random.default_rng(0)
    labels = rng.normal(size=(40, 2)).astype(np.float32)
    predictions = np.stack([labels[:, 0], -labels[:, 1]], axis=1)
    scores = {"r2": Score(0.1, 0.0, 0.2), "r2_arousal": Score(1.0, 1.0, 1.0)}
    row = a_row(class_names=("arousal", "valence"), metric="r2", scores=scores)
    evidence = Evidence(predictions, labels, tuple(map(str, range(40))), {})
    figure = draw_head(row, evidence)["classes"]
    assert titles(figure)[0] == "arousal: R² 1.000, 40 test units"
    np.testing.assert_allclose(figure.axes[1].collections[0].get_offsets()[:, 1], -labels[:, 1])


def test_label_kinds_are_recognised():
    zeros = np.zeros((4, 5), np.float32)
    row, uids = a_row(), ("1", "2", "3", "4")
    assert label_kind(row, Evidence(zeros, np.zeros(4, np.int64), uids, {})) == "multiclass"
    assert label_kind(row, Evidence(zeros, zeros, uids, {})) == "multilabel"
    assert label_kind(row, Evidence(zeros, zeros + 0.5, uids, {})) == "other"
    assert label_kind(a_row(metric="r2"), Evidence(zeros, zeros, uids, {})) == "regression"
    counts = Evidence(np.zeros((4, 3), np.float32), np.zeros(4, np.int64), uids, {})
    assert label_kind(row, counts) == "other"
    assert list(draw_head(row, counts)) == ["grid"]


def under_conditions(variant: str, share: float, encoder: str = "mel") -> ProbeRow:
    levels = (30.0, 20.0, 10.0)
    robustness = {
        "white_noise": tuple((level, share * level / 100) for level in levels),
        "mine": ((1.0, 0.1),),
    }
    return a_row(variant=variant, encoder=encoder, robustness=robustness)


def test_robustness_has_a_panel_for_each_condition_and_a_curve_for_each_encoder():
    rows = [under_conditions("random", 0.5), under_conditions("context", 1.0)]
    figure = draw_robustness(rows, "under noise")
    assert titles(figure) == ["white_noise", "mine"]
    noise = figure.axes[0]
    curves = [list(line.get_ydata()) for line in noise.lines if len(line.get_xdata()) == 3]
    assert curves == [[0.15, 0.1, 0.05], [0.3, 0.2, 0.1]]
    clean = [list(line.get_ydata()) for line in noise.lines if len(line.get_xdata()) == 2][:2]
    assert clean == [[0.35, 0.35]] * 2
    assert [text.get_text() for text in noise.get_xticklabels()] == ["30", "20", "10"]
    assert noise.get_xlabel() == "level in dB, from mild to strong"
    assert legend_texts(figure) == [
        "mel, random-init baseline",
        "mel, context encoder",
        "clean",
        "chance",
    ]
    assert noise.lines[0].get_color() == GREY


def test_many_encoders_have_different_robustness_curves():
    rows = [under_conditions("context", 1.0, f"run {number}") for number in range(20)]
    curves = [line for line in draw_robustness(rows).axes[0].lines if len(line.get_xdata()) == 3]
    assert len({(line.get_color(), line.get_marker()) for line in curves}) == 20


def names(files: dict) -> list[str]:
    return [file.path.name for of_task in files.values() for files in of_task for file in files]


def test_results_are_drawn_once_into_pictures(tmp_path):
    rows = [
        a_row(seed=1, evidence="1.npz"),
        a_row(seed=0, evidence="0.npz", robustness={"gain": ((10.0, 0.3), (-10.0, 0.2))}),
        a_row(variant="random", evidence="gone.npz"),
        a_row(task="beats", class_names=("beat",), evidence="0.npz", encoder="run/step=1"),
    ]
    append_rows(tmp_path / "results.jsonl", rows)
    save_evidence(tmp_path / "0.npz", multiclass(5))
    table = read_results([tmp_path / "results.jsonl"])
    drawn = draw_close_ups(table)
    name = "mel-context-mean_mean-00000000-linear-best-logistic"
    assert names(drawn) == [
        f"nsynth_pitch-{name}-grid.png",
        f"nsynth_pitch-{name}-classes.png",
        f"nsynth_pitch-{name}-confusion.png",
        "beats-run_step_1-context-mean_mean-00000000-linear-best-logistic-grid.png",
    ]
    files = [file for of_task in drawn.values() for files in of_task for file in files]
    assert all(file.path.parent == tmp_path / "pictures" for file in files)
    assert all(file.path.stat().st_size > 5000 and file.width > 400 for file in files)
    written = [file.path.stat().st_mtime_ns for file in files]
    assert draw_close_ups(table) == drawn
    assert [file.path.stat().st_mtime_ns for file in files] == written, "not drawn again"
    ((condition,),) = draw_conditions(table, tmp_path).values()
    assert condition.path == tmp_path / "nsynth_pitch-linear-best-logistic-abcdef01-robustness.png"


def test_missing_evidence_of_figures_is_named(tmp_path):
    append_rows(tmp_path / "results.jsonl", [a_row(evidence="evidence/gone.npz")])
    with pytest.raises(MissingFileError, match=r"evidence/gone\.npz"):
        draw_close_ups(read_results([tmp_path / "results.jsonl"]))
