"""Probing: what linear and nearest-neighbour heads read off a frozen encoder, beside its random-init twin."""

from jepa_audio.probing.online import OnlineProbe
from jepa_audio.probing.run import probe

__all__ = ["OnlineProbe", "probe"]
