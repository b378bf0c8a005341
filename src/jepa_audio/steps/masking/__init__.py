"""Maskers: grid → context tokens and target groups."""

from jepa_audio.steps.masking.base import Masker
from jepa_audio.steps.masking.blocks import BlockMasker, MultiBlockMasker, StripeMasker
from jepa_audio.steps.masking.mixture import MixtureMasker
from jepa_audio.steps.masking.random import RandomMasker
from jepa_audio.steps.masking.spans import SpanMasker, TargetSpanMasker

__all__ = [
    "BlockMasker",
    "Masker",
    "MixtureMasker",
    "MultiBlockMasker",
    "RandomMasker",
    "SpanMasker",
    "StripeMasker",
    "TargetSpanMasker",
]
