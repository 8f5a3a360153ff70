"""Preparation beside FFmpeg's own program, or a plain word that there is none."""

import subprocess
import sys
from pathlib import Path

import av
import pytest

from data import prepare_speed, records
from tests import toy

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "clips"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    toy.write_clip(folder / "a.mp4", 0)
    toy.write_clip(folder / "mute.mp4", 1, sound=False)
    (folder / "broken.mp4").write_text("no video")
    return folder


def program(folder, body) -> str:
    """A stand-in for FFmpeg."""
    path = folder / "ffmpeg"
    path.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_without_ffmpeg_it_is_said(clips, monkeypatch):
    monkeypatch.setenv("FFMPEG", "no-such-program")
    found = prepare_speed.compare(clips)
    assert [entry["frames"] for entry in found] == ["h264", "jpeg"]
    assert all(entry["clips"] == 2 and entry["ours"] > 0 for entry in found)
    told = prepare_speed.lines(found)
    assert len(told) == 3 and "No ffmpeg was found" in told[-1]


def test_with_ffmpeg_both_numbers_are_told(clips, tmp_path):
    body = (
        "x = [a for a in sys.argv if a.endswith('picture')][0]; open(x, 'w').write('x')"
    )
    found = prepare_speed.compare(clips, program(tmp_path, body))
    for entry in found:
        assert entry["ratio"] == pytest.approx(entry["ours"] / entry["ffmpeg"])
    assert "of it." in prepare_speed.lines(found)[0]
    with pytest.raises(RuntimeError, match="made no picture: it failed"):
        prepare_speed.compare(clips, program(tmp_path, "sys.exit('it failed')"))


def test_ffmpeg_is_asked_for_the_same_work(clips):
    line = prepare_speed.command("ffmpeg", clips / "a.mp4", "h264")
    for option, value in records.X264.items():
        assert line[line.index(f"-{option}") + 1] == value
    assert line.count("-threads") == 3 and set(
        line[i + 1] for i, part in enumerate(line) if part == "-threads"
    ) == {"1"}
    assert "fps=25.0,scale=48:64:flags=bicubic" in line
    assert line[line.index("-ar") + 1] == "16000"
    assert "-ar" not in prepare_speed.command("ffmpeg", clips / "mute.mp4", "jpeg")


@pytest.mark.slow
@pytest.mark.skipif(
    not (CLIPS.is_dir() and prepare_speed.find_ffmpeg()),
    reason="needs the development clips and a program ffmpeg",
)
def test_ffmpeg_does_the_same_work(tmp_path):
    line = prepare_speed.command(
        prepare_speed.find_ffmpeg(), CLIPS / "rabbit320.webm", "h264"
    )
    line = [part.replace("{out}", str(tmp_path)) for part in line]
    subprocess.run(line, check=True)
    with av.open(str(tmp_path / "picture")) as container:
        frames = sum(1 for _ in container.decode(video=0))
    assert abs(frames - 195) <= 1  # 7.8 s
