"""The built-in demo data set: moving digits that say their name, as real video files.

    python -m data.digits --out DIR [--train 4000 --test 4000 --seed 0 --jobs N]

writes H.264 + AAC files `DIR/{train,test}/00000.mp4`, ... (2 s, 64×64, 25 fps, sound
at 22,050 Hz) and `DIR/clips.csv` (`path,start,end,label,split`), which go through
`data.prepare DIR/clips.csv` like anybody's clips. Clip n shows and says the digit
n mod 10.

Picture. A scan of scikit-learn's bundled `load_digits` (1,797 scans of 8×8; UCI
"Optical Recognition of Handwritten Digits"), enlarged, turned, slanted and blurred,
drifts behind moving bars in noise: a frame shows part of it, several show all. No scan
is in two splits: train has the first half of the list, test the second. The set has no
writer ids, so a hand may be in both.

Sound. The digit's English word in pink noise, spoken by espeak-ng, a rule-based
synthesiser, from the package `espeakng-loader` (extra `demo`). espeak-ng is under
GPL-3.0-or-later: it is loaded at run time only to make this demo data, and neither
linked nor shipped with this project. A *voice* is one of espeak-ng's variants (the
104 files of `voices/!v`: formants, pitch range, breath, roughness, echo); it speaks
with any of `ACCENTS`, at a drawn pitch and rate. The voices of train (49) and test (55)
are disjoint, and voices that differ only by a number at the end of their name
(robosoft, robosoft2, ...) stay together. The accents are in both.

How hard both are was set with the linear baselines of `av_mae.baselines` alone, before
any model was trained on them, and is fixed since: neither may pass .6 test accuracy
from 200 labels. Measured on the files of seed 0 (first 1,000 clips of each split, five
draws of 20 training clips a class): pooled log-mels .49 (.46 to .51), middle frame .40
(.38 to .42), both .55 (.53 to .58); chance is .10.

The same seed gives the same files (on the same machine, with the same versions of the
encoders) for any number of jobs, and a longer set begins with the clips of a shorter.
"""

import argparse
import csv
import ctypes
import functools
import multiprocessing
import multiprocessing.connection
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageFilter

from data import DataError, workers

WORDS = "zero one two three four five six seven eight nine".split()
ACCENTS = (
    "en-us en-us-nyc en-029 en en-gb-scotland en-gb-x-rp en-gb-x-gbclan en-gb-x-gbcwmd"
).split()
SPLITS = ("train", "test")
SIZE, FPS, FRAMES = 64, 25, 50  # pixels a side, frames a second, frames a clip
RATE, SAMPLES = 22050, 44100  # espeak-ng's own sample rate; samples a clip

# Severity, fixed (see above). Each is drawn uniformly for each clip.
SCALE = (46.0, 54.0)  # pixels that the 8 cells of a scan span
TURN = (-0.15, 0.15)  # radians
SLANT = (-0.15, 0.15)  # columns per row
BLUR = (1.0, 2.0)  # pixels, standard deviation
SWING = (2.5, 5.0)  # pixels that the path leaves its middle, for each axis
SWINGS_PER_SECOND = (0.2, 0.6)
BAR_PERIOD = (16.0, 24.0)  # pixels from bar to bar
BAR_SHARE = (0.45, 0.55)  # of the picture that bars cover
BAR_SPEED = (14.0, 30.0)  # pixels a second
BACKGROUND = (40.0, 80.0)  # grey level
BAR_GREY = (45.0, 75.0)
CONTRAST = (90.0, 140.0)  # grey levels of the digit over its background
NOISE = (5.0, 10.0)  # grey levels, standard deviation
PITCH = (20.0, 80.0)  # espeak-ng's 0 ... 99
WORDS_PER_MINUTE = (130.0, 230.0)
SNR = (-3.0, 9.0)  # dB, the word's power over its own duration against the noise
LOUDNESS = (-34.0, -20.0)  # dB of full scale, the clip's whole power

_CHUNK = 100  # clips of one process; part of what the seed means (see `_make_chunk`)


