import re

import numpy as np
import pytest

from jepa_audio.errors import MissingFileError
from jepa_audio.probing.intervals import difference, interval
from jepa_audio.report.leaderboard import (
    build_averages,
    compute_scores,
    mean_scores,
    rank_ranges,
)
from jepa_audio.report.page import compare_results, render, write_leaderboard
from jepa_audio.report.published import (
    load_published,
    position,
    published_on,
    why_not_comparable,
)
from jepa_audio.report.results import read_results
from tests.probing.rows import add, add_scores

NOISE = np.random.default_rng(0).normal(0, 0.02, 400)
"""Bootstrap noise shared by every encoder."""
OWN = np.random.default_rng(1).normal(0, 0.02, (9, 400))
"""Bootstrap noise of each encoder by itself."""
V1 = {
    "preset": "marble-v1",
    "head": "mlp",
    "num_train": 289_205,
    "num_valid": 12_678,
    "num_test": 4_096,
}
"""The splits of NSynth with published numbers."""
TASKS = {
    *(
        "gtzan_genre",
        "giantsteps_key",
        "emomusic",
        "mtt",
        "nsynth_pitch",
        "nsynth_instrument",
        "vocalset_singer",
    ),
    *(
        "vocalset_technique",
        "mtg_top50",
        "mtg_genre",
        "mtg_instrument",
        "mtg_mood",
        "gtzan_beat",
        "chords1217",
    ),
    *("hooktheory_key", "hooktheory_structure"),
}
METRICS = ("accuracy", "key_weighted", "auroc", "ap", "r2_arousal", "r2_valence", "beat_f1_pooled")


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results.jsonl"


def markdown_of(results) -> str:
    return render("leaderboard.md", compare_results(read_results([results])))


def lines_of(results) -> dict[str, list[str]]:
    """The cells of every line of the leaderboard's tables, by the second cell."""
    text = markdown_of(results)
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return {line[1]: line for line in lines if len(line) > 1}


def scores_of(results):
    return compute_scores(read_results([results]))


def test_difference_can_be_significant_though_intervals_overlap():
    better, worse = (0.52, 0.52 + NOISE), (0.50, 0.50 + NOISE)
    assert interval(better[1])[0] < worse[0] < better[0] < interval(worse[1])[1]
    assert difference(better[0], worse[0], better[1], worse[1]).verdict == "ahead"
    assert rank_ranges([0.50, 0.52], [worse[1], better[1]]) == [(2, 2), (1, 1)]


def test_encoders_without_significant_difference_share_ranks():
    values = (0.52, 0.50, 0.2)
    draws = [value + OWN[number] for number, value in enumerate(values)]
    assert rank_ranges(values, draws) == [(1, 2), (1, 2), (3, 3)]


def test_no_significant_difference_is_not_transitive():
    values = (0.54, 0.52, 0.50)
    draws = [value + OWN[number] / 2 for number, value in enumerate(values)]
    assert rank_ranges(values, draws) == [(1, 2), (1, 3), (2, 3)]


def test_draws_of_seeds_are_averaged(results):
    add(results, 0.4, 0.4 + OWN[0], seed=0)
    add(results, 0.6, 0.6 + OWN[1], seed=1)
    (score,) = scores_of(results).itertuples()
    assert score.value == pytest.approx(0.5)
    assert score.deviation == pytest.approx(np.std([0.4, 0.6], ddof=1))
    np.testing.assert_allclose(score.draws, 0.5 + (OWN[0] + OWN[1]) / 2, atol=1e-6)
    line = lines_of(results)["mel context, mean/mean"]
    assert line[2].startswith("**0.500** [0.4")
    assert line[3] == "2 sd 0.141"


def test_last_row_of_an_encoder_counts(results):
    add(results, 0.4, 0.4 + OWN[0])
    add(results, 0.7, 0.7 + OWN[0])
    assert lines_of(results)["mel context, mean/mean"][2].startswith("**0.700**")


