"""Upload an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import logging
from pathlib import Path

from jepa_audio.errors import UserError
from jepa_audio.inference.folder import is_encoder_folder

log = logging.getLogger(__name__)


def push_folder(folder: Path, name: str, *, private: bool = False) -> str:
    """Upload a folder of `export_hugging_face`; the repository is created if it does not exist.

    The token is that of `hf auth login` or of the variable `HF_TOKEN`.

    Args:
        folder: the exported folder.
        name: "user/name" of the repository.
        private: create a private repository.

    Returns:
        The address of the repository.

    Raises:
        UserError: if the folder is not an exported one, or if the Hub refuses the upload.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
    )

    if not is_encoder_folder(folder) or not (folder / "README.md").is_file():
        raise UserError(
            f"{folder} is not a folder of `jepa-audio export hf`: config.json, model.safetensors "
            "or README.md is missing"
        )
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"the repository ({name!r}) must be USER/NAME")
    if "\n# license:" in (folder / "README.md").read_text(encoding="utf-8"):
        log.warning("%s: no licence is stated; fill in `license`", folder / "README.md")
    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by jepa-audio")
    except LocalTokenNotFoundError:
        raise UserError(
            "the Hugging Face Hub needs a token: `hf auth login`, or set `HF_TOKEN`"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{name} was not uploaded: {reason}") from error
    return str(address)
