"""The order of samples in a run, and its continuation after an interruption."""

from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

from jepa_audio.data.corpus.table import CorpusError
from jepa_audio.data.loading.clips import BadRead
from jepa_audio.data.loading.loader import BadReadCounter, EvaluationLoader, ResumableLoader
from jepa_audio.data.loading.order import (
    EvaluationOrder,
    GlobalOrderSampler,
    Progress,
    SampleIndex,
    evaluation_batches,
)
from jepa_audio.errors import UserError
from jepa_audio.steps.grid import AudioBatch
from tests.recorder import Recorder, make_trainer


def first_batches(num_batches: int, **arguments: object) -> list[list[tuple[int, int]]]:
    """(position, file) of the samples of the first batches."""
    return pairs(islice(GlobalOrderSampler(**arguments), num_batches))


def pairs(batches: Iterable[list[SampleIndex]]) -> list[list[tuple[int, int]]]:
    return [[index[:2] for index in batch] for batch in batches]


def test_each_epoch_reads_each_file_once_when_batches_cross_its_border():
    indices = [index for batch in first_batches(14, num_files=7, batch_size=3) for index in batch]
    assert [position for position, _ in indices] == list(range(42))
    for epoch in range(6):
        assert sorted(file for _, file in indices[epoch * 7 : epoch * 7 + 7]) == list(range(7))


def test_the_order_depends_on_seed_and_epoch():
    first, again = (first_batches(4, num_files=20, batch_size=10, seed=1) for _ in range(2))
    other = first_batches(4, num_files=20, batch_size=10, seed=2)
    files = [file for batch in first for _, file in batch]
    assert first == again
    assert first != other
    assert files[:20] != files[20:]


MIXTURE = {"num_files": [7, 400, 30], "weights": [1.0, 2.0, 1.0], "seed": 4}


@pytest.mark.parametrize("corpus", [{"num_files": 7, "seed": 3}, MIXTURE])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_divide_the_order_of_one_process(corpus: dict[str, object], world_size: int):
    global_batches = first_batches(5, batch_size=2 * world_size, **corpus)
    ranks = [
        first_batches(5, batch_size=2, rank=rank, world_size=world_size, **corpus)
        for rank in range(world_size)
    ]
    for step in range(5):
        assert [index for rank in ranks for index in rank[step]] == global_batches[step]


def test_a_mixture_reads_each_corpus_in_proportion_to_its_weight():
    sampler = GlobalOrderSampler(batch_size=1, **MIXTURE)
    files = [sampler.file_at(position) for position in range(10_000)]
    corpora = [0 if file < 7 else 1 if file < 407 else 2 for file in files]
    assert Counter(corpora) == {0: 2500, 1: 5000, 2: 2500}
    assert 200 < Counter(corpora[1000:2000])[0] < 300, "about the same share in a short interval"


def test_a_mixture_reads_each_file_of_a_corpus_once_per_epoch_of_the_corpus():
    sampler = GlobalOrderSampler(batch_size=1, **MIXTURE)
    files = [sampler.file_at(position) for position in range(9_000, 25_000)]
    for first, size in ((0, 7), (7, 400), (407, 30)):
        of_corpus = [file for file in files if first <= file < first + size]
        num_before = sum(
            first <= sampler.file_at(position) < first + size for position in range(9_000)
        )
        start = -num_before % size
        epochs = [of_corpus[i : i + size] for i in range(start, len(of_corpus) - size, size)]
        assert len(epochs) >= 10
        assert all(sorted(epoch) == list(range(first, first + size)) for epoch in epochs)


def test_a_mixture_can_be_resumed():
    resumed = GlobalOrderSampler(batch_size=4, **MIXTURE)
    resumed.progress = Progress(samples_consumed=8)
    assert pairs(islice(resumed, 4)) == first_batches(6, batch_size=4, **MIXTURE)[2:]


