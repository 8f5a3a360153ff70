"""Mean and deviation of a prepared data set's log-mels, measured and stored in it.

    python -m av_mae.stats datasets/mine

`spectrogram.normalise="dataset"` uses them. A training run measures them itself where
they are not there yet.
"""

import argparse
import logging
from pathlib import Path

import jax
import numpy as np

from av_mae import UserError, commandline, spectrogram
from data import DataError, RecordError
from data.records import Records, read_info, write_json
from data.sources import open_records

log = logging.getLogger(__name__)

CLIPS = 1000  # measured at most, spread evenly over the split
SECONDS = 10  # of each clip at most
EDGE = 2  # rows at either end of a window that see the padding


def sound(directory: Path | str, preset: str = "mbt", split: str = "train"):
    """(mean, deviation) of the log-mels of `split`: as stored, else measured now."""
    records = open_records(directory, split)
    stored = records.info["statistics"].get(_key(preset))
    if stored is None:
        stored = measure(records, preset)
        store(records, preset, stored)
    return stored["mean"], stored["std"]


def _key(preset: str) -> str:
    return f"log_mel/{preset}"


def measure(records: Records, preset: str) -> dict[str, float]:
    """Mean and deviation over all values of up to `CLIPS` clips that have sound.

    With the standard error of the mean, taken between clips, and the number of clips.
    Raises RecordError if no clip has sound.
    """
    rate = spectrogram.PRESETS[preset].sample_rate
    log_mel = jax.jit(lambda x: spectrogram.log_mel(x, preset))
    with_sound = [i for i, entry in enumerate(records.index) if entry["has_audio"]]
    if not with_sound:
        raise RecordError(
            f"{records.folder}: no clip of {records.split} has sound, so there are no "
            'statistics of it; set spectrogram.normalise="none" or leave sound out of '
            "modalities."
        )
    places = np.linspace(0, len(with_sound) - 1, min(CLIPS, len(with_sound)))
    means, squares = [], []
    for place in places.round().astype(int):
        waveform = records.record(with_sound[place]).waveform()[: SECONDS * rate]
        windows = np.zeros((SECONDS, rate), np.int16)  # one shape, one program
        whole = max(len(waveform) // rate, 1)
        windows.reshape(-1)[: len(waveform)] = waveform
        rows = np.asarray(log_mel(windows), np.float64)[:whole, EDGE:-EDGE]
        means.append(rows.mean())
        squares.append((rows**2).mean())
    mean = float(np.mean(means))
    return {
        "mean": mean,
        "std": float(np.sqrt(np.mean(squares) - mean**2)),
        "mean_standard_error": float(np.std(means) / np.sqrt(len(means))),
        "clips": len(means),
    }


def store(records: Records, preset: str, numbers: dict[str, float]):
    """Writes the numbers into dataset.json, where the folder can be written."""
    if not (records.folder / "dataset.json").is_file():
        log.warning("statistics cannot be stored in %s: TFRecords", records.folder)
        return
    if jax.process_index() != 0:
        return
    info = read_info(records.folder)
    info["statistics"][_key(preset)] = numbers
    try:
        write_json(records.folder / "dataset.json", info)
    except OSError as error:
        log.warning("statistics are not stored in %s: %s", records.folder, error)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.stats",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", help="a prepared data set, or TFRecords")
    parser.add_argument("--split", default="train")
    parser.add_argument("--preset", default="mbt", choices=sorted(spectrogram.PRESETS))
    options = parser.parse_args(argv)
    commandline.quiet_libraries()
    try:
        records = open_records(options.directory, options.split)
        numbers = measure(records, options.preset)
        store(records, options.preset, numbers)
    except (UserError, DataError) as error:
        commandline.stop(error)
    print(
        f"log-mel ({options.preset}): mean {numbers['mean']:.4f} "
        f"± {numbers['mean_standard_error']:.4f}, deviation {numbers['std']:.4f}, "
        f"from {numbers['clips']} clips of {records.folder}"
    )


if __name__ == "__main__":
    main()
