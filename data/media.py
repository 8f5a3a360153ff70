"""One media file → frames and waveform, or MediaError.

Headers are never trusted for counts, rates or lengths: everything is measured on the
decoded frames and their timestamps. What can be decoded is given; what was lost is told
in `problems`. Pictures are scaled as they are decoded, so that memory does not grow
with the length of the file (`read(..., stream=True)`); sound takes 2 bytes a sample.

Time 0 is the presentation of the first decoded picture (of the first sound where there
is no picture), plus `start` where the clip is cut.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from data import Clip, MediaError

# A playlist makes FFmpeg open other files, or the network: these formats stay out.
PLAYLISTS = set("concat concatf dash hls imf image2 lavfi rtsp sdp".split())
FORMATS = ",".join(sorted(av.formats_available - PLAYLISTS))
MAX_PIXELS = 8192 * 4608  # 8K is 7680 x 4320; more is a forged header
MAX_GAP = 60.0  # s for which one picture is held; more is a broken timestamp
MAX_SILENCE = 3600.0  # s of missing sound that are filled; more is a broken timestamp
MAX_BACKWARD = 1.0  # s by which a timestamp may fall back before it is a new start
TOLERANCE = 1e-3  # s; Matroska rounds its timestamps to 1 ms
SOUND_JITTER = 0.015  # s; Vorbis is 10 ms off its timestamps, an AAC frame is 21 ms
WORTH_TELLING = 0.5  # s that picture, sound and header may differ in length
MAX_READ_ERRORS = 100
BT601 = (2, 5, 6)  # FFmpeg's numbers: unspecified, BT.470BG, SMPTE 170M
LIMITED = (0, 1)  # unspecified, MPEG
RESAMPLED_AT_ONCE = 16384  # samples; with one frame at a time it takes twice as long


@dataclass(frozen=True)
class MediaInfo:
    """Facts of a file; `fps` and `seconds` are the header's claims, not to be trusted.

    `width`, `height`: the picture as it is shown at its own size, that is rotated and
    with square pixels (0: no picture can be decoded). `origin`: the file's own time
    (seconds) of the first decoded picture, or of the first sound without picture.
    """

    container: str
    bytes: int
    origin: float
    seconds: float | None = None
    video_codec: str | None = None
    width: int = 0
    height: int = 0
    coded_width: int = 0
    coded_height: int = 0
    pixel_aspect: float = 1.0
    fps: float | None = None
    audio_codec: str | None = None
    sample_rate: int = 0
    channels: int = 0


@dataclass
class Decoding:
    """How the decoding of one stream (`kind`: picture or sound) went."""

    kind: str
    bad_packets: int = 0
    read_errors: int = 0
    jumps: int = 0
    reason: str = ""
    oddities: list[str] = field(default_factory=list)
    seconds: float = 0.0  # where the decoded part ends, from time 0 of the clip
    filled: float = 0.0  # seconds of silence put in where there was no sound

    def problems(self) -> list[str]:
        """Its sentences; empty where nothing went wrong."""
        count = {
            "bad packet": self.bad_packets,
            "read error": self.read_errors,
            "broken timestamp": self.jumps,
        }
        told = [f"{n} {name}{'s' * (n > 1)}" for name, n in count.items() if n]
        because = f" ({self.reason})" if self.reason else ""
        texts = [f"{text} in the {self.kind}{because}" for text in told]
        return texts + self.oddities

    def try_to(self, function: Callable, *arguments) -> None:
        """Calls what FFmpeg may refuse to do with damaged data, and counts that."""
        try:
            function(*arguments)
        except (av.FFmpegError, MemoryError, ValueError) as error:
            self.bad_packets += 1
            self.reason = _reason(error)

    def note(self, text: str) -> None:
        """Keeps an oddity, once."""
        if text not in self.oddities:
            self.oddities.append(text)


class Geometry(NamedTuple):
    """From the coded to the shown picture: scale to width x height, transpose, flip."""

    width: int
    height: int
    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False


# ---------------------------------------------------------------- open, choose, decode


# Metadata that is no UTF-8 must not cost the clip; PyAV 19 takes it as it is.
_LENIENT = (
    {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
)


def open_media(path) -> av.container.InputContainer:
    """Opens a file with FFmpeg; MediaError with the reason where it cannot be.

    Only a regular file is opened (a pipe could block for ever) and nothing it refers
    to.
    """
    path = Path(path)
    if not path.is_file():
        raise MediaError(f"{path}: there is no such file; correct the path.")
    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
    try:
        return av.open(f"file:{path}", options=options, **_LENIENT)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(
            f"{path}: cannot be opened as media ({_reason(error)}; "
            f"{path.stat().st_size} bytes); replace or remove the file."
        ) from None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"


def choose_stream(container, kind: str):
    """The stream of `kind` ("video", "audio") to decode: marked default, else the best.

    Several marked, or none: FFmpeg's best (largest picture, most channels). A cover
    picture, or a stream that no decoder knows, is no choice; None where nothing is
    left.
    """
    usable = [
        stream
        for stream in getattr(container.streams, kind)
        if stream.codec_context is not None
        and not stream.disposition & Disposition.attached_pic
    ]
    marked = [stream for stream in usable if stream.disposition & Disposition.default]
    choice = marked or usable
    best = container.streams.best(kind)
    return best if best in choice else next(iter(choice), None)


def _decode(container, stream, decoding: Decoding) -> Iterator:
    """Frames of a stream, packet by packet, going on after a bad one."""
    stream.codec_context.thread_count = (
        1  # files are read side by side, not each faster
    )
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    while decoding.read_errors < MAX_READ_ERRORS:
        try:
            for packet in container.demux(stream):
                yield from _decode_packet(packet, decoding)
            return
        except av.FFmpegError as error:  # in reading; the next read goes on behind it
            decoding.read_errors += 1
            decoding.reason = _reason(error)


def _decode_packet(packet, decoding: Decoding) -> list:
    try:
        return packet.decode()
    except av.EOFError:
        return []
    except (av.FFmpegError, MemoryError, ValueError) as error:
        decoding.bad_packets += 1
        decoding.reason = _reason(error)
        return []


def _seek(container, stream, seconds: float) -> bool:
    try:
        container.seek(int(seconds / stream.time_base), stream=stream)
        return True
    except (av.FFmpegError, OverflowError):
        return False


def _frames_from(path, kind: str, begin: float | None, preroll, decoding) -> Iterator:
    """Decoded frames of a file, the first of them at or before `begin` if there is one.

    Seeks to `preroll` seconds before `begin` (file time); an index may lead to a frame
    that is shown later than that, so further back if need be, at last not at all.
    """
    backs = () if begin is None else (preroll, preroll + 2.0, preroll + 10.0)
    for back in (*backs, None):
        decoding.__init__(decoding.kind)
        with open_media(path) as container:
            stream = choose_stream(container, kind)
            if back is not None and not _seek(container, stream, begin - back):
                continue
            frames = _decode(container, stream, decoding)
            first = next(frames, None)
            if back is None or (
                first is not None and _time(first) <= begin + TOLERANCE
            ):
                yield from itertools.chain([first] if first else [], frames)
                return


def _time(frame) -> float:
    """Seconds on the file's clock; NaN where the frame has no timestamp."""
    return math.nan if frame.time is None else float(frame.time)


