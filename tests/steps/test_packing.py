"""Packed rows give the results of padded rows with a key mask, and of each row alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from jepa_audio.steps.encoder import packing, transformer
from jepa_audio.steps.encoder.packing import PackedRows
from jepa_audio.steps.encoder.transformer import Transformer
from jepa_audio.steps.grid import AudioBatch, Grid, Masks, TokenSet
from jepa_audio.training.jepa import JEPA
from tests.oracles import packed_literal
from tests.steps.test_transformer import VARIANTS, build

GRID = Grid(num_freq=3, num_time=8)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows are packed on the CPU, with a loop over rows as the kernel; the lengths of its input."""
    lengths: list[int] = []

    def attend_rows(query: Tensor, *others) -> Tensor:
        lengths.append(len(query))
        return packed_literal.attend_rows(query, *others)

    monkeypatch.setattr(packing, "attend_rows", attend_rows)
    monkeypatch.setattr(transformer, "can_pack", lambda *_: True)
    return lengths


@pytest.fixture
def keep() -> TokenSet:
    order = torch.rand(4, GRID.num_tokens, generator=torch.Generator().manual_seed(1)).argsort(-1)
    return TokenSet.from_mask(order < torch.tensor([24, 1, 7, 12])[:, None])


def gradients(
    encoder: Transformer, tokens: Tensor, keep: TokenSet, layers: bool
) -> list[Tensor | None]:
    """The valid outputs, and the gradients of the parameters and the tokens."""
    tokens = tokens.clone().requires_grad_()
    torch.manual_seed(3)  # drop path
    outputs = (
        encoder.forward_layers(tokens, GRID, keep) if layers else [encoder(tokens, GRID, keep)]
    )
    valid = [output[keep.valid] for output in outputs]
    loss = sum(output.sin().sum() for output in valid)
    inputs = [tokens, *encoder.parameters()]
    return [*valid, *torch.autograd.grad(loss, inputs, allow_unused=True)]


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_packed_rows_equal_masked_rows(name: str, layers: bool, keep: TokenSet, packed: list[int]):
    masking, packing_ = build(**VARIANTS[name]), build(**VARIANTS[name])
    packing_.packs = True
    tokens = torch.randn(4, GRID.num_tokens, 16, generator=torch.Generator().manual_seed(2))
    expected = gradients(masking, tokens, keep, layers)
    assert not packed
    found = gradients(packing_, tokens, keep, layers)
    num_registers = 0 if masking.registers is None else len(masking.registers)
    assert set(packed) == {24 + 1 + 7 + 12 + 4 * num_registers}
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


def test_rows_are_packed_in_their_order_and_unpacked_with_zeros():
    valid = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    rows = PackedRows.of(valid, 5)
    tokens = torch.arange(1.0, 10).view(3, 3, 1)
    assert rows.pack(tokens)[:, 0].tolist() == [1, 3, 7, 8, 9]
    assert rows.row.tolist() == [0, 0, 2, 2, 2]
    assert rows.ends.tolist() == [0, 2, 2, 5]
    assert rows.ends.dtype == torch.int32
    assert torch.equal(rows.unpack(rows.pack(tokens)), tokens * valid[..., None])


@pytest.mark.parametrize(
    ("flavour", "settings"),
    [
        ("wave", ()),
        ("wave", ("--model.masks_per_clip=2", "--model.encoder.drop_path=0.3")),
        ("mel", ("--model.masker=MultiBlockMasker", "--model.encoder.num_registers=1")),
        ("mel", ("--model.targets.view=clip", "--model.targets.normalization=joint_instance")),
    ],
    ids=["spans", "two masks", "targets only", "padded clips"],
)
def test_a_packed_step_has_the_loss_and_the_gradient_of_a_masked_step(
    tiny_jepa: Callable[..., JEPA],
    batch: AudioBatch,
    packed: list[int],
    flavour: str,
    settings: tuple[str, ...],
):
    masking, packing_ = (
        tiny_jepa(flavour, *settings, f"--model.packed={word}").train() for word in ("no", "yes")
    )
    if "view" in str(settings):
        batch = batch._replace(num_samples=torch.tensor([500, 300, 420, 250]))
    masks = masking.draw_masks(batch)
    losses = []
    for jepa in (masking, packing_):
        torch.manual_seed(5)
        losses.append(jepa.loss(batch.waveform, masks))
        losses[-1].backward()
        assert bool(packed) == (jepa is packing_)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for a, b in zip(packing_.parameters(), masking.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


def test_rows_of_equal_length_are_neither_packed_nor_masked(packed: list[int]):
    encoder = build()
    encoder.packs = True
    tokens = torch.randn(2, GRID.num_tokens, 16)
    encoder(tokens, GRID, TokenSet.from_mask(torch.arange(GRID.num_tokens).expand(2, -1) < 5))
    assert not packed


def test_without_a_gpu_rows_are_masked(keep: TokenSet):
    tokens = torch.randn(4, GRID.num_tokens, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert not packing.can_pack(tokens, 8)


@pytest.mark.parametrize("problem", [None, "raises", "wrong"])
def test_a_kernel_is_used_only_if_its_results_are_right(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, problem: str | None
):
    def attend_rows(*parts) -> Tensor:
        if problem == "raises":
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")
        return packed_literal.attend_rows(*parts) * (1.05 if problem else 1)

    monkeypatch.setattr(packing, "attend_rows", attend_rows)
    packing._kernel_works.cache_clear()
    works = packing._kernel_works(torch.device("cpu"), torch.bfloat16, 32)
    packing._kernel_works.cache_clear()
    assert works == (problem is None)
    assert ("masked, not packed" in caplog.text) == (problem is not None)
    assert ("Ampere" in caplog.text) == (problem == "raises")


def test_rows_are_padded_to_few_lengths_without_a_change_of_the_masks(
    ragged: Callable[[Grid, int, int], Masks],
):
    for tokens in (ragged(GRID, 4, 2).context, ragged(GRID, 4, 2).targets):
        padded = tokens.pad_rows(8, GRID.num_tokens)
        assert padded.index.shape[-1] == 8
        assert torch.equal(padded.to_mask(GRID.num_tokens), tokens.to_mask(GRID.num_tokens))
        assert padded.num_valid == int(tokens.counts.sum())
        # Each row is padded with other tokens of its clip.
        assert all(len(set(row)) == 8 for row in padded.index.flatten(0, -2).tolist())
        assert tokens.pad_rows(64, GRID.num_tokens).index.shape[-1] == GRID.num_tokens
    equal = TokenSet.from_mask(torch.arange(24).expand(2, -1) < 5)
    assert equal.pad_rows(8, 24) is equal


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["post-norm", "rotary registers"])
def test_packed_rows_equal_masked_rows_on_a_gpu(name: str, keep: TokenSet):
    encoder = build(**VARIANTS[name], embed_dim=64).cuda()
    tokens = torch.randn(4, GRID.num_tokens, 64, device="cuda")
    on_device = keep.to(torch.device("cuda"))
    outputs = []
    with torch.autocast("cuda", torch.bfloat16):
        for encoder.packs in (False, True):
            outputs.append(encoder(tokens, GRID, on_device)[on_device.valid])
    torch.testing.assert_close(*outputs, rtol=2e-2, atol=2e-2)
