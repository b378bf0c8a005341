"""Import and export the published weights of WavJEPA and PupuJEPA; no value changes."""

from jepa_audio.interop.convert import LAYOUTS, export_weights, import_weights
from jepa_audio.interop.published import WeightsError

__all__ = ["LAYOUTS", "WeightsError", "export_weights", "import_weights"]
