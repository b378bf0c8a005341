"""The command `embed` gives the vectors of `Encoder.embed`, for any source, killed or not."""

import csv
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile as sf
import torch

from jepa_audio.cli.main import main
from jepa_audio.errors import UserError
from jepa_audio.inference.embedding import files as files_module
from jepa_audio.inference.embedding import predict
from jepa_audio.inference.embedding.files import chunk_files, list_files, spans
from jepa_audio.inference.embedding.run import _output_lock
from jepa_audio.inference.embedding.running import RunningPool
from jepa_audio.inference.encoder import Encoder
from jepa_audio.inference.features import LayerFeatures
from jepa_audio.inference.folder import save_encoder
from jepa_audio.inference.load import load_encoder
from jepa_audio.inference.pooling import parse_pooling
from jepa_audio.training.jepa import JEPA

RATE = 1000


@pytest.fixture(scope="module")
def folder(tiny_jepa: Callable[..., JEPA], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    return save_encoder(Encoder.from_jepa(tiny_jepa("mel"), 300), path)


@pytest.fixture
def audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven files of several rates, channels and lengths, one of them too short, one damaged."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audio" / "sub").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for number, (rate, length, channels) in enumerate(
        [
            (RATE, 1111, 1),
            (RATE, 640, 2),
            (1600, 1500, 1),
            (RATE, 250, 1),
            (RATE, 20, 1),
            (RATE, 640, 1),
        ]
    ):
        samples = 0.1 * noise.standard_normal((length, channels))
        sf.write(tmp_path / "audio" / "sub" / f"{number}.wav", samples, rate)
    (tmp_path / "audio" / "bad.wav").write_text("no audio")
    monkeypatch.setattr(files_module, "_CHUNK_FILES", 2)
    return tmp_path / "audio"


def run(*words: object) -> None:
    main(["embed", *map(str, words), "--accelerator", "cpu", "--num_workers", "0"])


def table(path: Path) -> dict[str, np.ndarray]:
    columns = pq.read_table(path)
    vectors = columns["vector"].combine_chunks().flatten().to_numpy()
    return {
        "path": np.array(columns["path"].to_pylist()),
        "vector": vectors.reshape(len(columns), -1),
        **{name: columns[name].to_numpy() for name in ("start", "end", "padded")},
    }


@pytest.mark.parametrize(
    ("pooling", "layers"), [("mean", [-1]), ("thirds_std_change", [0, 2]), ("mean/concat", [1])]
)
def test_the_vectors_are_those_of_the_encoder_in_python(
    folder: Path, audio: Path, pooling: str, layers: list[int], capsys: pytest.CaptureFixture[str]
):
    run(folder, "audio", "-o", "out.parquet", "--pooling", pooling, "--layers", layers)
    found, encoder = table(Path("out.parquet")), load_encoder(folder)
    names = [f"audio/sub/{number}.wav" for number in range(6)]
    assert found["path"].tolist() == names
    expected = encoder.embed(names, layers=layers, pool=pooling).numpy()
    np.testing.assert_allclose(found["vector"], expected, atol=1e-5)
    assert not found["start"].any()
    np.testing.assert_allclose(found["end"][[0, 2, 4]], [1.111, 0.938, 0.02])
    assert found["padded"].tolist() == [False] * 4 + [True, False]
    with Path("out.parquet.skipped.csv").open() as file:
        ((path, reason),) = list(csv.reader(file))[1:]
    assert path == "audio/bad.wav"
    assert "cannot be decoded" in reason
    assert "6 rows of" in capsys.readouterr().out
    metadata = json.loads(pq.read_schema("out.parquet").metadata[b"jepa_audio"])
    assert metadata["pooling"].startswith(pooling)
    assert metadata["layers"] == [layer % 3 for layer in layers]
    assert metadata["encoder"].startswith(str(folder))
    assert not list(Path().glob("*.parts"))


