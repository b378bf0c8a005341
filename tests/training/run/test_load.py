"""A damaged checkpoint ends in one sentence that names the file."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jepa_audio.errors import MissingFileError
from jepa_audio.training.run.load import (
    DamagedCheckpointError,
    check_sums,
    find_whole_checkpoint,
    read_checkpoint,
    read_torch_file,
)


class RunsCode:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return print, ("the file ran its code",)


def save(path: Path, step: int = 3, **more: object) -> Path:
    content = {"state_dict": {"a": torch.arange(20_000.0)}, "hyper_parameters": {}}
    torch.save({**content, "global_step": step, **more}, path)
    return path


def flip_a_byte_of_a_tensor(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b"not a pickle")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:30_000]),
    "cut by one byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "zeros at the end": lambda path: path.write_bytes(path.read_bytes()[:30_000] + bytes(60_000)),
    "garbage": lambda path: path.write_bytes(b"\x80\x02" + b"\xa7\x13\x00" * 999),
    "HTML": lambda path: path.write_bytes(b"<!DOCTYPE html><html>503</html>"),
    "empty": lambda path: path.write_bytes(b""),
    "pickled": lambda path: path.write_bytes(pickle.dumps({"state_dict": {}})),
    "another zip file": write_zip,
    "no state_dict": lambda path: torch.save({"hyper_parameters": {}}, path),
    "a list": lambda path: torch.save([1, 2], path),
    "runs code": lambda path: save(path, callbacks=RunsCode()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_ends_in_one_sentence_that_names_the_file(
    damage: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    damage(save(tmp_path / "last.ckpt"))
    with pytest.raises(DamagedCheckpointError) as error:
        read_checkpoint(tmp_path / "last.ckpt")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'last.ckpt'} ")
    assert "\n" not in message
    assert "weights_only" not in message
    assert "ran its code" not in capsys.readouterr().out


def test_torch_files_that_are_no_checkpoints_are_read_or_refused(tmp_path: Path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert read_torch_file(tmp_path / "a.pt")["a"].tolist() == [1, 1]
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match="the file is empty"):
        read_torch_file(tmp_path / "a.pt")


def test_checksums_show_a_changed_byte_that_torch_does_not_see(tmp_path: Path):
    path = save(tmp_path / "last.ckpt")
    check_sums(path)
    flip_a_byte_of_a_tensor(path)
    read_checkpoint(path)
    with pytest.raises(DamagedCheckpointError, match=r"the checksum of .* is wrong"):
        check_sums(path)


def test_the_newest_whole_checkpoint_is_found_by_its_step(tmp_path: Path):
    assert find_whole_checkpoint(tmp_path) is None
    for step in (5, 9, 7, 8):
        save(tmp_path / f"step={step}.ckpt", step)
    flip_a_byte_of_a_tensor(tmp_path / "step=9.ckpt")
    os.truncate(tmp_path / "step=8.ckpt", 1000)
    torch.save({"state_dict": {}, "hyper_parameters": {}}, tmp_path / "weights.ckpt")
    assert find_whole_checkpoint(tmp_path) == (tmp_path / "step=7.ckpt", 7)


def test_for_the_folder_of_a_run_the_message_names_its_last_checkpoint(tmp_path: Path):
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    with pytest.raises(MissingFileError, match=rf"no checkpoint at {tmp_path}$"):
        read_checkpoint(tmp_path)
    save(last)
    with pytest.raises(
        MissingFileError, match=rf"at {tmp_path}; .* the folder of a run: give {last}"
    ):
        read_checkpoint(tmp_path)
