"""Statistics of a data set, measured on a sample of its clips and stored in it.

    python -m av_mae.stats datasets/mine
    python -m av_mae.stats datasets/mine --preset mbt kaldi

Mean and deviation of the log-mels of each preset, and of the picture's colours in
[0, 1], with their standard errors (clips are the sample: what comes from one clip is
counted as one observation). `spectrogram.normalise="dataset"` uses the former; a
training run measures them itself where they are not there yet. With "fixed", a run
warns where the config's numbers are not these (`check_fixed`).
"""

import argparse
import logging
from pathlib import Path

import jax
import numpy as np

from av_mae import UserError, commandline, spectrogram
from data import DataError, RecordError
from data.records import Records, read_info, write_json
from data.sources import SOURCES, open_records

log = logging.getLogger(__name__)

CLIPS = 1000  # measured at most, spread evenly over the split
SECONDS = 10  # of each clip at most
EDGE = 2  # rows at either end of a window that see the padding
PICTURES = 3  # of each clip, evenly
TOLERANCE = 0.1  # by which fixed numbers may differ from those of the data


def sound(
    directory: Path | str,
    preset: str = "mbt",
    split: str = "train",
    source: str = "records",
    skip_bad_records: int = 0,
    keep: bool = True,
) -> tuple[float, float, bool]:
    """(mean, deviation, whether they were stored) of log-mels.

    As stored, else measured now, of `split`.

    directory, source, skip_bad_records: those of `config.data`; keep: what is measured
    now is stored, for all who use the data set from then on.
    """
    records = open_records(directory, split, source, skip_bad_records=skip_bad_records)
    stored = found = records.info["statistics"].get(_key(preset))
    if found is None:
        found = measure(records, preset)
        if keep:
            store(records, {_key(preset): found})
    return found["mean"], found["std"], stored is not None


def check_fixed(config, split: str = "") -> str:
    """What is wrong with `spectrogram.mean` and `.std`, or ""; no full stop.

    They are compared with what is stored in the data set, if anything is: the mean may
    be off by a tenth of the deviation, the deviation by a tenth of itself. Twice the
    deviation is right too, since AudioMAE divides by that. The sentence is also logged.
    split: one that is there, default `data.split`; statistics are of all.
    """
    wanted = config.spectrogram
    if wanted.preset not in spectrogram.PRESETS:  # log-mels that the records hold
        return ""
    data = config.data
    records = open_records(
        *(data.dir, split or data.split, data.source),
        skip_bad_records=data.skip_bad_records,
    )
    stored = records.info["statistics"].get(_key(wanted.preset))
    if stored is None:
        log.info(
            "log-mel mean and deviation are the config's (%g, %g); what they are in "
            "the data tells `python -m av_mae.stats %s --preset %s`",
            *(wanted.mean, wanted.std, config.data.dir, wanted.preset),
        )
        return ""
    mean, std = stored["mean"], stored["std"]
    off = abs(wanted.mean - mean) > TOLERANCE * std
    wide = [abs(wanted.std - n * std) > TOLERANCE * n * std for n in (1, 2)]
    if not off and not all(wide):
        return ""
    told = (
        f"spectrogram.mean={wanted.mean:g} and std={wanted.std:g} are not those of "
        f"the data, {mean:.4g} and {std:.4g}; use these, normalise='dataset', or the "
        "front end that the numbers come from"
    )
    log.warning("%s.", told)
    return told


def _key(preset: str) -> str:
    return f"log_mel/{preset}"


