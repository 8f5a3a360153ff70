"""Real clips by their table of outcomes; synthetic clips for what players do."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data import MediaError, media

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "clips"
needs_clips = pytest.mark.skipif(
    not CLIPS.is_dir(), reason=f"the development clips are not at {CLIPS}"
)


def expected_outcomes() -> list[tuple[str, str, str, str]]:
    """(file, outcome, frames, seconds of sound) of the table in the clips' README."""
    if not CLIPS.is_dir():
        return []
    text = (CLIPS / "README.md").read_text().split("## What to expect")[1]
    table = [line for line in text.splitlines() if line.startswith("| ")][1:]
    return [tuple(x.strip() for x in line.split("|")[1:5]) for line in table]


def write_video(path, frames, rate=25, sound=None, **options) -> None:
    """frames: (ms, uint8 [h w 3]); sound: (offset in samples, int16 [c s])."""
    crf = {"crf": "1", "preset": "ultrafast", "bf": "0"}
    with av.open(str(path), "w") as container:
        height, width = frames[0][1].shape[:2]
        video = container.add_stream("libx264", rate=rate, options=crf)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        video.gop_size = options.get("gop", 12)
        if "aspect" in options:
            video.codec_context.sample_aspect_ratio = options["aspect"]
        if "matrix" in options:
            video.set_display_matrix(options["matrix"])
        if sound is not None:
            audio = container.add_stream("aac", rate=48000, layout=options["layout"])
        for at, rgb in frames:
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if sound is not None:
            offset, samples = sound
            for i in range(0, samples.shape[1], 1024):
                part = samples[:, i : i + 1024].astype(np.float32) / 32768
                frame = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(part), format="fltp", layout=options["layout"]
                )
                frame.sample_rate, frame.pts = 48000, offset + i
                frame.time_base = Fraction(1, 48000)
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))


def grey(count, value=40, size=(64, 96), step=40) -> list:
    return [(i * step, np.full((*size, 3), value, np.uint8)) for i in range(count)]


def numbered(count, step=40) -> list:
    """Frame i shows the eight bits of i as black and white columns."""
    bits = (np.arange(count)[:, None] >> np.arange(8)) & 1
    columns = np.repeat(bits.astype(np.uint8) * 255, 8, axis=1)[:, None, :, None]
    pictures = np.ascontiguousarray(np.broadcast_to(columns, (count, 64, 64, 3)))
    return [(i * step, picture) for i, picture in enumerate(pictures)]


def numbers(frames) -> list[int]:
    """What `numbered` wrote."""
    bits = [frame[:, 4::8].mean((0, 2)) > 127 for frame in frames]
    return [int(np.sum(bit << np.arange(8))) for bit in bits]


def click(samples: int, at: int) -> np.ndarray:
    """int16 [1 s]: a 1 kHz tone burst of 10 ms that begins at sample `at` of 48 kHz."""
    sound = np.zeros((1, samples), np.int16)
    sound[0, at : at + 480] = 16000 * np.sin(2 * np.pi * np.arange(480) / 48)
    return sound


def onset(waveform, at: float) -> float:
    """Seconds by which the burst of `click` is later than `at` (cross-correlation)."""
    burst = np.sin(2 * np.pi * np.arange(160) / 16)
    return float(np.argmax(np.correlate(waveform.astype(float), burst)) / 16000 - at)


@needs_clips
@pytest.mark.parametrize("name, outcome, frames, seconds", expected_outcomes())
def test_real_clips(name, outcome, frames, seconds):
    if outcome == "MediaError":
        with pytest.raises(MediaError, match=f"{name}: cannot be opened.*InvalidData"):
            media.read(CLIPS / name)
        return
    clip = media.read(CLIPS / name, fps=None, short_side=64)
    assert abs(len(clip.frames) - int(frames)) <= 1
    assert ("partial" in outcome) == bool(clip.problems)
    assert ("no sound" in outcome) == (clip.waveform is None)
    if clip.waveform is not None:
        heard = len(clip.waveform) / 16000 - clip.source["silence_added"]
        assert abs(heard - float(seconds)) <= 0.1


@needs_clips
def test_facts_of_the_default_stream():
    info = media.probe(CLIPS / "nasa_two_video_streams.mp4")
    assert (info.width, info.height, info.sample_rate) == (480, 270, 16000)
    turned = media.probe(CLIPS / "rot90_three_frames.mov")
    assert (turned.width, turned.height, turned.coded_width) == (320, 568, 568)
    wide = media.probe(CLIPS / "mmaction_demo_silent.mp4")  # pixels are 64:51
    assert (wide.width, wide.height, wide.coded_height) == (340, 204, 256)