def test_frames_are_the_columns_of_the_encoder(folder: Path, audio: Path):
    run(folder, "audio/sub/0.wav", "-o", "out.parquet", "--pooling", "frames")
    found, encoder = table(Path("out.parquet")), load_encoder(folder)
    features = encoder.encode(audio / "sub" / "0.wav", layers=-1)
    np.testing.assert_allclose(found["vector"], features.layers[0][0].mean(1), atol=1e-5)
    half = encoder.frame_seconds / 2
    np.testing.assert_allclose(found["end"] - half, features.times[0], atol=1e-5)


def test_segments_are_rows(folder: Path, audio: Path):
    options = ("--segment_seconds", 0.4, "--hop_seconds", 0.3)
    run(folder, "audio/sub/0.wav", "audio/sub/3.wav", "-o", "out.parquet", *options)
    found, encoder = table(Path("out.parquet")), load_encoder(folder)
    np.testing.assert_allclose(found["start"], [0, 0.3, 0.6, 0.9, 0])
    np.testing.assert_allclose(found["end"], [0.4, 0.7, 1.0, 1.111, 0.25])
    samples, _ = sf.read(audio / "sub" / "0.wav")
    np.testing.assert_allclose(
        found["vector"][1], encoder.embed(samples[300:700], RATE)[0], atol=1e-5
    )


def test_audio_between_segments_is_named(
    folder: Path, audio: Path, caplog: pytest.LogCaptureFixture
):
    run(folder, "audio/sub/0.wav", "-o", "out.npz", "--segment_seconds", 0.2, "--hop_seconds", 1)
    assert "0.8 s between segments are not embedded" in caplog.text


def test_rows_are_in_the_order_of_the_paths_where_a_long_file_shares_a_chunk(
    folder: Path, audio: Path, monkeypatch: pytest.MonkeyPatch
):
    for module in (files_module, predict):
        monkeypatch.setattr(module, "LONG_SECONDS", 1)
    run(folder, "audio/sub/0.wav", "audio/sub/3.wav", "-o", "out.parquet")
    found = table(Path("out.parquet"))
    assert found["path"].tolist() == ["audio/sub/0.wav", "audio/sub/3.wav"]
    np.testing.assert_allclose(found["end"], [1.111, 0.25])


@pytest.mark.parametrize("pooling", ["mean", "regions_7_std_change", "frames"])
def test_a_long_file_is_encoded_in_parts_with_the_same_result(
    folder: Path, audio: Path, pooling: str, monkeypatch: pytest.MonkeyPatch
):
    source = ("audio/sub/0.wav", "audio/sub/2.wav")
    options = ("--pooling", pooling, "--max_windows", 2, "--overlap", 0.25)
    run(folder, *source, "-o", "whole.parquet", *options)
    for module in (files_module, predict):
        monkeypatch.setattr(module, "LONG_SECONDS", 0.5)
    read: list[int] = []
    original = predict.read_slice
    monkeypatch.setattr(
        predict, "read_slice", lambda *args: read.append(args[2] - args[1]) or original(*args)
    )
    run(folder, *source, "-o", "parts.parquet", *options)
    assert max(read) <= 600
    whole, parts = table(Path("whole.parquet")), table(Path("parts.parquet"))
    assert whole.keys() == parts.keys()
    for name in ("start", "end"):
        np.testing.assert_allclose(parts[name], whole[name], atol=1e-6)
    np.testing.assert_allclose(parts["vector"], whole["vector"], atol=1e-4)


