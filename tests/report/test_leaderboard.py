import re

import numpy as np
import pytest

from jepa_audio.errors import MissingFileError
from jepa_audio.report.leaderboard import write_leaderboard
from jepa_audio.report.page import Cell, Grid, Line, to_html, to_markdown
from jepa_audio.report.published import (
    load_published,
    place,
    published_elsewhere,
    published_on,
    why_not_comparable,
)
from jepa_audio.report.standings import Mean, averages, gap, headline, ranks, read_blocks
from tests.probing.rows import add, add_scores

NOISE = np.random.default_rng(0).normal(0, 0.02, 400)
"""What resamples do to every encoder alike."""
OWN = np.random.default_rng(1).normal(0, 0.02, (9, 400))
"""What they do to each by itself."""
V1 = {
    "preset": "marble-v1",
    "head": "mlp",
    "num_train": 289_205,
    "num_valid": 12_678,
    "num_test": 4_096,
}
"""NSynth as published numbers have it."""
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


def lines_of(results) -> dict[str, list[str]]:
    """The cells of every line of the leaderboard's tables, by the second cell."""
    text = write_leaderboard(results).with_name("leaderboard.md").read_text()
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return {line[1]: line for line in lines if len(line) > 1}


def test_a_difference_is_told_apart_though_the_intervals_overlap():
    better, worse = Mean(0.52, 0.52 + NOISE), Mean(0.50, 0.50 + NOISE)
    assert better.interval[0] < worse.value < better.value < worse.interval[1]
    assert gap(better, worse).verdict == "ahead"
    assert [str(rank) for rank in ranks([worse, better])] == ["2", "1"]


def test_a_difference_that_holds_zero_shares_ranks():
    means = [Mean(0.52, 0.52 + OWN[0]), Mean(0.50, 0.50 + OWN[1]), Mean(0.2, 0.2 + OWN[2])]
    assert [str(rank) for rank in ranks(means)] == ["1–2", "1–2", "3"]  # noqa: RUF001


def test_not_being_told_apart_is_not_passed_on():
    means = [
        Mean(value, value + OWN[number] / 2) for number, value in enumerate((0.54, 0.52, 0.50))
    ]
    first, second, third = ranks(means)
    assert (first.first, first.last) == (1, 2)
    assert (second.first, second.last) == (1, 3)
    assert (third.first, third.last) == (2, 3)


def test_seeds_are_averaged_draw_by_draw(results):
    add(results, 0.4, 0.4 + OWN[0], seed=0)
    add(results, 0.6, 0.6 + OWN[1], seed=1)
    (block,) = read_blocks(results)
    (standing,) = block.standings
    mean = standing.means["accuracy"]
    assert mean.value == pytest.approx(0.5)
    assert mean.deviation == pytest.approx(np.std([0.4, 0.6], ddof=1))
    np.testing.assert_allclose(mean.draws, 0.5 + (OWN[0] + OWN[1]) / 2, atol=1e-6)
    line = lines_of(results)["mel context, mean"]
    assert line[2].startswith("**0.500** [0.4")
    assert line[3] == "2 sd 0.141"


def test_the_last_row_wins(results):
    add(results, 0.4, 0.4 + OWN[0])
    add(results, 0.7, 0.7 + OWN[0])
    assert lines_of(results)["mel context, mean"][2].startswith("**0.700**")


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
def test_other_terms_are_not_compared(results, other):
    add(results, 0.5, 0.5 + NOISE)
    add(results, 0.9, 0.9 + NOISE, encoder="wave", **other)
    assert len(read_blocks(results)) == 2
    lines = lines_of(results)
    assert [lines[f"{name} context, mean"][0] for name in ("mel", "wave")] == ["**1**", "**1**"]
    assert (
        "2 tables that are not compared with each other"
        in results.with_name("leaderboard.md").read_text()
    )


def test_draws_of_another_number_are_not_compared(results):
    add(results, 0.5, 0.5 + NOISE)
    add(results, 0.9, 0.9 + NOISE[:100], encoder="wave")
    assert len(read_blocks(results)) == 2


def test_poolings_are_compared(results):
    add(results, 0.5, 0.5 + NOISE)
    add(results, 0.9, 0.9 + NOISE, pooling="concat")
    lines = lines_of(results)
    assert (lines["mel context, concat"][0], lines["mel context, mean"][0]) == ("**1**", "**2**")


