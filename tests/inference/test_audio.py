"""Audio in every form gives the same features as the waveform, or is refused in one sentence."""

import logging
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
import torch
from torch import Tensor, nn

from jepa_audio.data.audio.resample import resample
from jepa_audio.errors import MissingFileError, UserError
from jepa_audio.inference.audio import list_clips
from jepa_audio.inference.encoder import Encoder
from jepa_audio.inference.features import LayerFeatures
from jepa_audio.inference.pooling import parse_pooling
from jepa_audio.probing.clips import load_waveform
from jepa_audio.probing.encoders import JEPAEncoder
from jepa_audio.probing.tasks.records import Item
from jepa_audio.training.jepa import JEPA

RATE, WINDOW = 1000, 300


@pytest.fixture(scope="module", params=["wave", "mel"])
def encoder(request: pytest.FixtureRequest, tiny_jepa: Callable[..., JEPA]) -> Encoder:
    return Encoder.from_jepa(tiny_jepa(request.param), WINDOW)


@pytest.fixture
def samples() -> np.ndarray:
    """Two channels of 0.7 s, multiples of 2^-15."""
    noise = np.random.default_rng(0).integers(-8000, 8000, (2, 700))
    return (noise / 32768).astype(np.float32)


def last(features: LayerFeatures) -> Tensor:
    return features.layers[-1]