def probe(path) -> MediaInfo:
    """The facts of a file, from its header and the first frame that can be decoded.

    MediaError where neither a picture nor a sound can be decoded.
    """
    picture, sound, first = Decoding("picture"), Decoding("sound"), None
    with open_media(path) as container:
        video = choose_stream(container, "video")
        audio = choose_stream(container, "audio")
        facts = dict(container=container.format.name, bytes=Path(path).stat().st_size)
        facts["seconds"] = _claimed_seconds(container, video, audio)
        if audio is not None:
            context = audio.codec_context
            facts |= dict(audio_codec=context.name, channels=context.channels)
            facts["sample_rate"] = context.sample_rate
        if video is not None:
            facts["video_codec"] = video.codec_context.name
            facts["fps"] = float(video.average_rate) if video.average_rate else None
            facts["pixel_aspect"] = _pixel_aspect(video)
            first = next(_decode(container, video, picture), None)
        if first is not None:
            facts |= _sizes(first, facts["pixel_aspect"])
    if first is None and audio is not None:
        first = next(_frames_from(path, "audio", None, 0.0, sound), None)
    if first is None:
        why = picture.reason or sound.reason or "it holds no stream that can be decoded"
        raise MediaError(
            f"{path}: gives neither picture nor sound ({why}); "
            "replace or remove the file."
        )
    origin = _time(first)
    return MediaInfo(origin=0.0 if math.isnan(origin) else origin, **facts)