@needs_clips
def test_damage_is_told():
    half = media.read(CLIPS / "truncated_half.mkv", short_side=64)
    assert half.problems == ("data end after 5.0 s though the header claims 10.4 s",)
    bad = media.read(CLIPS / "corrupted_packets.mp4", short_side=64)
    assert len(bad.problems) == 1 and "1 bad packet in the picture" in bad.problems[0]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("late", [0.0, 0.35])
def test_click_and_flash(tmp_path, suffix, late):
    """Sound that begins late gets silence before it; click and flash stay one."""
    frames = grey(50)
    frames[25] = (1000, np.full((64, 96, 3), 250, np.uint8))
    sound = click(96000, 48000 - round(late * 48000))
    path = tmp_path / f"clip.{suffix}"
    write_video(path, frames, sound=(round(late * 48000), sound), layout="mono")
    clip = media.read(path)
    flash = int(np.argmax([frame.mean() for frame in clip.frames])) / clip.fps
    assert flash == 1.0
    assert abs(onset(clip.waveform, flash)) <= 1e-3
    assert abs(clip.source["silence_added"] - late) <= 0.03  # AAC's own start
    cut = media.read(path, start=0.52, end=1.48)
    assert (
        cut.problems == ()
        and len(cut.frames) == 24
        and len(cut.waveform) == round(0.96 * 16000)
    )
    assert abs(onset(cut.waveform, 0.48)) <= 1e-3
    assert int(np.argmax([frame.mean() for frame in cut.frames])) == 12


def test_late_picture_trims_the_sound(tmp_path):
    frames = [(at + 400, rgb) for at, rgb in grey(40)]
    sound = click(96000, 48000)
    write_video(tmp_path / "clip.mkv", frames, sound=(0, sound), layout="mono")
    waveform = media.read_audio(tmp_path / "clip.mkv")
    assert abs(onset(waveform, 0.6)) <= 1e-3


def test_missing_sound_is_silence(tmp_path):
    """A gap in the timestamps keeps the sound after it in its place."""
    path = tmp_path / "gap.mkv"
    with av.open(str(path), "w") as container:
        audio = container.add_stream("pcm_s16le", rate=48000, layout="mono")
        samples = click(96000, 72000)
        for i in [*range(0, 24000, 1000), *range(60000, 96000, 1000)]:
            frame = av.AudioFrame.from_ndarray(
                samples[:, i : i + 1000].copy(), "s16", "mono"
            )
            frame.sample_rate, frame.pts = 48000, i
            frame.time_base = Fraction(1, 48000)
            container.mux(audio.encode(frame))
    clip = media.read(path)
    assert clip.frames is None and abs(len(clip.waveform) - 32000) <= 8
    assert abs(onset(clip.waveform, 1.5)) <= 1e-3
    assert abs(clip.source["silence_added"] - 0.75) <= 1e-3


def corners() -> np.ndarray:
    """[64 96 3]: top left white, top right grey, the rest black."""
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:32, :48], picture[:32, 48:] = 255, 128
    return picture


