"""Targets and losses against the published code's numbers and by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from einops import rearrange

from av_mae import ConfigError, losses

SHARED = Path(__file__).resolve().parents[2] / "shared"
SCENIC = SHARED / "fixtures" / "scenic"
needs_fixtures = pytest.mark.skipif(
    not SCENIC.is_dir(), reason=f"the published numbers are not at {SCENIC}"
)


def patches_of(clip):
    """Patches of 8 by 8, tubes of 2 for frames, tokens in the order (t, h, w)."""
    if clip.ndim == 5:
        pattern = "b (t u) (h p) (w q) c -> b (t h w) (u p q c)"
        return jnp.asarray(rearrange(clip, pattern, u=2, p=8, q=8))
    return jnp.asarray(rearrange(clip, "b (h p) (w q) c -> b (h w) (p q c)", p=8, q=8))


# Scenic's names of our targets.
PUBLISHED = {
    "plain": "raw",
    "standardise": "standardised",
    "standardise_channels": "standardised_channels",
    "grayscale": "grey",
    "central_frame": "central_frame",
    "standardise_central_frame": "standardised_central_frame",
}


def stored_targets():
    """(name, the input, ours of its kind) of each stored target."""
    stored = np.load(SCENIC / "pretrain" / "targets.npz")
    inputs = np.load(SCENIC / "pretrain" / "inputs.npz")
    for name in stored:
        source, _, kind = name.rpartition("/")
        if kind in PUBLISHED:
            clip = stored["image_input"] if source == "image" else inputs[source]
            yield name, clip, PUBLISHED[kind], stored[name]


@needs_fixtures
def test_targets_are_the_published_ones():
    cases = list(stored_targets())
    assert len(cases) >= 18 and {kind for _, _, kind, _ in cases} == {
        *PUBLISHED.values()
    }
    for name, clip, kind, wanted in cases:
        frames = 2 if clip.ndim == 5 else 1
        found = losses.target(patches_of(clip), kind, clip.shape[-1], frames)
        assert (
            losses.target_size(kind, 64 * frames * clip.shape[-1], frames)
            == (wanted.shape[-1])
        )
        error = float(np.abs(np.asarray(found) - wanted).max())
        parity.record("Scenic targets", name, outputs=error)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5, err_msg=name)


def test_one_channel_by_patch_and_channel_is_by_patch():
    patches = jax.random.normal(jax.random.key(0), (2, 4, 24))
    found = losses.target(patches, "standardised_channels", 1)
    np.testing.assert_array_equal(found, losses.target(patches, "standardised", 1))


@needs_fixtures
@pytest.mark.parametrize("objective", ["multiclass", "multilabel"])
@pytest.mark.parametrize("smoothing", [None, 0.3])
@pytest.mark.parametrize("valid", [None, [True, False]])
def test_cross_entropies_are_the_published_ones(objective, smoothing, valid):
    """The published loss of a dict of logits is their mean over the modalities."""
    case = np.load(SCENIC / "finetune" / "cases" / CROSS_ENTROPY_CASES[objective])
    inputs = np.load(SCENIC / "finetune" / "inputs.npz")
    function = {
        "multiclass": losses.softmax_cross_entropy,
        "multilabel": losses.sigmoid_cross_entropy,
    }[objective]
    tail = f"ls{smoothing}/{'mask10' if valid else 'nomask'}"
    rows = None if valid is None else jnp.asarray(valid)

    def loss(logits, label):
        labels = jnp.asarray(inputs[f"label_{objective}/{label}"])
        return function(jnp.asarray(case[logits]), labels, smoothing or 0.0, rows)

    np.testing.assert_allclose(
        loss("logits_eval", "all"), case[f"loss/eval_array/{tail}"], 1e-5
    )
    modalities = [k.split("/")[1] for k in case if k.startswith("logits_train/")]
    each = [loss(f"logits_train/{m}", m) for m in modalities]
    np.testing.assert_allclose(np.mean(each), case[f"loss/train_dict/{tail}"], 1e-5)


CROSS_ENTROPY_CASES = {
    "multiclass": "multiclass__rgb_spectrogram.npz",
    "multilabel": "multilabel__rgb_only.npz",
}


@pytest.mark.parametrize("kind", losses.TARGETS)
def test_statistics_bring_a_prediction_back(kind):
    patches = 5 + 3 * jax.random.normal(jax.random.key(0), (2, 4, 24))
    mean, deviation = losses.target_statistics(patches, kind, 3, 2)
    found = losses.target(patches, kind, 3, 2)
    values = losses.TARGETS[kind].values(patches, 3, 2)
    assert values.shape[-1] == losses.target_size(kind, 24, 2)
    np.testing.assert_allclose(found * deviation + mean, values, rtol=1e-5, atol=1e-5)
    if kind != "grey":
        drawn = losses.to_patches(values, 24)
        np.testing.assert_array_equal(drawn[..., 12:], patches[..., 12:])


def test_the_unbiased_target_is_that_of_videomae():
    """Each channel of a patch apart: (x − mean) / (√(Σ(x − mean)²/(p − 1)) + 1e-6)."""
    patches = np.random.default_rng(0).normal(size=(2, 3, 12)).astype(np.float32)
    found = losses.target(jnp.asarray(patches), "standardised_channels_unbiased", 3)
    x = patches.astype(np.float64).reshape(2, 3, 4, 3)
    centred = x - x.mean(axis=2, keepdims=True)
    deviation = np.sqrt((centred**2).sum(axis=2, keepdims=True) / 3) + 1e-6
    wanted = (centred / deviation).reshape(2, 3, 12)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_flat_patch_has_a_finite_target():
    flat = jnp.full((1, 1, 12), 0.7)
    np.testing.assert_allclose(losses.target(flat, "standardised", 3), 0, atol=1e-3)


def test_an_unknown_target_is_named():
    with pytest.raises(ConfigError, match="objective.target is 'rwa': .* 'raw'"):
        losses.target(jnp.ones((1, 1, 3)), "rwa", 3)


def test_absent_clips_are_out_of_loss_and_gradient():
    prediction, target = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    present = jnp.array([True, False, True])
    # What an absent clip holds does not matter, be it not a number.
    broken = prediction.at[1].set(jnp.nan), target.at[1].set(jnp.inf)
    found, gradient = jax.value_and_grad(losses.masked_mse)(*broken, present)
    alone, wanted = jax.value_and_grad(losses.masked_mse)(
        prediction[jnp.array([0, 2])], target[jnp.array([0, 2])]
    )
    np.testing.assert_allclose(found, alone, 1e-6)
    np.testing.assert_allclose(gradient[jnp.array([0, 2])], wanted, 1e-6)
    np.testing.assert_array_equal(gradient[1], 0)
    by_hand = np.mean((np.asarray(prediction) - np.asarray(target))[[0, 2]] ** 2)
    np.testing.assert_allclose(found, by_hand, 1e-6)


def test_no_clip_present_is_no_loss():
    prediction, target = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    loss, gradient = jax.value_and_grad(losses.masked_mse)(
        prediction, target, jnp.zeros(3, bool)
    )
    assert loss == 0
    np.testing.assert_array_equal(gradient, 0)


def test_bfloat16_predictions_are_compared_in_float32():
    prediction = jnp.ones((2, 3, 4), jnp.bfloat16)
    target = jnp.full((2, 3, 4), 1.001)
    np.testing.assert_allclose(losses.masked_mse(prediction, target), 1e-6, 1e-3)


def test_softmax_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6]]))
    labels = jnp.array([0, 2, 1])
    valid = jnp.array([True, True, False])
    found = losses.softmax_cross_entropy(logits, labels, 0.0, valid)
    np.testing.assert_allclose(found, -np.log([0.5, 0.8]).mean(), 1e-6)
    smoothed = losses.softmax_cross_entropy(logits[:1], labels[:1], 0.3)
    np.testing.assert_allclose(
        smoothed, -(0.8 * np.log(0.5) + 0.2 * np.log(0.25)), 1e-6
    )


def test_sigmoid_sums_over_classes():
    logits = jnp.zeros((2, 7))
    labels = jnp.ones((2, 7))
    found = losses.sigmoid_cross_entropy(logits, labels)
    np.testing.assert_allclose(found, 7 * np.log(2), 1e-6)
    certain = losses.sigmoid_cross_entropy(jnp.full((1, 2), 1e4), jnp.ones((1, 2)))
    assert certain == 0


def test_padding_rows_have_no_gradient():
    logits = jnp.array([[1.0, -1.0], [jnp.nan, 3.0]])
    valid = jnp.array([True, False])
    for loss in (losses.softmax_cross_entropy, losses.sigmoid_cross_entropy):
        gradient = jax.grad(loss)(logits, jnp.eye(2), 0.1, valid)
        assert jnp.isfinite(gradient[0]).all() and (gradient[0] != 0).any()
        assert loss(logits, jnp.eye(2), 0.1, jnp.zeros(2, bool)) == 0
