"""Attention by every implementation that a CPU has, against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from av_mae import ConfigError, attention


def formula(query, key, value, present=None):
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    logits = np.einsum("bnhe,bkhe->bhnk", query, key) / np.sqrt(query.shape[-1])
    if present is not None:
        logits = np.where(present[:, None, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhnk,bkhe->bnhe", weights, value)


def heads(dtype=jnp.float32, scale=1.0):
    """query [2 5 3 4], key and value [2 6 3 4]."""
    rng = np.random.default_rng(0)
    shapes = ((2, 5, 3, 4), (2, 6, 3, 4), (2, 6, 3, 4))
    return [jnp.asarray(scale * rng.normal(size=s), dtype) for s in shapes]


PRESENT = jnp.array([[True] * 6, [True, False, True, True, False, False]])


@pytest.mark.parametrize("kind", ["auto", "xla", "dot"])
@pytest.mark.parametrize("present", [None, PRESENT], ids=["all", "some"])
def test_the_formula(kind, present):
    found = attention.attend(*heads(), present, kind)
    np.testing.assert_allclose(found, formula(*heads(), present), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["xla", "dot"])
def test_statistics_are_float32_where_activations_are_not(kind):
    """Logits near 100: in bfloat16 they would be half a unit apart, e^0.25 wrong."""
    args = heads(jnp.bfloat16, 8.0)
    found = attention.attend(*args, None, kind, jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    wanted = formula(*args)
    error = np.abs(found.astype(jnp.float32) - wanted)
    assert error.max() < 0.01 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("backend", "dtype", "keys", "e", "kind"),
    [
        ("cpu", "float32", 1568, 64, "xla"),
        ("cpu", "bfloat16", 1568, 64, "xla"),
        ("tpu", "bfloat16", 1568, 64, "xla"),
        ("gpu", "bfloat16", 1568, 64, "cudnn"),
        ("gpu", "bfloat16", 8, 64, "xla"),
        ("gpu", "float32", 1568, 64, "xla"),
        ("gpu", "bfloat16", 1568, 100, "xla"),
        ("gpu", "bfloat16", 1568, 136, "xla"),
    ],
)
def test_cudnn_only_where_it_runs_and_saves(backend, dtype, keys, e, kind):
    assert attention.best(backend, dtype, keys, e) == kind


def test_cudnn_is_not_chosen_where_keys_may_be_absent():
    assert attention.best("gpu", "bfloat16", 1568, 64, False) == "xla"


def test_cudnn_takes_a_mask_of_every_query(monkeypatch):
    """Traced alone: there is no cuDNN here."""
    seen = {}

    def record(query, key, value, mask, implementation):
        seen.update(mask=mask.shape, kind=implementation)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    query, key, value = heads(jnp.bfloat16)
    even = (query[:, :4], key, value)
    jax.eval_shape(lambda p: attention.attend(*even, p, "cudnn"), PRESENT)
    assert seen == {"mask": (2, 1, 4, 6), "kind": "cudnn"}
    with pytest.raises(ConfigError, match="6 for 5 queries.* set it to 'auto'"):
        attention.attend(query, key, value, PRESENT, "cudnn")


def test_the_named_one_is_taken():
    """cuDNN does not exist on a CPU: asked for by name, it is asked for."""
    args = heads(jnp.bfloat16)
    with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        jax.block_until_ready(attention.attend(*args, None, "cudnn", jnp.bfloat16))