def test_every_form_of_a_clip_gives_the_same_features(
    encoder: Encoder, samples: np.ndarray, tmp_path: Path
):
    mono = samples.mean(axis=0)
    expected = last(encoder.encode_batch(torch.from_numpy(mono)[None, None]))
    path = tmp_path / "stereo.wav"
    sf.write(path, samples.T, RATE, subtype="PCM_16")
    read_only = samples.copy()
    read_only.flags.writeable = False
    forms = {
        "[S]": mono,
        "[C, S]": samples,
        "[B, C, S]": samples[None],
        "tensor": torch.from_numpy(samples),
        "float64": samples.astype(np.float64),
        "int16": (samples * 32768).astype(np.int16),
        "int16 tensor": torch.from_numpy((samples * 32768).astype(np.int16)),
        "int32": (samples * 32768).astype(np.int32) * 65536,
        "big-endian": (samples * 32768).astype(">i2"),
        "uint16": (samples * 32768 + 32768).astype(np.uint16),
        "reversed twice": samples[:, ::-1].copy()[:, ::-1],
        "read-only": read_only,
        "list": [samples],
        "tuple": (torch.from_numpy(mono),),
        "column-major": np.asfortranarray(samples),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, audio in forms.items():
            found = encoder.encode(audio, RATE)
            torch.testing.assert_close(last(found), expected, rtol=0, atol=1e-5, msg=name)
            assert found.times.shape == (1, expected.shape[1])
        for audio in (path, str(path), [path], [str(path)]):
            torch.testing.assert_close(last(encoder.encode(audio)), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(last(encoder.encode(path, RATE)), expected, rtol=0, atol=1e-5)


def test_8_bit_samples_are_scaled_by_their_full_scale(encoder: Encoder):
    """The mel encoder depends on the level."""
    unsigned = np.random.default_rng(0).integers(0, 256, 700).astype(np.uint8)
    expected = encoder.encode((unsigned.astype(np.float32) - 128) / 128, RATE)
    torch.testing.assert_close(last(encoder.encode(unsigned, RATE)), last(expected))
    signed = (unsigned.astype(np.int16) - 128).astype(np.int8)
    torch.testing.assert_close(last(encoder.encode(signed, RATE)), last(expected))


def test_a_list_of_unequal_clips_of_several_rates_equals_each_clip_alone(
    encoder: Encoder, samples: np.ndarray, tmp_path: Path
):
    path = tmp_path / "a.flac"
    sf.write(path, samples[0], 1500)
    long = np.concatenate([samples, samples], axis=1)
    clips = [samples[0, :400], long, path, samples[:, :120], long[:, :1111]]
    rates = [RATE, RATE, None, 2000, RATE]
    together = encoder.encode(clips, rates)
    vectors = encoder.embed(clips, rates, layers=(0, -1), pool="thirds_std")
    for row, (clip, rate) in enumerate(zip(clips, rates, strict=True)):
        alone = encoder.encode(clip, rate)
        count = int(together.valid[row].sum())
        assert count == alone.times.shape[1]
        torch.testing.assert_close(last(together)[row, :count], last(alone)[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(together.times[row, :count], alone.times[0])
        assert not last(together)[row, count:].any()
        pooled = alone.pool(regions=3, deviation=True)
        expected = torch.cat([pooled[0], pooled[-1]], dim=1)[0]
        torch.testing.assert_close(vectors[row], expected, rtol=0, atol=1e-5)


def test_audio_of_another_rate_is_resampled_as_for_training(
    encoder: Encoder, samples: np.ndarray, caplog: pytest.LogCaptureFixture
):
    expected = resample(torch.from_numpy(samples).mean(0, keepdim=True), 1600, RATE)
    encoder._logged.clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            found = encoder.encode([samples, samples], 1600)
    torch.testing.assert_close(last(found)[:1], last(encoder.encode_batch(expected[None])))
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "2 clips: the mean of 2 channels is used",
        "2 clips: 1600 Hz is resampled to 1000 Hz",
    ]


@pytest.mark.parametrize("pool", ["mean", "mean_std", "regions_4_std_change", "mean/concat"])
def test_embed_gives_the_features_of_the_probe_for_the_same_file(
    encoder: Encoder, samples: np.ndarray, tmp_path: Path, pool: str
):
    path = tmp_path / "a.wav"
    sf.write(path, samples.T, 1600)
    waveform = load_waveform(Item(path, 0, "a", "a"), RATE, 1)
    probed = parse_pooling(pool)(JEPAEncoder(encoder, "a", "context").encode(waveform[None]))
    assert torch.equal(encoder.embed(path, pool=pool), probed[-1][:, 0])


def test_a_wrong_form_is_refused_in_one_sentence_that_names_the_clip(
    encoder: Encoder, samples: np.ndarray, tmp_path: Path
):
    (tmp_path / "empty.wav").touch()
    sf.write(tmp_path / "short.wav", samples.T, RATE)
    cases: list[tuple[object, object, str]] = [
        (samples, None, "`sample_rate` of audio is missing"),
        ([tmp_path / "short.wav", samples], None, "`sample_rate` of clip 1 is missing"),
        (
            tmp_path / "short.wav",
            16000,
            r"has 1000 Hz, but `sample_rate` is 16000: .*None for files",
        ),
        (tmp_path / "shrot.wav", None, r"no audio file .*shrot\.wav; did you mean 'short\.wav'"),
        (tmp_path, None, "is a folder, not an audio file"),
        ([samples, tmp_path / "empty.wav"], RATE, r"empty\.wav: the file is empty"),
        (samples.T, RATE, r"shape \[700, 2\].*transpose"),
        (samples[None].transpose(0, 2, 1), RATE, r"shape \[1, 700, 2\].*transpose"),
        (np.zeros((8, 700)), RATE, r"ambiguous: give 8 clips as \[8, 1, 700\]"),
        (np.zeros((1, 1, 1, 9)), RATE, r"shape \[1, 1, 1, 9\], must be \[S\]"),
        ([samples[None]], RATE, r"clip 0 has the shape \[1, 2, 700\], must be \[S\] or \[C, S\]"),
        (np.float32(0.5), RATE, r"shape \[\]"),
        ([], RATE, "an empty list"),
        ([0.1, 0.2, 0.3], RATE, "clip 0 of the list is a number"),
        ((torch.zeros(1, 700), RATE), RATE, "clip 1 of the list is a number"),
        ([[0.1, 0.2]], RATE, r"clip 0 is a list.*numpy\.array"),
        ({"array": samples, "sampling_rate": RATE}, RATE, "is a dict.*give its samples"),
        (None, RATE, "is a NoneType"),
        (np.zeros(0), RATE, "has no samples"),
        ([samples, np.full(500, np.nan)], RATE, "clip 1 has samples that are NaN"),
        (np.full(500, np.inf), RATE, "NaN or infinite"),
        (samples * 32768, RATE, "has a peak of .*divide it by its full scale"),
        ((samples * 32768).astype(np.int64), RATE, "int64, whose full scale is not known"),
        (samples > 0, RATE, "bool, whose full scale is not known"),
        (samples + 1j, RATE, "complex"),
        (np.array(["a", "b"]), RATE, "no samples of audio"),
        (samples, 0, "`sample_rate` of audio .0. must be a whole number"),
        (samples, "16000", "must be a whole number"),
        (samples, 16000.5, "must be a whole number"),
        (samples, True, "must be a whole number"),
        (samples, [RATE], "must be a whole number"),
    ]
    for audio, rate, message in cases:
        with pytest.raises(UserError, match=message):
            list_forms(encoder, audio, rate)
    with pytest.raises(MissingFileError):
        encoder.encode(tmp_path / "none.wav")
    for layers in (7, "all", [1.5], 1.5, [], True, [True, 1]):
        with pytest.raises(UserError, match=r"`layers` is .*list of indices in \[0, 2\], or from"):
            unchecked(Encoder.layer_indices)(encoder, layers)
    with pytest.raises(UserError, match="'frames', which is no vector"):
        encoder.embed(samples, RATE, pool="frames")
    for pool in ("meen", None, "mean/max"):
        with pytest.raises(UserError, match="`pool` is ") as raised:
            unchecked(Encoder.embed)(encoder, samples, RATE, pool=pool)
        assert "frames" not in str(raised.value)
    with pytest.raises(UserError, match=r"`frame_seconds` .'a'. must be a positive number"):
        features = encoder.encode(samples, RATE)
        unchecked(LayerFeatures.at_regular_times)(features, "a")


@pytest.mark.parametrize("layers", [np.int64(2), np.array([0, -1]), torch.tensor([0, 2]), range(3)])
def test_an_index_of_a_layer_can_be_any_whole_number(encoder: Encoder, layers: object):
    found = unchecked(Encoder.layer_indices)(encoder, layers)
    assert found == [layer % 3 for layer in np.atleast_1d(np.asarray(layers)).tolist()]
    assert all(type(layer) is int for layer in found)


def unchecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without the check of types in the tests."""
    return getattr(function, "__wrapped__", function)


def list_forms(encoder: Encoder, audio: object, rate: object) -> None:
    """As `encode`, without the check of types in the tests."""
    for clip in unchecked(list_clips)(audio, rate, 1):
        clip.convert(RATE, 1)


@pytest.mark.parametrize("rate", [np.int64(RATE), torch.tensor(RATE), float(RATE)])
def test_a_rate_can_be_any_whole_number(samples: np.ndarray, rate: object):
    (clip,) = unchecked(list_clips)(samples, rate, 1)
    assert clip.rate == RATE


def test_an_encoder_of_two_channels_gets_both_or_a_copy(tiny_jepa: Callable[..., JEPA]):
    jepa = tiny_jepa("wave", "--model.front_end.num_channels=2", "--data.mono=keep")
    stereo = Encoder.from_jepa(jepa, WINDOW)
    clip = 0.1 * torch.randn(2, 700, generator=torch.Generator().manual_seed(0))
    assert torch.equal(last(stereo.encode(clip, RATE)), last(stereo.encode_batch(clip[None])))
    copied = last(stereo.encode_batch(clip[None, :1].expand(-1, 2, -1)))
    assert torch.equal(last(stereo.encode(clip[0], RATE)), copied)
    with pytest.raises(UserError, match=r"6 channels, the encoder takes 2"):
        stereo.encode(torch.zeros(1, 6, 700), RATE)


def test_a_head_can_be_trained_on_the_features_of_a_frozen_encoder(
    encoder: Encoder, samples: np.ndarray
):
    head = nn.Linear(16, 2)
    features = encoder.encode([samples, samples[:, :500]], RATE, layers=-1)
    assert not last(features).requires_grad
    assert not last(features).is_inference()
    head(last(features).mean(dim=(1, 2))).sum().backward()
    head(encoder.embed(samples, RATE)).sum().backward()
    assert head.weight.grad is not None
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_a_frozen_encoder_stays_in_evaluation_mode_inside_a_module_that_trains(
    tiny_jepa: Callable[..., JEPA], samples: np.ndarray
):
    encoder = Encoder.from_jepa(tiny_jepa("wave", "--model.encoder.drop_path=0.9"), WINDOW)
    model = nn.Sequential(encoder, nn.Linear(16, 2)).train()
    assert model.training
    assert not any(module.training for module in encoder.modules())
    expected = last(encoder.encode(samples, RATE))
    assert torch.equal(last(encoder.encode(samples, RATE)), expected)
    encoder.unfreeze()
    model.train()
    assert all(module.training for module in encoder.modules())
    assert "not frozen" in repr(encoder)
    trained = encoder.encode(np.stack([samples.repeat(2, axis=1)] * 2), RATE)
    assert last(trained).requires_grad
    last(trained).sum().backward()
    assert encoder.encoder.blocks[0].mlp.fc1.weight.grad is not None
    encoder.freeze()
    model.train()
    assert not any(module.training for module in encoder.modules())
    assert torch.equal(last(encoder.encode(samples, RATE)), expected)


def test_gradients_reach_the_samples_of_a_frozen_encoder(encoder: Encoder, samples: np.ndarray):
    waveform = torch.from_numpy(samples).requires_grad_()
    last(encoder.encode(waveform, RATE)).sum().backward()
    assert waveform.grad is not None
    with pytest.raises(UserError, match="needs gradients and has 1600 Hz"):
        encoder.encode(waveform, 1600)


def test_time_columns_are_regular_on_request(encoder: Encoder):
    """The nearest column at every time; irregular where windows meet without it."""
    clips = [torch.randn(int(n), generator=torch.Generator().manual_seed(0)) for n in (1130, 640)]
    plain = encoder.encode([clip / 9 for clip in clips], RATE)
    steps = plain.times[0].diff()
    assert steps.max() - steps.min() > 1e-3
    for seconds in (encoder.frame_seconds, 0.05, 0.011):
        regular = encoder.encode([clip / 9 for clip in clips], RATE, frame_seconds=seconds)
        for row in range(2):
            times = regular.times[row, regular.valid[row]]
            own = plain.times[row, plain.valid[row]]
            torch.testing.assert_close(
                times.diff(), torch.full_like(times[1:], seconds), rtol=0, atol=1e-5
            )
            assert abs(times[-1] - own[-1]) <= seconds / 2 + 1e-5
            nearest = (own[:, None] - times).abs()
            chosen = last(regular)[row, regular.valid[row]]
            gaps = torch.stack(
                [
                    nearest[(last(plain)[row, : len(own)] == column).flatten(1).all(1)].amin(0)[i]
                    for i, column in enumerate(chosen)
                ]
            )
            torch.testing.assert_close(gaps, nearest.amin(0), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="`frame_seconds`"):
        plain.at_regular_times(0.0)


def test_an_encoder_has_a_short_text_and_can_be_pickled_and_moved(
    encoder: Encoder, samples: np.ndarray
):
    assert len(repr(encoder)) < 200
    features = encoder.encode(torch.zeros(1000), RATE)
    assert len(repr(features)) < 200
    assert "layers: 3 of [B=1, " in repr(features)
    assert "context encoder, 3 layers of width 16, 1000 Hz, 1 channel" in repr(encoder)
    expected = last(encoder.encode(samples, RATE))
    copied = pickle.loads(pickle.dumps(encoder)).to("cpu")
    assert torch.equal(last(copied.encode(samples, RATE)), expected)


@pytest.mark.parametrize("num_samples", [250, 900])
def test_encode_batch_is_exported_for_a_fixed_length(encoder: Encoder, num_samples: int):
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, waveform: Tensor) -> Tensor:
            return self.encoder.encode_batch(waveform, layers=[-1]).layers[0]

    waveform = torch.randn(2, 1, num_samples)
    expected = Last()(waveform)
    program = torch.export.export(Last().eval(), (waveform,))
    torch.testing.assert_close(program.module()(waveform), expected)


def test_importing_the_encoder_imports_no_library_that_it_does_not_need():
    code = (
        "import sys; from jepa_audio import Encoder, load_encoder; "
        "print([name for name in ('lightning', 'nnAudio', 'sklearn', 'pandas', 'jsonargparse', "
        "'matplotlib', 'numba', 'torchmetrics', 'mir_eval', 'librosa', 'pyarrow', 'IPython', "
        "'tensorboard') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert run.stderr == ""
