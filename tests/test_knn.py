"""k-NN against scikit-learn's, its weights by hand, and the command on a run."""

import json

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from av_mae import UserError, knn
from av_mae.featureset import FeatureSet


def draw(n: int, seed: int, classes: int = 7, d: int = 5):
    """Features that know something of their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centres = np.random.default_rng(9).normal(0, 1, (classes, d))
    return (centres[labels] + rng.normal(0, 0.7, (n, d))).astype(np.float32), labels


@pytest.mark.parametrize("k, temperature", [(20, 0.07), (5, 1.0)])
def test_votes_are_scikit_learns(k, temperature):
    (x, labels), (y, _) = draw(200, 0), draw(1500, 1)  # more than one chunk
    weigh = lambda distance: np.exp((1 - distance) / temperature)
    reference = KNeighborsClassifier(k, metric="cosine", weights=weigh)
    expected = reference.fit(x, labels).predict_proba(y)
    votes = knn.scores(x, labels, y, 7, k, temperature)
    found = votes / votes.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_near_clip_outvotes_two_far_ones():
    x = np.array([[1, 0], [0.6, 0.8], [0.6, -0.8]], np.float32)  # cosines 1, .6, .6
    labels, y = np.array([0, 1, 1]), np.array([[2, 0]], np.float32)
    np.testing.assert_allclose(
        knn.scores(x, labels, y, 2, k=3, temperature=0.5),
        [[1, 2 * np.exp(-0.4 / 0.5)]],
        rtol=1e-5,
    )
    assert knn.scores(x, labels, y, 2, k=3).argmax() == 0
    assert knn.scores(x, labels, y, 2, k=3, temperature=10.0).argmax() == 1


def sets(n: int, seed: int, has=None, labels=True) -> FeatureSet:
    x, y = draw(n, seed)
    has = np.ones(n, bool) if has is None else has
    names = [f"class {i}" for i in range(7)]
    return FeatureSet(
        {"rgb": x}, {"rgb": has}, y if labels else None, names, list(map(str, range(n)))
    )


def test_only_clips_that_have_the_modality_count():
    has = np.arange(60) % 3 > 0
    train, test = sets(200, 0, np.arange(200) % 2 > 0), sets(60, 1, has)
    row = knn.evaluate(train, test)["rgb"]
    assert row["clips"] == 40 and row["top_1"] < row["top_5"] <= 1
    x, labels = train.features["rgb"][1::2], train.labels[1::2]
    votes = knn.scores(x, labels, test.features["rgb"][has], 7)
    assert row["top_1"] == pytest.approx(
        np.mean(votes.argmax(axis=1) == test.labels[has])
    )
    text = knn.table({"rgb": row}).splitlines()
    assert text[0] == "| | top_1 | top_5 | test clips |"
    assert text[2] == f"| rgb | {row['top_1']:.1%} | {row['top_5']:.1%} | 40 |"


def test_what_has_no_label_or_other_classes_is_refused():
    with pytest.raises(UserError, match="no labels, which k-NN needs"):
        knn.evaluate(sets(9, 0), sets(9, 1, labels=False))
    other = sets(9, 1)
    other.classes.append("more")
    with pytest.raises(UserError, match="classes of the two sets are not the same"):
        knn.evaluate(sets(9, 0), other)


def test_the_command_wants_one_source_of_features(capsys):
    with pytest.raises(SystemExit, match="2"):
        knn.main(["run", "--features", "a.npz", "b.npz"])
    assert "give a checkpoint, or --features with two files" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_on_a_run(toy_run, capsys):
    knn.main([str(toy_run / "pretrain"), "--test", "validation", "--k", "3", "--json"])
    results = json.loads(capsys.readouterr().out)
    assert list(results) == ["rgb", "spectrogram", "rgb+spectrogram"]
    assert all(0 <= row["top_1"] <= 1 and row["clips"] for row in results.values())
