"""Degraded input: each kind by its definition, its errors, what it depends on."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from PIL import Image
from scenic import quick
from scipy import ndimage

from av_mae import ConfigError, corruption

KEY = jax.random.key(0)


def clip(v=2, t=5, h=24, w=32, seed=0):
    """Smooth noise over the whole range, uint8 [v t h w 3]."""
    x = np.random.default_rng(seed).normal(size=(v, t, h, w, 3)).cumsum(2).cumsum(3)
    axes = (2, 3)
    x -= x.min(axes, keepdims=True)
    return (x / x.max(axes, keepdims=True) * 255).astype(np.uint8)


def degraded(text, batch, keys=None):
    """A batch after the corruption of this name, as numpy."""
    count = len(next(iter(batch.values())))
    keys = jax.random.split(KEY, count) if keys is None else keys
    found = quick(lambda batch, keys: corruption.parse("x", text)(batch, keys))
    return jax.tree.map(np.asarray, found(batch, keys))


def test_blur_is_scipys_gaussian():
    frames = clip()
    found = degraded("blur:1.5", {"rgb": frames[None]})["rgb"]
    wanted = ndimage.gaussian_filter(
        frames.astype(float), (0, 0, 1.5, 1.5, 0), mode="nearest"
    )
    assert found.shape == frames[None].shape and found.dtype == np.uint8
    assert np.abs(found[0] - wanted).max() <= 0.51


@pytest.mark.parametrize("factor", [2.0, 3.5])
def test_low_resolution_is_pillows_bilinear_there_and_back(factor):
    frames = clip()
    found = degraded(f"low_resolution:{factor}", {"rgb": frames[None]})["rgb"][0]
    small = (round(32 / factor), round(24 / factor))
    for view, frame in np.ndindex(2, 5):
        picture = Image.fromarray(frames[view, frame])
        picture = picture.resize(small, Image.Resampling.BILINEAR)
        wanted = np.asarray(picture.resize((32, 24), Image.Resampling.BILINEAR))
        assert np.abs(found[view, frame].astype(int) - wanted).max() <= 2
    assert (found != frames).mean() > 0.5


def test_noise_has_the_deviation_asked_for():
    frames = np.full((1, 2, 8, 32, 32, 3), 128, np.uint8)
    found = degraded("noise:20", {"rgb": frames})["rgb"].astype(float)
    assert abs(found.std() - 20) < 0.3 and abs(found.mean() - 128) < 0.3
    flat = found.reshape(16, -1)  # frames of views
    assert abs(np.corrcoef(flat) - np.eye(16)).max() < 0.1  # each has its own
    ends = degraded("noise:90", {"rgb": frames})["rgb"]
    assert ends.min() == 0 and ends.max() == 255  # held, not wrapped around
    assert 0.07 < (ends == 0).mean() < 0.09 and 0.07 < (ends == 255).mean() < 0.09


@pytest.mark.parametrize("share, repeated", [(0.25, 2), (0.5, 4), (1.0, 8)])
def test_a_dropped_frame_repeats_the_one_before(share, repeated):
    frames = np.arange(9, dtype=np.uint8)[None, None, :, None, None, None]
    frames = np.broadcast_to(frames, (200, 2, 9, 2, 2, 3))
    found = degraded(f"frame_drop:{share}", {"rgb": frames})["rgb"]
    assert (found == found[..., :1, :1, :1]).all()
    times = found[..., 0, 0, 0].astype(int)  # b v t
    steps = np.diff(times, axis=2)
    assert (times[:, :, 0] == 0).all() and ((steps == 0).sum(2) == repeated).all()
    shown = steps > 0  # what is shown anew is the frame of that moment
    np.testing.assert_array_equal(times[:, :, 1:][shown], np.nonzero(shown)[2] + 1)
    assert abs((steps == 0).mean((0, 1)) - repeated / 8).max() < 0.1  # anywhere


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_mute_silences_one_piece(share):
    sound = np.full((300, 2, 100), 7, np.int16)
    found = degraded(f"mute:{share}", {"waveform": sound})["waveform"]
    silent = found == 0
    assert found.dtype == np.int16 and (found[~silent] == 7).all()
    assert (silent.sum(2) == 100 * share).all()
    edges = np.abs(np.diff(np.pad(silent, ((0, 0), (0, 0), (1, 1))), axis=2)).sum(2)
    assert (edges == 2).all()
    start = silent.argmax(2)
    assert (start.min(), start.max()) == (0, round(100 - 100 * share))
    assert share == 1 or (start[:, 0] != start[:, 1]).mean() > 0.9


@pytest.mark.parametrize("decibels", [20, 0, -6])
def test_noise_in_sound_is_as_loud_as_the_ratio_says(decibels):
    t = np.arange(16000)
    loud, soft = (a * np.sin(t * 0.05) for a in (3000, 100))
    sound = np.stack([loud, soft, 0 * t]).astype(np.int16)[None]
    found = degraded(f"audio_noise:{decibels}", {"waveform": sound})["waveform"]
    power = lambda x: (x.astype(float) ** 2).mean(-1)
    ratio = power(sound[0, :2]) / power(found[0, :2] - sound[0, :2].astype(int))
    np.testing.assert_allclose(10 * np.log10(ratio), decibels, atol=0.2)
    assert not found[0, 2].any()  # silence stays silent
    assert degraded("audio_noise:-60", {"waveform": sound})["waveform"].max() == 32767


NOTHING = ["blur:0", "low_resolution:1", "noise:0", "frame_drop:0", "mute:0"]


@pytest.mark.parametrize("text", [*NOTHING, "audio_noise:200"])
def test_the_least_level_changes_nothing(text):
    batch = {"rgb": clip()[None], "waveform": np.full((1, 2, 50), 9, np.int16)}
    for key, values in degraded(text, batch).items():
        np.testing.assert_array_equal(values, batch[key])


def test_more_is_worse():
    frames = clip(1, 9)[None]
    sound = (8000 * np.sin(np.arange(4000) * 0.1)).astype(np.int16)[None, None]
    batch = {"rgb": frames, "waveform": sound}
    levels = {
        "blur": (0.5, 2, 6),
        "low_resolution": (1.5, 3, 8),
        "noise": (4, 20, 60),
        "frame_drop": (0.25, 0.5, 1),
        "mute": (0.1, 0.5, 1),
        "audio_noise": (30, 10, -10),
    }
    assert set(levels) == set(corruption.KINDS)
    kinds = [(name, level) for name, three in levels.items() for level in three]
    parse = lambda name, level: corruption.parse("x", f"{name}:{level}")
    keys = jax.random.split(KEY, 1)
    found = quick(lambda batch: [parse(*kind)(batch, keys) for kind in kinds])(batch)
    error = np.empty(len(kinds))
    for i, (name, _) in enumerate(kinds):
        key = corruption.KINDS[name].key
        error[i] = np.abs(found[i][key] - batch[key].astype(float)).mean()
    error = error.reshape(-1, 3)
    assert (error[:, 0] > 0).all() and (np.diff(error, axis=1) > 0).all()


def test_a_clip_depends_on_its_key_alone():
    frames = np.stack([clip(seed=i) for i in range(3)])
    keys = jax.random.split(KEY, 3)
    together = degraded("noise:9", {"rgb": frames}, keys)["rgb"]
    for i in range(3):
        alone = degraded("noise:9", {"rgb": frames[i : i + 1]}, keys[i : i + 1])
        np.testing.assert_array_equal(alone["rgb"][0], together[i])
    same = degraded("noise:9", {"rgb": frames[:1].repeat(2, 0)}, keys[:2])["rgb"]
    assert (same[0] != same[1]).any()


def test_what_is_not_there_stays_away():
    batch = {"waveform": jnp.ones((1, 1, 9), jnp.int16), "label": jnp.array([3])}
    found = corruption.parse("x", "blur:2")(batch, jax.random.split(KEY, 1))
    assert found == batch
    assert corruption.parse("x", "") is None


@pytest.mark.parametrize(
    "text, words",
    [
        ("blurr:2", "'blurr': did you mean 'blur'. "),
        (
            "dark:2",
            "'dark': choose one of 'blur', 'low_resolution', 'noise', 'frame_drop'",
        ),
        ("blur", "write blur:LEVEL, where LEVEL is the Gaussian's deviation in pixels"),
        ("noise:much", "noise:LEVEL, where .* in grey levels .0 or more"),
        ("noise:-1", "0 or more"),
        ("noise:inf", "0 or more"),
        ("low_resolution:0.5", "is reduced by .1 or more"),
        ("frame_drop:1.5", "share of frames not seen .0 to 1"),
        ("mute:nan", "share of the sound not heard .0 to 1"),
        ("audio_noise:loud", "ratio in decibels .any number"),
    ],
)
def test_a_wrong_corruption_is_named(text, words):
    with pytest.raises(ConfigError, match=f"^eval.corruption is .*{words}"):
        corruption.parse("eval.corruption", text)
    assert math.isfinite(corruption.parse("eval.corruption", "blur:2").level)


@pytest.mark.slow
def test_a_user_trains_with_everything_and_tests_on_degraded_clips(tmp_path):
    """Every augmentation by command line; evaluated clean, and the same noise twice."""
    toy.write_folder(tmp_path / "clips", 12)
    data = tmp_path / "set"
    split = "train=0.6,validation=0.4"
    toy.run("-m", "data.prepare", tmp_path / "clips", "--out", data, "--split", split)
    command = (
        *("-m", "av_mae.main", "--config=configs/folder/finetune.py:smoke"),
        *(f"--workdir={tmp_path / 'run'}", f"--config.data.dir={data}"),
        *("--config.data.randaugment=rand-m7-n4-mstd0.5-inc1", "--config.steps=8"),
        *("--config.augment.colour=0.8", "--config.augment.grey=0.1"),
        *("--config.augment.erase=0.25", "--config.augment.corruption=blur:1"),
        *("--config.augment.frequency_masks=2", "--config.augment.frequency_width=36"),
        *("--config.augment.time_masks=4", "--config.augment.time_width=8"),
        "--config.schedule.learning_rate_per_256=0.5",
    )
    toy.run(*command)
    test = (*command, "--config.mode=eval")

    def loss(*more):
        text = toy.run(*test, *more)
        return float(re.search(r"^evaluation on .*\bloss (\S+)", text, re.M)[1])

    noise = "--config.eval.corruption=noise:90"
    noisy = loss(noise)
    assert abs(loss() - noisy) > 1e-3
    assert loss(noise, "--config.eval.batch_size=2") == pytest.approx(noisy, rel=1e-3)
    text = toy.run(*test, "--config.eval.corruption=nois:90", code=2)
    assert "eval.corruption is 'nois': did you mean 'noise'?" in text
    assert "Traceback" not in text
