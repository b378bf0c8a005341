"""The published layout of PupuJEPA (later renamed PupuM2D): EVA blocks on log-mel patches."""

from __future__ import annotations

from typing_extensions import override

from jepa_audio.interop.layout import Layout, Settings, SizeHints, check_blocks, transformer_sizes
from jepa_audio.interop.published import Published, WeightsError
from jepa_audio.steps.encoder.positions import RotaryPositions
from jepa_audio.steps.front_ends import SpectrogramFrontEnd
from jepa_audio.steps.front_ends.base import Spectrogram
from jepa_audio.steps.front_ends.transforms import LogMel
from jepa_audio.training.jepa import JEPA

_BLOCKS = ("blocks", "mlp.fc2.weight")


class PupuJEPALayout(Layout):
    """The layout of `sizigi/PupuJEPA`; its blocks are those of EVA in timm."""

    recipe = "pupujepa"
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
        encoder = transformer_sizes(
            published,
            "student" if "student.norm.weight" in published.tensors else "teacher",
            *_BLOCKS,
            hints.num_heads,
            "--num_heads",
            ("num_heads", "encoder_num_heads", "model.num_heads", "encoder.heads"),
        )
        width, channels, patch_frames, patch_bands = published.shape("patch_embed.proj.weight", 4)
        patches: Settings = {
            "embed_dim": width,
            "num_channels": channels,
            "patch_frames": patch_frames,
            "patch_bands": patch_bands,
        }
        for name in ("mean", "std"):
            if (value := published.config_value(f"mel_{name}")) is not None:
                patches[name] = float(value)
        changes = {"front_end": patches, "encoder": encoder, "predictor": {"embed_dim": width}}
        if "predictor.norm.weight" in published.tensors:
            keys = ("decoder_num_heads", "model.decoder_num_heads", "predictor.heads")
            trunk = transformer_sizes(
                published,
                "predictor",
                *_BLOCKS,
                hints.predictor_num_heads,
                "--predictor_num_heads",
                keys,
            )
            changes["predictor"] = {"embed_dim": width, "trunk": trunk}
        return {"model": changes}

    @override
    def config(self, jepa: JEPA) -> Settings:
        # The keys are those of the published `args.json`.
        front_end = jepa.front_end
        is_mel = isinstance(getattr(front_end, "spectrogram", None), LogMel)
        if not isinstance(front_end, SpectrogramFrontEnd) or not is_mel:
            raise WeightsError("the layout of PupuJEPA needs a SpectrogramFrontEnd with LogMel")
        for name, encoder in (("encoder", jepa.encoder), ("predictor", jepa.predictor.trunk)):
            check_blocks(
                name,
                encoder,
                pre_norm=True,
                gated=True,
                positions=RotaryPositions(),
                final_norm_eps=1e-5,
                norm_eps=1e-5,
            )
        if _settings_of(front_end.spectrogram) != _settings_of(LogMel()):
            raise WeightsError(
                "the layout of PupuJEPA cannot express settings of `front_end.spectrogram` other "
                "than the defaults of `LogMel`"
            )
        return {
            "embed_dim": jepa.encoder.embed_dim,
            "depth": jepa.encoder.depth,
            "num_heads": jepa.encoder.num_heads,
            "decoder_embed_dim": jepa.predictor.trunk.embed_dim,
            "decoder_depth": jepa.predictor.trunk.depth,
            "decoder_num_heads": jepa.predictor.trunk.num_heads,
            "patch_size": [front_end.patch_frames, front_end.patch_bands],
            "mel_mean": front_end.mean,
            "mel_std": front_end.std,
            "qk_norm": False,
        }


def _settings_of(spectrogram: Spectrogram) -> tuple[object, ...]:
    assert isinstance(spectrogram, LogMel)
    numbers = {
        name: value for name, value in vars(spectrogram).items() if isinstance(value, int | float)
    }
    return (*sorted(numbers.items()), tuple(spectrogram.bank.sum(dim=1).tolist()))
