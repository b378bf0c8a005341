"""Laws of the order of a run, and of stopping and going on in the middle of it."""

from collections import Counter
from itertools import islice
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

from jepa_audio.data.corpus.table import CorpusError
from jepa_audio.data.loading.crops import BadRead
from jepa_audio.data.loading.loader import BadReadCounter, EvaluationLoader, ResumableLoader
from jepa_audio.data.loading.order import EveryNthBatch, GlobalOrderSampler
from jepa_audio.steps.grid import AudioBatch


def order(num_batches: int, **arguments: int) -> list[list[tuple[int, int]]]:
    return list(islice(GlobalOrderSampler(**arguments), num_batches))


def test_every_file_comes_exactly_once_in_every_epoch_though_batches_reach_over_the_border():
    places = [place for batch in order(14, num_files=7, batch_size=3) for place in batch]
    assert [position for position, _ in places] == list(range(42))
    for epoch in range(6):
        assert sorted(file for _, file in places[epoch * 7 : epoch * 7 + 7]) == list(range(7))


def test_epochs_differ_and_seeds_differ_and_the_same_seed_repeats():
    first, again = (order(4, num_files=20, batch_size=10, seed=1) for _ in range(2))
    other = order(4, num_files=20, batch_size=10, seed=2)
    files = [file for batch in first for _, file in batch]
    assert first == again
    assert first != other
    assert files[:20] != files[20:]


def test_without_shuffling_the_files_come_in_the_order_of_the_table():
    batches = list(islice(GlobalOrderSampler(3, 2, shuffle=False), 3))
    assert batches == [[(0, 0), (1, 1)], [(2, 2), (3, 0)], [(4, 1), (5, 2)]]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_divide_the_order_of_one_process_among_themselves(world_size: int):
    whole = order(5, num_files=7, batch_size=2 * world_size, seed=3)
    ranks = [
        order(5, num_files=7, batch_size=2, seed=3, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step in range(5):
        assert [place for rank in ranks for place in rank[step]] == whole[step]


MIXTURE = {"num_files": [7, 400, 30], "weights": [1.0, 2.0, 1.0], "seed": 4}


def test_a_mixture_takes_of_each_corpus_its_share_whatever_its_size():
    sampler = GlobalOrderSampler(batch_size=1, **MIXTURE)
    files = [sampler.file_at(position) for position in range(10_000)]
    corpus = [0 if file < 7 else 1 if file < 407 else 2 for file in files]
    assert Counter(corpus) == {0: 2500, 1: 5000, 2: 2500}
    assert 200 < Counter(corpus[1000:2000])[0] < 300, "and so does every stretch, about"


def test_each_corpus_of_a_mixture_gives_every_file_once_an_epoch_also_across_blocks():
    sampler = GlobalOrderSampler(batch_size=1, **MIXTURE)
    files = [sampler.file_at(position) for position in range(9_000, 25_000)]
    for first, size in ((0, 7), (7, 400), (407, 30)):
        own = [file for file in files if first <= file < first + size]
        before = sum(first <= sampler.file_at(position) < first + size for position in range(9_000))
        start = -before % size
        epochs = [own[i : i + size] for i in range(start, len(own) - size, size)]
        assert len(epochs) >= 10
        assert all(sorted(epoch) == list(range(first, first + size)) for epoch in epochs)


def test_a_mixture_is_divided_among_ranks_and_resumed_like_one_corpus():
    whole = order(6, batch_size=4, **MIXTURE)
    ranks = [order(6, batch_size=2, rank=rank, world_size=2, **MIXTURE) for rank in range(2)]
    assert [[place for rank in ranks for place in rank[step]] for step in range(6)] == whole
    resumed = GlobalOrderSampler(batch_size=4, **MIXTURE)
    resumed.samples_consumed = 8
    assert list(islice(resumed, 4)) == whole[2:]


def test_several_corpora_without_weights_are_one():
    assert order(9, num_files=[3, 4], batch_size=2) == order(9, num_files=7, batch_size=2)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, 1e-9]])
def test_impossible_weights_are_refused(weights: list[float]):
    with pytest.raises(ValueError, match="`weights`"):
        GlobalOrderSampler([3, 4], 2, weights=weights)


def test_bad_reads_are_counted_and_each_file_is_named_once(caplog: pytest.LogCaptureFixture):
    reads = BadReadCounter(0.5)
    assert reads.summary() == ""
    for _ in range(3):
        reads.count(8, [BadRead("a.wav", "worn out"), BadRead("b.wav", "empty")])
    assert caplog.messages == [
        "replaced a.wav by another file: worn out",
        "replaced b.wav by another file: empty",
    ]
    assert reads.summary() == "6 of 30 reads failed and were replaced, of 2 files"


