"""Steps 4 and 6 of a JEPA: codebooks, which turn target latents into classes to predict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from typing_extensions import override

from jepa_audio.errors import check_bounds
from jepa_audio.steps.grid import Grid, TokenSet

MAX_CLASSES, MAX_CODEBOOK_DIM = 2**18, 256
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 1000
# Weight of the newest micro-batch in statistics of the training so far, after the first 100.
_RATE = 0.01
# Constant that is added to the variance of a channel.
_EPS = 1e-5


class Classes(NamedTuple):
    """The classes of target tokens.

    Attributes:
        target: the index of the class of each token, or the probabilities of the C classes.
        loss: at each token, the loss that trains the codebook; `None` if it is not trained.
    """

    target: Int[Tensor, "*tokens"] | Float[Tensor, "*tokens C"]
    loss: Float[Tensor, "*tokens"] | None = None


class Codebook(nn.Module, ABC):
    """Turns target latents into classes. No gradient reaches the latents.

    A subclass creates its tensors in `set_width`, because the width of the targets is known only
    when a `JEPA` is built. The buffers of this class are statistics of the training so far, with
    the same weight for each of the first 100 micro-batches and more weight for newer ones later.

    Args:
        num_classes: number of classes C.
    """

    frequencies: Float[Tensor, " C"]  # mean probabilities of the classes
    entropy: Float[Tensor, ""]  # mean entropy of the probabilities of a token, in nats
    own_loss: Float[Tensor, ""]  # mean loss that trains the codebook, 0 if it is not trained
    num_batches: Int[Tensor, ""]  # micro-batches so far
    num_tokens: Int[Tensor, ""]  # target tokens so far, on all processes

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        check_bounds(self, 2, MAX_CLASSES, "num_classes")
        self.register_buffer("frequencies", torch.full((num_classes,), 1 / num_classes))
        for name in ("entropy", "own_loss"):
            self.register_buffer(name, torch.zeros(()))
        for name in ("num_batches", "num_tokens"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    @property
    def has_batch_statistics(self) -> bool:
        """Whether the classes of a token in training depend on the other tokens of a batch."""
        return False

    @abstractmethod
    def set_width(self, target_dim: int) -> None:
        """Create the tensors for targets of a width."""

    def reset_parameters(self) -> None:
        """Draw the initial weights of a trained codebook from torch's global generator."""

    @abstractmethod
    def classify(self, target: Float[Tensor, "Q M L T"], where: TokenSet, grid: Grid) -> Classes:
        """The classes of target tokens, from float32 targets without gradient.

        Args:
            target: the targets, of width T.
            where: the tokens; statistics do not include those at which `valid` is False.
            grid: the grid of the clips.
        """

    def forward(self, target: Float[Tensor, "Q M L T"], where: TokenSet, grid: Grid) -> Classes:
        """The classes of target tokens; see `classify`."""
        if self.updates_statistics:
            self.num_batches += 1
        with torch.autocast(target.device.type, enabled=False):
            classes = self.classify(target.detach().float(), where, grid)
            if self.updates_statistics:
                self._count(classes, where.valid_or_true.flatten())
        return classes

    @property
    def updates_statistics(self) -> bool:
        """True in a forward pass of the training."""
        return self.training and torch.is_grad_enabled()

    def update(self, statistic: Tensor, value: Tensor) -> None:
        """Move a statistic towards its value for this micro-batch."""
        statistic.lerp_(value, (1 / self.num_batches).clamp_min(_RATE))

    @property
    def perplexity(self) -> float:
        """How many classes the targets of the training so far distinguish, between 1 and C.

        It is exp(entropy of the class frequencies - mean entropy of the probabilities of a token).
        If each token has one class, this is the perplexity of the class frequencies.
        """
        return float((torch.special.entr(self.frequencies).sum() - self.entropy).exp())

    def _count(self, classes: Classes, valid: Bool[Tensor, " n"]) -> None:
        weight, target, zero = valid.float(), classes.target, self.entropy.new_zeros(())
        own_loss = zero if classes.loss is None else weight @ classes.loss.detach().flatten()
        if target.is_floating_point():
            probabilities = target.flatten(0, -2)
            totals = weight @ probabilities
            entropy = weight @ torch.special.entr(probabilities).sum(dim=-1)
        else:
            totals = zero.new_zeros(self.num_classes).index_add_(0, target.flatten(), weight)
            entropy = zero
        values = torch.stack([entropy, own_loss, weight.sum()])
        *means, count = all_reduce(torch.cat([totals, values])).split([self.num_classes, 1, 1, 1])
        self.num_tokens += count[0].long()
        for statistic, total in zip(
            (self.frequencies, self.entropy, self.own_loss), means, strict=True
        ):
            self.update(statistic, (total / count.clamp_min(1)).view_as(statistic))


