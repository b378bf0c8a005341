"""Published splits that no raw data set brings along, as versioned data with checksums."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from typing import Any

from jepa_audio.errors import UserError

CHECKSUMS = {"gtzan": "417da1ac79518cf41329e3c325677aec4445884967f14143a21e71b75816b7d6"}
"""sha256 of every split file; a split that is changed is another split, under another name."""


def load_splits(name: str) -> dict[str, Any]:
    """What `NAME.json` holds: for each split of "train", "val" and "test" what its data set's module makes files of.

    Raises:
        UserError: if there is no such file, or if it is not the one that was published.
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
            f"{file} has the sha256 checksum {checksum}, must have {CHECKSUMS[name]}: it has been changed, and "
            "scores on it would be comparable with no others; install the package anew"
        )
    return dict(json.loads(text))
