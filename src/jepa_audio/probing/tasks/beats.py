"""When beats fall: activations over time → the frames of the beats."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.signal import find_peaks
from torch import Tensor
from torch.nn import functional as F

from jepa_audio.errors import UserError

_EPSILON = 1e-6  # activations are kept so far from 0 and 1: the logarithm of a certainty would outweigh a whole track
_MAX_SCORES = (
    2**26
)  # numbers held at once, 256 MiB; more tracks are decoded one handful after the other
_IMPOSSIBLE = (
    -36.0
)  # log-probability of a change of tempo that counts as impossible: the resolution of 64 bits


@dataclass(frozen=True)
class _BarPointer:
    """The states of one beat, and what leads from a beat to the next.

    A state is an interval (frames from a beat to the next) and a position in it. A path runs
    through the positions of an interval one frame after the other and may change the interval only
    where a beat starts.

    Attributes:
        intervals: rising by one.
        marked: for each interval, at how many of its first positions the activations are taken for
            a beat.
        change: log-probability of the interval of a beat (columns), given that of the one before
            (rows).
    """

    intervals: Int64[Tensor, " J"]
    marked: Int64[Tensor, " J"]
    change: Float[Tensor, "J J"]

    @classmethod
    def build(
        cls,
        frame_rate: float,
        min_bpm: float,
        max_bpm: float,
        transition_lambda: float,
        observation_lambda: int,
    ) -> _BarPointer:
        shortest, longest = round(60 * frame_rate / max_bpm), round(60 * frame_rate / min_bpm)
        intervals = torch.arange(shortest, longest + 1)
        ratio = intervals[None, :].double() / intervals[:, None]
        change = -transition_lambda * (ratio - 1).abs()
        change = change.masked_fill(change < _IMPOSSIBLE, -math.inf).log_softmax(dim=1)
        marked = -(
            -intervals // observation_lambda
        )  # positions in the first 1/observation_lambda of the beat
        return cls(intervals, marked, change)


def decode_beats_dbn(
    activations: Float[Tensor, "N T"],
    frame_rate: float,
    min_bpm: float,
    max_bpm: float,
    *,
    lengths: Int64[np.ndarray, " N"] | None = None,
    transition_lambda: float = 100.0,
    observation_lambda: int = 16,
    threshold: float = 0.0,
    correct: bool = True,
) -> list[Int64[np.ndarray, " _"]]:
    """The beats of the most probable path through a model of tempo and position, of many tracks at once.

    The model is that of (Krebs, Böck and Widmer, 2015, "An efficient state-space model for joint
    tempo and meter tracking"), for beats alone; the constants are those that madmom made usual.
    Between two beats a path has no choice, so that scores are kept for the first frame of a beat
    only and a step leads from beat to beat. Scores are relative to those of a path without beats,
    which changes no comparison.

    Args:
        activations: of N tracks, how probably a beat falls on each of T frames, in [0, 1].
        frame_rate: frames a second.
        min_bpm: slowest tempo, in beats a minute.
        max_bpm: fastest tempo.
        lengths: of the tracks in frames, if some have less than T; what lies behind is not looked
            at.
        transition_lambda: how strongly the tempo is held: a change by the share x is
            exp(-transition_lambda · x) times as probable as none.
        observation_lambda: activations are taken for a beat in the first 1/observation_lambda of
            each beat.
        threshold: a track is decoded from its first to its last frame that reaches it; a track
            whose activations are all 0 has no beats in any case.
        correct: a beat is moved to the highest activation where the path takes activations for a
            beat.

    Returns:
        The frames of the beats of each track, rising.

    Raises:
        UserError: if the tempi leave no interval of two frames or more, or the model's constants
            are out of range.
    """
    fastest = 60 * frame_rate / max_bpm if max_bpm > 0 else 0
    if not 0 < min_bpm <= max_bpm or fastest < 2 or transition_lambda < 0 or observation_lambda < 2:
        raise UserError(
            f"`min_bpm` ({min_bpm}) must be positive and at most `max_bpm` ({max_bpm}), a beat at `max_bpm` at least 2 "
            f"frames long (it has {fastest:.2f}), `transition_lambda` ({transition_lambda}) at least 0 and "
            f"`observation_lambda` ({observation_lambda}) at least 2"
        )
    model = _BarPointer.build(frame_rate, min_bpm, max_bpm, transition_lambda, observation_lambda)
    activations = activations.detach().to(torch.promote_types(activations.dtype, torch.float32))
    num_tracks, num_frames = activations.shape
    if lengths is None:
        lengths = np.full(num_tracks, num_frames, dtype=np.int64)
    handful = max(
        1, _MAX_SCORES // (len(model.intervals) * (num_frames + 2 * int(model.intervals[-1])))
    )
    beats = []
    for start in range(0, num_tracks, handful):
        some = slice(start, start + handful)
        beats += _decode(
            activations[some], lengths[some], model, observation_lambda, threshold, correct
        )
    return beats


def decode_beats_peaks(
    activations: Float[Tensor, "N T"],
    frame_rate: float,
    threshold: float,
    max_bpm: float,
    *,
    lengths: Int64[np.ndarray, " N"] | None = None,
) -> list[Int64[np.ndarray, " _"]]:
    """Peaks that reach a threshold; of those nearer than a beat at `max_bpm` the highest stay.

    Args:
        activations: of N tracks, how probably a beat falls on each of T frames, in [0, 1].
        frame_rate: frames a second.
        threshold: lowest activation of a beat.
        max_bpm: fastest tempo, in beats a minute.
        lengths: of the tracks in frames, if some have less than T.

    Returns:
        The frames of the beats of each track, rising; of a flat peak the middle.
    """
    apart = max(1, math.floor(60 * frame_rate / max_bpm))
    tracks = activations.detach().float().cpu().numpy()
    ends = [tracks.shape[1]] * len(tracks) if lengths is None else lengths.tolist()
    # A zero on either side makes peaks of the first and of the last frame.
    padded = [np.pad(track[:end], 1) for track, end in zip(tracks, ends, strict=True)]
    return [
        find_peaks(track, height=threshold, distance=apart)[0].astype(np.int64) - 1
        for track in padded
    ]


def _decode(
    activations: Float[Tensor, "N T"],
    lengths: Int64[np.ndarray, " N"],
    model: _BarPointer,
    observation_lambda: int,
    threshold: float,
    correct: bool,
) -> list[Int64[np.ndarray, " _"]]:
    first, num_frames = _loud_part(activations, lengths, threshold)
    frame = torch.arange(activations.shape[1], device=activations.device)
    inside = frame < num_frames[:, None]
    moved = activations.gather(1, (first[:, None] + frame).clamp_max(activations.shape[1] - 1))
    certain = moved.clamp(_EPSILON, 1 - _EPSILON)
    evidence = (certain.logit() + math.log(observation_lambda - 1)).where(
        inside, certain.new_zeros(())
    )
    starts = _starts(_Evidence.of(evidence, model), num_frames, model)
    audible, offset = moved.cpu().numpy(), first.tolist()
    return [
        offset[n] + _frames_of(starts[n], audible[n, :length], model.marked.numpy(), correct)
        for n, length in enumerate(num_frames.tolist())
    ]


def _loud_part(
    activations: Float[Tensor, "N T"], lengths: Int64[np.ndarray, " N"], threshold: float
) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " N"]]:
    """First frame, and number of frames, of the part of each track that is decoded."""
    frame = torch.arange(activations.shape[1], device=activations.device)
    inside = frame < torch.from_numpy(lengths).to(frame.device)[:, None]
    sounds = (activations > 0) & inside
    loud = inside & (activations >= threshold) & sounds.any(dim=1, keepdim=True)
    first = loud.int().argmax(dim=1)  # of equal ones the first
    last = len(frame) - 1 - loud.int().flip(1).argmax(dim=1)
    return first, torch.where(loud.any(dim=1), last - first + 1, 0)


@dataclass(frozen=True)
class _Evidence:
    """What it gains to take frames for a beat rather than for none, with room before the track and behind it.

    Attributes:
        gains: by number of frames and first frame, summed; nothing is gained outside the track.
        kind: place in `gains` of each interval.
        before: frames of room before the track.
    """

    gains: Float[Tensor, "R N P"]
    kind: Int64[Tensor, " J"]
    before: int

    @classmethod
    def of(cls, evidence: Float[Tensor, "N T"], model: _BarPointer) -> _Evidence:
        counts, kind = model.marked.unique(return_inverse=True)
        longest = int(model.intervals[-1])
        padded = F.pad(evidence, (longest, longest))
        # Every sum on its own: differences of running sums would lose what a single frame says.
        sums = [
            F.pad(padded.unfold(1, count, 1).sum(dim=-1), (0, count - 1))
            for count in counts.tolist()
        ]
        return cls(torch.stack(sums), kind, longest)


def _starts(
    evidence: _Evidence, num_frames: Int64[Tensor, " N"], model: _BarPointer
) -> list[list[tuple[int, int]]]:
    """First frame of every beat of the best path of every track, and place of its interval, rising.

    The first beat may have started before the track: a path may begin anywhere in a beat, as
    probably as anywhere else.
    """
    scores = _scores(evidence, int(num_frames.max()), model)
    place, start = _last_beat(scores, evidence, num_frames, model)
    intervals, change = model.intervals.to(scores.device), model.change.to(scores)
    track, every = (
        torch.arange(scores.shape[1], device=scores.device),
        torch.arange(len(intervals))[:, None],
    )
    path = [(start, place)]
    while bool((start > 0).any()):
        frame = (start - intervals[:, None] + evidence.before).clamp_min(0)
        total = (
            scores[every, track, frame]
            + evidence.gains[evidence.kind[:, None], track, frame]
            + change[:, place]
        )
        place = torch.where(start > 0, total.argmax(dim=0), place)
        start = torch.where(start > 0, start - intervals[place], start)
        path.append((start, place))
    starts, places = (torch.stack(column).cpu().numpy()[::-1] for column in zip(*path, strict=True))
    beats: list[list[tuple[int, int]]] = []
    for n in range(starts.shape[1]):
        _, once = np.unique(
            starts[:, n], return_index=True
        )  # a path that is done stays where it began
        beats.append(list(zip(starts[once, n].tolist(), places[once, n].tolist(), strict=True)))
    return beats


def _scores(evidence: _Evidence, num_frames: int, model: _BarPointer) -> Float[Tensor, "J N P"]:
    """Best score of a path up to a beat of each interval that starts at each frame; 0 where a path may begin.

    No beat is shorter than the shortest interval: that many frames depend on earlier ones only and
    are done at once.
    """
    before, shortest = evidence.before, int(model.intervals[0])
    change = model.change.to(evidence.gains)
    scores = evidence.gains.new_zeros(len(model.intervals), *evidence.gains.shape[1:])
    possible = [
        (int(row.isfinite().nonzero()[0]), int(row.isfinite().nonzero()[-1]) + 1)
        for row in model.change
    ]
    for start in range(before + 1, before + num_frames, shortest):
        now = slice(start, min(start + shortest, before + num_frames))
        # Apart from `scores`, whose rows lie so far from each other that a processor would wait for
        # memory.
        best = scores.new_full((len(scores), scores.shape[1], now.stop - start), -math.inf)
        for j, interval in enumerate(model.intervals.tolist()):
            then = slice(start - interval, now.stop - interval)
            low, high = possible[j]
            ended = scores[j, :, then] + evidence.gains[evidence.kind[j], :, then]
            torch.maximum(
                best[low:high], ended + change[j, low:high, None, None], out=best[low:high]
            )
        scores[:, :, now] = best
    return scores


def _last_beat(
    scores: Float[Tensor, "J N P"],
    evidence: _Evidence,
    num_frames: Int64[Tensor, " N"],
    model: _BarPointer,
) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " N"]]:
    """Interval (its place) and first frame of the beat in which the best path of each track ends."""
    best = scores.new_full(num_frames.shape, -math.inf)
    place, start = torch.zeros_like(num_frames), torch.zeros_like(num_frames)
    for j, interval in enumerate(model.intervals.tolist()):
        frame = num_frames[:, None] - torch.arange(interval, 0, -1, device=scores.device)
        total = (scores[j] + evidence.gains[evidence.kind[j]]).gather(1, frame + evidence.before)
        highest, which = total.max(dim=1)
        better = highest > best
        best = torch.where(better, highest, best)
        place = torch.where(better, j, place)
        start = torch.where(better, frame.gather(1, which[:, None])[:, 0], start)
    return place, start


def _frames_of(
    starts: list[tuple[int, int]],
    activations: Float[np.ndarray, " frames"],
    marked: Int64[np.ndarray, " J"],
    correct: bool,
) -> Int64[np.ndarray, " _"]:
    """Frames of the beats of one track, from where its path starts them."""
    if not correct:
        return np.array(
            [start for start, _ in starts if 0 <= start < len(activations)], dtype=np.int64
        )
    frames = []
    for start, place in starts:
        low, high = max(start, 0), min(start + int(marked[place]), len(activations))
        if low < high:
            frames.append(low + int(activations[low:high].argmax()))
    return np.array(frames, dtype=np.int64)
