"""Print log messages, warnings and errors of a command."""

from __future__ import annotations

import errno
import logging
import sys
import warnings
from collections.abc import Iterator
from types import FrameType

from rich.console import Console
from rich.logging import RichHandler

from jepa_audio.cli.config_errors import attempts, config_sentence
from jepa_audio.errors import MissingFileError, UserError, printable

BUG_REPORT = (
    "jepa-audio: this is a bug in jepa-audio, not a mistake in your input. Please report the "
    "command, the traceback below and the output of `jepa-audio --version`."
)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
_DISK_ERRORS = (*_DISK_FULL, *_PATH_ERRORS, errno.EIO, errno.ENAMETOOLONG)

# Regular expressions of warnings that correct use raises and that need no action. All other
# warnings are shown. The tests ignore the same warnings.
EXPECTED_WARNINGS = (
    # Names of recipes in the command line are replaced by paths before Lightning gets it.
    r"LightningCLI's args parameter is intended to run from within Python",
    # The settings of the modules are saved, because they rebuild the model of a checkpoint.
    r"Attribute '\w+' is an instance of `nn\.Module` and is already saved",
    # A resumed run, a validation or a test may have other callbacks or callback settings.
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
    # A run without validation files has no validation loader.
    r"Total length of `list` across ranks is zero",
    # A run folder may be moved; the run continues and saves only its last state.
    r"The dirpath has changed from .* therefore `best_model_score`",
    # `LossLog` adds the sums of all processes before it logs a loss.
    r"It is recommended to use `self\.log\('(valid|test)/loss'",
    # Lightning 2.6 calls this function with torch 2.11 and newer.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # Lightning 2.6 calls functions that jsonargparse 5 removes; we require jsonargparse < 5.
    r"\s*(``ArgumentParser\.add_instantiator``|``instantiate_classes``|skip_none parameter)",
    # jsonargparse adds this warning to the warnings of the line above.
    r"\s*By default only one JsonargparseDeprecationWarning per type is shown",
)


def show_messages() -> None:
    """Print log messages of level INFO and all warnings except the expected ones."""
    # The `StreamHandler` does not wrap lines, so that a log file can be searched.
    handler = RichHandler(show_path=False) if sys.stderr.isatty() else logging.StreamHandler()
    handler.addFilter(_escape)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    # At the start of a run, Lightning advertises other products, and names a device nobody has.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not record.getMessage().startswith(("💡", "TPU available: False"))
    )
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)


def _escape(record: logging.LogRecord) -> bool:
    """Escape control characters in the names of files that a message contains."""
    record.msg, record.args = printable(record.getMessage()), None
    return True


def print_error(error: Exception) -> bool:
    """Print the message of an error that the user can correct, or how to report a bug.

    Returns:
        Whether the user can correct the error; if not, the caller raises it again.
    """
    message, is_on_all_ranks = user_message(error)
    if message is None:
        print(BUG_REPORT, file=sys.stderr)
        return False
    if not is_on_all_ranks or _is_rank_zero():
        Console(stderr=True).print(
            f"jepa-audio: {printable(message)}",
            style="red",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    return True


def user_message(error: BaseException) -> tuple[str | None, bool]:
    """The message of an error that the user can correct, or `None` for other errors.

    The second value is whether all processes of a distributed run raise the same error.
    """
    # These errors need none of the imports below, which take seconds.
    if type(error) in (UserError, MissingFileError):
        return _without_traceback(error), False
    from jepa_audio.data.corpus.table import CorpusError  # noqa: PLC0415
    from jepa_audio.data.loading.workers import worker_crash_message  # noqa: PLC0415
    from jepa_audio.training.run.checkpointing import CheckpointWriteError  # noqa: PLC0415
    from jepa_audio.training.run.folder import RunFolderError  # noqa: PLC0415
    from jepa_audio.training.watching.finite_guard import NonFiniteError  # noqa: PLC0415

    # A logger that cannot close its files raises another error after the first one.
    for link in _chain(error):
        if isinstance(link, NonFiniteError | CheckpointWriteError | RunFolderError):
            return str(link), True
        if isinstance(link, CorpusError):
            return _without_traceback(link), False
        if (message := worker_crash_message(link)) is not None:
            return message, False
    if isinstance(error, UserError):
        return _without_traceback(error), False
    return _disk_message(error) or _settings_message(error), False


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _disk_message(error: BaseException) -> str | None:
    """The message of an error of the file system that no program can prevent, or `None`."""
    for link in _chain(error):
        if isinstance(link, OSError) and (link.errno in _DISK_ERRORS or _is_of_mkdir(link)):
            name = f"{link.filename}: " if link.filename else ""
            remedy = "free disk space, then repeat the command"
            if link.errno not in _DISK_FULL:
                remedy = "check the path, its permissions and the disk"
            return f"{name}{link.strerror}; {remedy}. Files that were complete before remain valid"
    return None


def _is_of_mkdir(error: OSError) -> bool:
    """Whether a folder cannot be made: a file has its name, or its parent takes no folders."""
    frame = _last_frame(error)
    # In Python 3.13 and newer, the module is in the package `pathlib`.
    is_pathlib = _origin(error) == "pathlib"
    return frame is not None and is_pathlib and frame.f_code.co_name == "mkdir"


def _settings_message(error: BaseException) -> str | None:
    """The message of a library that refuses a setting of the user, or `None` for other errors."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException  # noqa: PLC0415

    if isinstance(error, MisconfigurationException):
        return " ".join(str(error).split())
    if not isinstance(error, ValueError | TypeError | ImportError):
        return None
    if _origin(error) == "jsonargparse":
        reasons = []
        for cause in _causes(error):
            if isinstance(cause, UserError):
                return str(cause)
            if _origin(cause) in ("lightning", "torch", "importlib"):
                reasons.append(" ".join(str(cause).split()))
            elif _origin(cause) != "jsonargparse":
                return None
        has_class = not reasons or "Problem with given class_path" in str(error)
        return config_sentence(str(error)) if has_class else reasons[0]
    # Constructors of optimizers check their settings.
    is_optimizer = _origin(error) == "torch" and _module(error).startswith("torch.optim")
    return str(error) if is_optimizer else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The errors in a chain, and those of all types that jsonargparse has tried."""
    for link in _chain(error):
        yield link
        for attempt in attempts(link):
            if attempt is not link.__cause__:
                yield from _causes(attempt)


def _origin(error: BaseException) -> str:
    """Name of the package whose code raised an error."""
    return _module(error).partition(".")[0]


def _module(error: BaseException) -> str:
    frame = _last_frame(error)
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


def _last_frame(error: BaseException) -> FrameType | None:
    """The frame that raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return None if trace is None else trace.tb_frame


def _without_traceback(error: BaseException) -> str:
    """The message of an error, without the traceback that torch adds in a loader process."""
    text = str(error)
    if not text.startswith("Caught "):
        return text
    kind = type(error)
    return text.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()


def _is_rank_zero() -> bool:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only  # noqa: PLC0415

    return not getattr(rank_zero_only, "rank", None)
