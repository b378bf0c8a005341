"""The published layout of PupuJEPA (later renamed PupuM2D): EVA blocks on log-mel patches."""

from __future__ import annotations

import logging

from torch import nn
from typing_extensions import override

from jepa_audio.errors import MAX_RATE
from jepa_audio.interop.layout import (
    Layout,
    Settings,
    SizeHints,
    TransformerKeys,
    arguments,
    check_blocks,
    has_qk_norm,
    transformer_sizes,
)
from jepa_audio.interop.published import Published, WeightsError
from jepa_audio.steps.encoder.positions import RotaryPositions
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.front_ends import SpectrogramFrontEnd
from jepa_audio.steps.front_ends.transforms import LogMel
from jepa_audio.training.jepa import JEPA

log = logging.getLogger(__name__)

MAX_FRAMES = 10_000_000
# Key of `preprocess` in the published `args.json`, argument of `LogMel`.
_MEL = {
    "sample_rate": "sample_rate",
    "n_fft": "n_fft",
    "win_size": "win_length",
    "hop_size": "hop_length",
    "n_mels": "n_mels",
    "fmin": "f_min_hz",
    "fmax": "f_max_hz",
}


class PupuJEPALayout(Layout):
    """The layout of `sizigi/PupuJEPA`; its blocks are those of EVA in timm.

    The sizes are in an `args.json` with the groups `preprocess` and `model`. Earlier versions of
    this package wrote a `config.json` without groups, which is also read.
    """

    recipe = "pupujepa"
    config_name = "args.json"
    names = (
        (r"^front_end\.proj\.", "patch_embed.proj."),
        (r"^front_end\.norm\.", "patch_embed.norm_layer."),
        (r"^encoder\.", "student."),
        (r"^target_encoder\.", "teacher."),
        (r"^predictor\.trunk\.", "predictor."),
        (r"^predictor\.(proj_in|proj_out|mask_token)", r"predictor.\1"),
    )

    @override
    def sizes(self, published: Published, hints: SizeHints, recipe: Settings) -> Settings:
        part = "student" if "student.norm.weight" in published.tensors else "teacher"
        encoder = _transformer(published, part, "", hints.num_heads, "--num_heads")
        width, channels, patch_frames, patch_bands = published.shape("patch_embed.proj.weight", 4)
        patch_size = [patch_frames, patch_bands]
        published.check_value(patch_size, "model.patch_size", "patch_size")
        changes: Settings = {
            "encoder": encoder,
            "predictor": {"embed_dim": width},
            "front_end": {
                "embed_dim": width,
                "num_channels": channels,
                "patch_frames": patch_frames,
                "patch_bands": patch_bands,
                **_statistics(published),
            },
        }
        if "predictor.norm.weight" in published.tensors:
            heads = hints.predictor_num_heads
            changes["predictor"]["trunk"] = _transformer(
                published, "predictor", "decoder_", heads, "--predictor_num_heads"
            )
        mel = _log_mel(published)
        if mel:
            changes["front_end"]["spectrogram"] = mel
        crop: Settings = {}
        num_frames = published.whole_number("preprocess.cut_mel_frame", high=MAX_FRAMES)
        if num_frames is not None:
            front_end = arguments(recipe["model"]["front_end"])
            log_mel = {**arguments(front_end["spectrogram"]), **mel}
            frame_seconds = log_mel.get("hop_length", 240) / log_mel.get("sample_rate", 24_000)
            crop = {"crop_seconds": num_frames * frame_seconds}
        return {"model": changes, "data": crop}

    @override
    def config(self, jepa: JEPA, num_samples: int) -> Settings:
        front_end = jepa.front_end
        mel = getattr(front_end, "spectrogram", None)
        if not isinstance(front_end, SpectrogramFrontEnd) or not isinstance(mel, LogMel):
            raise WeightsError("the layout of PupuJEPA needs a SpectrogramFrontEnd with LogMel")
        encoder, trunk = jepa.encoder, jepa.predictor.trunk
        qk_norm = has_qk_norm(encoder)
        for name, transformer in (("encoder", encoder), ("predictor", trunk)):
            check_blocks(
                name,
                transformer,
                pre_norm=True,
                gated=True,
                qk_norm=qk_norm,
                positions=RotaryPositions(),
                final_norm_eps=1e-5,
                norm_eps=1e-5,
            )
        preprocess: Settings = {
            "sample_rate": mel.sample_rate,
            "cut_mel_frame": mel.num_frames(num_samples),
            "hop_size": mel.hop_length,
            "n_fft": mel.window_length,
            "win_size": mel.win_length,
            "fmin": mel.f_min_hz,
            "fmax": mel.f_max_hz,
            "n_mels": mel.num_bands,
            "normalize": True,
            "flip_ft": True,
        }
        expressed = LogMel(**{name: preprocess[key] for key, name in _MEL.items()})
        if _settings_of(mel) != _settings_of(expressed):
            raise WeightsError(
                "the layout of PupuJEPA cannot express all settings of `front_end.spectrogram`: "
                "`mel_scale`, `norm`, `power`, `floor`, `magnitude_eps` and `center` must be the "
                "defaults of `LogMel`"
            )
        if not isinstance(front_end.norm, nn.LayerNorm):
            raise WeightsError("the layout of PupuJEPA needs `front_end.norm: true`")
        # The published code has these two numbers as constants.
        preprocess |= {"mel_mean": front_end.mean, "mel_std": front_end.std}
        model = {
            "image_size": [preprocess["cut_mel_frame"], mel.num_bands],
            "patch_size": [front_end.patch_frames, front_end.patch_bands],
            "in_chans": front_end.num_channels,
            "embed_dim": encoder.embed_dim,
            "depth": encoder.depth,
            "num_heads": encoder.num_heads,
            "mlp_ratio": _mlp_ratio(encoder),
            "use_swiglu": True,
            "qk_norm": qk_norm,
            "decoder_embed_dim": trunk.embed_dim,
            "decoder_depth": trunk.depth,
            "decoder_num_heads": trunk.num_heads,
        }
        return {"preprocess": preprocess, "model": model}


