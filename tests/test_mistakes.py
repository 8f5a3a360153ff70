"""Confusion, average precision and hardest clips against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, confusion_matrix, log_loss

from av_mae import UserError, mistakes

CLASSES = ["a", "b", "c", "never"]


@pytest.fixture
def single():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 40)
    logits = rng.normal(0, 1, (40, 4)).astype(np.float32)
    logits[np.arange(40), labels] += 1
    return mistakes.Answers(logits, labels, [f"clip {i}" for i in range(40)], CLASSES)


@pytest.fixture
def several():
    rng = np.random.default_rng(1)
    labels = (rng.random((30, 4)) < [0.3, 0.5, 0.2, 0]).astype(np.float32)
    logits = rng.normal(0, 1, (30, 4)).astype(np.float32) + labels
    return mistakes.Answers(logits, labels, [f"clip {i}" for i in range(30)], CLASSES)


def test_confusion(single, several):
    found = mistakes.confusion(single)
    guess = single.logits.argmax(axis=1)
    np.testing.assert_array_equal(
        found, confusion_matrix(single.labels, guess, labels=range(4))
    )
    with pytest.raises(UserError, match="one label for each clip"):
        mistakes.confusion(several)


def test_the_most_confused_classes_keep_their_order():
    table = np.diag([5, 5, 5, 5])
    table[3, 1], table[0, 3] = 2, 1  # 3 is in three mistakes, 1 in two, 0 in one
    assert mistakes.most_confused(table, 2).tolist() == [1, 3]


@pytest.mark.parametrize("which", ["single", "several"])
def test_average_precision(request, which):
    found = request.getfixturevalue(which)
    precision = mistakes.average_precision(found)
    for i in range(3):
        scores = found.probabilities[:, i]
        wanted = average_precision_score(found.positive[:, i], scores)
        assert precision[i] == pytest.approx(wanted)
    assert np.isnan(precision[3])


def test_hardest_clips_have_the_largest_loss(single):
    rows = mistakes.hardest(single, 40)
    losses = [row["loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    whole = log_loss(single.labels, single.probabilities, labels=range(4))
    assert np.mean(losses) == pytest.approx(whole, rel=1e-5)
    first = int(rows[0]["id"].removeprefix("clip "))
    assert rows[0]["labels"] == [CLASSES[single.labels[first]]]
    assert rows[0]["guess"] == CLASSES[single.logits[first].argmax()]
    assert len(mistakes.hardest(single, 5)) == 5


def test_hardest_of_several_labels_name_them_all(several):
    row = mistakes.hardest(several, 1)[0]
    i = int(row["id"].removeprefix("clip "))
    assert row["labels"] == [CLASSES[k] for k in np.flatnonzero(several.labels[i])]
    p = several.probabilities[i]
    loss = -np.where(several.labels[i] > 0, np.log(p), np.log(1 - p)).mean()
    assert row["loss"] == pytest.approx(loss, rel=1e-5)


def test_answers_are_the_models_on_all_valid_clips():
    class Model:
        def logits(self, batch):
            return np.stack([batch["index"] * 1.0, -batch["index"]], axis=1)

    class Set:
        ids, label_names = ["x", "y", "z"], ["a", "b"]

        def evaluate(self, batch_size):
            valid, index = np.array([True, True]), np.array([0, 1])
            yield {"index": index, "valid": valid, "label": index % 2}
            index, valid = np.array([2, -1]), np.array([True, False])
            yield {"index": index, "valid": valid, "label": np.array([0, 0])}

    found = mistakes.answers(Model(), Set(), 2)
    assert found.ids == ["x", "y", "z"] and found.labels.tolist() == [0, 1, 0]
    assert found.logits[:, 0].tolist() == [0, 1, 2] and found.classes == ["a", "b"]