@pytest.mark.parametrize(
    "other",
    [
        {"split_checksum": "other"},
        {"preset": "marble-v1"},
        {"head": "knn"},
        {"select": "last"},
        {"num_train": 8},
        {"decoder": "peaks"},
        {"uids": ("v", "w", "x", "y", "z")},
    ],
)
def test_results_under_other_conditions_are_not_compared(results, other):
    add(results, 0.5, 0.5 + NOISE)
    add(results, 0.9, 0.9 + NOISE, encoder="wave", **other)
    assert scores_of(results)["comparison"].nunique() == 2
    lines = lines_of(results)
    assert [lines[f"{name} context, mean/mean"][0] for name in ("mel", "wave")] == [
        "**1**",
        "**1**",
    ]
    assert "2 sets of results below are not compared with each other" in markdown_of(results)


def test_different_numbers_of_draws_are_not_compared(results):
    add(results, 0.5, 0.5 + NOISE)
    add(results, 0.9, 0.9 + NOISE[:100], encoder="wave")
    assert scores_of(results)["comparison"].nunique() == 2


def test_poolings_are_compared(results):
    add(results, 0.5, 0.5 + NOISE)
    add(results, 0.9, 0.9 + NOISE, pooling="mean/concat")
    lines = lines_of(results)
    assert (lines["mel context, mean/concat"][0], lines["mel context, mean/mean"][0]) == (
        "**1**",
        "2",
    )


def test_log_mel_is_compared_at_equal_pooling_and_at_its_best(results):
    log_mel = {"encoder": "log-mel", "variant": "statistics"}
    add(results, 0.5, 0.5 + NOISE, pooling="thirds/mean")
    add(results, 0.4, 0.4 + NOISE, pooling="thirds/concat", **log_mel)
    add(results, 0.6, 0.6 + NOISE, pooling="mean_std_change/concat", **log_mel)
    line = lines_of(results)["mel context, thirds/mean (below log-mel)"]
    assert line[4] == "not probed"
    assert line[5].startswith("-0.100 behind")
    assert line[6].startswith("+0.100 ahead")


def test_baselines_are_listed_without_a_rank(results):
    add(results, 0.9, 0.9 + NOISE, encoder="mel", variant="random")
    add(results, 0.5, 0.5 + NOISE)
    add(results, 0.5, 0.5 + OWN[0], encoder="log-mel", variant="statistics")
    add(results, 0.95, 0.95 + NOISE, encoder="wave")
    lines = lines_of(results)
    assert [lines[f"{name}, mean/mean"][0] for name in ("mel random", "log-mel statistics")] == [
        "",
        "",
    ]
    mel, wave = (
        lines["mel context, mean/mean (below random-init)"],
        lines["wave context, mean/mean"],
    )
    assert (wave[0], mel[0]) == ("**1**", "2")
    assert mel[4].startswith("-0.400 behind [-0.400")
    assert mel[5].startswith("+0.000 no significant difference")
    assert wave[4] == "not probed"
    text = markdown_of(results)
    assert "No random-init baseline was probed for wave." in text


