"""RandAugment: timm's arguments, the operations by their formulas, the draws."""

from collections import Counter

import numpy as np
import pytest

from data import ConfigError, randaugment
from data.randaugment import Policy

PUBLISHED = "rand-m7-n4-mstd0.5-inc1"  # VideoMAE

# Arguments at magnitude 7 for both signs, as timm 1.0.31 computes them: with `inc1`,
# and without it where it makes a difference.
AT_SEVEN = {
    "Rotate": (21.0, -21.0),
    "Posterize": (2, 2),
    "Solarize": (77, 77),
    "SolarizeAdd": (77, 77),
    "Color": (1.63, 0.37),
    "Contrast": (1.63, 0.37),
    "Brightness": (1.63, 0.37),
    "Sharpness": (1.63, 0.37),
    "ShearX": (0.21, -0.21),
    "ShearY": (0.21, -0.21),
    "TranslateX": (0.315, -0.315),
    "TranslateY": (0.315, -0.315),
}
PLAIN_AT_SEVEN = dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), 1.36)
PLAIN_AT_SEVEN |= {"Solarize": 179, "Posterize": 2}
WITHOUT = {"AutoContrast", "Equalize", "Invert"}  # an argument


def picture(height=24, width=32, seed=0):
    """Smooth noise over the whole range, uint8 [h w 3]."""
    x = np.random.default_rng(seed).normal(size=(height, width, 3)).cumsum(0).cumsum(1)
    low, high = x.min((0, 1)), x.max((0, 1))
    return ((x - low) / (high - low) * 255).astype(np.uint8)


def done(name, argument, frame):
    """One operation on one frame, as integers that may be subtracted."""
    return randaugment.apply(frame[None], [(name, argument)])[0].astype(int)


def test_the_published_policy():
    assert randaugment.parse(PUBLISHED) == Policy(7.0, 4, 0.5, True)
    assert randaugment.parse("rand-n3") == Policy(10.0, 3, 0.0, False)
    assert randaugment.parse("rand-inc0-mstd2-m9.5") == Policy(9.5, 2, 2.0, False)
    assert randaugment.parse("") is None


@pytest.mark.parametrize(
    "text, words",
    [
        ("random-m7", "'random' is no part of it"),
        ("rand-m7-w0", "'w0' is no part of it"),
        ("rand-m-n4", "'m' is no part of it"),
        ("rand-m7-m8", "a part stands twice"),
        ("rand-m11", "m goes to 10"),
        ("rand-n1.5", "n is a whole number"),
        ("rand-inc2", "inc is 0 or 1"),
    ],
)
def test_a_wrong_policy_is_named(text, words):
    with pytest.raises(ConfigError, match=f"data.randaugment='{text}': .*{words}") as e:
        randaugment.parse(text)
    assert repr(PUBLISHED) in str(e.value)


def test_arguments_are_timms():
    assert set(randaugment.OPERATIONS) == set(AT_SEVEN) | WITHOUT
    assert list(randaugment.INCREASING) == list(randaugment.OPERATIONS)
    for name, operation in randaugment.INCREASING.items():
        plain = randaugment.OPERATIONS[name].argument
        for sign, both in zip((1, -1), range(2), strict=True):
            if name in WITHOUT:
                assert operation.argument(0.7, sign) is None
                continue
            wanted = AT_SEVEN[name][both]
            assert operation.argument(0.7, sign) == pytest.approx(wanted, rel=1e-12)
            wanted = PLAIN_AT_SEVEN.get(name, wanted)
            assert plain(0.7, sign) == pytest.approx(wanted, rel=1e-12)
        assert type(operation.argument(0.7, 1)) is type(plain(0.7, 1))


@pytest.mark.parametrize("name", sorted({*AT_SEVEN} - {"Posterize"}))
def test_no_magnitude_leaves_the_picture(name):
    """What increases does nothing at 0 (posterize keeps 4 bits even then)."""
    frame = picture()
    argument = randaugment.INCREASING[name].argument(0.0, 1)
    np.testing.assert_array_equal(done(name, argument, frame), frame)


def grey(frame):
    """Luma as Pillow rounds it (ITU-R 601)."""
    return (frame @ np.array([19595, 38470, 7471]) + 0x8000) // 65536