def test_twins_and_statistics_stand_beside_without_a_rank(results):
    add(results, 0.9, 0.9 + NOISE, encoder="mel", variant="random")
    add(results, 0.5, 0.5 + NOISE)
    add(results, 0.5, 0.5 + OWN[0], encoder="log-mel", variant="statistics")
    add(results, 0.95, 0.95 + NOISE, encoder="wave")
    lines = lines_of(results)
    assert [lines[f"{name}, mean"][0] for name in ("mel random", "log-mel statistics")] == ["", ""]
    assert (lines["wave context, mean"][0], lines["mel context, mean"][0]) == ("**1**", "**2**")
    assert lines["mel context, mean"][4].startswith("-0.400 behind [-0.400")
    assert lines["mel context, mean"][5].startswith("+0.000 no significant difference")
    assert lines["wave context, mean"][4] == "not probed"
    assert (
        "No random-init twin was probed for wave."
        in results.with_name("leaderboard.md").read_text()
    )


def test_encoders_of_one_name_are_told_apart_by_their_weights(results):
    add(results, 0.5, 0.5 + NOISE, encoder_hash="aaaaaaaaaa")
    add(results, 0.6, 0.6 + NOISE, encoder_hash="bbbbbbbbbb")
    assert {
        "mel context, mean, weights aaaaaaaa",
        "mel context, mean, weights bbbbbbbb",
    } <= lines_of(results).keys()


def test_averages_are_of_those_who_have_all_tasks(results):
    for encoder, shift in (("both", 0.0), ("better", 0.1), ("one", 0.3)):
        add(results, 0.2 + shift, 0.2 + shift + NOISE, encoder=encoder, task="nsynth_pitch")
        if encoder != "one":
            scores = {"auroc": (0.8, 0.8 + NOISE), "ap": (0.4, 0.4 + NOISE)}
            add_scores(results, scores, encoder=encoder, task="mtt", metric="auroc")
    (average,) = averages(read_blocks(results))
    assert [encoder.name for encoder, _, _ in average.lines] == ["better", "both"]
    _, mean, of_tasks = average.lines[0]
    assert [one.value for one in of_tasks] == pytest.approx([0.3, 0.6]), (
        "two metrics of a task are averaged first"
    )
    assert mean.value == pytest.approx(0.45)
    np.testing.assert_allclose(mean.draws, 0.45 + NOISE, atol=1e-6)


def test_regression_enters_an_average_as_the_mean_of_its_two_numbers(results):
    scores = {
        name: (value, value + NOISE)
        for name, value in (("r2", 0.9), ("r2_arousal", 0.6), ("r2_valence", 0.4))
    }
    add_scores(results, scores, task="emomusic", metric="r2")
    (block,) = read_blocks(results)
    assert headline(block.standings[0], "r2").value == pytest.approx(0.5)


def test_an_average_takes_no_task_on_other_records(results):
    for encoder, checksum in (("a", "1"), ("b", "2")):
        add(results, 0.2, 0.2 + NOISE, encoder=encoder, task="nsynth_pitch")
        add(
            results,
            0.2,
            0.2 + NOISE,
            encoder=encoder,
            task="nsynth_instrument",
            split_checksum=checksum,
        )
    assert [
        [encoder.name for encoder, _, _ in average.lines]
        for average in averages(read_blocks(results))
    ] == [
        ["a"],
        ["b"],
    ]


def test_published_numbers_stand_on_our_scale_and_are_marked(results):
    published = {number.model: number.value for number in published_on("nsynth_pitch")}
    assert published["MERT-v1-95M"] == pytest.approx(0.926)
    add(results, 0.92, 0.92 + NOISE / 4, **V1)
    text = write_leaderboard(results).with_name("leaderboard.md").read_text()
    assert "| MERT-v1-95M | 0.926 inside our interval |" in text
    assert "| CLMR | 0.470 below |" in text
    assert "| MERT-v1-330M | 0.944 above |" in text
    assert "| MuQ | 0.923 ± 0.002 inside our interval |" in text
    assert "2 to 4 points" in text


def test_published_numbers_are_held_against_the_best_trained_encoder(results):
    add(results, 0.99, 0.99 + NOISE / 4, variant="random", **V1)
    add(results, 0.64, 0.64 + NOISE / 4, **V1)
    text = write_leaderboard(results).with_name("leaderboard.md").read_text()
    assert "| MusiCNN | 0.641 inside our interval |" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"preset": "linear"}, "the preset of our rows is linear"),
        ({"select": "last"}, "our rows test the last epoch"),
        ({"num_test": 77}, "our rows are of 289205/12678/77 units"),
    ],
)
def test_what_is_not_comparable_is_said_and_not_marked(results, changes, said):
    add(results, 0.92, 0.92 + NOISE, **(V1 | changes))
    text = write_leaderboard(results).with_name("leaderboard.md").read_text()
    assert f"Published numbers are not comparable with ours: {said}" in text
    assert "| MERT-v1-95M | 0.926 |" in text
    assert "inside our interval" not in text