@pytest.mark.parametrize(
    ("random_init", "log_mel", "label"),
    [
        (0.6, 0.3, " (below random-init)"),
        (0.3, 0.6, " (below log-mel)"),
        (0.6, 0.6, " (below random-init) (below log-mel)"),
        (0.3, 0.3, ""),
    ],
)
def test_encoder_below_a_baseline_is_marked_and_never_the_best(
    results, random_init, log_mel, label, empty_figures
):
    for task in ("nsynth_pitch", "nsynth_instrument"):
        add(results, random_init, random_init + OWN[1], variant="random", task=task)
        add(results, 0.5, 0.5 + OWN[0], task=task)
        log_mel_names = {"encoder": "log-mel", "variant": "statistics", "task": task}
        add(results, log_mel, log_mel + OWN[2], **log_mel_names)
    page = write_leaderboard(results)
    text = page.with_suffix(".md").read_text()
    lines = [line for line in text.splitlines() if "mel context, mean/mean" in line]
    assert len(lines) == 3, "two tasks and their average"
    rank, value = ("1", "0.500") if label else ("**1**", "**0.500**")
    for line in lines:
        assert line.startswith(f"| {rank} | mel context, mean/mean{label} | {value} [")
    (html,) = re.findall(r"<h2 id=\"averages.*?</table>", page.read_text(), re.DOTALL)
    (row,) = [row for row in html.split("<tr")[1:] if "context, mean/mean" in row]
    assert (' class="best"' in row) == (not label)
    marks = re.findall(r'<span class="badge behind">([^<]*)</span>', row)
    assert "".join(f" ({mark})" for mark in marks) == label


def test_encoders_of_one_name_are_identified_by_their_weights(results):
    add(results, 0.5, 0.5 + NOISE, encoder_hash="aaaaaaaaaa")
    add(results, 0.6, 0.6 + NOISE, encoder_hash="bbbbbbbbbb")
    assert {
        "mel context, mean/mean, weights aaaaaaaa",
        "mel context, mean/mean, weights bbbbbbbb",
    } <= lines_of(results).keys()


def test_averages_are_of_encoders_with_all_tasks(results):
    for encoder, shift in (("both", 0.0), ("better", 0.1), ("one", 0.3)):
        add(results, 0.2 + shift, 0.2 + shift + NOISE, encoder=encoder, task="nsynth_pitch")
        if encoder != "one":
            scores = {"auroc": (0.8, 0.8 + NOISE), "ap": (0.4, 0.4 + NOISE)}
            add_scores(results, scores, encoder=encoder, task="mtt", metric="auroc")
    (average,) = build_averages(scores_of(results))
    assert [line.encoder for line in average["lines"]] == ["better", "both"]
    best = average["lines"][0]
    assert best.values == pytest.approx((0.3, 0.6)), "two metrics of a task are averaged first"
    assert best.value == pytest.approx(0.45)
    np.testing.assert_allclose(best.draws, 0.45 + NOISE, atol=1e-6)


def test_regression_enters_an_average_as_the_mean_of_its_two_numbers(results):
    metrics = {"r2": 0.9, "r2_arousal": 0.6, "r2_valence": 0.4}
    scores = {name: (value, value + NOISE) for name, value in metrics.items()}
    add_scores(results, scores, task="emomusic", metric="r2")
    add(results, 0.2, 0.2 + NOISE, task="nsynth_pitch", encoder_hash="mel context")
    (average,) = build_averages(scores_of(results))
    assert average["lines"][0].values == pytest.approx((0.5, 0.2))


def test_average_of_different_numbers_of_draws_has_no_interval_and_no_rank(results):
    for task, draws in (("nsynth_pitch", NOISE), ("nsynth_instrument", NOISE[:100])):
        add(results, 0.5, 0.5 + draws, task=task)
    scores = scores_of(results)
    (average,) = build_averages(scores)
    assert not len(mean_scores(scores)["draws"])
    (line,) = average["lines"]
    assert (line.value, line.rank) == (pytest.approx(0.5), "")
    assert "| **0.500** |" not in markdown_of(results)


def test_average_takes_no_task_on_other_records(results):
    for encoder, checksum in (("a", "1"), ("b", "2")):
        add(results, 0.2, 0.2 + NOISE, encoder=encoder, task="nsynth_pitch")
        records = {"task": "nsynth_instrument", "split_checksum": checksum}
        add(results, 0.2, 0.2 + NOISE, encoder=encoder, **records)
    averages = build_averages(scores_of(results))
    assert [[line.encoder for line in average["lines"]] for average in averages] == [["a"], ["b"]]


