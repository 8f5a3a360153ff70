"""Which frames and which seconds of a clip a sample takes.

`data.sampling` names the rule for frames, each as a published system has it:

| name      | training                         | test views           | after the end |
|-----------|----------------------------------|----------------------|---------------|
| dense     | every `stride`-th from a random  | spread evenly        | the beginning |
|           | start (DMVR, as Scenic uses it)  |                      |               |
| held      | the same (VideoMAE, pretraining) | spread evenly over   | the last one  |
|           |                                  | each `stride`-th     | again         |
| stretched | `num_frames` evenly over         | those of held        | the last one  |
|           | `num_frames · stride` (VideoMAE, |                      | again         |
|           | finetuning)                      |                      |               |
| segments  | one, at random, of each of       | at the same place in |               |
|           | `num_frames` equal parts (TSN;   | each part, another   |               |
|           | Something-Something)             | place for each view  |               |

Sound goes with the frames and loops: what runs off its end goes on at its beginning.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Want(NamedTuple):
    """What one sample (a window of a clip) holds."""

    num_frames: int  # pictures
    stride: int  # frames of the record from one picture to the next
    num_samples: int  # samples of sound (or rows of a spectrogram)
    sample_rate: int  # samples (or rows) a second
    align: str  # 'proportional' | 'window' | 'whole', see `aligned_sound_start`
    sampling: str = "dense"  # a name in `SAMPLINGS`


class Length(NamedTuple):
    """What a clip has; 0 frames or samples where it lacks the modality."""

    num_frames: int
    fps: float
    num_samples: int


# ------------------------------------------------------------------- parts of the rules


def looped(length: int, start: int, num_steps: int, stride: int = 1) -> np.ndarray:
    """Positions from `start` on in a loop of `length`, int64 [num_steps]."""
    return (start + stride * np.arange(num_steps)) % length


def cut(sound: np.ndarray, start: int, num_samples: int) -> np.ndarray:
    """`num_samples` of looped sound [s] or [s f] from `start` on; it may be < 0."""
    return np.resize(np.roll(sound, -start, axis=0), (num_samples, *sound.shape[1:]))


def beginning(sound: np.ndarray, num_samples: int) -> np.ndarray:
    """The first `num_samples` of sound [s] or [s f], and zeros after its end."""
    found = np.zeros((num_samples, *sound.shape[1:]), sound.dtype)
    found[: len(sound)] = sound[:num_samples]
    return found


def random_start(
    rng: np.random.Generator, length: int, num_steps: int, stride: int = 1
) -> int:
    """A start from which the window fits; 0 where the sequence is too short for it."""
    return int(rng.integers(max(1, length - (num_steps - 1) * stride)))


def even_starts(
    length: int, num_views: int, num_steps: int, stride: int = 1
) -> list[int]:
    """Starts of test views: evenly from first to last, or the middle for one view."""
    room = max(0, length - num_steps * stride)
    if num_views == 1:
        return [room // 2]
    return [view * room // (num_views - 1) for view in range(num_views)]


# ---------------------------------------------- frames: training windows and test views
#
# int64 [num_frames] each; what is beyond the end counts on from the beginning.


def dense_train(rng, length: int, num_frames: int, stride: int) -> np.ndarray:
    """DMVR's random window."""
    start = random_start(rng, length, num_frames, stride)
    return start + stride * np.arange(num_frames)


def dense_views(length, num_views, num_frames, stride) -> list[np.ndarray]:
    """DMVR's middle or linearly spaced windows."""
    starts = even_starts(length, num_views, num_frames, stride)
    return [start + stride * np.arange(num_frames) for start in starts]


