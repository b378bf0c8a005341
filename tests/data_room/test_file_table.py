"""The table of the files that a run reads."""

import multiprocessing
import os
import pickle
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jepa_audio.data.audio.location import TarMember
from jepa_audio.data.audio.read import read
from jepa_audio.data.corpus.index import index_corpus
from jepa_audio.data.corpus.table import Corpus, CorpusError
from jepa_audio.data.loading.file_table import FileTable
from tests.data_room.test_corpus import sounds
from tests.sounds import make_corpus, noise, pairs, tar


def test_files_of_several_corpora_are_concatenated(tmp_path: Path):
    loose = index_corpus(sounds(tmp_path / "loose", 3))
    packed = index_corpus(tar(tmp_path / "t.tar", pairs(2)))
    files = FileTable([loose.usable(), loose.take(np.arange(0)), packed.usable()])
    assert (len(files), files.sizes) == (5, [3, 0, 2])
    assert files.num_channels.tolist() == [1] * 5
    assert [isinstance(file.audio, TarMember) for file in files] == [False] * 3 + [True] * 2
    for file, number in zip(files, (0, 2, 1, 0, 1), strict=True):
        assert (file.num_frames, file.sample_rate, file.num_channels) == (
            len(noise(number)),
            8000,
            1,
        )
        np.testing.assert_array_equal(read(file.audio)[0][0] * 2**15, noise(number))
    with pytest.raises(IndexError):
        files[5]
    with pytest.raises(CorpusError, match=f"no usable audio file under {loose.root}"):
        FileTable([loose.take(np.arange(0))])


def send_table(files: FileTable, connection: Connection) -> None:
    """Send what another process reads from the table."""
    connection.send((len(files), files.sizes, files[777], os.fstat(files._descriptor).st_ino))


def test_another_process_maps_the_same_table_without_a_copy():
    names = [f"{number:05}.wav" for number in range(5000)]
    files = FileTable([make_corpus(names, num_frames=list(range(5000)))])
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    process = context.Process(target=send_table, args=(files, sender))
    process.start()
    try:
        assert receiver.poll(60)
        assert receiver.recv() == (5000, [5000], files[777], os.fstat(files._descriptor).st_ino)
    finally:
        process.join(60)
    assert process.exitcode == 0
    sent = ForkingPickler.dumps(files)  # through a queue
    assert len(sent) < 2000
    assert list(pickle.loads(sent)) == list(files)


def corpus_in_chunks(corpus: Corpus, size: int) -> Corpus:
    """The same corpus, with a table of several chunks."""
    starts = range(0, len(corpus), size)
    return Corpus(
        corpus.root, pa.concat_tables([corpus.table.slice(start, size) for start in starts])
    )


def test_the_fingerprint_is_the_one_of_all_versions():
    loose = make_corpus(
        [f"a/{number}é.wav" for number in range(300)], offset=[512 * n for n in range(300)]
    )
    shards = make_corpus(
        [f"b{number // 10}.tar" for number in range(200)],
        member=[f"m{number}" for number in range(200)],
        offset=[512 * number for number in range(200)],
    )
    every_third = np.arange(200)[::-3]
    assert FileTable([loose]).fingerprint == "74f4fc63497a715d1191f64c4de019d8"
    assert FileTable([shards.take(every_third)]).fingerprint == "dcf837e07b1bcdcdea68d53016a7bca2"
    both = FileTable([loose, shards]).fingerprint
    assert both not in {FileTable([corpus]).fingerprint for corpus in (loose, shards)}
    in_chunks = [corpus_in_chunks(loose, 7), corpus_in_chunks(shards, 64)]
    assert FileTable(in_chunks).fingerprint == both


def test_the_fingerprint_changes_with_the_names_their_order_and_the_places_in_tars():
    corpora = [
        make_corpus(["ab", "c"]),
        make_corpus(["a", "bc"]),
        make_corpus(["c", "ab"]),
        make_corpus(["ab", "c"], offset=[0, 512]),
        make_corpus(["ab", "c"], member=["x", ""]),
        make_corpus(["ab", "c"], member=["", "x"]),
    ]
    assert len({FileTable([corpus]).fingerprint for corpus in corpora}) == len(corpora)
