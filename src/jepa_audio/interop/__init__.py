"""Weights in the layouts of other people's code: read, written and compared to the last bit."""

from jepa_audio.interop.convert import LAYOUTS, export_weights, import_weights
from jepa_audio.interop.published import WeightsError

__all__ = ["LAYOUTS", "WeightsError", "export_weights", "import_weights"]
