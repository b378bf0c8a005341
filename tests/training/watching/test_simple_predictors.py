"""The baselines of the training loss equal a literal computation."""

import itertools
from collections.abc import Callable

import pytest
import torch

from jepa_audio.steps.grid import AudioBatch, Grid, Masks
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.watching.simple_predictors import baseline_sums, nearest_context


def test_the_nearest_context_token_equals_a_brute_force_search(
    ragged: Callable[[Grid, int, int], Masks],
):
    grid = Grid(num_freq=4, num_time=9)
    masks = ragged(grid, 3, 2)
    nearest = nearest_context(masks, grid)
    place = grid.coordinates().tolist()
    seen = masks.context.to_mask(grid.num_tokens)
    for clip, group in itertools.product(range(3), range(2)):
        context = seen[clip].nonzero()[:, 0].tolist()
        for target, chosen in zip(
            masks.targets.index[clip, group], nearest.index[clip, group], strict=True
        ):
            distance = {
                c: sum((a - b) ** 2 for a, b in zip(place[c], place[target], strict=True))
                for c in context
            }
            assert distance[chosen.item()] == min(distance.values())


@pytest.mark.parametrize("flavour", ["wave", "mel"])
def test_the_simple_predictors_are_the_mean_target_and_a_copy_of_the_nearest_context(
    tiny_jepa: Callable[..., JEPA], batch: AudioBatch, flavour: str
):
    jepa = tiny_jepa(flavour).eval()
    masks = jepa.draw_masks(batch)
    target = jepa(batch.waveform, masks).target.detach()
    sums = baseline_sums(jepa, batch.waveform, masks, target)
    valid = torch.arange(target.shape[2]) < masks.targets.counts[..., None]
    expected = (target[valid] - target[valid].mean(0)).square().mean(-1).sum().item()
    assert sums["loss_mean_target"].item() == pytest.approx(expected, rel=1e-4)
    grid = jepa.front_end.grid(batch.waveform.shape[-1])
    tokens = jepa.front_end(batch.waveform)
    copies = nearest_context(masks, grid).index
    errors = []
    for clip in range(4):
        keep = masks.context.rows(slice(clip, clip + 1))
        one = slice(clip, clip + 1)
        context = type(keep)(
            keep.index[:, None], None if keep.valid is None else keep.valid[:, None]
        )
        seen = jepa.target_latents(batch.waveform[one], tokens[one], grid, context)[0, 0]
        places = {index.item(): i for i, index in enumerate(keep.index[0, : int(keep.counts[0])])}
        for group, column in valid[clip].nonzero().tolist():
            copied = seen[places[copies[clip, group, column].item()]]
            errors.append((copied - target[clip, group, column]).square().mean())
    assert sums["loss_nearest_context"].item() == pytest.approx(
        torch.stack(errors).sum().item(), rel=1e-4
    )
