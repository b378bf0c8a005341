import json
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jepa_audio.data.synthetic import (
    FAMILIES,
    INSTRUMENTS,
    Note,
    Settings,
    render,
    synthesize_corpus,
)

SPLITS = ("train", "valid", "test")
NSYNTH_FIELDS = {
    "note",
    "note_str",
    "pitch",
    "velocity",
    "sample_rate",
    "qualities",
    "qualities_str",
} | {f"instrument{part}{form}" for part in ("", "_family", "_source") for form in ("", "_str")}
NSYNTH_FAMILIES = "bass brass flute guitar keyboard mallet organ reed string synth_lead vocal"
HALF = Settings({"train": 0, "valid": 0, "test": 0}, 0.5, 16000, 5)
SECOND = Settings({"train": 0, "valid": 0, "test": 0}, 1.0, 16000, 5)


def synthesize_tiny(directory: Path, seed: int = 3, num_workers: int = 0) -> dict[str, bytes]:
    synthesize_corpus(
        directory,
        num_train=20,
        num_valid=4,
        num_test=6,
        seconds=0.5,
        seed=seed,
        num_workers=num_workers,
    )
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def examples_of(directory: Path, split: str) -> dict[str, dict]:
    return json.loads((directory / f"nsynth-{split}" / "examples.json").read_text())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    synthesize_tiny(directory)
    return directory


def test_layout_and_fields_are_nsynths(corpus: Path):
    for split, count in zip(SPLITS, (20, 4, 6), strict=True):
        examples = examples_of(corpus, split)
        files = {path.stem for path in (corpus / f"nsynth-{split}" / "audio").glob("*.wav")}
        assert len(examples) == count and files == set(examples)
        for name, example in examples.items():
            assert set(example) == NSYNTH_FIELDS
            assert name == example["note_str"]
            assert (
                name
                == f"{example['instrument_str']}-{example['pitch']:03d}-{example['velocity']:03d}"
            )
            assert name.startswith(
                f"{example['instrument_family_str']}_{example['instrument_source_str']}_"
            )
            assert (
                NSYNTH_FAMILIES.split()[example["instrument_family"]]
                == example["instrument_family_str"]
            )
            assert len(example["qualities"]) == 10
            assert sum(example["qualities"]) == len(example["qualities_str"])
            assert 36 <= example["pitch"] <= 84


def test_every_file_is_16_bit_pcm_of_the_right_length_without_clipping_or_silence(corpus: Path):
    for path in corpus.rglob("*.wav"):
        info = soundfile.info(path)
        assert (info.frames, info.samplerate, info.channels, info.subtype) == (
            8000,
            16000,
            1,
            "PCM_16",
        )
        samples = soundfile.read(path, dtype="int16")[0].astype(int)
        assert 300 < np.abs(samples).max() < 32767 * 0.9


def test_bytes_depend_on_the_seed_and_not_on_the_number_of_workers(corpus: Path, tmp_path: Path):
    here = {str(p.relative_to(corpus)): p.read_bytes() for p in corpus.rglob("*") if p.is_file()}
    assert synthesize_tiny(tmp_path / "spawned", num_workers=2) == here
    other = synthesize_tiny(tmp_path / "other", seed=4)
    assert set(other) != set(here)


def test_same_note_sounds_different_under_another_seed():
    note = Note(0, 0, 6, 0, 60, 100)
    other = Settings(SECOND.counts, 1.0, 16000, 6)
    assert not np.array_equal(render(note, SECOND)[0], render(note, other)[0])


def test_a_smaller_corpus_is_the_beginning_of_a_larger_one():
    large = Settings({"train": 50, "valid": 0, "test": 0}, 1.0, 16000, 0).notes("train")
    assert (
        Settings({"train": 20, "valid": 0, "test": 0}, 1.0, 16000, 0).notes("train") == large[:20]
    )


def test_no_instrument_of_one_split_is_heard_in_another_and_no_note_comes_twice():
    settings = Settings({"train": 4000, "valid": 500, "test": 1000}, 1.0, 16000, 0)
    notes = {split: settings.notes(split) for split in SPLITS}
    instruments = {split: {(n.family, n.instrument) for n in of} for split, of in notes.items()}
    for a, b in combinations(SPLITS, 2):
        assert not instruments[a] & instruments[b]
    for split, of in notes.items():
        assert len({note.note_str for note in of}) == len(of)
        families = np.bincount([note.family for note in of], minlength=11) / len(of)
        assert families.min() > 0.05 and families.max() < 0.14
        assert len(instruments[split]) > 0.85 * 11 * len(INSTRUMENTS[split])


def cents_of_the_strongest_period(samples: np.ndarray, pitch: int) -> float:
    """Distance, modulo octave, of the autocorrelation's highest peak from the pitch of the label."""
    wave = samples.astype(float)
    correlation = np.fft.irfft(np.abs(np.fft.rfft(wave, 2 * wave.size)) ** 2)
    shortest, longest = 12, 300
    lag = shortest + int(np.argmax(correlation[shortest:longest]))
    left, middle, right = correlation[lag - 1 : lag + 2]
    period = lag + 0.5 * (left - right) / (left - 2 * middle + right)
    cents = 1200 * np.log2(16000 / period / (440 * 2 ** ((pitch - 69) / 12)))
    return float((cents + 600) % 1200 - 600)


