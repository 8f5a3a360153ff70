"""Picture geometry, against the published pipeline and the formula itself."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import parity
import pytest

from data import sampling, transforms

SHARED = Path(__file__).resolve().parents[2] / "shared"
FIXTURES = SHARED / "fixtures/scenic/data/pipeline.npz"
RECIPE = SHARED / "fixtures/videomae/mcg_recipe/recipe.npz"
needs_recipe = pytest.mark.skipif(
    not RECIPE.exists(), reason=f"{RECIPE} is not there (fixtures of VideoMAE)"
)


@pytest.fixture(scope="module")
def published():
    if not FIXTURES.exists():
        pytest.skip(f"{FIXTURES} is not there (fixtures of the published system)")
    return np.load(FIXTURES)


@pytest.mark.parametrize(
    ("tag", "views", "three"),
    [
        ("validation_center", 1, False),
        ("test_4clips", 4, False),
        ("test_1clip_3crops", 1, True),
        ("test_4clips_3crops", 4, True),
    ],
)
@pytest.mark.parametrize("example", [0, 1, 2])
def test_published_pictures(published, tag, views, three, example):
    """Frames, bilinear resize (truncated), crops: equal to the last bit."""
    frames = published[f"raw/example{example}/frames"]
    small = transforms.resize(frames, 32, "bilinear")
    boxes = [transforms.center_box(None, *small.shape[1:3], 24)]
    boxes = transforms.three_boxes(*small.shape[1:3], 24) if three else boxes
    ours = [
        transforms.crop(
            small[sampling.looped(len(small), start, 4, 2)], box, 24, "bilinear"
        )
        for box in boxes  # the published order: views fastest
        for start in sampling.even_starts(len(small), views, 4, 2)
    ]
    theirs = (published[f"{tag}/example{example}/image"] + 1) * 127.5
    np.testing.assert_array_equal(np.stack(ours), np.round(theirs))


@pytest.mark.parametrize("shape", [(40, 56), (48, 36), (256, 340), (17, 31)])
@pytest.mark.parametrize("short_side", [16, 24, 64])
def test_resized_shape_keeps_the_proportion(shape, short_side):
    height, width = transforms.resized_shape(*shape, short_side)
    assert min(height, width) == short_side
    exact = short_side * max(shape) / min(shape)
    assert 0 <= exact - max(height, width) < 1
    assert (height < width) == (shape[0] < shape[1])


def triangle(old, new, antialias):
    """Weights [new old] of a linear filter at half-pixel centres, by its definition."""
    scale = old / new
    support = max(scale, 1.0) if antialias else 1.0
    centres = (np.arange(new)[:, None] + 0.5) * scale - 0.5
    if not antialias:  # the edge is repeated rather than left out
        centres = np.clip(centres, 0, old - 1)
    weights = np.maximum(0, 1 - abs(np.arange(old)[None] - centres) / support)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("method", ["antialias", "bilinear"])
@pytest.mark.parametrize(("shape", "short_side"), [((40, 57), 32), ((21, 16), 48)])
def test_resize_is_the_linear_filter(method, shape, short_side):
    frames = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    ours = transforms.resize(frames, short_side, method)
    new = transforms.resized_shape(*shape, short_side)
    down, across = (
        triangle(o, n, method == "antialias") for o, n in zip(shape, new, strict=True)
    )
    exact = np.einsum("ih,thwc,jw->tijc", down, frames.astype(float), across)
    if method == "bilinear":  # truncated
        assert -1e-3 < (exact - ours).min() and (exact - ours).max() < 1 + 1e-3
    else:  # Pillow rounds after each direction
        assert abs(exact - ours).max() <= 1.01


def test_right_size_is_left_alone():
    frames = np.zeros((2, 32, 48, 3), np.uint8)
    assert transforms.resize(frames, 32, "antialias") is frames


class Legacy:
    """Python's old generator as numpy's, to feed the draws of the published tables."""

    def __init__(self, seed):
        self.state = random.Random(seed)
        self.uniform = self.state.uniform

    def integers(self, high):
        return self.state.randrange(high)


def boxes(name, height, width, size, count=3000):
    """Boxes [n 4] of many draws, as float64: top, left, height, width."""
    rng, draw = np.random.default_rng(0), transforms.CROPS[name]
    return np.array([draw(rng, height, width, size) for _ in range(count)], float)


@needs_recipe
def test_published_multiscale_crops():
    table = np.load(RECIPE)["multiscale_crop_340x256_pyseed0_39_w_h_offw_offh"]
    assert len(table) >= 40
    for seed, (w, h, left, top) in enumerate(table.tolist()):
        ours = transforms.multiscale_box(Legacy(seed), 256, 340, 224)
        assert ours == (top, left, h, w)
        parity.record("videomae recipe: multiscale crop", f"seed {seed}", outputs=0)


@needs_recipe
def test_published_resized_crops():
    table = np.load(RECIPE)["random_resized_crop_256x340_seed0_39_i_j_h_w"]
    assert len(table) >= 40
    for seed, theirs in enumerate(table.tolist()):
        ours = transforms.resized_box(Legacy(seed), 256, 340, 224)
        assert ours == tuple(theirs)
        parity.record("videomae recipe: resized crop", f"seed {seed}", outputs=0)


@needs_recipe
def test_published_three_crops_of_videomae():
    published = json.loads(RECIPE.with_suffix(".json").read_text())
    starts = published["spatial_starts_short224_3crops_hxw"]
    assert len(starts) >= 4
    for name, theirs in starts.items():
        shape = tuple(map(int, name.split("x")))
        ours = np.array(transforms.three_boxes(*shape, 224, up=False))
        long = int(shape[1] >= shape[0])
        assert ours[:, long].tolist() == theirs
        assert (ours[:, 1 - long] == 0).all() and (ours[:, 2:] == 224).all()
        parity.record("videomae recipe: three crops", name, outputs=0)


def test_three_boxes_of_scenic_round_up():
    ours = transforms.three_boxes(224, 299, 224)
    assert ours == [(0, left, 224, 224) for left in (0, 38, 75)]
    ours = transforms.three_boxes(35, 24, 24)
    assert ours == [(top, 0, 24, 24) for top in (0, 6, 11)]


@pytest.mark.parametrize("name", transforms.CROPS)
@pytest.mark.parametrize("shape", [(256, 340), (340, 256), (224, 224), (225, 225)])
def test_boxes_lie_inside_the_picture(name, shape):
    drawn = boxes(name, *shape, 224, 300)
    assert (drawn[:, :2] >= 0).all() and (drawn[:, 2:] > 0).all()
    assert (drawn[:, :2] + drawn[:, 2:] <= np.array(shape) + 1e-9).all()


@pytest.mark.parametrize("name", transforms.FROM_STORED)
@pytest.mark.parametrize("shape", [(48, 64), (5, 7), (222, 400), (1, 1), (30, 300)])
def test_crops_of_small_pictures_are_enlarged(name, shape):
    """A side near the wanted one is not taken for it where the picture is smaller."""
    drawn = boxes(name, *shape, 224, 100)
    assert (drawn[:, :2] + drawn[:, 2:] <= shape).all()
    box = tuple(map(int, drawn[0]))
    frames = np.zeros((2, *shape, 3), np.uint8)
    if min(box[2:]):
        assert transforms.crop(frames, box, 224, "antialias").shape == (2, 224, 224, 3)


def test_random_boxes_reach_every_edge():
    drawn = {tuple(box) for box in boxes("random", 10, 12, 8, 300)}
    assert drawn == {(top, left, 8, 8) for top in range(3) for left in range(5)}


def test_jitter_scales_height_and_width_each_by_itself():
    drawn = boxes("jitter", 256, 340, 224)
    factors = 224 / drawn[:, 2:]  # of height, of width
    for factor, old in zip(factors.T, (256, 340), strict=True):
        assert 0.9 - 1 / old <= factor.min() < 0.91 and 1.32 < factor.max() <= 1.33
        assert abs(np.mean(factor < 1.115) - 0.5) < 0.04  # uniform: 4 deviations
    assert abs(np.corrcoef(factors.T)[0, 1]) < 0.08
    np.testing.assert_allclose(factors * (256, 340) % 1 % 0.999999, 0, atol=1e-5)


def test_jitter_of_a_picture_no_larger_than_the_crop_only_enlarges():
    drawn = boxes("jitter", 224, 300, 224)
    assert (drawn[:, 2] <= 224).all() and (drawn[:, 2] == 224).mean() > 0.2
    assert (drawn[:, :2] + drawn[:, 2:] <= (224 + 1e-9, 300 + 1e-9)).all()


def test_multiscale_draws_every_pair_and_place_alike():
    drawn = boxes("multiscale", 256, 340, 224, 13000)
    sides = Counter(map(tuple, drawn[:, 2:].astype(int)))
    scales = (256, 224, 192, 168)
    near = {(h, w) for h in scales for w in scales if abs(h - w) < 40}
    near = {(h, w) for h, w in near if abs(scales.index(h) - scales.index(w)) <= 1}
    assert set(sides) == near and len(near) == 10
    assert all(abs(count - 1300) < 150 for count in sides.values())  # 4 deviations
    (place,) = {(b[0], b[1]) for b in drawn if b[2] == b[3] == 256 and b[1] == 84}
    assert place == (0, 84)  # (340 - 256) // 4 · 4: all the way to the right


def test_resized_boxes_have_the_published_areas_and_shapes():
    drawn = boxes("resized", 256, 340, 224, 5000)
    area = drawn[:, 2] * drawn[:, 3] / (256 * 340)
    aspect = np.log(drawn[:, 3] / drawn[:, 2])
    assert 0.07 < area.min() < 0.1 and area.max() <= 1
    # Large areas are rejected where they do not fit; small ones are uniform.
    small = area[area < 0.54]
    assert abs(np.mean(small < 0.31) - 0.5) < 0.04
    assert abs(aspect).max() < np.log(1.3333) + 0.03
    narrow = aspect[area < 0.54]
    assert abs(np.mean(narrow < 0) - 0.5) < 0.04 and abs(np.median(narrow)) < 0.03


def test_resized_box_of_a_ribbon_is_the_largest_of_an_allowed_shape():
    assert transforms.resized_box(np.random.default_rng(0), 10, 1000, 8)[2] == 10
    assert transforms.resized_box(np.random.default_rng(0), 1000, 12, 8) == (
        (492, 0, 16, 12)
    )


@pytest.mark.parametrize("method", transforms.RESIZES)
def test_a_jittered_crop_is_the_scaled_picture_cut(method):
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 57, 3), dtype=np.uint8)
    for tall, wide, top, left in [(53, 51, 10, 3), (36, 75, 4, 43), (40, 57, 0, 25)]:
        down, across = 40 / tall, 57 / wide
        box = (top * down, left * across, 32 * down, 32 * across)
        ours = transforms.crop(frames, box, 32, method).astype(int)
        whole = transforms._scaled(frames, (0, 0, 40, 57), (tall, wide), method)
        cut = whole[:, top : top + 32, left : left + 32]
        assert ours.shape == (2, 32, 32, 3) and abs(ours - cut).max() <= 1


@pytest.mark.parametrize("method", transforms.RESIZES)
def test_a_scaled_crop_is_cut_first(method):
    """As published: what lies outside the box is not seen."""
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)
    ours = transforms.crop(frames, (5, 8, 21, 30), 16, method)
    alone = np.ascontiguousarray(frames[:, 5:26, 8:38])
    scaled = transforms._scaled(alone, (0, 0, 21, 30), (16, 16), method)
    np.testing.assert_array_equal(ours, scaled)
    down, across = (triangle(old, 16, method == "antialias") for old in (21, 30))
    exact = np.einsum("ih,thwc,jw->tijc", down, alone.astype(float), across)
    assert abs(exact - ours).max() <= 1.01


def test_what_encloses_boxes():
    boxes = [(2, 5, 4, 4), (0, 7, 3, 9)]
    assert transforms.enclosing(boxes[:1]) == boxes[0]
    assert transforms.enclosing(boxes) == (0, 5, 6, 11)
    assert transforms.enclosing([*boxes, (1.5, 0.0, 2.0, 2.0)]) is None
    frames = np.arange(2 * 9 * 16 * 3).reshape(2, 9, 16, 3)
    np.testing.assert_array_equal(
        transforms.cut_out(frames, (0, 5, 6, 11)), frames[:, :6, 5:]
    )
    assert transforms.cut_out(frames, None) is frames


def test_a_crop_of_the_right_size_is_a_view():
    frames = np.arange(2 * 6 * 8 * 3, dtype=np.uint8).reshape(2, 6, 8, 3)
    cut = transforms.crop(frames, (1, 3, 4, 4), 4, "antialias")
    assert np.shares_memory(cut, frames)
    np.testing.assert_array_equal(cut, frames[:, 1:5, 3:7])
