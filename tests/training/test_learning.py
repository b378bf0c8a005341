"""Runs of 500 steps of the demo recipes keep their rank and beat the prediction of the mean."""

import csv
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs" / "demo"


def jepa_audio(*arguments: str | Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "jepa_audio", *map(str, arguments)], check=True, timeout=1800
    )


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = tmp_path_factory.mktemp("notes")
    jepa_audio(
        "data", "synth", corpus, "--num_train", "1000", "--num_valid", "20", "--num_test", "20"
    )
    return corpus / "nsynth-train"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "context_rank", "target_rank"), [("wavjepa", 10, 50), ("pupujepa", 40, 60)]
)
def test_a_recipe_does_not_collapse_in_500_steps(
    recipe: str, context_rank: float, target_rank: float, notes: Path, tmp_path: Path
):
    config = CONFIGS / f"{recipe}.yaml"
    jepa_audio(
        "fit",
        "--config",
        config,
        "--data.root",
        notes,
        "--trainer.max_steps",
        "500",
        "--run_dir",
        tmp_path,
    )
    seen = defaultdict(list)
    with next(tmp_path.rglob("metrics.csv")).open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and (name.startswith("collapse/") or row["train/loss_mean_target"]):
                    seen[name.rpartition("/")[2]].append(float(value))
    assert len(seen["alarm"]) >= 20
    assert max(seen["alarm"]) == 0
    assert min(seen["context_rank"]) > context_rank
    assert min(seen["target_rank"]) > target_rank
    late = slice(-4, None)
    assert sum(seen["loss"][late]) < 0.95 * sum(seen["loss_mean_target"][late])
