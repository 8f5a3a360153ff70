"""Shows, and lets one hear, what a model makes of a clip that it hardly sees.

    python -m av_mae.reconstruct runs/pretrain concert.mp4 --out pictures
    python -m av_mae.reconstruct runs/a runs/b concert.mp4 --out pictures \\
        --ratio-rgb .95 --mask time --start 12

Writes into DIR

    reconstruction.mp4   original | masked | reconstruction, with the sound of the last
    reconstruction.gif   the same without sound
    reconstruction.png   all of it as one sheet, with spectrograms
    original.wav, masked.wav, reconstruction.wav
    errors.json          errors of each modality and token, and what was masked

and prints the errors. Of several checkpoints there is a row, and a sound, for each;
the film has the sound of the first. Sound comes from log-mels by Griffin-Lim. The
window is the middle of the clip, or begins at --start. `--mask` is for the modalities
that know such a mask: tube for pictures, time and frequency for sound, random for both.
"""

import argparse
import json
import math
import wave
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from av_mae import UserError, api, commandline, masking, pretrain, visualise
from av_mae.reconstruction import Reconstruction
from data import DataError

CELL = 160  # pixels: the least height of a frame in the sheet
COLUMNS = 8  # frames in a row of the sheet
KINDS = tuple(masking.MASKS)
UNITS = {"rgb": "pixels", "spectrogram": "ln power"}
STATISTICS = {
    "visible": "statistics of the visible patches",
    "oracle": "TRUE statistics of the masked patches (oracle)",
    "none": "",
}


class Shown(NamedTuple):
    """A checkpoint's name and what it made of the clip; fps is of its frames."""

    name: str
    found: Reconstruction
    fps: float


def names_of(paths: list[str]) -> list[str]:
    """Short names that differ: the last part of each path, else with a number."""
    short = [Path(path).resolve().name for path in paths]
    if len(set(short)) == len(short):
        return short
    return [f"{i + 1}-{name}" for i, name in enumerate(short)]


def masks_for(model: api.Model, kind: str) -> dict[str, str]:
    """{m: kind} of the model's modalities that know this kind of mask.

    Raises UserError where none does.
    """
    masked = pretrain.masked(model.config)
    found = {m: kind for m in masked if kind in masking.KINDS[m]}
    if not found:
        known = ", ".join(masked)
        raise UserError(f"--mask {kind} is for neither of {known}: choose another.")
    return found


def reconstruct(given: argparse.Namespace) -> list[Shown]:
    """What each checkpoint makes of the clip."""
    shown = []
    names = names_of(given.checkpoints)
    for path, name in zip(given.checkpoints, names, strict=True):
        model = api.load(path, given.weights)
        ratios = {"rgb": given.ratio_rgb, "spectrogram": given.ratio_spectrogram}
        model.check_autoencoder()
        masked = pretrain.masked(model.config)
        ratio = {m: r for m, r in ratios.items() if r is not None and m in masked}
        found = model.reconstruct(
            given.clip,
            ratio=ratio,
            seed=given.seed,
            mask=masks_for(model, given.mask) if given.mask else None,
            start=given.start,
            oracle=given.oracle_statistics,
        )
        data = model.config.data
        shown.append(Shown(name, found, data.fps / data.stride))
    return shown


# Pictures.


def sheet(shown: list[Shown], caption: str) -> np.ndarray:
    """Everything on one picture, uint8 [h w 3]."""
    parts, width = [], 640
    with_frames = [s for s in shown if s.found.frames is not None]
    if with_frames:
        first = with_frames[0].found
        t = len(first.times)
        chosen = np.unique(np.linspace(0, t - 1, min(t, COLUMNS)).round().astype(int))
        shape = _cell(first.frames.original.shape[1:3])
        cells = lambda film: [visualise.to_size(film[j], *shape) for j in chosen]
        rows = [cells(first.frames.original)]
        for s in with_frames:
            rows += [cells(_alike(x, t)) for x in s.found.frames[1:]]
        names = _row_names(with_frames, "rgb")
        titles = [f"{first.times[j]:.2f} s" for j in chosen]
        parts.append(visualise.sheet(rows, names, titles))
        width = shape[1] * len(chosen)
    with_sound = [s for s in shown if s.found.spectrograms is not None]
    if with_sound:
        rows = [[visualise.to_size(x, CELL, width)] for x in _log_mels(with_sound)]
        seconds = _sound_seconds(with_sound[0].found)
        title = f"{seconds:.2f} s of sound, low frequencies at the bottom"
        names = _row_names(with_sound, "spectrogram")
        parts.append(visualise.sheet(rows, names, [title]))
    return visualise.below(parts, caption)


