"""The transformer: only selected tokens are used, and blocks equal those of torch and timm."""

from dataclasses import dataclass

import pytest
import torch
from timm.models.eva import EvaBlock
from torch import Tensor, nn

from jepa_audio.steps.encoder.positions import Positions, RotaryPositions, SinCosPositions
from jepa_audio.steps.encoder.transformer import Block, Transformer
from jepa_audio.steps.grid import Grid, TokenSet

GRID = Grid(num_freq=3, num_time=8)
DIM = 16
VARIANTS = {
    "post-norm": {"norm": "post"},
    "pre-norm": {"norm": "pre"},
    "swiglu": {"mlp": "swiglu"},
    "registers": {"num_registers": 3},
    "layer scale": {"layer_scale": 0.1},
    "drop path": {"drop_path": 0.3},
    "qk norm": {"qk_norm": True},
    "rotary": {"positions": RotaryPositions()},
    "rotary registers": {"positions": RotaryPositions(), "num_registers": 2, "qk_norm": True},
    "rotary over time": {"positions": RotaryPositions("time", normalized=False), "mlp": "swiglu"},
    "xavier, checkpointed": {
        "init": "xavier",
        "checkpoint_every": 1,
        "norm": "post",
        "num_registers": 1,
    },
}


@dataclass(frozen=True)
class NoPositions(Positions):
    """No position encoding."""

    def check_width(self, dim: int, num_heads: int) -> None:
        pass


def build(**settings: object) -> Transformer:
    torch.manual_seed(0)
    encoder = Transformer(
        **{"embed_dim": DIM, "depth": 3, "num_heads": 2, "positions": SinCosPositions(), **settings}
    )
    # Initial biases are 0, norms are the identity, and attention is almost uniform: change them.
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def encoder(request: pytest.FixtureRequest) -> Transformer:
    return build(**request.param)


@pytest.fixture
def tokens(rng: torch.Generator) -> Tensor:
    return torch.randn(4, GRID.num_tokens, DIM, generator=rng)


@pytest.fixture
def keep(rng: torch.Generator) -> TokenSet:
    tokens = TokenSet.from_mask(
        torch.rand(4, GRID.num_tokens, generator=rng) < torch.tensor([0.2, 0.4, 0.6, 0.8])[:, None]
    )
    assert tokens.valid is not None
    return tokens


def test_outputs_and_gradients_are_finite_and_every_parameter_has_a_gradient(
    encoder: Transformer, tokens: Tensor, keep: TokenSet
):
    latents = encoder(tokens, GRID, keep)
    assert latents.shape == (*keep.index.shape, DIM)
    latents[keep.valid].square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_tokens_outside_the_set_have_no_influence(
    encoder: Transformer, tokens: Tensor, keep: TokenSet, rng: torch.Generator
):
    encoder.eval()
    others = torch.randn(tokens.shape, generator=rng)
    changed = torch.where(keep.to_mask(GRID.num_tokens)[..., None], tokens, others)
    assert torch.equal(
        encoder(changed, GRID, keep)[keep.valid], encoder(tokens, GRID, keep)[keep.valid]
    )


def test_tokens_outside_the_set_have_no_gradient(
    encoder: Transformer, tokens: Tensor, keep: TokenSet
):
    tokens.requires_grad_()
    encoder.eval()(tokens, GRID, keep)[keep.valid].square().sum().backward()
    seen = keep.to_mask(GRID.num_tokens)
    assert torch.equal(tokens.grad[~seen], torch.zeros_like(tokens.grad[~seen]))
    assert (tokens.grad[seen].abs().sum(-1) > 0).all()


def test_selected_tokens_equal_full_grid_with_key_mask(
    encoder: Transformer, tokens: Tensor, keep: TokenSet
):
    encoder.eval()
    everywhere = torch.arange(GRID.num_tokens).expand(4, -1)
    slow = encoder(tokens, GRID, TokenSet(everywhere, keep.to_mask(GRID.num_tokens)))
    torch.testing.assert_close(
        encoder(tokens, GRID, keep)[keep.valid], keep.gather(slow)[keep.valid], rtol=1e-5, atol=1e-5
    )


