"""From files to batches: code, not clips (data sets live outside the repository).

The schema of a clip is the table `Clip`: media.py and digits.py fill it, records.py
writes it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


class DataError(Exception):
    """One sentence for the user: what is wrong, where, and what to do."""


class MediaError(DataError):
    """A media file gives neither picture nor sound."""


class ManifestError(DataError):
    """A list of clips cannot be used."""


class RecordError(DataError):
    """A prepared data set is missing or damaged."""


class ConfigError(DataError):
    """A field of `config.data` does not fit the data set."""


@dataclass
class Clip:
    """One clip: the schema, as a table. Time 0 is the first wanted moment of picture.

    | field       | type                  | meaning                                 |
    |-------------|-----------------------|-----------------------------------------|
    | frames      | uint8 [t h w 3], None | RGB at the rate `fps`, h and w even; or |
    |             |                       | a one-pass iterator of uint8 [h w 3] or |
    |             |                       | of av.VideoFrame (media.read: coded)    |
    | fps         | float                 | frames a second (0.0 without picture)   |
    | waveform    | int16 [s], None       | mono; sample i is at i / sample_rate    |
    | sample_rate | int                   | Hz                                      |
    | problems    | tuple or list of str  | what was lost in reading; a list, whole |
    |             |                       | at their end, if frames are an iterator |
    | source      | dict                  | facts of the file (media.MediaInfo)     |
    """

    frames: np.ndarray | Iterable | None
    fps: float
    waveform: np.ndarray | None
    sample_rate: int = 16000
    problems: tuple[str, ...] | list[str] = ()
    source: dict = field(default_factory=dict)
