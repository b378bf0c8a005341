"""The synthetic corpus: layout, reproducibility, labels that match the audio, refused settings."""

import json
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jepa_audio.data.synthetic.corpus import (
    INSTRUMENTS,
    CorpusSettings,
    Note,
    render_note,
    synthesize_corpus,
)
from jepa_audio.data.synthetic.instruments import FAMILIES
from jepa_audio.errors import UserError

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


def settings_of(
    num_train: int = 0,
    num_valid: int = 0,
    num_test: int = 0,
    seconds: float = 1.0,
    sample_rate: int = 16000,
    seed: int = 0,
) -> CorpusSettings:
    counts = {"train": num_train, "valid": num_valid, "test": num_test}
    return CorpusSettings(counts, seconds, sample_rate, seed)


HALF = settings_of(seconds=0.5, seed=5)
SECOND = settings_of(seed=5)


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
    return contents_of(directory)


def contents_of(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def examples_of(directory: Path, split: str) -> dict[str, dict]:
    return json.loads((directory / f"nsynth-{split}" / "examples.json").read_text())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    synthesize_tiny(directory)
    return directory


def test_layout_and_fields_are_those_of_nsynth(corpus: Path):
    for split, count in zip(SPLITS, (20, 4, 6), strict=True):
        examples = examples_of(corpus, split)
        files = {path.stem for path in (corpus / f"nsynth-{split}" / "audio").glob("*.wav")}
        assert len(examples) == count and files == set(examples)
        for name, example in examples.items():
            instrument, family = example["instrument_str"], example["instrument_family_str"]
            assert set(example) == NSYNTH_FIELDS
            assert name == example["note_str"]
            assert name == f"{instrument}-{example['pitch']:03d}-{example['velocity']:03d}"
            assert name.startswith(f"{family}_{example['instrument_source_str']}_")
            assert NSYNTH_FAMILIES.split()[example["instrument_family"]] == family
            assert len(example["qualities"]) == 10
            assert sum(example["qualities"]) == len(example["qualities_str"])
            assert 36 <= example["pitch"] <= 84


def test_files_are_16_bit_wav_without_clipping_or_silence(corpus: Path):
    for path in corpus.rglob("*.wav"):
        info = soundfile.info(path)
        properties = (info.frames, info.samplerate, info.channels, info.subtype)
        assert properties == (8000, 16000, 1, "PCM_16")
        samples = soundfile.read(path, dtype="int16")[0].astype(int)
        assert 300 < np.abs(samples).max() < 32767 * 0.9


def test_files_depend_on_the_seed_and_not_on_the_number_of_workers(corpus: Path, tmp_path: Path):
    contents = contents_of(corpus)
    assert synthesize_tiny(tmp_path / "spawned", num_workers=2) == contents
    assert set(synthesize_tiny(tmp_path / "other", seed=4)) != set(contents)


def test_the_audio_of_a_note_depends_on_the_seed():
    note = Note(0, 0, 6, 0, 60, 100)
    first, other = (render_note(note, settings_of(seed=seed))[0] for seed in (5, 6))
    assert not np.array_equal(first, other)


def test_a_smaller_corpus_is_the_beginning_of_a_larger_one():
    large, small = (settings_of(num_train=count).notes("train") for count in (50, 20))
    assert small == large[:20]


def test_splits_have_different_instruments_and_no_repeated_note():
    settings = settings_of(4000, 500, 1000)
    notes = {split: settings.notes(split) for split in SPLITS}
    instruments = {
        split: {(note.family, note.instrument) for note in notes[split]} for split in SPLITS
    }
    for a, b in combinations(SPLITS, 2):
        assert not instruments[a] & instruments[b]
    for split in SPLITS:
        assert len({note.note_str for note in notes[split]}) == len(notes[split])
        counts = np.bincount([note.family for note in notes[split]], minlength=11)
        families = counts / len(notes[split])
        assert families.min() > 0.05 and families.max() < 0.14
        assert len(instruments[split]) > 0.85 * 11 * len(INSTRUMENTS[split])


def cents_of_the_strongest_period(samples: np.ndarray, pitch: int) -> float:
    """Distance, modulo octave, of the autocorrelation's highest peak from the labelled pitch."""
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
def test_the_period_matches_the_label_modulo_octave(family: str):
    index = list(FAMILIES).index(family)
    pitches = range(45, 69, 2)
    errors_cents = [
        cents_of_the_strongest_period(
            render_note(Note(0, i, index, i, pitch, 127), SECOND)[0], pitch
        )
        for i, pitch in enumerate(pitches)
    ]
    assert abs(np.median(errors_cents)) < 15
    assert np.mean(np.abs(errors_cents) < 100) >= 0.9  # 1/6 by chance


def mean_spectrum(family: int, instrument: int, velocity: int) -> np.ndarray:
    """Shares of the energy in octave bands, averaged over notes of one pitch."""
    bands = []
    for number in range(6):
        samples = render_note(Note(0, number, family, instrument, 57, velocity), HALF)[0].astype(
            float
        )
        power = np.abs(np.fft.rfft(samples)) ** 2
        edges = np.r_[0, 160 * 2.0 ** np.arange(6), 8000].astype(int)
        bands.append([power[a:b].sum() / power.sum() for a, b in pairwise(edges)])
    return np.mean(bands, axis=0)


def test_families_have_different_spectra_at_the_same_pitch():
    spectra = [mean_spectrum(family, 0, 100) for family in range(11)]
    assert min(np.abs(a - b).sum() for a, b in combinations(spectra, 2)) > 0.02


@pytest.mark.parametrize("family", range(11))
def test_velocity_makes_every_family_brighter_and_louder(family: int):
    def centroid_and_level(velocity: int) -> tuple[float, float]:
        centroids, levels = [], []
        # Equal numbers give equal random draws, so only the velocity differs.
        for number in range(12):
            samples = render_note(Note(0, number, family, 0, 50, velocity), HALF)[0].astype(float)
            magnitude = np.abs(np.fft.rfft(samples))
            centroids.append(np.average(np.arange(magnitude.size), weights=magnitude**2))
            levels.append(np.abs(samples).max())
        return float(np.mean(centroids)), float(np.mean(levels))

    (soft, quiet), (bright, loud) = centroid_and_level(25), centroid_and_level(127)
    assert bright > soft
    assert loud > 1.5 * quiet


@pytest.mark.parametrize("sample_rate", [8000, 44100])
def test_all_families_have_their_lowest_and_highest_pitch_at_all_rates(sample_rate: int):
    settings = settings_of(seconds=0.3, sample_rate=sample_rate)
    for family in range(11):
        for pitch in (36, 84):
            samples, _ = render_note(Note(1, 0, family, 12, pitch, 127), settings)
            assert samples.shape == (round(0.3 * sample_rate),)
            assert np.abs(samples.astype(int)).max() > 1000


def test_a_complete_corpus_is_not_written_again(corpus: Path):
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    synthesize_tiny(corpus)
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


def test_an_unfinished_corpus_is_completed(tmp_path: Path):
    complete = synthesize_tiny(tmp_path)
    (tmp_path / "corpus.json").rename(tmp_path / "corpus.partial.json")
    first, second, *_ = sorted(tmp_path.rglob("*.wav"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:100])
    (tmp_path / "nsynth-test" / "examples.json").write_text("{")
    assert synthesize_tiny(tmp_path) == complete


@pytest.mark.parametrize("marker", ["corpus.json", "corpus.partial.json"])
def test_a_directory_with_other_settings_is_refused(tmp_path: Path, marker: str):
    synthesize_tiny(tmp_path)
    (tmp_path / "corpus.json").rename(tmp_path / marker)
    with pytest.raises(UserError, match="delete it or choose another") as refusal:
        synthesize_tiny(tmp_path, seed=4)
    assert str(tmp_path) in str(refusal.value)


def test_the_original_nsynth_is_not_overwritten(tmp_path: Path):
    (tmp_path / "nsynth-train" / "audio").mkdir(parents=True)
    with pytest.raises(UserError, match="which this command did not write"):
        synthesize_tiny(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["nsynth-train"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_train": 1_000_000}, r"`num_train` \(1000000\) must be in \[0, 172480\]"),
        ({"num_valid": -1}, r"`num_valid` \(-1\)"),
        ({"seconds": 0.1}, r"`seconds` \(0.1\) must be in \[0.2, 600\]"),
        ({"sample_rate": 4000}, r"`sample_rate` \(4000\) must be in \[8000, "),
        ({"seed": -1}, r"`seed` \(-1\) must be >= 0"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, int | float], message: str):
    with pytest.raises(UserError, match=message):
        settings_of(**settings)


def test_without_a_terminal_progress_is_one_line_per_tenth(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    synthesize_tiny(tmp_path)
    lines = capfd.readouterr().err.splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(3, 31, 3))