class RandomProjection(Codebook):
    """A random, frozen codebook (BEST-RQ; Chiu et al., 2022, arXiv:2202.01855, section 3.1).

    The class of a target x is the code that is nearest to the projection A x, both normalised to
    unit length. A is Xavier-uniform and the codes are standard normal; neither is ever trained.
    Without normalised targets, most targets have the same few classes.

    Args:
        num_classes: number of codes; the paper has 8,192.
        codebook_dim: width of a code; the paper has 16.
        normalization: normalisation of the targets before the projection. "batch": mean 0 and
            standard deviation 1 of each channel, over the target tokens of a micro-batch on all
            processes; an evaluation uses the statistics of the training so far.
            "layer": over the channels of each token. "none": the targets as they are.
        seed: seed of projection and codes, which do not depend on the seed of the model.
    """

    projection: Float[Tensor, "T P"]
    codes: Float[Tensor, "C P"]
    mean: Float[Tensor, " T"]
    variance: Float[Tensor, " T"]

    def __init__(
        self,
        num_classes: int = 8192,
        codebook_dim: int = 16,
        normalization: Literal["batch", "layer", "none"] = "batch",
        seed: int = 0,
    ) -> None:
        super().__init__(num_classes)
        self.codebook_dim, self.normalization, self.seed = codebook_dim, normalization, seed
        check_bounds(self, 1, MAX_CODEBOOK_DIM, "codebook_dim")
        check_bounds(self, 0, 2**63 - 1, "seed")

    @property
    @override
    def has_batch_statistics(self) -> bool:
        return self.normalization == "batch"

    @override
    def set_width(self, target_dim: int) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        projection = torch.empty(target_dim, self.codebook_dim, device="cpu")
        nn.init.xavier_uniform_(projection, generator=generator)
        size = (self.num_classes, self.codebook_dim)
        codes = torch.randn(size, generator=generator, device="cpu")
        self.register_buffer("projection", projection)
        self.register_buffer("codes", F.normalize(codes, dim=-1))
        if self.normalization == "batch":
            self.register_buffer("mean", torch.zeros(target_dim))
            self.register_buffer("variance", torch.ones(target_dim))

    @override
    def classify(self, target: Float[Tensor, "Q M L T"], where: TokenSet, grid: Grid) -> Classes:
        projected = self._normalize(target, where) @ self.projection
        # The nearest of unit vectors has the largest inner product. The length of the projection
        # does not change which one that is.
        return Classes((projected @ self.codes.T).argmax(dim=-1))

    def _normalize(self, target: Tensor, where: TokenSet) -> Tensor:
        if self.normalization == "none":
            return target
        if self.normalization == "layer":
            return F.layer_norm(target, target.shape[-1:], eps=_EPS)
        mean, variance = self.mean, self.variance
        if self.training:
            mean, variance = channel_moments(target, where.valid_or_true)
        if self.updates_statistics:
            self.update(self.mean, mean)
            self.update(self.variance, variance)
        return (target - mean) * (variance + _EPS).rsqrt()


