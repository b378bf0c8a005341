"""The progress of a run: lines in a file, a bar in a terminal, also after a resume."""

import io
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import rich
from lightning.pytorch import Callback, Trainer

from jepa_audio.training.watching.progress import ProgressLines, RunProgressBar

LINE = re.compile(
    r"step (\d+)/6, loss (\S+)(, valid loss \S+)?, rank (\S+), (\S+) clips/s, "
    r"data wait \d+ %, MFU \d+ %, (\d+:\d\d:\d\d) left"
)


def lines_of(caplog: pytest.LogCaptureFixture) -> list[re.Match[str]]:
    return [match for text in caplog.messages if (match := LINE.fullmatch(text))]


def test_a_run_without_a_terminal_logs_a_line_every_n_steps_and_no_bar(
    tiny_cli: Callable, fit: Callable, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    cli = tiny_cli(
        "wave",
        "--trainer.logger=true",
        "--trainer.enable_progress_bar=true",
        "--trainer.log_every_n_steps=2",
        "--progress.every_n_steps=4",
        "--trainer.accumulate_grad_batches=2",
        "--data.valid_share=0.3",
        "--trainer.val_check_interval=4",
    )
    fit(cli)
    lines = lines_of(caplog)
    assert [int(line[1]) for line in lines] == [4, 6]
    assert not cli.trainer.progress_bar_callback
    last = cli.trainer.callback_metrics
    assert float(lines[-1][2]) == pytest.approx(last["train/loss"].item(), rel=1e-3)
    assert float(lines[-1][4]) == pytest.approx(last["collapse/context_rank"].item(), rel=1e-3)
    assert lines[-1][3], "the validation loss is in the line"
    assert float(lines[-1][5]) > 0
    assert lines[-1][6] == "0:00:00"


def test_lines_follow_the_log_interval_and_can_be_switched_off(
    tiny_cli: Callable, fit: Callable, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    fit(tiny_cli("wave", "--trainer.log_every_n_steps=5"))
    assert [int(line[1]) for line in lines_of(caplog)] == [5, 6]
    caplog.clear()
    fit(tiny_cli("wave", "--trainer.log_every_n_steps=5", "--progress.every_n_steps=0"))
    assert not lines_of(caplog)
    with pytest.raises(ValueError, match=r"`every_n_steps` \(-1\)"):
        ProgressLines(every_n_steps=-1)


def test_a_terminal_shows_a_bar_and_no_lines(
    tiny_cli: Callable,
    fit: Callable,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(
        "jepa_audio.cli.trainer.get_console", lambda: type("", (), {"is_terminal": 1})
    )
    caplog.set_level("INFO")
    cli = tiny_cli("wave", "--trainer.log_every_n_steps=2", "--trainer.enable_progress_bar=true")
    assert isinstance(cli.trainer.progress_bar_callback, RunProgressBar)
    fit(cli)
    assert not lines_of(caplog)


class Shown(Callback):
    """Keeps (steps, all steps) of the bar after every micro-batch."""

    def __init__(self, bar: RunProgressBar) -> None:
        self.bar = bar
        self.values: list[tuple[float, float | None]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        task = self.bar.train_progress_bar
        self.values.append((task.completed, task.total))


@pytest.fixture
def restored_console() -> Iterator[None]:
    """`RichProgressBar` changes the console that all code shares."""
    yield
    rich.reconfigure()


@pytest.mark.usefixtures("restored_console")
def test_the_bar_counts_optimizer_steps_also_after_a_resume(
    tiny_cli: Callable, fit: Callable, tmp_path: Path
):
    def run(checkpoint: Path | None) -> tuple[Path, list[tuple[float, float | None]]]:
        settings = "--trainer.accumulate_grad_batches=2", "--checkpoint.every_n_train_steps=4"
        cli = tiny_cli("wave", *settings, "--checkpoint.keep_all=true", "--data.batch_size=2")
        screen = io.StringIO()
        bar = RunProgressBar(console_kwargs={"file": screen, "force_terminal": True, "width": 200})
        shown = Shown(bar)
        # `tiny_cli` has no bar.
        cli.trainer.callbacks[:0] = [bar]
        fit(cli, checkpoint, shown)
        assert "6/6" in screen.getvalue()
        return Path(cli.trainer.checkpoint_callback.dirpath) / "step=00000004.ckpt", shown.values

    checkpoint, shown = run(None)
    assert shown == [(step // 2, 6) for step in range(12)]
    _, shown = run(checkpoint)
    assert shown == [(step // 2, 6) for step in range(8, 12)]


def test_speed_and_waiting_of_a_line_are_those_since_the_last_line(
    tiny_cli: Callable, fit: Callable, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")

    class SlowStart(Callback):
        """Waits before the first batch as for worker processes, and in the validation."""

        def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
            if trainer.global_step == 0:
                time.sleep(2.0)

        def on_validation_start(self, *_: object) -> None:
            time.sleep(2.0)

    cli = tiny_cli(
        "wave",
        "--trainer.log_every_n_steps=3",
        "--data.valid_share=0.3",
        "--trainer.val_check_interval=4",
    )
    cli.trainer.callbacks.insert(0, SlowStart())
    fit(cli)
    lines = [text for text in caplog.messages if LINE.fullmatch(text)]
    waits = [int(re.search(r"data wait (\d+) %", text)[1]) for text in lines]
    assert len(waits) == 2
    # Two seconds would be nearly all of the time of such small steps.
    assert max(waits) < 90, lines
    assert float(LINE.fullmatch(lines[0])[5]) > 4, "16 clips in two steps, without the two seconds"


def test_all_numbers_of_a_step_have_its_number(tiny_cli: Callable, fit: Callable, tmp_path: Path):
    cli = tiny_cli(
        "wave",
        "--trainer.logger=true",
        "--trainer.log_every_n_steps=2",
        "--data.valid_share=0.3",
        "--trainer.val_check_interval=4",
    )
    fit(cli)
    (path,) = Path(cli.trainer.default_root_dir).rglob("metrics.csv")
    metrics = pd.read_csv(path)
    for name in ("train/loss", "train/gradient_norm", "train/momentum", "lr-AdamW/pg1"):
        steps = set(metrics["step"][metrics[name].notna()])
        assert {2, 4, 6} <= steps <= {1, 2, 4, 6}, name
    assert metrics["step"][metrics["valid/loss"].notna()].tolist()[0] == 4
    rates = metrics.dropna(subset="lr-AdamW/pg1").set_index("step")["lr-AdamW/pg1"]
    schedule = cli.trainer.lr_scheduler_configs[0].scheduler
    for step, rate in rates.items():
        expected = schedule.base_lrs[0] * schedule.lr_lambdas[0](int(step) - 1)
        assert rate == pytest.approx(expected), step