@pytest.mark.parametrize(
    "family", ["bass", "brass", "guitar", "keyboard", "organ", "reed", "string", "vocal"]
)
def test_label_says_the_pitch_modulo_octave(family: str):
    index = list(FAMILIES).index(family)
    pitches = range(45, 69, 2)
    heard = [
        cents_of_the_strongest_period(render(Note(0, i, index, i, pitch, 127), SECOND)[0], pitch)
        for i, pitch in enumerate(pitches)
    ]
    assert abs(np.median(heard)) < 15
    assert np.mean(np.abs(heard) < 100) >= 0.9  # by chance a sixth


def mean_spectrum(family: int, instrument: int, velocity: int) -> np.ndarray:
    """Shares of the energy in octave bands, averaged over notes of one pitch."""
    bands = []
    for number in range(6):
        samples = render(Note(0, number, family, instrument, 57, velocity), HALF)[0].astype(float)
        power = np.abs(np.fft.rfft(samples)) ** 2
        edges = np.r_[0, 160 * 2.0 ** np.arange(6), 8000].astype(int)
        bands.append([power[a:b].sum() / power.sum() for a, b in pairwise(edges)])
    return np.mean(bands, axis=0)


def test_families_differ_in_the_spectrum_of_one_pitch():
    spectra = [mean_spectrum(family, 0, 100) for family in range(11)]
    assert min(np.abs(a - b).sum() for a, b in combinations(spectra, 2)) > 0.02


@pytest.mark.parametrize("family", range(11))
def test_velocity_makes_every_family_brighter_and_louder(family: int):
    def sound(velocity: int) -> tuple[float, float]:
        centroids, levels = [], []
        for number in range(
            12
        ):  # equal numbers share all chance, so that the velocity is the only difference
            samples = render(Note(0, number, family, 0, 50, velocity), HALF)[0].astype(float)
            magnitude = np.abs(np.fft.rfft(samples))
            centroids.append(np.average(np.arange(magnitude.size), weights=magnitude**2))
            levels.append(np.abs(samples).max())
        return float(np.mean(centroids)), float(np.mean(levels))

    (soft, quiet), (bright, loud) = sound(25), sound(127)
    assert bright > soft
    assert loud > 1.5 * quiet


@pytest.mark.parametrize("sample_rate", [8000, 44100])
def test_every_family_plays_its_highest_and_lowest_pitch_at_any_rate(sample_rate: int):
    settings = Settings(SECOND.counts, 0.3, sample_rate, 0)
    for family in range(11):
        for pitch in (36, 84):
            samples, _ = render(Note(1, 0, family, 12, pitch, 127), settings)
            assert samples.shape == (round(0.3 * sample_rate),)
            assert np.abs(samples.astype(int)).max() > 1000


def test_complete_corpus_is_left_alone(corpus: Path):
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    synthesize_tiny(corpus)
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


def test_unfinished_corpus_is_made_whole(corpus: Path, tmp_path: Path):
    whole = synthesize_tiny(tmp_path)
    (tmp_path / "corpus.json").rename(tmp_path / "corpus.partial.json")
    victims = sorted(tmp_path.rglob("*.wav"))
    victims[0].unlink()
    victims[1].write_bytes(victims[1].read_bytes()[:100])
    (tmp_path / "nsynth-test" / "examples.json").write_text("{")
    assert synthesize_tiny(tmp_path) == whole


@pytest.mark.parametrize("marker", ["corpus.json", "corpus.partial.json"])
def test_directory_of_other_settings_is_refused(tmp_path: Path, marker: str):
    synthesize_tiny(tmp_path)
    (tmp_path / "corpus.json").rename(tmp_path / marker)
    with pytest.raises(ValueError, match="delete it or name another") as refusal:
        synthesize_tiny(tmp_path, seed=4)
    assert str(tmp_path) in str(refusal.value)


def test_real_nsynth_is_never_written_over(tmp_path: Path):
    (tmp_path / "nsynth-train" / "audio").mkdir(parents=True)
    with pytest.raises(ValueError, match="another origin"):
        synthesize_tiny(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["nsynth-train"]


@pytest.mark.parametrize(
    ("counts", "seconds", "sample_rate", "name"),
    [
        ({"train": 1_000_000}, 1.0, 16000, "num_train"),
        ({"valid": -1}, 1.0, 16000, "num_valid"),
        ({}, 0.1, 16000, "seconds"),
        ({}, 1.0, 4000, "sample_rate"),
    ],
)
def test_impossible_corpora_are_refused(
    counts: dict[str, int], seconds: float, sample_rate: int, name: str
):
    with pytest.raises(ValueError, match=f"`{name}`"):
        Settings({"train": 1, "valid": 1, "test": 1} | counts, seconds, sample_rate, 0)


def test_progress_away_from_a_terminal_is_a_line_every_tenth(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    synthesize_tiny(tmp_path)
    lines = capfd.readouterr().err.splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(3, 31, 3))