def test_padded_row_of_a_batch_equals_row_encoded_separately(
    encoder: Transformer, tokens: Tensor, keep: TokenSet
):
    encoder.eval()
    batched = encoder(tokens, GRID, keep)
    batched_layers = encoder.forward_layers(tokens, GRID, keep)
    for row, count in enumerate(keep.counts.tolist()):
        alone = TokenSet(keep.index[row : row + 1, :count])
        one = tokens[row : row + 1]
        torch.testing.assert_close(
            batched[row, :count], encoder(one, GRID, alone)[0], rtol=1e-5, atol=1e-5
        )
        for batched_layer, layer in zip(
            batched_layers, encoder.forward_layers(one, GRID, alone), strict=True
        ):
            torch.testing.assert_close(batched_layer[row, :count], layer[0], rtol=1e-5, atol=1e-5)


def test_order_of_the_selected_tokens_has_no_influence(
    encoder: Transformer, tokens: Tensor, rng: torch.Generator
):
    encoder.eval()
    index = torch.rand(4, GRID.num_tokens, generator=rng).argsort(-1)[:, :9]
    order = torch.randperm(9, generator=rng)
    in_order, shuffled = TokenSet(index), TokenSet(index[:, order])
    torch.testing.assert_close(
        encoder(tokens, GRID, in_order)[:, order],
        encoder(tokens, GRID, shuffled),
        rtol=1e-5,
        atol=1e-5,
    )


def test_keep_none_equals_all_tokens(encoder: Transformer, tokens: Tensor):
    encoder.eval()
    everything = TokenSet(torch.arange(GRID.num_tokens).expand(4, -1))
    torch.testing.assert_close(
        encoder(tokens, GRID), encoder(tokens, GRID, everything), rtol=1e-5, atol=1e-5
    )


def test_output_is_the_norm_of_the_last_layer(encoder: Transformer, tokens: Tensor, keep: TokenSet):
    layers = encoder.eval().forward_layers(tokens, GRID, keep)
    assert len(layers) == encoder.depth
    assert torch.equal(encoder.norm(layers[-1]), encoder(tokens, GRID, keep))


def test_positions_come_from_the_grid(tokens: Tensor, keep: TokenSet):
    encoder, without_positions = build().eval(), build(positions=NoPositions()).eval()
    without_positions.load_state_dict(encoder.state_dict())
    table = SinCosPositions().additive(GRID, DIM, tokens.device)
    assert torch.equal(encoder(tokens, GRID, keep), without_positions(tokens + table, GRID, keep))
    torch.testing.assert_close(encoder.add_positions(tokens, GRID), tokens + table)
    torch.testing.assert_close(
        encoder.add_positions(keep.gather(tokens), GRID, keep), keep.gather(tokens + table)
    )


@pytest.mark.parametrize("settings", [{}, {"num_registers": 2}], ids=["plain", "registers"])
def test_without_positions_permuted_tokens_give_permuted_latents(
    settings: dict[str, int], tokens: Tensor
):
    encoder = build(positions=NoPositions(), **settings).eval()
    flipped = encoder(tokens.flip(1), GRID).flip(1)
    torch.testing.assert_close(encoder(tokens, GRID), flipped, rtol=1e-5, atol=1e-5)
    rotary = build(positions=RotaryPositions(), **settings).eval()
    assert not torch.allclose(
        rotary(tokens, GRID), rotary(tokens.roll(1, 1), GRID).roll(-1, 1), atol=1e-3
    )


@pytest.mark.parametrize(
    "settings",
    [{"norm": "post"}, {"drop_path": 0.4}, {"num_registers": 2, "positions": RotaryPositions()}],
)
def test_activation_checkpointing_keeps_loss_and_gradients(
    settings: dict[str, object], tokens: Tensor, keep: TokenSet
):
    results = []
    for checkpoint_every in (0, 1, 2):
        encoder = build(**settings, checkpoint_every=checkpoint_every)
        torch.manual_seed(1)
        loss = encoder(tokens, GRID, keep)[keep.valid].square().mean()
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in encoder.parameters())])
    for values in results[1:]:
        torch.testing.assert_close(values, results[0], rtol=1e-6, atol=1e-7)


