"""Roll-out: matrices that are what the layers do, multiplied."""

import itertools

import jax
import numpy as np
import pytest

from av_mae import rollout
from av_mae.representation import Place


def qkv(n: int, seed: int = 0, heads: int = 2, e: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3, heads, e)).astype(np.float32)


@pytest.mark.parametrize("exist", [None, [True, False, True, True, False]])
def test_weights_are_those_of_the_attention(exist):
    x = qkv(5)
    exist = None if exist is None else np.array(exist)
    # What attention makes of values that are 1 at one token, head by head.
    q, k = x[None, :, 0], x[None, :, 1]
    mask = None if exist is None else exist[None, None, None]
    each = []
    for head, column in itertools.product(range(2), range(5)):
        v = np.zeros((1, 5, 1, 4), np.float32)
        v[0, column] = 1
        one = slice(head, head + 1)
        out = jax.nn.dot_product_attention(q[:, :, one], k[:, :, one], v, mask=mask)
        each.append(np.asarray(out)[0, :, 0, 0])
    each = np.stack(each, axis=-1).reshape(5, 2, 5).swapaxes(0, 1)
    found = rollout.attention_weights(x, exist)
    np.testing.assert_allclose(found, np.mean(each, axis=0), atol=1e-6)


def test_parts_of_the_nodes():
    nodes = rollout.Nodes({"rgb": 3, "spectrogram": 2}, 4, ("rgb", "spectrogram"))
    assert nodes.size == 9
    assert nodes.part("spectrogram") == slice(3, 5) and nodes.last() == slice(5, 9)


def test_layers_where_modalities_do_not_meet_have_blocks_of_zeros():
    nodes = rollout.Nodes({"rgb": 3, "spectrogram": 2}, 0, ("rgb", "spectrogram"))
    calls = {"rgb": qkv(3), "spectrogram": qkv(2, 1)}
    places = {m: Place(m, 0) for m in calls}
    matrix = rollout.layer_matrix(nodes, places, calls)
    np.testing.assert_allclose(matrix[:3, :3], rollout.attention_weights(calls["rgb"]))
    assert (matrix[:3, 3:] == 0).all() and (matrix[3:, :3] == 0).all()
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-6)


def test_what_a_clip_lacks_is_never_attended_to():
    nodes = rollout.Nodes({"rgb": 3, "spectrogram": 2}, 0, ("spectrogram",))
    x = qkv(5)
    places = dict.fromkeys(nodes.counts, Place("joint", 0, joint=True))
    matrix = rollout.layer_matrix(nodes, places, dict.fromkeys(places, x))
    alone = rollout.attention_weights(x[3:])
    np.testing.assert_allclose(matrix[3:, 3:], alone, atol=1e-6)
    assert (matrix[3:, :3] == 0).all()
    np.testing.assert_array_equal(matrix[:3], np.eye(3, 5))


def test_rollout_by_hand():
    first = np.array([[0.0, 1.0], [1.0, 0.0]], np.float32)
    second = np.array([[1.0, 0.0], [0.5, 0.5]], np.float32)
    # Token 1 at the end: ½ itself, ½ (½ token 0 + ½ token 1) of the layer before,
    # so ¼ token 0 and ¾ token 1; each of these is half the other one of the input.
    found = rollout.rollout([first, second], np.array([0.0, 1.0], np.float32))
    np.testing.assert_allclose(found, [0.5, 0.5])
    found = rollout.rollout([second], np.array([0.0, 1.0], np.float32))
    np.testing.assert_allclose(found, [0.25, 0.75])


def test_bottlenecks_are_followed_as_the_model_passes_them_on():
    """Against a linear MBT that is run: x + A x over two, tokens in a dict as there."""
    counts, b, layers = {"rgb": 3, "spectrogram": 2}, 2, 4
    nodes = rollout.Nodes(counts, b, tuple(counts))
    calls = [
        {m: qkv(n + b * (i > 0), seed=10 * i + n) for m, n in counts.items()}
        for i in range(layers)
    ]
    matrices = []
    for i, call in enumerate(calls):
        places = {m: Place(m, i, bottlenecks=b * (i > 0)) for m in counts}
        matrices.append(rollout.layer_matrix(nodes, places, call))
    rng = np.random.default_rng(0)
    tokens = {m: rng.normal(size=(n, 6)) for m, n in counts.items()}
    shared = rng.normal(size=(b, 6))
    inputs = np.concatenate([*tokens.values(), shared])
    half = lambda call, x: 0.5 * (rollout.attention_weights(call) @ x + x)
    for i, call in enumerate(calls):
        if i == 0:
            tokens = {m: half(call[m], x) for m, x in tokens.items()}
            continue
        joined = {m: np.concatenate([x, shared]) for m, x in tokens.items()}
        joined = {m: half(call[m], x) for m, x in joined.items()}
        tokens = {m: x[:-b] for m, x in joined.items()}
        shared = sum(x[-b:] for x in joined.values()) / 2
    for m in counts:
        output = np.zeros(nodes.size, np.float32)
        output[nodes.part(m)] = 1 / counts[m]
        shares = rollout.rollout(matrices, output)
        assert abs(shares.sum() - 1) < 1e-6
        np.testing.assert_allclose(shares @ inputs, tokens[m].mean(axis=0), atol=1e-5)
