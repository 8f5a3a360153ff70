"""Picture geometry, against the published pipeline and the formula itself."""

from pathlib import Path

import numpy as np
import pytest

from data import sampling, transforms

SHARED = Path(__file__).resolve().parents[2] / "shared"
FIXTURES = SHARED / "fixtures/scenic/data/pipeline.npz"


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
    center = transforms.center_corner(*small.shape[1:3], 24)
    corners = transforms.three_corners(*small.shape[1:3], 24) if three else [center]
    ours = [
        transforms.crop(small[sampling.looped(len(small), start, 4, 2)], corner, 24)
        for corner in corners  # the published order: views fastest
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


@pytest.mark.parametrize("shape", [(224, 398), (398, 224), (224, 224), (224, 299)])
def test_three_corners_span_the_longer_side(shape):
    """Against VideoMAE's starts (0, 87, 174 …); only the middle rounds otherwise."""
    corners = np.array(transforms.three_corners(*shape, 224))
    rest = max(shape) - 224
    long = int(shape[1] >= shape[0])
    assert corners[:, long].tolist() == [0, (rest + 1) // 2, rest]
    assert (corners[:, 1 - long] == 0).all()


def test_random_corners_stay_inside_and_reach_every_edge():
    rng = np.random.default_rng(0)
    corners = {transforms.random_corner(rng, 10, 12, 8) for _ in range(300)}
    assert corners == {(top, left) for top in range(3) for left in range(5)}
