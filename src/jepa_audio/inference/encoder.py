"""A pretrained encoder: audio in any form → the tokens of every layer, or one vector a clip."""

from __future__ import annotations

import copy
import hashlib
import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from jepa_audio.errors import UserError
from jepa_audio.inference.audio import Clips, count_notes, list_clips
from jepa_audio.inference.features import LayerFeatures, pad_features
from jepa_audio.inference.pooling import parse_pooling
from jepa_audio.inference.windowed import WindowedEncoder, Windowing
from jepa_audio.parallel import map_threads, track_progress
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.front_ends import FrontEnd
from jepa_audio.training.initialization import draw_weights

log = logging.getLogger(__name__)

_NUM_READERS = 4


class Encoder(WindowedEncoder):
    """Front end and encoder of a JEPA, without gradients and in evaluation mode.

    `encode` gives the tokens of every layer, `embed` one vector for each clip. A frozen encoder
    stays in evaluation mode in every module that contains it; `unfreeze` is for fine-tuning.

    A clip longer than a training crop is encoded in windows as long as a crop. The position
    encodings are therefore the same as during training.

    Args:
        front_end: waveform → tokens.
        encoder: tokens → latents.
        window_samples: largest length of a window in samples: the length of a training crop.
        overlap: share of a window that overlaps with the next window, in [0, 1).
        windowing: "exact" for windows without padding (`exact_windows`), "wavjepa" for the windows
            of the published WavJEPA code (`windows_as_wavjepa`).
        max_windows: largest number of windows in one forward pass; it limits the memory.
        loudness_dbfs: RMS level to which every clip is scaled, in dBFS: `data.loudness_dbfs` of the
            training. `None` keeps the level. With "wavjepa" windows, the level is -14 dBFS.
        settings: class paths and arguments of `front_end` and `encoder`; `save_encoder` needs them.
        source: the run or the file of the weights, for messages.
        which: "context", "target" or "random": which encoder of a model it is.
    """

    def __init__(
        self,
        front_end: FrontEnd,
        encoder: Transformer,
        window_samples: int,
        *,
        overlap: float = 0.0,
        windowing: Windowing = "exact",
        max_windows: int = 64,
        loudness_dbfs: float | None = None,
        settings: Mapping[str, Any] | None = None,
        source: str = "",
        which: Literal["context", "target", "random"] = "context",
    ) -> None:
        super().__init__(
            front_end,
            encoder,
            window_samples,
            overlap=overlap,
            windowing=windowing,
            max_windows=max_windows,
            loudness_dbfs=loudness_dbfs,
        )
        self.settings, self.source, self.which = settings, source, which
        # Conversions of audio that were logged.
        self._logged: set[str] = set()
        self.freeze()

    @property
    def sample_rate(self) -> int:
        """Sample rate of the waveforms, in Hz."""
        return self.front_end.sample_rate

    @property
    def num_channels(self) -> int:
        """Audio channels of the waveforms."""
        return self.front_end.num_channels

    @property
    def num_layers(self) -> int:
        """Number of layers: the input of the first block, and the output of every block."""
        return self.encoder.depth + 1

    @property
    def frame_seconds(self) -> float:
        """Seconds from one time column to the next, inside a window."""
        times = self.front_end.times(self._example_samples).double()
        if len(times) == 1:
            return self._example_samples / self.sample_rate
        return float(times[-1] - times[0]) / (len(times) - 1)

    @property
    def _example_samples(self) -> int:
        return max(self.window_samples, self.min_samples)

    def freeze(self) -> Encoder:
        """Give no weight gradients, and use evaluation mode; the state after loading."""
        return self.requires_grad_(False).eval()

    def unfreeze(self) -> Encoder:
        """Give all weights gradients, for fine-tuning; `train()` then switches on drop path."""
        return self.requires_grad_(True)

    @override
    def train(self, mode: bool = True) -> Encoder:
        """As for any module, but a frozen encoder stays in evaluation mode."""
        return super().train(mode and not self.is_frozen)

    @override
    def __repr__(self) -> str:
        rows = self.front_end.grid(self._example_samples).num_freq
        parts = [
            f"{self.which} encoder",
            f"{self.num_layers} layers of width {self.encoder.embed_dim}",
            f"{self.sample_rate} Hz",
            f"{self.num_channels} channel{'s' * (self.num_channels > 1)}",
            f"{rows / self.frame_seconds:.4g} tokens/s in {rows} row{'s' * (rows > 1)}",
        ]
        return (
            f"Encoder({self.source or 'not from a file'}: {', '.join(parts)}"
            f"{'' if self.is_frozen else ', not frozen'})"
        )

    @staticmethod
    def from_jepa(
        jepa: Any,
        window_samples: int,
        which: Literal["context", "target"] = "context",
        loudness_dbfs: float | None = None,
    ) -> Encoder:
        """A copy of the context encoder or of the target encoder of a `JEPA`."""
        parts = jepa.front_end, jepa.encoder
        if which == "target":
            parts = jepa.target_front_end or jepa.front_end, jepa.target_encoder
        stored = {name: jepa.hparams[name] for name in ("front_end", "encoder")}
        # Modules that were made without a configuration have no settings.
        settings = stored if all(isinstance(each, dict) for each in stored.values()) else None
        return Encoder(
            *copy.deepcopy(parts),
            window_samples,
            loudness_dbfs=loudness_dbfs,
            settings=copy.deepcopy(settings),
            which=which,
        )

    def random_twin(self, seed: int) -> Encoder:
        """The random-init baseline: the same network, initialised as by `JEPA.reset_parameters`."""
        twin = copy.deepcopy(self).cpu()
        draw_weights((twin.front_end, twin.encoder), seed)
        twin.source, twin.which = f"random weights of seed {seed}, as in {self.source}", "random"
        return twin

    def forward(
        self,
        waveform: Float[Tensor, "B C S"],
        lengths: Int[Tensor, " B"] | None = None,
        layers: Sequence[int] | None = None,
    ) -> LayerFeatures:
        """The same as `encode_batch`."""
        return self.encode_batch(waveform, lengths, layers)

    def encode(
        self,
        audio: Any,
        sample_rate: int | Sequence[int | None] | None = None,
        *,
        layers: int | Sequence[int] | None = None,
        frame_seconds: float | None = None,
    ) -> LayerFeatures:
        """The tokens of every layer, for audio in any form.

        Audio is converted to the rate and the channels of the encoder. Each kind of conversion is
        logged once for an encoder. The results are ordinary tensors on the device of the encoder.
        They have gradients if the encoder is not frozen.

        Args:
            audio: the path of a file; an array or a tensor `[S]`, `[C, S]` or `[B, C, S]`; or a
                list of clips, each of which is a path, `[S]` or `[C, S]`, of any lengths. Integers
                are divided by their full scale (int16: 32768).
            sample_rate: rate of arrays and tensors in Hz, for a list also one for each clip. Files
                have their own rate.
            layers: indices of the layers to return, such as `[-1]` for the last; `None` for all.
            frame_seconds: seconds from one time column to the next. The result then has the
                nearest column of the encoder at each of these times, see
                `LayerFeatures.at_regular_times`. `None` for the columns of the encoder, which are
                not regular where two windows meet.

        Raises:
            UserError: if the rate of an array is missing, if the shape is ambiguous, or if a clip
                is empty, not finite or unreadable; the message names the clip.
        """
        parts = list(self._encode_audio(audio, sample_rate, self.layer_indices(layers)))
        features = pad_features(parts)
        return features if frame_seconds is None else features.at_regular_times(frame_seconds)

    def embed(
        self,
        audio: Any,
        sample_rate: int | Sequence[int | None] | None = None,
        *,
        layers: int | Sequence[int] | None = (-1,),
        pool: str = "mean",
    ) -> Float[Tensor, "B _"]:
        """One vector for each clip.

        Args:
            audio: see `encode`.
            sample_rate: see `encode`.
            layers: indices of the layers, whose vectors are concatenated; `None` for all.
            pool: statistics of the time columns, as in `jepa-audio probe --pooling`: "mean",
                "thirds", "regions_N", each also with `_std`, `_change` or both ("mean_std"); with
                "/concat" at the end, the frequency rows are concatenated instead of averaged.

        Raises:
            UserError: see `encode`; also if `pool` is another word.
        """
        pooling = parse_pooling(pool, "pool")
        if pooling.regions == 0:
            raise UserError("`pool` is 'frames', which is no vector of a clip: use `encode`")
        vectors: dict[int, Tensor] = {}
        for rows, features in self._encode_audio(audio, sample_rate, self.layer_indices(layers)):
            vectors.update(zip(rows, pooling.vectors(features)[:, 0], strict=True))
        return torch.stack([vectors[row] for row in range(len(vectors))])

    def layer_indices(self, layers: int | Sequence[int] | None) -> list[int] | None:
        """The indices of layers as a list of indices from 0; `None` for all layers.

        Raises:
            UserError: if a layer does not exist.
        """
        if layers is None:
            return None
        count = self.num_layers
        try:
            several: Any = layers if np.ndim(layers) else [layers]
            chosen = [_index(layer) for layer in several]
        except (TypeError, ValueError):
            chosen = []
        if not chosen or not all(-count <= layer < count for layer in chosen):
            raise UserError(
                f"`layers` is {layers!r}, must be one index or a list of indices in "
                f"[0, {count - 1}], or from the end in [{-count}, -1]"
            )
        return [layer % count for layer in chosen]

    def _encode_audio(
        self,
        audio: Any,
        sample_rate: int | Sequence[int | None] | None,
        layers: Sequence[int] | None,
    ) -> Iterator[tuple[list[int], LayerFeatures]]:
        """Rows of the result, and their features; clips are read and encoded some at a time."""
        clips = list_clips(audio, sample_rate, self.num_channels)
        device = next(self.parameters()).device

        def load(each: Clips) -> tuple[Tensor, list[str]]:
            return each.convert(self.sample_rate, self.num_channels)

        loaded = map_threads(load, clips, _NUM_READERS, num_submitted=2 * self.max_windows)
        if len(clips) > self.max_windows:
            loaded = track_progress(loaded, "Encoding", len(clips))
        done = 0
        while chunk := list(islice(loaded, self.max_windows)):
            waveforms = [clip.to(device) for waveform, _ in chunk for clip in waveform]
            self._log_conversions([notes for w, notes in chunk for _ in w], waveforms)
            for rows, features in self.encode_clips(waveforms, layers):
                yield [done + row for row in rows], features
            done += len(waveforms)

    def _log_conversions(self, notes: list[list[str]], waveforms: list[Tensor]) -> None:
        """Log each kind of conversion once, with the number of clips of the first time."""
        num_short = sum(waveform.shape[-1] < self.min_samples for waveform in waveforms)
        seconds = self.min_samples / self.sample_rate
        short = [f"shorter than one token ({seconds:.3g} s), padded with zeros"]
        for note, count in count_notes([*notes, *[short] * num_short]).items():
            if note not in self._logged:
                self._logged.add(note)
                log.warning("%d %s: %s", count, "clip" if count == 1 else "clips", note)


def _index(value: Any) -> int:
    """A whole number of any library; `TypeError` for others, and for true and false."""
    if isinstance(value, bool | np.bool_):
        raise TypeError
    return operator.index(value)


def state_hash(module: nn.Module) -> str:
    """SHA-256 of names, types, shapes and values of the state of a module."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
