"""What a training step costs: tokens and floating-point operations, from the shapes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.front_ends import FrontEnd
from jepa_audio.steps.front_ends.alignment import aligned_tokens
from jepa_audio.steps.front_ends.spectrogram import PatchedSpectrogram
from jepa_audio.steps.grid import Masks
from jepa_audio.steps.losses import CrossEntropy
from jepa_audio.steps.masking.source import MaskSource, MaskStream
from jepa_audio.training.jepa import JEPA

# Optimizer steps and rows of a step whose masks are drawn to estimate the numbers of tokens.
_NUM_STEPS, _NUM_ROWS = 64, 4


@dataclass(frozen=True)
class Flops:
    """Floating-point operations; a multiplication and its addition are two."""

    forward: float
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Forward and backward pass together."""
        return self.forward + self.backward

    def times(self, factor: float) -> Flops:
        """The operations of several equal parts."""
        return Flops(self.forward * factor, self.backward * factor)


@dataclass(frozen=True)
class Sequences:
    """What a transformer processes for one mask: means over a sample of masks.

    Attributes:
        number: number of sequences.
        tokens: number of their tokens, without padding.
        pairs: number of pairs of tokens in the same sequence, which attention computes.
    """

    number: float
    tokens: float
    pairs: float

    @staticmethod
    def of(lengths: Tensor) -> Sequences:
        """From the lengths of the sequences of every mask, `[Q, number]`."""
        lengths = lengths.double()
        pairs = lengths.square().sum(-1).mean()
        return Sequences(float(lengths.shape[-1]), float(lengths.sum(-1).mean()), float(pairs))

    @staticmethod
    def mean(parts: Iterable[Sequences]) -> Sequences:
        """The means of several samples of the same size."""
        values = torch.tensor([astuple(part) for part in parts], dtype=torch.float64)
        return Sequences(*values.mean(dim=0).tolist())

    def with_registers(self, count: int) -> Sequences:
        """With `count` more tokens in each sequence."""
        pairs = self.pairs + 2 * count * self.tokens + count**2 * self.number
        return Sequences(self.number, self.tokens + count * self.number, pairs)


@dataclass(frozen=True)
class MaskSizes:
    """The sequences of one mask; the target groups are `targets`, one sequence each."""

    context: Sequences
    targets: Sequences
    predictor: Sequences

    @staticmethod
    def of(masks: Iterable[Masks]) -> MaskSizes:
        """Means over all masks of some batches of the same size."""
        counts = [(m.context.counts[:, None], m.targets.counts) for m in masks]
        parts = [map(Sequences.of, (c, t, c + t)) for c, t in counts]
        return MaskSizes(*map(Sequences.mean, zip(*parts, strict=True)))


def describe_parameters(jepa: JEPA) -> str:
    """One line: the number of parameters of each part, and how many are trained."""
    sizes = {
        name: sum(p.numel() for p in part.parameters()) for name, part in jepa.named_children()
    }
    trained = sum(p.numel() for p in jepa.parameters() if p.requires_grad)
    parts = ", ".join(f"{name} {size / 1e6:.3g} M" for name, size in sizes.items() if size)
    return f"{sum(sizes.values()) / 1e6:.3g} M parameters, {trained / 1e6:.3g} M trained: {parts}"


