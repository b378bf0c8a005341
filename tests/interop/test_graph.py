"""ONNX models and programs of torch.export give the tokens of the encoder at every length."""

import json
from pathlib import Path

import pytest
import torch

from jepa_audio.errors import UserError
from jepa_audio.inference.encoder import Encoder
from jepa_audio.interop import graph
from jepa_audio.interop.graph import METADATA, TokenGraph, export_onnx, export_torch, read_metadata
from jepa_audio.steps.encoder.positions import RotaryPositions
from jepa_audio.steps.grid import Grid
from tests.interop.small_encoders import BY_OCTAVES, WINDOW, cases, clips, small_encoder

# No multiple of a hop or a patch; and the longest ones.
LENGTHS = (12_345, 16_000, 20_011, WINDOW - 1, WINDOW)


pytestmark = pytest.mark.usefixtures("symbolic_sizes")


def batches(encoder: Encoder, shortest: int) -> list[torch.Tensor]:
    """Batches of several sizes; the first one has one clip."""
    return [
        torch.stack(clips(encoder.num_channels, (length,) * size))
        for size, length in zip((1, 1, 3, 2, 1, 5), (shortest, *LENGTHS), strict=True)
    ]


@pytest.mark.parametrize("name", cases("waveform"))
def test_a_program_of_torch_export_gives_the_tokens_of_the_encoder(name: str, tmp_path: Path):
    encoder = small_encoder(name)
    metadata = export_torch(encoder, tmp_path / "model.pt2")
    extra = {METADATA: ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    assert read_metadata(extra[METADATA]) == metadata
    for batch in batches(encoder, metadata.min_samples):
        expected = encoder.encode_batch(batch)
        tokens = program(batch)
        torch.testing.assert_close(tokens, expected.layers[-1].flatten(1, 2), rtol=0, atol=1e-4)
        columns = torch.arange(expected.times.shape[1]) * metadata.column_seconds
        torch.testing.assert_close(columns + metadata.first_time, expected.times[0])
    with pytest.raises(Exception, match="<= 32000"):
        program(torch.zeros(1, encoder.num_channels, WINDOW + 1))


@pytest.mark.parametrize("name", cases("log_mel"))
def test_an_onnx_model_gives_the_tokens_of_the_encoder(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    encoder = small_encoder(name)
    metadata = export_onnx(encoder, tmp_path / "model.onnx")
    assert len(caplog.records) < 5
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch in batches(encoder, metadata.min_samples):
        expected = encoder.encode_batch(batch).layers[-1].flatten(1, 2)
        (tokens,) = session.run(["last_hidden_state"], {"waveform": batch.numpy()})
        rounding = 3e-4 if name in BY_OCTAVES else 1e-4
        torch.testing.assert_close(torch.from_numpy(tokens), expected, rtol=0, atol=rounding)
        mean = torch.from_numpy(tokens).mean(dim=1)
        torch.testing.assert_close(mean, expected.mean(dim=1), rtol=0, atol=2e-5)
    stored = session.get_modelmeta().custom_metadata_map
    assert (stored["sample_rate"], stored["max_samples"]) == ("16000", str(WINDOW))
    assert "/home" not in json.dumps(stored)
    with pytest.raises(Exception, match="clip_longer_than_max_samples"):
        session.run(None, {"waveform": torch.zeros(1, encoder.num_channels, WINDOW + 1).numpy()})


@pytest.mark.parametrize("axes", ["time", "time_freq"])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("grid", [Grid(4, 50), Grid(1, 3), Grid(3, 1)])
def test_rotary_positions_of_any_length_have_the_same_table(
    axes: str, normalized: bool, grid: Grid
):
    positions = RotaryPositions(axes, normalized)  # type: ignore[arg-type]
    symbolic = graph._RotaryOfAnyLength(axes, normalized)  # type: ignore[arg-type]
    device = torch.device("cpu")
    expected = positions.rotary(grid, 16, device)
    # Angles of 350 rad have rounding errors of 3e-5.
    torch.testing.assert_close(symbolic.rotary(grid, 16, device), expected, rtol=0, atol=1e-4)


def test_an_export_leaves_the_encoder_as_it_is():
    encoder = small_encoder("log_mel")
    TokenGraph(encoder)
    assert type(encoder.encoder.positions) is RotaryPositions


def test_lengths_that_the_model_was_not_trained_for_are_refused(tmp_path: Path):
    encoder = small_encoder("waveform")
    for seconds in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="must be in"):
            export_torch(encoder, tmp_path / "model.pt2", seconds)
    with pytest.raises(UserError, match="must be at most 2, the length of a training crop"):
        export_torch(encoder, tmp_path / "model.pt2", 2.5)
    encoder.window_samples = 400  # one column
    with pytest.raises(UserError, match="fewer than two time columns"):
        export_torch(encoder, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_front_end_that_cannot_be_exported_is_named_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **__: object) -> None:
        raise torch._dynamo.exc.UserError(
            torch._dynamo.exc.UserErrorType.CONSTRAINT_VIOLATION, "samples is 1\nmore"
        )

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(UserError, match=r"SpectrogramFrontEnd with LogMel .*`--seconds 2`"):
        export_torch(small_encoder("log_mel"), tmp_path / "model.pt2")
    with pytest.raises(UserError, match=r"WaveformFrontEnd .* fixed length .*export hf"):
        export_torch(small_encoder("waveform"), tmp_path / "model.pt2", 1.0)


def test_a_file_is_not_replaced(tmp_path: Path):
    file = tmp_path / "model.onnx"
    file.write_text("mine")
    pytest.importorskip("onnxscript")
    for export in (export_onnx, export_torch):
        with pytest.raises(UserError, match=r"model\.onnx exists: give another .* with `-o`"):
            export(small_encoder("waveform"), file)
        with pytest.raises(UserError, match=r"model\.onnx is a file, not a folder"):
            export(small_encoder("waveform"), file / "new" / "model.pt2")
    assert file.read_text() == "mine"


def test_missing_packages_are_named_with_the_command_that_installs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(graph, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx and onnxscript: pip install 'jepa-audio\[onnx\]'"):
        export_onnx(small_encoder("waveform"), tmp_path / "model.onnx")