def test_several_corpora_without_weights_are_shuffled_together():
    assert first_batches(9, num_files=[3, 4], batch_size=2) == first_batches(
        9, num_files=7, batch_size=2
    )


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, 1e-9]])
def test_invalid_weights_are_refused(weights: list[float]):
    with pytest.raises(UserError, match="`weights`"):
        GlobalOrderSampler([3, 4], 2, weights=weights)


def test_bad_reads_are_counted_and_each_file_is_logged_once(caplog: pytest.LogCaptureFixture):
    counter = BadReadCounter(0.5)
    assert counter.summary() == ""
    for _ in range(3):
        counter.count(8, [BadRead("a.wav", "truncated"), BadRead("b.wav", "empty")])
    assert caplog.messages == [
        "replaced a.wav by another file: truncated",
        "replaced b.wav by another file: empty",
    ]
    assert counter.summary() == "6 of 30 reads failed and were replaced, of 2 files"


def test_the_run_stops_with_a_list_above_the_share_of_bad_reads():
    counter = BadReadCounter(0.1)
    counter.count(98, [BadRead("a.wav", "truncated")])
    with pytest.raises(
        CorpusError, match=r"31 of 149 reads failed.*0\.1.*a\.wav \(truncated\).*and 11 more"
    ) as stop:
        counter.count(20, [BadRead(f"{number}.wav", "empty") for number in range(30)])
    assert str(stop.value).count("empty") == 19


def test_the_sampler_neither_reads_nor_changes_the_global_generator():
    torch.manual_seed(0)
    first, state = first_batches(3, num_files=9, batch_size=2), torch.get_rng_state()
    torch.manual_seed(1)
    assert first_batches(3, num_files=9, batch_size=2) == first
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("num_files", "world_size"), [(7, 3), (6, 2), (5, 1)])
def test_an_evaluation_batch_is_never_divided_between_ranks(num_files: int, world_size: int):
    ranks = [evaluation_batches(num_files, 2, rank, world_size) for rank in range(world_size)]
    batches = [batch for rank in ranks for batch in rank]
    assert Counter(index.file for batch in batches for index in batch) == Counter(range(num_files))
    assert sorted(batches) == [
        [(f, f, 0) for f in range(i, min(i + 2, num_files))] for i in range(0, num_files, 2)
    ]


def test_each_rank_gets_an_evaluation_batch():
    ranks = [evaluation_batches(2, 1, rank, 3) for rank in range(3)]
    assert ranks == [[[(0, 0, 0)]], [[(1, 1, 0)]], [[(0, 0, 0)]]]


@pytest.mark.parametrize(
    "arguments", [{"num_files": 0}, {"batch_size": 0}, {"rank": 1}, {"seed": -1}]
)
def test_invalid_arguments_of_the_sampler_are_refused(arguments: dict[str, int]):
    with pytest.raises(UserError, match=f"`{next(iter(arguments))}`.*must be"):
        GlobalOrderSampler(**{"num_files": 1, "batch_size": 1, **arguments})


class IndexDataset(Dataset[SampleIndex]):
    """Samples that are their own index."""

    def __init__(self, num_files: int) -> None:
        self.num_files = num_files

    def __len__(self) -> int:
        return self.num_files

    def __getitem__(self, index: SampleIndex) -> SampleIndex:
        return index


def collate_indices(indices: list[SampleIndex]) -> tuple[AudioBatch, list[BadRead]]:
    """A batch with the number of the file as waveform and the step as length; no bad reads."""
    position, file, step = torch.tensor(indices).T
    return AudioBatch(file.float()[:, None, None], position, step), []


def make_loader(num_files: int = 10, batch_size: int = 2, **arguments: int) -> ResumableLoader:
    sampler = GlobalOrderSampler(num_files, batch_size, seed=5, **arguments)
    loader = DataLoader(IndexDataset(num_files), batch_sampler=sampler, collate_fn=collate_indices)
    return ResumableLoader(loader, BadReadCounter(0.5), sampler.batches_per_pass)


def indices_of(batches: list[AudioBatch]) -> list[tuple[int, int]]:
    return [
        (int(row), int(file))
        for batch in batches
        for row, file in zip(batch.row, batch.waveform, strict=True)
    ]


