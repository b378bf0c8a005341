"""Decode beats: activations over time to the frames of the beats."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from jepa_audio.errors import UserError

_EPSILON = 1e-6  # smallest distance from 0 and 1, so that no single frame outweighs a track
_MAX_SCORES = 2**26  # scores held at once (256 MiB); more tracks are decoded in chunks
_IMPOSSIBLE = -36.0  # log-probability of impossible tempo changes: the resolution of 64 bits


class BarPointer:
    """Hidden Markov model of tempo and position in a beat, for beats without meter.

    The model is from (Krebs, Böck and Widmer, 2015, "An efficient state-space model for joint tempo
    and meter tracking"), with madmom's constants. A state is an interval (frames from one beat to
    the next) and a position in it. A path passes through the positions of an interval frame by
    frame, and can change the interval only where a beat starts, with the log-probability `change`
    (from rows to columns). The first `widths` positions of an interval observe a beat: `beat_prior`
    is added to the log-odds of the activation there.

    Args:
        transition_lambda: a change of tempo by the share x is exp(-transition_lambda · x) times as
            probable as no change.
        observation_lambda: the first 1/observation_lambda of an interval observes a beat.

    Raises:
        UserError: if the fastest beat has fewer than two frames.
    """

    def __init__(
        self,
        frame_rate: float,
        min_bpm: float,
        max_bpm: float,
        transition_lambda: float = 100.0,
        observation_lambda: int = 16,
    ) -> None:
        assert 0 < min_bpm <= max_bpm and transition_lambda >= 0 and observation_lambda >= 2
        shortest, longest = 60 * frame_rate / max_bpm, 60 * frame_rate / min_bpm
        if shortest < 2:
            raise UserError(
                f"beats of up to {max_bpm:g} BPM need at least {max_bpm / 30:.2f} frames per "
                f"second, but the features have {frame_rate:g}"
            )
        self.intervals = torch.arange(round(shortest), round(longest) + 1)  # [J]
        ratio = self.intervals[None, :].double() / self.intervals[:, None]
        change = -transition_lambda * (ratio - 1).abs()
        change = change.masked_fill(change < _IMPOSSIBLE, -math.inf)
        self.change = change.log_softmax(dim=1)  # [J, J]
        self.widths = -(-self.intervals // observation_lambda)  # [J], rounded up
        self.beat_prior = math.log(observation_lambda - 1)


def decode_beats(
    activations: Float[Tensor, "N T"], model: BarPointer, lengths: Int64[Tensor, " N"] | None = None
) -> list[Int64[np.ndarray, " _"]]:
    """Find the frames of the beats of N tracks from the probability of a beat in each frame.

    The beats are those of the most probable path, each at the highest activation among the
    positions that observe it. Frames after `lengths` are ignored. A track whose activations are all
    0 has no beats.
    """
    num_tracks, num_frames = activations.shape
    activations = activations.detach().to(torch.promote_types(activations.dtype, torch.float32))
    if lengths is None:
        lengths = torch.full((num_tracks,), num_frames)
    lengths = lengths.to(activations.device)
    inside = torch.arange(num_frames, device=lengths.device) < lengths[:, None]
    lengths = lengths.where(((activations > 0) & inside).any(dim=1), 0)
    num_padded = num_frames + 2 * int(model.intervals[-1])
    chunk = max(1, _MAX_SCORES // (len(model.intervals) * num_padded))
    widths, beats = model.widths.tolist(), []
    for tracks, sizes in zip(activations.split(chunk), lengths.split(chunk), strict=True):
        values = tracks.cpu().numpy()
        for n, starts in enumerate(beat_starts(tracks, sizes, model)):
            ends = ((start, start + widths[index]) for start, index in starts)
            parts = [(max(start, 0), min(end, int(sizes[n]))) for start, end in ends]
            peaks = [low + values[n, low:high].argmax() for low, high in parts if low < high]
            beats.append(np.array(peaks, dtype=np.int64))
    return beats


def beat_starts(
    activations: Float[Tensor, "N T"], num_frames: Int64[Tensor, " N"], model: BarPointer
) -> list[list[tuple[int, int]]]:
    """First frame of each beat of the best path of each track, and the index of its interval.

    The first beat may start before the track: a path begins at any position of a beat with the same
    probability.
    """
    scores, pad = _path_scores(activations, num_frames, model), int(model.intervals[-1])
    intervals, change = model.intervals.to(scores.device), model.change.to(scores)
    track = torch.arange(scores.shape[1], device=scores.device)
    every = torch.arange(len(intervals), device=scores.device)[:, None]
    index, start = _last_beat(scores, num_frames, intervals)
    path = [(start, index)]
    while bool((start > 0).any()):
        frame = (start - intervals[:, None] + pad).clamp_min(0)
        total = scores[every, track, frame] + change[:, index]
        index = torch.where(start > 0, total.argmax(dim=0), index)
        start = torch.where(start > 0, start - intervals[index], start)
        path.append((start, index))
    starts, indices = (
        torch.stack(values).cpu().numpy()[::-1] for values in zip(*path, strict=True)
    )
    beats = []
    for n in range(starts.shape[1]):
        # A path that is complete stays at its first beat.
        _, first = np.unique(starts[:, n], return_index=True)
        beats.append(list(zip(starts[first, n].tolist(), indices[first, n].tolist(), strict=True)))
    return beats


def _path_scores(
    activations: Float[Tensor, "N T"], num_frames: Int64[Tensor, " N"], model: BarPointer
) -> Float[Tensor, "J N P"]:
    """Best score of a path to the end of a beat with interval J that starts at frame P.

    Scores are relative to a path without beats, which changes no comparison. Inside a beat a path
    has no choice, so one score for each beat is enough. The P frames include the longest interval
    before the track, where paths begin, and after it. Frames outside the track add nothing.
    """
    shortest, pad = int(model.intervals[0]), int(model.intervals[-1])
    inside = torch.arange(activations.shape[1], device=activations.device) < num_frames[:, None]
    log_odds = activations.clamp(_EPSILON, 1 - _EPSILON).logit() + model.beat_prior
    padded = F.pad(log_odds.where(inside, log_odds.new_zeros(())), (pad, pad))
    widths, width_index = model.widths.unique(return_inverse=True)
    # Every sum is computed separately: differences of running sums would lose single frames.
    gains = [F.pad(padded.unfold(1, n, 1).sum(dim=-1), (0, n - 1)) for n in widths.tolist()]
    scores = torch.stack([gains[i] for i in width_index.tolist()])
    change, end = model.change.to(scores), pad + int(num_frames.max())
    possible = [row.isfinite().nonzero().flatten().tolist() for row in model.change]
    # `shortest` frames are computed at once: no beat is shorter, so they depend on earlier frames.
    for start in range(pad + 1, end, shortest):
        stop = min(start + shortest, end)
        # Contiguous copies: the rows of `scores` are so far apart that memory limits the speed.
        best = scores.new_full((len(scores), scores.shape[1], stop - start), -math.inf)
        for j, interval in enumerate(model.intervals.tolist()):
            reachable = slice(possible[j][0], possible[j][-1] + 1)
            ended = scores[j, :, start - interval : stop - interval].contiguous()
            score = ended + change[j, reachable, None, None]
            torch.maximum(best[reachable], score, out=best[reachable])
        scores[:, :, start:stop] += best
    return scores


def _last_beat(
    scores: Float[Tensor, "J N P"], num_frames: Int64[Tensor, " N"], intervals: Int64[Tensor, " J"]
) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " N"]]:
    """Index of the interval and first frame of the beat in which the best path ends."""
    best = scores.new_full(num_frames.shape, -math.inf)
    index, start = torch.zeros_like(num_frames), torch.zeros_like(num_frames)
    for j, interval in enumerate(intervals.tolist()):
        frame = num_frames[:, None] - torch.arange(interval, 0, -1, device=scores.device)
        highest, position = scores[j].gather(1, frame + int(intervals[-1])).max(dim=1)
        is_better = highest > best
        best = torch.where(is_better, highest, best)
        index = torch.where(is_better, j, index)
        start = torch.where(is_better, frame.gather(1, position[:, None])[:, 0], start)
    return index, start
