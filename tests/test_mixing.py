"""Mixing rows, against the numbers of Scenic and of timm as VideoMAE uses it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import scenic
from ml_collections import ConfigDict

from av_mae import mixing
from av_mae.mixing import Mix

RECIPE = scenic.SHARED / "fixtures" / "videomae" / "mcg_recipe" / "recipe.npz"
close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)


def blend(share):
    share = jnp.asarray(share, jnp.float32)
    return Mix(share, jnp.zeros(share.shape, bool), jnp.zeros((*share.shape, 4), int))


def settings(**changes):
    fields = dict(mixup=0.0, cutmix=0.0, mix_probability=1.0, mix_switch=0.5)
    return ConfigDict(fields | dict(mix_per_modality=False) | changes)


# The stored cases: blends and cuts of Scenic, batches of timm.


SCENIC = scenic.SCENIC / "finetune" / "mixup.npz"
BLENDS = scenic.stored(SCENIC, r"(\w+)/weights")
CUTS = scenic.stored(SCENIC, r"(cutmix/case.*)/inputs")
TIMM = scenic.stored(RECIPE, r"(mixup_(batch|pair|elem)_.*)_x")


@scenic.needed
def test_no_stored_case_is_missing():
    assert len(BLENDS) >= 2 and len(CUTS) >= 3
    assert not RECIPE.is_file() or len(TIMM) >= 9


@scenic.needed
@pytest.mark.parametrize("kind", BLENDS)
def test_blends_are_scenics(kind):
    stored = scenic.arrays("finetune/mixup.npz")
    start = scenic.arrays("finetune/inputs.npz")
    shares = np.broadcast_to(stored[f"{kind}/weights"], 2)
    for share, m in zip(shares, ("rgb", "spectrogram"), strict=True):
        mix = blend(share)
        x, label = start[f"input/{m}"], start["label_multiclass/all"]
        found, wanted = mixing.apply(jnp.asarray(x), mix), stored[f"{kind}/inputs/{m}"]
        close(found, wanted)
        error = np.abs(found - wanted).max()
        close(mixing.labels(jnp.asarray(label), mix, 11), stored[f"{kind}/label/{m}"])
    parity.record("Mixup and cutmix", f"scenic {kind}", outputs=error)


def recovered(x, found, share):
    """The Mix of stored inputs: boxes where all values are the other row's."""
    other = x[::-1]
    changed = (found == other).all(axis=(1, 4))  # b h w
    cut = changed.any(axis=(1, 2))
    boxes = np.zeros((len(x), 4), int)
    for row in np.flatnonzero(cut):
        rows, columns = np.nonzero(changed[row])
        boxes[row] = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        top, bottom, left, right = boxes[row]
        assert changed[row].sum() == (bottom - top) * (right - left)
    return Mix(jnp.asarray(share), jnp.asarray(cut), jnp.asarray(boxes))


def shares_of(labels, first, smoothing):
    """What each row keeps of its label, from labels that were smoothed."""
    classes = labels.shape[1]
    mixed = (labels - smoothing / classes) / (1 - smoothing)
    return mixed[np.arange(len(labels)), first]


@scenic.needed
@pytest.mark.parametrize("name", CUTS)
def test_cuts_are_scenics(name):
    stored = scenic.arrays("finetune/mixup.npz")
    smoothing = float(name.split("_ls")[1].split("_")[0])
    compare(
        name,
        stored["cutmix/inputs"][:, None],
        stored["cutmix/label"].argmax(axis=1),
        stored[f"{name}/inputs"][:, None],
        stored[f"{name}/label"],
        smoothing,
    )


@pytest.mark.skipif(not RECIPE.is_file(), reason=f"there are no numbers at {RECIPE}")
@pytest.mark.parametrize("name", TIMM)
def test_mixing_is_timms(name):
    """Shares and boxes of the batch, of pairs and of each row."""
    stored = np.load(RECIPE)
    video = lambda key: np.moveaxis(stored[key], 1, -1)  # b c t h w to b t h w c
    found = stored[f"{name}_y"]
    args = (video("mixup_input"), stored["mixup_labels"], video(f"{name}_x"), found)
    compare(name, *args, 0.1)


