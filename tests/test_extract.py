"""`python -m av_mae.extract`: features in three kinds of files, resumable."""

import builtins

import numpy as np
import pytest
import synthetic
import toy
import toy_models

import av_mae
from av_mae import clips, extract


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with synthetic.quick():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `run`, a classifier, and `clips` of two classes, one silent."""
    place = tmp_path_factory.mktemp("extract")
    toy_models.write(place / "run", toy_models.config("finetune"))
    toy.write_folder(place / "clips", 4, silent=[2], broken=True)
    return place


@pytest.fixture(scope="module")
def model(place):
    return av_mae.load(place / "run")


IDS = ["bell/00.mp4", "bell/02.mp4", "drum/01.mp4", "drum/03.mp4"]


def test_rows_are_the_features_of_the_clips(place, model, tmp_path):
    told, out = [], tmp_path / "f.npz"
    rows = clips.listed([place / "clips"])
    failed = extract.extract(model, rows, out, tell=told.append)
    assert failed == ["bell/broken.mp4"] and "broken.mp4" in told[0]
    table = extract.read(out)
    assert table.ids == IDS and table.labels == ["bell", "bell", "drum", "drum"]
    assert not (tmp_path / "f.npz.parts").exists()
    for i, name in enumerate(IDS):
        wanted = model.features(place / "clips" / name)
        for m in ("rgb", "spectrogram", "joint"):
            if m in wanted:
                np.testing.assert_allclose(table.arrays[m][i], wanted[m], atol=1e-5)
    silent = np.isnan(table.arrays["spectrogram"]).all(axis=1)
    np.testing.assert_array_equal(silent, [False, True, False, False])
    # The same again changes nothing; anything else is refused.
    assert extract.extract(model, rows, out, tell=told.append) == failed
    assert len(told) == 2 and "passed over: bell/broken.mp4, as before" in told[1]
    with pytest.raises(extract.ExtractError, match=r"otherwise \(layer differ\)"):
        extract.extract(model, rows, out, layer=0)


def test_a_run_that_was_stopped_goes_on(place, model, tmp_path, monkeypatch):
    rows = clips.listed([place / "clips"])
    options = dict(every=0.5, tell=lambda text: None)
    extract.extract(model, rows, tmp_path / "whole.npz", **options)
    wanted = extract.read(tmp_path / "whole.npz")
    monkeypatch.setattr(extract, "CLIPS_A_PART", 1)
    monkeypatch.setattr("av_mae.api.BATCH", 4)
    stream = type(model).stream_features

    def stopped(self, *args, **kw):
        for i, pair in enumerate(stream(self, *args, **kw)):
            if i == 2:
                raise KeyboardInterrupt
            yield pair

    monkeypatch.setattr(type(model), "stream_features", stopped)
    out = tmp_path / "f.npz"
    with pytest.raises(KeyboardInterrupt):
        extract.extract(model, rows, out, **options)
    assert not out.exists() and len(list((tmp_path / "f.npz.parts").glob("*.npz"))) == 2
    asked = []

    def counted(self, sources, **kw):
        sources = list(sources)
        asked.extend(sources)
        return stream(self, sources, **kw)

    monkeypatch.setattr(type(model), "stream_features", counted)
    extract.extract(model, rows, out, **options)
    assert len(asked) == 3  # two of four clips, and the broken one again
    found = extract.read(out)
    assert found.ids == wanted.ids and len(found.ids) == 16
    np.testing.assert_array_equal(found.start, wanted.start)
    for m, x in wanted.arrays.items():
        np.testing.assert_allclose(found.arrays[m], x, atol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
@pytest.mark.parametrize("suffix", list(extract.FILES))
def test_files_give_back_what_was_written(tmp_path, suffix, shape):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    rng = np.random.default_rng(0)
    arrays = {"rgb": rng.normal(size=(2, *shape)).astype(np.float32)}
    arrays["spectrogram"] = np.full((2, 4), np.nan, np.float32)
    span = np.array([0.0, 1.5]), np.array([1.5, 3.0])
    settings = {"layer": -1, "every": None}
    ids, labels = ["a/ü.mp4", "a/ü.mp4"], ["x|y", ""]
    path = tmp_path / f"f{suffix}"
    table = extract.Table(ids, labels, *span, arrays, settings)
    extract.writer_of(path)(path, table)
    found = extract.read(path)
    assert (found.ids, found.labels, found.settings) == (ids, labels, settings)
    np.testing.assert_array_equal(found.start, span[0])
    assert list(found.arrays) == list(arrays)
    for m, x in arrays.items():
        assert found.arrays[m].dtype == np.float32
        np.testing.assert_array_equal(found.arrays[m], x)
    path.write_bytes(b"damaged")
    with pytest.raises(extract.ExtractError, match="is no file of features"):
        extract.read(path)


def test_parquet_without_pyarrow_is_an_error_that_says_so(tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kw):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(extract.ExtractError, match="pip install pyarrow"):
        extract.writer_of(tmp_path / "f.parquet")
    with pytest.raises(extract.ExtractError, match="none of the suffixes .npz"):
        extract.writer_of(tmp_path / "f.csv")


@pytest.mark.slow
def test_the_command_as_a_user_types_it(place, tmp_path):
    command = ("-m", "av_mae.extract", place / "run", place / "clips", "--out")
    out = tmp_path / "f.safetensors"
    told = toy.run(*command, out, "--pool", "none", "--layer", "0", code=1)
    assert "4 rows of 4 clips: rgb (8, 16), spectrogram (16, 16)" in told
    assert "bell/broken.mp4" in told and "1 of 5 clips passed over" in told
    assert extract.read(out).arrays["rgb"].shape == (4, 8, 16)
    only = ("--modalities", "rgb", "--every", "0.5")
    toy.run(*command, tmp_path / "g.parquet", *only, code=1)
    table = extract.read(tmp_path / "g.parquet")
    assert set(table.arrays) == {"rgb", "joint"} and len(table.ids) == 16
    told = toy.run(*command, tmp_path / "f.csv", code=2)
    assert told.startswith("error: --out") and "choose one" in told
    assert "python -m av_mae.extract runs/pretrain" in toy.run(*command[:2], "--help")