def test_above_the_share_of_bad_reads_the_run_stops_with_the_list():
    reads = BadReadCounter(0.1)
    reads.count(98, [BadRead("a.wav", "worn out")])
    with pytest.raises(
        CorpusError, match=r"31 of 149 reads failed.*0\.1.*a\.wav \(worn out\).*and 11 more"
    ) as stop:
        reads.count(20, [BadRead(f"{number}.wav", "empty") for number in range(30)])
    assert str(stop.value).count("empty") == 19


def test_the_global_generator_has_no_influence_and_is_left_alone():
    torch.manual_seed(0)
    first, state = order(3, num_files=9, batch_size=2), torch.get_rng_state()
    torch.manual_seed(1)
    assert order(3, num_files=9, batch_size=2) == first
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("num_files", "world_size"), [(7, 3), (6, 2), (5, 1)])
def test_evaluation_gives_every_batch_whole_to_one_rank(num_files: int, world_size: int):
    shares = [list(EveryNthBatch(num_files, 2, rank, world_size)) for rank in range(world_size)]
    assert Counter(file for share in shares for _, file in share) == Counter(range(num_files))
    assert [len(EveryNthBatch(num_files, 2, rank, world_size)) for rank in range(world_size)] == [
        *map(len, shares)
    ]
    batches = {tuple(share[i : i + 2]) for share in shares for i in range(0, len(share), 2)}
    assert batches == {
        tuple((f, f) for f in range(i, min(i + 2, num_files))) for i in range(0, num_files, 2)
    }


def test_no_rank_is_left_without_an_evaluation_batch():
    assert [list(EveryNthBatch(2, 1, rank, 3)) for rank in range(3)] == [
        [(0, 0)],
        [(1, 1)],
        [(0, 0)],
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_files": 0, "batch_size": 1},
        {"num_files": 1, "batch_size": 0},
        {"num_files": 1, "batch_size": 1, "rank": 1},
        {"num_files": 1, "batch_size": 1, "seed": -1},
    ],
)
def test_an_impossible_order_is_refused(arguments: dict[str, int]):
    with pytest.raises(ValueError, match="must be"):
        GlobalOrderSampler(**arguments)


class Places(Dataset[tuple[int, int]]):
    def __init__(self, num_files: int) -> None:
        self.num_files = num_files

    def __len__(self) -> int:
        return self.num_files

    def __getitem__(self, place: tuple[int, int]) -> tuple[int, int]:
        return place


def as_batch(places: list[tuple[int, int]]) -> tuple[AudioBatch, list[BadRead]]:
    """The files stand where the waveform would; none is bad."""
    position, file = torch.tensor(places).T
    return AudioBatch(file.float()[:, None, None], position), []


def loader(num_files: int = 10, batch_size: int = 2, **sampler: int) -> ResumableLoader:
    places = GlobalOrderSampler(num_files, batch_size, seed=5, **sampler)
    return ResumableLoader(
        DataLoader(Places(num_files), batch_sampler=places, collate_fn=as_batch),
        BadReadCounter(0.5),
    )


def rows(batches: list[AudioBatch]) -> list[tuple[int, int]]:
    return [
        (int(row), int(file))
        for batch in batches
        for row, file in zip(batch.row, batch.waveform, strict=True)
    ]


def expected(num_places: int) -> list[tuple[int, int]]:
    places = [
        place for batch in islice(GlobalOrderSampler(10, 2, seed=5), num_places) for place in batch
    ]
    return places[:num_places]


@pytest.mark.parametrize("num_batches", [0, 3, 5])
def test_a_loader_given_the_state_of_another_goes_on_where_that_stopped(num_batches: int):
    stopped, resumed = loader(), loader()
    seen = rows(list(islice(stopped, num_batches)))
    assert stopped.state_dict()["samples_consumed"] == 2 * num_batches
    resumed.load_state_dict(stopped.state_dict())
    assert seen + rows(list(resumed)) == expected(2 * num_batches + 10)


def test_an_epoch_goes_on_where_the_last_one_ended_even_if_it_was_left_early():
    stream = loader()
    assert len(stream) == 5
    assert rows([*islice(stream, 2), *stream, *stream]) == expected(24)


def test_a_closed_loader_goes_on():
    stream = loader()
    seen = rows(list(islice(stream, 2)))
    stream.close()
    assert seen + rows(list(stream)) == expected(14)


def test_a_run_goes_on_with_another_number_of_processes_and_another_batch_size():
    ranks = [loader(rank=rank, world_size=2) for rank in range(2)]
    seen = [
        batch for pair in zip(*(islice(rank, 2) for rank in ranks), strict=True) for batch in pair
    ]
    assert ranks[0].state_dict() == ranks[1].state_dict()
    assert ranks[0].state_dict()["samples_consumed"] == 8
    alone = loader(batch_size=3)
    alone.load_state_dict(ranks[0].state_dict())
    assert rows([*seen, *islice(alone, 2)]) == expected(14)


