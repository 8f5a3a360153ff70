"""A reconstruction is the loss of training, shown: places, units and statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic
import toy_models

from av_mae import ConfigError, api, clips, inputs, losses, pretrain, reconstruction


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with synthetic.quick():
        yield


def model_of(**changes) -> api.Model:
    config = toy_models.config("pretrain", **changes)
    init = lambda rng: pretrain.init(config, pretrain.build(config), rng)
    return api.Model(config, toy_models.random_params(init), [])


def clip_of(seed: int = 0, sound: bool = True) -> clips.Clip:
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (20, 40, 40, 3), np.uint8)
    noise = rng.normal(0, 3000, 16000).astype(np.int16)
    return clips.Clip(frames, 25.0, noise if sound else None)


@pytest.fixture(scope="module")
def model():
    """Standardised targets, as the config has them."""
    return model_of()


def test_errors_are_the_loss_of_the_same_masks(model):
    found = model.reconstruct(clip_of(), seed=3)
    row = model.rows(views=1).of(clip_of())
    batch = {key: value[None] for key, value in row.items()}
    reconstruct = pretrain.make_reconstruct(model.config, model.module, missing=True)
    run = jax.jit(lambda *given: reconstruct(*given, jax.random.key(3), False))
    same = pretrain.Reconstruction(*run(model.params, batch))
    for m, (prediction, target) in same.pairs.items():
        loss = float(losses.masked_mse(prediction, target))
        assert abs(found.error[m] / loss - 1) < 1e-4
        flat = found.errors[m].reshape(-1)
        masked = np.asarray(same.masks[m].masked[0])
        assert set(np.flatnonzero(found.masks[m])) == set(masked.tolist())
        by_token = np.mean((prediction - target)[0] ** 2, axis=-1)
        np.testing.assert_allclose(flat[masked], by_token, rtol=1e-3)
        assert np.isnan(np.delete(flat, masked)).all()
    other = model.reconstruct(clip_of(), seed=4)
    assert (other.masks["spectrogram"] != found.masks["spectrogram"]).any()


def test_visible_places_are_the_clip_itself(model):
    clip = clip_of()
    found = model.reconstruct(clip, ratio={"rgb": 0.5, "spectrogram": 0.25})
    row = model.rows(views=1).of(clip)
    assert found.ratio("rgb") == 0.5 and found.ratio("spectrogram") == 0.25
    original, hidden, filled = found.frames
    assert np.abs(original.astype(int) - row["rgb"][0]).max() <= 1
    side = model.config.data.size // found.masks["rgb"].shape[1]
    mask = found.masks["rgb"].repeat(2, 0).repeat(side, 1).repeat(side, 2)
    assert (hidden[mask] == 128).all()
    np.testing.assert_array_equal(hidden[~mask], original[~mask])
    np.testing.assert_array_equal(filled[~mask], original[~mask])
    assert (filled[mask] != original[mask]).mean() > 0.9
    log_mel, hidden, filled = found.spectrograms
    mask = found.masks["spectrogram"].repeat(16, 0).repeat(16, 1)
    assert np.isnan(hidden[mask]).all()
    np.testing.assert_array_equal(filled[~mask], log_mel[~mask])
    error = np.mean((filled - log_mel)[mask] ** 2)
    assert abs(found.distance["spectrogram"] / error - 1) < 1e-5
    np.testing.assert_array_equal(found.waveform, row["waveform"][0])
    assert found.sound().shape == (len(log_mel) * 160,)


def test_true_statistics_are_used_only_when_asked_for(model):
    clip = clip_of()
    visible, oracle = (model.reconstruct(clip, oracle=x) for x in (False, True))
    assert visible.statistics == {"rgb": "visible", "spectrogram": "visible"}
    assert oracle.statistics == {"rgb": "oracle", "spectrogram": "oracle"}
    assert visible.error == oracle.error  # the loss does not know of it
    # Whatever is behind the mask, the visible patches' statistics are the same.
    hidden = visible.spectrograms.masked
    mean = visible.spectrograms.reconstruction[np.isnan(hidden)].mean()
    assert abs(mean - np.nanmean(hidden)) < 1.0


@pytest.mark.parametrize(
    "kind", ["standardised", "standardised_channels_unbiased", "raw", "pixels"]
)
def test_targets_are_undone_by_the_statistics_of_the_truth(kind):
    config = toy_models.config("pretrain", objective__target__rgb=kind)
    cut = inputs.layouts(config)["rgb"]
    rng = np.random.default_rng(0)
    truth = jnp.array(rng.normal(size=(2, 5, cut.f)), jnp.float32)
    target = pretrain.target(config, "rgb", truth)
    back = reconstruction.undo_by_truth(config, "rgb", target, truth)
    np.testing.assert_allclose(back, truth, atol=1e-4)


@pytest.mark.slow
def test_what_the_clip_lacks_is_left_out(model):
    found = model.reconstruct(clip_of(sound=False))
    assert found.used == ("rgb",) and list(found.masks) == ["rgb"]
    assert found.spectrograms is None and found.waveform is None
    with pytest.raises(ConfigError, match="has no sound"):
        found.sound()
    only = model.reconstruct(clip_of(), modalities=("spectrogram",))
    assert only.frames is None and only.used == ("spectrogram",)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["reconstruct", "inpaint"])
def test_inputs_normalised_clip_by_clip_are_pictures_again(objective):
    model = model_of(picture__normalise="clip", spectrogram__normalise="clip")
    model.config.objective.kind = objective
    model.config.objective.target.rgb = "raw"
    clip = clip_of()
    found = model.reconstruct(clip, mask={"spectrogram": "time"})
    row = model.rows(views=1).of(clip)
    assert np.abs(found.frames.original.astype(int) - row["rgb"][0]).max() <= 1
    plain = model_of().reconstruct(clip)
    np.testing.assert_allclose(
        found.spectrograms.original, plain.spectrograms.original, atol=1e-3
    )
    whole = found.masks["spectrogram"].all(axis=1) | ~found.masks["spectrogram"].any(1)
    assert whole.all() and found.statistics["rgb"] == "none"


def test_masks_that_make_no_sense_are_refused(model):
    for options, message in (
        ({"ratio": 1.5}, "mask.rgb.ratio is 1.5"),
        ({"ratio": {"video": 0.5}}, "ratio is 'video'"),
        ({"mask": {"rgb": "time"}}, "mask.rgb.kind is 'time'"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.reconstruct(clip_of(), **options)
