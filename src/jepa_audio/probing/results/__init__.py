"""Results: rows and what they rest on, the leaderboard beside published numbers, and pictures."""

from jepa_audio.probing.results.rows import (
    STATISTICS,
    TWIN,
    Evidence,
    ProbeRow,
    Score,
    append_jsonl,
    current,
    latest,
    load_evidence,
    mean_over_seeds,
    name_of,
    read_jsonl,
    save_evidence,
    table,
)

__all__ = [
    "STATISTICS",
    "TWIN",
    "Evidence",
    "ProbeRow",
    "Score",
    "append_jsonl",
    "current",
    "latest",
    "load_evidence",
    "mean_over_seeds",
    "name_of",
    "read_jsonl",
    "save_evidence",
    "table",
]
