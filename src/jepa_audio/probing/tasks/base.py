"""What a probing task is: clips of three splits and one class for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int64

UNKNOWN = -1
"""Label of a clip whose class has no training clip: no head can name it, so it always counts as wrong."""


@dataclass(frozen=True)
class LabelledClips:
    """Audio files and their classes.

    Attributes:
        paths: one file a clip.
        labels: number of each clip's class, or `UNKNOWN`.
    """

    paths: tuple[Path, ...]
    labels: Int64[np.ndarray, " n"]

    def __post_init__(self) -> None:
        if not self.paths or len(self.paths) != len(self.labels):
            raise ValueError(
                f"a split needs clips and one label for each, got {len(self.paths)} files and {len(self.labels)} labels"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, size: int | None, seed: int) -> LabelledClips:
        """`size` random clips in their own order (all, if `None` or too few).

        The choice depends on the number of clips and the seed alone: tasks on the same audio choose the same.
        """
        if size is None or size >= len(self):
            return self
        if size < 1:
            raise ValueError(f"a subset needs at least one clip, got {size}")
        rows = np.sort(np.random.default_rng(seed).choice(len(self), size, replace=False))
        return LabelledClips(tuple(self.paths[row] for row in rows), self.labels[rows])


@dataclass(frozen=True)
class ProbeTask:
    """One class for every clip.

    Attributes:
        name: of the task.
        class_names: by class number; the classes of the training split.
        train: what the heads are fitted on.
        valid: what layer and hyper-parameters are chosen on.
        test: what is reported.
        checksum: of the files that say what is in which split.
    """

    name: str
    class_names: tuple[str, ...]
    train: LabelledClips
    valid: LabelledClips
    test: LabelledClips
    checksum: str

    @property
    def splits(self) -> dict[str, LabelledClips]:
        """The three splits by name."""
        return {"train": self.train, "valid": self.valid, "test": self.test}

    @property
    def chance(self) -> float:
        """Test accuracy of always naming the most frequent training class."""
        known = self.train.labels[self.train.labels != UNKNOWN]
        return float((self.test.labels == np.bincount(known).argmax()).mean())

    def with_train(self, size: int | None, seed: int) -> ProbeTask:
        """The same task with a random subset of the training clips."""
        return replace(self, train=self.train.subset(size, seed))


class Task(ABC):
    """Knows how a public corpus lies on disk."""

    name: str

    @abstractmethod
    def load(self, root: Path) -> ProbeTask:
        """The task on the corpus under `root`.

        Raises:
            FileNotFoundError: if a folder or a file is not there.
            ValueError: if a file does not say what it should.
        """
