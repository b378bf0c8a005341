"""The speed of a training: audio per second, time spent waiting for data, model utilisation."""

from __future__ import annotations

import math
import re
import time
from functools import lru_cache
from typing import Any

import torch
from lightning.pytorch import Trainer

from jepa_audio.data.datamodule import AudioDataModule
from jepa_audio.steps.grid import AudioBatch
from jepa_audio.training.cost import crop_flops, expected_sizes
from jepa_audio.training.jepa import JEPA

# Peak of matrix products in 10^12 operations per second: half precision (bfloat16 and float16 with
# float32 sums), TF32, float32. From the data sheets and architecture papers of NVIDIA, always the
# dense figure: a sheet that gives only the one "with sparsity" gives twice as much. The first name
# in the name of the device counts.
_PEAKS = {
    "B200": (2250.0, 1125.0, 75.0),
    "GH200": (989.4, 494.7, 66.9),
    "H200": (989.4, 494.7, 66.9),
    "H100 PCIe": (756.0, 378.0, 51.2),
    "H100 NVL": (835.5, 417.5, 60.0),
    "H100": (989.4, 494.7, 66.9),
    "A100": (312.0, 156.0, 19.5),
    "A40": (149.7, 74.8, 37.4),
    "A10": (125.0, 62.5, 31.2),
    "RTX A6000": (154.8, 77.4, 38.7),
    "L40S": (362.0, 183.0, 91.6),
    "L40": (181.0, 90.5, 90.5),
    "L4": (121.0, 60.0, 30.3),
    "RTX 5090": (209.5, 104.8, 104.8),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71.0, 35.6, 35.6),
}
# Parts and variants of these devices, with other peaks.
_OTHER = re.compile(r"\b(MIG|Laptop|Max-Q|Ti|D)\b")
# A matrix product of this size is near the peak of a CPU; the best of several is taken.
_MATRIX_SIZE, _MEASURING_SECONDS = 1024, 0.25


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak of matrix products of a device, in operations per second; `None` if it is unknown.

    The peak of a GPU is in a table, that of a CPU is measured once for a process.

    Args:
        device: the device of a training process.
        precision: `precision` of a Trainer.
    """
    if device.type == "cpu":
        is_half = precision.startswith(("bf16", "16"))
        dtype = torch.bfloat16 if is_half else torch.float32
        return _measured_peak(dtype, torch.get_num_threads())
    return (
        _table_peak(torch.cuda.get_device_name(device), precision)
        if device.type == "cuda"
        else None
    )


def _table_peak(name: str, precision: str) -> float | None:
    """The peak of a GPU with this name, from the table."""
    if _OTHER.search(name):
        return None
    found = (peaks for key, peaks in _PEAKS.items() if re.search(rf"\b{key}\b", name))
    half, tf32, full = next(found, (None, None, None))
    if precision.startswith(("bf16", "16")):
        peak = half
    else:
        peak = full if torch.get_float32_matmul_precision() == "highest" else tf32
    return None if peak is None else peak * 1e12


@lru_cache
def _measured_peak(dtype: torch.dtype, num_threads: int) -> float:
    """The peak of this CPU: the fastest of at least two matrix products."""
    matrix = torch.ones(_MATRIX_SIZE, _MATRIX_SIZE, dtype=dtype)
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < _MEASURING_SECONDS:
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * _MATRIX_SIZE**3 / min(seconds)


class SpeedMeter:
    """Measures the speed between two readings.

    Model FLOPs utilisation (MFU) is the share of the devices' peak that the operations of the model
    need, see `crop_flops`: the time for data, masks, logging and padding lowers it.
    """

    def __init__(self) -> None:
        # Operations of a crop / peak of the devices of all processes; 0 if MFU is not measured.
        self._peak_seconds = 0.0
        self.restart()

    def prepare(self, trainer: Trainer, jepa: JEPA) -> str:
        """Compute the operations of a crop on rank zero; return why there is no MFU, or "".

        Parameters must not be sharded yet: call it in `setup`.
        """
        if not trainer.is_global_zero:
            return ""
        device, data = trainer.strategy.root_device, trainer.datamodule  # type: ignore[attr-defined]
        peak = peak_flops(device, str(trainer.precision))
        if peak is None or not isinstance(data, AudioDataModule):
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            return f"the peak of this device ({name}) is not known" if peak is None else "no crops"
        num_samples = data.clips.crop_samples
        sizes = expected_sizes(jepa, num_samples, 0, trainer.max_steps)
        flops = sum(part.total for part in crop_flops(jepa, num_samples, sizes).values())
        self._peak_seconds = flops / peak / trainer.world_size
        return ""

    def restart(self) -> None:
        """Forget what was measured, for example because a validation took time."""
        self._num_crops = self._seconds_of_audio = self._seconds_waiting = 0.0
        self._started = self._last_batch_end = time.perf_counter()

    def start_batch(self) -> None:
        """Count the time since the last batch as time spent waiting."""
        self._seconds_waiting += time.perf_counter() - self._last_batch_end

    def count(self, batch: AudioBatch, sample_rate: int, num_processes: int) -> None:
        """Add a batch of every process."""
        num_crops = len(batch.waveform) * num_processes
        self._num_crops += num_crops
        self._seconds_of_audio += num_crops * batch.waveform.shape[-1] / sample_rate

    def end_batch(self) -> None:
        """From now on, the training waits for the next batch."""
        self._last_batch_end = time.perf_counter()

    def read(self) -> dict[str, float]:
        """The metrics since the last restart."""
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        metrics = {
            "speed/crops_per_second": self._num_crops / elapsed,
            "speed/audio_seconds_per_second": self._seconds_of_audio / elapsed,
            "speed/data_wait": self._seconds_waiting / elapsed,
        }
        if self._peak_seconds:
            metrics["speed/mfu"] = self._num_crops * self._peak_seconds / elapsed
        return metrics


def speed_texts(metrics: dict[str, Any]) -> dict[str, str]:
    """Share of waiting and MFU as texts for the screen, of those that were logged."""
    keys = {"data wait": "speed/data_wait", "MFU": "speed/mfu"}
    return {
        label: f"{float(metrics[key]):.0%}".replace("%", " %")
        for label, key in keys.items()
        if key in metrics and math.isfinite(float(metrics[key]))
    }
