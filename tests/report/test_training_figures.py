import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure

from jepa_audio.report.curves import draw_curves
from jepa_audio.report.masks import draw_masks, split_masks
from jepa_audio.report.style import PALETTE, VEIL
from jepa_audio.steps.grid import Grid, Masks


def legend_texts(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def titles(figure: Figure) -> list[str]:
    return [ax.get_title(loc="left") for ax in figure.axes]


def random_masks(grid: Grid, num_groups: int, seed: int, batch_size: int = 2) -> Masks:
    """Context, overlapping targets, and tokens that are neither; rows of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    role = torch.rand(batch_size, grid.num_tokens, generator=generator)
    targets = torch.rand(batch_size, num_groups, grid.num_tokens, generator=generator) < 0.5
    return Masks.from_bool(role < 0.3, targets & (role > 0.5)[:, None])


def groups_painted(colors: np.ndarray) -> set[int]:
    """Which target groups the pixels of one cell show."""
    shown = {to_hex(tuple(color[:3])) for color in colors.reshape(-1, 4) if color[3] > 0}
    return {group for group, color in enumerate(PALETTE) if color.lower() in shown}


def draw(grid: Grid, masks: list[Masks]) -> Figure:
    image = np.random.default_rng(0).normal(size=(24, 60))
    return draw_masks(image, [split_masks(draw, grid) for draw in masks], 1.5, "masks")


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4])
def test_overlay_equals_the_masks_on_a_two_dimensional_grid(num_groups):
    grid = Grid(3, 5)
    masks = random_masks(grid, num_groups, seed=num_groups)
    overlay = draw(grid, [masks]).axes[0].images[1].get_array()
    context = masks.context.to_mask(grid.num_tokens)[0]
    targets = masks.targets.to_mask(grid.num_tokens)[0]
    cells = np.asarray(overlay).reshape(grid.num_freq, -1, grid.num_time, 4)
    for token in range(grid.num_tokens):
        time, freq = token // grid.num_freq, token % grid.num_freq
        cell = cells[freq, :, time]
        expected = {group for group in range(num_groups) if targets[group, token]}
        assert groups_painted(cell) == expected
        is_veiled = np.allclose(cell[..., :3], to_rgba(VEIL)[:3]) and (cell[..., 3] > 0).all()
        assert is_veiled == (not expected and not context[token])
        assert (cell[..., 3] == 0).all() == bool(context[token])


def test_groups_share_a_cell_evenly():
    grid = Grid(2, 2)
    targets = torch.ones(1, 3, 4, dtype=torch.bool)
    overlay = draw(grid, [Masks.from_bool(targets[:, 0], targets)]).axes[0].images[1].get_array()
    _, counts = np.unique(np.asarray(overlay).reshape(-1, 4), axis=0, return_counts=True)
    assert len(counts) == 3
    assert len(set(counts)) == 1


def test_each_group_has_its_own_lane_on_a_grid_with_one_row():
    grid, num_groups = Grid(1, 12), 4
    masks = random_masks(grid, num_groups, seed=0)
    overlay = np.asarray(draw(grid, [masks]).axes[0].images[1].get_array())
    targets = masks.targets.to_mask(12)[0]
    assert overlay.shape == (num_groups, 12, 4)
    for group in range(num_groups):
        lane = overlay[num_groups - 1 - group]  # the first group on top
        painted = [groups_painted(cell) == {group} for cell in lane]
        assert painted == targets[group].tolist()
        is_clear = torch.from_numpy(lane[:, 3] == 0)
        assert torch.equal(is_clear, masks.context.to_mask(12)[0])


def test_masks_have_a_panel_for_each_draw_with_seconds_and_a_legend():
    grid = Grid(3, 5)
    figure = draw(grid, [random_masks(grid, 2, seed) for seed in range(3)])
    assert len(figure.axes) == 3
    assert figure.axes[0].images[0].get_extent() == [0.0, 1.5, 0.0, 24.0]
    assert figure.axes[-1].get_xlabel() == "seconds"
    assert figure.axes[0].get_ylabel() == "band"
    assert legend_texts(figure) == [
        "context",
        "target group 1",
        "target group 2",
        "hidden from the context",
    ]


def test_legend_names_hidden_tokens_only_if_there_are_some():
    grid = Grid(2, 3)
    context = torch.tensor([[True, False] * 3])
    figure = draw(grid, [Masks.from_bool(context, ~context[:, None])])
    assert legend_texts(figure) == ["context", "target group 1"]


def test_bands_are_labelled_by_frequency():
    grid = Grid(2, 3)
    image, band_hz = np.zeros((8, 6)), np.linspace(100.0, 4100.0, 8)
    planes = split_masks(random_masks(grid, 1, 1), grid)
    figure = draw_masks(image, [planes], seconds=1.0, band_hz=band_hz)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        "0.125",
        "0.5",
        "1",
        "2",
        "4",
    ]


def a_run(num_steps: int = 20) -> dict:
    steps = np.arange(num_steps)
    keys = [
        "train/loss",
        "valid/loss",
        "train/loss_mean_target",
        "train/loss_nearest_context",
    ]
    keys += [
        f"collapse/{name}_{what}"
        for name in ("context", "target", "prediction")
        for what in ("std", "rank")
    ]
    keys += [
        "collapse/clip_cosine",
        "collapse/clip_share",
        "collapse/ema_distance",
        "train/gradient_norm",
        "train/momentum",
    ]
    keys += ["lr-AdamW/pg1", "lr-AdamW/pg2", "speed/audio_seconds_per_second", "speed/data_wait"]
    keys += [
        "probe/pitch/accuracy",
        "probe/pitch/twin",
        "probe/family/accuracy",
        "probe/family/twin",
    ]
    return {key: (steps, 1.0 + place + steps / num_steps) for place, key in enumerate(keys)} | {
        "collapse/alarm": (steps, np.zeros(num_steps))
    }


def test_curves_have_a_panel_for_each_quantity():
    runs = {"run": a_run()}
    figure = draw_curves(runs, "run")
    assert len(figure.axes) == 13
    assert sum("Online probe" in title for title in titles(figure)) == 2
    loss = figure.axes[0]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [
        "train",
        "valid",
        "mean target",
        "nearest context",
    ]
    assert len(loss.lines) == 4
    np.testing.assert_allclose(loss.lines[0].get_ydata(), runs["run"]["train/loss"][1])
    rate = figure.axes[titles(figure).index("Learning rate")]
    assert len(rate.lines) == 1, "one of the parameter groups stands for all"


def test_online_probes_of_any_metric_have_a_panel():
    run = {
        key: (np.arange(3), np.arange(3.0))
        for key in ("probe/mtt/auroc", "probe/mtt/twin", "probe/mtt/difference")
    }
    (panel,) = draw_curves({"run": run}).axes
    assert panel.get_title(loc="left") == "Online probe: mtt"
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["auroc", "random-init"]


def test_each_regularizer_has_a_panel():
    values = np.arange(3), np.arange(3.0)
    names = "loss_nearest_context", "sigreg_clip_mean", "vicreg_context", "vicreg_prediction"
    figure = draw_curves({"": {f"train/{name}": values for name in ("loss", *names)}})
    assert titles(figure)[1:] == [f"Regularizer {name}" for name in names[1:]]


def test_panels_without_a_finite_value_are_left_out():
    run = a_run()
    for key in ("train/gradient_norm", "lr-AdamW/pg1", "lr-AdamW/pg2", "collapse/clip_cosine"):
        del run[key]
    run["train/momentum"] = (np.arange(20), np.full(20, np.nan))
    run["train/loss"] = run["valid/loss"] = (np.arange(20), np.full(20, np.nan))
    figure = draw_curves({"run": run})
    assert len(figure.axes) == 13 - 5
    assert not any("Loss" in title for title in titles(figure)), (
        "trivial predictors alone are no picture"
    )


def test_several_runs_share_panels_and_have_a_colour_and_a_marker_each():
    runs = {"first": a_run(), "second": a_run(7)}
    figure = draw_curves(runs)
    assert legend_texts(figure) == ["first", "second"]
    colors = {line.get_color() for line in figure.axes[0].lines}
    assert colors == set(PALETTE[:2])
    many = {f"run {number}": a_run() for number in range(9)}
    lines = draw_curves(many).axes[-1].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 9
    assert len({line.get_marker() for line in lines[:7]}) == 7


def test_four_panels_are_two_rows_of_two_with_whole_steps():
    steps = np.arange(1, 11)
    keys = ("train/loss", "collapse/context_rank", "train/gradient_norm", "lr-Adam")
    figure = draw_curves({name: dict.fromkeys(keys, (steps, 1.0 / steps)) for name in "ab"})
    places = [ax.get_subplotspec() for ax in figure.axes]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert [bool(ax.get_xlabel()) for ax in figure.axes] == [False, False, True, True]
    assert all(float(tick).is_integer() for ax in figure.axes for tick in ax.get_xticks())


def test_the_axis_of_a_share_ends_at_one():
    steps = np.arange(10)
    shares = {"collapse/clip_share": (steps, np.minimum(1, steps / 5))}
    (panel,) = draw_curves({"": shares}).axes
    assert panel.get_ylim() == (0, 1)
    (panel,) = draw_curves({"": {"speed/data_wait": (steps, steps / 100)}}).axes
    assert panel.get_ylim()[1] < 0.2


def test_alarms_are_marked_at_their_steps():
    run = a_run()
    run["collapse/alarm"][1][[3, 9]] = 1.0
    figure = draw_curves({"run": run})
    rank = figure.axes[titles(figure).index("RankMe (effective rank)")]
    assert [line.get_xdata()[0] for line in rank.lines if len(line.get_xdata()) == 2] == [3, 9]
    assert legend_texts(figure) == ["collapse alarm"]


def test_long_series_have_a_running_mean_without_nan():
    values = np.full(400, 5.0)
    values[[0, 100, 101]] = np.nan
    run = {"train/loss": (np.arange(400), values)}
    raw, mean = draw_curves({"run": run}).axes[0].lines
    np.testing.assert_array_equal(raw.get_ydata(), values)
    np.testing.assert_allclose(mean.get_ydata(), 5.0)


def test_run_without_logs_has_a_note():
    figure = draw_curves({"run": {}}, "empty")
    assert not figure.axes
    assert [text.get_text() for text in figure.texts] == ["nothing was logged"]
