"""The command `jepa-audio`: a table of commands, whose functions are imported when called."""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version

from jepa_audio.class_paths import TRUST_HELP, split_trusted, trusting
from jepa_audio.errors import UserError, nearest


@dataclass(frozen=True)
class Command:
    """A command of the table.

    Attributes:
        function: "module:function", imported when the command is called.
        help: line of the command in `jepa-audio --help`.
        has_parser: True if the function parses the command line itself. If False, a parser is made
            from the arguments of the function.
        as_positional: True if required arguments are positional, False if they are options.
    """

    function: str
    help: str
    has_parser: bool = False
    as_positional: bool = True


_CLI = "jepa_audio.cli"
COMMANDS = {
    "fit": Command(
        f"{_CLI}.trainer:run", "pretrain a model: --config wavjepa --data.root DIR", True
    ),
    "validate": Command(f"{_CLI}.trainer:run", "compute the loss on validation files", True),
    "test": Command(f"{_CLI}.trainer:run", "compute the loss on test files", True),
    "probe": Command(
        f"{_CLI}.probe:probe",
        "score frozen encoders on labelled tasks, with random-init and log-mel baselines",
        as_positional=False,
    ),
    "embed": Command(
        "jepa_audio.inference.embedding.run:embed",
        "write one vector for each clip of a corpus: ENCODER SOURCE... -o out.parquet",
    ),
    "finetune": Command(
        f"{_CLI}.finetune:finetune",
        "train an encoder and a head on a labelled task: --encoder CKPT --task labels.csv",
        True,
    ),
    "report": Command(
        "jepa_audio.report.page:write_report",
        "write one HTML page about the runs of a folder: curves, masks, probe results",
    ),
    "runs ls": Command(
        f"{_CLI}.runs:ls", "list runs: recipe, steps, state, last loss and rank, probe score"
    ),
    "runs show": Command(f"{_CLI}.runs:show", "show one run: settings, metrics, files"),
    "runs compare": Command(
        f"{_CLI}.runs:compare", "settings that differ between runs, and their results"
    ),
    "runs best": Command(f"{_CLI}.runs:best", "rank runs by a metric or by a probing task"),
    "plot attention": Command(
        f"{_CLI}.plot:attention", "draw where an encoder attends on the spectrogram of a clip"
    ),
    "plot latents": Command(
        f"{_CLI}.plot:latents", "draw a map of embeddings: PCA, and UMAP if it is installed"
    ),
    "plot neighbours": Command(
        f"{_CLI}.plot:neighbours", "write a page with clips and their nearest clips, with players"
    ),
    "plot runs": Command(
        f"{_CLI}.plot:runs", "draw loss, rank and probe scores of several runs in one figure"
    ),
    "import": Command(
        f"{_CLI}.models:import_published", "convert published WavJEPA or PupuJEPA weights"
    ),
    "export hf": Command(
        f"{_CLI}.export:hf", "write an encoder as a model for the transformers library"
    ),
    "export onnx": Command(f"{_CLI}.export:onnx", "write an encoder as an ONNX model"),
    "export torch": Command(f"{_CLI}.export:torch", "write an encoder as a torch.export program"),
    "export marble": Command(
        f"{_CLI}.export:marble", "write the settings of a task of MARBLE v2 for an encoder"
    ),
    "export push": Command(
        f"{_CLI}.export:push", "upload a folder of `export hf` to the Hugging Face Hub"
    ),
    "export wavjepa": Command(
        f"{_CLI}.export:wavjepa", "write a checkpoint in the published layout of WavJEPA"
    ),
    "export pupujepa": Command(
        f"{_CLI}.export:pupujepa", "write a checkpoint in the published layout of PupuJEPA"
    ),
    "configs": Command(f"{_CLI}.configs:list_recipes", "list the recipes for --config"),
    "configs copy": Command(f"{_CLI}.configs:copy", "copy a recipe to a file that you can edit"),
    "data index": Command(
        f"{_CLI}.data:index", "read every audio file once and write a table of the corpus"
    ),
    "data describe": Command(
        f"{_CLI}.data:describe",
        "print hours, sample rates, lengths, levels, the shortest and quietest files",
    ),
    "data verify": Command(
        f"{_CLI}.data:verify", "read every file again and compare it with the table"
    ),
    "data split": Command(
        f"{_CLI}.data:split", "assign train, valid and test splits; each group is in one split"
    ),
    "data pack": Command(
        f"{_CLI}.data:pack", "write a corpus as tars in WebDataset's layout, optionally resampled"
    ),
    "data stats": Command(
        f"{_CLI}.trainer:measure_stats",
        "measure mean and standard deviation for a spectrogram front end",
        True,
    ),
    "data synth": Command(
        "jepa_audio.data.synthetic.corpus:synthesize_corpus",
        "write a labelled corpus of synthetic notes in NSynth's layout",
    ),
    "data convert": Command(
        "jepa_audio.probing.convert:convert",
        "convert a downloaded labelled data set to records for `probe`",
    ),
}


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; print the message of a `UserError`, and the traceback of other errors."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        try:
            run(args)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("jepa-audio: stopped", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_stdout_closed():
            raise SystemExit(128 + signal.SIGPIPE) from None
        from jepa_audio.cli.messages import print_error  # noqa: PLC0415

        if not print_error(error):
            raise
        raise SystemExit(1) from None


def run(args: list[str]) -> None:
    """Find the command at the start of `args`, import its function and call it.

    Raises:
        UserError: if the command does not exist.
    """
    args, trusted = split_trusted(args)
    name = " ".join(args[:2]) if " ".join(args[:2]) in COMMANDS else "".join(args[:1])
    if name in COMMANDS:
        with trusting(trusted):
            _call(name, args)
    elif name in ("", "-h", "--help", "help"):
        print(_help(COMMANDS))
    elif name == "--version":
        print(_versions())
    else:
        group = [command for command in COMMANDS if command.startswith(f"{name} ")]
        if not group:
            raise UserError(
                f"'{name}' is not a command; did you mean '{nearest(name, COMMANDS)}'?\n\n"
                f"{_help(COMMANDS)}"
            )
        second = "".join(args[1:2])
        if second not in ("", "-h", "--help"):
            known = [command.split()[1] for command in group]
            raise UserError(
                f"'{name} {second}' is not a command; did you mean "
                f"'{name} {nearest(second, known)}'?\n\n"
                f"{_help(group)}"
            )
        print(_help(group))


def _call(name: str, args: list[str]) -> None:
    # The first process of a run started this one, or a launcher did.
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if is_first and sys.stderr.isatty():
        print(f"jepa-audio {name}: loading packages", file=sys.stderr, flush=True)
    from jepa_audio.cli.messages import show_messages  # noqa: PLC0415

    if not is_first:
        from jepa_audio.parallel import end_with_parent  # noqa: PLC0415

        end_with_parent()
    # Python looks for modules of the user in the working directory, as it does for `python -m`.
    if (folder := os.getcwd()) not in sys.path:  # noqa: PTH109 (`pathlib` is not needed otherwise)
        sys.path.append(folder)
    with _without_garbage_collection():
        command, function = COMMANDS[name], load_function(name)
    # Lightning must be imported first: otherwise its loggers print every message twice.
    show_messages()
    if command.has_parser:
        function(args)
    else:
        from jepa_audio.cli.parser import run_function  # noqa: PLC0415

        run_function(name, function, args[len(name.split()) :], command.as_positional)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Imports make a million objects that all stay: collections between them take 1 s of 10.

    Later collections leave these objects out. Only the first call of a process has an effect: what
    a second call would leave out may be garbage.
    """
    if not gc.isenabled() or gc.get_freeze_count():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def load_function(name: str) -> Callable[..., object]:
    """Import the function of a command."""
    module, _, function = COMMANDS[name].function.partition(":")
    return getattr(import_module(module), function)


def _help(names: Iterable[str]) -> str:
    lines = [f"  {name:17}{COMMANDS[name].help}" for name in names]
    return "\n".join(
        [
            "usage: jepa-audio COMMAND ...",
            "",
            *lines,
            "",
            "`jepa-audio COMMAND --help` shows the options of a command.",
            "`jepa-audio fit --config wavjepa --print_config` shows all settings of a run.",
            TRUST_HELP,
        ]
    )


def _versions() -> str:
    packages = ("jepa-audio", "torch", "torchaudio", "lightning", "jsonargparse", "numpy")
    python = f"Python {sys.version.split()[0]} on {sys.platform}"
    return ", ".join([*(f"{package} {version(package)}" for package in packages), python])


def _is_stdout_closed() -> bool:
    """Whether the reader has closed standard output, as in `jepa-audio --help | head -3`."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)
    if not poller.poll(0):
        return False
    # The interpreter flushes standard output at exit. On the null device, this does not fail.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True