def held_train(rng, length: int, num_frames: int, stride: int) -> np.ndarray:
    """VideoMAE's pretraining; it stops a frame before the last one, as published."""
    start = int(rng.integers(max(1, length - num_frames * stride + 1)))
    last = max(0, (length - 2 - start) // stride)
    return start + stride * np.minimum(np.arange(num_frames), last)


def held_views(length, num_views, num_frames, stride) -> list[np.ndarray]:
    """VideoMAE's test clips: windows of the strided frames, from first to last."""
    frames = np.arange(0, length, stride)
    starts = even_starts(len(frames), num_views, num_frames)
    last = len(frames) - 1
    return [frames[np.minimum(s + np.arange(num_frames), last)] for s in starts]


def stretched_train(rng, length: int, num_frames: int, stride: int) -> np.ndarray:
    """VideoMAE's finetuning: steps of slightly more than `stride`, rounded down."""
    span = num_frames * stride
    if length <= span:
        places = np.full(num_frames, float(length))
        places[: length // stride] = np.linspace(0, length, length // stride)
        return np.minimum(places, length - 1).astype(np.int64)
    start = int(rng.integers(length - span))
    steps = np.linspace(0, span, num_frames).astype(np.int64)
    return start + np.minimum(steps, span - 1)


def segments_train(rng, length: int, num_frames: int, stride: int) -> np.ndarray:
    """VideoMAE's for Something-Something; a clip too short gives its first frame."""
    del stride
    part = length // num_frames
    if not part:
        return np.zeros(num_frames, np.int64)
    return part * np.arange(num_frames) + rng.integers(part, size=num_frames)


def segments_views(length, num_views, num_frames, stride) -> list[np.ndarray]:
    """Views at equal distances in the segments: for two, VideoMAE's and DMVR's.

    One view is DMVR's: the beginnings of segments of whole frames, so that up to
    `num_frames` frames at the end are not seen.
    """
    del stride
    part = length / num_frames
    if num_views == 1 and length >= num_frames:
        part = length // num_frames
    shifts = part * np.arange(num_views)[:, None] / num_views
    return list((part * np.arange(num_frames) + shifts).astype(np.int64))


class Sampling(NamedTuple):
    """A rule: (rng, length, num_frames, stride) → a window, and the test views."""

    train: Callable[..., np.ndarray]
    views: Callable[..., list[np.ndarray]]


SAMPLINGS = {
    "dense": Sampling(dense_train, dense_views),
    "held": Sampling(held_train, held_views),
    "stretched": Sampling(stretched_train, held_views),
    "segments": Sampling(segments_train, segments_views),
}
# Several samples of a clip are of one window (VideoMAE: `num_sample`; Hoffer et al.,
# 2020, arXiv:1901.09335), not of windows of their own.
ONE_WINDOW = ("stretched", "segments")


# ------------------------------------------------------------------- frames with sound


def proportional_start(start: int, length: int, other_length: int) -> int:
    """The position in another sequence that is as far into it as `start` in this."""
    return round(start * other_length / length)


def centred_start(frames: np.ndarray, fps: float, want: Want) -> int:
    """Where sound begins whose middle is the middle of the frames' window [t].

    The window of the frames lasts from the first frame's beginning to the last one's
    end. The result may be negative or beyond the sound: `cut` loops it, as the frames
    are looped, so that picture and sound of equal length stay together.
    """
    centre = (int(frames[0]) + int(frames[-1]) + 1) / 2 / fps
    return round(centre * want.sample_rate - want.num_samples / 2)


def aligned_sound_start(frames: np.ndarray, clip: Length, want: Want) -> int:
    """The sound that goes with a window of frames [t].

    'proportional' (published): as far into the sound as the first frame is into the
    frames, so that asking for 10 s of a 10 s clip rotates it. 'window': centred.
    'whole': from the clip's beginning whatever the frames, and zeros after its end
    (AV-MaskEnhancer).
    """
    if want.align == "whole":
        return 0
    if want.align == "window":
        return centred_start(frames, clip.fps, want)
    return proportional_start(int(frames[0]), clip.num_frames, clip.num_samples)


def train_window(
    want: Want, clip: Length, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Random frames, int64 [t], and the start of their sound; 0 for what is lacking."""
    nothing = np.zeros(want.num_frames, np.int64)
    if not clip.num_frames and want.align == "whole":
        return nothing, 0
    if not clip.num_frames:
        return nothing, random_start(rng, clip.num_samples, want.num_samples)
    train = SAMPLINGS[want.sampling].train
    frames = train(rng, clip.num_frames, want.num_frames, want.stride)
    sound = aligned_sound_start(frames, clip, want) if clip.num_samples else 0
    return frames % clip.num_frames, sound


def view_windows(
    want: Want, clip: Length, num_views: int
) -> tuple[list[np.ndarray], list[int]]:
    """Frames, int64 [t], and start of the sound of each test view; 0 where it lacks.

    Picture and sound are each spread evenly over their own length, as published;
    with 'window' the sound is centred on the frames of its view instead, and with
    'whole' it is the same for all.
    """
    frames, sounds = [np.zeros(want.num_frames, np.int64)] * num_views, [0] * num_views
    if clip.num_frames:
        views = SAMPLINGS[want.sampling].views
        frames = views(clip.num_frames, num_views, want.num_frames, want.stride)
    if clip.num_samples and clip.num_frames and want.align == "window":
        sounds = [centred_start(window, clip.fps, want) for window in frames]
    elif clip.num_samples and want.align != "whole":
        sounds = even_starts(clip.num_samples, num_views, want.num_samples)
    return [window % max(1, clip.num_frames) for window in frames], sounds