ORIENTATIONS = {  # display matrix a b c d → the picture as a player shows it
    "as it is": ([1, 0, 0, 1], lambda x: x),
    "half turn": ([-1, 0, 0, -1], lambda x: np.rot90(x, 2)),
    "clockwise": ([0, 1, -1, 0], lambda x: np.rot90(x, -1)),
    "counterclockwise": ([0, -1, 1, 0], lambda x: np.rot90(x, 1)),
    "mirrored": ([-1, 0, 0, 1], np.fliplr),
    "upside down": ([1, 0, 0, -1], np.flipud),
    "transposed": ([0, 1, 1, 0], lambda x: x.transpose(1, 0, 2)),
    "anti-transposed": ([0, -1, -1, 0], lambda x: np.rot90(x, 2).transpose(1, 0, 2)),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_orientation(tmp_path, name):
    (a, b, c, d), shown = ORIENTATIONS[name]
    matrix = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    path = tmp_path / "clip.mp4"
    write_video(path, [(0, corners()), (40, corners())], matrix=matrix)
    frame = next(media.read_frames(path))
    want = shown(corners())
    assert frame.shape == want.shape
    assert np.abs(frame.astype(int) - want)[::8, ::8].mean() < 3


@pytest.mark.parametrize(
    "aspect, short_side, size",
    [
        (Fraction(2, 1), None, (32, 96)),  # wide pixels: lower, never wider
        (Fraction(1, 2), None, (64, 48)),
        (Fraction(1, 1), 40, (40, 60)),
        (Fraction(1, 1), 500, (64, 96)),  # never enlarged
        (Fraction(64, 51), 22, (22, 42)),  # 41.4 → even
    ],
)
def test_sizes(tmp_path, aspect, short_side, size):
    path = tmp_path / "clip.mp4"
    write_video(path, grey(2), aspect=aspect)
    assert next(media.read_frames(path, short_side=short_side)).shape == (*size, 3)


def test_the_frame_that_is_shown(tmp_path):
    """Frames at irregular times, resampled: what a player has on the screen."""
    path = tmp_path / "clip.mkv"
    times = [0, 30, 100, 110, 120, 400, 433, 480]
    shown = [(at, rgb) for at, (_, rgb) in zip(times, numbered(8), strict=True)]
    write_video(path, shown)
    want = [max(i for i, at in enumerate(times) if at <= 40 * k) for k in range(13)]
    got = numbers(media.read_frames(path, fps=25.0))
    assert got[:13] == want and len(got) in (13, 14)  # the last is held 480/7 ms
    assert numbers(media.read_frames(path, fps=10.0)) == [0, 2, 4, 4, 5, 7]
    own = media.read(path, fps=None)
    assert len(own.frames) == 8 and abs(own.fps - 7 / 0.48) < 1e-6


def test_rates(tmp_path):
    """30 to 25 a second drops every sixth frame; the source rate gives each frame."""
    path = tmp_path / "clip.mp4"
    write_video(
        path, [(round(i * 1000 / 30), x) for i, (_, x) in enumerate(numbered(60))]
    )
    assert numbers(media.read_frames(path, fps=25.0)) == [
        k * 30 // 25 for k in range(50)
    ]
    assert numbers(media.read_frames(path)) == list(range(60))


@pytest.mark.parametrize("start, end", [(1.0, 2.0), (3.01, None), (0.0, 1.0)])
def test_cut(tmp_path, start, end):
    """A cut by seeking gives what decoding everything gives (keyframes every 10 s)."""
    path = tmp_path / "clip.mp4"
    write_video(path, numbered(100), gop=250)
    whole = numbers(media.read_frames(path, fps=25.0))
    assert whole == list(range(100))
    got = numbers(media.read_frames(path, fps=25.0, start=start, end=end))
    last = 100 if end is None else round(end * 25)
    assert got == [int(start * 25 + k) for k in range(last - int(start * 25))]


def test_cut_outside(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, grey(10))
    with pytest.raises(
        MediaError, match="clip.mp4: gives neither.*nothing lies after 5"
    ):
        media.read(path, start=5.0)
    with pytest.raises(MediaError, match="clip.mp4: start 2.0 and end 1.0"):
        media.read(path, start=2.0, end=1.0)


@pytest.mark.parametrize(
    "layout, gains",
    [
        ("mono", [1.0]),
        ("stereo", [0.5, 0.5]),
        ("5.1", np.array([0.5**0.5, 0.5**0.5, 1, 0, 0.5, 0.5]) / (2 + 2**0.5)),
    ],
)
def test_down_mix(tmp_path, layout, gains):
    for channel, gain in enumerate(gains):
        samples = np.zeros((len(gains), 24000), np.int16)
        samples[channel] = 8000
        path = tmp_path / f"{channel}.wav"
        with av.open(str(path), "w") as container:
            audio = container.add_stream("pcm_s16le", rate=48000, layout=layout)
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(samples.T.reshape(1, -1)), "s16", layout
            )
            frame.sample_rate, frame.pts = 48000, 0
            container.mux(audio.encode(frame))
        waveform = media.read_audio(path)
        assert waveform.dtype == np.int16 and abs(len(waveform) - 8000) <= 1
        assert abs(waveform[2000:6000].mean() - 8000 * gain) <= 1


def test_other_sample_rate(tmp_path):
    write_video(tmp_path / "c.mp4", grey(25), sound=(0, click(48000, 0)), layout="mono")
    assert abs(len(media.read_audio(tmp_path / "c.mp4", 8000)) - 8000) <= 256


@pytest.mark.parametrize("samples", [48000, 48001, 49151, 49152])
def test_what_the_encoder_filled_up_is_no_sound(tmp_path, samples):
    """AAC fills its last frame of 1024 samples; MP4 tells how much of it is sound."""
    path = tmp_path / "clip.mp4"
    write_video(path, grey(25), sound=(0, click(samples, 0)), layout="mono")
    assert len(media.read_audio(path)) == round(samples / 3)
    assert len(media.read_audio(path, start=0.5)) == round((samples - 24000) / 3)