def expected_indices(count: int) -> list[tuple[int, int]]:
    batches = first_batches(count, num_files=10, batch_size=2, seed=5)
    return [index for batch in batches for index in batch][:count]


@pytest.mark.parametrize("num_batches", [0, 3, 5])
def test_a_loader_continues_from_the_state_of_another(num_batches: int):
    stopped, resumed = make_loader(), make_loader()
    read = indices_of(list(islice(stopped, num_batches)))
    assert stopped.state_dict()["samples_consumed"] == 2 * num_batches
    resumed.load_state_dict(stopped.state_dict())
    assert read + indices_of(list(resumed)) == expected_indices(2 * num_batches + 10)


def test_an_epoch_continues_after_an_epoch_that_ended_early():
    loader = make_loader()
    assert len(loader) == 5
    assert indices_of([*islice(loader, 2), *loader, *loader]) == expected_indices(24)


def test_a_closed_loader_continues():
    loader = make_loader()
    read = indices_of(list(islice(loader, 2)))
    loader.close()
    assert read + indices_of(list(loader)) == expected_indices(14)


def test_a_run_continues_with_other_numbers_of_processes_and_clips_per_batch():
    ranks = [make_loader(rank=rank, world_size=2) for rank in range(2)]
    read = [
        batch for pair in zip(*(islice(rank, 2) for rank in ranks), strict=True) for batch in pair
    ]
    assert ranks[0].state_dict() == ranks[1].state_dict()
    assert ranks[0].state_dict()["samples_consumed"] == 8
    single = make_loader(batch_size=3)
    single.load_state_dict(ranks[0].state_dict())
    assert indices_of([*read, *islice(single, 2)]) == expected_indices(14)


def steps_of(batches: Iterable[AudioBatch]) -> list[int]:
    return [step for batch in batches for step in set(batch.num_samples.tolist())]


def test_the_step_of_a_batch_follows_from_its_place_in_the_order():
    assert steps_of(islice(make_loader(accumulated=2), 5)) == [0, 0, 1, 1, 2]
    stopped = make_loader(accumulated=2)
    assert steps_of(islice(stopped, 4)) == [0, 0, 1, 1]
    state = stopped.state_dict()
    assert (state["samples_consumed"], state["micro_batches"], state["step"]) == (8, 4, 2)
    for settings, expected in (
        ({"accumulated": 2}, [2, 2, 3, 3, 4]),
        ({"accumulated": 1, "batch_size": 5}, [2, 3, 4, 5, 6]),
        ({"accumulated": 2, "rank": 1, "world_size": 3}, [2, 2, 3, 3, 4]),
        # Lightning makes a step after each micro-batch whose number is a multiple of 3.
        ({"accumulated": 3}, [2, 2, 3, 3, 3]),
    ):
        resumed = make_loader(num_files=40, **settings)
        resumed.load_state_dict(state)
        assert steps_of(islice(resumed, 5)) == expected


def test_a_checkpoint_without_a_step_has_the_step_of_its_samples():
    resumed = make_loader(accumulated=2)
    resumed.load_state_dict({"samples_consumed": 12})
    assert steps_of(islice(resumed, 3)) == [3, 3, 4]


def test_prefetched_batches_have_their_own_step():
    sampler = GlobalOrderSampler(10, 2, seed=5, accumulated=2)
    loader = DataLoader(
        IndexDataset(10), batch_sampler=sampler, collate_fn=collate_indices, num_workers=2
    )
    resumable = ResumableLoader(loader, BadReadCounter(0.5), 10)
    assert steps_of(islice(resumable, 3)) == [0, 0, 1]
    resumable.close()
    assert resumable.state_dict()["micro_batches"] == 3
    assert steps_of(islice(resumable, 3)) == [1, 2, 2]


