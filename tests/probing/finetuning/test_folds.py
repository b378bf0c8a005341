"""Folds keep groups together, and every clip is tested once."""

from pathlib import Path

import pytest

from jepa_audio.probing.finetuning.folds import all_items, assign_folds, fold_data
from jepa_audio.probing.metrics.sums import Accuracy
from jepa_audio.probing.tasks import ProbeData
from jepa_audio.probing.tasks.base import Protocol, Task, Windows, protocols_of_v2
from jepa_audio.probing.tasks.labels import Multiclass
from jepa_audio.probing.tasks.records import Item, Split


def data_of(items: list[Item]) -> ProbeData:
    protocols = protocols_of_v2(Protocol(Windows()))
    task = Task("t", "t", Multiclass(), (Accuracy(),), protocols)
    return ProbeData.of(task, [Split(tuple(items[i::3])) for i in range(3)])


def items_of(groups: list[str], folds: list[str] | None = None) -> list[Item]:
    folds = folds or [""] * len(groups)
    return [
        Item(Path(f"{i}"), "ab"[i % 2], f"u{i}", f"row {i}", group=group, fold=fold)
        for i, (group, fold) in enumerate(zip(groups, folds, strict=True))
    ]


@pytest.mark.parametrize("sizes", [(1,) * 12, (5, 4, 3, 2, 1, 1), (2,) * 7])
def test_no_group_is_in_two_splits_and_every_clip_is_tested_once(sizes: tuple[int, ...]):
    groups = [f"g{g}" for g, size in enumerate(sizes) for _ in range(size)]
    data = data_of(items_of(groups))
    folds = assign_folds(data, "group", 4)
    tested = []
    for fold in range(4):
        splits = fold_data(data, folds, fold).splits
        kept = [{item.group for item in split.items} for split in splits.values()]
        assert not (kept[0] & kept[1] or kept[0] & kept[2] or kept[1] & kept[2])
        assert sum(len(split) for split in splits.values()) == len(groups)
        tested += [item.uid for item in splits["test"].items]
    assert sorted(tested) == sorted(item.uid for item in all_items(data).items)


def test_folds_have_similar_shares_of_the_classes_and_equal_names():
    data = data_of(items_of([f"g{i}" for i in range(24)]))
    folds = assign_folds(data, "group", 3)
    for fold in range(3):
        of_fold = fold_data(data, folds, fold)
        labels = [item.label for item in of_fold.splits["test"].items]
        assert labels.count("a") == labels.count("b") == 4
        assert of_fold.labels.names == ("a", "b")


def test_a_clip_without_a_group_is_its_own_group(caplog: pytest.LogCaptureFixture):
    data = data_of(items_of(["a", "a", "b"] + [""] * 6))
    folds = assign_folds(data, "group", 3)
    of_a = [
        fold for fold, item in zip(folds, all_items(data).items, strict=True) if item.group == "a"
    ]
    assert of_a[0] == of_a[1]
    assert set(folds) == {0, 1, 2}
    assert "6 of 9 clips have no `group`" in caplog.text
    assert len(caplog.records) == 1


def test_the_records_can_give_the_folds():
    numbers = ["10", "2", "1"] * 3
    data = data_of(items_of([""] * 9, numbers))
    folds = assign_folds(data, "fold", 5)
    names = [item.fold for item in all_items(data).items]
    assert [("1", "2", "10")[fold] for fold in folds] == names


@pytest.mark.parametrize(
    ("groups", "folds", "by", "message"),
    [
        (["a"] * 3 + ["b"] * 3, None, "group", r"`num_folds` \(5\) must be .* groups, 2"),
        ([""] * 6, None, "group", "row 0 has no column `group`.* but `folds` is group: add it"),
        (["a"] * 6, ["1", "2"] * 3, "fold", "3 folds are needed, there are"),
        (["a"] * 6, ["1", "2", "3", "", "1", "2"], "fold", "row 3: no `fold`"),
    ],
)
def test_impossible_folds_are_refused(
    groups: list[str], folds: list[str] | None, by: str, message: str
):
    with pytest.raises(ValueError, match=message):
        assign_folds(data_of(items_of(groups, folds)), by, 5)


def test_a_unit_in_two_groups_is_refused():
    items = items_of(["a", "b", "c", "d", "e"])
    items.append(Item(Path("x"), "a", "u0", "row 9", group="other"))
    with pytest.raises(ValueError, match="row 9: u0 has the group other, but a in row 0"):
        assign_folds(data_of(items), "group", 3)
