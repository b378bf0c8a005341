"""The command `probe`: run the probes, then write the leaderboard and figures of all results."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from rich.console import Console

from jepa_audio.probing import run
from jepa_audio.report.page import write_leaderboard
from jepa_audio.report.results import terminal_table


# `wraps` copies the signature and the docstring of `run.probe`: the options and the help.
@functools.wraps(run.probe)
def probe(**settings: Any) -> None:
    """Run the probes, and write the leaderboard and figures."""
    results = Path(settings["output"]) / "results.jsonl"
    rows = run.probe(**settings)
    write_leaderboard(results)
    Console().print(terminal_table(rows))