def test_comparable_published_numbers_show_their_position(results):
    published = published_on("nsynth_pitch").drop_duplicates("model").set_index("model")["value"]
    assert published["MERT-v1-95M"] == pytest.approx(0.926)
    add(results, 0.92, 0.92 + NOISE / 4, **V1)
    text = markdown_of(results)
    assert "| MERT-v1-95M | 0.926 inside our interval |" in text
    assert "| CLMR | 0.470 below |" in text
    assert "| MERT-v1-330M | 0.944 above |" in text
    assert "| MuQ | 0.923 ± 0.002 inside our interval |" in text
    assert "2 to 4 points" in text


def test_published_numbers_are_compared_with_the_best_trained_encoder(results):
    add(results, 0.99, 0.99 + NOISE / 4, variant="random", **V1)
    add(results, 0.64, 0.64 + NOISE / 4, **V1)
    text = markdown_of(results)
    assert "| MusiCNN | 0.641 inside our interval |" in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"preset": "linear"}, "the preset of our results is linear"),
        ({"select": "last"}, "our results test the last epoch"),
        ({"num_test": 77}, "our results are of 289205/12678/77 units"),
    ],
)
def test_reason_why_published_numbers_are_not_comparable_is_shown(results, changes, reason):
    add(results, 0.92, 0.92 + NOISE, **(V1 | changes))
    text = markdown_of(results)
    assert f"Published numbers are not comparable with ours: {reason}" in text
    assert "| MERT-v1-95M | 0.926 |" in text
    assert "inside our interval" not in text


def test_numbers_of_other_protocols_have_no_position(results):
    add(results, 0.6, 0.6 + NOISE, **(V1 | {"task": "nsynth_instrument"}))
    text = markdown_of(results)
    assert re.search(r"\| MusiCNN \| 0.726 (above|below|inside)", text)
    assert "| Dasheng | 0.688 |" in text
    heads = [
        text[: text.index(f"| {model} |")].rpartition("| model |")[0]
        for model in ("MusiCNN", "Dasheng")
    ]
    assert heads[0] != heads[1], "a table of its own"


def test_comparability_needs_protocol_epoch_and_size():
    sizes = (443, 197, 290)
    assert why_not_comparable("gtzan_genre", "marble-v1", "best", sizes) is None
    assert "not known" in why_not_comparable("my_table", "marble-v1", "best", sizes)
    other = why_not_comparable("gtzan_genre", "marble-v1", "best", (430, 197, 290))
    assert "430/197/290" in other
    assert [position(value, 0.4, 0.6) for value in (0.3, 0.4, 0.5, 0.7)] == [
        "below",
        "inside our interval",
        "inside our interval",
        "above",
    ]


def test_every_published_number_is_a_fraction_of_a_known_task():
    numbers = load_published()
    ours = numbers[numbers["benchmark"] == ""]
    assert set(ours["task"]) <= TASKS
    assert set(ours["metric"]) <= set(METRICS)
    for number in numbers.itertuples():
        assert number.metric == "SDR in dB" or 0 <= number.value < 1, number
        assert np.isnan(number.deviation) or 0 < number.deviation < 0.06, number
        assert number.source
        assert number.note
    key = ["model", "task", "metric", "source", "protocol", "benchmark"]
    assert not numbers.duplicated(key).any()