class Speaker:
    """espeak-ng, loaded from espeakng-loader. One in a process: its state is global.

    What it says depends a little on what it said before (the phase of its oscillators
    is never reset), so the same words come out only of a fresh process.
    """

    def __init__(self, seed: int):
        self._library, path = _load_espeak()
        self._pieces: list[np.ndarray] = []
        # espeak-ng holds its path in a short buffer: go round a long one with a link.
        if len(path) > 100:
            self._folder = tempfile.TemporaryDirectory()
            link = Path(self._folder.name) / "espeak-ng-data"
            link.symlink_to(path)
            path = str(link)
        synchronous, keep_process_alive = 2, 0x8000
        rate = self._library.espeak_Initialize(
            synchronous, 0, os.fsencode(path), keep_process_alive
        )
        if rate != RATE:
            raise DataError(f"espeak-ng could not be started with its data in {path}")
        callback = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self._callback = callback(self._hear)  # kept: ctypes does not keep it alive
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))

    def _hear(self, samples, count, events) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, word: str, accent: str, voice: str, pitch: int, rate: int):
        """`word` as int16 [s] at 22,050 Hz, without the silence around it."""
        name = f"{accent}+{voice}"
        if self._library.espeak_SetVoiceByName(name.encode()):
            raise DataError(f"espeak-ng has no voice {name}: reinstall espeakng-loader")
        rate_parameter, pitch_parameter, utf8 = 1, 3, 1
        self._library.espeak_SetParameter(rate_parameter, rate, 0)
        self._library.espeak_SetParameter(pitch_parameter, pitch, 0)
        self._pieces.clear()
        text = word.encode()
        size = ctypes.c_size_t(len(text) + 1)
        self._library.espeak_Synth(text, size, 0, 1, 0, utf8, None, None)
        loud = np.concatenate(self._pieces)
        heard = np.flatnonzero(np.abs(loud.astype(np.int32)) > 100)
        return loud[heard[0] : heard[-1] + 1]


def _load_espeak():
    """The library and the path of its data folder."""
    try:
        import espeakng_loader
    except ImportError:
        raise DataError(
            "the demo data need espeak-ng to speak the digits: "
            'pip install -e ".[demo]" installs it (package espeakng-loader)'
        ) from None
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    return library, str(espeakng_loader.get_data_path())


def voices(split: str) -> list[str]:
    """espeak-ng's variants that speak in `split`: every other family, by name."""
    names = sorted(p.name for p in Path(_load_espeak()[1], "voices", "!v").iterdir())
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(re.sub(r"\d+$", "", name).lower(), []).append(name)
    chosen = [families[key] for key in sorted(families)][SPLITS.index(split) :: 2]
    return sorted(name for family in chosen for name in family)


def scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The split's scans uint8 [n 8 8], 0 ... 255, and their digits int64 [n]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    half = len(digits.target) // 2
    part = slice(0, half) if split == "train" else slice(half, None)
    images = np.minimum(digits.images[part] * 16, 255).astype(np.uint8)
    return images, digits.target[part]


def picture(scan: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A clip's grey frames uint8 [t h w] (video range, 16 ... 235) of one scan."""
    digit, margin = _canvas(scan, rng)
    contrast, bar_grey = rng.uniform(*CONTRAST), rng.uniform(*BAR_GREY)
    background = rng.uniform(*BACKGROUND)
    hidden = _bars(rng)  # [t h w], 0 ... 1
    noise = np.frombuffer(rng.bytes(FRAMES * SIZE * SIZE), np.uint8)
    frames = (_quantiles() * rng.uniform(*NOISE))[noise].reshape(FRAMES, SIZE, SIZE)
    scene = background + contrast * digit
    for frame, bars, (y, x) in zip(frames, hidden, _path(rng), strict=True):
        seen = _shifted(scene, margin + y, margin + x)
        frame += seen + bars * (bar_grey - seen)
    return np.clip(frames, 16, 235).astype(np.uint8)


@functools.cache
def _quantiles() -> np.ndarray:
    """256 equally likely values of the normal distribution: bytes → noise, quickly."""
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 256) for i in range(256)], np.float32)


def _canvas(scan, rng) -> tuple[np.ndarray, int]:
    """The scan, enlarged, turned, slanted and blurred, in float32 [y x], 0 ... 1.

    The canvas is larger than a frame by a margin that the path cannot leave.
    """
    margin = int(SWING[1]) + 2
    side = SIZE + 2 * margin
    scale, turn, slant = (rng.uniform(*r) for r in (SCALE, TURN, SLANT))
    step = 8 / scale
    cos, sin = step * np.cos(turn), step * np.sin(turn)
    a, b, d, e = cos, cos * slant + sin, -sin, cos - sin * slant
    padded = np.pad(scan, 2)  # the scan's middle is at 6, 6
    c, f = (6 - (p + q) * side / 2 for p, q in ((a, b), (d, e)))
    image = Image.fromarray(padded).transform(
        (side, side), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.BICUBIC
    )
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*BLUR)))
    return np.asarray(image, np.float32) / 255, margin


