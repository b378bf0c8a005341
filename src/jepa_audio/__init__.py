"""Joint-embedding predictive architectures (JEPAs) for audio."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jepa_audio.inference.encoder import Encoder
    from jepa_audio.inference.load import load_encoder

    __version__: str

__all__ = ["Encoder", "__version__", "load_encoder"]


def __getattr__(name: str) -> object:
    """A public name, imported at its first use, because torch takes seconds to import (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415

        return version("jepa-audio")
    if name in __all__:
        from jepa_audio.inference import load  # noqa: PLC0415

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
