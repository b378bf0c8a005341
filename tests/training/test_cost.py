"""Operations computed from the shapes equal those that torch counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from jepa_audio.steps.grid import AudioBatch
from jepa_audio.training.cost import MaskSizes, crop_flops, expected_sizes
from jepa_audio.training.jepa import JEPA
from tests.conftest import LOG_MEL_TARGETS

CLUSTERS = "{class_path: OnlineClusters, init_args: {num_classes: 8}}"
CODES = "{class_path: RandomProjection, init_args: {num_classes: 8, codebook_dim: 4}}"
MIXTURE = (
    "{class_path: MixtureMasker, init_args: {maskers: [RandomMasker, MultiBlockMasker], "
    "weights: [0.5, 0.5]}}"
)
BLOCKS = "--model.masker=MultiBlockMasker"
VARIANTS = {
    "random": ("wave", "--model.masker=RandomMasker"),
    "groups": ("wave", BLOCKS),
    "several masks": ("wave", "--model.masker=RandomMasker", "--model.masks_per_clip=3"),
    "momentum front end": ("wave", BLOCKS, "--model.target_front_end=momentum"),
    "target gradient": ("wave", BLOCKS, "--model.target_gradient=true"),
    "spectrogram": ("mel",),
    "spectrogram, groups": ("mel", BLOCKS),
    "registers": ("mel", "--model.encoder.num_registers=3", "--model.masks_per_clip=2"),
    "no target encoder": ("wave", BLOCKS, *LOG_MEL_TARGETS),
    "codes": (
        "wave",
        BLOCKS,
        "--model.distance=CrossEntropy",
        f"--model.distance.codebook={CODES}",
    ),
    "clusters": (
        "wave",
        BLOCKS,
        "--model.distance=CrossEntropy",
        f"--model.distance.codebook={CLUSTERS}",
    ),
}


class Counter(TorchDispatchMode):
    """torch's numbers of operations, without the modules that `FlopCounterMode` also tracks.

    Its hooks fail for a module that is called without gradients on a view.
    """

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **kwargs, out_val=result)
        return result


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_operations_from_the_shapes_are_those_that_torch_counts(
    variant: str, tiny_jepa: Callable[..., JEPA], batch: AudioBatch
):
    jepa = tiny_jepa(*VARIANTS[variant]).train()
    # The masks of one row have no padding, which torch would count.
    waveform = batch.waveform[:1]
    masks = jepa.draw_masks(AudioBatch(waveform, batch.row[:1]))
    parts = crop_flops(jepa, waveform.shape[-1], MaskSizes.of([masks]))
    # The other kernels compute a product of the forward pass again in the backward pass.
    with sdpa_kernel(SDPBackend.MATH), Counter() as counter:
        loss = jepa.loss(waveform, masks)
        forward = counter.total
        loss.backward()
    assert masks.context.valid is None
    assert masks.targets.valid is None
    # torch also counts a sum over the tokens for the statistics of the clusters.
    exact = {"rel": 1e-3 if variant == "clusters" else 1e-9}
    assert sum(part.forward for part in parts.values()) == pytest.approx(forward, **exact)
    total = sum(part.total for part in parts.values())
    assert total == pytest.approx(counter.total, **exact)
    assert all(part.forward > 0 for part in parts.values() if part is not parts["target encoder"])


def test_each_part_has_its_own_operations(tiny_jepa: Callable[..., JEPA], batch: AudioBatch):
    jepa = tiny_jepa("wave", "--model.masker=RandomMasker")
    masks = jepa.draw_masks(AudioBatch(batch.waveform[:1], batch.row[:1]))
    parts = crop_flops(jepa, batch.waveform.shape[-1], MaskSizes.of([masks]))
    grid = jepa.front_end.grid(batch.waveform.shape[-1])
    tokens = jepa.front_end(batch.waveform[:1])
    context = jepa.encoder(tokens, grid, masks.context)
    calls = {
        "front end": lambda: jepa.front_end(batch.waveform[:1]),
        "context encoder": lambda: jepa.encoder(tokens, grid, masks.context),
        "target encoder": lambda: jepa.target_encoder(tokens, grid),
        "predictor": lambda: jepa.predictor(context, masks, grid),
    }
    for name, call in calls.items():
        with sdpa_kernel(SDPBackend.MATH), Counter() as counter:
            call()
        assert parts[name].forward == pytest.approx(counter.total, rel=1e-9), name
    assert parts["target encoder"].backward == 0
    assert parts["predictor"].backward == 2 * parts["predictor"].forward


def test_the_expected_sizes_are_the_means_over_many_masks_of_the_run(
    tiny_jepa: Callable[..., JEPA],
):
    jepa = tiny_jepa("wave")
    sizes = expected_sizes(jepa, 500, 0, 1000)
    masks = jepa.draw_masks(AudioBatch(torch.zeros(2000, 1, 500), torch.arange(2000)))
    exact = MaskSizes.of([masks])
    for name in ("context", "targets", "predictor"):
        found, expected = getattr(sizes, name), getattr(exact, name)
        assert found.number == expected.number
        assert found.tokens == pytest.approx(expected.tokens, rel=0.05)
        assert found.pairs == pytest.approx(expected.pairs, rel=0.1)
    assert sizes.targets.tokens == pytest.approx(masks.targets_per_clip, rel=0.05)


def test_steps_of_a_mixture_may_have_different_numbers_of_groups(
    tiny_jepa: Callable[..., JEPA],
):
    jepa = tiny_jepa("mel", f"--model.masker={MIXTURE}")
    sizes = expected_sizes(jepa, 500, 0, 1000)
    assert 1 < sizes.targets.number < 4
    assert expected_sizes(jepa, 500, 5, 6).targets.number in (1, 4), "a run of one step"


def test_counting_changes_neither_weights_nor_gradients_nor_random_numbers(
    tiny_jepa: Callable[..., JEPA],
):
    jepa = tiny_jepa("mel", "--model.front_end.mean=null", "--model.front_end.std=null").train()
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in jepa.state_dict().items()}
    crop_flops(jepa, 500, expected_sizes(jepa, 500, 0, 10))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(state[name], value) for name, value in jepa.state_dict().items())
    assert all(parameter.grad is None for parameter in jepa.parameters())
    assert jepa.front_end.mean is None
    assert jepa.front_end.training
