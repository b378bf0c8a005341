"""The light part of the command: the table of commands, unknown commands, errors, time until help."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from jepa_audio.cli import main as cli
from jepa_audio.errors import UserError

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
    "args", [[], ["--help"], ["--version"], ["data"], ["data", "--help"], ["configs"]]
)
def test_help_and_versions_import_nothing_heavy(args: list[str]):
    imported = run_and_list_modules(args)
    light_enough = {"rich", "jsonargparse"} if args == ["configs"] else set()
    assert imported & set(HEAVY) <= light_enough


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, jepa_audio; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & set(HEAVY)


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
    ("args", "nearest"),
    [
        (["prob"], "'probe'"),
        (["valdate"], "'validate'"),
        (["data", "indx"], "'index'"),
        (["data", "pakc", "x"], "'pack'"),
    ],
)
def test_an_unknown_command_is_answered_by_the_nearest_one_and_the_list(
    args: list[str], nearest: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    err = capsys.readouterr().err
    assert end.value.code == 1
    assert f"did you mean {nearest}?" in err
    group = [name for name in cli.COMMANDS if args[0] != "data" or name.startswith("data ")]
    assert all(f"  {name} " in err for name in group)


def test_data_alone_lists_the_data_commands(capsys: pytest.CaptureFixture[str]):
    cli.main(["data"])
    out = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert (f"  {name} " in out) == name.startswith("data ")


@pytest.mark.parametrize("option", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_a_closed_pipe_ends_the_command_quietly(option: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    command = [sys.executable, *option, "-m", "jepa_audio", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


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
