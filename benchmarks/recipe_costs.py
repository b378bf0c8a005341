"""What is the size of every recipe, and how many operations has its run? No training, no audio.

`python -m benchmarks.recipe_costs` prints the tables of docs/recipes.md, `--write` writes them
there; a test compares them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from jepa_audio.cli.trainer import JEPACLI
from jepa_audio.recipes import recipes
from jepa_audio.training.cost import crop_flops, expected_sizes

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
# Layers over a recipe: the first part of the name → the options that use it.
LAYERS = {
    "pupujepa/": ("--config=pupujepa", "--config={name}"),
    "front_ends/waveform": ("--config=demo/wavjepa", "--model.front_end={name}"),
    "front_ends/": ("--config=small/spectrogram", "--model.front_end={name}"),
    "target_front_ends/": (
        "--config=demo/wavjepa",
        "--model.target_front_end={name}",
        "--model.targets.top_k=0",
    ),
    "fsdp": (),
}
HEADER = (
    "| `--config` | encoder | all trained | tokens of a crop | GFLOP for a crop | "
    "crops of a step | steps | PFLOP for the run |\n|---|---|---|---|---|---|---|---|"
)
LAYER_HEADER = (
    "| file | used with | encoder | all trained | tokens of a crop | GFLOP for a crop |\n"
    "|---|---|---|---|---|---|"
)


def options(name: str) -> tuple[str, ...]:
    """The command line that uses a recipe; empty if it changes no size."""
    for start, layer in LAYERS.items():
        if name.startswith(start):
            return tuple(option.format(name=name) for option in layer)
    return (f"--config={name}",)


def rows(is_layer: bool) -> Iterator[str]:
    """The lines of a table: complete recipes, or layers over a recipe."""
    for name in recipes():
        words = options(name)
        if words and (len(words) > 1) == is_layer:
            yield row(name, words)


def row(name: str, words: tuple[str, ...]) -> str:
    """The line of a recipe, in the table that it belongs to."""
    # Large models get no memory; kernels of spectrograms are computed from their values.
    is_large = len(words) == 1 or name.startswith("pupujepa/")
    with torch.device("meta" if is_large else "cpu"):
        cli = JEPACLI([*words, "--data.root=none", "--trainer.logger=false"], run=False)
    jepa, data, max_steps = cli.model, cli.datamodule, cli.trainer.max_steps
    num_samples = data.clips.crop_samples
    grid = jepa.front_end.grid(num_samples)
    if is_large:  # the operations of a front end are counted in a forward pass
        jepa.front_end.to_empty(device="cpu")
    parts = crop_flops(jepa, num_samples, expected_sizes(jepa, num_samples, 0, max_steps))
    flops = sum(part.total for part in parts.values())
    encoder = _millions(*jepa.front_end.parameters(), *jepa.encoder.parameters())
    trained = _millions(*(p for p in jepa.parameters() if p.requires_grad))
    tokens = f"{grid.num_tokens} ({grid.num_freq} x {grid.num_time})"
    cells = [f"{encoder} M", f"{trained} M", tokens, _rounded(flops / 1e9)]
    if len(words) > 1:
        used = words[0].removeprefix("--config=")
        return _line(f"`{name}`", f"`{used}`", *cells)
    crops = data.batch_size * data.clips.crops_per_clip * cli.trainer.accumulate_grad_batches
    total = flops * crops * max_steps / 1e15
    return _line(f"`{name}`", *cells, str(crops), f"{max_steps:,}", _rounded(total))


def _millions(*parameters: torch.Tensor) -> str:
    return f"{sum(p.numel() for p in parameters) / 1e6:.3g}"


def _rounded(number: float) -> str:
    """Three digits, without an exponent."""
    return f"{float(f'{number:.3g}'):,g}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def tables() -> tuple[str, str]:
    """The table of recipes and the table of layers, in Markdown."""
    return "\n".join([HEADER, *rows(False)]), "\n".join([LAYER_HEADER, *rows(True)])


def replaced(page: Path) -> str:
    """The text of a page, with new tables between `<!-- table N -->` and `<!-- end -->`."""
    text = page.read_text()
    for number, table in enumerate(tables(), 1):
        before, start, rest = text.partition(f"<!-- table {number} -->\n\n")
        _, end, after = rest.partition("\n\n<!-- end -->")
        text = before + start + table + end + after
    return text


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(replaced(PAGE))
    else:
        print(*tables(), sep="\n\n")
