"""Speed, waiting and model utilisation: the peaks of devices, the log, a device without a peak."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from jepa_audio.training.cost import crop_flops, expected_sizes
from jepa_audio.training.watching import speed
from jepa_audio.training.watching.speed import SpeedMeter, peak_flops, speed_texts

NAMES = {
    "NVIDIA H200": 989.4,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40": 181.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA A10": 125.0,
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA A10G": None,
    "Tesla V100-SXM2-16GB": None,
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items())
def test_the_peak_of_a_gpu_is_that_of_the_table(name: str, expected: float | None):
    found = speed._table_peak(name, "bf16-mixed")
    assert found == (None if expected is None else pytest.approx(expected * 1e12))


def test_float32_has_the_peak_of_the_products_that_torch_uses():
    assert speed._table_peak("NVIDIA H200", "32-true") == pytest.approx(66.9e12)
    torch.set_float32_matmul_precision("high")
    try:
        assert speed._table_peak("NVIDIA H200", "32-true") == pytest.approx(494.7e12)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_peak_of_a_cpu_is_measured_once_and_draws_no_random_numbers(
    monkeypatch: pytest.MonkeyPatch,
):
    state = torch.get_rng_state()
    speed._measured_peak.cache_clear()
    peak = peak_flops(torch.device("cpu"), "32-true")
    assert 1e8 < peak < 1e15
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(speed, "_MATRIX_SIZE", 0)
    assert peak_flops(torch.device("cpu"), "32-true") == peak


def test_an_unknown_device_has_no_peak():
    assert peak_flops(torch.device("mps"), "32-true") is None


@pytest.fixture
def logged(tiny_cli: Callable, fit: Callable, tmp_path: Path) -> Callable[..., pd.DataFrame]:
    """`logged("--monitor.every_n_steps=1")`: the metrics of a run, as written."""

    def run(*settings: str) -> pd.DataFrame:
        logger = f"{{class_path: CSVLogger, init_args: {{save_dir: {tmp_path}}}}}"
        fit(tiny_cli("wave", f"--trainer.logger=[{logger}]", *settings))
        return pd.concat(map(pd.read_csv, tmp_path.rglob("metrics.csv")))

    return run


def test_mfu_is_the_operations_of_the_crops_of_a_second_as_a_share_of_the_peak(
    logged: Callable, tiny_jepa: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(speed, "peak_flops", lambda *_: 1e9)
    metrics = logged("--monitor.every_n_steps=2", "--trainer.accumulate_grad_batches=2")
    metrics = metrics[metrics["speed/mfu"].notna()]
    jepa = tiny_jepa("wave")
    parts = crop_flops(jepa, 500, expected_sizes(jepa, 500, 0, 6))
    flops = sum(part.total for part in parts.values())
    crops = metrics["speed/audio_seconds_per_second"] / 0.5
    assert metrics["speed/mfu"].tolist() == pytest.approx((crops * flops / 1e9).tolist(), rel=1e-6)
    # The first step, which is measured too, waits for the start of the workers.
    assert metrics["step"].tolist() == [2, 4, 6]
    assert metrics["speed/crops_per_second"].tolist() == pytest.approx(crops.tolist(), rel=1e-6)
    assert metrics["speed/data_wait"].between(0, 1).all()


def test_a_device_without_a_known_peak_is_named_once_and_logs_no_mfu(
    logged: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(speed, "peak_flops", lambda *_: None)
    caplog.set_level(logging.INFO)
    metrics = logged("--monitor.every_n_steps=2")
    assert "speed/mfu" not in metrics
    assert metrics["speed/data_wait"].notna().any()
    assert sum("`speed/mfu` is not logged" in text for text in caplog.messages) == 1


def test_waiting_counts_from_the_end_of_a_batch_to_the_start_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
):
    clock = iter([0.0, 1.0, 4.0, 5.0, 8.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    meter = SpeedMeter()
    meter.start_batch()
    meter.end_batch()
    meter.start_batch()
    assert meter.read()["speed/data_wait"] == 2 / 8


def test_the_texts_for_the_screen_have_only_what_was_logged():
    metrics = {"speed/data_wait": torch.tensor(0.034), "speed/mfu": torch.tensor(0.412)}
    assert speed_texts(metrics) == {"data wait": "3 %", "MFU": "41 %"}
    assert speed_texts({"speed/mfu": float("nan")}) == {}