def test_only_checkpointed_blocks_are_computed_twice(tokens: Tensor):
    calls: list[int] = []
    encoder = build(depth=4, checkpoint_every=2)
    for i, block in enumerate(encoder.blocks):
        block.attn.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    encoder(tokens, GRID).sum().backward()
    assert sorted(calls) == [0, 0, 1, 2, 2, 3]


def torch_names(block: Block) -> dict[str, Tensor]:
    pairs = {
        "self_attn.in_proj_": "attn.qkv.",
        "self_attn.out_proj.": "attn.proj.",
        "linear1.": "mlp.fc1.",
    }
    pairs |= {"linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2."}
    state = block.state_dict()
    return {
        reference + part: state[ours + part]
        for reference, ours in pairs.items()
        for part in ("weight", "bias")
    }


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_gelu_block_equals_torch_encoder_layer(norm: str, tokens: Tensor):
    (ours,) = build(depth=1, norm=norm, norm_eps=1e-5).eval().blocks
    reference = nn.TransformerEncoderLayer(
        DIM, 2, 4 * DIM, dropout=0.0, activation="gelu", norm_first=norm == "pre", batch_first=True
    )
    reference.load_state_dict(torch_names(ours))
    torch.testing.assert_close(ours(tokens, None, None), reference(tokens), rtol=1e-5, atol=1e-5)
    key_mask = torch.rand(4, GRID.num_tokens) < 0.5
    torch.testing.assert_close(
        ours(tokens, None, key_mask[:, None, None]),
        reference(tokens, src_key_padding_mask=~key_mask),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("num_registers", [0, 2])
def test_swiglu_block_equals_timm_eva_block(num_registers: int, tokens: Tensor):
    (ours,) = build(depth=1, mlp="swiglu", norm_eps=1e-5, num_registers=num_registers).eval().blocks
    reference = EvaBlock(
        DIM,
        2,
        swiglu_mlp=True,
        attn_type="rope",
        num_prefix_tokens=num_registers,
        norm_layer=nn.LayerNorm,
    )
    reference.load_state_dict(ours.state_dict())
    table = RotaryPositions().rotary(GRID, DIM // 2, tokens.device)
    x = torch.cat([torch.ones(4, num_registers, DIM), tokens], dim=1)
    torch.testing.assert_close(
        ours(x, table[None, None], None), reference(x, rope=table), rtol=1e-5, atol=1e-5
    )


def test_drop_path_skips_branches_only_in_training_and_rises_with_depth(
    tokens: Tensor,
):
    plain, dropping = build(), build(drop_path=1.0 - 1e-9)
    assert torch.equal(dropping(tokens, GRID), plain(tokens, GRID)) is False
    first, _, last = dropping.forward_layers(tokens, GRID)
    entered: list[Tensor] = []
    dropping.blocks[-1].register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
    *_, last = dropping.forward_layers(tokens, GRID)
    assert torch.equal(first, plain.forward_layers(tokens, GRID)[0])
    assert torch.equal(last, entered[0])
    assert torch.equal(dropping.eval()(tokens, GRID), plain.eval()(tokens, GRID))
    probabilities = [block.drop_path.drop_prob for block in build(drop_path=0.2).blocks]
    assert probabilities == pytest.approx([0.0, 0.1, 0.2])


def test_reset_parameters_changes_all_weights_and_depends_only_on_the_seed():
    encoder = build(num_registers=2, qk_norm=True, layer_scale=0.1)
    changed = {name: value.clone() for name, value in encoder.state_dict().items()}
    torch.manual_seed(3)
    encoder.reset_parameters()
    first_state = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.reset_parameters()
    torch.manual_seed(3)
    encoder.reset_parameters()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, first_state[name]), name
        assert not torch.equal(value, changed[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, r"`num_heads` \(3\) must divide `embed_dim` \(16\)"),
        ({"depth": 0}, r"`depth` \(0\)"),
        ({"drop_path": 1.0}, r"`drop_path` \(1.0\)"),
        ({"checkpoint_every": -1}, r"`checkpoint_every` \(-1\)"),
        ({"embed_dim": 18}, r"`embed_dim` \(18\)"),
        (
            {"num_heads": 8, "positions": RotaryPositions()},
            r"`embed_dim` / `num_heads` \(16 / 8 = 2\)",
        ),
    ],
)
def test_invalid_setting_raises_an_error_with_its_name(settings: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        build(**settings)
