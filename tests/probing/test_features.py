"""The feature store: each clip is encoded once, in order and without padding; it can resume."""

import errno
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from torch import Tensor

from jepa_audio.errors import UserError
from jepa_audio.inference.features import LayerFeatures
from jepa_audio.inference.pooling import Pooling, parse_poolings
from jepa_audio.probing.clips import UnusableClipsError, load_waveform
from jepa_audio.probing.encoders import FunctionEncoder, LogMelStatistics, ProbeEncoder
from jepa_audio.probing.feature_store import FeatureStore
from jepa_audio.probing.features import Features, Preparation
from jepa_audio.probing.robustness import SWEEPS
from jepa_audio.probing.tasks.base import Windows
from jepa_audio.probing.tasks.records import Item, Split

RATE = 1000
# The log-mel baseline needs half a second.
SECONDS = (3.0, 1.5, 3.0, 0.7, 2.2)


class Counting(FunctionEncoder):
    """Mean and last sample of every tenth of a second; counts the encoded seconds."""

    encoded_seconds = 0.0

    def __init__(self, name: str = "counting") -> None:
        super().__init__(self._tenths, name, RATE, layer_names=("mean", "last"))
        self.encoded_seconds = 0.0

    def _tenths(self, waveform: Tensor) -> list[Tensor]:
        self.encoded_seconds += waveform.shape[0] * waveform.shape[-1] / RATE
        tenths = waveform[:, 0].unfold(-1, RATE // 10, RATE // 10)
        return [tenths.mean(-1, keepdim=True).expand(-1, -1, 3), tenths[..., -1:]]


def split_of(folder: Path, seconds: tuple[float, ...] = SECONDS, seed: int = 0) -> Split:
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    items = []
    for i, length in enumerate(seconds):
        path = folder / f"{i}.wav"
        sf.write(path, rng.uniform(-0.5, 0.5, round(length * RATE)), RATE, subtype="FLOAT")
        items.append(Item(path, i, f"clip {i}", f"record {i}"))
    return Split(tuple(items))


def features_of(
    split: Split,
    folder: Path,
    preparation: Preparation,
    encoder: ProbeEncoder | None = None,
    batch_seconds: float = 4.0,
) -> Features:
    store = FeatureStore(folder, encoder or Counting(), preparation, batch_seconds)
    return store.features(split, "test")


def tables(folder: Path) -> dict[str, str]:
    return {
        str(p): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_rows_are_windows_in_order_without_padding(tmp_path: Path):
    split = split_of(tmp_path / "audio")
    features = features_of(split, tmp_path / "features", Preparation(Windows(1.0, min_ratio=0.5)))
    # The last 0.2 s of 2.2 s are dropped.
    assert features.rows.item.tolist() == [0] * 3 + [1] * 2 + [2] * 3 + [3] + [4] * 2
    assert features.rows.window.tolist() == list(range(11))
    np.testing.assert_allclose(
        features.rows.seconds, [0.5, 1.5, 2.5, 0.5, 1.25, 0.5, 1.5, 2.5, 0.35, 0.5, 1.5]
    )
    for row, (item, seconds) in enumerate(
        zip(features.rows.item, features.rows.seconds, strict=True)
    ):
        waveform = load_waveform(split.items[item], RATE, 1)[0]
        half = 0.25 if row == 4 else 0.35 if row == 8 else 0.5
        window = waveform[round((seconds - half) * RATE) : round((seconds + half) * RATE)]
        first = features.read(0, np.array([row]))[0, 0]
        assert first == pytest.approx(float(window.mean()), abs=1e-6)
        assert features.read(1, np.array([row])).shape == (1, 1)


@pytest.mark.parametrize("batch_seconds", [0.1, 2.0, 100.0])
def test_batch_size_does_not_change_features(batch_seconds: float, tmp_path: Path):
    split, preparation = split_of(tmp_path / "audio"), Preparation(Windows())
    one = features_of(split, tmp_path / "one", preparation)
    other = features_of(split, tmp_path / "other", preparation, batch_seconds=batch_seconds)
    for layer in range(2):
        torch.testing.assert_close(one.read(layer), other.read(layer), rtol=0, atol=1e-6)


def test_each_clip_is_encoded_once(tmp_path: Path):
    split, folder, encoder = split_of(tmp_path / "audio"), tmp_path / "features", Counting()
    preparation = Preparation(Windows())
    first = features_of(split, folder, preparation, encoder)
    seconds, stored = encoder.encoded_seconds, tables(folder)
    again = features_of(Split(split.items[1:][::-1]), folder, preparation, encoder)
    assert encoder.encoded_seconds == seconds
    assert tables(folder) == stored
    assert torch.equal(again.read(0), first.read(0).flip(0)[:-1])
    more = Split((*split.items, *split_of(tmp_path / "more", (1.0,), seed=1).items[:1]))
    features_of(more, folder, preparation, encoder)
    assert encoder.encoded_seconds == pytest.approx(seconds + 1.0)


def test_several_poolings_share_one_encoding(tmp_path: Path):
    split, folder, encoder = split_of(tmp_path / "audio"), tmp_path / "features", Counting()
    poolings = parse_poolings(["mean", "thirds_std"], ["mean"])
    preparation = Preparation(Windows(1.0, min_ratio=0.5), poolings=poolings)
    store = FeatureStore(folder, encoder, preparation, 4.0)
    mean, thirds = (store.features(split, "test", pooling) for pooling in poolings)
    seconds = encoder.encoded_seconds
    assert seconds == pytest.approx(sum(SECONDS) - 0.2 + 1.0)  # 0.2 s are dropped; 1 s is the hash
    for pooling, shared in zip(poolings, (mean, thirds), strict=True):
        alone = features_of(split, tmp_path / "alone", preparation.pooled_by([pooling]))
        assert shared.rows.seconds.tolist() == alone.rows.seconds.tolist()
        assert all(torch.equal(shared.read(layer), alone.read(layer)) for layer in range(2))
    assert thirds.read(0).shape[1] == 4 * mean.read(0).shape[1]
    # A later pooling is computed without a change of the others; the first ones are still cached.
    (more,) = parse_poolings(["regions_5"], ["mean"])
    again = FeatureStore(folder, encoder, preparation.pooled_by([*poolings, more]), 4.0)
    assert again.features(split, "test", more).read(0).shape[1] == 5 * mean.read(0).shape[1]
    assert torch.equal(again.features(split, "test", poolings[1]).read(0), thirds.read(0))
    assert encoder.encoded_seconds == pytest.approx(2 * seconds - 1.0)


def test_poolings_that_lack_different_clips_are_completed(tmp_path: Path):
    split, folder = split_of(tmp_path / "audio"), tmp_path / "features"
    poolings = parse_poolings(["mean", "thirds"], ["mean"])
    preparation = Preparation(Windows(), poolings=poolings)
    features_of(Split(split.items[:2]), folder, preparation.pooled_by(poolings[:1]))
    features_of(Split(split.items[1:4]), folder, preparation.pooled_by(poolings[1:]))
    for each in poolings:
        alone = features_of(split, tmp_path / "alone", preparation.pooled_by([each])).read(0)
        store = FeatureStore(folder, Counting(), preparation, 4.0)
        assert torch.equal(store.features(split, "test", each).read(0), alone)


def test_log_mel_is_pooled_like_an_encoder_and_as_its_own_statistics():
    encoder, noise = LogMelStatistics(RATE), torch.randn(1, 1, 2 * RATE)
    (bands,) = encoder.encode_for_clips(noise).layers
    requested = parse_poolings(["thirds", "mean_std_change"], ["mean", "concat"])
    poolings = encoder.poolings(requested)
    assert [each.name for each in poolings] == ["thirds/concat", "mean_std_change/concat"]
    thirds, own = (each(encoder.encode_for_clips(noise))[0][0, 0] for each in poolings)
    plane = bands[0, ..., 0].T
    expected = torch.nn.functional.adaptive_avg_pool1d(plane, 3).T.flatten()
    torch.testing.assert_close(thirds, expected)
    change = plane.diff(dim=1).abs().mean(dim=1)
    statistics = plane.mean(dim=1), plane.std(dim=1, correction=0), change
    torch.testing.assert_close(own, torch.cat(statistics))


@pytest.mark.parametrize(
    ("names", "frequencies", "message"),
    [
        ("thrids", "mean", r"`pooling` is 'thrids', must be one of .*did you mean 'thirds'"),
        ("regions_0", "mean", "number of regions must be in 1-100"),
        ("regions_101", "mean", "number of regions must be in 1-100"),
        ("mean_change_std", "mean", "`pooling` is 'mean_change_std'"),
        ("frames", "mean", "`pooling` is 'frames'"),
        ("", "mean", "`pooling` is ''"),
        ("mean", "max", "`frequency` is 'max', must be one of mean, concat"),
        ("mean,mean", "mean", "different poolings, got"),
        ("thirds,regions_3", "mean", "different poolings, got"),
    ],
)
def test_wrong_names_of_poolings_are_refused(names: str, frequencies: str, message: str):
    with pytest.raises(UserError, match=message):
        parse_poolings(names.split(","), frequencies.split(","))


def test_a_pooling_has_one_name():
    names = ["mean", "thirds_std", "regions_4_std_change", "regions_1", "regions_3_std"]
    found = [parse_poolings([name], ["concat"])[0].name for name in names]
    assert found == [
        "mean/concat",
        "thirds_std/concat",
        "regions_4_std_change/concat",
        "mean/concat",
        "thirds_std/concat",
    ]


def test_another_file_content_function_or_preparation_is_encoded_again(tmp_path: Path):
    split, folder, encoder = split_of(tmp_path / "audio"), tmp_path / "features", Counting()
    before = features_of(split, folder, Preparation(Windows()), encoder).read(0)
    sf.write(split.items[2].path, np.full(2 * RATE, 0.25), RATE, subtype="FLOAT")
    after = features_of(split, folder, Preparation(Windows()), encoder).read(0)
    assert float(after[2, 0]) == pytest.approx(0.25)
    assert torch.equal(after[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
    louder_by_20_db = replace(SWEEPS["gain"][0], level=20.0)
    louder = features_of(
        split, folder, Preparation(Windows(), condition=louder_by_20_db), encoder
    ).read(0)
    torch.testing.assert_close(louder, 10 * after)

    class Opposite(Counting):
        def _tenths(self, waveform: Tensor) -> list[Tensor]:
            return super()._tenths(-waveform)

    torch.testing.assert_close(
        features_of(split, folder, Preparation(Windows()), Opposite()).read(0), -after
    )


DAMAGE = {
    "half a row at the end": lambda rows, index: append(rows, b"half a row"),
    "half a line at the end": lambda rows, index: append(index, b'{"first": 8, "cou'),
    "a last line without its end": lambda rows, index: cut(index, 20),
    "a line that is no JSON": lambda rows, index: append(index, b"\x00\xff\n"),
    "a line of an earlier version": lambda rows, index: append(index, b'["abc", 8, 2]\n'),
    "a block beyond the end of the file": lambda rows, index: change(
        index, b'"first": 0', b'"first": 99999999999'
    ),
    "other numbers of rows": lambda rows, index: change(index, b"3", b"4"),
    "no layers": lambda rows, index: change(index, b"[3, 1]", b"[]"),
    "rows cut short": lambda rows, index: cut(rows, 30),
    "zero-filled rows": lambda rows, index: rows.write_bytes(bytes(rows.stat().st_size)),
    "one changed bit": lambda rows, index: rows.write_bytes(flip_one_bit(rows.read_bytes())),
    "no rows": lambda rows, index: rows.unlink(),
    "empty rows": lambda rows, index: rows.write_bytes(b""),
    "no index": lambda rows, index: index.unlink(),
    "empty index": lambda rows, index: index.write_bytes(b""),
}


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-num_bytes])


def change(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def flip_one_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_rows_are_computed_again_and_one_line_states_it(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    split, folder = split_of(tmp_path / "audio"), tmp_path / "features"
    preparation = Preparation(Windows(1.0, min_ratio=0.5))
    complete = features_of(split, tmp_path / "complete", preparation)
    features_of(Split(split.items[:3]), folder, preparation)
    (store,) = folder.iterdir()
    DAMAGE[damage](store / "rows", store / "index.jsonl")
    for _ in range(2):
        again = features_of(split, folder, preparation)
        assert all(torch.equal(again.read(layer), complete.read(layer)) for layer in range(2))
        assert np.array_equal(again.rows.seconds, complete.rows.seconds)
        assert np.array_equal(again.rows.window, complete.rows.window)
    # Rows after the end of the index, and a missing index, are the trace of a killed process.
    num_lines = damage not in ("half a row at the end", "no index", "empty index")
    assert len(caplog.messages) == num_lines
    assert all("cached features are damaged" in message for message in caplog.messages)


def test_all_bad_files_are_named_and_the_rows_before_them_are_kept(tmp_path: Path):
    split, folder = split_of(tmp_path / "audio", (0.5,) * 110), tmp_path / "features"
    for number in (37, 39, 105):
        split.items[number].path.write_bytes(b"no audio")
    with pytest.raises(UnusableClipsError, match=r"^3 clips .* remove their lines") as raised:
        features_of(split, folder, Preparation(Windows()))
    for number in (37, 39, 105):
        line = next(line for line in raised.value.problems if f"{number}.wav" in line)
        assert line.startswith(split.items[number].where)
    (store,) = folder.iterdir()
    (block,) = map(json.loads, (store / "index.jsonl").read_text().splitlines())
    assert len(block["counts"]) == 32


def test_a_full_disk_ends_in_one_sentence_and_keeps_the_rows_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    split, folder = split_of(tmp_path / "audio", (0.5,) * 70), tmp_path / "features"
    encoder, synced = Counting(), os.fsync

    def fail_later(file: int) -> None:
        if os.fstat(file).st_size > 1500:  # the second block of rows
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(file)

    monkeypatch.setattr(os, "fsync", fail_later)
    with pytest.raises(UserError, match=r"rows cannot be written: No space left .* the 32 clips"):
        features_of(split, folder, Preparation(Windows()), encoder)
    monkeypatch.undo()
    before = encoder.encoded_seconds
    again = features_of(split, folder, Preparation(Windows()), encoder)
    assert encoder.encoded_seconds - before == pytest.approx(38 * 0.5)
    complete = features_of(split, tmp_path / "complete", Preparation(Windows()))
    assert torch.equal(again.read(0), complete.read(0))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path):
    split = split_of(tmp_path / "audio")

    store = FeatureStore(tmp_path / "features", Counting(), Preparation(Windows()), 4.0)
    load = store._load

    def load_after_change(item: Item, key: str) -> Tensor:
        if item is split.items[2]:
            sf.write(item.path, np.zeros(800), RATE)
        return load(item, key)

    store._load = load_after_change
    with pytest.raises(UserError, match=r"record 2: .*2\.wav changed while it was read"):
        store.features(split, "test")


def test_what_cannot_be_encoded_is_named_before_anything_is_encoded(tmp_path: Path):
    split = split_of(tmp_path / "audio", (0.5, 0.05, 0.5))
    encoder = Counting()

    def check(encoder: ProbeEncoder, split: Split) -> None:
        FeatureStore(tmp_path / "features", encoder, Preparation(Windows()), 4.0).check(split)

    with pytest.raises(UserError, match=r"record 1: counting cannot encode a clip of 50 samples"):
        check(encoder, split)
    check(encoder, Split(split.items[::2]))
    after_end = replace(split.items[0], start_seconds=0.6, uid="after the end")
    with pytest.raises(UserError, match=r"record 0: starts at 0\.6 s, after the end"):
        check(encoder, Split((split.items[2], after_end)))
    junk = tmp_path / "junk.wav"
    junk.write_bytes(b"no audio")
    with pytest.raises(UnusableClipsError, match=r"2 clips.*\n.*junk\.wav.*\n.*after the end"):
        check(encoder, Split((replace(split.items[0], path=junk), split.items[2], after_end)))
    assert not list((tmp_path / "features").rglob("rows"))


def test_windows_shorter_than_one_token_are_padded_and_counted(tmp_path: Path):
    split = split_of(tmp_path / "audio", (1.0, 0.2, 0.003))
    encoder = LogMelStatistics(RATE)
    for _ in range(2):
        features = features_of(split, tmp_path / "features", Preparation(Windows()), encoder)
        assert features.num_padded == 2
        assert len(features) == 3
    waveform = load_waveform(split.items[1], RATE, 1)
    padded = torch.nn.functional.pad(waveform, (0, encoder.min_samples - 200))[None]
    torch.testing.assert_close(
        features.read(0)[1], Pooling()(encoder.encode_for_clips(padded))[0][0, 0]
    )


def test_frames_are_interpolated_to_the_grid(tmp_path: Path):
    split = split_of(tmp_path / "audio", (2.0, 1.0))
    line = torch.arange(20.0)

    class Rising(FunctionEncoder):
        def encode(self, waveform: Tensor) -> LayerFeatures:
            num = waveform.shape[-1] // 100
            times = ((torch.arange(num) + 0.5) / 10).expand(len(waveform), -1)
            layer = line[:num, None, None].expand(len(waveform), -1, 1, 2)
            return LayerFeatures((layer,), times, torch.ones_like(times, dtype=torch.bool))

    encoder = Rising(lambda waveform: waveform.mT, "rising", RATE)
    on_grid = features_of(
        split, tmp_path / "grid", Preparation(Windows(1.0), per_frame=True, grid_hz=25.0), encoder
    )
    assert on_grid.rows.item.tolist() == [0] * 50 + [1] * 25
    assert on_grid.rows.window.tolist() == [0] * 25 + [1] * 25 + [2] * 25
    np.testing.assert_allclose(on_grid.rows.seconds[:50], (np.arange(50) + 0.5) / 25, rtol=1e-6)
    # Linear between two columns.
    expected = np.clip((np.arange(25) + 0.5) / 25 * 10 - 0.5, 0, 9)
    np.testing.assert_allclose(on_grid.read(0)[:25, 0].numpy(), expected, atol=4e-3)
    columns = features_of(
        split, tmp_path / "columns", Preparation(Windows(1.0), per_frame=True), encoder
    )
    assert len(columns) == 30
    np.testing.assert_allclose(columns.rows.seconds[:10], np.arange(10) / 10 + 0.05, rtol=1e-6)


def test_features_that_exceed_the_disk_space_raise_an_error_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jepa_audio.probing.feature_store._SPARE_BYTES", 2**62)
    with pytest.raises(
        ValueError,
        match=r"features of 2 layers take .* GB are free: keep fewer with `--layers`",
    ):
        features_of(split_of(tmp_path / "audio"), tmp_path / "features", Preparation(Windows()))
    assert not list((tmp_path / "features").rglob("rows"))


def test_features_that_are_not_finite_raise_an_error(tmp_path: Path):
    encoder = FunctionEncoder(lambda waveform: waveform.mean(-1) / 0, "broken", RATE)
    with pytest.raises(ValueError, match="record 3: broken gives features that are not finite"):
        features_of(
            split_of(tmp_path / "audio"), tmp_path / "features", Preparation(Windows()), encoder
        )


def test_the_number_of_layers_must_match_their_names(tmp_path: Path):
    class Doubled(Counting):
        def encode(self, waveform: Tensor) -> LayerFeatures:
            features = super().encode(waveform)
            return LayerFeatures(features.layers * 2, features.times, features.valid)

    with pytest.raises(
        ValueError,
        match=r"record 3: counting returns 4 layers, but the names .* \['mean', 'last'\]",
    ):
        features_of(
            split_of(tmp_path / "audio"), tmp_path / "features", Preparation(Windows()), Doubled()
        )


def test_large_tables_stay_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    split = split_of(tmp_path / "audio")
    in_memory = features_of(split, tmp_path / "features", Preparation(Windows()))
    monkeypatch.setattr("jepa_audio.probing.feature_store._MAX_BYTES_IN_MEMORY", 0)
    on_disk = features_of(split, tmp_path / "features", Preparation(Windows()))
    assert isinstance(on_disk.layers[0], np.memmap)
    assert not isinstance(in_memory.layers[0], np.memmap)
    assert torch.equal(on_disk.read(0), in_memory.read(0))


def test_an_item_is_cut_out_and_fills_the_channels_of_the_encoder(tmp_path: Path):
    stereo = np.random.default_rng(0).uniform(-0.5, 0.5, (2 * RATE, 2)).astype(np.float32)
    path = tmp_path / "stereo.wav"
    sf.write(path, stereo, RATE, subtype="FLOAT")
    part = Item(path, 0, "a", "record 0", start_seconds=0.5, end_seconds=0.75)
    np.testing.assert_allclose(
        load_waveform(part, RATE, 1)[0], stereo[500:750].mean(axis=1), atol=1e-7
    )
    assert load_waveform(part, 2 * RATE, 2).shape == (2, 500)
    with pytest.raises(ValueError, match=r"stereo\.wav has 2 channels, the encoder takes 3"):
        load_waveform(part, RATE, 3)
    with pytest.raises(
        ValueError, match=r"record 0: starts at 5\.0 s, after the end of .*stereo\.wav"
    ):
        load_waveform(Item(path, 0, "a", "record 0", start_seconds=5.0), RATE, 1)


def test_log_mel_statistics_do_not_depend_on_the_batch(tmp_path: Path):
    split, encoder = split_of(tmp_path / "audio"), LogMelStatistics(RATE)
    (own,) = encoder.poolings(())
    preparation = Preparation(Windows(), poolings=(own,))
    batched = features_of(split, tmp_path / "features", preparation, encoder)
    for row, item in enumerate(split.items):
        alone = own(encoder.encode_for_clips(load_waveform(item, RATE, 1)[None]))[0][0, 0]
        torch.testing.assert_close(batched.read(0)[row], alone, atol=1e-4, rtol=1e-4)
    assert batched.read(0).shape == (5, 192)