def measure(records: Records, preset: str) -> dict[str, float]:
    """Mean and deviation over all values of up to `CLIPS` clips that have sound.

    With standard errors, taken between clips, and the number of clips. Raises
    RecordError if no clip has sound.
    """
    rate = spectrogram.PRESETS[preset].sample_rate
    log_mel = jax.jit(lambda x: spectrogram.log_mel(x, preset))
    means, squares = [], []
    for record in _sample(records, "has_audio", "sound"):
        if record.sample_rate != rate:
            raise RecordError(
                f"{records.folder}: the sound has {record.sample_rate:g} Hz, but "
                f"{preset} wants {rate}; measure another --preset, or prepare again "
                f"with --sample-rate {rate}."
            )
        waveform = record.waveform()[: SECONDS * rate]
        windows = np.zeros((SECONDS, rate), np.int16)  # one shape, one program
        whole = max(len(waveform) // rate, 1)
        windows.reshape(-1)[: len(waveform)] = waveform
        rows = np.asarray(log_mel(windows), np.float64)[:whole, EDGE:-EDGE]
        means.append(rows.mean())
        squares.append((rows**2).mean())
    return _summary(means, squares)


def measure_rgb(records: Records) -> dict[str, list[float]]:
    """The same of the three colours in [0, 1], over `PICTURES` pictures of each clip.

    Raises RecordError if no clip has a picture.
    """
    means, squares = [], []
    for record in _sample(records, "has_rgb", "picture"):
        places = (np.arange(PICTURES) + 0.5) * record.num_frames / PICTURES
        pixels = record.frames(places.astype(int)) / 255.0
        means.append(pixels.mean((0, 1, 2)))
        squares.append((pixels**2).mean((0, 1, 2)))
    return _summary(means, squares)


def _sample(records: Records, key: str, what: str):
    """Records that have it, evenly over the split; RecordError where there are none."""
    having = [i for i, entry in enumerate(records.index) if entry[key]]
    if not having:
        raise RecordError(
            f"{records.folder}: no clip of {records.split} has {what}, so there are no "
            'statistics of it; set spectrogram.normalise="none" or leave '
            f"{what} out of modalities."
        )
    places = np.linspace(0, len(having) - 1, min(CLIPS, len(having)))
    for place in places.round().astype(int):
        yield records.record(having[place])


def _summary(means: list, squares: list) -> dict:
    """From means and mean squares of each clip, floats or [c], to those of all.

    The standard error of the deviation is that of the variance, mean((x − m)²) by
    clips, over twice the deviation.
    """
    means, squares = np.asarray(means), np.asarray(squares)
    mean, count = means.mean(0), len(means)
    spread = squares - 2 * mean * means + mean**2  # of each clip about the mean of all
    std = np.sqrt(spread.mean(0))
    of_std = spread.std(0) / np.sqrt(count) / np.maximum(2 * std, 1e-12)
    return {
        "mean": mean.tolist(),
        "std": std.tolist(),
        "mean_standard_error": (means.std(0) / np.sqrt(count)).tolist(),
        "std_standard_error": of_std.tolist(),
        "clips": count,
    }


def store(records: Records, numbers: dict[str, dict]):
    """Writes statistics by name into dataset.json, where the folder can be written."""
    if not (records.folder / "dataset.json").is_file():
        log.warning(
            "statistics cannot be stored in %s: it is no prepared data set",
            records.folder,
        )
        return
    if jax.process_index() != 0:
        return
    info = read_info(records.folder)
    info["statistics"] |= numbers
    try:
        write_json(records.folder / "dataset.json", info)
    except OSError as error:
        log.warning("statistics are not stored in %s: %s", records.folder, error)


def text(name: str, numbers: dict, folder) -> str:
    """A line for a person."""
    listed = lambda key: np.atleast_1d(numbers[key])
    pair = lambda key: ", ".join(
        f"{value:.4f} ± {error:.4f}"
        for value, error in zip(
            listed(key), listed(f"{key}_standard_error"), strict=True
        )
    )
    return (
        f"{name}: mean {pair('mean')}, deviation {pair('std')}, from "
        f"{numbers['clips']} clips of {folder}"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.stats",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m av_mae.stats datasets/mine --preset mbt kaldi",
    )
    parser.add_argument("directory", help="a data set: what config.data.dir takes")
    parser.add_argument("--source", choices=list(SOURCES), default="records")
    parser.add_argument("--split", default="train")
    parser.add_argument(
        "--preset", nargs="+", default=["mbt"], choices=sorted(spectrogram.PRESETS)
    )
    options = parser.parse_args(argv)
    commandline.quiet_libraries()
    try:
        records = open_records(options.directory, options.split, options.source)
        has = {
            key: any(entry[key] for entry in records.index)
            for key in ("has_audio", "has_rgb")
        }
        measured = {}
        for preset in options.preset if has["has_audio"] else ():
            measured[_key(preset)] = measure(records, preset)
            name = f"log-mel ({preset})"
            print(text(name, measured[_key(preset)], records.folder))
        if has["has_rgb"]:
            measured["rgb"] = measure_rgb(records)
            print(text("rgb", measured["rgb"], records.folder))
        for key, what in (("has_audio", "sound"), ("has_rgb", "picture")):
            if not has[key]:
                print(f"no clip of {options.split} has {what}")
        store(records, measured)
    except (UserError, DataError) as error:
        commandline.stop(error)


if __name__ == "__main__":
    main()
