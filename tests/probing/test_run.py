"""From a labelled corpus to rows: nothing missing is passed over, the twin is what the run began with."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from torch import Tensor

from jepa_audio.encode import FrozenEncoder
from jepa_audio.probing import probe
from jepa_audio.probing.encoders import LogMelStatistics, run_name, state_hash
from jepa_audio.probing.features import cached_features, features_of, load_waveform
from jepa_audio.probing.heads import Features, fit_linear
from jepa_audio.probing.results import read_jsonl
from jepa_audio.probing.tasks import TASKS
from jepa_audio.probing.tasks.base import UNKNOWN

RATE, PITCHES, FAMILIES = 1000, (60, 62, 64, 65), ("bass", "reed")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A sine for a bass, two for a reed; the pitch is in the frequency; three lengths."""
    noise = np.random.default_rng(0)
    for split, size in {"train": 40, "valid": 16, "test": 24}.items():
        audio = tmp_path / "corpus" / f"nsynth-{split}" / "audio"
        audio.mkdir(parents=True)
        notes = {}
        for i in range(size):
            pitch, family = PITCHES[i % 4], FAMILIES[i // 4 % 2]
            time = np.arange(600 + 40 * (i % 3)) / RATE
            wave = np.sin(2 * np.pi * 50 * (pitch - 59) * time)
            wave += (family == "reed") * np.sin(2 * np.pi * 450 * time)
            sf.write(audio / f"note_{i:03}.wav", 0.3 * wave + 0.01 * noise.standard_normal(len(time)), RATE)
            notes[f"note_{i:03}"] = {"pitch": pitch, "instrument_family_str": family}
        (audio.parent / "examples.json").write_text(json.dumps(notes))
    return tmp_path / "corpus"


class Strongest:
    """An oracle: which tenth of the spectrum is strongest tells the pitch of a sine."""

    name, variant, pooling = "oracle", "none", "mean"
    sample_rate, num_channels, layer_names, encoder_hash = RATE, 1, ("nothing", "strongest"), "0"

    def features(self, waveform: Tensor) -> list[Tensor]:
        spectrum = torch.fft.rfft(waveform[:, 0, :600]).abs()[:, 1:300]
        tenths = torch.nn.functional.one_hot(spectrum[:, :220].argmax(dim=1) // 30, 10).float()
        return [torch.ones(len(waveform), 3), tenths]


def split_features(encoder: Strongest, corpus: Path, folder: Path) -> Features:
    splits = TASKS["nsynth_pitch"].load(corpus).splits
    return Features(**{name: cached_features(encoder, c.paths, folder, 7) for name, c in splits.items()})


def test_an_oracle_scores_one_and_its_constant_layer_is_not_chosen(corpus: Path, tmp_path: Path):
    task = TASKS["nsynth_pitch"].load(corpus)
    features = split_features(Strongest(), corpus, tmp_path / "features")
    choice = fit_linear(features, task.train.labels, len(task.class_names)).choose(task.valid.labels)
    assert choice.layer == 1
    assert choice.correct(task.test.labels).all()
    assert choice.valid_by_layer[0] == pytest.approx(0.25)


def test_the_labels_are_those_of_the_json(corpus: Path):
    pitch, family = (TASKS[name].load(corpus) for name in ("nsynth_pitch", "nsynth_instrument"))
    assert pitch.class_names == ("60", "62", "64", "65")
    assert family.class_names == ("bass", "reed")
    assert pitch.train.paths == family.train.paths
    assert pitch.train.labels[:5].tolist() == [0, 1, 2, 3, 0]
    assert family.train.labels[:5].tolist() == [0, 0, 0, 0, 1]
    assert pitch.chance == 0.25
    subsets = [task.with_train(10, seed=1).train for task in (pitch, family)]
    assert subsets[0].paths == subsets[1].paths
    assert len(set(subsets[0].paths)) == 10
    assert subsets[0].paths != pitch.with_train(10, seed=2).train.paths


def test_a_class_without_training_clips_is_always_wrong(corpus: Path):
    path = corpus / "nsynth-test" / "examples.json"
    notes = json.loads(path.read_text())
    notes["note_000"]["pitch"] = 99
    path.write_text(json.dumps(notes))
    task = TASKS["nsynth_pitch"].load(corpus)
    assert task.test.labels[0] == UNKNOWN
    assert len(task.class_names) == 4


def break_json(root: Path) -> str:
    (root / "nsynth-valid" / "examples.json").write_text('{"note_000": ')
    return "nsynth-valid/examples.json is not JSON"


def drop_json(root: Path) -> str:
    (root / "nsynth-test" / "examples.json").unlink()
    return "nsynth-test/examples.json is missing"


def drop_wav(root: Path) -> str:
    (root / "nsynth-train" / "audio" / "note_003.wav").unlink()
    return "audio/note_003.wav is missing"


def drop_folder(root: Path) -> str:
    (root / "nsynth-train").rename(root / "train")
    return "nsynth-train is missing: give as corpus the folder"


def drop_label(root: Path) -> str:
    (root / "nsynth-valid" / "examples.json").write_text('{"note_000": {"instrument": 3}}')
    return "nsynth-valid/examples.json: note note_000 has no `pitch`"


@pytest.mark.parametrize("damage", [break_json, drop_json, drop_wav, drop_folder, drop_label])
def test_what_is_missing_is_named(damage: Callable[[Path], str], corpus: Path):
    expected = damage(corpus)
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        TASKS["nsynth_pitch"].load(corpus)
    assert expected in str(error.value)


def test_clips_of_many_lengths_keep_their_order_and_are_never_padded(corpus: Path):
    paths = TASKS["nsynth_pitch"].load(corpus).valid.paths
    encoder = LogMelStatistics(RATE)
    waveforms = [load_waveform(path, RATE, 1) for path in paths]
    assert len({len(waveform[0]) for waveform in waveforms}) == 3
    together = features_of(encoder, waveforms)[0]
    assert together.shape == (len(paths), 192)
    alone = [encoder.features(waveform[None])[0][0].numpy() for waveform in waveforms]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-4)


def test_a_file_fills_the_channels_of_the_encoder(tmp_path: Path):
    stereo = np.random.default_rng(0).uniform(-0.5, 0.5, (100, 2)).astype(np.float32)
    sf.write(tmp_path / "stereo.wav", stereo, RATE, subtype="FLOAT")
    sf.write(tmp_path / "mono.wav", stereo[:, 0], RATE, subtype="FLOAT")
    mean = load_waveform(tmp_path / "stereo.wav", RATE, 1)
    np.testing.assert_allclose(mean[0], stereo.mean(axis=1), atol=1e-7)
    assert load_waveform(tmp_path / "stereo.wav", 2 * RATE, 2).shape == (2, 200)
    mono = load_waveform(tmp_path / "mono.wav", RATE, 2)
    assert mono.shape == (2, 100)
    assert torch.equal(mono[0], mono[1])
    with pytest.raises(ValueError, match=r"stereo\.wav has 2 channels, the encoder takes 3"):
        load_waveform(tmp_path / "stereo.wav", RATE, 3)


def test_features_are_extracted_once_and_anew_when_the_function_or_a_file_changes(corpus: Path, tmp_path: Path):
    folder, paths = tmp_path / "features", TASKS["nsynth_pitch"].load(corpus).valid.paths
    first = cached_features(Strongest(), paths, folder, 4)
    (file,) = folder.iterdir()
    written = file.stat().st_mtime_ns
    again = cached_features(Strongest(), paths, folder, 16)
    assert file.stat().st_mtime_ns == written
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))

    class Weakest(Strongest):
        def features(self, waveform: Tensor) -> list[Tensor]:
            return super().features(-waveform)[::-1]

    cached_features(Weakest(), paths, folder, 4)
    assert len(list(folder.iterdir())) == 2
    sf.write(paths[3], np.zeros(601), RATE)
    cached_features(Strongest(), paths, folder, 4)
    assert len(list(folder.iterdir())) == 3


