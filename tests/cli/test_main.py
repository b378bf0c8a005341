"""The light part of the command: the table of commands, unknown commands, errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
from torch._utils import ExceptionWrapper

from jepa_audio.cli import main as cli
from jepa_audio.cli.messages import user_message
from jepa_audio.data.corpus.table import CorpusError
from jepa_audio.errors import MissingFileError, UserError, nearest
from jepa_audio.training.watching.finite_guard import NonFiniteError

HEAVY = ("torch", "numpy", "lightning", "jsonargparse", "pyarrow", "matplotlib", "rich")


def replace_command(
    monkeypatch: pytest.MonkeyPatch, name: str, function: Callable[..., object]
) -> None:
    """Let a command call another function, found by the name in the table as usual."""
    module = ModuleType("replaced_command")
    module.function = function
    monkeypatch.setitem(sys.modules, "replaced_command", module)
    monkeypatch.setitem(cli.COMMANDS, name, cli.Command("replaced_command:function", "replaced"))


def run_and_list_modules(args: list[str]) -> set[str]:
    code = (
        "import sys; from jepa_audio.cli.main import main\n"
        f"try: main({args})\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "args", [[], ["--help"], ["help"], ["--version"], ["data"], ["data", "--help"], ["configs"]]
)
def test_help_and_versions_import_nothing_heavy(args: list[str]):
    imported = run_and_list_modules(args)
    light_enough = {"rich", "jsonargparse"} if args == ["configs"] else set()
    assert imported & set(HEAVY) <= light_enough


@pytest.mark.parametrize(
    ("rank", "expected"), [("0", b"jepa-audio configs: loading packages\r\n"), ("1", b"")]
)
def test_a_command_says_in_a_terminal_that_it_loads(rank: str, expected: bytes):
    ours, theirs = os.openpty()
    environment = {**os.environ, "LOCAL_RANK": rank}
    command = [sys.executable, "-m", "jepa_audio", "configs"]
    subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # nothing was written
        shown = os.read(ours, 1000)
    os.close(ours)
    assert shown == expected


def test_a_command_collects_garbage_again_after_its_imports():
    code = (
        "import gc\n"
        "from jepa_audio.cli import main as cli\n"
        "during, load = [], cli.load_function\n"
        "cli.load_function = lambda name: (during.append(gc.isenabled()), load(name))[1]\n"
        "counts = []\n"
        "for _ in range(2):\n"
        "    cli.main(['configs'])\n"
        "    counts.append(gc.get_freeze_count())\n"
        "print(during, gc.isenabled(), counts[0] > 10_000, counts[1] <= counts[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[False, True] True True True"


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, jepa_audio; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & set(HEAVY)


def test_training_imports_no_package_that_it_does_not_use():
    code = "import sys, jepa_audio.cli.trainer; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"numba", "pandas", "sklearn", "umap"}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_of_the_table_exists(name: str):
    assert callable(cli.load_function(name))


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]):
    cli.main([])
    without = capsys.readouterr().out
    cli.main(["--help"])
    assert capsys.readouterr().out == without
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in without
        assert command.help in without
    assert max(map(len, without.splitlines())) <= 100


def test_the_version_names_the_packages_that_matter(capsys: pytest.CaptureFixture[str]):
    cli.main(["--version"])
    out = capsys.readouterr().out
    for package in ("jepa-audio", "torch", "lightning", "Python"):
        assert f"{package} " in out


@pytest.mark.parametrize(
    ("args", "similar"),
    [
        (["prob"], "'probe'"),
        (["reprot"], "'report'"),
        (["tset"], "'test'"),
        (["valdate"], "'validate'"),
        (["data", "indx"], "'data index'"),
        (["data", "pakc", "x"], "'data pack'"),
    ],
)
def test_an_unknown_command_is_answered_by_the_nearest_one_and_the_list(
    args: list[str], similar: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    err = capsys.readouterr().err
    assert end.value.code == 1
    assert f"did you mean {similar}?" in err
    group = [name for name in cli.COMMANDS if args[0] != "data" or name.startswith("data ")]
    assert all(f"  {name} " in err for name in group)


def test_the_nearest_command_has_the_smallest_edit_distance():
    assert nearest("emed", [*cli.COMMANDS, "embed"]) == "embed"
    assert nearest("improt", cli.COMMANDS) == "import"


def test_data_alone_lists_the_data_commands(capsys: pytest.CaptureFixture[str]):
    cli.main(["data"])
    out = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert (f"  {name} " in out) == name.startswith("data ")


@pytest.mark.parametrize("option", [[], ["-u"]], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("args", [["--help"], ["configs"], ["configs", "copy", "--help"]])
def test_a_closed_pipe_ends_the_command_quietly(
    args: list[str], option: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    command = [sys.executable, *option, "-m", "jepa_audio", *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        # Where argparse writes the help, it ignores the error itself.
        assert process.wait() in ((0, 141) if len(args) == 3 else (141,))


def test_ctrl_c_ends_a_command_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupted(source: str) -> None:
        """Describe."""
        raise KeyboardInterrupt

    replace_command(monkeypatch, "data describe", interrupted)
    with pytest.raises(SystemExit) as end:
        cli.main(["data", "describe", "x"])
    assert end.value.code == 130
    assert capsys.readouterr().err == "jepa-audio: stopped\n"


def test_a_bug_shows_its_traceback_and_how_to_report_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def faulty(source: str) -> None:
        """Describe."""
        list(zip([1, 2], [1], strict=True))

    replace_command(monkeypatch, "data describe", faulty)
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is shorter"):
        cli.main(["data", "describe", "x"])
    err = capsys.readouterr().err
    assert "this is a bug in jepa-audio" in err
    assert "jepa-audio --version" in err


def test_a_mistake_of_the_user_ends_in_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def refusing(source: str) -> None:
        """Describe."""
        raise UserError(f"{source} is [not] a corpus")

    replace_command(monkeypatch, "data describe", refusing)
    with pytest.raises(SystemExit) as end:
        cli.main(["data", "describe", "x"])
    assert end.value.code == 1
    assert capsys.readouterr().err == "jepa-audio: x is [not] a corpus\n"


def raised_in_a_loader_process(error: Exception) -> Exception:
    """The exception that PyTorch raises in the training process for an error in a loader."""
    try:
        raise error  # noqa: TRY301
    except Exception:
        wrapper = ExceptionWrapper(sys.exc_info(), where="in DataLoader worker process 0")
    with pytest.raises(type(error)) as raised:
        wrapper.reraise()
    return raised.value


@pytest.mark.parametrize("kind", [UserError, MissingFileError, CorpusError])
def test_the_message_of_an_error_in_a_loader_process_has_no_traceback(kind: type[Exception]):
    message = "12 files are unreadable:\n  a.wav: empty\n  b.wav: UserError: damaged"
    error = raised_in_a_loader_process(kind(message))
    assert "Traceback" in str(error)
    assert user_message(error) == (message, False)


def test_a_bug_in_a_loader_process_is_not_a_message_for_the_user():
    assert user_message(raised_in_a_loader_process(IndexError("list index"))) == (None, False)


def test_a_folder_that_cannot_be_made_is_a_mistake_of_the_user(tmp_path: Path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "sub", Path("/proc/new")):
        with pytest.raises(OSError) as raised:
            path.mkdir(parents=True, exist_ok=True)
        assert "check the path" in str(user_message(raised.value)[0])
    with pytest.raises(FileNotFoundError) as missing:
        (tmp_path / "none").read_bytes()
    assert user_message(missing.value) == (None, False)


def test_the_first_error_of_a_run_counts_if_closing_the_loggers_fails_too():
    def failing_twice() -> None:
        try:
            raise NonFiniteError("the loss is NaN at step 3")
        finally:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full") as raised:
        failing_twice()
    assert user_message(raised.value) == ("the loss is NaN at step 3", True)


def test_a_bug_while_a_mistake_of_the_user_is_handled_is_a_bug():
    def failing_twice() -> None:
        try:
            raise UserError("no such file")  # noqa: TRY301
        except UserError:
            [].pop()

    with pytest.raises(IndexError) as raised:
        failing_twice()
    assert user_message(raised.value) == (None, False)


MISTAKES: list[tuple[list[str], list[str]]] = [
    (["data", "index", "nowhere"], ["nowhere", "does not exist"]),
    (["data", "index", "empty"], ["no audio files under empty"]),
    (
        ["validate", "--config", "demo/wavjepa", "--data.root=empty", "--ckpt_path=last"],
        ["there is no checkpoint in", "runs/default/checkpoints; check `--run_dir`"],
    ),
    (["fit", "--config", "typo.yaml"], ["'embd_dim' is unknown; did you mean 'embed_dim'?"]),
]


def test_a_mistake_ends_in_a_short_message_as_the_user_sees_it(tmp_path: Path):
    """The commands run one after another in a process without pytest's filters of warnings."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "typo.yaml").write_text("model: {encoder: {embd_dim: 192}}")
    code = (
        "import sys; from jepa_audio.cli.main import main\n"
        f"for args in {[args for args, _ in MISTAKES]}:\n"
        "    try: main(args)\n"
        "    except SystemExit as end: print('exit code', end.code, 'of', args[0], file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    *messages, rest = re.split(r"exit code [12] of \w+\n", done.stderr)
    assert not rest
    for (_, words), message in zip(MISTAKES, messages, strict=True):
        sentence = message.partition("jepa-audio: ")[2]
        assert all(word in sentence for word in words), message
        assert sentence.count("\n") <= 2
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr


def test_a_module_in_the_working_directory_is_found_after_installed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    monkeypatch.setitem(cli.COMMANDS, "own", cli.Command("own_module_of_user:run", "", True))
    (tmp_path / "own_module_of_user.py").write_text("run = print")
    for _ in range(2):
        cli.main(["own"])
    assert capsys.readouterr().out == "['own']\n['own']\n"
    assert [path for path in sys.path if path == str(tmp_path)] == sys.path[-1:]
