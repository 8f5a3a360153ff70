"""The programs of a config: what trainers run, on batches that look like the data's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic

from av_mae import inputs, losses, masking, pretrain, program


def test_batches_look_like_those_of_the_data():
    """Names, shapes and types of the trainers' tests' own data set."""
    for name in ("digits/pretrain", "digits/finetune"):
        config = synthetic.tiny(name)
        config.data.update(samples_per_clip=1, views=1, crops=1)
        data = synthetic.Dataset(config)
        wanted = next(data.train(4))
        found = program.synthetic(program.batch_of(config, 4, 1))
        if name == "digits/pretrain":
            wanted.pop("label")
        kinds = lambda batch: {k: (x.shape, x.dtype) for k, x in batch.items()}
        assert kinds(found) == kinds(wanted)


def test_labels_of_several_kinds_and_log_mels():
    config = synthetic.tiny("digits/finetune")
    config.model.label_heads = (("verb", 3), ("noun", 0))
    labels = program.batch_of(config, 2, 1)["label"]
    assert {k: x.shape for k, x in labels.items()} == {"verb": (2,), "noun": (2,)}
    config.objective.kind = "sigmoid"
    labels = program.batch_of(config, 2, 1)["label"]
    assert labels["noun"].shape == (2, program.CLASSES)
    config = synthetic.tiny("digits/pretrain", spectrogram__preset="precomputed")
    batch = program.batch_of(config, 2, 3)
    assert batch["spectrogram"].shape == (2, 3, 32, 128, 1) and "waveform" not in batch
    assert program.bytes_of({"x": batch["spectrogram"]}) == 2 * 3 * 32 * 128 * 4


@pytest.fixture(scope="module")
def parts():
    """(config, params, batch, function that makes a reconstruct of changes)."""
    config = synthetic.tiny("digits/pretrain", model__drop_path=0.0)
    model = pretrain.build(config)
    init = functools.partial(pretrain.init, config, model)
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype)
    params = jax.tree.map(draw, jax.eval_shape(init, jax.random.key(0)))
    batch = program.synthetic(program.batch_of(config, 2, 1))

    def reconstruct(**changes):
        own = type(config)(config.to_dict())
        own.update_from_flattened_dict(
            {key.replace("__", "."): value for key, value in changes.items()}
        )
        found = pretrain.make_reconstruct(own, pretrain.build(own), True)
        run = jax.jit(lambda *x: found(*x, True))
        with synthetic.quick():
            return run(params, batch, jax.random.key(1))

    return config, params, batch, reconstruct


def test_decoding_all_is_the_same_by_any_name(parts):
    reconstruct = parts[-1]
    whole, cells = (
        reconstruct(objective__decode__kind=kind) for kind in ("all", "running_cell")
    )
    jax.tree.map(np.testing.assert_array_equal, whole.pairs, cells.pairs)


def test_half_of_the_masked_tokens_are_in_the_loss(parts):
    half = dict(objective__decode__kind="random", objective__decode__share=0.5)
    whole, some = parts[-1](), parts[-1](**half)
    for m, (prediction, target) in some.pairs.items():
        assert prediction.shape == target.shape
        assert prediction.shape[1] == whole.pairs[m][0].shape[1] // 2
        np.testing.assert_array_equal(some.masks[m].kept, whole.masks[m].kept)
        # The targets are those of the tokens that were decoded.
        order = np.asarray(whole.masks[m].masked[0]).tolist()
        places = [order.index(i) for i in np.asarray(some.masks[m].masked[0])]
        wanted = whole.pairs[m][1][0, jnp.array(places)]
        np.testing.assert_allclose(target[0], wanted, rtol=1e-4, atol=1e-5)


def test_several_masks_of_one_clip(parts):
    """As if the clips had come twice, each with masks of its own."""
    config, params, batch, reconstruct = parts
    found = reconstruct(objective__masks_per_clip=2)
    patches = {m: jnp.repeat(x, 2, axis=0) for m, x in found.patches.items()}
    present = {m: jnp.ones(4, bool) for m in patches}
    model = pretrain.build(config)
    with synthetic.quick():
        run = jax.jit(lambda *x: model.apply({"params": params}, *x))
        wanted = run(patches, found.masks, present)
    for m, (prediction, target) in found.pairs.items():
        assert len(prediction) == 4 and len(found.present[m]) == 4
        assert (found.masks[m].kept[0] != found.masks[m].kept[1]).any()
        np.testing.assert_allclose(prediction, wanted[m], rtol=1e-4, atol=1e-5)
        hidden = masking.take(patches[m], found.masks[m].masked)
        kind = config.objective.target[m]
        layout = inputs.layouts(config)[m]
        goal = losses.target(hidden, kind, layout.channels, layout.frames)
        np.testing.assert_allclose(target, goal, rtol=1e-4, atol=1e-5)


SLOW = pytest.param("digits/pretrain", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [SLOW, "digits/finetune"])
def test_the_step_and_the_evaluation_run(name):
    config = synthetic.tiny(name, batch_size=2, eval__batch_size=2)
    with synthetic.quick():
        found = program.step(config)
        before = jax.device_get(state := found.first())
        state, numbers = found.run(state, program.synthetic(found.batch), *found.rest)
        assert int(state["step"]) == 1 and np.isfinite(float(numbers["loss"]))
        changed = jax.tree.map(
            lambda a, b: (a != b).any(), before["params"], state["params"]
        )
        assert any(jax.tree.leaves(changed))
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (found.abstract, state))
        assert shapes[0] == shapes[1]
        found = program.evaluation(config)
        assert found.clips == 2
        assert jax.eval_shape(found.run, *found.arguments())


def test_rates_lengths_and_layer_decay_share_one_compiled_step():
    """The text that is compiled, and what the cache of programs is asked with."""

    def lowered(**changes):
        config = synthetic.tiny("digits/finetune", **changes)
        found = program.step(config)
        return found.run.lower(*found.arguments()).as_text()

    text = lowered(schedule__learning_rate_per_256=1e-2, steps=20)
    others = dict(schedule__learning_rate_per_256=2e-2, optimizer__layer_decay=0.9)
    assert lowered(steps=30, schedule__warmup_epochs=0.0, **others) == text
    assert lowered(objective__label_smoothing=0.2) != text  # the loss is no argument
