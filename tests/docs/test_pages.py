"""Every block of README and of the pages is run, or checked where it cannot run here."""

from __future__ import annotations

import gc
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.docs.commands import check_block, run_block
from tests.docs.given import Given
from tests.docs.pages import LANGUAGES, REASONS, ROOT, Block, Page, pages

PAGES = pages()


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tmp_path_factory.mktemp("given"))


pytestmark = pytest.mark.usefixtures("symbolic_sizes")


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jepa_audio.training.trial._LOADER_SECONDS", 0.1)
    monkeypatch.setattr("jepa_audio.training.normalization.NUM_CLIPS", 12)
    monkeypatch.setenv("MPLBACKEND", "agg")


def run_page(page: Page, given: Given, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run all blocks of a page, in order, in one folder; Python blocks share one namespace."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    modules = set(sys.modules)
    namespace: dict[str, object] = {"__name__": "__page__"}
    try:
        blocks = page.blocks()
        for block in blocks:
            # Another test may have imported a module of the same name.
            sys.modules.pop(block.title.removesuffix(".py"), None)
        for name, kind in page.given.items() if blocks else ():
            given.make(name, kind, folder)
        for block in blocks:
            try:
                run_one(block, page, folder, namespace)
            except (Exception, SystemExit, pytest.fail.Exception) as error:
                error.add_note(f"in the block at {block.place}")
                raise
    finally:
        # Classes of a page must not be choices of later tests.
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
                del sys.modules[name]
        namespace.clear()
        gc.collect()


def run_one(block: Block, page: Page, folder: Path, namespace: dict[str, object]) -> None:
    assert block.language in LANGUAGES, f"{block.place}: name one of the languages {LANGUAGES}"
    assert not block.not_run or block.not_run.startswith(REASONS), block.not_run
    if block.title:
        path = folder / block.title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
    if block.language == "bash":
        (check_block(block) if block.not_run else run_block(block, folder))
    elif block.language == "python":
        # The lines of a traceback are those of the page.
        code = compile("\n" * (block.line - 1) + block.text, str(ROOT / page.path), "exec")
        if not block.not_run and not block.title:
            exec(code, namespace)
    elif block.language == "toml":
        tomllib.loads(block.text)
    elif block.language == "yaml" and not block.title:
        check_settings(block, page, folder)
    elif block.language == "text":
        assert "jepa-audio " not in block.text, f"{block.place}: a command is not a text"


def check_settings(block: Block, page: Page, folder: Path) -> None:
    """Parse a part of a recipe, layered over the recipe of the page, with the real parser."""
    from jepa_audio.cli.trainer import JEPACLI

    part = folder / f"part-{block.line}.yaml"
    part.write_text(block.text)
    base = page.setting("base") or "demo/wavjepa"
    JEPACLI([f"--config={base}", f"--config={part}", "--data.root=audio"], run=False)


def is_slow(page: Page) -> bool:
    """Whether the page states it."""
    return page.setting("slow") is not None


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * is_slow(page), id=page.name) for page in PAGES],
)
def test_every_block_of_a_page_runs(
    page: Page, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_page(page, given, tmp_path, monkeypatch)


def test_commands_in_tables_have_valid_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The real parser reads them, also on pages that run with `--runslow` only."""
    monkeypatch.chdir(tmp_path)
    rows = [block for page in PAGES for block in page.rows()]
    assert len(rows) > 30
    for block in rows:
        try:
            if not block.fails:
                check_block(block)
        except (Exception, SystemExit) as error:
            error.add_note(f"in the table at {block.place}")
            raise


def run_text(text: str, given: Given, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run all blocks of a page with this text."""
    path = folder / "page.md"
    path.write_text(text)
    monkeypatch.setattr("tests.docs.pages.ROOT", folder)
    run_page(Page(path), given, folder, monkeypatch)


FAILURE = pytest.fail.Exception
# Name → comment, language, text, and the error that a test of the page ends with.
WRONG = {
    "a misspelt option": ("not run: needs a GPU", "bash", "jepa-audio fit --x 2", AssertionError),
    "a wrong type": (
        "not run: needs a GPU",
        "bash",
        "jepa-audio probe --encoder x --tasks y --overlap much",
        SystemExit,
    ),
    "an unknown command": ("", "bash", "jepa-audio embd runs/a audio", SystemExit),
    "an unknown reason": ("not run: no time", "bash", "jepa-audio configs", AssertionError),
    "an error in Python": ("", "python", "import jepa_audio.nothing", ModuleNotFoundError),
    "a misspelt setting": ("", "yaml", "model: {encoder: {dpeth: 2}}", SystemExit),
    "a command as text": ("", "text", "jepa-audio fit", AssertionError),
    "no language": ("", "", "x", AssertionError),
    "a shell command": ("", "bash", "false", subprocess.CalledProcessError),
    "a missing target of make": ("", "bash", "make tea", AssertionError),
    "an error that does not come": ("fails: no recipe", "bash", "jepa-audio configs", FAILURE),
}
# Name → row of a table, and the error that a test of the page ends with.
WRONG_ROWS = {
    "an unknown command": ("| a | `jepa-audio embd runs/a audio` |", SystemExit),
    "a wrong option behind a bar": (r"| `jepa-audio configs --a 'x\|y'` | b |", SystemExit),
    "a wrong option of what is not run": (
        "| a | `jepa-audio fit --x 2` <!-- not run: needs a GPU --> |",
        AssertionError,
    ),
    "an error that does not come": ("| `jepa-audio configs` <!-- fails: no --> |", FAILURE),
    "a missing target of make": ("| a | `make`, `make tea` |", AssertionError),
}


@pytest.mark.parametrize(("comment", "language", "text", "error"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_block_is_found(
    comment: str,
    language: str,
    text: str,
    error: type[BaseException],
    given: Given,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    page = f"<!-- given -->\n\n<!-- {comment} -->\n```{language}\n{text}\n```\n"
    with pytest.raises(error):
        run_text(page, given, tmp_path, monkeypatch)


@pytest.mark.parametrize(("row", "error"), WRONG_ROWS.values(), ids=WRONG_ROWS.keys())
def test_a_wrong_command_in_a_table_is_found(
    row: str,
    error: type[BaseException],
    given: Given,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    page = f"<!-- given -->\n\n| a | b |\n|---|---|\n{row}\n"
    with pytest.raises(error):
        run_text(page, given, tmp_path, monkeypatch)


def test_blocks_and_rows_of_a_page_are_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "page.md"
    monkeypatch.setattr("tests.docs.pages.ROOT", tmp_path)
    table = "| `A=1 python -m a` and `b` | `make c` |\n| d | e |"
    fence = "```bash\n| `make no` |\n```"
    path.write_text(
        f"{fence}\n\n<!-- not run: needs a GPU -->\n\n{table}\n\ntext\n\n| `make f` |\n"
    )
    fenced, first, last = Page(path).blocks()
    assert fenced.commands == ["| `make no` |"]
    assert (first.commands, first.not_run, first.line) == (
        ["A=1 python -m a", "make c"],
        "needs a GPU",
        7,
    )
    assert (last.commands, last.not_run) == (["make f"], "")


def test_pages_of_the_site_state_what_they_do_not_run():
    """Most blocks run: otherwise the pages would prove nothing."""
    blocks = [block for page in PAGES for block in page.blocks() if block.language != "text"]
    assert sum(not block.not_run for block in blocks) > 0.7 * len(blocks)