def expected_sizes(jepa: JEPA, num_samples: int, first_step: int, last_step: int) -> MaskSizes:
    """The expected sizes of the masks of complete crops, from a sample of the masker's draws.

    Args:
        jepa: the model.
        num_samples: samples of a crop.
        first_step: first optimizer step of the run.
        last_step: the step after the last one; the sample is spread over all steps, because a
            curriculum and the shares of a step change the sizes.

    Raises:
        UserError: if crops cannot be masked.
    """
    source = MaskSource.of(jepa, num_samples, MaskStream.TRAINING)
    steps = torch.linspace(first_step, max(last_step - 1, first_step), _NUM_STEPS).long().unique()
    rows = torch.arange(_NUM_ROWS * (_NUM_STEPS // len(steps)))
    return MaskSizes.of(source.draw(rows + step * len(rows), int(step)) for step in steps)


def crop_flops(jepa: JEPA, num_samples: int, sizes: MaskSizes) -> dict[str, Flops]:
    """The operations of a training step for one crop, for each part of the model.

    Counted are matrix products and convolutions, the usual measure for the utilisation of a device
    (model FLOPs; Chowdhery et al., 2022, arXiv:2204.02311, appendix B): a backward pass has twice
    the operations of its forward pass where both weights and inputs need gradients. Not counted:
    padding, recomputed blocks (`checkpoint_every`), Fourier transforms, regularizers, rendering of
    scenes, the optimizer.

    Args:
        jepa: the model; its parameters are not sharded.
        num_samples: samples of a crop.
        sizes: sizes of a mask; a crop has `masks_per_clip` masks.
    """
    embed_dim, predictor, top_k = jepa.encoder.embed_dim, jepa.predictor, jepa.targets.top_k
    num_tokens = torch.tensor([[jepa.front_end.grid(num_samples).num_tokens]])
    front_end = count_front_end(jepa.front_end, num_samples)
    context = transformer_flops(jepa.encoder, sizes.context)
    trunk = transformer_flops(predictor.trunk, sizes.predictor)
    projected = sizes.context.tokens * embed_dim + sizes.targets.tokens * (
        predictor.proj_out.out_features
    )
    predicted = trunk + 2 * predictor.trunk.embed_dim * projected
    if top_k == 0:
        target = 0.0
    elif jepa.targets.view == "clip":
        target = transformer_flops(jepa.encoder, Sequences.of(num_tokens))
    else:
        target = transformer_flops(jepa.encoder, sizes.targets) * jepa.masks_per_clip
    parts = {
        "front end": front_end,
        "context encoder": _trained(context).times(float(jepa.masks_per_clip)),
        "target encoder": _trained(target) if jepa.target_gradient else Flops(target),
        "predictor": _trained(predicted).times(float(jepa.masks_per_clip)),
    }
    if jepa.fixed_front_end is not None:
        parts["target front end"] = _count_aligned(jepa.fixed_front_end, jepa, num_samples)
    elif jepa.target_front_end is not None:
        parts["target front end"] = Flops(front_end.forward)
    if isinstance(jepa.distance, CrossEntropy):
        head = _distance_flops(jepa.distance)
        parts["classes"] = head.times(sizes.targets.tokens * jepa.masks_per_clip)
    return parts


def transformer_flops(transformer: Transformer, sequences: Sequences) -> float:
    """The operations of a forward pass: linear layers, and the two products of attention."""
    sequences = sequences.with_registers(
        0 if transformer.registers is None else len(transformer.registers)
    )
    linear = (part for part in transformer.blocks.modules() if isinstance(part, nn.Linear))
    num_weights = sum(part.weight.numel() for part in linear)
    attention = 4 * transformer.embed_dim * transformer.depth * sequences.pairs
    return 2 * num_weights * sequences.tokens + attention


def count_front_end(front_end: FrontEnd, num_samples: int) -> Flops:
    """The operations of a front end for one crop, counted on the CPU: any class may be given."""
    front_end = _copy(front_end)
    waveform = torch.zeros(1, front_end.num_channels, num_samples)
    with torch.enable_grad(), torch.random.fork_rng([]), FlopCounterMode(display=False) as counter:
        tokens = front_end(waveform)
        forward = counter.get_total_flops()
        if tokens.requires_grad:
            tokens.sum().backward()
    return Flops(float(forward), float(counter.get_total_flops() - forward))


def _count_aligned(source: FrontEnd, jepa: JEPA, num_samples: int) -> Flops:
    """The operations of the targets of another front end, which is never trained."""
    waveform = torch.zeros(1, source.num_channels, num_samples)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        aligned_tokens(_copy(source), jepa.front_end, waveform)
    return Flops(float(counter.get_total_flops()))


def _copy(front_end: FrontEnd) -> FrontEnd:
    """A copy on the CPU; statistics that are not measured yet do not change the operations."""
    front_end = copy.deepcopy(front_end).cpu().eval()
    if isinstance(front_end, PatchedSpectrogram) and front_end.mean is None:
        front_end.mean, front_end.std = 0.0, 1.0
    return front_end


def _distance_flops(distance: CrossEntropy) -> Flops:
    """The operations of head and codebook for one target token.

    The codebook multiplies the targets, which have no gradient, by each of its matrices.
    """
    head = _trained(2.0 * distance.head.weight.numel())
    codebook = distance.codebook
    matrices = [t for t in (*codebook.parameters(), *codebook.buffers()) if t.dim() == 2]
    forward = sum(2.0 * matrix.numel() for matrix in matrices)
    backward = sum(2.0 * matrix.numel() for matrix in matrices if matrix.requires_grad)
    return Flops(head.forward + forward, head.backward + backward)


def _trained(forward: float) -> Flops:
    """With the gradients of weights and of inputs, each as many operations as the forward pass."""
    return Flops(forward, 2 * forward)
