"""Attentive pooling: its formula, padding, and a task that a mean over time cannot solve."""

from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from jepa_audio.errors import UserError
from jepa_audio.probing.encoders import FunctionEncoder
from jepa_audio.probing.features import FrameFeatures
from jepa_audio.probing.heads.attentive import NUM_QUERIES, AttentivePooling
from jepa_audio.probing.heads.linear import Standardisation
from jepa_audio.probing.presets import preset_of
from jepa_audio.probing.run import probe
from jepa_audio.probing.tasks import TASKS
from jepa_audio.probing.tasks.labels import Rows

RATE = 1000


def pooling(width: int = 5, num_outputs: int = 3) -> tuple[AttentivePooling, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, width, generator=generator) * 3 + 1
    module = AttentivePooling(Standardisation(rows), num_outputs, generator)
    module.weight.data.normal_(generator=generator)
    return module, rows


def test_attentive_pooling_is_attention_with_one_query_per_head_then_a_linear_map():
    module, rows = pooling()
    columns = (rows - rows.mean(0)) / rows.std(0, correction=0)
    # A key projection that is the identity, a scale of 1, values that are the columns.
    attend = torch.nn.functional.scaled_dot_product_attention
    heads = [
        attend(query[None, None], columns[None], columns[None], scale=1.0)[0, 0]
        for query in module.queries.T
    ]
    assert len(heads) == NUM_QUERIES
    expected = torch.cat(heads) @ module.weight + module.bias
    logits = module(rows[None], torch.ones(1, 40, dtype=torch.bool))
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)


def test_padding_has_no_influence_on_attentive_pooling():
    module, rows = pooling()
    alone = module(rows[None, :7], torch.ones(1, 7, dtype=torch.bool))
    padded = module(rows[None], (torch.arange(40) < 7)[None])
    torch.testing.assert_close(padded, alone)


def test_columns_of_windows_are_read_with_their_padding():
    layer = np.arange(12, dtype=np.float16)[:, None]
    counts, place = np.array([3, 1, 4]), np.array([0, 5, 7])
    rows = Rows(np.array([0, 1, 1]), np.arange(3), np.zeros(3))
    features = FrameFeatures([layer], place, rows, counts=counts)
    frames, valid = features.read_frames(0, np.array([2, 1, 0]))
    assert frames[..., 0].tolist() == [[7, 8, 9, 10], [5, 5, 5, 5], [0, 1, 2, 2]]
    assert valid.sum(dim=1).tolist() == [4, 1, 3]
    assert features.sample_frames(0, 99)[:, 0].tolist() == [0, 1, 2, 5, 7, 8, 9, 10]
    assert features.sample_frames(0, 3)[:, 0].tolist() == [0, 5, 10]


def pieces() -> FunctionEncoder:
    """Log power below and above 250 Hz, and the product, of pieces of 50 ms."""

    def layers(waveform: torch.Tensor) -> torch.Tensor:
        power = torch.fft.rfft(waveform[:, 0].unfold(-1, 50, 50)).abs().square()
        low, high = power[..., 1:12].sum(-1), power[..., 14:].sum(-1)
        return (torch.stack([low, high, low * high], dim=-1) + 1e-3).log()

    return FunctionEncoder(layers, "pieces", RATE)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A click somewhere in noise, either low or high: one of 12 to 30 columns has the label."""
    rng, lines = np.random.default_rng(0), ["path,label,split"]
    for split, size in {"train": 60, "val": 20, "test": 40}.items():
        for i in range(size):
            wave = 0.1 * rng.standard_normal(50 * rng.integers(12, 31))
            start = 50 * rng.integers(len(wave) // 50)
            tone = np.sin(2 * np.pi * (100, 400)[i % 2] * np.arange(50) / RATE)
            wave[start : start + 50] += 0.3 * tone
            path = tmp_path / f"{split}-{i}.wav"
            sf.write(path, wave, RATE)
            lines.append(f"{path},{'low' if i % 2 == 0 else 'high'},{split}")
    (tmp_path / "clicks.csv").write_text("\n".join(lines))
    return tmp_path / "clicks.csv"


def test_the_attentive_preset_finds_what_a_mean_over_time_hides(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jepa_audio.probing.heads.attentive.MAX_EPOCHS", 25)
    encoder, settings = "tests.probing.test_attentive:pieces", {"seeds": (0,), "output": tmp_path}
    first, again = (probe(encoder, str(table), preset="attentive", **settings) for _ in range(2))
    attentive = {row.encoder: row for row in first}
    assert attentive["pieces"].value > 0.9
    assert attentive["pieces"].pooling == "frames/mean"
    assert attentive["log-mel"].pooling == "frames/concat"
    assert {row.head for row in first} == {"attentive"}
    assert [row.scores for row in again] == [row.scores for row in first]
    mean, *_ = probe(encoder, str(table), preset="linear", **settings)
    assert attentive["pieces"].value > mean.value + 0.05


def test_labels_in_time_have_no_attentive_heads():
    with pytest.raises(UserError, match="gtzan_beat has labels in time"):
        preset_of("attentive").protocol(TASKS["gtzan_beat"])
