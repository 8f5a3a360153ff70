"""Pictures of sound: the picture has no part in them, the sound has; what is read."""

import jax
import numpy as np
import pytest
from PIL import Image
from synthetic import Dataset, quick, tiny

from av_mae import ConfigError, api, inpainting, inputs, pretrain


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick():
        yield


@pytest.fixture(scope="module")
def model():
    raw = {"rgb": "raw", "spectrogram": "raw"}
    config = tiny("digits/pretrain", model__fusion="separate")
    config.objective.kind = "inpaint"
    config.objective.target.update(raw)
    params = pretrain.init(config, pretrain.build(config), jax.random.key(0))
    draw = np.random.default_rng(0)  # the map to predictions begins with zeros
    noisy = lambda x: np.asarray(x) + draw.normal(0, 0.1, x.shape).astype(np.float32)
    return api.Model(config, jax.tree.map(noisy, params), [])


def clips(config, **replaced) -> Dataset:
    """Six clips, in which what is named is another draw."""
    data = Dataset(config, num_clips=6)
    original = data.clip

    def clip(i):
        row = original(i)
        draw = np.random.default_rng(i)
        noise = lambda x: draw.integers(0, 200, x.shape).astype(x.dtype)
        return row | {k: noise(row[k]) for k in replaced if replaced[k]}

    data.clip = clip
    return data


def made(model, data) -> tuple[np.ndarray, np.ndarray]:
    found = [x[1:] for x in inpainting.pictures(model, data, 4)]
    return tuple(np.concatenate(x)[:6] for x in zip(*found, strict=True))


def test_pictures_are_of_the_sound_alone(model):
    predicted, true = made(model, clips(model.config))
    config = model.config.data
    assert predicted.dtype == true.dtype == np.uint8
    assert predicted.shape == (6, config.num_frames, config.size, config.size, 3)
    other = made(model, clips(model.config, rgb=True))
    np.testing.assert_array_equal(other[0], predicted)
    assert (other[1] != true).any()
    other = made(model, clips(model.config, waveform=True))
    np.testing.assert_array_equal(other[1], true)
    assert (other[0] != predicted).any(axis=(1, 2, 3, 4)).all()


def test_every_place_is_predicted(model):
    """Were a place left out, it would look the same whatever was heard."""
    one, _ = made(model, clips(model.config))
    other, _ = made(model, clips(model.config, waveform=True))
    side = inputs.layouts(model.config)["rgb"].patch[1]
    changed = (one != other).any(axis=(0, 1, 4))
    rows = changed.reshape(changed.shape[0] // side, side, -1, side)
    assert rows.any(axis=(1, 3)).all()


@pytest.mark.parametrize(
    "field, value, text",
    [
        ("objective.kind", "reconstruct", "objective.kind 'inpaint'"),
        ("model.fusion", "mid", "pretrain with 'separate'"),
        ("objective.target.rgb", "patch", "pretrain with 'raw'"),
    ],
)
def test_a_model_that_saw_the_picture_is_refused(model, field, value, text):
    config = model.config.copy_and_resolve_references()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=text):
        inpainting.check(config)


class Reader:
    """A classifier that knows the labels, but of bright pictures alone."""

    def logits(self, batch):
        right = np.eye(10)[batch["label"]]
        seen = batch["rgb"].mean(axis=(1, 2, 3, 4, 5)) > 0
        return np.where(seen[:, None], right, 0)


def test_what_is_read_is_counted_over_valid_clips(model):
    data = clips(model.config)
    found = inpainting.read(model, Reader(), data, 4)
    assert found["real"] == found["generated"] == 1.0
    labels = [data.clip(i)["label"] for i in range(6)]
    pairs = zip(labels, [labels[3], *labels[:3], labels[5], labels[4]], strict=True)
    assert found["shuffled"] == np.mean([a == b for a, b in pairs])


def test_a_sheet_has_a_clip_of_each_class(model, tmp_path):
    inpainting.draw(model, clips(model.config), 6, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        classes = len({int(clips(model.config).clip(i)["label"]) for i in range(6)})
        assert sheet.width > classes * model.config.data.size
