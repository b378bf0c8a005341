"""scikit-learn: `JEPAFeatures("runs/mine").fit_transform(paths)`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted

from jepa_audio.errors import UserError
from jepa_audio.inference.load import Which
from jepa_audio.interop.adapters.features import EncoderFeatures


class JEPAFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Audio → one vector for each clip, as a step of a scikit-learn pipeline.

    `fit` loads the encoder and learns nothing.

    Args:
        encoder: see `EncoderFeatures`; `None` for the variable `JEPA_AUDIO_ENCODER`.
        layers: see `EncoderFeatures`.
        pool: see `EncoderFeatures`.
        which: see `EncoderFeatures`.
        sample_rate: rate in Hz of arrays; files have their own rate.
        device: device of the encoder, as for `torch.device`.
    """

    def __init__(
        self,
        encoder: str | os.PathLike[str] | None = None,
        *,
        layers: int | Sequence[int] | None = -1,
        pool: str = "mean",
        which: Which = "context",
        sample_rate: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.encoder, self.layers, self.pool, self.which = encoder, layers, pool, which
        self.sample_rate, self.device = sample_rate, device

    def fit(self, X: Any, y: Any = None) -> JEPAFeatures:  # noqa: N803 (as in scikit-learn)
        """Load the encoder.

        Raises:
            UserError: see `EncoderFeatures`.
        """
        self.features_ = EncoderFeatures(
            self.encoder, layers=self.layers, pool=self.pool, which=self.which
        ).to(self.device)
        self._n_features_out = self.features_.num_features
        return self

    def transform(self, X: Any) -> Float[np.ndarray, "B _"]:  # noqa: N803
        """One vector for each clip.

        Args:
            X: paths (a list, an array, or a column of a table), or clips as in a list for
                `Encoder.encode`: arrays `[S]` or `[C, S]`.

        Raises:
            UserError: if `X` is one path or has several columns; see also `Encoder.encode`.
        """
        check_is_fitted(self)
        if isinstance(X, str | bytes | os.PathLike):
            raise UserError(f"`X` is one path, {X!r}: give a list of paths, [{X!r}]")
        values = np.asarray(X) if hasattr(X, "iloc") else X
        if isinstance(values, np.ndarray) and values.dtype.kind in "UO":
            if values.ndim == 2 and values.shape[1] != 1:
                raise UserError(f"`X`: give one column of paths, not {values.shape[1]}")
            values = values.reshape(len(values)) if values.size == len(values) else values
        clips = [str(clip) if isinstance(clip, str) else clip for clip in values]
        return self.features_.vectors(clips, self.sample_rate).cpu().numpy()

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array = True, False
        tags.no_validation = True
        return tags
