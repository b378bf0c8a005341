"""Augmentations: mixtures of clips and of losses, masks, gain and time shift."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from jepa_audio.inference.load import load_encoder
from jepa_audio.probing.finetuning.augmentations import SpecAugment, loss_of, soft_targets
from jepa_audio.probing.finetuning.clips import EpochOrder
from jepa_audio.probing.tasks.labels import UNKNOWN, Multiclass, Multilabel, Regression


def test_the_loss_of_a_mixture_equals_the_mixture_of_the_losses(rng: torch.Generator):
    """One by one, as in mixup: share * CE(first) + (1 - share) * CE(second)."""
    labels = Multiclass(("a", "b", "c"))
    logits = torch.randn(4, 3, generator=rng)
    first, second = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 1, 0, 1])
    share = torch.rand(4, generator=rng)
    expected = sum(
        share[i] * F.cross_entropy(logits[i], first[i])
        + (1 - share[i]) * F.cross_entropy(logits[i], second[i])
        for i in range(4)
    )
    mixed = torch.lerp(soft_targets(labels, second), soft_targets(labels, first), share[:, None])
    loss, size = loss_of(labels, logits, mixed)
    torch.testing.assert_close(loss, expected / 4)
    assert float(size) == pytest.approx(4)


def test_the_loss_of_mixed_tags_and_the_gradient_of_mixed_numbers_are_mixtures(
    rng: torch.Generator,
):
    first, second = torch.rand(2, 4, 3, generator=rng).round()
    logits = torch.randn(4, 3, generator=rng, requires_grad=True)
    tags, numbers = Multilabel(("a", "b", "c")), Regression(("a", "b", "c"))
    of = lambda labels, targets: loss_of(labels, logits, targets)[0]  # noqa: E731
    mixed = torch.lerp(second, first, 0.3)
    torch.testing.assert_close(of(tags, mixed), 0.3 * of(tags, first) + 0.7 * of(tags, second))
    together = torch.autograd.grad(of(numbers, mixed), logits)[0]
    apart = torch.autograd.grad(0.3 * of(numbers, first) + 0.7 * of(numbers, second), logits)[0]
    torch.testing.assert_close(together, apart)


def test_rows_without_a_known_class_have_no_loss(rng: torch.Generator):
    labels, logits = Multiclass(("a", "b")), torch.randn(3, 2, generator=rng)
    targets = torch.tensor([1, UNKNOWN, 0])
    hard, soft = (
        loss_of(labels, logits, targets),
        loss_of(labels, logits, soft_targets(labels, targets)),
    )
    torch.testing.assert_close(hard, soft)
    torch.testing.assert_close(hard[0], F.cross_entropy(logits[[0, 2]], targets[[0, 2]]))


def test_masks_depend_on_the_seed_of_a_clip_alone(checkpoints: dict[str, Path]):
    front_end = load_encoder(checkpoints["mel"]).front_end
    waveform = torch.randn(3, 1, 500, generator=torch.Generator().manual_seed(0))
    augment, state = SpecAugment(0.8, 0.8), torch.get_rng_state()
    tokens = augment.tokens(front_end, waveform, [5, 6, 7])
    assert torch.equal(torch.get_rng_state(), state)
    alone = augment.tokens(front_end, waveform[1:2], [6])
    torch.testing.assert_close(tokens[1:2], alone)
    assert not torch.equal(tokens, augment.tokens(front_end, waveform, [8, 9, 10]))
    torch.testing.assert_close(
        SpecAugment(0.0, 0.0).tokens(front_end, waveform, [1, 2, 3]), front_end(waveform)
    )


def test_tokens_of_raw_waveforms_are_masked_in_time(checkpoints: dict[str, Path]):
    front_end = load_encoder(checkpoints["wave"]).front_end
    waveform = torch.randn(20, 1, 500, generator=torch.Generator().manual_seed(0))
    tokens = SpecAugment(0.5, 0.0).tokens(front_end, waveform, range(20))
    is_masked = (tokens == 0).all(dim=-1)
    kept = torch.where(is_masked[..., None], tokens, front_end(waveform))
    torch.testing.assert_close(tokens, kept)
    assert 0.1 < is_masked.float().mean() < 0.4
    assert is_masked.sum(dim=1).max() <= 0.5 * tokens.shape[1]
    assert (is_masked.int().diff(dim=1) == 1).sum(dim=1).max() <= 1, "one interval for each clip"


def test_bands_of_raw_waveforms_cannot_be_masked(make: Callable):
    for group, settings in (("model", {"time_mask": 2.0}), ("data", {"data": {"mixup": -1.0}})):
        with pytest.raises(ValueError, match=rf"`{group}\.(time_mask|mixup)` .* must be in"):
            make("mel", "full", **settings)
    with pytest.raises(
        ValueError, match=r"`model.freq_mask` .* WaveformFrontEnd has no spectrogram"
    ):
        make("wave", "full", freq_mask=0.2)


def test_crops_depend_on_seed_epoch_and_item_alone(make: Callable):
    data = {"mixup": 0.4, "gain_db": 6.0, "time_shift": 0.1}
    crops = make("wave", "head", data)[1].crops()
    for first, second in zip(crops[1, 0], crops[1, 0], strict=True):
        assert torch.equal(torch.as_tensor(first), torch.as_tensor(second))
    assert any(not torch.equal(crops[2, i][0], crops[1, i][0]) for i in range(3))
    assert all(crops[0, i][0].shape[-1] <= 500 for i in range(len(crops)))
    assert all(float(crops[0, i][2].sum()) == pytest.approx(1) for i in range(len(crops)))


def test_gain_and_time_shift_stay_in_their_bounds(make: Callable):
    plain = make("wave", "head")[1].crops()
    changed = make("wave", "head", {"gain_db": 6.0, "time_shift": 0.1})[1].crops()
    short = [i for i in range(len(plain)) if plain[0, i][0].shape[-1] == 500]
    shifts, gains = set(), []
    for item in range(len(plain)):
        (before, *_), (after, *_) = plain[0, item], changed[0, item]
        start = before.shape[-1] - after.shape[-1]
        shifts.add(start)
        factor = after.norm() / before[:, start:].norm()
        torch.testing.assert_close(after, before[:, start:] * factor)
        gains.append(20 * float(factor.log10()))
    assert len(short) > 3
    assert 0 <= min(shifts) < max(shifts) <= 100
    assert -6 <= min(gains) < 0 < max(gains) <= 6


def test_the_steps_of_several_processes_have_the_clips_of_one():
    one = EpochOrder(23, 4, seed=1, rank=0, world=1)
    two = [EpochOrder(23, 4, seed=1, rank=rank, world=2) for rank in range(2)]
    for order in (one, *two):
        order.set_epoch(3)
    steps = [set(list(one)[first : first + 4]) for first in range(0, len(one), 4)]
    halves = [[list(each)[first : first + 2] for first in range(0, len(each), 2)] for each in two]
    assert steps == [set(a) | set(b) for a, b in zip(*halves, strict=True)]
    assert len(one) == 20
    assert len(set(one)) == 20
