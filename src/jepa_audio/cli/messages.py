"""What a command prints besides its results: log messages, warnings and errors."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator

from rich.console import Console
from rich.logging import RichHandler

from jepa_audio.errors import MissingFileError, UserError

BUG_REPORT = (
    "jepa-audio: this is a bug in jepa-audio, not a mistake in your input. Please report it with "
    "the command, the traceback below and the output of `jepa-audio --version`."
)

# (category, regular expression of the text, reason): warnings that correct use raises, and that
# nobody has to act on. All others are shown. The tests ignore the same ones.
EXPECTED_WARNINGS: tuple[tuple[type[Warning], str, str], ...] = (
    (
        UserWarning,
        r"LightningCLI's args parameter is intended to run from within Python",
        "the words of the command line are passed on with paths instead of names of recipes",
    ),
    (
        UserWarning,
        r"Attribute '\w+' is an instance of `nn\.Module` and is already saved",
        "the settings of the modules are saved, because a checkpoint rebuilds the model from them",
    ),
    (
        UserWarning,
        r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
        "a resumed run, a validation or a test may have other callbacks, or other settings of them",
    ),
    (
        UserWarning,
        r"Total length of `list` across ranks is zero",
        "a run without validation files has no validation loader",
    ),
    (
        UserWarning,
        r"The dirpath has changed from .* therefore `best_model_score`",
        "a run folder may be moved; the run continues, and saves only its last state",
    ),
    (
        FutureWarning,
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        "Lightning 2.6 calls it with torch 2.11 and newer",
    ),
    (
        DeprecationWarning,
        r"\s*(``ArgumentParser\.add_instantiator``|``instantiate_classes``|skip_none parameter)",
        "Lightning 2.6 calls what jsonargparse 5 removes; we require jsonargparse < 5",
    ),
    (
        DeprecationWarning,
        r"\s*By default only one JsonargparseDeprecationWarning per type is shown",
        "it comes with the warnings of the line above",
    ),
)


def show_messages() -> None:
    """Print log messages of level INFO and all warnings except the expected ones."""
    # Lines in a file are not wrapped, so that they can be searched.
    handler = RichHandler(show_path=False) if sys.stderr.isatty() else logging.StreamHandler()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    # Lightning advertises other products at the start of a run.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "💡" not in record.getMessage()
    )
    for category, message, _ in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message, category)


def print_error(error: Exception) -> bool:
    """Print the message of a mistake that the user can correct; else print how to report the bug.

    Returns:
        Whether the user can correct it. If not, the caller lets the traceback appear.
    """
    message, is_on_all_ranks = user_message(error)
    if message is None:
        print(BUG_REPORT, file=sys.stderr)
        return False
    if not (is_on_all_ranks and _rank()):
        Console(stderr=True).print(
            f"jepa-audio: {message}", style="red", highlight=False, markup=False, soft_wrap=True
        )
    return True


def user_message(error: BaseException) -> tuple[str | None, bool]:
    """The message of a mistake that the user can correct, `None` for any other error.

    The second value is whether every process of the run raises the same error.
    """
    # The errors of light commands, which have not imported torch.
    if type(error) in (UserError, MissingFileError):
        return _without_traceback(error), False
    from jepa_audio.data.corpus.table import CorpusError  # noqa: PLC0415
    from jepa_audio.data.loading.workers import worker_crash_message  # noqa: PLC0415
    from jepa_audio.training.checkpointing import CheckpointWriteError  # noqa: PLC0415
    from jepa_audio.training.finite_guard import NonFiniteError  # noqa: PLC0415

    # A logger that cannot close its files raises another error on top of the first.
    for link in _chain(error):
        if isinstance(link, NonFiniteError | CheckpointWriteError):
            return str(link), True
        if isinstance(link, CorpusError):
            return _without_traceback(link), False
        if (message := worker_crash_message(link)) is not None:
            return message, False
    return (_without_traceback(error), False) if isinstance(error, UserError) else (None, False)


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _without_traceback(error: BaseException) -> str:
    """The message of an error; an error from a loader process contains the traceback there."""
    text = str(error)
    if not text.startswith("Caught "):
        return text
    kind = type(error)
    return text.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()


def _rank() -> int | None:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only  # noqa: PLC0415

    return getattr(rank_zero_only, "rank", None)
