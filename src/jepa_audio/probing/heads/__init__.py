"""Heads: how they are trained, many at once, and what one says once it is trained."""

from jepa_audio.probing.heads.base import Choice, Head, Source, choose

__all__ = ["Choice", "Head", "Source", "choose"]