def test_published_numbers_equal_the_printed_ones():
    def value(model, task, metric, protocol):
        numbers = load_published()
        (found,) = [
            number
            for number in numbers.itertuples()
            if (number.model, number.task, number.metric) == (model, task, metric)
            and number.protocol.startswith(protocol)
            and number.benchmark in {"", "HEAR"}
        ]
        return found.value, None if np.isnan(found.deviation) else found.deviation

    assert value("MERT-v1-330M", "giantsteps_key", "key_weighted", "MARBLE v1, con") == (
        0.617,
        None,
    )
    assert value("MERT-v1-95M", "vocalset_singer", "accuracy", "MARBLE v1, con") == (0.837, None)
    assert value("MERT-v1-95M", "mtg_top50", "ap", "MARBLE v1, con") == (0.29, None)
    assert value("MuQ iter", "emomusic", "r2_valence", "MARBLE v1 style") == (0.628, 0.001)
    assert value("PupuJEPA-Large", "gtzan_genre", "accuracy", "MARBLE v2") == (0.869, None)
    assert value("PupuJEPA-Large", "mtg_genre", "ap", "MARBLE v2") == (0.201, None)
    assert value("WavJEPA B", "s(m)", "percent", "HEAR") == (0.66, None)
    assert value("WavJEPA B", "ESC-50", "percent", "HEAR") == (0.865, 0.033)
    assert "MusiCNN" not in set(published_on("gtzan_beat")["model"]), "no number was printed"


def test_page_contains_the_numbers_and_escapes_names(results):
    name = "<script>alert('&')|"
    add(results, 0.4321, 0.4321 + NOISE, encoder=name, layer="<i>", layers=("<i>", "b", "c", "d"))
    page = write_leaderboard(results)
    html, text = page.read_text(), page.with_name("leaderboard.md").read_text()
    assert page == results.with_name("leaderboard.html")
    low, high = np.percentile(0.4321 + NOISE, (2.5, 97.5))
    for document in (html, text):
        assert "0.432" in document
        assert f"[{low:.3f}, {high:.3f}]" in document
        assert "<script" not in document
        assert "<i>" not in document
    assert "&lt;script&gt;alert(&#39;&amp;&#39;)|" in html
    (line,) = [line for line in text.splitlines() if "alert" in line and line.startswith("| **1**")]
    assert len(re.split(r"(?<!\\)\|", line)) == 8 + 2, "a bar in a name makes no column"


def test_page_needs_no_other_file_and_its_tables_scroll(results):
    add(results, 0.4, 0.4 + NOISE)
    html = write_leaderboard(results).read_text()
    assert not re.search(r'src="(?!data:)|href="(?!#)|url\(|@import', html)
    names = {path.name for path in (results.parent / "pictures").iterdir()}
    assert html.count("data:image/png;base64,") == len(names)
    assert {"probe.png", "layers.png"} < names
    assert html.count("<table>") == html.count('<div class="scroll"><table>')
    assert "prefers-color-scheme: dark" in html
    assert set(re.findall(r'href="#([^"]*)"', html)) <= set(re.findall(r'id="([^"]*)"', html))


def test_missing_evidence_is_named(results):
    row = add(results, 0.4, 0.4 + NOISE)
    (results.parent / row.evidence).unlink()
    with pytest.raises(MissingFileError, match=r"evidence/0\.npz"):
        write_leaderboard(results)


def test_evidence_without_the_draws_of_a_score_is_named(results):
    row = add(results, 0.4, 0.4 + NOISE)
    add_scores(
        results,
        {"accuracy": (0.5, 0.5 + NOISE), "file_accuracy": (0.5, 0.5 + NOISE)},
        encoder="wave",
    )
    (results.parent / "evidence/1.npz").write_bytes((results.parent / row.evidence).read_bytes())
    with pytest.raises(ValueError, match=r"evidence/1\.npz has no `draws/file_accuracy`"):
        write_leaderboard(results)


def test_missing_and_empty_results_are_named(results):
    with pytest.raises(MissingFileError, match=r"results\.jsonl"):
        write_leaderboard(results)
    results.write_text("")
    with pytest.raises(ValueError, match="contains no results"):
        write_leaderboard(results)


def test_score_that_is_not_finite_has_no_rank(results):
    add(results, float("nan"), np.full(400, np.nan))
    add(results, 0.5, 0.5 + NOISE, encoder="wave")
    lines = lines_of(results)
    assert lines["wave context, mean/mean"][0] == "**1**"
    assert "mel context, mean/mean" not in lines
