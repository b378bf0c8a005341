"""A pretrained encoder as a model of the transformers library.

`jepa-audio export hf` copies these classes, and all that they need, to one file, see `OneFile`.
Nothing in this package imports this module, so the package does not need transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel, SequenceFeatureExtractor
from transformers.utils import ModelOutput

from jepa_audio.errors import UserError
from jepa_audio.inference.windowed import WindowedEncoder
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.front_ends.base import FrontEnd

logger = logging.getLogger(__name__)

# Windows in one forward pass; it limits the memory for long clips.
MAX_WINDOWS = 64
# A larger sample is no float in [-1, 1], however loud, but a whole number of another format.
MAX_PEAK = 1e3


def build(settings: Any) -> Any:
    """The object that `class_path` and `init_args` describe, of a class of this file."""
    if isinstance(settings, dict) and "class_path" in settings:
        cls = globals()[settings["class_path"].rpartition(".")[2]]
        return cls(**{name: build(value) for name, value in settings["init_args"].items()})
    return settings


class JEPAAudioConfig(PreTrainedConfig):
    """The settings of a model.

    Args:
        jepa_audio: `front_end` and `encoder` (class paths and arguments), `window_samples` (the
            length of a training crop), `loudness_dbfs` (level to which clips are scaled, or
            `None`), `sample_rate` in Hz, `num_channels`.
    """

    model_type = "jepa_audio"

    def __init__(self, jepa_audio: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.jepa_audio = jepa_audio or {}


@dataclass
class JEPAAudioOutput(ModelOutput):
    """The tokens of a batch of clips, in time-major order: all frequency rows of a time column.

    Attributes:
        last_hidden_state: output of the final norm, `[B, N, D]`; zero after the end of a clip.
        hidden_states: the input of the first block, the output of every block except the last one,
            and `last_hidden_state`; only with `output_hidden_states=True`.
        attention_mask: True at the tokens of a clip, False after its end, `[B, N]`.
        times: centre of every token in seconds, `[B, N]`.
    """

    last_hidden_state: Float[Tensor, "B N D"] | None = None
    hidden_states: tuple[Float[Tensor, "B N D"], ...] | None = None
    attention_mask: Bool[Tensor, "B N"] | None = None
    times: Float[Tensor, "B N"] | None = None


class JEPAAudioModel(PreTrainedModel):
    """Front end and encoder: waveform → tokens.

    Padding has no influence: every clip is encoded at its own length; clips of equal length are
    encoded together. A clip that is longer than a training crop is encoded in windows as long as a
    crop; the last window ends with the clip. A clip that is too short for one token is padded with
    zeros. The front end computes in float32, also if the encoder has another type.
    """

    config_class = JEPAAudioConfig
    main_input_name = "input_values"
    _keep_in_fp32_modules_strict = {"front_end"}  # noqa: RUF012 (as in transformers)
    _no_split_modules = {"Block"}  # noqa: RUF012 (as in transformers)
    _supports_sdpa = True

    def __init__(self, config: JEPAAudioConfig) -> None:
        super().__init__(config)
        self.front_end: FrontEnd = self._new_front_end()
        self.encoder: Transformer = build(config.jepa_audio["encoder"])
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        """The type of the encoder, in which the model is saved and loaded."""
        return self.encoder.norm.weight.dtype

    def _new_front_end(self) -> FrontEnd:
        """A front end with initial weights, whose fixed kernels have their values."""
        dtype = torch.get_default_dtype()
        # While weights are loaded, the default is another device or type.
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"):
                return build(self.config.jepa_audio["front_end"])
        finally:
            torch.set_default_dtype(dtype)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Set what no file contains: fixed kernels, and weights that are missing in a file."""
        names = module._non_persistent_buffers_set
        if names and (path := self._path_in_front_end(module)) is not None:
            fresh = self._new_front_end().get_submodule(path)
            for name in names:
                module.get_buffer(name).copy_(fresh.get_buffer(name))
        elif isinstance(module, nn.Linear | nn.LayerNorm | nn.GroupNorm | nn.Conv1d | nn.Conv2d):
            module.reset_parameters()

    def _path_in_front_end(self, module: nn.Module) -> str | None:
        return next((name for name, part in self.front_end.named_modules() if part is module), None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> JEPAAudioModel:
        """Move or convert all tensors; the front end stays in float32."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.encoder._apply(fn, recurse)
        self.front_end._apply(move, recurse)
        return self

    def forward(
        self,
        input_values: Float[Tensor, "B *C S"],
        attention_mask: Int[Tensor, "B S"] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> JEPAAudioOutput | tuple[Any, ...]:
        """Encode a batch of clips.

        Args:
            input_values: waveforms `[B, S]`, or `[B, C, S]` for a model of several channels, at
                the sample rate of the model, in [-1, 1].
            attention_mask: 1 at the samples of a clip, 0 at the padding after its end.
            output_hidden_states: also return the tokens of every layer.
            return_dict: False for a tuple.

        Raises:
            UserError: if the number of channels is another one, or if a mask has other values.
        """
        waveform = input_values[:, None] if input_values.ndim == 2 else input_values
        num_channels = self.front_end.num_channels
        if waveform.ndim != 3 or waveform.shape[1] != num_channels:
            raise UserError(
                f"`input_values` {list(input_values.shape)} must be [batch, {num_channels}, "
                "samples]" + ("" if num_channels > 1 else " or [batch, samples]")
            )
        lengths = clip_lengths(waveform, attention_mask)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        windowed = WindowedEncoder(
            self.front_end,
            self.encoder,
            self.config.jepa_audio["window_samples"],
            overlap=0.0,
            windowing="exact",
            max_windows=MAX_WINDOWS,
            loudness_dbfs=self.config.jepa_audio.get("loudness_dbfs"),
        )
        layers = None if output_hidden_states else [-1]
        features = windowed.encode_batch(waveform.float(), lengths, layers)
        num_freq = features.layers[0].shape[2]
        hidden_states = tuple(layer.flatten(1, 2) for layer in features.layers)
        output = JEPAAudioOutput(
            hidden_states[-1],
            hidden_states if output_hidden_states else None,
            features.valid.repeat_interleave(num_freq, dim=1),
            features.times.repeat_interleave(num_freq, dim=1),
        )
        return output.to_tuple() if return_dict is False else output


def clip_lengths(
    waveform: Float[Tensor, "B C S"], attention_mask: Int[Tensor, "B S"] | None
) -> Int[Tensor, " B"]:
    """Number of samples of every clip.

    Raises:
        UserError: if the padding is not at the end, or if a clip has no samples.
    """
    num_clips, _, num_samples = waveform.shape
    if attention_mask is None:
        lengths = torch.full((num_clips,), num_samples)
    elif attention_mask.shape != (num_clips, num_samples):
        raise UserError(
            f"`attention_mask` {list(attention_mask.shape)} must be [{num_clips}, {num_samples}], "
            "one value for each sample"
        )
    else:
        mask = attention_mask.bool().cpu()
        lengths = mask.sum(dim=1)
        if not mask.equal(torch.arange(num_samples) < lengths[:, None]):
            raise UserError("`attention_mask` must be 1, then 0: the padding is after the clip")
    if not num_clips or int(lengths.min()) < 1:
        raise UserError("a clip of 0 samples cannot be encoded: remove it")
    return lengths


def _refuse_names(audio: Any) -> None:
    """Refuse the name of a file, and an item of a data set, in place of samples."""
    if isinstance(audio, str | bytes):
        raise UserError(f"{audio!r} is a text, not a clip: read the file, and give its samples")
    if isinstance(audio, dict):
        keys = ", ".join(map(str, audio))
        raise UserError(
            f"a clip is a dict with the keys {keys}: give its samples, such as `audio['array']`"
        )


def _check_samples(clip: np.ndarray, name: str) -> None:
    """Refuse samples that are no audio in [-1, 1]."""
    if not clip.size:
        raise UserError(f"{name} has 0 samples and cannot be encoded: remove it")
    if not np.isfinite(clip).all():
        raise UserError(f"{name} has samples that are not finite: repair or remove it")
    peak = float(np.abs(clip).max())
    if peak > MAX_PEAK:
        raise UserError(
            f"{name} has the peak {peak:g}, but samples are in [-1, 1]: divide those of 16 bits by "
            "32768"
        )


class JEPAAudioFeatureExtractor(SequenceFeatureExtractor):
    """Pads clips to one length, and gives the attention mask of their samples.

    Args:
        feature_size: number of channels of the model.
        sampling_rate: sample rate of the model in Hz.
        padding_value: value of the padding; it has no influence on the tokens.
        return_attention_mask: return the mask.
    """

    model_input_names = ("input_values", "attention_mask")

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 16000,
        padding_value: float = 0.0,
        return_attention_mask: bool = True,
        **kwargs: Any,
    ) -> None:
        kwargs["return_attention_mask"] = return_attention_mask
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)

    def __call__(
        self,
        raw_speech: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        sampling_rate: int | None = None,
    ) -> BatchFeature:
        """Batch clips: `input_values` `[B, S]`, or `[B, C, S]` for a model of several channels.

        Args:
            raw_speech: one clip or a list of clips, each one an array, a tensor or a list of
                samples in [-1, 1]: `[S]` for a model of one channel, else `[C, S]`. An array with
                one axis more is a batch.
            padding: as in transformers; True pads to the longest clip.
            max_length: largest length in samples, for `truncation` and `padding="max_length"`.
            truncation: cut clips to `max_length`.
            pad_to_multiple_of: round the length up to a multiple of this number.
            return_attention_mask: `None` for the setting of the extractor.
            return_tensors: "pt" for tensors, "np" for arrays.
            sampling_rate: sample rate of `raw_speech` in Hz.

        Raises:
            UserError: if the sample rate, the number of channels or the type is another one, if
                there is no clip, or if samples are not finite or far outside of [-1, 1].
        """
        if sampling_rate is None:
            logger.warning("give `sampling_rate`: a wrong sample rate cannot be found without it")
        elif sampling_rate != self.sampling_rate:
            raise UserError(
                f"`sampling_rate` ({sampling_rate}) must be {self.sampling_rate}, the sample rate "
                f"of the model: resample the audio to {self.sampling_rate} Hz"
            )
        clips = [self._checked(clip) for clip in self._split(raw_speech)]
        for i, clip in enumerate(clips):
            _check_samples(clip, f"clip {i}")
        padded = self.pad(
            BatchFeature({"input_values": clips}),
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=return_attention_mask,
        )
        if self.feature_size > 1:
            padded["input_values"] = [np.ascontiguousarray(x.T) for x in padded["input_values"]]
        return padded.convert_to_tensors(return_tensors)

    def _split(self, audio: Any) -> list[Any]:
        """The clips of a batch; one clip is a batch of one."""
        _refuse_names(audio)
        if not hasattr(audio, "__len__") or (len(audio) == 0 and not hasattr(audio, "ndim")):
            raise UserError(f"`raw_speech` ({audio!r}) has no clip: give a clip or a list of clips")
        num_axes = 1 if self.feature_size == 1 else 2
        if hasattr(audio, "ndim"):
            return [audio] if audio.ndim == num_axes else list(audio)
        first = audio[0]
        _refuse_names(first)
        is_clip = np.ndim(first.cpu() if isinstance(first, Tensor) else first) == num_axes - 1
        return [audio] if is_clip else list(audio)

    def _checked(self, audio: Any) -> np.ndarray:
        """A clip as float32: `[S]`, or `[S, C]` for several channels."""
        _refuse_names(audio)
        clip = audio.detach().cpu().numpy() if isinstance(audio, Tensor) else np.asarray(audio)
        if clip.dtype.kind not in "fiub":
            raise UserError(f"samples of type {clip.dtype} must be numbers in [-1, 1], as float32")
        if np.issubdtype(clip.dtype, np.integer) and np.abs(clip).max(initial=0) > 1:
            raise UserError(f"samples of type {clip.dtype} must be scaled to [-1, 1], as float32")
        if self.feature_size == 1 and clip.ndim == 2 and len(clip) == 1:
            clip = clip[0]
        expected = "[samples]" if self.feature_size == 1 else f"[{self.feature_size}, samples]"
        if clip.ndim != min(self.feature_size, 2) or (
            clip.ndim == 2 and len(clip) != self.feature_size
        ):
            raise UserError(f"a clip of shape {list(clip.shape)} must be {expected}: mix channels")
        return clip.T.astype(np.float32)