def test_values_are_changed_by_their_formulas():
    frame, x = picture(), picture().astype(int)
    mean = int(grey(x).mean() + 0.5)
    wanted = {
        ("Invert", None): 255 - x,
        ("Posterize", 2): x // 64 * 64,
        ("Posterize", 0): 0 * x,
        ("Solarize", 77): np.where(x < 77, x, 255 - x),
        ("SolarizeAdd", 77): np.where(x < 128, np.minimum(x + 77, 255), x),
        ("Brightness", 0.37): x * 0.37,
        ("Brightness", 1.63): np.minimum(x * 1.63, 255),
        ("Contrast", 1.63): np.clip(mean + (x - mean) * 1.63, 0, 255),
        ("Color", 0.37): grey(x)[..., None] * 0.63 + x * 0.37,
    }
    for (name, argument), values in wanted.items():
        found = done(name, argument, frame)
        room = 1.0 if isinstance(argument, float) else 0  # Pillow truncates
        assert abs(found - values).max() <= room, name
    low, high = x.min((0, 1)), x.max((0, 1))
    np.testing.assert_array_equal((low, high), [[0] * 3, [255] * 3])
    narrow = (frame // 3 + 50).astype(np.uint8)  # 50 to 135
    stretched = (narrow.astype(float) - 50) * 3
    assert abs(done("AutoContrast", None, narrow) - stretched).max() <= 1
    flat = np.sort(done("Equalize", None, narrow)[..., 0].ravel())
    assert abs(flat - np.linspace(0, 255, flat.size)).max() < 20
    edges = lambda x: np.abs(np.diff(x.astype(float), axis=1)).mean()
    soft, sharp = (done("Sharpness", factor, frame) for factor in (0.37, 1.63))
    assert edges(soft) < edges(frame) < edges(sharp)


def test_pictures_are_moved_by_their_formulas():
    """Both axes; what moves in is grey."""
    frame = picture(20, 40)
    x = frame.astype(int)
    moved = done("TranslateX", 0.25, frame)  # of 40
    np.testing.assert_array_equal(moved[:, :30], x[:, 10:])
    assert (moved[:, 30:] == 128).all()
    moved = done("TranslateY", -0.25, frame)  # of 20
    np.testing.assert_array_equal(moved[5:], x[:15])
    assert (moved[:5] == 128).all()
    square = picture(30, 30)
    np.testing.assert_array_equal(done("Rotate", 90.0, square), np.rot90(square))
    # Of a ramp along x, row y is shifted by factor · (y + ½), of all its pixels.
    ramp = np.broadcast_to(np.arange(40)[None, :, None] * 5, (20, 40, 3))
    sheared = done("ShearX", 0.3, np.ascontiguousarray(ramp, np.uint8))
    wanted = (np.arange(40)[None] + 0.3 * (np.arange(20)[:, None] + 0.5)) * 5
    inside = wanted < 38 * 5
    assert abs(sheared[..., 0] - wanted)[inside].max() < 1.5
    assert (sheared[-1, -3:] == 128).all()
    upright = done("ShearY", 0.3, np.ascontiguousarray(ramp.swapaxes(0, 1), np.uint8))
    np.testing.assert_array_equal(upright.swapaxes(0, 1), sheared)


def draws(policy, count=8000):
    rng = np.random.default_rng(0)
    return [randaugment.draw(policy, rng) for _ in range(count)]


def test_operations_are_drawn_alike_with_replacement_half_of_them_done():
    found = draws(randaugment.parse(PUBLISHED))
    sizes = Counter(len(drawn) for drawn in found)
    for size, wanted in enumerate(np.array([1, 4, 6, 4, 1]) / 16):  # binomial
        assert abs(sizes[size] / 8000 - wanted) < 0.022  # 4 deviations
    names = Counter(name for drawn in found for name, _ in drawn)
    assert set(names) == set(randaugment.OPERATIONS)
    assert all(abs(n - 16000 / 15) < 130 for n in names.values())
    twice = [drawn for drawn in found if len({name for name, _ in drawn}) < len(drawn)]
    assert twice


def test_magnitudes_are_normal_and_signs_even():
    degrees = [
        argument
        for drawn in draws(randaugment.parse(PUBLISHED))
        for name, argument in drawn
        if name == "Rotate"
    ]
    size = np.abs(degrees) / 3  # the magnitude
    assert abs(size.mean() - 7) < 0.07 and abs(size.std() - 0.5) < 0.05
    assert abs(np.mean(np.sign(degrees))) < 0.13
    size = [a for drawn in draws(Policy(9.5, 1, 3.0), 4000) for n, a in drawn]
    largest = {a for a in size if isinstance(a, float)}
    assert max(largest) == 30.0 and min(largest) == -30.0  # never beyond 10
    fixed = {a for drawn in draws(Policy(7.0, 2), 2000) for n, a in drawn}
    assert sorted(a for a in fixed if a and abs(a) > 20) == [-21.0, 21.0, 77, 179]


def test_every_frame_of_a_clip_gets_the_same():
    frame = picture()
    clip = np.stack([frame] * 5)
    policy, rng = randaugment.parse(PUBLISHED), np.random.default_rng(1)
    results = set()
    for _ in range(12):
        found = randaugment.apply(clip, randaugment.draw(policy, rng))
        assert found.shape == clip.shape and found.dtype == np.uint8
        assert (found == found[:1]).all()
        results.add(found.tobytes())
    assert len(results) > 8
    np.testing.assert_array_equal(clip, np.stack([frame] * 5))  # left as it was
    assert randaugment.apply(clip, []) is clip