def compare(name, x, labels, wanted, wanted_labels, smoothing):
    """Ours with the stored shares and boxes gives the stored inputs and labels."""
    share = shares_of(wanted_labels, labels, smoothing)
    mix = recovered(x, wanted, share)
    found = np.asarray(mixing.apply(jnp.asarray(x), mix))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    classes = wanted_labels.shape[1]
    mixed = mixing.labels(jnp.asarray(labels), mix, classes)
    close(mixed * (1 - smoothing) + smoothing / classes, wanted_labels)
    area = (mix.box[:, 1] - mix.box[:, 0]) * (mix.box[:, 3] - mix.box[:, 2])
    area = area / (x.shape[2] * x.shape[3])
    if "pair" not in name:  # whose boxes are of time and height, by an oversight
        for row in np.flatnonzero(mix.cut):
            assert share[row] == pytest.approx(1 - float(area[row]), abs=1e-6)
    parity.record("Mixup and cutmix", name, outputs=np.abs(found - wanted).max())


def drawn(augment, modalities=("rgb", "spectrogram"), size=(20, 30), count=1000):
    draw = lambda key: mixing.draw(key, augment, size, modalities)
    return scenic.quick(jax.vmap(draw))(jax.random.split(jax.random.key(0), count))


def test_shares_are_drawn_from_beta():
    found = drawn(settings(mixup=0.8))
    share = np.asarray(found["rgb"].share)
    np.testing.assert_array_equal(share, found["spectrogram"].share)
    assert not found["rgb"].cut.any()
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)).
    assert share.mean() == pytest.approx(0.5, abs=0.04)
    assert share.var() == pytest.approx(1 / (4 * 2.6), rel=0.1)


def test_each_modality_draws_its_own():
    found = drawn(settings(mixup=0.5, mix_per_modality=True))
    shares = np.stack([found[m].share for m in ("rgb", "spectrogram")])
    assert abs(np.corrcoef(shares)[0, 1]) < 0.12


@pytest.mark.parametrize("probability", [1.0, 0.4])
def test_cuts_are_drawn_as_often_as_asked(probability):
    found = drawn(settings(mixup=0.8, cutmix=1.0, mix_probability=probability))
    rgb, sound = found["rgb"], found["spectrogram"]
    assert rgb.cut.mean() == pytest.approx(0.5, abs=0.06)
    assert not sound.cut.any()
    np.testing.assert_array_equal(rgb.share, sound.share)
    assert (rgb.share < 1).mean() == pytest.approx(probability, abs=0.07)
    top, bottom, left, right = np.asarray(rgb.box).T
    assert ((0 <= top) & (top <= bottom) & (bottom <= 20)).all()
    assert ((0 <= left) & (left <= right) & (right <= 30)).all()
    area = (bottom - top) * (right - left) / 600
    close(rgb.share[rgb.cut], 1 - area[rgb.cut])
    assert drawn(settings(cutmix=1.0))["rgb"].cut.all()


def test_boxes_lie_anywhere_and_have_their_area():
    keys = jax.random.split(jax.random.key(1), 2000)
    draw = jax.vmap(lambda key: mixing.draw_box(key, jnp.float32(0.75), (20, 30)))
    top, bottom, left, right = np.asarray(draw(keys)).T
    whole = (top > 0) & (bottom < 20) & (left > 0) & (right < 30)
    assert set(bottom[whole] - top[whole]) == {10}
    assert set(right[whole] - left[whole]) == {14}
    assert (right - left).max() == 14 and (right - left).min() == 7  # half sticks out
    middle = (top[whole] + bottom[whole]) / 2
    assert middle.min() == 6 and middle.max() == 14


def test_a_row_without_a_partner_keeps_its_own():
    x = jnp.arange(4.0)[:, None, None, None]
    present = jnp.array([True, True, True, False])
    mix = mixing.among(blend(0.25), present)
    np.testing.assert_array_equal(mix.share, [1, 0.25, 0.25, 0.25])
    np.testing.assert_array_equal(
        mixing.apply(x, mix)[:3, 0, 0, 0], [0, 0.25 + 1.5, 0.5 + 0.75]
    )
    whole = Mix(jnp.float32(0.0), jnp.array(True), jnp.array([0, 9, 0, 9]))
    x = jnp.arange(4.0).reshape(4, 1, 1, 1, 1)
    found = mixing.apply(x, mixing.among(whole, present)).ravel()
    np.testing.assert_array_equal(found[:3], [0, 2, 1])
    assert mixing.among(whole, None) is whole


@pytest.mark.parametrize(
    "changes, wanted",
    [
        (dict(), False),
        (dict(mixup=0.5), True),
        (dict(cutmix=1.0), True),
        (dict(mixup=0.5, mix_probability=0.0), False),
    ],
)
def test_nothing_is_mixed_unless_asked(changes, wanted):
    assert mixing.is_wanted(settings(**changes)) is wanted
