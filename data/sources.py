"""Where clips come from, behind one interface: `config.data.source`.

| source  | `config.data.dir`, and who makes it                                |
|---------|--------------------------------------------------------------------|
| records | a prepared data set: `python -m data.prepare` (data/records.py);   |
|         | also what follows, where it shows: TFRecords, or `tfds:NAME`       |
| dmvr    | DMVR/MediaSequence TFRecords, a folder or a pattern such as        |
|         | `clips/{split}.tfrecord@16`: Scenic's converters, or               |
|         | `prepare --format dmvr` (data/dmvr.py)                             |
| tfds    | `tfds:ucf101`, or the folder of a TFDS builder                     |
|         | (data/tfds_source.py)                                              |
| folder  | a folder or CSV of media files, just as they are                   |
|         | (data/folder_source.py)                                            |

A source holds the records of one split, by number, and can be pickled for worker
processes:

| attribute       | meaning                                                            |
|-----------------|--------------------------------------------------------------------|
| folder          | Path where the data set lies, for messages                         |
| split           | its name                                                           |
| info            | dict of name, labels (names of classes; a dict of such by head     |
|                 | where clips have several kinds of label), settings (fps,           |
|                 | sample_rate), statistics, checksums                                |
| index           | per record: dict of id, labels, has_rgb, has_audio, num_frames     |
| damaged         | messages of damaged records that opening passed over               |
| record(number)  | the record: id, labels, num_frames, fps, height, width,            |
|                 | sample_rate, num_samples, has_rgb, has_audio, frames(indices, box) |
|                 | → uint8 [t h w 3], waveform(start, stop) → int16 [s], or log_mel() |
|                 | → float32 [t f] where the records hold one; RecordError where it   |
|                 | is damaged                                                         |
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

from data import ConfigError, dmvr
from data.records import Records


class Wish(NamedTuple):
    """What a source is asked for beside the split; a prepared data set knows it all.

    fps: frames a second (of records that do not say; a folder is read at it).
    sample_rate: hertz of the sound (likewise).
    mels: columns of the log-mel that counts as a clip's sound; 0: its waveform.
    as_tensorflow: JPEGs are decoded to what TensorFlow makes of them.
    skip_bad_records: damaged records that opening may pass over.
    prepared: `config.data.prepared`: a folder is read at that `short_side`, and at the
        files' own rates where its `fps` is "source".
    """

    fps: float = 25.0
    sample_rate: int = 16000
    mels: int = 0
    as_tensorflow: bool = False
    skip_bad_records: int = 0
    prepared: Mapping[str, str] = {}


def open_records(where: str | os.PathLike, split: str, source: str = "records", **wish):
    """The records of a split (see the tables above); `wish`: the fields of `Wish`.

    Raises:
        RecordError: the data set is missing or damaged.
        ConfigError: there is no such source, or it has no such sound.
    """
    if source not in SOURCES:
        raise ConfigError(f"config.data.source={source!r} is none of {tuple(SOURCES)}.")
    return SOURCES[source](where, split, Wish(**wish))


def _shown(where, split, wish):
    """A prepared data set, or what `where` shows itself to be."""
    if str(where).startswith("tfds:"):
        return _tfds(where, split, wish)
    if dmvr.matches(where):
        return _dmvr(where, split, wish)
    _refuse_log_mel(where, wish)
    return Records(where, split)


def _dmvr(where, split, wish):
    return dmvr.Records(where, split, *wish[:5])


def _tfds(where, split, wish):
    from data import tfds_source

    _refuse_log_mel(where, wish)
    return tfds_source.Records(where, split, wish.fps, wish.sample_rate)


def _folder(where, split, wish):
    from data import folder_source

    _refuse_log_mel(where, wish)
    side = wish.prepared.get("short_side") or folder_source.SHORT_SIDE
    own = wish.prepared.get("fps") == "source"
    return folder_source.Records(
        *(where, split, None if own else wish.fps, wish.sample_rate),
        short_side=None if side == "source" else int(side),
    )


def _refuse_log_mel(where, wish):
    if wish.mels:
        raise ConfigError(
            f"{where}: holds waveforms, no log-mels; choose a "
            "config.spectrogram.preset that computes them, not 'precomputed'."
        )


SOURCES = {"records": _shown, "dmvr": _dmvr, "tfds": _tfds, "folder": _folder}
