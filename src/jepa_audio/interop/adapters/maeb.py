"""MAEB, the audio tasks of `mteb` 2.8 or newer: `mteb.evaluate(JEPAModel(RUN), tasks)`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction

from jepa_audio.errors import UserError
from jepa_audio.inference.load import Which
from jepa_audio.interop.adapters.features import VARIABLE, EncoderFeatures
from jepa_audio.parallel import track_progress


class JEPAModel(AbsEncoder):
    """An encoder for the audio tasks of `mteb`.

    `mteb` stores results under the name and the revision of a model: the revision depends on
    weights, layers and pooling.

    Args:
        encoder: see `EncoderFeatures`.
        layers: see `EncoderFeatures`.
        pool: see `EncoderFeatures`.
        which: see `EncoderFeatures`.
        device: device of the encoder; `None` for a GPU if there is one.
    """

    def __init__(
        self,
        encoder: str | os.PathLike[str] | None = None,
        *,
        layers: int | Sequence[int] | None = -1,
        pool: str = "mean",
        which: Which = "context",
        device: str | None = None,
    ) -> None:
        self.model = EncoderFeatures(encoder, layers=layers, pool=pool, which=which)
        self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        name = Path(encoder or os.environ[VARIABLE]).resolve().name
        name = re.sub(r"[^\w.-]", "-", name)
        facts = {
            "name": f"jepa-audio/{name}",
            "revision": self.model.key,
            "modalities": ["audio"],
            "embed_dim": self.model.num_features,
            "n_parameters": sum(weight.numel() for weight in self.model.parameters()),
            "framework": ["PyTorch"],
            "similarity_fn_name": ScoringFunction.COSINE,
        }
        self.mteb_model_meta = ModelMeta.create_empty(overwrites=facts)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        show_progress_bar: bool = True,
        **kwargs: Any,
    ) -> Float[np.ndarray, "B _"]:
        """One vector for each clip of a loader of `mteb`; the batch size is that of the loader.

        Raises:
            UserError: if the task has something else than audio.
        """
        vectors = []
        batches = track_progress(inputs, "Encoding", len(inputs)) if show_progress_bar else inputs
        for batch in batches:
            if "audio" not in batch:
                raise UserError(
                    f"the task {task_metadata.name} has {', '.join(batch)} and no audio: choose "
                    "tasks with `mteb.get_tasks(modalities=['audio'], "
                    "exclusive_modality_filter=True)`"
                )
            clips = [np.asarray(clip["array"]) for clip in batch["audio"]]
            rates = [int(clip["sampling_rate"]) for clip in batch["audio"]]
            vectors.append(self.model.vectors(clips, rates).cpu())
        return torch.cat(vectors).numpy()