def _path(rng) -> np.ndarray:
    """Offsets (y, x) in pixels for each frame, float64 [t 2]: two slow swings."""
    seconds = np.arange(FRAMES)[:, None] / FPS
    speed = rng.uniform(*SWINGS_PER_SECOND, 2)
    phase = rng.uniform(0, 1, 2)
    swing = rng.uniform(*SWING, 2)
    return swing * np.sin(2 * np.pi * (speed * seconds + phase))


def _shifted(scene: np.ndarray, y: float, x: float) -> np.ndarray:
    """The [SIZE SIZE] window of `scene` whose corner is at (y, x), bilinear."""
    top, left = int(y), int(x)
    y, x = y - top, x - left
    rows = scene[top : top + SIZE + 1, left : left + SIZE + 1]
    rows = rows[:-1] + np.float32(y) * (rows[1:] - rows[:-1])
    return rows[:, :-1] + np.float32(x) * (rows[:, 1:] - rows[:, :-1])


def _bars(rng) -> np.ndarray:
    """How much bars hide of each pixel, float32 [t h w], 0 ... 1, edges soft."""
    period, share = rng.uniform(*BAR_PERIOD), rng.uniform(*BAR_SHARE)
    angle, start = rng.uniform(0, 2 * np.pi), rng.uniform()
    speed = rng.uniform(*BAR_SPEED) / period / FPS  # periods a frame
    # A bar's profile depends on one phase: 256 steps of it, looked up by wrapped bytes.
    phase = np.abs(np.arange(256) / 128 - 1)
    profile = np.clip((share - phase) * period / 4 + 0.5, 0, 1).astype(np.float32)
    y, x = np.mgrid[:SIZE, :SIZE]
    across = (y * np.sin(angle) + x * np.cos(angle)) / period
    moved = start + speed * np.arange(FRAMES)
    steps = (256 * across).astype(np.int32) + (256 * moved).astype(np.int32)[
        :, None, None
    ]
    return profile[steps.astype(np.uint8)]


