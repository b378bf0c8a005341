"""Maskers: grid → context tokens and target groups."""

from jepa_audio.masking.base import Masker
from jepa_audio.masking.blocks import BlockMasker, MultiBlockMasker, StripeMasker
from jepa_audio.masking.mixture import MixtureMasker
from jepa_audio.masking.random import RandomMasker
from jepa_audio.masking.spans import SpanMasker, TargetSpanMasker

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
