"""Pictures show what they claim: visible patches, grey places, predictions."""

import numpy as np
from PIL import Image

from av_mae import visualise

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PATCH = (2, 4, 4)


def frames_and_masks(seed=0, b=2, t=4, size=8):
    """Random normalised frames [b t size size 3] and half of the tokens masked."""
    rng = np.random.default_rng(seed)
    pixels = rng.uniform(0, 1, (b, t, size, size, 3))
    x = ((pixels - MEAN) / STD).astype(np.float32)
    n = (t // 2) * (size // 4) ** 2
    masked = np.stack([rng.permutation(n)[: n // 2] for _ in range(b)])
    return pixels, x, masked


def cells(masked, shape):
    """Which pixels the masked tokens cover, by counting by hand: bool [b t h w]."""
    b, t, h, w = shape
    hidden = np.zeros(shape, bool)
    for i in range(b):
        for token in masked[i]:
            tt, rest = divmod(int(token), (h // 4) * (w // 4))
            r, c = divmod(rest, w // 4)
            hidden[i, 2 * tt : 2 * tt + 2, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4] = True
    return hidden


def test_frame_panels_show_visible_grey_and_predicted():
    pixels, x, masked = frames_and_masks()
    features = np.prod(PATCH) * 3
    colour = (np.array([1.0, 0.0, 0.5]) - MEAN) / STD  # red by 1, green by 0, blue by ½
    predictions = np.tile(colour, (2, masked.shape[1], features // 3))
    panels = visualise.frame_panels(
        x, predictions.astype(np.float32), masked, PATCH, MEAN, STD
    )
    hidden = cells(masked, x.shape[:4])
    true = np.round(pixels * 255)
    assert np.abs(panels.original - true).max() <= 1
    assert hidden.mean() == 0.5
    assert (panels.masked[hidden] == visualise.GREY).all()
    np.testing.assert_array_equal(panels.masked[~hidden], panels.original[~hidden])
    np.testing.assert_array_equal(
        panels.reconstruction[~hidden], panels.original[~hidden]
    )
    assert np.abs(panels.reconstruction[hidden] - np.array([255.0, 0, 127.5])).max() < 1


def test_perfect_predictions_give_the_original():
    _, x, masked = frames_and_masks(seed=1)
    # By hand: [b t2 h2 w2] tubes, then the features of each, channels fastest.
    tubes = x.reshape(2, 2, 2, 2, 4, 2, 4, 3).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    flat = tubes.reshape(2, 8, -1)
    predictions = np.take_along_axis(flat, masked[..., None], axis=1)
    panels = visualise.frame_panels(x, predictions, masked, PATCH, MEAN, STD)
    np.testing.assert_array_equal(panels.reconstruction, panels.original)


def test_rows_that_fill_no_patch_are_cut():
    x = np.zeros((1, 10, 8, 1), np.float32)
    panels = visualise.spectrogram_panels(
        x, np.zeros((1, 1, 16), np.float32), np.array([[0]]), (4, 4)
    )
    assert panels.original.shape == (1, 8, 8, 3)  # b f t 3


def test_spectrogram_is_upright():
    x = np.zeros((1, 8, 8, 1), np.float32)
    x[0, 0, 7] = 1.0  # the first moment, the highest frequency
    masked = np.array([[0]])  # the first moments, the lowest frequencies
    panels = visualise.spectrogram_panels(
        x, np.zeros((1, 1, 16), np.float32), masked, (4, 4)
    )
    lightest = visualise.COLOURS[-1].astype(np.uint8)
    np.testing.assert_array_equal(panels.original[0, 0, 0], lightest)
    assert (panels.masked[0, 4:, :4] == visualise.GREY).all()
    assert not (panels.masked[0, :4] == visualise.GREY).all(axis=-1).any()


def test_colours_rise_evenly_in_lightness():
    shades = visualise.colours(np.linspace(0, 1, 65, dtype=np.float32)) / 255
    linear = np.where(
        shades <= 0.04045, shades / 12.92, ((shades + 0.055) / 1.055) ** 2.4
    )
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    lightness = np.where(
        luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance
    )  # CIE 1976 L*
    steps = np.diff(lightness)
    assert 0.5 < steps.min() and steps.max() < 2.2  # 98 in 64 steps: 1.5 each
    outside = np.array([-1, 2, np.nan], np.float32)
    ends = visualise.COLOURS[[0, -1, 0]]
    np.testing.assert_array_equal(visualise.colours(outside), ends)


def both_modalities():
    """Arguments of `reconstruction` for two clips, the second without sound."""
    rng = np.random.default_rng(2)
    inputs = {
        "rgb": rng.normal(size=(2, 4, 16, 16, 3)),
        "spectrogram": rng.normal(size=(2, 40, 32, 1)),
    }
    predictions = {"rgb": np.zeros((2, 1, 96)), "spectrogram": np.zeros((2, 3, 256))}
    masked = {"rgb": [[0], [3]], "spectrogram": [[0, 1, 2], [1, 2, 3]]}
    patches = {"rgb": PATCH, "spectrogram": (16, 16)}
    present = {"rgb": [True, True], "spectrogram": [True, False]}
    return inputs, predictions, masked, patches, present


def test_clips_without_a_modality_are_left_out():
    *args, present = both_modalities()
    kw = dict(mean=MEAN, std=STD)
    everything = visualise.reconstruction(*args, **kw)
    some = visualise.reconstruction(*args, **kw, present=present)
    assert some.stills["rgb"].shape == everything.stills["rgb"].shape
    assert (
        some.stills["spectrogram"].shape[0] < everything.stills["spectrogram"].shape[0]
    )
    present["spectrogram"] = [False, False]
    none = visualise.reconstruction(*args, **kw, present=present)
    assert set(none.stills) == {"rgb"}


def test_small_pictures_are_enlarged():
    image = np.zeros((16, 24, 3), np.uint8)
    image[3, 5] = 255
    black = (visualise.sheet([[image]], ["a"], ["b"]) == 0).all(axis=-1)
    assert black.sum() == (16 * 24 - 1) * 8**2  # 16 pixels become 128


def test_files_hold_the_pictures(tmp_path):
    *args, present = both_modalities()
    pictures = visualise.reconstruction(
        *args, mean=MEAN, std=STD, present=present, fps=12.5
    )
    paths = visualise.write(pictures, tmp_path / "pictures", step=30)
    names = ["0000030-rgb.png", "0000030-spectrogram.png", "0000030-rgb.gif"]
    assert [path.name for path in paths] == names
    np.testing.assert_array_equal(
        np.asarray(Image.open(paths[0])), pictures.stills["rgb"]
    )
    with Image.open(paths[2]) as film:
        assert film.n_frames == 4 == len(pictures.films["rgb"])
        assert film.info["duration"] == 80  # ms, of 12.5 frames a second
        assert film.info["loop"] == 0
        film.seek(2)
        shown = np.asarray(film.convert("RGB"), float)
    assert np.abs(shown - pictures.films["rgb"][2]).mean() < 16  # 256 colours, dithered


def test_a_log_mel_is_upright_and_grey_where_nothing_is_known():
    values = np.zeros((4, 3), np.float32)
    values[0, 2] = 1.0  # the first moment, the highest frequency
    values[3, 0] = np.nan  # the last moment, the lowest
    picture = visualise.log_mel_picture(values, 0.0, 1.0)
    assert picture.shape == (3, 4, 3)
    np.testing.assert_array_equal(picture[0, 0], visualise.COLOURS[-1])
    assert (picture[2, 3] == visualise.GREY).all()
    np.testing.assert_array_equal(picture[1, 1], visualise.COLOURS[0])


def test_a_cursor_is_where_the_time_is():
    image = np.zeros((4, 100, 3), np.uint8)
    for place, column in ((0.0, 0), (0.25, 25), (1.0, 99)):
        shown = visualise.with_cursor(image, place)
        assert np.flatnonzero(shown.any(axis=(0, 2))).tolist() == [column]
    assert not visualise.with_cursor(image, 1.2).any() and not image.any()


def test_bars_are_as_high_as_their_values():
    bars = visualise.curve(np.array([0.0, 0.5, 1.0, 2.0]), 102, 40, 1.0)
    heights = (bars != np.array(visualise.PAPER)).any(axis=-1).sum(axis=0)
    assert heights[[5, 15, 25, 35]].tolist() == [1, 51, 101, 101]


def test_pictures_are_put_below_one_another_on_even_sides():
    red = np.full((5, 7, 3), (255, 0, 0), np.uint8)
    blue = np.full((4, 9, 3), (0, 0, 255), np.uint8)
    both = visualise.below([red, blue])
    assert both.shape == (10, 10, 3)
    np.testing.assert_array_equal(both[:5, :7], red)
    np.testing.assert_array_equal(both[5:9, :9], blue)
    told = visualise.below([red], "a caption that is wider than the picture")
    assert told.shape[0] > 20 and told.shape[1] > 100
    assert (told[6:] != 255).any()