def sound(word: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The spoken word (int16 [s]) at a drawn onset in pink noise, int16 [SAMPLES]."""
    word = word[:SAMPLES].astype(np.float32)
    onset = rng.integers(0, SAMPLES - len(word) + 1)
    noise = _pink_noise(rng)
    gain = 10 ** (rng.uniform(*SNR) / 20) / np.sqrt(np.mean(word**2))
    noise[onset : onset + len(word)] += gain * word
    level = 32768 * 10 ** (rng.uniform(*LOUDNESS) / 20)
    mixed = noise * (level / np.sqrt(np.mean(noise**2)))
    return np.clip(np.round(mixed), -32768, 32767).astype(np.int16)


def _pink_noise(rng) -> np.ndarray:
    """Noise of power 1 whose power falls as 1/frequency (above 20 Hz), float32 [s]."""
    bins = SAMPLES // 2 + 1
    spectrum = rng.standard_normal(2 * bins, dtype=np.float32).view(np.complex64)
    noise = np.fft.irfft(spectrum * _pink_amplitude())
    return noise / np.sqrt(np.mean(noise**2))


@functools.cache
def _pink_amplitude() -> np.ndarray:
    frequency = np.fft.rfftfreq(SAMPLES, 1 / RATE)
    amplitude = 1 / np.sqrt(np.maximum(frequency, 20))
    return np.where(frequency < 20, 0, amplitude).astype(np.float32)


def write(path, grey: np.ndarray, tint, waveform: np.ndarray) -> None:
    """One mp4 file of frames uint8 [t h w], a colour (Cb, Cr) and sound int16 [s]."""
    frame = av.VideoFrame(SIZE, SIZE, "yuv420p")  # x264 copies what it is given
    luma, *chroma = (np.frombuffer(plane, np.uint8) for plane in frame.planes)
    luma = luma.reshape(SIZE, -1)[:, :SIZE]
    for plane, value in zip(chroma, tint, strict=True):
        plane[:] = value
    with av.open(str(path), "w", format="mp4") as file:
        video = file.add_stream("libx264", FPS)
        video.width = video.height = SIZE
        video.pix_fmt = "yuv420p"
        video.options = {"preset": "ultrafast", "crf": "28"}
        video.codec_context.thread_count = 1
        audio = file.add_stream("aac", RATE, layout="mono")
        audio.codec_context.bit_rate = 64000
        audio.options = {"aac_coder": "fast"}  # the default takes four times as long
        for i, picture in enumerate(grey):
            luma[:] = picture
            frame.pts = i
            file.mux(video.encode(frame))
        file.mux(video.encode())
        samples = av.AudioFrame.from_ndarray(waveform[None], "s16", "mono")
        samples.sample_rate, samples.pts = RATE, 0
        file.mux(audio.encode(samples))
        file.mux(audio.encode())


def _draws(seed: int, split: str, number: int) -> np.random.Generator:
    return np.random.default_rng((seed, SPLITS.index(split), number))


def _make_chunk(folder, split, numbers, seed, images, labels) -> None:
    """Clips `numbers` of a split. Runs in a fresh process, words first and in order.

    That, and chunks of one fixed size, makes the sound the same for any number of jobs.
    """
    speaker = Speaker(seed=seed + numbers[0])
    generators = [_draws(seed, split, n) for n in numbers]
    words, names = [], voices(split)
    for number, rng in zip(numbers, generators, strict=True):
        voice, accent = rng.choice(names), rng.choice(ACCENTS)
        pitch, rate = int(rng.uniform(*PITCH)), int(rng.uniform(*WORDS_PER_MINUTE))
        words.append(speaker.say(WORDS[number % 10], accent, voice, pitch, rate))
    for number, rng, word in zip(numbers, generators, words, strict=True):
        scan = images[rng.choice(np.flatnonzero(labels == number % 10))]
        tint = rng.integers(108, 149, 2)
        grey = picture(scan, rng)
        write(Path(folder) / f"{number:05}.mp4", grey, tint, sound(word, rng))


def make(
    out, train: int = 4000, test: int = 4000, seed: int = 0, jobs: int = 0
) -> Path:
    """Make the data set in folder `out`; the path of its manifest `clips.csv`.

    `jobs` processes work at a time, 0: one for each processor. DataError when espeak-ng
    is not installed or a process fails.
    """
    _load_espeak()
    if min(train, test, seed, jobs) < 0:
        raise DataError("digits: train, test, seed and jobs cannot be negative")
    out = Path(out)
    rows, chunks = [], []
    for split, count in zip(SPLITS, (train, test), strict=True):
        (out / split).mkdir(parents=True, exist_ok=True)
        images, labels = scans(split)
        for first in range(0, count, _CHUNK):
            numbers = range(first, min(first + _CHUNK, count))
            chunks.append((str(out / split), split, numbers, seed, images, labels))
        paths = [f"{split}/{number:05}.mp4" for number in range(count)]
        rows += [(p, "", "", WORDS[n % 10], split) for n, p in enumerate(paths)]
    _run_in_fresh_processes(chunks, jobs or workers.processors())
    manifest = out / "clips.csv"
    with open(manifest, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "start", "end", "label", "split"))
        writer.writerows(rows)
    return manifest


def _run_in_fresh_processes(chunks: list[tuple], jobs: int) -> None:
    """`_make_chunk` of each chunk, each in a process of its own, `jobs` at a time."""
    # A fork server starts a process with the imports done; Windows has none.
    fast = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if fast else "spawn")
    if fast:
        context.set_forkserver_preload(["av", "numpy", "PIL.Image", "PIL.ImageFilter"])
    waiting, running = chunks[::-1], {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                process = context.Process(target=_make_chunk, args=waiting[-1])
                process.start()
                running[process.sentinel] = process, waiting.pop()
            for sentinel in multiprocessing.connection.wait(running):
                _check(*running.pop(sentinel))
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()


def _check(process, chunk: tuple) -> None:
    process.join()
    if process.exitcode:
        _, split, numbers, *_ = chunk
        raise DataError(
            f"making the {split} clips {numbers[0]} to {numbers[-1]} failed (exit code "
            f"{process.exitcode}; its own message is above): free the disk or memory "
            "that it lacks and run the same command again"
        )


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--test", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=0, help="0: one per processor")
    options = parser.parse_args(arguments)
    try:
        manifest = make(**vars(options))
    except DataError as error:
        print(f"data.digits: {error}", file=sys.stderr)
        return 2
    print(f"{options.train} train and {options.test} test clips: {manifest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