def test_a_loader_of_another_order_is_refused():
    with pytest.raises(TypeError, match="GlobalOrderSampler"):
        ResumableLoader(DataLoader(Places(3), batch_size=2), BadReadCounter(0.5))


class Recorder(pl.LightningModule):
    """Keeps in its checkpoint what it has been shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("shown", torch.zeros(0, dtype=torch.long))
        self.stepped: list[int] = []

    def training_step(self, batch: AudioBatch, batch_idx: int) -> torch.Tensor:
        self.shown = torch.cat([self.shown, batch.row])
        return self.weight.sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.stepped.append(len(self.shown))

    def validation_step(self, batch: AudioBatch, batch_idx: int) -> None:
        self.log("valid/rows", float(len(batch.row)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        self.shown = torch.zeros_like(state_dict["shown"])
        return super().load_state_dict(state_dict, strict, assign)


class KilledError(Exception):
    pass


class KillAfter(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            raise KilledError


EVERY_STEP = {"every_n_train_steps": 1, "save_on_train_epoch_end": False}
WHEN = {
    "step": EVERY_STEP,
    "epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "validation": {"save_on_train_epoch_end": False},
}


def fit(
    folder: Path,
    max_steps: int = 8,
    kill_after: int | None = None,
    ckpt_path: Path | None = None,
    validate_every: int | None = None,
    when: str = "step",
) -> Recorder:
    module = Recorder()
    save = ModelCheckpoint(folder, "{step}", save_top_k=-1, **WHEN[when])
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        val_check_interval=validate_every,
        callbacks=[save] if kill_after is None else [save, KillAfter(kill_after)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    # 12 files in batches of 2: an epoch of 6 micro-batches or 3 steps.
    valid = DataLoader(Places(4), sampler=EveryNthBatch(4, 2), batch_size=2, collate_fn=as_batch)
    trainer.fit(
        module,
        loader(12),
        EvaluationLoader(valid, BadReadCounter(0.5)) if validate_every else None,
        ckpt_path=ckpt_path,
    )
    return module


@pytest.mark.parametrize("step", range(1, 8))
@pytest.mark.parametrize("validate_every", [None, 4, 6])
def test_a_run_killed_at_any_step_and_resumed_sees_what_an_uninterrupted_run_sees(
    tmp_path: Path, step: int, validate_every: int | None
):
    with pytest.raises(KilledError):
        fit(tmp_path, kill_after=step, validate_every=validate_every)
    checkpoint = tmp_path / f"step={step}.ckpt"
    resumed = fit(tmp_path / "resumed", ckpt_path=checkpoint, validate_every=validate_every)
    assert resumed.shown.tolist() == list(range(8 * 2 * 2))
    assert resumed.stepped == list(range(4 * (step + 1), 33, 4))


@pytest.mark.parametrize(("step", "validate_every"), [(3, 6), (6, 6), (2, 4), (5, 4)])
def test_a_checkpoint_written_by_a_validation_resumes_as_well(
    tmp_path: Path, step: int, validate_every: int
):
    with pytest.raises(KilledError):
        fit(tmp_path, kill_after=7, validate_every=validate_every, when="validation")
    resumed = fit(
        tmp_path / "resumed",
        ckpt_path=tmp_path / f"step={step}.ckpt",
        validate_every=validate_every,
    )
    assert resumed.shown.tolist() == list(range(8 * 2 * 2))
    assert resumed.stepped == list(range(4 * (step + 1), 33, 4))


def test_a_checkpoint_of_the_end_of_an_epoch_loses_no_sample_and_repeats_none(tmp_path: Path):
    # Lightning itself makes an optimizer step of the first micro-batch alone after such a
    # checkpoint.
    with pytest.raises(KilledError):
        fit(tmp_path, kill_after=7, when="epoch")
    shown = fit(tmp_path / "resumed", ckpt_path=tmp_path / "step=6.ckpt").shown.tolist()
    assert len(shown) > 24
    assert shown == list(range(len(shown)))


def test_a_run_killed_and_resumed_twice_loses_nothing(tmp_path: Path):
    with pytest.raises(KilledError):
        fit(tmp_path, kill_after=2)
    with pytest.raises(KilledError):
        fit(tmp_path / "again", kill_after=6, ckpt_path=tmp_path / "step=2.ckpt")
    resumed = fit(tmp_path / "last", ckpt_path=tmp_path / "again" / "step=6.ckpt")
    assert resumed.shown.tolist() == list(range(8 * 2 * 2))


def test_a_longer_run_goes_on_from_the_end_of_a_finished_one(tmp_path: Path):
    fit(tmp_path, max_steps=3)
    longer = fit(tmp_path / "longer", ckpt_path=tmp_path / "step=3.ckpt")
    assert longer.shown.tolist() == list(range(8 * 2 * 2))
