"""A user's folder of short clips, and the commands as a user types them."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("bell", "drum")
RATE = 44100


def write_clip(path: Path, number: int, sound: bool = True, seconds: float = 1.5):
    """A bright square that moves over a dark ground, and a tone, as H.264 and AAC.

    The class of clip n is n mod 2; it is in the square's colour and the tone's height.
    """
    kind, rng = number % len(CLASSES), np.random.default_rng(number)
    height, width = (48, 64) if number % 3 else (64, 48)
    x, y = rng.integers(0, (width - 24, height - 24))
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "threads": "1"}
        video = container.add_stream("libx264", rate=25, options=options)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        if sound:
            audio = container.add_stream("aac", rate=RATE, layout="mono")
        for i in range(round(seconds * 25)):
            picture = np.full((height, width, 3), 30, np.uint8)
            left = (x + i) % (width - 16)
            picture[y : y + 16, left : left + 16, kind] = 220
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if sound:
            time = np.arange(round(seconds * RATE)) / RATE
            tone = 0.3 * np.sin(2 * np.pi * (300 + 900 * kind) * time)
            tone += rng.normal(0, 0.01, time.shape)
            for start in range(0, len(tone) - 1023, 1024):
                part = tone[None, start : start + 1024].astype(np.float32)
                frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
                frame.sample_rate, frame.pts = RATE, start
                frame.time_base = Fraction(1, RATE)
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))


def write_folder(folder: Path, count: int = 16, silent=(), broken: bool = False):
    """`folder`/<class>/<number>.mp4; `silent` clips have no audio stream."""
    for number in range(count):
        path = folder / CLASSES[number % len(CLASSES)] / f"{number:02d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, number, sound=number not in silent)
    if broken:
        (folder / CLASSES[0] / "broken.mp4").write_text("no video at all")


def start(*command, **environment) -> subprocess.Popen:
    """`python COMMAND…`, from the root of the repository, on the CPU."""
    # Programs that run a few steps are compiled faster than they would be optimised.
    common = dict(
        JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1", COLUMNS="200"
    )
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | common | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """What the command printed, output and log together; it must exit with `code`."""
    text, _ = process.communicate(timeout=600)
    assert process.returncode == code, f"exit code {process.returncode}:\n{text}"
    return text


def run(*command, code: int = 0, **environment) -> str:
    """The command from start to end."""
    return finish(start(*command, **environment), code)
