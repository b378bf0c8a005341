"""The map of latents: PCA, UMAP, colours and the spectrum."""

import sys
import types
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from sklearn.decomposition import PCA

from jepa_audio.report.embeddings import Embeddings
from jepa_audio.report.latents import (
    draw_latents,
    draw_singular_values,
    principal_components,
    umap_layout,
)
from jepa_audio.report.style import CATEGORY_COLORS, MAX_CATEGORIES, category_style


def clips(labels: list[str], dim: int = 6) -> Embeddings:
    vectors = np.random.default_rng(0).normal(size=(len(labels), dim)) * np.arange(1, dim + 1)
    names = [f"{i}.wav" for i in range(len(labels))]
    return Embeddings(names, np.zeros((len(labels), 2)), vectors.astype(np.float32), labels)


def legend_of(figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_components_equal_those_of_scikit_learn():
    vectors = clips(["a"] * 30).vectors.astype(float) + 3
    points, shares = principal_components(vectors)
    pca = PCA().fit(vectors)
    np.testing.assert_allclose(shares, pca.explained_variance_ratio_, rtol=1e-6)
    np.testing.assert_allclose(np.abs(points), np.abs(pca.transform(vectors)[:, :2]), atol=1e-8)


def test_the_sign_of_components_does_not_depend_on_the_order_of_clips():
    vectors = clips(["a"] * 30).vectors
    order = np.random.default_rng(1).permutation(30)
    points = principal_components(vectors)[0]
    np.testing.assert_allclose(principal_components(vectors[order])[0], points[order], atol=1e-4)


@pytest.mark.parametrize("vectors", [np.ones((5, 3)), np.zeros((2, 1)), np.eye(2)])
def test_few_and_equal_vectors_have_components(vectors):
    points, shares = principal_components(vectors)
    assert points.shape == (len(vectors), 2)
    assert np.isfinite(points).all()
    assert np.isfinite(shares).all()
    labels = ["a"] * len(vectors)
    names = [str(i) for i in range(len(vectors))]
    draw_latents(Embeddings(names, np.zeros((len(labels), 2)), vectors, labels)).canvas.draw()


def test_labels_have_different_colours_and_markers_and_axes_have_shares():
    figure = draw_latents(clips(["a", "b", "c"] * 10), "title")
    assert legend_of(figure) == ["a (10)", "b (10)", "c (10)"]
    points = sum(len(found.get_offsets()) for found in figure.axes[0].collections)
    assert points == 30
    assert "% of the variance" in figure.axes[0].get_xlabel()
    assert figure.axes[1].get_ylabel() == "variance explained (%)"
    assert "5 nearest neighbours with the same folder" in figure.legends[0].get_title().get_text()


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_goals_that_one_component_reaches_have_one_label():
    long = clips(["a"] * 30, dim=12)
    one = np.random.default_rng(0).normal(size=(30, 12)) * ([50] + [1] * 11)
    assert texts(draw_latents(replace(long, vectors=one)).axes[1]) == ["50%, 90%: 1"]
    assert len(texts(draw_latents(long).axes[1])) == 2


def test_axes_of_two_clips_have_plain_numbers():
    figure = draw_latents(clips(["a", "b"]))
    figure.canvas.draw()
    points, variance = figure.axes
    assert points.yaxis.get_offset_text().get_text() == ""
    assert np.ptp(points.get_ylim()) == pytest.approx(np.ptp(points.get_xlim()), rel=0.2)
    assert variance.get_xscale() == "linear"
    ticks = [text.get_text() for text in variance.get_xticklabels(which="both")]
    assert all(tick.isdigit() for tick in ticks)


def lab(color: str) -> np.ndarray:
    """CIELAB of a colour, D65."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    f = np.cbrt(xyz @ linear / [0.9505, 1.0, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_categories_with_one_marker_have_very_different_colours():
    looks = [tuple(category_style(i).values()) for i in range(MAX_CATEGORIES)]
    for (color, marker), (other, same) in combinations(looks, 2):
        distance = np.linalg.norm(lab(color) - lab(other))
        assert color == other or distance > 20
        assert marker != same or distance > 30, (color, other)


def test_legend_of_many_short_labels_is_inside_the_figure():
    figure = draw_latents(clips([chr(97 + i) * 2 for i in range(18) for _ in range(12)]))
    figure.canvas.draw()
    assert figure.legends[0].get_window_extent().x1 <= figure.bbox.width


def test_categories_share_neither_colour_nor_marker_with_their_neighbours():
    looks = [tuple(category_style(i).values()) for i in range(MAX_CATEGORIES)]
    assert len(set(looks)) == MAX_CATEGORIES
    # Ten labels, as many as GTZAN or the digits have, all have their own colour.
    assert len({color for color, _ in looks[:10]}) == 10
    assert len(set(CATEGORY_COLORS)) == len(CATEGORY_COLORS)
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in pairwise(looks))


def test_rare_labels_are_grey_together():
    labels = [f"label {i}" for i in range(MAX_CATEGORIES) for _ in range(2)] + ["rare 1", "rare 2"]
    legend = legend_of(draw_latents(clips(labels)))
    assert len(legend) == MAX_CATEGORIES + 1
    assert legend[-1] == "other, 2 labels (2)"


def test_many_numbers_have_a_colour_scale():
    figure = draw_latents(clips([str(i) for i in range(40)]))
    assert legend_of(figure) == []
    assert figure.axes[0].collections[0].get_array().tolist() == list(range(40))
    assert "folder" in {ax.get_ylabel() for ax in figure.axes}
    assert len(legend_of(draw_latents(clips([str(i % 4) for i in range(40)])))) == 4


def test_umap_is_used_if_it_is_installed(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setitem(sys.modules, "umap", None)
    monkeypatch.setattr("jepa_audio.report.latents.find_spec", lambda name: None)
    vectors = clips(["a"] * 9).vectors
    assert umap_layout(vectors) is None
    assert any("jepa-audio[umap]" in message for message in caplog.messages)

    class UMAP:
        def __init__(self, **settings) -> None:
            assert settings["n_neighbors"] == 8
            assert settings["random_state"] == 0

        def fit_transform(self, vectors):
            return vectors[:, :2]

    stub = types.ModuleType("umap")
    stub.UMAP = UMAP  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "umap", stub)
    monkeypatch.setattr("jepa_audio.report.latents.find_spec", lambda name: stub)
    layout = umap_layout(vectors)
    figure = draw_latents(clips(["a"] * 9), umap=layout)
    assert figure.axes[1].get_xlabel() == "UMAP 1 (no unit)"
    assert umap_layout(vectors[:3]) is None


def test_the_spectrum_is_compared_with_the_first_one():
    first, now = np.array([0.9, 0.1, 0.0]), np.array([0.5, 0.3, 0.2])
    figure = draw_singular_values([now, now], 200, (100, [first, first]))
    for ax in figure.axes:
        assert [len(line.get_ydata()) for line in ax.lines] == [3, 3]
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        assert labels[0].startswith("step 100, RankMe 1.4")
        assert labels[1].startswith("step 200, RankMe 2.8")
    alone = draw_singular_values([now, now], 100, (100, [now, now]))
    assert [len(ax.lines) for ax in alone.axes] == [1, 1]
