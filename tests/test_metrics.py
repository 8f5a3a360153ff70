"""Metrics over padded batches against the whole set at once."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from av_mae import metrics

SHARED = Path(__file__).resolve().parents[2] / "shared"
PUBLISHED = SHARED / "fixtures" / "scenic" / "finetune" / "metrics.npz"


@pytest.mark.skipif(
    not PUBLISHED.is_file(), reason=f"the published numbers are not at {PUBLISHED}"
)
def test_accuracies_are_the_published_ones():
    arrays = np.load(PUBLISHED)
    valid = jnp.asarray(arrays["weights"]) > 0
    found = metrics.results(
        jax.jit(metrics.classification)(
            jnp.asarray(arrays["logits"]),
            jnp.asarray(arrays["onehot"].argmax(axis=1)),
            valid,
        )
    )
    count = arrays["weights"].sum()
    assert found["top_1"] == pytest.approx(arrays["accuracy"].sum() / count)
    assert found["top_5"] == pytest.approx(arrays["accuracy_top_5"].sum() / count)


@pytest.mark.skipif(
    not PUBLISHED.is_file(), reason=f"the published numbers are not at {PUBLISHED}"
)
def test_several_labels_are_ranked_as_published():
    arrays = np.load(PUBLISHED)
    logits, labels = arrays["logits"], arrays["labels"]
    found = metrics.ranking(logits, labels)
    names = dict(mAP="mAP", AUC="AUC", d_prime="d-prime")
    errors = [found[ours] - arrays[f"summary/{name}"] for ours, name in names.items()]
    assert np.abs(errors).max() < 1e-6
    assert found["mAP"] == pytest.approx(
        float(arrays["summary/nanmean_average_precision"]), abs=1e-6
    )
    for k in range(11):
        one = metrics.ranking(logits[:, [k]], labels[:, [k]])["mAP"]
        wanted = float(arrays[f"summary/per_class_average_precision_{k}"])
        assert one == pytest.approx(wanted, abs=1e-6)
    parity.record("Scenic metrics", "mAP, AUC, d'", outputs=np.abs(errors).max())


def test_ranking_by_hand():
    """Of four clips in the order of their scores the first and third are positive."""
    scores = np.array([[4.0], [3.0], [2.0], [1.0]])
    found = metrics.ranking(scores, np.array([[1.0], [0.0], [1.0], [0.0]]))
    assert found["mAP"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["AUC"] == pytest.approx(3 / 4)
    assert found["d_prime"] == pytest.approx(math.sqrt(2) * 0.6744898)


def test_classes_that_cannot_be_ranked_are_left_out():
    """The first class has no positive clip, the second no negative one."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(20, 4))
    labels = (rng.random((20, 4)) < 0.5).astype(np.float32)
    labels[:, 0], labels[:, 1] = 0, 1
    found, rest = (metrics.ranking(scores[:, i:], labels[:, i:]) for i in (0, 2))
    assert found["AUC"] == rest["AUC"] and found["d_prime"] == rest["d_prime"]
    assert found["mAP"] == pytest.approx((1 + 2 * rest["mAP"]) / 3)
    none = metrics.ranking(scores[:, :1], labels[:, :1])
    assert all(np.isnan(value) for value in none.values())


def test_an_action_is_right_where_all_heads_are():
    logits = {"verb": jnp.eye(3)[jnp.array([0, 1, 2, 0])]}
    logits["noun"] = jnp.eye(4)[jnp.array([3, 2, 1, 0])]
    labels = {"verb": jnp.array([0, 1, 0, 0]), "noun": jnp.array([3, 0, 1, 0])}
    found = metrics.all_right(logits, labels)
    assert (found.total, found.count) == (2, 4)
    valid = jnp.array([True, True, True, False])
    found = metrics.all_right(logits, labels, valid)
    assert (found.total, found.count) == (1, 3)


def padded(array, start, size):
    """A batch, its last rows filled up with something that would show."""
    rows = array[start : start + size]
    missing = size - len(rows)
    filled = np.concatenate([rows, np.full((missing, *rows.shape[1:]), 3, rows.dtype)])
    return jnp.asarray(filled), jnp.arange(size) < len(rows)


def test_padded_batches_add_up_to_the_whole():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((10, 7)).astype(np.float32)
    labels = rng.integers(0, 7, 10).astype(np.int32)
    values = rng.standard_normal((10, 3)).astype(np.float32)
    sums = {}
    for start in range(0, 10, 4):
        rows, valid = padded(logits, start, 4)
        wanted, _ = padded(labels, start, 4)
        more, _ = padded(values, start, 4)
        batch = {
            "scores": metrics.classification(rows, wanted, valid),
            "loss": metrics.mean(more, valid),
        }
        sums = metrics.add(sums, batch)
    found = metrics.results(sums)
    order = np.argsort(-logits, axis=1)
    hits = order == labels[:, None]
    assert found["scores"]["top_1"] == pytest.approx(hits[:, :1].any(1).mean())
    assert found["scores"]["top_5"] == pytest.approx(hits[:, :5].any(1).mean())
    assert found["loss"] == pytest.approx(values.mean(), rel=1e-6)
    assert sums["loss"].count == 30 and isinstance(sums["loss"].total, np.float64)


@pytest.mark.parametrize(
    "classes, names", [(6, {"top_1", "top_5"}), (5, {"top_1"}), (2, {"top_1"})]
)
def test_top_5_needs_six_classes(classes, names):
    found = metrics.classification(jnp.zeros((2, classes)), jnp.zeros(2, jnp.int32))
    assert set(found) == names


def test_equal_logits_are_not_credited():
    labels = jnp.arange(10)
    found = metrics.results(metrics.classification(jnp.zeros((10, 10)), labels))
    assert found == {"top_1": pytest.approx(0.1), "top_5": pytest.approx(0.5)}


def test_nothing_counted_is_not_a_number():
    empty = metrics.mean(jnp.full(3, jnp.nan), jnp.zeros(3, bool))
    assert np.isnan(metrics.results({"loss": empty})["loss"])
    assert empty.total == 0


def test_fraction_of_variance():
    """A constant prediction of the mean is 1, half the deviation away a quarter."""
    rng = np.random.default_rng(0)
    target = (rng.standard_normal((12, 5, 8)) * 3 - 8).astype(np.float32)
    present = np.arange(12) % 4 != 0
    kept = target[present].astype(np.float64)
    for prediction, wanted in [
        (np.full_like(target, kept.mean()), 1.0),
        (target + kept.std() / 2, 0.25),
        (target, 0.0),
    ]:
        prediction[~present] = 1e3
        sums = {}
        for rows in (slice(0, 6), slice(6, 12)):
            arrays = (jnp.asarray(x[rows]) for x in (prediction, target, present))
            sums = metrics.add(sums, metrics.reconstruction(*arrays))
        found = metrics.fraction_of_variance(metrics.results(sums))
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-9)


def test_a_constant_target_has_no_fraction():
    flat = metrics.reconstruction(jnp.ones((1, 2, 3)), jnp.ones((1, 2, 3)))
    assert np.isnan(metrics.fraction_of_variance(metrics.results(flat)))