def test_numbers_of_other_protocols_are_never_marked(results):
    add(results, 0.6, 0.6 + NOISE, **(V1 | {"task": "nsynth_instrument"}))
    text = write_leaderboard(results).with_name("leaderboard.md").read_text()
    assert re.search(r"\| MusiCNN \| 0.726 (above|below|inside)", text)
    assert "| Dasheng | 0.688 |" in text
    heads = [
        text[: text.index(f"| {model} |")].rpartition("| model |")[0]
        for model in ("MusiCNN", "Dasheng")
    ]
    assert heads[0] != heads[1], "a table of its own"


def test_comparability_needs_protocol_epoch_and_size():
    sizes = (443, 197, 290)
    assert why_not_comparable("marble-v1", "best", sizes, sizes) is None
    assert "not known" in why_not_comparable("marble-v1", "best", sizes, (None, None, None))
    assert "430/197/290" in why_not_comparable("marble-v1", "best", (430, 197, 290), sizes)
    assert [place(value, 0.4, 0.6) for value in (0.3, 0.4, 0.5, 0.7)] == [
        "below",
        "inside our interval",
        "inside our interval",
        "above",
    ]


def test_every_published_number_is_a_share_of_a_task_that_there_is():
    numbers = [number for number in load_published() if not number.benchmark]
    assert {number.task for number in numbers} <= TASKS
    assert {number.metric for number in numbers} <= set(METRICS)
    for number in load_published():
        assert number.metric == "SDR in dB" or 0 <= number.value < 1, number
        assert number.deviation is None or 0 < number.deviation < 0.06, number
        assert number.source
        assert number.protocol.note
    keys = [
        (n.model, n.task, n.metric, n.source, n.protocol, n.benchmark) for n in load_published()
    ]
    assert len(keys) == len(set(keys))


def test_published_numbers_are_those_that_were_printed():
    def value(model, task, metric, protocol):
        (found,) = [
            number
            for number in (*published_on(task), *published_elsewhere())
            if (number.model, number.task, number.metric) == (model, task, metric)
            and number.protocol.name.startswith(protocol)
            and number.benchmark in {"", "HEAR"}
        ]
        return found.value, found.deviation

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
    assert {n.value for n in published_on("gtzan_beat") if n.model == "MusiCNN"} == set(), (
        "no number was printed"
    )


def test_the_page_holds_the_numbers_and_escapes_names(results):
    name = "<script>alert('&')|"
    add(results, 0.4321, 0.4321 + NOISE, encoder=name, layer="<i>", layers=("<i>", "b", "c", "d"))
    page = write_leaderboard(results)
    html, text = page.read_text(), page.with_name("leaderboard.md").read_text()
    assert page == results.with_name("leaderboard.html")
    low, high = np.percentile(0.4321 + NOISE, (2.5, 97.5))
    for said in (html, text):
        assert "0.432" in said
        assert f"[{low:.3f}, {high:.3f}]" in said
        assert "<script" not in said
        assert "<i>" not in said
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)|" in html
    (line,) = [line for line in text.splitlines() if "alert" in line and line.startswith("| **1**")]
    assert len(re.split(r"(?<!\\)\|", line)) == 7 + 2, "a bar in a name makes no column"


def test_the_page_needs_no_other_file_and_its_tables_scroll_by_themselves(results):
    add(results, 0.4, 0.4 + NOISE)
    html = write_leaderboard(results).read_text()
    assert not re.search(r'src=|href="(?!#)|url\(|@import', html)
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
    with pytest.raises(ValueError, match=r"evidence/1\.npz holds no `draws/file_accuracy`"):
        write_leaderboard(results)


def test_no_results_are_named(results):
    with pytest.raises(MissingFileError, match=r"results\.jsonl"):
        write_leaderboard(results)
    results.write_text("")
    with pytest.raises(ValueError, match="holds no rows"):
        write_leaderboard(results)


def test_a_score_that_is_no_number_has_no_rank(results):
    add(results, float("nan"), np.full(400, np.nan))
    add(results, 0.5, 0.5 + NOISE, encoder="wave")
    lines = lines_of(results)
    assert lines["wave context, mean"][0] == "**1**"
    assert "mel context, mean" not in lines


def test_cells_of_both_documents_say_the_same():
    grid = Grid(["a", "b"], [Line([Cell("1 < 2", "strong", "note"), Cell("x", "ahead")], "best")])
    assert "| **1 &lt; 2** note | x |" in to_markdown("t", [grid])
    html = to_html("t", "s", [grid])
    assert '<tr class="best">' in html
    assert "1 &lt; 2<small>note</small>" in html