def test_unreadable(tmp_path):
    """A missing file, a pipe, a playlist, a cover picture: a reason, never a wait."""
    with pytest.raises(MediaError, match="there is no such file"):
        media.read(tmp_path / "absent.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(MediaError, match="there is no such file"):
        media.read(tmp_path / "pipe.mp4")
    write_video(tmp_path / "real.ts", grey(5))
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nreal.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    assert media.read(tmp_path / "real.ts").frames.shape == (5, 64, 96, 3)
    with pytest.raises(MediaError, match="list.m3u8: cannot be opened"):
        media.read(tmp_path / "list.m3u8")


def test_wild_timestamps(tmp_path):
    """A timestamp that jumps by hours neither fills the disk nor loses the clip."""
    path = tmp_path / "clip.mkv"
    frames = [(at + (i >= 10) * 9_000_000, x) for i, (at, x) in enumerate(numbered(20))]
    write_video(path, frames)
    clip = media.read(path)
    assert numbers(clip.frames) == list(range(20))
    assert "1 broken timestamp in the picture" in clip.problems


def test_stream_is_the_same(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, numbered(30), sound=(0, click(9600, 0)), layout="mono")
    whole, stream = media.read(path), media.read(path, stream=True)
    np.testing.assert_array_equal(whole.frames, np.stack(list(stream.frames)))
    np.testing.assert_array_equal(whole.waveform, stream.waveform)
    assert tuple(stream.problems) == whole.problems
    assert whole.problems == ("sound ends after 0.2 s of 1.2 s",)


def coded(path, **options) -> list:
    return list(media.read(path, stream=True, coded=True, **options).frames)


def test_frames_to_be_encoded_stay_as_they_are_coded(tmp_path):
    """Not scaled: the file's own values. Scaled: what RGB gives, but for rounding."""
    path = tmp_path / "clip.mp4"
    write_video(path, numbered(6))
    rgb = media.read(path).frames
    kept = coded(path)
    assert [type(frame) for frame in kept] == [av.VideoFrame] * 6
    for frame, want in zip(kept, rgb, strict=True):
        np.testing.assert_array_equal(frame.to_ndarray(format="rgb24"), want)
    small, rgb = coded(path, short_side=32), media.read(path, short_side=32).frames
    for frame, want in zip(small, rgb, strict=True):
        assert (frame.format.name, frame.height) == ("yuv420p", 32)
        assert np.abs(frame.to_ndarray(format="rgb24") - want.astype(int)).mean() < 3


@pytest.mark.parametrize("name", ["clockwise", "mirrored"])
def test_frames_that_have_to_be_turned_go_through_rgb(tmp_path, name):
    (a, b, c, d), _ = ORIENTATIONS[name]
    matrix = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    path = tmp_path / "clip.mp4"
    write_video(path, [(0, corners()), (40, corners())], matrix=matrix)
    np.testing.assert_array_equal(np.stack(coded(path)), media.read(path).frames)


@pytest.mark.parametrize("options", [{"colorspace": "bt709"}, {"color_range": "pc"}])
def test_frames_of_other_colours_go_through_rgb(tmp_path, options):
    """Records have BT.601's matrix in the limited range."""
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"crf": "1"} | options)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        for i, (_, rgb) in enumerate(numbered(3)):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(video.encode(frame.reformat(format="yuv420p")))
        container.mux(video.encode(None))
    np.testing.assert_array_equal(np.stack(coded(path)), media.read(path).frames)


@pytest.mark.parametrize("rate", [16000, 11025])
def test_resampling_in_pieces_is_resampling_at_once(tmp_path, monkeypatch, rate):
    path = tmp_path / "clip.mkv"
    noise = np.random.default_rng(0).integers(-9000, 9000, (2, 96000), np.int16)
    write_video(path, grey(50), sound=(0, noise), layout="stereo")
    found = []
    for at_once in (1, 5000, 10**9):
        monkeypatch.setattr(media, "RESAMPLED_AT_ONCE", at_once)
        found.append(media.read_audio(path, rate))
    assert abs(len(found[0]) - 2 * rate) < 0.03 * rate
    assert all(np.array_equal(found[0], x) for x in found[1:])


PEAK = r"""
import re, sys
from pathlib import Path
from data import media
clip = media.read(sys.argv[1], stream=True)
count = sum(1 for _ in clip.frames)
# Not ru_maxrss: a process inherits its parent's peak there.
peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
print(count, int(peak[1]) // 1024)
"""


def peak_memory(path) -> tuple[int, int]:
    """Frames and peak MiB of a process that reads the file."""
    answer = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    count, mebibytes = answer.stdout.split()
    return int(count), int(mebibytes)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells peaks")
def test_memory_does_not_grow_with_length(tmp_path):
    """10 and 100 s of 640 x 480 (23 and 230 MB of frames at short side 256)."""
    for seconds in (10, 100):
        frames = [
            (i * 200, x) for i, (_, x) in enumerate(grey(5 * seconds, size=(480, 640)))
        ]
        write_video(tmp_path / f"{seconds}.mkv", frames, rate=5)
    short, long = (peak_memory(tmp_path / f"{seconds}.mkv") for seconds in (10, 100))
    assert (short[0], long[0]) == (250, 2500)
    assert long[1] < short[1] + 30 and long[1] < 600
