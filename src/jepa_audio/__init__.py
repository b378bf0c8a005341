"""Joint-embedding predictive architectures (JEPAs) for audio."""

from importlib.metadata import version

__version__ = version("jepa-audio")
