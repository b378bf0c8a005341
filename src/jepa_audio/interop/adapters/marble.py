"""MARBLE v2, the benchmark of music representations (arXiv:2306.10548): encoder and settings.

`jepa-audio export marble RUN TASK.yaml -o OUT.yaml` writes the settings of a task of MARBLE for an
encoder; `python cli.py fit --config OUT.yaml` of MARBLE then runs it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jaxtyping import Float
from torch import Tensor

from jepa_audio.class_paths import parse_yaml
from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.files import write_text
from jepa_audio.inference.features import Frequency
from jepa_audio.inference.load import Which
from jepa_audio.interop.adapters.features import EncoderFeatures, as_clips, frame_pooling


class JEPAEncoder(EncoderFeatures):
    """An encoder for MARBLE, which gets all layers; MARBLE's `LayerSelector` chooses some.

    Args:
        encoder: see `EncoderFeatures`.
        frequency: "mean" or "concat", how the frequency rows of a time column become one vector.
        which: see `EncoderFeatures`.
        frames_per_second: rate of the labels of a task, for tasks with labels in time; `None` for
            that of the encoder.

    Attributes:
        width: width of a layer.
    """

    def __init__(
        self,
        encoder: str | os.PathLike[str] | None = None,
        *,
        frequency: Frequency = "mean",
        which: Which = "context",
        frames_per_second: float | None = None,
    ) -> None:
        super().__init__(encoder, layers=None, pool=frame_pooling(frequency), which=which)
        self.frames_per_second = frames_per_second
        self.width = self.num_frame_features // self.encoder.num_layers

    def forward(self, waveform: Float[Tensor, "B *C S"]) -> tuple[Float[Tensor, "B T D"], ...]:
        """All layers, for clips at the sample rate of the encoder.

        With `frames_per_second`, a clip has its duration times this number of time columns: the
        nearest one to the middle of each frame.
        """
        rate = self.encoder.sample_rate
        clips = waveform if waveform.ndim == 3 else as_clips(waveform)
        with torch.no_grad():
            if self.frames_per_second is None:
                features = self.encoder.encode(clips, rate)
            else:
                count = max(1, round(clips.shape[-1] / rate * self.frames_per_second))
                counts = [count] * len(clips)
                features = self.frames(clips, rate, 1 / self.frames_per_second, counts)
        return tuple(features.over_time(self.pooling.frequency))


def write_settings(
    encoder: str, task: Path, output: Path | None = None, layers: Sequence[int] | None = None
) -> Path:
    """Write the settings of a task of MARBLE, made for another encoder, for this encoder.

    Encoder, sample rate, number of channels, widths and layers are replaced, and audio transforms
    of the other encoder are removed. All else is kept. The second part of the name of the file is
    the name of the other encoder; in names and folders, the name of this encoder replaces it.

    Args:
        encoder: see `EncoderFeatures`.
        task: a file of MARBLE's folder `configs`, such as probe.MERT-v1-95M.GTZANGenre.yaml.
        output: the file to write; `None` for one in the working directory.
        layers: indices of the layers for MARBLE's LayerSelector; `None` for the last one.

    Raises:
        UserError: if the encoder cannot be loaded, or if the file is not one of MARBLE.
    """
    if not task.is_file():
        raise MissingFileError(f"there is no file {task}: give a file of MARBLE's folder configs")
    parts = task.name.split(".")
    settings = parse_yaml(task.read_text(encoding="utf-8"), str(task))
    if len(parts) != 4 or not isinstance(settings, dict) or not {"model", "data"} <= set(settings):
        raise UserError(
            f"{task} is no task of MARBLE: give a file of its folder configs, with a name such as "
            "probe.MERT-v1-95M.GTZANGenre.yaml"
        )
    model = JEPAEncoder(encoder)
    path = Path(encoder).expanduser()
    name = path.resolve().name if path.exists() else encoder.replace("/", "-")
    arguments: dict[str, Any] = {"encoder": str(path.resolve()) if path.exists() else encoder}
    replaced = {
        "sample_rate": model.encoder.sample_rate,
        "channels": model.encoder.num_channels,
        "in_dim": model.width,
        "hidden_size": model.width,
        "layers": model.encoder.layer_indices(layers or [-1]),
        "num_layers": model.encoder.num_layers,
    }
    for part in _mappings(settings):
        part.update({key: value for key, value in replaced.items() if key in part})
        if "label_freq" in part:
            arguments["frames_per_second"] = float(part["label_freq"])
        for key, value in part.items():
            if isinstance(value, str):
                part[key] = value.replace(f".{parts[1]}", f".{name}")
            if isinstance(value, list):
                part[key] = [each for each in value if not _is_audio_transform(each)]
    class_path = f"{JEPAEncoder.__module__}.{JEPAEncoder.__name__}"
    encoder_settings = {"class_path": class_path, "init_args": arguments}
    settings["model"]["init_args"]["encoder"] = encoder_settings
    output = output or Path(".".join([parts[0], name, *parts[2:]]))
    write_text(output, yaml.safe_dump(settings, sort_keys=False))
    return output


def _is_audio_transform(value: Any) -> bool:
    """Whether a setting describes a feature extractor of an encoder of MARBLE."""
    path = value.get("class_path", "") if isinstance(value, dict) else ""
    return path.startswith("marble.encoders.")


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _mappings(part)