class OnlineClusters(Codebook):
    """Clusters that are learned during the run (CAPI; Darcet et al., 2025, arXiv:2502.08769).

    A linear layer computes the score of each cluster for a target of unit length. In training, the
    classes are the Sinkhorn-Knopp assignments of the scores divided by `target_temperature`: all
    clusters get the same share of the target tokens. By position, they get the same share at every
    position of the grid, so that no cluster stands for a position. The layer learns by the
    cross-entropy of its own probabilities, softmax(scores / `temperature`), from the assignments;
    its weights are in the optimizer of the model (CAPI has a second optimizer with half of the
    learning rate).

    The assignments are those of one micro-batch over all processes. An evaluation takes the
    probabilities of the layer instead, so that its loss does not depend on the batches. CAPI
    assigns all tokens of the clips, here only target tokens are assigned.

    Args:
        num_classes: number of clusters; CAPI has 16,384, and 2,048 clips in a batch.
        by_position: assign the tokens of each position separately; needs many clips in a batch,
            because the assignments of a few tokens to many clusters are nearly uniform.
        target_temperature: temperature of the assignments.
        temperature: temperature of the probabilities of the layer.
        num_iterations: iterations of the Sinkhorn-Knopp algorithm.
    """

    scores: nn.Linear

    def __init__(
        self,
        num_classes: int,
        by_position: bool = True,
        target_temperature: float = 0.06,
        temperature: float = 0.12,
        num_iterations: int = 3,
    ) -> None:
        super().__init__(num_classes)
        self.by_position, self.num_iterations = by_position, num_iterations
        self.target_temperature, self.temperature = target_temperature, temperature
        check_bounds(self, 1, 1000, "num_iterations")
        check_bounds(self, MIN_TEMPERATURE, MAX_TEMPERATURE, "target_temperature", "temperature")

    @property
    @override
    def has_batch_statistics(self) -> bool:
        return True

    @override
    def set_width(self, target_dim: int) -> None:
        self.scores = nn.Linear(target_dim, self.num_classes)

    @override
    def reset_parameters(self) -> None:
        nn.init.normal_(self.scores.weight)
        nn.init.zeros_(self.scores.bias)

    @override
    def classify(self, target: Float[Tensor, "Q M L T"], where: TokenSet, grid: Grid) -> Classes:
        scores = self.scores(F.normalize(target, dim=-1))
        predicted = F.log_softmax(scores / self.temperature, dim=-1)
        if not self.training:
            return Classes(predicted.exp())
        index = where.index if self.by_position else torch.zeros_like(where.index)
        assigned = assign_equally(
            scores.detach().flatten(0, -2) / self.target_temperature,
            index.flatten(),
            where.valid_or_true.flatten(),
            grid.num_tokens if self.by_position else 1,
            self.num_iterations,
        ).view_as(scores)
        return Classes(assigned, -(assigned * predicted).sum(dim=-1))


@torch.no_grad()
def assign_equally(
    scores: Float[Tensor, "n C"],
    group: Int[Tensor, " n"],
    valid: Bool[Tensor, " n"],
    num_groups: int,
    num_iterations: int,
) -> Float[Tensor, "n C"]:
    """Sinkhorn-Knopp assignments of tokens to clusters, over the tokens of all processes.

    exp(scores) is scaled so that each cluster gets the same sum over the valid tokens of a group,
    then so that each token has the sum 1; this is repeated. The first time is computed with
    logarithms, so that no score is too large; then each cluster has a token whose assignment is at
    least 1 / (n C).

    Args:
        scores: the score of each cluster for each token.
        group: the number of the group of each token, below `num_groups`.
        valid: False at tokens that are not counted; their assignments have no meaning.
        num_groups: the number of groups, the same on all processes.
        num_iterations: number of repetitions.
    """
    weight = valid[:, None].to(scores.dtype)
    size = (num_groups, scores.shape[-1])

    def group_sums(values: Tensor) -> Tensor:
        sums = all_reduce(scores.new_zeros(size).index_add_(0, group, values * weight))
        return sums.masked_fill_(sums == 0, 1.0)  # groups without a valid token

    lowest = torch.finfo(scores.dtype).min
    largest = scores.new_full(size, lowest).scatter_reduce_(
        0, group[:, None].expand_as(scores), scores.masked_fill(~valid[:, None], lowest), "amax"
    )
    largest = all_reduce(largest, distributed.ReduceOp.MAX)
    scores = scores - largest.masked_fill_(largest == lowest, 0.0)[group]
    sums = group_sums(scores.clamp_max(0).exp())
    assigned = (scores - sums.log()[group]).softmax(dim=-1)
    for _ in range(num_iterations - 1):
        assigned = assigned / group_sums(assigned)[group]
        assigned = assigned / assigned.sum(dim=-1, keepdim=True)
    return assigned


@torch.no_grad()
def channel_moments(
    values: Float[Tensor, "*tokens T"], valid: Bool[Tensor, "*tokens"]
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """Mean and variance of each channel over the `valid` tokens of all processes."""
    weight = valid.flatten()[:, None].to(values.dtype)
    values = values.flatten(0, -2)
    sums = torch.cat([(values * weight).sum(dim=0), weight.sum(dim=0)])
    sums = all_reduce(sums)
    count = sums[-1].clamp_min(1)
    mean = sums[:-1] / count
    variance = all_reduce(((values - mean).square() * weight).sum(dim=0)) / count
    return mean, variance


def all_reduce(
    tensor: Tensor, op: distributed.ReduceOp.RedOpType = distributed.ReduceOp.SUM
) -> Tensor:
    """Combine a tensor of all processes, in place and without gradients."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(tensor, op)
    return tensor
