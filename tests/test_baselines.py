"""Linear baselines and trivial predictors, on cases that can be worked out by hand."""

import numpy as np
import pytest

from av_mae import baselines


def batch(values, kept, masked):
    patches = np.array(values, np.float32)[None, :, None]
    return patches, np.array([kept]), np.array([masked])


def predict(name, values, kept, masked, grid):
    arrays = batch(values, kept, masked)
    return baselines.PREDICTORS[name](*arrays, grid)[0, :, 0].tolist()


# Four times, two places, time slowest: place 0 is visible at times 0 and 3, place 1
# never. 99 marks what a predictor must not see.
COLUMN = dict(
    values=[10, 99, 99, 99, 99, 99, 40, 99],
    kept=[6, 0],
    masked=[2, 4, 7, 1, 3],
    grid=(4, 2),
)


def test_mean_visible():
    assert predict("mean of visible", **COLUMN) == [25.0] * 5


def test_nearest_in_time_and_its_fallback_to_space():
    # Token 7 (time 3) is beside 6, tokens 1 and 3 (times 0 and 1) nearest to 0.
    assert predict("nearest in time", **COLUMN) == [10, 40, 40, 10, 10]


def test_interpolation_in_time_and_its_fallback_to_space():
    assert predict("interpolation in time", **COLUMN) == [20, 30, 40, 10, 10]


def test_interpolation_does_not_extrapolate():
    values, kept, masked = [99, 5, 99, 9, 99], [3, 1], [0, 2, 4]
    for grid in ((5, 1), (5, 1, 1)):
        got = predict("interpolation in time", values, kept, masked, grid)
        assert got == [5, 7, 9]


def test_nearest_in_time_takes_the_earlier_of_two():
    assert predict("nearest in time", [1, 99, 3], [2, 0], [1], (3, 1)) == [1]


@pytest.mark.parametrize("name", baselines.PREDICTORS)
def test_predictors_agree_with_plain_loops(name):
    rng = np.random.default_rng(0)
    grid, clips = (4, 3, 2), 5
    patches = rng.normal(size=(clips, 24, 3)).astype(np.float32)
    order = np.argsort(rng.random((clips, 24)), axis=1)
    kept, masked = order[:, :5], order[:, 5:]
    want = [
        [plain(name, patches[b], kept[b], token, grid) for token in masked[b]]
        for b in range(clips)
    ]
    got = baselines.PREDICTORS[name](patches, kept, masked, grid)
    np.testing.assert_allclose(got, want, atol=1e-6)


def plain(name, patches, kept, token, grid):
    """One masked token's prediction, written for reading."""
    where = np.array(list(np.ndindex(grid)))
    if name == "mean of visible":
        return patches[kept].mean(0)
    same = [k for k in sorted(kept) if (where[k][1:] == where[token][1:]).all()]
    if not same:
        distance = {k: ((where[k] - where[token]) ** 2).sum() for k in sorted(kept)}
        return patches[min(distance, key=distance.get)]
    earlier = [k for k in same if k < token]
    later = [k for k in same if k > token]
    if name == "interpolation in time" and earlier and later:
        a, b = where[earlier[-1]][0], where[later[0]][0]
        share = (where[token][0] - a) / (b - a)
        return (1 - share) * patches[earlier[-1]] + share * patches[later[0]]
    return patches[min(same, key=lambda k: (abs(k - token), k))]


def test_predictions_do_not_depend_on_masked_patches():
    rng = np.random.default_rng(1)
    patches = rng.normal(size=(2, 12, 2)).astype(np.float32)
    order = np.argsort(rng.random((2, 12)), axis=1)
    kept, masked = order[:, :4], order[:, 4:]
    changed = patches.copy()
    np.put_along_axis(changed, masked[..., None], np.float32(1e6), axis=1)
    for predictor in baselines.PREDICTORS.values():
        first = predictor(patches, kept, masked, (4, 3))
        np.testing.assert_array_equal(first, predictor(changed, kept, masked, (4, 3)))


def test_sound_features_pool_over_time():
    # One mel whose rows are 0 ... 7: four parts of two rows.
    log_mel = np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1)
    got = baselines.sound_features(log_mel)
    np.testing.assert_allclose(got, [[3.5, 5.25**0.5, 0.5, 2.5, 4.5, 6.5]], rtol=1e-6)


def test_frame_features_are_the_middle_frame_in_grey_blocks():
    rgb = np.zeros((1, 2, 3, 4, 4, 3), np.uint8)
    rgb[0, 0, 1, :2, :2] = (30, 60, 90)  # one corner of the middle frame
    rgb[0, 0, 0] = rgb[0, 1] = 255  # another frame, another view
    got = baselines.frame_features(rgb, side=2)
    np.testing.assert_allclose(got, [[60 / 255, 0, 0, 0]], rtol=1e-6)


def test_frame_features_refuse_blocks_of_unequal_size():
    with pytest.raises(ValueError, match="48×48"):
        baselines.frame_features(np.zeros((1, 1, 1, 48, 48, 3), np.uint8))


def make_classes(count, seed, noise):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    features = rng.normal(size=(count, 5))
    features[:, 0] += labels * 1000 / noise  # far from zero mean: must be standardised
    features[:, 0] += 5000
    return features, labels


def test_linear_accuracy_of_separable_and_of_pure_noise():
    easy = linear(make_classes(40, 0, noise=10), make_classes(200, 1, noise=10))
    assert easy == 1.0
    chance = linear(make_classes(40, 0, noise=1e9), make_classes(200, 1, noise=1e9))
    assert 0.35 < chance < 0.65


def linear(train, test):
    return baselines.linear_accuracy(*train, *test)


def test_linear_accuracy_with_one_clip_a_class():
    features, labels = make_classes(50, 0, noise=1)
    features = features[:, :1]
    assert linear((features[:2], labels[:2]), (features, labels)) == 1.0


def test_test_clips_do_not_change_the_classifier():
    train, (features, labels) = make_classes(60, 0, 400), make_classes(100, 1, 400)
    whole = linear(train, (features, labels))
    halves = [linear(train, (features[i::2], labels[i::2])) for i in (0, 1)]
    assert np.mean(halves) == pytest.approx(whole)
    assert whole < 1
