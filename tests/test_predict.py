"""`python -m av_mae.predict`: tables, JSON and CSV; bad clips are passed over."""

import csv
import io
import json

import numpy as np
import pytest
import synthetic
import toy
import toy_models

import av_mae
from av_mae import predict


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with synthetic.quick():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `run`, a classifier, and `clips`: two good ones and a bad one."""
    place = tmp_path_factory.mktemp("predict")
    toy_models.write(place / "run", toy_models.config("finetune"))
    (place / "clips").mkdir()
    toy.write_clip(place / "clips" / "a.mp4", 1)
    toy.write_clip(place / "clips" / "b.mp4", 2, sound=False)
    (place / "clips" / "bad.mp4").write_text("no video at all")
    return place


def test_a_folder_is_walked_and_bad_clips_are_told(place, capsys):
    assert predict.main([str(place / "run"), str(place / "clips"), "--json"]) == 1
    out, err = capsys.readouterr()
    assert "passed over" in err and "bad.mp4" in err and "1 of 3" in err
    found = json.loads(out)
    assert [one["clip"] for one in found] == ["a.mp4", "b.mp4"]
    assert [one["used"] for one in found] == [["rgb", "spectrogram"], ["rgb"]]
    wanted = av_mae.load(place / "run").predict(place / "clips" / "a.mp4")
    pairs = [(x["label"], x["probability"]) for x in found[0]["predictions"]]
    assert [name for name, _ in pairs] == [name for name, _ in wanted]
    np.testing.assert_allclose([p for _, p in pairs], [p for _, p in wanted], rtol=1e-5)


def test_windows_modalities_and_top(place, capsys):
    command = [str(place / "run"), str(place / "clips" / "a.mp4"), "--csv"]
    options = ["--windows", "0.5", "--modalities", "spectrogram", "--top", "1"]
    assert predict.main([*command, *options]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 4 and {row["used"] for row in rows} == {"spectrogram"}
    assert [float(row["start"]) for row in rows][:2] == [0.0, 0.48]
    assert {row["rank"] for row in rows} == {"1"}
    assert predict.main([*command[:2], "--windows"]) == 0  # as long as a window
    table = capsys.readouterr().out
    assert "0.00-0.48" in table and "rgb + spectrogram" in table and "%" in table


def test_where_nothing_can_be_done(place, capsys):
    bad = str(place / "clips" / "bad.mp4")
    assert predict.main([str(place / "run"), bad]) == 2
    toy_models.write(place / "auto", toy_models.config("pretrain"))
    with pytest.raises(SystemExit, match="2"):
        predict.main([str(place / "auto"), bad])
    assert "error: this model is an autoencoder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        predict.main([str(place / "run"), bad, "--modalities", "video"])
    assert "video is none of rgb, spectrogram" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        predict.main([str(place / "run"), "--windows", bad])
    assert "give the clips before --windows" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_as_a_user_types_it(place):
    text = toy.run("-m", "av_mae.predict", place / "run", place / "clips", code=1)
    assert "a.mp4" in text and "passed over" in text and "Traceback" not in text
    text = toy.run("-m", "av_mae.predict", place / "nowhere", place / "clips", code=2)
    assert text.startswith("error: ") and "nowhere" in text
    assert "python -m av_mae.predict runs/finetune" in toy.run(
        "-m", "av_mae.predict", "--help"
    )