def test_evaluation_batches_have_the_step_at_the_start_of_each_evaluation():
    step = 7
    order = EvaluationOrder(evaluation_batches(4, 2), lambda: step)
    loader = DataLoader(IndexDataset(4), batch_sampler=order, collate_fn=collate_indices)
    evaluation = EvaluationLoader(loader, BadReadCounter(0.5))
    assert steps_of(evaluation) == [7, 7]
    step = 9
    assert steps_of(evaluation) == [9, 9]


def test_a_loader_with_another_sampler_is_refused():
    with pytest.raises(TypeError, match="GlobalOrderSampler"):
        ResumableLoader(DataLoader(IndexDataset(3), batch_size=2), BadReadCounter(0.5), 1)


class KilledError(Exception):
    pass


class KillAfter(Callback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            raise KilledError


SAVE_EVERY = {
    "step": {"every_n_train_steps": 1, "save_on_train_epoch_end": False},
    "epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "validation": {"save_on_train_epoch_end": False},
}


def fit(
    folder: Path,
    max_steps: int = 8,
    kill_after: int | None = None,
    ckpt_path: Path | None = None,
    validate_every: int | None = None,
    save_every: str = "step",
) -> Recorder:
    recorder = Recorder()
    checkpoint = ModelCheckpoint(folder, "{step}", save_top_k=-1, **SAVE_EVERY[save_every])
    trainer = make_trainer(max_steps, validate_every, checkpoint, KillAfter(kill_after))
    # 12 files in batches of 2: an epoch of 6 micro-batches or 3 optimizer steps.
    valid = DataLoader(
        IndexDataset(4), batch_sampler=evaluation_batches(4, 2), collate_fn=collate_indices
    )
    trainer.fit(
        recorder,
        make_loader(12),
        EvaluationLoader(valid, BadReadCounter(0.5)) if validate_every else None,
        ckpt_path=ckpt_path,
    )
    return recorder


@pytest.mark.parametrize(
    ("save_every", "step", "validate_every"),
    [
        *(("step", step, validate) for step in range(1, 8) for validate in (None, 4, 6)),
        *(("validation", *case) for case in ((3, 6), (6, 6), (2, 4), (5, 4))),
    ],
)
def test_a_run_killed_and_resumed_reads_the_rows_of_an_uninterrupted_run(
    tmp_path: Path, save_every: str, step: int, validate_every: int | None
):
    kill_after = step if save_every == "step" else 7
    with pytest.raises(KilledError):
        fit(tmp_path, 8, kill_after, validate_every=validate_every, save_every=save_every)
    checkpoint = tmp_path / f"step={step}.ckpt"
    resumed = fit(tmp_path / "resumed", ckpt_path=checkpoint, validate_every=validate_every)
    assert resumed.rows.tolist() == list(range(8 * 2 * 2))
    assert resumed.rows_at_steps == list(range(4 * (step + 1), 33, 4))


def test_a_run_resumed_at_the_end_of_an_epoch_reads_each_row_once(tmp_path: Path):
    # After such a checkpoint, Lightning itself makes an optimizer step of one micro-batch.
    with pytest.raises(KilledError):
        fit(tmp_path, kill_after=7, save_every="epoch")
    rows = fit(tmp_path / "resumed", ckpt_path=tmp_path / "step=6.ckpt").rows.tolist()
    assert len(rows) > 24
    assert rows == list(range(len(rows)))


def test_a_run_killed_and_resumed_twice_reads_each_row_once(tmp_path: Path):
    with pytest.raises(KilledError):
        fit(tmp_path, kill_after=2)
    with pytest.raises(KilledError):
        fit(tmp_path / "again", kill_after=6, ckpt_path=tmp_path / "step=2.ckpt")
    resumed = fit(tmp_path / "last", ckpt_path=tmp_path / "again" / "step=6.ckpt")
    assert resumed.rows.tolist() == list(range(8 * 2 * 2))


def test_a_finished_run_continues_with_more_steps(tmp_path: Path):
    fit(tmp_path, max_steps=3)
    longer = fit(tmp_path / "longer", ckpt_path=tmp_path / "step=3.ckpt")
    assert longer.rows.tolist() == list(range(8 * 2 * 2))
