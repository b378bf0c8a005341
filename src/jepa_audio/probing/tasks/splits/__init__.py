"""Published splits that raw data sets do not include, as versioned files with checksums."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from typing import Any

from jepa_audio.errors import UserError

CHECKSUMS = {"gtzan": "417da1ac79518cf41329e3c325677aec4445884967f14143a21e71b75816b7d6"}
"""sha256 of every split file; a changed split is another split and needs another name."""


def load_splits(name: str) -> dict[str, Any]:
    """Read `NAME.json`: for "train", "val" and "test", what the data set's module expects.

    Raises:
        UserError: if there is no such file, or if its checksum is wrong.
    """
    if name not in CHECKSUMS:
        raise UserError(
            f"there is no split file for {name!r}, only for {', '.join(sorted(CHECKSUMS))}"
        )
    file = resources.files(__name__).joinpath(f"{name}.json")
    text = file.read_text(encoding="utf-8")  # not bytes: line ends differ between checkouts
    checksum = hashlib.sha256(text.encode()).hexdigest()
    if checksum != CHECKSUMS[name]:
        raise UserError(
            f"{file} has the sha256 checksum {checksum}, must have {CHECKSUMS[name]}: the file was "
            "changed, and scores on it would not be comparable; install the package again"
        )
    return dict(json.loads(text))
