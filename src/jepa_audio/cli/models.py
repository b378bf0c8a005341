"""The command `import`, with a docstring that is its `--help`, and `stats`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jepa_audio.data.datamodule import AudioDataModule
from jepa_audio.errors import UserError, printable
from jepa_audio.interop import import_weights
from jepa_audio.interop.layout import SizeHints
from jepa_audio.steps.front_ends import FrontEnd, SpectrogramFrontEnd
from jepa_audio.training.normalization import measure_normalization


def import_published(
    layout: Literal["wavjepa", "pupujepa"],
    source: Path,
    output: Path | None = None,
    recipe: str | None = None,
    num_heads: int | None = None,
    predictor_num_heads: int | None = None,
    conv_strides: list[int] | None = None,
) -> None:
    """Convert published weights to a checkpoint for probes, encoding and further training.

    Args:
        layout: layout of the file: "wavjepa" (also for WavJEPA-Nat) or "pupujepa".
        source: a `.safetensors`, `.ckpt`, `.pt`, `.pth` or `.bin` file, or a folder with one of
            these files and its `config.json`.
        output: output folder (-o). The default is `runs/NAME`.
        recipe: name or YAML file with the settings that the file does not determine. The default
            is the recipe of the paper.
        num_heads: number of attention heads of the encoder, if the file does not contain it.
        predictor_num_heads: number of attention heads of the predictor, if the file does not
            contain it.
        conv_strides: strides of the convolutions, if the file does not contain them.
    """
    output = output or Path("runs") / source.stem
    strides = None if conv_strides is None else tuple(conv_strides)
    hints = SizeHints(num_heads, predictor_num_heads, strides)
    checkpoint = import_weights(layout, source, output, recipe=recipe, hints=hints)
    config = output / "config.yaml"
    probe = f"jepa-audio probe --encoder {checkpoint} --tasks TASK --data DIR"
    fit = f"jepa-audio fit --config {config} --data.root DIR --run_dir runs/further"
    print(printable(f"{checkpoint}\n  probe:         {probe}\n  train further: {fit}"))


def stats(front_end: FrontEnd, data: AudioDataModule, num_clips: int) -> None:
    """Measure and print `mean` and `std` of a `SpectrogramFrontEnd` over training crops.

    Raises:
        UserError: if the front end has another class.
    """
    if not isinstance(front_end, SpectrogramFrontEnd):
        raise UserError(
            f"`data stats` needs a SpectrogramFrontEnd: `model.front_end` is a "
            f"{type(front_end).__name__}, which has no `mean` and `std`"
        )
    data.prepare_data()
    data.setup("fit")
    mean, std = measure_normalization(front_end, data, num_clips)
    print(f"model:\n  front_end:\n    init_args:\n      mean: {mean:.6f}\n      std: {std:.6f}")
