"""How fast clips become records, beside what FFmpeg's own program takes for the work.

Both decode with one thread, scale to the same size, bring to the same rate and encode
with the same settings, picture and sound, one clip after the other. Counted is the time
that the processor works for them (user and system), so that other programs on the
machine do not matter; a program's start counts for FFmpeg, which is started once a
clip, and reading a file's SHA-256 for us.
"""

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from data import MediaError, manifest, media, records, sharding

SETTINGS = dict(fps=25.0, short_side=256, sample_rate=16000, version=0)
MJPEG_SCALE = 3  # FFmpeg's own scale; about as many bytes as Pillow's quality 90
AS_STORED = {
    "h264": ["-c:v", "libx264", "-f", "mp4"],
    "jpeg": ["-c:v", "mjpeg", "-q:v", str(MJPEG_SCALE), "-f", "mjpeg"],
}


def find_ffmpeg() -> str | None:
    """The program that $FFMPEG names, or `ffmpeg` on the path; None where none is."""
    return shutil.which(os.environ.get("FFMPEG") or "ffmpeg")


def compare(source, ffmpeg: str | None = None, repeats: int = 1) -> list[dict]:
    """Clips per second of one core, ours and FFmpeg's, for each way to store pictures.

    Args:
        source: a folder or CSV of clips; those that cannot be decoded do not count.
        ffmpeg: the program; None: `find_ffmpeg()`.
        repeats: times that each clip is prepared; the fastest counts.

    Returns:
        For "h264" and "jpeg" a dict of `frames`, `clips`, `ours` and, where FFmpeg was
        found, `ffmpeg` (clips a second of a core) and `ratio`, ours over FFmpeg's.
    """
    ffmpeg = ffmpeg or find_ffmpeg()
    rows = [row for row in manifest.rows(source) if _size(row.path)]
    found = []
    for frames in AS_STORED:
        ours = theirs = 0.0
        for row in rows:
            ours += _fastest(lambda row=row, kind=frames: _prepare(row, kind), repeats)
            if ffmpeg:
                line = command(ffmpeg, row.path, frames)
                theirs += _fastest(lambda line=line: _convert(line), repeats)
        entry = dict(frames=frames, clips=len(rows), ours=len(rows) / ours)
        if ffmpeg:
            entry |= dict(ffmpeg=len(rows) / theirs, ratio=theirs / ours)
        found.append(entry)
    return found


def lines(found: Iterable[dict]) -> list[str]:
    """What `compare` found, a sentence each."""
    told = []
    for entry in found:
        text = (
            f"{entry['frames']}: {entry['ours']:.2f} clips a second of a core "
            f"({entry['clips']} clips)"
        )
        if "ratio" in entry:
            text += f", ffmpeg {entry['ffmpeg']:.2f}: {entry['ratio']:.2f} of it"
        told.append(text + ".")
    if not any("ratio" in entry for entry in found):
        told.append(
            "No ffmpeg was found to compare with; install it or name it in $FFMPEG."
        )
    return told


def _size(path: Path) -> tuple[int, int] | None:
    """(width, height) that a clip's picture gets; None without a picture."""
    try:
        frame = next(media.read_frames(path, short_side=SETTINGS["short_side"]), None)
    except MediaError:
        return None
    return None if frame is None else frame.shape[1::-1]


def _fastest(work: Callable[[], None], repeats: int) -> float:
    """Seconds of processor time, of this process and of those that it waited for."""
    times = []
    for _ in range(repeats):
        before = _used()
        work()
        times.append(_used() - before)
    return min(times)


def _used() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _prepare(row: manifest.Row, frames: str) -> None:
    job = sharding.Job(row, (), SETTINGS | dict(frames=frames))
    for _ in sharding.make_record(job):
        pass


def command(ffmpeg: str, path: Path, frames: str) -> list[str]:
    """FFmpeg's command for the same work: pictures to one file, sound to another."""
    width, height = _size(path)
    with media.open_media(path) as container:
        streams = [media.choose_stream(container, x) for x in ("video", "audio")]
        picture, sound = (None if s is None else f"0:{s.index}" for s in streams)
    line = [ffmpeg, "-v", "error", "-nostdin", "-y", "-threads", "1"]
    line += ["-i", str(path), "-filter_threads", "1"]
    line += ["-vf", f"fps={SETTINGS['fps']},scale={width}:{height}:flags=bicubic"]
    line += ["-map", picture, "-threads", "1", "-pix_fmt", "yuv420p"]
    if frames == "h264":
        for name, value in records.X264.items():
            line += [f"-{name}", value]
    else:
        line += ["-color_range", "pc", "-strict", "unofficial"]
    line += [*AS_STORED[frames], "{out}/picture"]
    if sound is None:
        return line
    line += [
        "-map",
        sound,
        "-ac",
        "1",
        "-ar",
        str(SETTINGS["sample_rate"]),
    ]
    return [*line, "-threads", "1", "-c:a", "flac", "-f", "flac", "{out}/sound"]


def _convert(line: list[str]) -> None:
    with tempfile.TemporaryDirectory() as out:
        line = [part.replace("{out}", out) for part in line]
        done = subprocess.run(line, capture_output=True, check=False)
        picture = Path(out) / "picture"
        if not picture.is_file() or not picture.stat().st_size:
            raise RuntimeError(f"ffmpeg made no picture: {done.stderr.decode()[-300:]}")