def _transformer(
    published: Published, part: str, prefix: str, heads: int | None, option: str
) -> Settings:
    """The sizes of the transformer `part`; `prefix` is that of its configuration keys."""
    groups = ("model.", "")
    own = "predictor" if prefix else "encoder"
    keys = TransformerKeys(
        part,
        "blocks",
        "mlp.fc2.weight",
        (*(f"{group}{prefix}num_heads" for group in groups), f"{own}_num_heads", f"{own}.heads"),
        (
            tuple(f"{group}{prefix}embed_dim" for group in groups),
            tuple(f"{group}{prefix}depth" for group in groups),
            (),
        ),
        option,
    )
    # The released `args.json` has `qk_norm: true`, but the version of timm of that time ignored it.
    qk_norm = f"{part}.blocks.0.attn.q_norm.weight" in published.tensors
    stated = published.config_value("model.qk_norm", "qk_norm")
    if stated is not None and bool(stated) != qk_norm:
        log.info(
            "%s: `qk_norm` is %s for the %s, as in its tensors; its configuration has %s",
            *(published.path, qk_norm, part, stated),
        )
    return {**transformer_sizes(published, keys, heads), "qk_norm": qk_norm}


def _statistics(published: Published) -> Settings:
    """Mean and standard deviation of the log-mel, if the configuration contains them."""
    if published.config_value("preprocess.normalize") is False:
        return {"mean": 0.0, "std": 1.0}
    values = {
        "mean": published.number("preprocess.mel_mean", "mel_mean", low=-1e6, high=1e6),
        "std": published.number("preprocess.mel_std", "mel_std", low=1e-6, high=1e6),
    }
    return {name: float(value) for name, value in values.items() if value is not None}


def _log_mel(published: Published) -> Settings:
    """The arguments of `LogMel` that the configuration contains."""
    if published.config_value("preprocess.flip_ft") is False:
        raise WeightsError(
            f"{published.path}: `flip_ft: false` in its configuration: images whose first axis is "
            "frequency cannot be expressed"
        )
    mel: Settings = {}
    for key, name in _MEL.items():
        if name.endswith("_hz"):
            value = published.number(f"preprocess.{key}", low=0, high=MAX_RATE)
        else:
            value = published.whole_number(f"preprocess.{key}", high=MAX_RATE)
        if value is not None:
            mel[name] = value
    return mel


def _mlp_ratio(encoder: Transformer) -> float:
    # A SwiGLU has two branches.
    return encoder.get_parameter("blocks.0.mlp.fc1.bias").numel() / 2 / encoder.embed_dim


def _settings_of(spectrogram: LogMel) -> tuple[object, ...]:
    numbers = {
        name: value for name, value in vars(spectrogram).items() if isinstance(value, int | float)
    }
    return (*sorted(numbers.items()), tuple(spectrogram.bank.sum(dim=1).tolist()))
