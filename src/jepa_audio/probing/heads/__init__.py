"""Heads: small models that are trained on frozen features."""

from jepa_audio.probing.heads.base import Choice, FitContext, Head, HeadInput, choose

__all__ = ["Choice", "FitContext", "Head", "HeadInput", "choose"]
