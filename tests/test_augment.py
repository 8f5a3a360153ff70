"""What the step does with a batch before the model sees it."""

import colorsys
import math
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import scenic

from av_mae import ConfigError, augment

HALF = (0.5, 0.5, 0.5)
RECIPE = scenic.SHARED / "fixtures" / "videomae" / "mcg_recipe" / "recipe.npz"


def frames(batch=1, seed=0):
    shape = (batch, 2, 3, 4, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_bytes_become_normalised_values():
    ends = jnp.array([0, 255], jnp.uint8)[None, :, None, None, None].repeat(3, -1)
    found = augment.prepare_rgb(ends, HALF, HALF)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found[0, :, 0, 0], [[-1, -1, -1], [1, 1, 1]])


def test_each_channel_has_its_own_statistics():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    clip = frames()
    found = augment.prepare_rgb(jnp.asarray(clip), mean, std)
    wanted = (clip / 255.0 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_flip_is_of_whole_clips_and_half_of_them():
    clips = frames(400)
    plain = augment.prepare_rgb(jnp.asarray(clips), HALF, HALF)
    prepare = lambda flip, train=True: np.asarray(
        augment.prepare_rgb(
            jnp.asarray(clips),
            HALF,
            HALF,
            flip=flip,
            rng=jax.random.key(1),
            train=train,
        )
    )
    found = prepare(0.5)
    mirrored = plain[:, :, :, ::-1]
    same = (found == plain).all((1, 2, 3, 4))
    turned = (found == mirrored).all((1, 2, 3, 4))
    assert (same ^ turned).all()  # never some of a clip's frames only
    assert 160 <= turned.sum() <= 240  # 4 deviations of 10
    assert 60 <= (prepare(0.25) == mirrored).all((1, 2, 3, 4)).sum() <= 135
    np.testing.assert_array_equal(found, prepare(0.5))  # the key decides
    np.testing.assert_array_equal(prepare(1.0), mirrored)
    np.testing.assert_array_equal(prepare(0.0), plain)
    np.testing.assert_array_equal(prepare(0.5, train=False), plain)


def test_log_mels_are_normalised_by_name():
    log_mel = jnp.linspace(-13, 5, 24).reshape(1, 4, 6, 1)
    same = augment.prepare_spectrogram(log_mel, "none", 1.102, 2.762)
    np.testing.assert_array_equal(same, log_mel)
    for normalise in ("fixed", "dataset"):
        found = augment.prepare_spectrogram(log_mel, normalise, 1.102, 2.762)
        wanted = (np.asarray(log_mel) - 1.102) / 2.762
        np.testing.assert_allclose(found, wanted, 1e-5)


def test_an_unknown_normalisation_is_named():
    with pytest.raises(ConfigError, match="spectrogram.normalise is 'mean': choose"):
        augment.prepare_spectrogram(jnp.zeros((1, 1, 1, 1)), "mean")


def test_a_clip_is_normalised_by_its_own_colour_and_contrast():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 120, (2, 2, 4, 4, 3), np.uint8)
    brighter = frames + np.array([100, 20, 0], np.uint8)
    mean, std = (0.5,) * 3, (0.5,) * 3
    one = augment.prepare_rgb(jnp.array(frames), mean, std, normalise="clip")
    other = augment.prepare_rgb(jnp.array(brighter), mean, std, normalise="clip")
    np.testing.assert_allclose(one, other, atol=1e-5)
    np.testing.assert_allclose(one.mean((1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(one.std((1, 2, 3, 4)), 1, atol=1e-4)


def test_a_clip_without_contrast_is_zero():
    same = jnp.full((1, 2, 4, 4, 3), 7, jnp.uint8)
    out = augment.prepare_rgb(same, (0.5,) * 3, (0.5,) * 3, normalise="clip")
    np.testing.assert_allclose(out, 0, atol=0.01)


def test_a_sound_loses_its_level_in_each_mel_bin():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 50, 8, 1)).astype(np.float32)
    louder = 3 * x + np.arange(8, dtype=np.float32)[None, None, :, None]
    one = augment.prepare_spectrogram(jnp.array(x), "clip")
    other = augment.prepare_spectrogram(jnp.array(louder), "clip")
    np.testing.assert_allclose(one, other, atol=1e-4)
    np.testing.assert_allclose(one.mean(1), 0, atol=1e-5)


def test_a_time_shift_turns_each_sound_by_its_own_number_of_rows():
    x = jnp.tile(jnp.arange(10.0)[None, :, None, None], (20, 1, 3, 1))
    out = np.asarray(augment.time_shift(x, jax.random.key(0)))
    first = out[:, 0, 0, 0]
    assert len(set(first)) > 4
    wanted = (first[:, None] + np.arange(10)) % 10
    np.testing.assert_array_equal(out[..., 0], np.repeat(wanted[..., None], 3, 2))


def is_uniform(values, low, high):
    """Kolmogorov and Smirnov's test at 1e-4."""
    values = np.sort((np.asarray(values) - low) / (high - low))
    steps = np.arange(len(values) + 1) / len(values)
    far = max(abs(values - steps[1:]).max(), abs(values - steps[:-1]).max())
    return far < 2.23 / math.sqrt(len(values))


# ------------------------------------------------------------------------------- colour


def telling_clip():
    """4 frames on [0, 1]: grey, two greys, one colour, and anything (of 6 by 6)."""
    x = np.full((4, 6, 6, 3), 0.5, np.float32)
    x[1, :3], x[1, 3:] = 0.45, 0.55
    x[2] = 0.6, 0.45, 0.4
    x[3] = np.random.default_rng(0).uniform(0.2, 0.8, (6, 6, 3))
    return x


def drawn(clip):
    """(brightness, saturation, contrast, hue) of a jittered telling clip."""
    brightness = clip[0, 0, 0, 0] - 0.5
    contrast = (clip[1, 5, 0, 0] - clip[1, 0, 0, 0]) / 0.1
    hue, saturation, _ = colorsys.rgb_to_hsv(*clip[2, 0, 0])
    start, full, _ = colorsys.rgb_to_hsv(*(np.array([0.6, 0.45, 0.4]) + brightness))
    turn = (hue - start + 0.5) % 1 - 0.5
    return brightness, saturation / full, contrast, turn


def by_hand(clip, brightness, saturation, contrast, hue):
    """The same on one frame [h w 3], pixel by pixel."""
    x = clip + brightness
    for place in np.ndindex(x.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*x[place])
        x[place] = colorsys.hsv_to_rgb(h, min(1, s * saturation), v)
    mean = x.mean((0, 1))
    x = mean + (x - mean) * contrast
    for place in np.ndindex(x.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*x[place])
        x[place] = colorsys.hsv_to_rgb((h + hue) % 1, s, v)
    return x.clip(0, 1)


@pytest.fixture(scope="module")
def jittered():
    """1,500 telling clips with other colours."""
    clips = jnp.tile(telling_clip(), (1500, 1, 1, 1, 1))
    jitter = scenic.quick(lambda x, rng: augment.jitter(x, rng, 1.0))
    return np.asarray(jitter(clips, jax.random.key(0)), float)


def test_colours_are_drawn_once_for_a_clip_from_the_published_ranges(jittered):
    values = np.array([drawn(clip) for clip in jittered]).T
    brightness, saturation, contrast, hue = values
    assert is_uniform(brightness, -32 / 255, 32 / 255)
    assert is_uniform(saturation, 0.6, 1.4)
    assert is_uniform(contrast, 0.6, 1.4)
    assert is_uniform(hue, -0.2, 0.2)
    assert abs(np.corrcoef(values) - np.eye(4)).max() < 0.11


def test_colours_change_in_the_published_order(jittered):
    """With what three frames tell of the draws, the fourth is known."""
    for clip in jittered[:40]:
        wanted = by_hand(telling_clip()[3].astype(float), *drawn(clip))
        np.testing.assert_allclose(clip[3], wanted, atol=2e-4)


@pytest.mark.slow
def test_colours_change_as_in_tensorflow():
    """DMVR's operations themselves, beyond [0, 1] too (as brightness may lead)."""
    tf = pytest.importorskip("tensorflow")
    rng = np.random.default_rng(0)
    x = rng.uniform(-0.13, 1.13, (2, 3, 8, 9, 3)).astype(np.float32)
    x[0, 0, 0] = x[0, 0, 0, :, :1]  # grey
    x[0, 0, 1] = np.round(x[0, 0, 1] * 2) / 2  # channels alike
    x[0, 0, 2] = -abs(x[0, 0, 2])
    names = ("saturation", "contrast", "hue")
    for name, argument in zip(names * 2, (0.6, 0.6, -0.2, 1.4, 1.4, 0.13), strict=True):
        theirs = getattr(tf.image, f"adjust_{name}")(x, argument).numpy()
        change = getattr(augment, f"adjust_{name}")
        ours = change(jnp.asarray(x), jnp.full((2, 1, 1, 1), argument))
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
        error = np.abs(ours - theirs).max()
        parity.record("Colour", f"tf.image {name} {argument}", outputs=error)


def test_some_clips_keep_their_colours_and_some_lose_them():
    clip = np.random.default_rng(0).integers(60, 190, (1, 2, 4, 4, 3), np.uint8)
    clips = jnp.tile(jnp.asarray(clip), (1000, 1, 1, 1, 1))
    make = scenic.quick(
        lambda key, colour, grey: augment.prepare_rgb(
            *(clips, (0.0,) * 3, (1.0,) * 3),
            **dict(colour=colour, grey=grey, rng=key, train=True),
        ),
        static_argnums=(1, 2),
    )
    key, plain = jax.random.key(0), np.asarray(clips, np.float32) / 255
    found = np.asarray(make(key, 0.8, 0.0))
    kept = (np.abs(found - plain) < 1e-6).all((1, 2, 3, 4))
    assert 0.15 < kept.mean() < 0.25  # 4 deviations of .0126
    found = np.asarray(make(key, 0.0, 0.1))
    grey = (found == found[..., :1]).all((1, 2, 3, 4))
    np.testing.assert_allclose(found[~grey], plain[~grey], atol=1e-6)
    assert 0.062 < grey.mean() < 0.138
    luma = plain[grey] @ np.array([0.2989, 0.587, 0.114])
    np.testing.assert_allclose(found[grey][..., 0], luma, rtol=1e-5)
    both = np.asarray(make(key, 0.8, 0.1))
    grey = (both == both[..., :1]).all((1, 2, 3, 4))
    changed = (np.abs(both[grey][..., 0] - luma[:1]) > 1e-4).any((1, 2, 3))
    assert 0.6 < changed.mean() < 0.97  # the two draws know nothing of each other


# ------------------------------------------------------------------------------ erasing


needs_recipe = pytest.mark.skipif(
    not RECIPE.is_file(), reason=f"there are no numbers at {RECIPE}"
)


BOXES = scenic.stored(RECIPE, r"(random_erasing_.*)")


@needs_recipe
def test_no_stored_box_is_missing():
    assert len(BOXES) >= 4


@needs_recipe
@pytest.mark.parametrize("name", BOXES)
def test_boxes_are_those_of_videomae(name):
    """The published draws, given as shares of their ranges, give the published box."""
    theirs, seed = np.load(RECIPE)[name], int(re.search(r"pyseed(\d+)", name)[1])
    rng = random.Random(seed)
    rng.random()  # whether at all
    area, aspect = rng.random(), rng.random()
    height, width = theirs[0].any(1).sum(), theirs[0].any(0).sum()
    places = [rng.randint(0, 32 - side) for side in (height, width)]
    places = [
        (place + 0.5) / (33 - side)
        for place, side in zip(places, (height, width), strict=True)
    ]
    uniform = jnp.asarray([area, aspect, *places]).reshape(4, 1, 1)
    boxes = scenic.quick(lambda x: augment.erased_boxes(x, (32, 32)))
    top, left, high, wide = np.asarray(boxes(uniform))[:, 0]
    ours = np.zeros((4, 32, 32), bool)  # a cube: the same in all frames
    ours[:, top : top + high, left : left + wide] = True
    np.testing.assert_array_equal(ours, theirs)
    parity.record("videomae recipe: random erasing", f"seed {seed}", outputs=0)


def test_boxes_have_the_published_areas_and_shapes():
    uniform = np.random.default_rng(0).random((4, 3000, 3), np.float32)
    boxes = scenic.quick(lambda x: augment.erased_boxes(x, (224, 224)))(uniform)
    top, left, high, wide = np.asarray(boxes)
    area, aspect = high * wide / 224**2, np.log(high / wide)
    assert is_uniform(area, 0.02, 1 / 3)
    assert is_uniform(aspect, math.log(0.3), -math.log(0.3))
    assert abs(np.corrcoef(area, aspect)[0, 1]) < 0.08
    assert max(high.max(), wide.max()) < 224
    assert is_uniform((top + 0.5) / (224 - high + 1), 0, 1)
    assert is_uniform((left + 0.5) / (224 - wide + 1), 0, 1)


def test_the_first_box_that_fits_counts():
    """0.33 of the area at 3.3 times the width is too high; the next is a square."""
    draws = jnp.array([[0.999, 0.25], [0.999, 0.5], [0.0, 0.5], [0.0, 0.999]])
    found = augment.erased_boxes(draws[:, None], (100, 100))
    side = round(math.sqrt(0.02 + 0.25 * (1 / 3 - 0.02)) * 100)
    np.testing.assert_array_equal(
        found[:, 0], [(101 - side) // 2, 100 - side] + [side] * 2
    )


def test_erasing_is_a_box_of_noise_in_all_frames_of_some_clips():
    clips = jnp.full((300, 3, 16, 20, 3), 7.0)
    erase = scenic.quick(lambda x, rng: augment.erased(x, rng, 0.25))
    found = np.asarray(erase(clips, jax.random.key(3)))
    changed = (found != 7).any(-1)  # b t h w
    np.testing.assert_array_equal(changed, changed[:, :1].repeat(3, axis=1))
    some = changed.any((1, 2, 3))
    assert 0.15 < some.mean() < 0.35  # 4 deviations of .025
    for mask in changed[some, 0]:
        assert mask.sum() == mask.any(1).sum() * mask.any(0).sum()  # a box
    noise = found[changed]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    one = found[some][0]
    assert not np.allclose(one[0], one[1])  # each frame has its own
    assert is_normal(noise.ravel()[:4000])


def is_normal(values):
    """By the share within one and within two deviations."""
    within = [np.mean(np.abs(values) < bound) for bound in (1, 2)]
    return np.allclose(within, [0.6827, 0.9545], atol=0.03)


def test_boxes_are_erased_after_the_values_are_normalised_and_in_training_alone():
    clips = np.full((20, 2, 16, 16, 3), 255, np.uint8)
    options = dict(erase=1.0, rng=jax.random.key(0))
    make = scenic.quick(
        lambda x, train: augment.prepare_rgb(
            *(x, (0.5,) * 3, (0.001,) * 3), train=train, **options
        ),
        static_argnums=1,
    )
    found, still = (np.asarray(make(clips, train)) for train in (True, False))
    top = still.max()
    assert (still == top).all() and top > 499
    noise = np.abs(found - top) > 1  # two programs round otherwise
    assert (noise.any(-1).mean((1, 2, 3)) > 0.01).all()
    assert np.abs(found[noise]).max() < 6


# -------------------------------------------------------------------------- SpecAugment


@pytest.fixture(scope="module")
def masked():
    """Where 2,000 log-mels of 100 by 64 are zero: a band each way, and several."""
    x = jnp.ones((2000, 100, 64, 1))
    wanted = [((1, 48), (0, 0)), ((0, 0), (1, 48)), ((2, 16), (4, 24))]
    make = lambda rng: [augment.spec_augment(x, rng, *bands) == 0 for bands in wanted]
    return [np.asarray(m)[..., 0] for m in scenic.quick(make)(jax.random.key(0))]


def widths(bands):
    """(width, start) of one band in each row; all of a band hang together."""
    width = bands.sum(1)
    some = bands[width > 0]
    start, end = some.argmax(1), some.shape[1] - some[:, ::-1].argmax(1)
    np.testing.assert_array_equal(end - start, width[width > 0])
    return width, start


def test_bands_are_drawn_as_in_lingvo(masked):
    """Widths 0 … 47 alike, places alike where the band fits (arXiv:1904.08779)."""
    for bands, other, length in ((masked[0], 1, 64), (masked[1], 2, 100)):
        lines = bands.any(other)
        np.testing.assert_array_equal(bands.sum(other), lines * bands.shape[other])
        width, start = widths(lines)
        counts = np.bincount(width, minlength=48)
        assert (
            counts.size == 48 and abs(counts - 2000 / 48).max() < 28
        )  # over 4 deviations
        room = length - width[width > 0] + 1
        assert is_uniform(
            (start + np.random.default_rng(0).random(len(start))) / room, 0, 1
        )


def test_several_bands_may_overlap(masked):
    both = masked[2]
    rows, bins = both.all(2), both.all(1)
    np.testing.assert_array_equal(both, rows[:, :, None] | bins[:, None])
    # A band of bins is 7.5 wide on average, one of rows 11.5; some overlap.
    assert 2 * 7.5 * 0.8 < bins.sum(1).mean() < 2 * 7.5
    assert 4 * 11.5 * 0.7 < rows.sum(1).mean() < 4 * 11.5
    runs = (np.diff(np.pad(rows, ((0, 0), (1, 1))).astype(int), axis=1) == 1).sum(1)
    assert runs.max() == 4


def test_a_band_is_never_longer_than_the_sound():
    mask = scenic.quick(lambda x, rng: augment.spec_augment(x, rng, (0, 0), (1, 48)))
    found = mask(jnp.ones((200, 10, 4, 1)), jax.random.key(0))
    width = (np.asarray(found)[:, :, 0, 0] == 0).sum(1)
    assert set(width) <= set(range(11)) and (width == 10).mean() > 0.6


def test_what_is_not_masked_stays():
    x = np.random.default_rng(0).normal(9, 1, (20, 40, 16, 1)).astype(np.float32)
    mask = scenic.quick(lambda x, rng: augment.spec_augment(x, rng, (1, 8), (1, 8)))
    found = np.asarray(mask(x, jax.random.key(0)))
    assert ((found == x) | (found == 0)).all() and 0.2 < (found == x).mean() < 0.95
