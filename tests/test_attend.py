"""`python -m av_mae.attend`: shares on grids, and pictures of them."""

import json

import numpy as np
import pytest
import synthetic
import toy
import toy_models
from PIL import Image

import av_mae
from av_mae import attend, visualise


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with synthetic.quick():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("attend")
    toy_models.write(place / "run", toy_models.config("finetune"))
    toy.write_clip(place / "clip.mp4", 1)
    return place


def test_all_that_is_written(place, capsys):
    out = place / "out"
    clip = str(place / "clip.mp4")
    attend.main([str(place / "run"), clip, "--out", str(out)])
    told = capsys.readouterr().out
    assert "picture's output: " in told and "own tokens" in told
    found = json.loads((out / "attention.json").read_text())
    wanted = av_mae.load(place / "run").attention(clip)
    for output in ("rgb", "spectrogram", "joint"):
        for m, shape in (("rgb", (2, 2, 2)), ("spectrogram", (2, 8))):
            for layers in ("rollout", "last"):
                shares = np.array(found[layers][output][m])
                assert shares.shape == shape and (shares >= 0).all()
                np.testing.assert_allclose(
                    shares, getattr(wanted, layers)[output][m], rtol=1e-5, atol=1e-7
                )
            assert (
                abs(found["share_of"][output][m] - shares_of(found, output, m)) < 1e-5
            )
    with Image.open(out / "attention.png") as sheet:
        assert sheet.width > 600 and sheet.height > 1000
    with Image.open(out / "attention.gif") as film:
        assert film.n_frames == 4


def shares_of(found, output, m):
    return np.sum(found["rollout"][output][m])


def test_light_is_where_the_share_is():
    frame = np.full((32, 32, 3), 100, np.uint8)
    values = np.zeros((2, 2), np.float32)
    values[0, 1] = 1.0
    shown = visualise.heat(frame, values, 0.0, 1.0).sum(axis=-1)
    assert shown[:8, 24:].min() > shown[24:].max()


@pytest.mark.slow
def test_the_command_as_a_user_types_it(place):
    command = ("-m", "av_mae.attend", place / "run", place / "clip.mp4", "--out")
    options = ("--modalities", "rgb", "--layers", "last", "--start", "0.4")
    told = toy.run(*command, place / "rgb", *options)
    assert "spectrogram" not in told
    found = json.loads((place / "rgb" / "attention.json").read_text())
    assert found["used"] == ["rgb"] and set(found["last"]) == {"rgb", "joint"}
    told = toy.run("-m", "av_mae.attend", place / "run", place / "no.mp4", code=2)
    assert "--out" in told  # argparse: it is required
    told = toy.run(*command[:3], place / "no.mp4", "--out", place / "x", code=2)
    assert told.startswith("error: ") and "no.mp4" in told
    assert "python -m av_mae.attend runs/finetune" in toy.run(*command[:2], "--help")
