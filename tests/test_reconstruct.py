"""`python -m av_mae.reconstruct`: films with sound, sheets, WAVs, errors."""

import json
import wave

import av
import numpy as np
import pytest
import synthetic
import toy
import toy_models
from PIL import Image

from av_mae import UserError, api, clips, reconstruct


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with synthetic.quick():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the autoencoders `a` and `b`, a clip and one without sound."""
    place = tmp_path_factory.mktemp("reconstruct")
    toy_models.write(place / "a", toy_models.config("pretrain"))
    toy.write_clip(place / "clip.mp4", 1)
    toy.write_clip(place / "silent.mp4", 1, sound=False)
    return place


def samples(path) -> np.ndarray:
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels()) == (16000, 1)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def test_all_that_is_written(place, capsys):
    out = place / "out"
    options = ["--ratio-rgb", ".5", "--ratio-spectrogram", ".5", "--seed", "7"]
    clip = str(place / "clip.mp4")
    reconstruct.main([str(place / "a"), clip, "--out", str(out), *options])
    told = capsys.readouterr().out
    assert "masked  50%" in told and "mean squared error" in told
    with av.open(str(out / "reconstruction.mp4")) as film:
        frames = list(film.decode(video=0))
        assert film.streams.audio[0].codec_context.name == "aac"
        shown = frames[0].to_ndarray(format="rgb24").astype(float)
    with Image.open(out / "reconstruction.gif") as gif:
        assert gif.n_frames == len(frames) == 4  # .48 s of frames, .32 s of sound
        assert gif.size == (shown.shape[1], shown.shape[0])
        first = np.asarray(gif.convert("RGB"), float)
    assert np.abs(shown - first).mean() < 16
    with Image.open(out / "reconstruction.png") as sheet:
        assert sheet.width > 600 and sheet.height > 600
    read = clips.read_clip(clip)
    original = samples(out / "original.wav")
    assert len(original) == 5120
    starts = np.flatnonzero(read.sound == original[0])
    assert any((read.sound[i : i + 5120] == original).all() for i in starts)
    masked, filled = (samples(out / f"{x}.wav") for x in ("masked", "reconstruction"))
    assert len(masked) == len(filled) == 5120
    assert masked.any() and (masked != filled).any()
    errors = json.loads((out / "errors.json").read_text())["a"]
    tokens = np.array(errors["rgb"]["error_by_token"], float)
    assert tokens.shape == (2, 2, 2) and np.isnan(tokens).mean() == 0.5
    assert abs(np.nanmean(tokens) / errors["rgb"]["error"] - 1) < 1e-6
    assert errors["spectrogram"]["statistics"] == "visible"


def test_statistics_are_labelled_in_the_picture():
    caption = {}
    for kind in ("visible", "oracle"):
        found = type("Found", (), {"statistics": {"rgb": kind, "spectrogram": "none"}})
        shown = [reconstruct.Shown("a", found, 5.0)]
        caption[kind] = reconstruct.caption_of(shown, "x/clip.mp4").splitlines()
    assert caption["visible"][0] == "clip.mp4"
    assert caption["visible"][1].endswith("statistics of the visible patches")
    assert "TRUE statistics of the masked patches (oracle)" in caption["oracle"][1]
    assert all(lines[1].startswith("rgb: standardised") for lines in caption.values())
    # Of several each is told, whatever the others are.
    raw = type("Found", (), {"statistics": {"rgb": "none", "spectrogram": "none"}})
    shown = [reconstruct.Shown("a", found, 5.0), reconstruct.Shown("b", raw, 5.0)]
    lines = reconstruct.caption_of(shown, "clip.mp4").splitlines()
    assert len(lines) == 2 and lines[1].startswith("a, rgb: standardised")


def test_masks_are_for_what_is_masked():
    """AV-MaskEnhancer hears the sound as it is."""
    config = synthetic.config("ucf101/avmaskenhancer_pretrain", "smoke")
    model = api.Model(config, {}, [])
    assert reconstruct.masks_for(model, "random") == {"rgb": "random"}
    with pytest.raises(UserError, match="--mask time is for neither of rgb"):
        reconstruct.masks_for(model, "time")


def test_sound_is_put_where_it_belongs():
    samples = np.arange(1, 5, dtype=np.int16)
    found = reconstruct.placed(samples, at=0.5, rate=4, seconds=2.0)
    np.testing.assert_array_equal(found, [0, 0, 1, 2, 3, 4, 0, 0])
    found = reconstruct.placed(samples, at=1.5, rate=4, seconds=2.0)
    np.testing.assert_array_equal(found, [0] * 6 + [1, 2])


def test_names_differ():
    assert reconstruct.names_of(["runs/a", "runs/b/"]) == ["a", "b"]
    assert reconstruct.names_of(["x/run", "y/run"]) == ["1-run", "2-run"]


@pytest.mark.slow
def test_several_checkpoints_as_a_user_types_it(place):
    """Another size and another target beside the first; masks of time; no sound."""
    config = toy_models.config("pretrain", data__size=48, data__num_frames=6)
    config.objective.target.update(rgb="raw", spectrogram="raw")
    toy_models.write(place / "b", config)
    out, runs = place / "several", (place / "a", place / "b")
    options = ("--mask", "time", "--start", "0.4", "--oracle-statistics")
    command = ("-m", "av_mae.reconstruct", *runs, place / "clip.mp4")
    told = toy.run(*command, "--out", out, *options)
    assert told.count("rgb") == told.count("spectrogram") == 2
    names = {path.name for path in out.iterdir()}
    assert {"reconstruction-a.wav", "reconstruction-b.wav", "original.wav"} <= names
    errors = json.loads((out / "errors.json").read_text())
    assert errors["a"]["rgb"]["statistics"] == "oracle"
    assert errors["b"]["rgb"]["statistics"] == "none"
    tokens = np.array(errors["a"]["spectrogram"]["error_by_token"], float)
    masked = ~np.isnan(tokens)
    assert (masked.all(axis=1) | ~masked.any(axis=1)).all()  # whole times
    out = place / "silent"
    silent = ("-m", "av_mae.reconstruct", runs[0], place / "silent.mp4", "--out", out)
    assert "not reconstructed: not there" in toy.run(*silent)
    assert not (out / "reconstruction.wav").exists()
    with av.open(str(out / "reconstruction.mp4")) as film:
        assert not film.streams.audio
    told = toy.run(*command, "--out", out, "--ratio-rgb", "1.0", code=2)
    assert told.startswith("error: mask.rgb.ratio is 1.0")
    assert "python -m av_mae.reconstruct" in toy.run("-m", command[1], "--help")
