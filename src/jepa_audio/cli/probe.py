"""The command `probe`: scores, then the leaderboard and the pictures of all results."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from rich.console import Console

from jepa_audio.probing import run
from jepa_audio.report.page import write_leaderboard
from jepa_audio.report.results import terminal_table


# The decorator replaces the signature and the docstring: they are the options and the help.
@functools.wraps(run.probe)
def probe(**settings: Any) -> None:
    """Run the probes and write their leaderboard and pictures."""
    results = Path(settings["output"]) / "results.jsonl"
    rows = run.probe(**settings)
    write_leaderboard(results)
    Console().print(terminal_table(rows))
