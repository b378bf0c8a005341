"""Rows of results for tests, with their evidence."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jepa_audio.probing.intervals import Difference, interval
from jepa_audio.probing.rows import Evidence, ProbeRow, Score, append_rows, save_evidence


def a_row(**changes: object) -> ProbeRow:
    """A result of an encoder with four layers, with a difference to its random-init baseline."""
    metric = changes.get("metric", "accuracy")
    fields: dict = {
        "encoder": "mel",
        "variant": "context",
        "encoder_hash": "0" * 64,
        "pooling": "mean/mean",
        "task": "nsynth_pitch",
        "preset": "linear",
        "select": "best",
        "head": "logistic",
        "layer": "block 1",
        "setting": 1.0,
        "setting_name": "penalty",
        "seed": 0,
        "decoder": None,
        "unit": "file",
        "metric": metric,
        "scores": {metric: Score(0.35, 0.3, 0.4)},
        "chance": 0.2,
        "valid": 0.4,
        "layers": ("input", "block 1", "block 2", "weighted sum"),
        "settings": (0.1, 1.0),
        "valid_grid": ((0.1, 0.2), (0.3, 0.4), (0.2, 0.3), (0.35, 0.1)),
        "num_train": 9,
        "num_valid": 9,
        "num_test": 77,
        "class_names": ("a", "b", "c", "d", "e"),
        "evidence": "evidence/0.npz",
        "against_random": Difference(0.1, 0.05, 0.15),
        "robustness": None,
        "robustness_area": None,
        "split_checksum": "abcdef0123",
        "versions": {},
    }
    return ProbeRow(**(fields | changes))


def baseline(**changes: object) -> ProbeRow:
    """Log-mel statistics: one layer, no random-init baseline."""
    one_layer = {
        "layer": "statistics",
        "layers": ("statistics",),
        "valid_grid": ((0.2, 0.3),),
        "valid": 0.3,
    }
    names = {"encoder": "log-mel", "variant": "statistics", "against_random": None}
    return a_row(**(names | one_layer | changes))


def evidence_of(
    draws: dict[str, np.ndarray], num_units: int = 5, uids: tuple[str, ...] = ()
) -> Evidence:
    predictions = np.zeros((num_units, 5), dtype=np.float32)
    names = uids or tuple(f"clip {i}" for i in range(num_units))
    return Evidence(predictions, np.zeros(num_units, dtype=np.int64), names, draws)


def add(results: Path, value: float, draws: np.ndarray, **changes: object) -> ProbeRow:
    """Append a row whose headline metric has this value and these draws."""
    return add_scores(results, {str(changes.get("metric", "accuracy")): (value, draws)}, **changes)


def add_scores(
    results: Path, scores: dict[str, tuple[float, np.ndarray]], **changes: object
) -> ProbeRow:
    """Append a row of several metrics; the default hash is the encoder and its variant."""
    number = len(results.read_text().splitlines()) if results.exists() else 0
    intervals = {name: Score(value, *interval(draws)) for name, (value, draws) in scores.items()}
    uids = changes.pop("uids", ())
    row = a_row(scores=intervals, evidence=f"evidence/{number}.npz", against_random=None, **changes)
    if "encoder_hash" not in changes:
        row = a_row(**{**row.__dict__, "encoder_hash": f"{row.encoder} {row.variant}"})
    draws_of = {name: draws.astype(np.float32) for name, (_, draws) in scores.items()}
    save_evidence(results.parent / row.evidence, evidence_of(draws_of, uids=uids))
    append_rows(results, [row])
    return row
