"""The adapters give the features of the encoder, in the form that each client wants."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
import yaml
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_no_attributes_set_in_init, check_set_params

from jepa_audio.errors import UserError
from jepa_audio.inference.encoder import Encoder
from jepa_audio.inference.folder import save_encoder
from jepa_audio.interop.adapters import hear, marble, s3prl, xares
from jepa_audio.interop.adapters.features import VARIABLE, EncoderFeatures
from jepa_audio.interop.adapters.sklearn import JEPAFeatures
from tests.interop.marble_task import MARBLE_TASK
from tests.interop.small_encoders import FAST, WINDOW, clips, small_encoder

# More than two training crops.
LONG = 75_001


@pytest.fixture(scope="module", params=FAST)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """An encoder, and its folder."""
    encoder = small_encoder(request.param)
    folder = tmp_path_factory.mktemp("encoder") / request.param
    save_encoder(encoder, folder)
    return encoder, folder


def batch(length: int, count: int = 2) -> torch.Tensor:
    return torch.cat(clips(1, (length,) * count))


def nearest(encoder: Encoder, clip: torch.Tensor, times: torch.Tensor, layer: int) -> torch.Tensor:
    """The columns of a clip that are nearest to some times in seconds, by comparing all."""
    features = encoder.encode(clip[None], 16_000)
    distance = (features.times[0][None] - times[:, None]).abs()
    return features.layers[layer][0, distance.argmin(dim=1)].mean(dim=1)


def test_hear(made: tuple[Encoder, Path]):
    encoder, folder = made
    model = hear.load_model(str(folder))
    audio = batch(LONG)
    vectors, milliseconds = hear.get_timestamp_embeddings(audio, model)
    assert model.sample_rate == 16_000
    assert vectors.dtype == torch.float32
    assert vectors.shape == (2, milliseconds.shape[1], model.timestamp_embedding_size)
    spacing = milliseconds.diff(dim=1)
    torch.testing.assert_close(
        spacing, torch.full_like(spacing, 1000 * encoder.frame_seconds), rtol=0, atol=0.01
    )
    assert float(milliseconds.min()) > 0
    assert LONG / 16 - 100 < float(milliseconds.max()) <= LONG / 16
    # In float32, a time can be between two columns that are equally near.
    same = (vectors[0] - nearest(encoder, audio[0], milliseconds[0] / 1000, -1)).abs().amax(dim=1)
    assert (same < 1e-5).float().mean() > 0.9
    scene = hear.get_scene_embeddings(audio, model)
    torch.testing.assert_close(scene, encoder.embed(audio[:, None], 16_000))
    assert scene.shape == (2, model.scene_embedding_size)


def test_hear_gets_other_layers_poolings_and_frame_rates(made: tuple[Encoder, Path]):
    encoder, folder = made
    model = hear.load_model(str(folder), layers=[0, 2], pool="mean_std/concat", frame_seconds=0.05)
    rows = encoder.encode_batch(torch.zeros(1, 1, WINDOW)).layers[0].shape[2]
    assert model.timestamp_embedding_size == 2 * 16 * rows
    assert model.scene_embedding_size == 2 * model.timestamp_embedding_size
    vectors, milliseconds = hear.get_timestamp_embeddings(batch(WINDOW), model)
    assert vectors.shape == (2, milliseconds.shape[1], model.timestamp_embedding_size)
    torch.testing.assert_close(
        milliseconds.diff(dim=1), torch.full_like(milliseconds[:, 1:], 50), rtol=0, atol=0.01
    )


def test_hear_gets_a_rate_that_it_accepts(made: tuple[Encoder, Path], monkeypatch):
    monkeypatch.setattr(hear, "SAMPLE_RATES", (8000, 22_050))
    model = hear.load_model(str(made[1]))
    assert model.sample_rate == 22_050
    _, milliseconds = hear.get_timestamp_embeddings(batch(22_050), model)
    assert 800 < float(milliseconds.max()) <= 1000


def test_xares(made: tuple[Encoder, Path], monkeypatch: pytest.MonkeyPatch):
    encoder, folder = made
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, str(folder))
        model = xares.JEPAEncoder()
    # X-ARES takes the only name of this form.
    assert [name for name in vars(xares) if name.endswith("Encoder")] == ["JEPAEncoder"]
    audio = batch(LONG)
    vectors = model(audio)
    assert vectors.shape[::2] == (2, model.output_dim)
    assert abs(vectors.shape[1] - LONG / 16 / model.hop_size_in_ms) < 2
    torch.testing.assert_close(model(audio[0]), vectors[:1], rtol=1e-5, atol=1e-5)
    (features,) = [encoder.encode(audio[:, None], 16_000, frame_seconds=encoder.frame_seconds)]
    torch.testing.assert_close(vectors, features.layers[-1].mean(dim=2))
    # X-ARES stores scores under the name of the class.
    other = xares.JEPAEncoder(folder, layers=1)
    assert type(other).__name__ != type(model).__name__
    assert type(other).__name__.endswith("Encoder")
    assert type(xares.JEPAEncoder(folder)).__name__ == type(model).__name__


def test_marble_gets_every_layer(made: tuple[Encoder, Path]):
    encoder, folder = made
    model, audio = marble.JEPAEncoder(folder), batch(WINDOW)
    layers = model(audio)
    assert [layer.shape[2] for layer in layers] == [model.width] * encoder.num_layers
    for ours, layer in zip(encoder.encode(audio[:, None], 16_000).layers, layers, strict=True):
        torch.testing.assert_close(layer, ours.mean(dim=2))
    for again, layer in zip(model(audio[:, None]), layers, strict=True):
        assert torch.equal(again, layer)


def test_marble_gets_frames_at_the_rate_of_labels(made: tuple[Encoder, Path]):
    encoder, folder = made
    audio = batch(2 * WINDOW)
    layers = marble.JEPAEncoder(folder, frames_per_second=30.0)(audio)
    assert layers[1].shape == (2, 120, 16)
    expected = nearest(encoder, audio[0], (torch.arange(120) + 0.5) / 30, 1)
    assert ((layers[1][0] - expected).abs().amax(dim=1) < 1e-5).float().mean() > 0.9


def test_settings_of_a_task_of_marble(made: tuple[Encoder, Path], tmp_path: Path):
    task = tmp_path / "probe.OTHER-v1.Task.yaml"
    task.write_text(MARBLE_TASK)
    file = marble.write_settings(str(made[1]), task, tmp_path / "out.yaml", [1, -1])
    written = yaml.safe_load(file.read_text())
    arguments, data = written["model"]["init_args"], written["data"]["init_args"]
    encoder = arguments["encoder"]
    module, _, name = encoder["class_path"].rpartition(".")
    model = getattr(sys.modules[module], name)(**encoder["init_args"])
    assert model.frames_per_second == 75
    assert arguments["sample_rate"] == data["train"]["init_args"]["sample_rate"] == 16_000
    assert arguments["emb_transforms"][0]["init_args"]["layers"] == [1, 2]
    assert arguments["emb_transforms"][1]["init_args"] == {"num_layers": 3, "hidden_size": 16}
    assert arguments["decoders"][0]["init_args"] == {"in_dim": 16, "hidden_layers": [512]}
    assert data["audio_transforms"] == {"train": [{"class_path": "own.Y"}]}
    assert written["trainer"]["logger"]["save_dir"] == f"./output/probe.Task.{made[1].name}/"
    with pytest.raises(UserError, match="no task of MARBLE"):
        marble.write_settings(str(made[1]), file)


def test_s3prl(made: tuple[Encoder, Path]):
    encoder, folder = made
    model = s3prl.UpstreamExpert(str(folder), None, refresh=False)
    stride = model.get_downsample_rates("hidden_states")
    assert stride == round(16_000 * encoder.frame_seconds)
    short, long = clips(1, (12_345, LONG))
    layers = model([short[0], long[0]])["hidden_states"]
    assert len(layers) == encoder.num_layers
    count = -(-12_345 // stride)
    assert {layer.shape for layer in layers} == {(2, -(-LONG // stride), 16)}
    alone = model([short[0]])["hidden_states"][1]
    assert alone.shape[1] == count
    # Padding has no influence.
    torch.testing.assert_close(layers[1][:1, :count], alone, rtol=1e-5, atol=1e-5)
    assert not layers[1][0, count:].any()
    times = (torch.arange(count) + 0.5) * stride / 16_000
    expected = nearest(encoder, short, times, 1)
    assert ((alone[0] - expected).abs().amax(dim=1) < 1e-5).float().mean() > 0.9


def test_settings_of_s3prl(made: tuple[Encoder, Path], tmp_path: Path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("{frequency: concat, trainable: true}")
    model = s3prl.UpstreamExpert(str(made[1]), str(settings))
    model([batch(WINDOW)[0]])["hidden_states"][-1].square().mean().backward()
    assert all(weight.grad is not None for weight in model.encoder.encoder.parameters())
    settings.write_text("{layer: 3}")
    with pytest.raises(UserError, match="may contain frequency, which, trainable"):
        s3prl.UpstreamExpert(str(made[1]), str(settings))


def test_scikit_learn(made: tuple[Encoder, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encoder, folder = made
    paths = []
    for i, clip in enumerate(clips(2, (9000, 20_000, 16_000, 40_000))):
        paths.append(str(tmp_path / f"{i}.wav"))
        sf.write(paths[-1], 0.5 * clip.T.numpy(), 22_050)
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, str(folder))
        found = JEPAFeatures().fit_transform(paths)
    expected = encoder.embed(paths)
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)
    estimator = JEPAFeatures(folder, layers=[1, 2], pool="mean_std")
    copied = clone(estimator)
    assert copied.get_params() == estimator.get_params()
    for same in (np.array(paths), np.array(paths, dtype=object)[:, None]):
        assert copied.fit_transform(same).shape == (4, 64)
    assert list(copied.get_feature_names_out())[-1] == "jepafeatures63"
    check_no_attributes_set_in_init("JEPAFeatures", estimator)
    check_set_params("JEPAFeatures", estimator)
    pipeline = make_pipeline(JEPAFeatures(folder), LogisticRegression()).fit(paths, [0, 1, 0, 1])
    assert pipeline.predict(paths).shape == (4,)
    arrays = JEPAFeatures(folder, sample_rate=16_000).fit_transform(batch(8000).numpy())
    np.testing.assert_allclose(
        arrays, encoder.embed(batch(8000)[:, None], 16_000).numpy(), rtol=1e-5, atol=1e-5
    )


def test_wrong_arguments_of_adapters_are_refused(made: tuple[Encoder, Path], tmp_path: Path):
    folder = made[1]
    with pytest.raises(UserError, match=r"`model_config`: .*nofile\.yaml cannot be read"):
        s3prl.UpstreamExpert(folder, str(tmp_path / "nofile.yaml"))
    for seconds in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=r"`frame_seconds` .* must be a positive number"):
            hear.load_model(str(folder), frame_seconds=seconds)
    features = JEPAFeatures(folder)
    with pytest.raises(UserError, match=r"give a list of paths, \['a\.wav'\]"):
        features.fit_transform("a.wav")
    with pytest.raises(UserError, match="give one column of paths, not 2"):
        features.transform(np.array([["a.wav", "b.wav"]], dtype=object))


def test_an_encoder_must_be_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(UserError, match=VARIABLE):
        EncoderFeatures()


def test_the_checker_of_xares(made: tuple[Encoder, Path]):
    checker = pytest.importorskip("xares.audio_encoder_checker")
    assert checker.check_audio_encoder(xares.JEPAEncoder(made[1]))


def test_the_validator_of_hear(made: tuple[Encoder, Path]):
    validate = pytest.importorskip("hearvalidator.validate")
    validate.ValidateModel(hear.__name__, str(made[1]), device="cpu")()


def test_a_task_of_mteb(made: tuple[Encoder, Path], tmp_path: Path):
    mteb = pytest.importorskip("mteb")
    from datasets import Audio, Dataset, DatasetDict
    from mteb.abstasks.classification import AbsTaskClassification
    from mteb.abstasks.task_metadata import TaskMetadata

    from jepa_audio.interop.adapters.maeb import JEPAModel

    def split(name: str, count: int) -> Dataset:
        paths, labels = [], [i % 2 for i in range(count)]
        for i, label in enumerate(labels):
            paths.append(str(tmp_path / f"{name}-{i}.wav"))
            time = np.arange(12_000 + 100 * i) / 22_050
            sf.write(paths[-1], 0.3 * np.sin(2 * np.pi * (220, 1760)[label] * time + i), 22_050)
        return Dataset.from_dict({"audio": paths, "label": labels}).cast_column("audio", Audio())

    class Tones(AbsTaskClassification):
        metadata = TaskMetadata(
            name="Tones",
            description="Low and high tones.",
            dataset={"path": "local/tones", "revision": "1"},
            type="AudioClassification",
            category="a2c",
            modalities=["audio"],
            eval_splits=["test"],
            eval_langs=["zxx-Zxxx"],
            main_score="accuracy",
        )
        input_column_name = "audio"
        n_experiments = 2

        def load_data(self, **options: object) -> None:
            self.dataset = DatasetDict(train=split("train", 24), test=split("test", 10))
            self.data_loaded = True

    model = JEPAModel(made[1], pool="mean_std", device="cpu")
    (result,) = mteb.evaluate(model, [Tones()], cache=None).task_results
    assert result.scores["test"][0]["accuracy"] == 1.0
