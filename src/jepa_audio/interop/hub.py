"""Upload an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import logging
from pathlib import Path

from jepa_audio.errors import UserError
from jepa_audio.inference.folder import is_encoder_folder

log = logging.getLogger(__name__)


def check_name(name: str) -> None:
    """Raise `UserError` if no repository can have this name."""
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415
    from huggingface_hub.utils import validate_repo_id  # noqa: PLC0415

    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"the repository ({name!r}) must be USER/NAME")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"the repository ({name!r}) cannot have this name: {error}") from error


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
        UserError: if the folder is not an exported one, or if the Hub cannot be reached or refuses
            the upload.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        HfHubHTTPError,
        LocalTokenNotFoundError,
    )

    if not is_encoder_folder(folder) or not (folder / "README.md").is_file():
        raise UserError(
            f"{folder} is not a folder of `jepa-audio export hf`: config.json, model.safetensors "
            "or README.md is missing"
        )
    check_name(name)
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
    except Exception as error:
        if _is_unreachable(error):
            raise UserError(
                f"the Hub could not be reached: {_one_line(error)}; check the network, or "
                "`HF_ENDPOINT`"
            ) from error
        if isinstance(error, HfHubHTTPError | OSError):
            raise UserError(f"{name} was not uploaded: {_one_line(error)}") from error
        raise
    return str(address)


def _is_unreachable(error: BaseException) -> bool:
    """Whether there was no answer of a server; huggingface_hub has changed its HTTP library."""
    return any(
        cls is ConnectionError
        or (
            cls.__module__.partition(".")[0] in ("httpx", "httpx2", "requests")
            and cls.__name__ in ("TransportError", "ConnectionError", "Timeout")
        )
        for cls in type(error).__mro__
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
