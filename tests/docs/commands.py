"""Run or check the commands of a page.

The pages show what users type. The runs are shortened here: `shortened` adds options that make the
networks tiny and the runs two steps long. Options that a page gives win, except for the length.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, Block

# Added after the recipes of a command; later options of the page win.
TINY = (
    "--model.encoder.embed_dim=24",
    "--model.encoder.num_heads=2",
    "--model.encoder.depth=2",
    "--model.predictor.trunk.embed_dim=16",
    "--model.predictor.trunk.num_heads=2",
    "--model.predictor.trunk.depth=1",
)
NARROW = "--model.front_end.init_args.conv_layers=[[8,10,5],[8,8,4],[8,4,4],[8,4,4]]"
# Added at the end.
SHORT = (
    "--data.batch_size=2",
    "--data.num_workers=0",
    "--data.min_seconds=0.1",
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.limit_val_batches=1",
)
LENGTHS = {
    "data synth": ("--num_train=60", "--num_valid=24", "--num_test=24"),
    "finetune": ("--trainer.max_epochs=1", "--data.batch_size=8", "--trainer.accelerator=cpu"),
}
FIT = ("fit", "validate", "test", "data stats")
_LAUNCHER = re.compile(r"^(?:torchrun|srun|docker run) .*?(?:-m jepa_audio|jepa-audio) ")


def command_of(words: Sequence[str]) -> str:
    """The name of a command of `jepa-audio`, of one or two words."""
    from jepa_audio.cli.main import COMMANDS

    return " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else "".join(words[:1])


def shortened(words: Sequence[str]) -> list[str]:
    """The words of a command with the options that make it short."""
    from jepa_audio.cli.main import COMMANDS
    from jepa_audio.recipes import find_recipe

    words, name = list(words), command_of(words)
    asks = {"--help", "--print_config", "-h"} & {*words} or any(".help" in word for word in words)
    if asks or name not in COMMANDS:
        return words
    if name not in FIT:
        return [*words, *LENGTHS.get(name, ())]
    places = [i + 1 for i, word in enumerate(words[:-1]) if word in ("--config", "-c")]
    if not places:
        return words
    files = [find_recipe(words[place]) for place in places]
    text = "".join(file.read_text() for file in files)
    is_saved = any(file.name == "config.yaml" for file in files)  # of a run, which is tiny
    tiny = [] if is_saved else [*TINY, *([NARROW] if "WaveformFrontEnd" in text else [])]
    tiny += ["--model.targets.top_k=1"] if "top_k: " in text and not is_saved else []
    words[places[-1] + 1 : places[-1] + 1] = tiny
    # A continued run has a step to do.
    steps = 3 if "--ckpt_path" in words else 2
    return [*words, *SHORT, f"--trainer.max_steps={steps}"]


def jepa_audio_words(command: str) -> list[str] | None:
    """The words after `jepa-audio` of a line, also if a launcher starts it; `None` if none."""
    command = _LAUNCHER.sub("jepa-audio ", command)
    words = shlex.split(command, comments=True)
    starts = (["jepa-audio"], [".venv/bin/jepa-audio"], ["python", "-m", "jepa_audio"])
    return next((words[len(s) :] for s in starts if words[: len(s)] == s), None)


def run_block(block: Block, folder: Path) -> None:
    """Run the commands of a block in the working directory; the last one may have to fail."""
    *first, last = block.commands
    for command in first:
        run_command(command, folder)
    if not block.fails:
        run_command(last, folder)
        return
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit):
        run_command(last, folder)
    assert block.fails in errors.getvalue()


def run_command(command: str, folder: Path) -> None:
    """Run a line: `jepa-audio` in this process, `pip install` of a folder, others in a shell."""
    from jepa_audio.cli.main import main

    words = jepa_audio_words(command)
    if words is not None:
        try:
            main(shortened(words))
        except SystemExit as end:  # `--help` and `--print_config` exit with 0
            if end.code not in (0, None):
                raise
    elif match := re.match(r"pip install (?:-e )?([\w./-]+/)$", command):
        install_package(folder / match[1], folder / "site")
    elif command.startswith("make "):
        check_command(command)
    else:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        subprocess.run(["bash", "-euc", command], check=True, env={**os.environ, "PATH": path})


def install_package(source: Path, target: Path) -> None:
    """Install a package of a page for this process, without the network."""
    installer = [sys.executable, "-m", "uv", "pip", "install", "--offline", "--no-deps", "--quiet"]
    where = ["--no-build-isolation", "--python", sys.executable, "--target", str(target)]
    subprocess.run([*installer, *where, str(source)], check=True)
    sys.path.insert(0, str(target))


def check_block(block: Block) -> None:
    """Check the syntax of a block that is not run, and the arguments of each command in it."""
    subprocess.run(["bash", "-nc", block.text], check=True)
    for command in block.commands:
        check_command(command)


def check_command(command: str) -> None:
    """Parse a line with the real parser, and call nothing; `make` and `pip` are checked by name."""
    words = jepa_audio_words(command)
    if words is not None:
        parse_words(words)
    elif command.startswith("make "):
        target = shlex.split(command, comments=True)[1]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
    elif command.startswith("pip install "):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = extras["optional-dependencies"]
        for named in re.findall(r"\[([\w,]+)\]", command):
            assert set(named.split(",")) <= extras.keys(), command


def parse_words(words: list[str]) -> None:
    """Parse the arguments of a command of `jepa-audio` with its parser."""
    from jepa_audio.cli import main as cli

    name = command_of(words)
    assert name in cli.COMMANDS, words
    if not cli.COMMANDS[name].has_parser:
        function = cli.load_function(name)
        # The parser reads the signature and the docstring of the function.
        nothing = functools.wraps(function)(lambda *_, **__: None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli, "load_function", lambda _: nothing)
            cli.main(words)
        return
    words = ["fit", *words[2:]] if name == "data stats" else words
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
        cli.main([*words, "--print_config"])
    assert end.value.code == 0, words