def test_every_kind_of_source_gives_the_same_vectors(folder: Path, audio: Path):
    run(folder, "audio/sub", "-o", "out.parquet")
    expected = table(Path("out.parquet"))["vector"]
    Path("list.csv").write_text("path\n" + "".join(f"audio/sub/{i}.wav\n" for i in range(6)))
    with tarfile.open("shard-0.tar", "w") as tar:
        for number in range(6):
            tar.add(f"audio/sub/{number}.wav", f"{number}.wav")
    main(["data", "index", "audio/sub", "-o", "table.parquet"])
    sources = ["audio/sub/*.wav", "list.csv", "shard-{0..0}.tar", "table.parquet"]
    for number, source in enumerate(sources):
        run(folder, source, "-o", f"{number}.parquet")
        np.testing.assert_allclose(table(Path(f"{number}.parquet"))["vector"], expected, atol=1e-6)
    names = table(Path("2.parquet"))["path"].tolist()
    assert names[0] == "shard-0.tar:0.wav"
    run(folder, "audio/sub", "list.csv", "-o", "both.parquet")
    assert len(table(Path("both.parquet"))["path"]) == 6


def test_the_files_npz_and_h5_hold_the_same_as_parquet(folder: Path, audio: Path):
    run(folder, "audio/sub", "-o", "out.parquet")
    expected = table(Path("out.parquet"))
    run(folder, "audio/sub", "-o", "out.npz")
    with np.load("out.npz") as found:
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)
        assert json.loads(str(found["jepa_audio"]))["pooling"] == "mean/mean"
    h5py = pytest.importorskip("h5py")
    run(folder, "audio/sub", "-o", "out.h5")
    with h5py.File("out.h5") as found:
        for name, values in expected.items():
            stored = found[name].asstr()[:] if name == "path" else found[name][:]
            np.testing.assert_array_equal(stored, values)