def _cell(shape: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a frame in pictures: whole multiples, CELL at least."""
    times = max(1, math.ceil(CELL / min(shape)))
    return shape[0] * times, shape[1] * times


def _alike(film: np.ndarray, t: int) -> np.ndarray:
    """A film of another model with as many frames as the first model's."""
    return film[np.linspace(0, len(film) - 1, t).round().astype(int)]


def _row_names(shown: list[Shown], m: str) -> list[str]:
    names = ["original"]
    for s in shown:
        whose = f"{s.name}\n" if len(shown) > 1 else ""
        names.append(f"{whose}masked {s.found.ratio(m):.0%}")
        names.append("reconstruction" if len(shown) == 1 else f"{s.name}\nreconstruct.")
    return names


def _log_mels(shown: list[Shown]) -> list[np.ndarray]:
    """Pictures of the original, and of masked and reconstructed of each."""
    original = shown[0].found.spectrograms.original
    low, high = np.percentile(original, (1, 99))
    versions = [original]
    for s in shown:
        versions += s.found.spectrograms[1:]
    return [visualise.log_mel_picture(x, low, high) for x in versions]


def _sound_seconds(found: Reconstruction) -> float:
    return len(found.spectrograms.original) / visualise.ROWS_A_SECOND


class Timeline(NamedTuple):
    """Seconds of the clip at which a film begins, its rate, how many frames it has."""

    start: float
    fps: float
    count: int


def timeline(s: Shown) -> Timeline:
    """From the first of frames and sound to the last of them."""
    found, ends = s.found, []
    if found.frames is not None:
        ends += [(found.times[0], found.times[-1] + 1 / s.fps)]
    if found.spectrograms is not None:
        start = found.sound_start
        ends += [(start, start + _sound_seconds(found))]
    start, end = min(e[0] for e in ends), max(e[1] for e in ends)
    return Timeline(
        float(start), s.fps, max(1, math.ceil((end - start) * s.fps - 1e-6))
    )


def film(shown: list[Shown], caption: str) -> tuple[np.ndarray, Timeline]:
    """(uint8 [t h w 3], when it is): a row for each checkpoint, frames over sound.

    Frames are held before the first and after the last one; a line goes through the
    spectrograms with the sound.
    """
    line, result = timeline(shown[0]), []
    shape = next(
        (
            _cell(s.found.frames.original.shape[1:3])
            for s in shown
            if s.found.frames is not None
        ),
        (CELL, CELL),
    )
    sounds = {
        s.name: [visualise.to_size(x, *shape) for x in _log_mels([s])]
        for s in shown
        if s.found.spectrograms is not None
    }
    titles = ["original", "masked", "reconstruction"]
    names = [name for s in shown for name in _film_names(s, len(shown) > 1)]
    for k in range(line.count):
        time, rows = line.start + k / line.fps, []
        for s in shown:
            rows += _film_rows(s, time, sounds.get(s.name), shape)
        result.append(visualise.below([visualise.sheet(rows, names, titles)], caption))
    return np.stack(result), line


def _film_names(s: Shown, named: bool) -> list[str]:
    kinds = {"rgb": "picture", "spectrogram": "sound"}
    names = [f"{kinds[m]}\n{s.found.ratio(m):.0%} masked" for m in s.found.masks]
    return [f"{s.name}\n{name}" if named else name for name in names]


def _film_rows(s: Shown, time: float, sounds, shape: tuple[int, int]) -> list:
    """One checkpoint at one time: three frames, and three spectrograms below them."""
    found, rows = s.found, []
    if found.frames is not None:
        place = (time - found.times[0]) * s.fps + 1e-6
        i = int(np.clip(place, 0, len(found.times) - 1))
        rows.append([visualise.to_size(x[i], *shape) for x in found.frames])
    if sounds:
        where = (time - found.sound_start) / _sound_seconds(found)
        rows.append([visualise.with_cursor(x, where) for x in sounds])
    return rows


# Files.


def write_wav(path: Path, samples: np.ndarray, rate: int):
    """Mono int16 [s] as a WAV file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.ascontiguousarray(samples, "<i2").tobytes())


def write_mp4(path: Path, frames: np.ndarray, fps: float, sound, rate: int):
    """Frames uint8 [t h w 3] of even sides (H.264), sound int16 [s] or None (AAC)."""
    exact = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=exact, options={"crf": "18"})
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        if sound is not None:
            audio = container.add_stream("aac", rate=rate, layout="mono")
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, 1 / exact
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if sound is None:
            return
        for start in range(0, len(sound), 1024):
            part = sound[None, start : start + 1024].astype(np.float32) / 32768
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, start
            frame.time_base = Fraction(1, rate)
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))


def placed(samples: np.ndarray, at: float, rate: int, seconds: float) -> np.ndarray:
    """Sound that begins at `at` seconds, in silence of `seconds`."""
    result, start = np.zeros(round(seconds * rate), np.int16), round(at * rate)
    part = samples[: max(0, len(result) - start)]
    result[start : start + len(part)] = part
    return result


def write(shown: list[Shown], out: Path, caption: str) -> list[Path]:
    """All files of the command; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    pictures, line = film(shown, caption)
    first, paths, sounds = shown[0].found, [], {}
    for s in shown:
        end = f"-{s.name}" if len(shown) > 1 else ""
        if s.found.spectrograms is not None:
            for which in ("masked", "reconstruction"):
                sounds[f"{which}{end}"] = s.found.sound(which)
    if first.waveform is not None:
        sounds["original"] = first.waveform
    for name, samples in sounds.items():
        paths.append(out / f"{name}.wav")
        write_wav(paths[-1], samples, first.sample_rate)
    heard = next((x for n, x in sounds.items() if n.startswith("reconstruction")), None)
    if heard is not None:
        seconds, at = line.count / line.fps, max(0.0, first.sound_start - line.start)
        heard = placed(heard, at, first.sample_rate, seconds)
    paths.append(out / "reconstruction.mp4")
    write_mp4(paths[-1], pictures, line.fps, heard, first.sample_rate)
    paths.append(out / "reconstruction.gif")
    visualise.write_gif(pictures, paths[-1], line.fps)
    paths.append(out / "reconstruction.png")
    Image.fromarray(sheet(shown, caption)).save(paths[-1])
    paths.append(out / "errors.json")
    text = json.dumps({s.name: errors(s.found) for s in shown}, indent=1)
    paths[-1].write_text(text + "\n", encoding="utf-8")
    return paths


def errors(found: Reconstruction) -> dict:
    """Numbers of a reconstruction for JSON; null at visible tokens."""
    numbers = {}
    for m, mask in found.masks.items():
        by_token = found.errors[m].astype(object)
        by_token[~mask] = None
        numbers[m] = {
            "error": found.error[m],
            "mean_squared_error": found.distance[m],
            "unit": UNITS[m],
            "masked": found.ratio(m),
            "statistics": found.statistics[m],
            "error_by_token": by_token.tolist(),
        }
    return {"used": list(found.used), **numbers}


def caption_of(shown: list[Shown], clip: str) -> str:
    """What was shown, and how standardised targets were undone."""
    lines = [Path(clip).name]
    for x in shown:
        told = x.found.statistics
        for kind in dict.fromkeys(told.values()):
            if STATISTICS[kind]:
                where = " and ".join(m for m, s in told.items() if s == kind)
                where = f"{x.name}, {where}" if len(shown) > 1 else where
                lines.append(
                    f"{where}: standardised targets undone by the {STATISTICS[kind]}"
                )
    return "\n".join(lines)


def table(shown: list[Shown]) -> str:
    """The errors as lines for a terminal."""
    lines = []
    for s in shown:
        for m, error in s.found.error.items():
            lines.append(
                f"{s.name:<16} {m:<12} masked {s.found.ratio(m):4.0%}  "
                f"loss {error:.4f}  "
                f"mean squared error {s.found.distance[m]:.4f} ({UNITS[m]})"
            )
        for m in {"rgb", "spectrogram"} - set(s.found.error):
            lines.append(f"{s.name:<16} {m:<12} not reconstructed: not there")
    return "\n".join(lines)


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.reconstruct",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("clip", metavar="CLIP", help="a media file")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    ratio = "share of its patches that is masked; default: as it was trained"
    parser.add_argument("--ratio-rgb", type=float, help=ratio)
    parser.add_argument("--ratio-spectrogram", type=float, help=ratio)
    parser.add_argument("--mask", choices=KINDS, help="default: as it was trained")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    parser.add_argument("--start", type=float, help="second at which to look")
    parser.add_argument(
        "--oracle-statistics",
        action="store_true",
        help="undo standardised targets by the true statistics of the masked patches",
    )
    parser.add_argument("--weights", default="params", choices=("params", "ema"))
    return parser.parse_args(argv)


def main(argv=None):
    given = parse(argv)
    commandline.quiet_libraries()
    try:
        shown = reconstruct(given)
        paths = write(shown, given.out, caption_of(shown, given.clip))
    except (UserError, DataError) as error:
        commandline.stop(error)
    print(table(shown))
    print("written:", *paths, sep="\n  ")


if __name__ == "__main__":
    main()
