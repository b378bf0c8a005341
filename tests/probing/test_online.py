"""The online probe: it does not change the training, and its baseline is the initial encoder."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from lightning.pytorch.loggers import CSVLogger

from jepa_audio.probing.online import OnlineProbe

RATE = 1000


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Low basses and high flutes; the test split is unreadable."""
    root, noise = tmp_path_factory.mktemp("notes"), np.random.default_rng(0)
    for split, size in {"train": 24, "valid": 16, "test": 1}.items():
        audio = root / f"nsynth-{split}" / "audio"
        audio.mkdir(parents=True)
        notes = {}
        for i in range(size):
            family = ("bass", "flute")[i % 2]
            wave = np.sin(2 * np.pi * (60 if family == "bass" else 200) * np.arange(700) / RATE)
            sf.write(audio / f"{i:03}.wav", 0.3 * wave + 0.2 * noise.standard_normal(700), RATE)
            notes[f"{i:03}"] = {"pitch": 60, "instrument_family_str": family}
        (audio.parent / "examples.json").write_text(json.dumps(notes))
    (root / "nsynth-test" / "audio" / "000.wav").write_bytes(b"never read")
    return root


def online(corpus: Path, **settings: int | str) -> OnlineProbe:
    return OnlineProbe(
        str(corpus), every_n_steps=2, num_train=16, num_valid=12, batch_size=5, **settings
    )


@pytest.mark.parametrize(("flavour", "which"), [("wave", "context"), ("mel", "target")])
def test_training_is_the_same_with_and_without_the_probe(
    flavour: str, which: str, tiny_cli: Callable, fit: Callable, corpus: Path
):
    settings = (
        "--model.encoder.drop_path=0.2",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.max_steps=4",
    )
    plain, probed = (tiny_cli(flavour, *settings) for _ in range(2))
    torch.manual_seed(5)
    losses = fit(plain)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    probe = online(corpus, which=which)
    assert fit(probed, None, probe) == losses
    assert torch.equal(torch.get_rng_state(), state)
    assert probed.model.training == plain.model.training
    for name, value in plain.model.state_dict().items():
        assert torch.equal(probed.model.state_dict()[name], value), name
    flags = [[p.requires_grad for p in cli.model.parameters()] for cli in (plain, probed)]
    assert flags[0] == flags[1]
    assert sorted(probe.differences) == [0, 2, 4]


def test_before_the_first_step_the_encoder_is_its_baseline(
    tiny_cli: Callable, fit: Callable, corpus: Path
):
    probe = online(corpus)
    fit(tiny_cli("mel", "--trainer.max_steps=2"), None, probe)
    first = probe.differences[0]
    assert (first.value, first.low, first.high) == (0, 0, 0)
    assert first.verdict == "no significant difference"


def printed_twins(text: str) -> list[str]:
    return re.findall(r"nsynth_instrument (?:[01]\.\d{3}), random-init twin ([01]\.\d{3})", text)


def test_the_baseline_is_drawn_from_the_seed_whatever_was_loaded(
    tiny_cli: Callable, fit: Callable, corpus: Path, capsys: pytest.CaptureFixture[str]
):
    fit(tiny_cli("mel", "--trainer.max_steps=2"), None, online(corpus))
    twins = printed_twins(capsys.readouterr().out)
    assert len(twins) == 2
    loaded = tiny_cli("mel", "--trainer.max_steps=2")
    with torch.no_grad():
        for parameter in [*loaded.model.front_end.parameters(), *loaded.model.encoder.parameters()]:
            parameter.zero_()
    probe = online(corpus)
    fit(loaded, None, probe)
    assert printed_twins(capsys.readouterr().out) == twins
    assert probe.differences[0].verdict == "behind"


def test_logged_values_match_the_differences(
    tiny_cli: Callable, fit: Callable, corpus: Path, tmp_path: Path
):
    cli = tiny_cli("wave", "--trainer.max_steps=4")
    cli.trainer.loggers = [CSVLogger(tmp_path, name="", version="")]
    probe = online(corpus)
    fit(cli, None, probe)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    place = {
        name: columns.index(f"probe/nsynth_instrument/{name}")
        for name in ("accuracy", "twin", "difference")
    }
    logged = [line.split(",") for line in lines[1:] if line.split(",")[place["twin"]]]
    assert [int(line[columns.index("step")]) for line in logged] == [0, 2, 4]
    for line, difference in zip(logged, probe.differences.values(), strict=True):
        accuracy, twin, stated = (
            float(line[place[name]]) for name in ("accuracy", "twin", "difference")
        )
        assert stated == pytest.approx(accuracy - twin) == pytest.approx(difference.value)


def test_invalid_settings_raise_errors_with_their_names(corpus: Path):
    with pytest.raises(ValueError, match=r"`task` is 'mood', must be one of gtzan_genre"):
        OnlineProbe(str(corpus), task="mood")
    with pytest.raises(ValueError, match=r"`num_valid` \(0\)"):
        OnlineProbe(str(corpus), num_valid=0)