def test_a_killed_command_continues_with_an_equal_result(
    folder: Path,
    audio: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
):
    run(folder, "audio", "-o", "whole.parquet")
    original, steps = predict.FileEmbedder.predict_step, list[int]()

    def killed(self, batch, batch_idx):
        if len(steps) == 2:
            raise RuntimeError("killed")
        steps.append(batch[0])
        return original(self, batch, batch_idx)

    monkeypatch.setattr(predict.FileEmbedder, "predict_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run(folder, "audio", "-o", "out.parquet")
    assert not Path("out.parquet").exists()
    (Path("out.parquet.parts") / ".0000003.parquet.part").write_text("half")
    monkeypatch.setattr(
        predict.FileEmbedder,
        "predict_step",
        lambda self, batch, i: steps.append(batch[0]) or original(self, batch, i),
    )
    with caplog.at_level(logging.INFO):
        run(folder, "audio", "-o", "out.parquet")
    assert "has 2 of 4 parts: the work continues" in caplog.text
    assert sorted(steps) == [0, 1, 2, 3]
    assert Path("out.parquet").read_bytes() == Path("whole.parquet").read_bytes()
    capsys.readouterr()
    run(folder, "audio", "-o", "out.parquet")
    assert "out.parquet is complete" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(folder, "audio", "-o", "out.parquet", "--pooling", "mean_std")
    assert "holds other embeddings" in capsys.readouterr().err
    run(folder, "audio", "-o", "out.parquet", "--pooling", "mean_std", "--overwrite", "true")
    assert table(Path("out.parquet"))["vector"].shape == (6, 32)


def test_sigterm_ends_the_command_at_once_and_it_continues_later(
    folder: Path, audio: Path, monkeypatch: pytest.MonkeyPatch
):
    run(folder, "audio", "-o", "whole.parquet")
    original, steps = predict.FileEmbedder.predict_step, list[int]()

    def stopped(self, batch, batch_idx):
        steps.append(batch[0])
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(predict.FileEmbedder, "predict_step", stopped)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as raised:
            run(folder, "audio", "-o", "out.parquet")
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert raised.value.code == 128 + signal.SIGTERM
    assert len(steps) == 2
    run(folder, "audio", "-o", "out.parquet")
    assert len(steps) == 2 + 3  # the first of four parts was complete
    assert Path("out.parquet").read_bytes() == Path("whole.parquet").read_bytes()


def interrupt(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """Run `embed`, and let it fail after the first part."""
    original, steps = predict.FileEmbedder.predict_step, list[int]()

    def killed(self, batch, batch_idx):
        steps.append(batch[0])
        if len(steps) == 2:
            raise RuntimeError("killed")
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(predict.FileEmbedder, "predict_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run(*words)


def test_parts_of_other_settings_are_kept_until_the_user_removes_them(
    folder: Path,
    audio: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
):
    words = ("audio", "-o", "out.parquet")
    interrupt(monkeypatch, folder, *words)
    parts = Path("out.parquet.parts")
    with pytest.raises(SystemExit):
        run(folder, "audio/sub", "-o", "out.parquet", "--pooling", "mean_std")
    err = capsys.readouterr().err
    assert "has 1 finished parts of an interrupted command with other settings" in err
    assert "(`pooling` 'mean/mean' instead of 'mean_std/mean', " in err
    assert "other files): repeat that command" in err
    assert "`--overwrite true`" in err
    assert (parts / "0000000.parquet").is_file()
    # The vectors depend on neither of these.
    with caplog.at_level(logging.INFO):
        run(os.path.relpath(folder), *words, "--max_windows", "2")
    assert "has 1 of 4 parts: the work continues" in caplog.text
    run(folder, *words)
    assert "out.parquet is complete" in capsys.readouterr().out
    parts.mkdir()
    (parts / "0000000.parquet").write_text("of another command")
    with pytest.raises(SystemExit):
        run(folder, "audio", "-o", "out.parquet", "--which", "random", "--overwrite", "false")
    assert "holds other embeddings (`which` 'context'" in capsys.readouterr().err
    run(folder, *words, "--overwrite", "true")
    assert "settings.json is missing or damaged" in caplog.text
    assert len(table(Path("out.parquet"))["path"]) == 6
    assert not parts.exists()


@pytest.mark.parametrize("num_files", [7, pytest.param(40, marks=pytest.mark.slow)])
def test_two_processes_give_the_same_file_as_one(
    folder: Path, audio: Path, num_files: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(files_module, "_CHUNK_FILES", 32)
    # 32 files are one chunk: of seven files, the second process has none.
    for number in range(num_files - 7):
        shutil.copy(audio / "sub" / f"{number % 6}.wav", audio / f"copy{number}.wav")
    command = [sys.executable, "-m", "jepa_audio", "embed", str(folder), "audio"]
    options = ["-o", "2.parquet", "--accelerator", "cpu", "--num_workers", "1", "--devices", "2"]
    done = subprocess.run(
        [*command, *options],
        check=True,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert "Warning" not in done.stderr
    run(folder, "audio", "-o", "1.parquet")
    one, two = table(Path("1.parquet")), table(Path("2.parquet"))
    assert one["path"].tolist() == two["path"].tolist()
    for name in ("start", "end", "vector"):
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=1e-6)


def test_what_cannot_be_embedded_is_refused_in_one_sentence(
    folder: Path, audio: Path, capsys: pytest.CaptureFixture[str]
):
    cases = {
        ("audio", "-o", "out.csv"): "must end in one of .parquet, .npz, .h5",
        ("audio", "-o", "out.npz", "--layers", "[9]"): "`layers` is [9]",
        ("audio", "-o", "out.npz", "--pooling", "meen"): "_std_change, or frames",
        ("audio", "-o", "out.npz", "--hop_seconds", "1"): "needs `segment_seconds`",
        ("audio", "-o", "out.npz", "--segment_seconds", "0"): "(0) must be at least one sample",
        ("none", "-o", "out.npz"): "none does not exist; . has audio, ",
        ("audo", "-o", "out.npz"): "audo does not exist; did you mean 'audio'?",
        ("list.parquet", "-o", "out.npz"): "; did you mean 'lists.parquet'?",
        ("audio", "-o", "out.npz", "--precision", "8"): "precision",
        ("audio", "-o", "out.npz", "--num_workers", "-1"): "`num_workers` (-1) must be at least 0",
        ("audio", "-o", "out.npz", "--devices", "0"): "these devices cannot be used (`accelerator`",
        ("audio", "-o", "out.npz", "--accelerator", "foo"): "`--accelerator cpu --devices 1` works",
        ("audio", "-o", "audio/bad.wav/x.npz"): "bad.wav is a file, not a folder",
        ("audio", "-o", "/proc/x.npz"): "cannot be written",
        ("audio", "-o", "folder.npz", "--overwrite", "true"): "(folder.npz) is a folder",
        ("audio/bad.wav", "-o", "out.npz"): "none of the 1 files could be embedded",
    }
    Path("folder.npz").mkdir()
    Path("lists.parquet").touch()
    for words, message in cases.items():
        with pytest.raises(SystemExit):
            # `run` without its last words, which are among the cases.
            defaults = ["--accelerator", "cpu", "--num_workers", "0"]
            main(["embed", str(folder), *defaults, *words])
        err = capsys.readouterr().err
        assert message in err
        assert "this is a bug" not in err
        assert not Path("out.npz").exists()
        assert not list(Path().glob(".*"))
        assert Path("out.npz.parts").exists() == ("could be embedded" in message)
        shutil.rmtree("out.npz.parts", ignore_errors=True)


def test_commands_wait_for_the_lock_and_only_its_holder_removes_it(tmp_path: Path):
    """Three threads, each of which waits for a lock whose file is removed meanwhile."""
    path, inside, seen = tmp_path / ".out.lock", list[int](), list[int]()

    def hold(number: int) -> None:
        with _output_lock(path):
            inside.append(number)
            seen.append(len(inside))
            time.sleep(0.05)
            inside.remove(number)

    threads = [threading.Thread(target=hold, args=[number]) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert seen == [1, 1, 1]
    assert not path.exists()
    with pytest.raises(UserError), _output_lock(path):
        raise UserError("refused")
    assert not path.exists()


def test_chunks_are_limited_in_files_and_bytes(monkeypatch: pytest.MonkeyPatch, audio: Path):
    found = list_files(["audio"])
    assert [file.name for file in found] == sorted(file.name for file in found)
    assert [list(chunk) for chunk in chunk_files(found)] == [[0, 1], [2, 3], [4, 5], [6]]
    monkeypatch.setattr(files_module, "_CHUNK_BYTES", 10)
    assert len(chunk_files(found)) >= 6
    assert chunk_files([]) == []


@pytest.mark.parametrize(
    ("length", "segment", "hop", "expected"),
    [
        (10, None, None, [(0, 10)]),
        (10, 10, None, [(0, 10)]),
        (10, 12, None, [(0, 10)]),
        (10, 4, None, [(0, 4), (4, 8), (8, 10)]),
        (12, 4, None, [(0, 4), (4, 8), (8, 12)]),
        (10, 4, 3, [(0, 4), (3, 7), (6, 10)]),
        (10, 4, 6, [(0, 4), (6, 10)]),
        (11, 4, 6, [(0, 4), (6, 10)]),
    ],
)
def test_segments_cover_a_clip(length: int, segment: int | None, hop: int | None, expected: list):
    assert spans(length, segment, hop) == expected


@pytest.mark.parametrize("name", ["mean", "thirds_std", "regions_9_change", "mean_std_change"])
@pytest.mark.parametrize("count", [1, 2, 31])
def test_the_running_pool_equals_the_pool_of_all_columns(name: str, count: int):
    layer = torch.randn(1, count, 3, 5, generator=torch.Generator().manual_seed(0)) + 5
    ones = torch.ones(1, count, dtype=torch.bool)
    features = LayerFeatures((layer, 2 * layer), torch.arange(float(count))[None], ones)
    pooling = parse_pooling(name)
    pool = RunningPool(pooling, count)
    for chunk in layer.split(7, dim=1):
        pool.add([chunk[0].mean(1), 2 * chunk[0].mean(1)])
    torch.testing.assert_close(pool.vector(), pooling.vectors(features)[0, 0])
