"""Which frames and which seconds of a clip a sample takes.

Training takes a random start; tests take views spread evenly over the clip. Every
sequence is a loop: what runs off its end goes on at its beginning. The rules for
starts are those of the published system (DMVR's samplers, as Scenic uses them).
"""

from typing import NamedTuple

import numpy as np


class Want(NamedTuple):
    """What one sample (a window of a clip) holds."""

    num_frames: int  # pictures
    stride: int  # frames of the record from one picture to the next
    num_samples: int  # samples of sound
    sample_rate: int  # hertz
    align: str  # 'proportional' | 'window', see `aligned_sound_start`


class Length(NamedTuple):
    """What a clip has; 0 frames or samples where it lacks the modality."""

    num_frames: int
    fps: float
    num_samples: int


def looped(length: int, start: int, num_steps: int, stride: int = 1) -> np.ndarray:
    """Positions from `start` on in a loop of `length`, int64 [num_steps]."""
    return (start + stride * np.arange(num_steps)) % length


def cut(waveform: np.ndarray, start: int, num_samples: int) -> np.ndarray:
    """`num_samples` of a looped waveform [s] from `start` on; `start` may be < 0."""
    return np.resize(np.roll(waveform, -start), num_samples)


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


def proportional_start(start: int, length: int, other_length: int) -> int:
    """The position in another sequence that is as far into it as `start` in this."""
    return round(start * other_length / length)


def centred_start(start: int, fps: float, want: Want) -> int:
    """Where sound begins whose middle is the middle of the frames' window.

    The window of the frames lasts from the first frame's beginning to the last one's
    end. The result may be negative or beyond the sound: `cut` loops it, as the frames
    are looped, so that picture and sound of equal length stay together.
    """
    span = (want.num_frames - 1) * want.stride + 1
    centre = (start + span / 2) / fps
    return round(centre * want.sample_rate - want.num_samples / 2)


def aligned_sound_start(start: int, clip: Length, want: Want) -> int:
    """The sound that goes with frames from `start` on.

    'proportional' (published): as far into the sound as `start` is into the frames,
    so that asking for 10 s of a 10 s clip rotates it. 'window': centred on the frames.
    """
    if want.align == "window":
        return centred_start(start, clip.fps, want)
    return proportional_start(start, clip.num_frames, clip.num_samples)


def train_starts(want: Want, clip: Length, rng: np.random.Generator) -> tuple[int, int]:
    """Random (frame, sound) starts of one window; 0 for what the clip lacks."""
    if not clip.num_frames:
        return 0, random_start(rng, clip.num_samples, want.num_samples)
    start = random_start(rng, clip.num_frames, want.num_frames, want.stride)
    return start, aligned_sound_start(start, clip, want) if clip.num_samples else 0


def view_starts(
    want: Want, clip: Length, num_views: int
) -> tuple[list[int], list[int]]:
    """(frame starts, sound starts) of the test views; zeros for what the clip lacks.

    Picture and sound are each spread evenly over their own length, as published;
    with 'window' the sound is centred on the frames of its view instead.
    """
    nothing = [0] * num_views
    frames = sounds = nothing
    if clip.num_frames:
        frames = even_starts(clip.num_frames, num_views, want.num_frames, want.stride)
    if clip.num_samples and clip.num_frames and want.align == "window":
        sounds = [centred_start(start, clip.fps, want) for start in frames]
    elif clip.num_samples:
        sounds = even_starts(clip.num_samples, num_views, want.num_samples)
    return frames, sounds
