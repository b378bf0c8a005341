"""The commands that need no Trainer; their docstrings are their `--help`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Literal

from rich.progress import track

from jepa_audio.data.datamodule import AudioDataModule
from jepa_audio.data.index import default_cache, index_folder
from jepa_audio.data.synthetic import synthesize_corpus
from jepa_audio.front_ends import FrontEnd, SpectrogramFrontEnd
from jepa_audio.front_ends.spectrogram import measure_statistics
from jepa_audio.interop import export_weights, import_weights
from jepa_audio.interop.layout import Given


def index(root: Path, num_workers: int = 2, max_bad_share: float = 0.5) -> None:
    """Look at every audio file of a folder once; later runs look only at what has changed.

    Args:
        root: folder of audio files, searched with its subfolders.
        num_workers: files decoded at the same time.
        max_bad_share: above this share of unusable files the command fails.
    """
    table = index_folder(root, num_workers=num_workers, max_bad_share=max_bad_share)
    bad = sum(status == "bad" for status in table["status"].to_pylist())
    print(f"{root}: {len(table)} files, {bad} of them unusable; the table is {default_cache(root)}")


def synth(
    directory: Path,
    num_train: int = 4000,
    num_valid: int = 500,
    num_test: int = 1000,
    seconds: float = 2.0,
    sample_rate: int = 16_000,
    seed: int = 0,
    num_workers: int = 2,
) -> None:
    """Write a labelled corpus of synthetic notes in NSynth's layout.

    Args:
        directory: folder to write; the same settings again change nothing.
        num_train: notes of the training split.
        num_valid: notes of the validation split.
        num_test: notes of the test split; its instruments are not those of the training split.
        seconds: length of a note.
        sample_rate: in Hz.
        seed: another seed, other notes.
        num_workers: processes that synthesise; their number does not change the notes.
    """
    synthesize_corpus(
        directory,
        num_train=num_train,
        num_valid=num_valid,
        num_test=num_test,
        seconds=seconds,
        sample_rate=sample_rate,
        seed=seed,
        num_workers=num_workers,
    )


def import_published(
    layout: Literal["wavjepa", "pupujepa"],
    source: Path,
    output: Path | None = None,
    recipe: Path | None = None,
    num_heads: int | None = None,
    predictor_num_heads: int | None = None,
    conv_strides: list[int] | None = None,
) -> None:
    """Make a checkpoint of published weights, to probe, to encode with and to train further.

    Args:
        layout: whose files: "wavjepa" (WavJEPA-Nat's too) or "pupujepa".
        source: `.safetensors`, `.ckpt`, `.pt` or `.bin` file, or a folder with one and its `config.json`.
        output: folder to write (-o); `runs/NAME` if not given.
        recipe: YAML of all that is no weight; the paper's own in `configs/` if not given.
        num_heads: attention heads of the encoder, where the file does not tell.
        predictor_num_heads: the same of the predictor.
        conv_strides: of the convolutions, where the file does not tell.
    """
    output = output or Path("runs") / source.stem
    given = Given(num_heads, predictor_num_heads, None if conv_strides is None else tuple(conv_strides))
    checkpoint = import_weights(layout, source, output, recipe=recipe, given=given)
    print(
        f"{checkpoint}\n"
        f"  probe:         jepa-audio probe --checkpoints [{checkpoint}] --corpus CORPUS --output DIR\n"
        f"  train further: jepa-audio fit --config {output / 'config.yaml'} --data.root DIR --run_dir runs/further"
    )


def export_published(layout: Literal["wavjepa", "pupujepa"], checkpoint: Path, output: Path | None = None) -> None:
    """Write a checkpoint as the published model of that layout: `model.safetensors` and `config.json`.

    Args:
        layout: "wavjepa" (WavJEPA-Nat's too) or "pupujepa".
        checkpoint: `.ckpt` of a run or of an import.
        output: folder to write (-o); `exported/` in the folder of the run if not given.
    """
    print(export_weights(layout, checkpoint, output or checkpoint.parent.parent / "exported"))


def stats(front_end: FrontEnd, data: AudioDataModule, num_clips: int) -> None:
    """Print the mean and standard deviation that a `SpectrogramFrontEnd` should normalise with.

    Args:
        front_end: of the run; its own `mean` and `std` are not used.
        data: of the run; its training crops are measured.
        num_clips: crops to measure.

    Raises:
        ValueError: if the front end normalises nothing.
    """
    if not isinstance(front_end, SpectrogramFrontEnd):
        raise ValueError(f"a {type(front_end).__name__} has no statistics to measure, only a SpectrogramFrontEnd has")
    data.batch_size = 1
    data.prepare_data()
    data.setup("fit")
    loader = islice(data.train_dataloader(), num_clips)
    waveforms = (
        data.on_after_batch_transfer(batch, 0).waveform for batch in track(loader, "measuring", total=num_clips)
    )
    mean, std = measure_statistics(front_end.spectrogram, waveforms)
    print(f"model:\n  front_end:\n    init_args:\n      mean: {mean:.6f}\n      std: {std:.6f}")