def length(path) -> float:
    """Seconds from a file's header or, where that is silent, from its timestamps.

    MediaError where it cannot be opened.
    """
    with open_media(path) as container:
        streams = [choose_stream(container, kind) for kind in ("video", "audio")]
        claimed = _claimed_seconds(container, *streams)
        stream = next((stream for stream in streams if stream is not None), None)
        if claimed is not None or stream is None:
            return claimed or 0.0
        packets = (p for p in _packets(container, stream) if p.pts is not None)
        times = [float(packet.pts * packet.time_base) for packet in packets]
        return max(times) - min(times) if times else 0.0


def _claimed_seconds(container, *streams) -> float | None:
    """The length that the header claims for these streams, or for the whole file."""
    known = [s.duration * s.time_base for s in streams if s is not None and s.duration]
    if known:
        return float(max(known))
    return container.duration / av.time_base if container.duration else None


# ----------------------------------------------------------------------------- picture


def _pixel_aspect(stream) -> float:
    """Width of a pixel / its height; 1 where it is not given or cannot be true."""
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 1 / 16 <= aspect <= 16 else 1.0


def geometry(frame, pixel_aspect: float, short_side: int | None) -> Geometry:
    """How to show `frame`: square pixels, upright, short side at most `short_side`.

    Sizes are even (H.264 4:2:0 needs it) and never larger than the coded picture: wide
    pixels make it lower, tall ones narrower. The display matrix is read as FFmpeg's
    libavutil/display.h says, x' = a x + c y and y' = b x + d y, mirroring included.
    """
    width = frame.width * min(pixel_aspect, 1.0)
    height = frame.height / max(pixel_aspect, 1.0)
    shrink = min(1.0, (short_side or math.inf) / min(width, height))
    width = _even(width * shrink, frame.width)
    height = _even(height * shrink, frame.height)
    a, b, c, d = _display_matrix(frame)
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Geometry(width, height, False, flip_rows=d < 0, flip_columns=a < 0)
    return Geometry(width, height, True, flip_rows=b < 0, flip_columns=c < 0)