def test_a_run_is_named_by_its_folder():
    assert run_name(Path("runs/wave/checkpoints/last.ckpt")) == "wave"
    assert run_name(Path("runs/wave/checkpoints/step=100.ckpt")) == "wave/step=100"
    assert run_name(Path("models/wave.ckpt")) == "wave"


def test_a_probe_compares_every_encoder_with_what_the_run_began_with(
    tiny_cli: Callable, fit: Callable, corpus: Path, tmp_path: Path
):
    cli = tiny_cli("mel", "--trainer.max_steps=3")
    window = round(0.5 * RATE)
    before = state_hash(FrozenEncoder(cli.model.front_end, cli.model.encoder, window).requires_grad_(True))
    cli.model.target_encoder.requires_grad_(False)
    cli.model.train()
    fit(cli)
    checkpoint = tmp_path / "runs" / "mel" / "checkpoints" / "last.ckpt"
    cli.trainer.save_checkpoint(checkpoint)
    rows = probe([checkpoint], corpus, tmp_path / "probe", random_seeds=(7,), frequency="concat", max_train=30)
    assert read_jsonl(tmp_path / "probe" / "results.jsonl") == rows
    assert [(row.encoder, row.variant) for row in rows[::4]] == [
        ("mel", "random"),
        ("mel", "random-7"),
        ("mel", "context"),
        ("mel", "target"),
        ("log-mel", "statistics"),
    ]
    assert {(row.task, row.head) for row in rows} == {
        (task, head) for task in ("nsynth_pitch", "nsynth_instrument") for head in ("linear", "knn")
    }
    assert {row.variant for row in rows if row.against_random} == {"context", "target"}
    hashes = {row.variant: row.encoder_hash for row in rows}
    assert hashes["random"] == before
    assert len(set(hashes.values())) == 5
    for row in rows:
        assert row.low <= row.value <= row.high
        assert (row.num_train, row.num_valid, row.num_test) == (30, 16, 24)
        assert row.valid_by_layer[row.layer] == row.valid_value == max(row.valid_by_layer)
    assert (tmp_path / "probe" / "table.md").read_text().count("\n| mel | ") == 8
    assert len(list((tmp_path / "probe" / "features").iterdir())) == 5 * 3


def test_unknown_tasks_and_names_used_twice_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="`tasks` holds nsynth_mood; there are nsynth_pitch"):
        probe([], tmp_path, tmp_path, tasks=("nsynth_mood",))
    with pytest.raises(ValueError, match="different names"):
        probe([Path("a/x.ckpt"), Path("b/x.ckpt")], tmp_path, tmp_path)
