"""Logits of the windows of a split, collected over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, distributed

from jepa_audio.files import atomic_path
from jepa_audio.probing.finetuning.clips import ClipFormat, TrainingCrops, WindowBatch
from jepa_audio.probing.finetuning.network import ClipNetwork
from jepa_audio.probing.tasks.labels import Rows

# Training clips from which the means and deviations of a head are measured.
_NUM_MEASURED = 256


class WindowLogits:
    """The logits of windows by their place; windows that two processes evaluate count once."""

    def __init__(self) -> None:
        self._windows: dict[tuple[int, int], tuple[int, Tensor]] = {}

    def add(self, batch: WindowBatch, logits: Sequence[Tensor]) -> None:
        """Keep the rows of the windows of a batch."""
        for place, length, rows in zip(batch.places, batch.lengths, logits, strict=True):
            self._windows[place] = length, rows.float().cpu()

    def gather(self, form: ClipFormat) -> tuple[Rows, Float[Tensor, "rows C"]]:
        """The rows of all processes in the order of the split; removes them here."""
        parts: list[Any] = [self._windows]
        if distributed.is_available() and distributed.is_initialized():
            parts = [None] * distributed.get_world_size()
            distributed.all_gather_object(parts, self._windows)
        self._windows = {}
        found = {place: window for part in parts for place, window in part.items()}
        places = sorted(found)
        logits = torch.cat([found[place][1] for place in places])
        return form.rows(places, [found[place][0] for place in places]), logits


def save_logits(path: Path, rows: Rows, logits: Float[Tensor, "rows C"]) -> None:
    """Write rows and their logits to an `.npz` file."""
    arrays: dict[str, Any] = {"item": rows.item, "window": rows.window, "seconds": rows.seconds}
    with atomic_path(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **arrays, logits=logits.numpy())


def load_logits(path: Path) -> tuple[Rows, Float[Tensor, "rows C"]]:
    """Read a file of `save_logits`."""
    with np.load(path) as stored:
        rows = Rows(stored["item"], stored["window"], stored["seconds"])
        return rows, torch.from_numpy(stored["logits"])


def measure_scale(network: ClipNetwork, crops: TrainingCrops, device: torch.device) -> None:
    """Measure the means and deviations of the head on training clips at equal distances."""
    chosen = np.linspace(0, len(crops) - 1, min(_NUM_MEASURED, len(crops))).astype(int)
    network.eval()
    rows = []
    for item in chosen.tolist():
        waveform = crops[0, item][0].to(device)
        rows.append(network.measure(waveform[None], [waveform.shape[-1]]))
    network.standardise(torch.cat(rows))