def _even(size: float, limit: int) -> int:
    """The nearest even number that does not exceed `limit`; at least 2."""
    return max(2, min(2 * round(size / 2), limit // 2 * 2))


def _display_matrix(frame) -> list[int]:
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return [1, 0, 0, 1]
    a, b, _, c, d = np.frombuffer(bytes(data), "<i4")[:5].tolist()
    return [a, b, c, d]


def _sizes(frame, pixel_aspect: float) -> dict:
    width, height, transpose, *_ = geometry(frame, pixel_aspect, None)
    shown = (height, width) if transpose else (width, height)
    names = ("width", "height", "coded_width", "coded_height")
    return dict(zip(names, (*shown, frame.width, frame.height), strict=True))


class Scaler:
    """Decoded frames at the size at which they are shown (FFmpeg's swscale, bicubic).

    One serves a whole clip: setting one up costs more than scaling a frame.
    """

    def __init__(self):
        self._scale, self._convert = VideoReformatter(), VideoReformatter()

    def coded(self, frame, place: Geometry) -> av.VideoFrame | None:
        """In yuv420p, BT.601, limited range, as records have it; None: only by `rgb`.

        It has to be upright, 8 bit 4:2:0 in the limited range with BT.601's matrix
        (which is what FFmpeg takes it for where it does not say). The way through RGB
        and back takes several times as long and costs 1 of 255 in the mean.
        """
        if place[2:] != (False, False, False) or frame.format.name != "yuv420p":
            return None
        if int(frame.colorspace) not in BT601 or int(frame.color_range) not in LIMITED:
            return None
        size = place.width, place.height
        return self._scale.reformat(frame, *size, interpolation="BICUBIC", threads=1)

    def rgb(self, frame, place: Geometry) -> np.ndarray:
        """uint8 [h w 3]; of frames that can be `coded`, what their records will give.

        Scaled in RGB they would be darker by 1 to 2 of 255, and take longer.
        """
        small = self.coded(frame, place)
        if small is None:
            size = place.width, place.height
            found = self._convert.reformat(
                frame, *size, "rgb24", interpolation="BICUBIC", threads=1
            )
        else:
            found = self._convert.reformat(small, format="rgb24", threads=1)
        rgb = found.to_ndarray()
        if place.transpose:
            rgb = rgb.transpose(1, 0, 2)
        rgb = rgb[:: -1 if place.flip_rows else 1, :: -1 if place.flip_columns else 1]
        return np.ascontiguousarray(rgb)


def _forward(frames: Iterable, origin: float, decoding: Decoding) -> Iterator:
    """(seconds from `origin`, frame), strictly rising, as a player would show them.

    A missing timestamp is the last one and a mean interval; a frame whose time has
    passed is left out; where a timestamp jumps wildly, time runs on by a mean interval.
    """
    before, shift, interval, steps = None, 0.0, 0.04, 0
    for frame in frames:
        seconds = _time(frame) - origin + shift
        if before is None:
            seconds = 0.0 if math.isnan(seconds) else seconds
        elif math.isnan(seconds):
            seconds = before + interval
        elif not -MAX_BACKWARD <= seconds - before <= MAX_GAP:
            decoding.jumps += 1
            shift += before + interval - seconds
            seconds = before + interval
        if before is not None:
            if seconds <= before:
                continue
            steps += 1
            interval += (seconds - before - interval) / steps
        before = seconds
        decoding.seconds = seconds + interval
        yield seconds, frame


def source_rate(path, info: MediaInfo, start=None, end=None) -> float:
    """Mean frames a second between `start` and `end`, from timestamps; nothing decoded.

    One picture alone has no rate: the header's is taken if sane, else 25.
    """
    stop = math.inf if end is None else info.origin + end
    times = []
    with open_media(path) as container:
        stream = choose_stream(container, "video")
        if start:
            _seek(container, stream, info.origin + start)
        for packet in _packets(container, stream):
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is None or packet.is_discard:
                continue
            times.append(float(stamp * packet.time_base))
            if times[-1] > stop + 1.0:  # B frames: a later packet may be shown earlier
                break
    steps = np.diff(np.unique([time for time in times if time <= stop]))
    steps = steps[steps <= MAX_GAP]
    if steps.size:
        return float(1.0 / steps.mean())
    return info.fps if info.fps and 1.0 <= info.fps <= 240.0 else 25.0


def _packets(container, stream) -> Iterator:
    for _ in range(MAX_READ_ERRORS):
        try:
            yield from container.demux(stream)
            return
        except av.FFmpegError:
            continue


def _resample(
    timed: Iterable, fps: float, late: float, stop: float, decoding
) -> Iterator:
    """Of (seconds, frame), the one that is being shown at 0, 1/fps, 2/fps, … < stop.

    A frame counts as shown from `late` seconds before its time. The first is shown from
    0 even if it comes later, the last one for a mean interval. A frame may come
    repeatedly.
    """
    held, slot = None, 0
    for seconds, frame in timed:
        while held is not None and slot / fps + late < seconds:
            if slot / fps >= stop - TOLERANCE:
                return
            yield held
            slot += 1
        held = frame
    stop = min(stop, decoding.seconds)
    while held is not None and (slot / fps < stop - late or slot == 0 < stop):
        yield held
        slot += 1


def _pictures(
    path, info, fps, late, short_side, start, end, decoding, coded
) -> Iterator:
    """The wanted frames as uint8 [h w 3]; a decoded frame is scaled at most once.

    coded: as av.VideoFrame where `Scaler.coded` can.
    """
    begin = info.origin + start if start else None
    frames = _frames_from(path, "video", begin, 0.0, decoding)
    timed = _forward(frames, info.origin + (start or 0.0), decoding)
    stop = math.inf if end is None else end - (start or 0.0)
    place, shown, picture, scaler = None, None, None, Scaler()
    for frame in _resample(timed, fps, late, stop, decoding):
        place = place or geometry(frame, info.pixel_aspect, short_side)
        if frame is not shown:
            if shown is not None and (shown.width, shown.height) != (
                frame.width,
                frame.height,
            ):
                decoding.note("the picture changes its size; scaled to the first one's")
            shown = frame
            try:
                found = scaler.coded(frame, place) if coded else None
                picture = scaler.rgb(frame, place) if found is None else found
            except (av.FFmpegError, MemoryError, ValueError) as error:
                decoding.bad_packets += 1
                decoding.reason = _reason(error)
        if picture is not None:
            yield picture


# ------------------------------------------------------------------------------- sound


class _Run:
    """Unbroken sound of one kind, being resampled to int16 mono at `rate` Hz."""

    def __init__(self, frame, begin: float, rate: int):
        self.kind, self.end = _sound_kind(frame), begin
        self.waiting = av.AudioFifo()  # a call of the resampler costs more than a frame
        self.resampler = av.AudioResampler("s16", "mono", rate)
        self.chunks, self.begin, self.errors = [], begin, []
        self.rate, self.padding = rate, 0.0

    def add(self, frame, seconds: float) -> None:
        self.errors.append(seconds - self.end)
        self.end += frame.samples / frame.sample_rate
        self.padding = _padding(frame)
        frame.pts = None  # where it belongs is decided here, not by the resampler
        self.waiting.write(frame)
        if self.waiting.samples >= RESAMPLED_AT_ONCE:
            self.resample()

    def resample(self) -> None:
        """Those frames that wait for it."""
        if frame := self.waiting.read():
            self._take(frame)

    def _take(self, frame) -> None:
        self.chunks += [x.to_ndarray()[0] for x in self.resampler.resample(frame)]

    def finish(self) -> tuple[float, np.ndarray]:
        """Where it begins, by the median of its timestamps (seconds), and its int16."""
        if self.chunks:
            self._take(None)
        samples = np.concatenate([np.zeros(0, np.int16), *self.chunks])
        self.chunks = []  # an hour is 115 MB
        if self.padding:
            seconds = self.end - self.begin - self.padding
            samples = samples[: round(seconds * self.rate)]
        return self.begin + float(np.median(self.errors)), samples


def _padding(frame) -> float:
    """Seconds at the end of a frame that its packet says are not sound.

    MP4 tells the length of the last packet's sound, and the AAC encoder fills its frame
    of 1024 samples with silence; the duration of other packets may be rounded to a ms.
    """
    if not frame.duration:
        return 0.0
    seconds = frame.samples / frame.sample_rate
    padding = seconds - float(frame.duration * frame.time_base)
    return padding if 1e-3 < padding < seconds else 0.0


def _sound_kind(frame) -> tuple:
    return frame.format.name, frame.layout.name, frame.sample_rate


def _runs(frames: Iterable, origin: float, rate, start, stop, decoding) -> Iterator:
    """(begin in seconds from `origin`, int16 [s]) of each stretch of unbroken sound.

    A stretch ends where the timestamps leave the count of samples by SOUND_JITTER
    (sound is missing, or comes twice) or the format changes.
    """
    run, shift = None, 0.0
    for frame in frames:
        if not frame.sample_rate:
            decoding.note("sound without a sample rate is left out")
            continue
        expected = run.end if run else 0.0
        seconds = _time(frame) - origin + shift
        if math.isnan(seconds):
            seconds = expected
        wild = not -MAX_BACKWARD <= seconds - expected <= MAX_SILENCE
        if wild and (run or (not start and abs(seconds) > MAX_SILENCE)):
            decoding.jumps += 1
            shift += expected - seconds
            seconds = expected
        if seconds + frame.samples / frame.sample_rate < start - 0.1:
            continue
        if seconds >= stop:
            break
        if run and (
            _sound_kind(frame) != run.kind or abs(seconds - expected) > SOUND_JITTER
        ):
            decoding.try_to(run.resample)
            yield run.finish()
            run = None
        run = run or _Run(frame, seconds, rate)
        decoding.try_to(run.add, frame, seconds)
    if run:
        decoding.try_to(run.resample)
        yield run.finish()


def _sound(path, info: MediaInfo, rate: int, start, end, decoding) -> np.ndarray | None:
    """int16 [s], sample 0 at time 0; silence where there is none, cut before 0."""
    start, stop = start or 0.0, math.inf if end is None else end
    begin = info.origin + start if start else None
    frames = _frames_from(path, "audio", begin, 0.5, decoding)
    pieces, count = [], 0
    limit = None if end is None else round((end - start) * rate)
    for at, samples in _runs(frames, info.origin, rate, start, stop, decoding):
        missing = round((at - start) * rate) - count
        samples = samples[max(0, -missing) :]
        if samples.size:
            if missing > 0:
                pieces.append(np.zeros(missing, np.int16))
            pieces.append(samples)
            count += max(0, missing) + samples.size
            decoding.filled += max(0, missing) / rate
    if not count:
        return None
    waveform = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    decoding.seconds = len(waveform[:limit]) / rate
    return waveform[:limit]


# ------------------------------------------------------------------------------ reading


def read_frames(path, fps=None, short_side=None, start=None, end=None) -> Iterator:
    """Frames of a file at a constant rate: an iterator of uint8 [h w 3], h and w even.

    fps: frames a second; at each multiple of 1/fps the frame that is being shown then.
        None: the file's own mean rate, each decoded frame once where they come evenly.
    short_side: the most that the short side may have, in pixels; never enlarged. None:
        the picture's own size.
    start, end: seconds from the first picture that cut the clip; start is sought.
    Without picture the iterator is empty. MediaError where nothing can be decoded.
    """
    info = probe(path)
    _check_cut(path, start, end)
    frames, _ = _open_picture(
        path, info, fps, short_side, start, end, Decoding("picture")
    )
    return frames


def frames_at(
    path,
    info: MediaInfo,
    numbers: list[int],
    fps: float,
    short_side=None,
    start=None,
    sought: bool = True,
    own_rate: bool = False,
) -> Iterator[tuple[int, np.ndarray]]:
    """(number, uint8 [h w 3]) of some of the frames that `read_frames` gives.

    info: of `probe`. numbers: places in `read_frames`, rising. sought: decode from the
    key frame before the first of them instead of from the beginning; the same where
    reading the file told of no problems. own_rate: `fps` is the file's mean rate, which
    `read_frames` found for itself. Others as in `read_frames`.
    """
    left, fps, start = list(numbers), float(fps), start or 0.0
    ahead = left[0] / fps if left and sought else 0.0
    begin = info.origin + start + ahead if start or ahead else None
    decoding, scaler, place = Decoding("picture"), Scaler(), None
    frames = _frames_from(path, "video", begin, 0.0, decoding)
    late, held = 0.5 / fps if own_rate else min(TOLERANCE, 0.1 / fps), None
    end = ((math.inf, None),) if left else ()
    timed = _forward(frames, info.origin + start, decoding)
    for seconds, frame in itertools.chain(timed, end):
        while held is not None and left and left[0] / fps + late < seconds:
            place = place or geometry(held, info.pixel_aspect, short_side)
            yield left.pop(0), scaler.rgb(held, place)
        if not left:
            return
        held = frame


def _open_picture(path, info, fps, short_side, start, end, decoding, coded=False):
    """(iterator of frames, their rate); (empty, 0.0) without picture."""
    if not info.width:
        return iter(()), 0.0
    rate = fps or source_rate(path, info, start, end)
    late = min(TOLERANCE, 0.1 / rate) if fps else 0.5 / rate
    cut = start, end
    frames = _pictures(path, info, rate, late, short_side, *cut, decoding, coded)
    return frames, float(rate)


def read_audio(
    path, sample_rate=16000, start=None, end=None, info=None
) -> np.ndarray | None:
    """Mono int16 [s] at `sample_rate` Hz, sample 0 at the first picture (or `start`).

    Sound that starts late gets silence before it, sound from before time 0 is cut off,
    gaps are silence. None without sound. MediaError where nothing can be decoded.

    Down-mix: FFmpeg's libswresample with its defaults. Front centre has the gain 1,
    front left and right √½, each surround ½, low frequencies 0; the sum of the gains is
    scaled to 1, so that nothing clips. So stereo is (L + R)/2, and 5.1 is 0.293 C +
    0.207 (L + R) + 0.146 (Ls + Rs). Channels without names are taken for the usual
    layout of their number. info: of `probe`, where it is known.
    """
    info = info or probe(path)
    _check_cut(path, start, end)
    if not info.audio_codec:
        return None
    return _sound(path, info, sample_rate, start, end, Decoding("sound"))


def _check_cut(path, start, end) -> None:
    if (start or 0.0) < 0 or (end is not None and end <= (start or 0.0)):
        raise MediaError(
            f"{path}: start {start} and end {end} do not enclose anything; "
            "give seconds with 0 <= start < end."
        )


def read(
    path,
    fps=25.0,
    short_side=256,
    sample_rate=16000,
    start=None,
    end=None,
    stream=False,
    coded=False,
) -> Clip:
    """One file, or the part of it between `start` and `end` seconds, as a Clip.

    Arguments as in read_frames and read_audio. stream: `frames` is a one-pass iterator
    (memory does not grow with the clip) and `problems` a list that is whole at its end.
    coded: with `stream`, frames that need not be RGB to be encoded as H.264 come as
    av.VideoFrame in yuv420p, BT.601, limited range.
    MediaError, with the reason, where neither picture nor sound can be decoded.
    """
    info = probe(path)
    _check_cut(path, start, end)
    picture, sound = Decoding("picture"), Decoding("sound")
    waveform = None
    if info.audio_codec:
        waveform = _sound(path, info, sample_rate, start, end, sound)
    cut = start, end
    frames, rate = _open_picture(path, info, fps, short_side, *cut, picture, coded)
    first = next(frames, None)
    if first is None and waveform is None:
        why = picture.reason or sound.reason or f"nothing lies after {start or 0} s"
        raise MediaError(f"{path}: gives neither picture nor sound ({why}).")
    problems = []
    tell = lambda: problems.extend(
        _problems(info, picture, sound, first is not None, waveform, start, end)
    )
    frames = None if first is None else _then(itertools.chain([first], frames), tell)
    if frames is None:
        tell()
    elif not stream:
        frames = np.stack(list(frames))
    facts = asdict(info) | dict(silence_added=sound.filled)
    clip_rate = rate if frames is not None else 0.0
    if not stream:
        problems = tuple(problems)
    return Clip(frames, clip_rate, waveform, sample_rate, problems, facts)


def _then(items: Iterator, at_end: Callable) -> Iterator:
    yield from items
    at_end()


def _problems(info, picture, sound, has_picture, waveform, start, end) -> list[str]:
    """What the user should know of this clip beside its frames and sound."""
    told = picture.problems() + sound.problems()
    length = math.inf if end is None else end - (start or 0.0)
    where = "" if start is None and end is None else f" between {start} and {end} s"
    if info.video_codec and not has_picture:
        told.append(f"no picture ({info.video_codec}) can be decoded{where}")
    if info.audio_codec and waveform is None:
        told.append(f"no sound ({info.audio_codec}) can be decoded{where}")
    if has_picture and waveform is not None:
        seen, heard = min(picture.seconds, length), sound.seconds
        if heard < seen - WORTH_TELLING:
            told.append(f"sound ends after {heard:.1f} s of {seen:.1f} s")
        if seen < heard - WORTH_TELLING:
            told.append(f"picture ends after {seen:.1f} s of {heard:.1f} s")
    got = max(picture.seconds, sound.seconds) + (start or 0.0)
    wanted = min(info.seconds or 0.0, math.inf if end is None else end)
    if got < wanted - WORTH_TELLING:
        told.append(
            f"data end after {got:.1f} s though the header claims {wanted:.1f} s"
        )
    return told
