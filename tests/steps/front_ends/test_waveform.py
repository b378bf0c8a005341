"""The waveform front end."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from jepa_audio.steps.front_ends.waveform import WaveformFrontEnd
from jepa_audio.steps.grid import Grid

DATA = Path(__file__).parents[2] / "data"
TINY = [(8, 10, 5), (12, 3, 2), (6, 2, 2)]
WAVJEPA = [(512, 10, 5), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 2, 2)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", ["group", "layer", "none"])
@pytest.mark.parametrize("num_channels", [1, 2])
@pytest.mark.parametrize("num_samples", [30, 31, 49, 50, 333, 1001])
def test_number_of_tokens_equals_the_grid(norm: str, num_channels: int, num_samples: int) -> None:
    front_end = WaveformFrontEnd(TINY, 16, num_channels=num_channels, norm=norm)
    tokens = front_end(noise(2, num_channels, num_samples))
    assert tokens.shape == (2, front_end.grid(num_samples).num_tokens, 16)


def test_grid_stride_and_receptive_field_of_wavjepa() -> None:
    front_end = WaveformFrontEnd(WAVJEPA, 768)
    assert front_end.grid(32_160) == Grid(num_freq=1, num_time=200)
    assert (front_end.stride, front_end.receptive_field) == (160, 240)  # 10 ms, 15 ms


def test_receptive_field_is_the_shortest_clip() -> None:
    front_end = WaveformFrontEnd(TINY, 4)
    samples = front_end.receptive_field
    assert front_end.grid(samples).num_tokens == 1
    with pytest.raises(
        ValueError, match=rf"{samples - 1} samples is too short: one token needs {samples}"
    ):
        front_end.grid(samples - 1)
    with pytest.raises(ValueError, match="too short"):
        front_end(noise(1, 1, samples - 1))


def test_token_depends_only_on_its_receptive_field() -> None:
    front_end = WaveformFrontEnd(TINY, 4, norm="layer", standardize=False)
    waveform = noise(1, 1, 200).requires_grad_()
    front_end(waveform)[0, 3].sum().backward()
    assert waveform.grad is not None
    dependencies = waveform.grad[0, 0].nonzero().flatten()
    start = 3 * front_end.stride
    assert dependencies.min() == start
    assert dependencies.max() == start + front_end.receptive_field - 1


def test_tokens_equal_the_published_wavjepa() -> None:
    with safe_open(DATA / "wavjepa.safetensors", "pt") as file:
        sizes = {
            key: json.loads(value) for key, value in file.metadata().items() if key != "sample_rate"
        }
        saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    front_end = WaveformFrontEnd(
        [tuple(layer) for layer in sizes["conv_layers"]],
        sizes["encoder"]["width"],
        standardize=False,
    )
    names = {
        f"stacks.0.{i}.0.weight": f"extract_audio.cnn.{i}.0.weight"
        for i in range(len(front_end.stacks[0]))
    }
    for kind in ("weight", "bias"):
        names[f"stacks.0.0.1.{kind}"] = f"extract_audio.cnn.0.2.{kind}"
        names[f"norm.{kind}"] = f"feature_norms.{kind}"
        names[f"projection.{kind}"] = f"post_extraction_mapper.{kind}"
    front_end.load_state_dict({ours: saved[f"state/{theirs}"] for ours, theirs in names.items()})

    expected = saved["local_features"] - saved["state/pos_encoding_encoder"]
    with torch.no_grad():
        tokens = front_end(saved["audio"])
    assert tokens.shape[1] == front_end.grid(saved["audio"].shape[-1]).num_tokens == sizes["tokens"]
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_standardize_is_the_joint_z_score_of_the_clip() -> None:
    # Without a norm: a group norm would remove the scale.
    front_end = WaveformFrontEnd(TINY, 8, num_channels=2, norm="none")
    raw = WaveformFrontEnd(TINY, 8, num_channels=2, norm="none", standardize=False)
    raw.norm = front_end.norm = nn.Identity()
    raw.load_state_dict(front_end.state_dict())
    waveform = 1e-4 * noise(3, 2, 300) * torch.tensor([0.1, 2.0])[:, None] + 1e-4
    clips = [(clip - clip.mean()) / (clip.std(unbiased=True) + 1e-5) for clip in waveform]
    torch.testing.assert_close(front_end(waveform), raw(torch.stack(clips)), rtol=1e-4, atol=1e-5)


def test_bfloat16_waveform_is_processed_in_float32() -> None:
    front_end, waveform = WaveformFrontEnd(TINY, 8), noise(2, 1, 300).bfloat16()
    assert torch.equal(front_end(waveform), front_end(waveform.float()))


def test_silence_gives_finite_tokens_and_gradients() -> None:
    front_end = WaveformFrontEnd(TINY, 8)
    front_end(torch.zeros(2, 1, 100)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in front_end.parameters())


@pytest.mark.parametrize("norm", ["group", "layer", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_parameter_has_a_gradient(norm: str, bias: bool) -> None:
    front_end = WaveformFrontEnd(TINY, 8, num_channels=2, norm=norm, bias=bias)
    (front_end(noise(2, 2, 300)) * noise(8, seed=1)).square().sum().backward()
    # The group norm subtracts a bias before it, so the gradient of this bias is always 0.
    without_gradient = {"stacks.0.0.0.bias"} if norm == "group" else set()
    for name, parameter in front_end.named_parameters():
        assert parameter.grad is not None, name
        assert name in without_gradient or parameter.grad.abs().max() > 0, name


def test_group_norm_follows_only_the_first_layer() -> None:
    kinds = {
        norm: [type(layer[1]).__name__ for layer in WaveformFrontEnd(TINY, 4, norm=norm).stacks[0]]
        for norm in ("group", "layer", "none")
    }
    assert kinds == {
        "group": ["GroupNorm", "Identity", "Identity"],
        "layer": ["ChannelLayerNorm"] * 3,
        "none": ["Identity"] * 3,
    }


def test_tokens_are_float32_under_autocast() -> None:
    front_end = WaveformFrontEnd(TINY, 8)
    # In bfloat16, the offset would round the noise to 0 before the standardisation.
    waveform = 1e3 + noise(2, 1, 300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = front_end(waveform)
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, front_end(waveform), rtol=0.1, atol=0.1)


def test_reset_parameters_has_the_distribution_of_the_constructor() -> None:
    torch.manual_seed(3)
    front_end = WaveformFrontEnd(TINY, 8, bias=True)
    drawn = {name: parameter.clone() for name, parameter in front_end.named_parameters()}
    for parameter in front_end.parameters():
        torch.nn.init.constant_(parameter, 5.0)
    front_end.reset_parameters()
    for name, parameter in front_end.named_parameters():
        assert not (parameter == 5).any(), name
        if parameter.ndim == 3:  # standard deviation of Kaiming-normal: sqrt(2 / fan-in)
            expected = (2 / parameter[0].numel()) ** 0.5
            assert abs(drawn[name].std() - expected) < 0.3 * expected
            assert abs(parameter.std() - expected) < 0.3 * expected


@pytest.mark.parametrize("layers", [[], [(8, 0, 2)], [(0, 3, 2)], [(8, 3, 0)]])
def test_invalid_layers_raise_errors(layers: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match="`conv_layers`"):
        WaveformFrontEnd(layers, 8)


def test_separate_channels_have_separate_stacks_and_grid_rows(rng: torch.Generator) -> None:
    layers = [(8, 10, 5), (8, 8, 4)]
    both = WaveformFrontEnd(layers, 12, num_channels=2, separate_channels=True, standardize=False)
    clip = torch.randn(3, 2, 400, generator=rng)
    tokens = both(clip)
    grid = both.grid(400)
    assert (grid.num_freq, tokens.shape[1]) == (2, grid.num_tokens)
    for ear in (0, 1):
        one = WaveformFrontEnd(layers, 12, standardize=False)
        one.stacks[0].load_state_dict(both.stacks[ear].state_dict())
        one.norm.load_state_dict(both.norm.state_dict())
        one.projection.load_state_dict(both.projection.state_dict())
        torch.testing.assert_close(
            tokens[:, ear::2], one(clip[:, ear : ear + 1]), rtol=1e-5, atol=1e-6
        )


def test_standardisation_keeps_level_differences_between_channels(rng: torch.Generator) -> None:
    front_end = WaveformFrontEnd([(8, 10, 5)], 12, num_channels=2, separate_channels=True)
    stack_inputs: list[Tensor] = []
    for stack in front_end.stacks:
        stack.register_forward_pre_hook(lambda _, inputs: stack_inputs.append(inputs[0]))
    left = torch.randn(1, 1, 400, generator=rng)
    front_end(torch.cat([left, 0.25 * left.roll(3, -1)], dim=1))
    assert float(stack_inputs[1].std() / stack_inputs[0].std()) == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize(
    ("norm", "standardize", "leaks"),
    [
        ("group", True, True),
        ("group", False, True),
        ("layer", True, True),
        ("layer", False, False),
        ("none", False, False),
    ],
)
def test_masked_samples_change_context_tokens_only_by_statistics_over_the_clip(
    norm: str, standardize: bool, leaks: bool, rng: torch.Generator
):
    layers = [(16, 10, 5), (16, 4, 2)]
    front_end = WaveformFrontEnd(layers, 8, norm=norm, standardize=standardize).eval()
    waveform = torch.randn(2, 1, 2000, generator=rng)
    replaced = waveform.clone()
    # Context: the first 40 tokens. The samples after their receptive fields are louder noise.
    end = 39 * front_end.stride + front_end.receptive_field
    replaced[..., end:] = 3 * torch.randn(2, 1, 2000 - end, generator=rng)
    with torch.no_grad():
        before, after = (front_end(clips)[:, :40] for clips in (waveform, replaced))
    change = (after - before).square().mean().sqrt() / before.std()
    assert (change > 0.1) == leaks
    if not leaks:
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
