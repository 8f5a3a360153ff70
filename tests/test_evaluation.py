"""What a classifier's numbers are of: views averaged, modalities hidden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic

from av_mae import ConfigError, classifier, evaluation, finetune, parallel

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (4, 6, 5)).astype(np.float32)  # b v k


@pytest.fixture(autouse=True, scope="module")
def quick():
    with synthetic.quick():
        yield


def test_probabilities_are_averaged_over_views():
    """By hand, and so that the logits give these probabilities again."""
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=2, keepdims=True)
    found = evaluation.mean_probabilities(jnp.asarray(LOGITS), "softmax")
    np.testing.assert_allclose(jax.nn.softmax(found), p.mean(axis=1), rtol=1e-5)
    p = 1 / (1 + np.exp(-LOGITS))
    found = evaluation.mean_probabilities(jnp.asarray(LOGITS), "sigmoid")
    np.testing.assert_allclose(jax.nn.sigmoid(found), p.mean(axis=1), rtol=1e-5)
    sure = evaluation.mean_probabilities(jnp.float32([[[90.0], [-2.0]]]), "sigmoid")
    assert sure[0, 0] == pytest.approx(np.log((1 + 0.1192) / (1 - 0.1192)), rel=1e-3)


def test_logits_are_averaged_over_views():
    for kind in ("softmax", "sigmoid"):
        found = evaluation.mean_logits(jnp.asarray(LOGITS), kind)
        np.testing.assert_allclose(found, LOGITS.mean(axis=1), rtol=1e-6)


@pytest.mark.parametrize("average", evaluation.AVERAGES)
def test_one_view_is_itself(average):
    one = jnp.asarray(LOGITS[:, :1])
    for kind in ("softmax", "sigmoid"):
        found = evaluation.AVERAGES[average](one, kind)
        shift = (found - one[:, 0]).mean(axis=1, keepdims=True)
        np.testing.assert_allclose(found - shift, one[:, 0], rtol=1e-4, atol=1e-5)
        assert kind == "softmax" or np.abs(shift).max() < 1e-5


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        (("rgb", "sound"), "'sound'"),
        (("spectrogram+rgb",), r"'spectrogram\+rgb'"),
        (("",), "''"),
        (("rgb", 3), "3"),
    ],
)
def test_subsets_are_of_the_modalities(names, wrong):
    config = synthetic.config("digits/finetune")
    config.eval.modalities = ("rgb", "spectrogram", "rgb+spectrogram")
    assert evaluation.subsets(config) == {
        "rgb": ("rgb",),
        "spectrogram": ("spectrogram",),
        "rgb+spectrogram": ("rgb", "spectrogram"),
    }
    config.eval.modalities = names
    with pytest.raises(ConfigError, match=f"eval.modalities has {wrong}"):
        evaluation.subsets(config)


class Withheld:
    """A data set of the clips that have one modality, and of that one alone."""

    def __init__(self, dataset, shown, hidden):
        self.dataset, self.shown, self.hidden = dataset, shown, hidden

    def evaluate(self, batch_size):
        for batch in self.dataset.evaluate(batch_size):
            batch["valid"] &= batch[self.shown]
            yield batch | {self.hidden: np.zeros_like(batch[self.hidden])}


@pytest.mark.parametrize(
    "fusion", ["mid", pytest.param("bottleneck", marks=pytest.mark.slow)]
)
def test_a_subset_is_as_if_the_others_were_missing(fusion):
    """Numbers of the hidden modality are those of a data set without it.

    In both fusions the modalities meet: what is hidden must not be attended to.
    """
    config = synthetic.tiny("digits/finetune", model__fusion=fusion)
    config.model.fusion_layer, config.model.drop_path = 1, 0.0
    config.eval.modalities = ("rgb", "spectrogram", "rgb+spectrogram")
    config.eval.batch_size = 4
    model = finetune.build(config, 3)
    shapes = jax.eval_shape(lambda: finetune.init(config, model, jax.random.key(0)))
    fill = lambda x: jnp.asarray(RNG.normal(0, 0.3, x.shape), x.dtype)
    params, mesh = jax.tree.map(fill, shapes), parallel.mesh(1, 1)
    dataset = synthetic.Dataset(config, num_clips=6)
    dataset.without = {"has_audio": {1, 4}, "has_rgb": set()}
    measures = finetune.make_measures(config, model, True, mesh)
    assert list(measures) == ["", "rgb/", "spectrogram/"]
    weights = {"": params, "ema_": jax.tree.map(lambda x: 0.5 * x, params)}
    results = evaluation.run(config, measures, weights, dataset, lambda batch: batch)
    names = {"loss", "top_1", "ema_loss", "ema_top_1"}
    parts = ("", "rgb/", "spectrogram/", "rgb+spectrogram/")
    assert set(results) == {f"eval/{p}{name}" for p in parts for name in names}
    for name in names:
        assert results[f"eval/rgb+spectrogram/{name}"] == results[f"eval/{name}"]
    alone = {"": measures[""]}
    has = {"rgb": "has_rgb", "spectrogram": "has_audio"}
    for m, other in (("rgb", "spectrogram"), ("spectrogram", "rgb")):
        without = Withheld(dataset, has[m], has[other])
        found = evaluation.run(config, alone, weights, without, lambda batch: batch)
        for name in names:
            assert results[f"eval/{m}/{name}"] == pytest.approx(
                found[f"eval/{name}"], rel=1e-4
            ), (m, name)
    assert results["eval/rgb/loss"] != pytest.approx(results["eval/loss"], rel=1e-3)


def test_logits_of_all_modalities_together_need_any_of_them():
    present = {
        "rgb": jnp.array([1, 0, 0], bool),
        "spectrogram": jnp.array([1, 1, 0], bool),
    }
    joint = {classifier.JOINT: jnp.ones((3, 2))}
    np.testing.assert_array_equal(
        classifier.combine(joint, present), [[1, 1], [1, 1], [0, 0]]
    )
