"""S3PRL and SUPERB (arXiv:2105.01051): an upstream model.

With `from jepa_audio.interop.adapters.s3prl import UpstreamExpert` in the file
s3prl/upstream/example/expert.py: `python run_downstream.py -u customized_upstream -k RUN ...`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from jepa_audio.class_paths import parse_yaml
from jepa_audio.errors import UserError
from jepa_audio.interop.adapters.features import EncoderFeatures, frame_pooling

SAMPLE_RATE = 16_000
"""Sample rate of all audio in S3PRL, in Hz."""


class UpstreamExpert(EncoderFeatures):
    """An encoder for S3PRL, which gets all layers.

    Args:
        ckpt: see `EncoderFeatures`; the option `-k` of S3PRL.
        model_config: a YAML file that may set `frequency` ("mean" or "concat", how the frequency
            rows of a time column become a vector), `which` (see `EncoderFeatures`) and `trainable`
            (True to give the weights gradients, for the option `-f`); the option `-g` of S3PRL.
        refresh: S3PRL's word for a new download; it has no effect.
    """

    def __init__(
        self,
        ckpt: str | os.PathLike[str] | None = None,
        model_config: str | os.PathLike[str] | None = None,
        refresh: bool = False,
    ) -> None:
        settings: dict[str, Any] = {"frequency": "mean", "which": "context", "trainable": False}
        if model_config is not None:
            path = Path(model_config)
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"`model_config`: {path} cannot be read ({error}): give a YAML file, or none"
                ) from error
            stored = parse_yaml(text, str(path))
            if not isinstance(stored, dict) or stored.keys() - settings:
                raise UserError(f"{path} may contain {', '.join(settings)}, and nothing else")
            settings |= stored
        pool = frame_pooling(settings["frequency"])
        super().__init__(ckpt, layers=None, pool=pool, which=settings["which"])
        if settings["trainable"]:
            self.encoder.unfreeze()
        self.stride = max(1, round(SAMPLE_RATE * self.encoder.frame_seconds))

    def get_downsample_rates(self, key: str) -> int:
        """Samples at 16 kHz from one time column to the next; the same for each `key`."""
        return self.stride

    def forward(
        self, wavs: Sequence[Float[Tensor, " _"]]
    ) -> dict[str, list[Float[Tensor, "B T _"]]]:
        """All layers, at the times that S3PRL assumes: in the middle of each `stride` samples.

        Args:
            wavs: mono clips at 16 kHz of any lengths.

        Returns:
            `hidden_states`: one tensor for each layer. A clip of S samples has ceil(S / stride)
            time columns, then zeros.
        """
        num_frames = [-(-len(wav) // self.stride) for wav in wavs]
        features = self.frames(list(wavs), SAMPLE_RATE, self.stride / SAMPLE_RATE, num_frames)
        return {"hidden_states": features.over_time(self.pooling.frequency)}
