"""Our own exported layout comes back as it was."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from test_export import LABELS, parameters, settings, write

import av_mae
from av_mae import CheckpointError, clips, convert, export, importers, optim
from av_mae import run as runs
from data import digits


@pytest.mark.parametrize("trainer", ["pretrain", "finetune"])
def test_our_layout_comes_back(tmp_path, trainer, capsys):
    both = {"modalities": ("rgb", "spectrogram")} if trainer == "finetune" else {}
    config = settings(trainer, **both)
    params = parameters(config)
    workdir = write(tmp_path / "run", config, params)
    out = tmp_path / "out"
    export.main([str(workdir), "--to", "safetensors", "--out", str(out)])
    assert f"written: {out} (safetensors)" in capsys.readouterr().out
    for path in (out, out / "model.safetensors"):
        found = importers.read(path)
        jax.tree.map(np.testing.assert_array_equal, found.params, params)
        assert runs.config_json(found.config) == runs.config_json(config)
        assert found.labels == (LABELS if trainer == "finetune" else [])
    values, theirs, meta = runs.weights_of(out)  # as init_from takes it
    assert meta["labels"] == found.labels
    assert theirs.model == found.config.model
    assert optim.named(values).keys() == optim.named(params).keys()
    again = convert.convert(out, tmp_path / "again")
    assert all(row.source == row.target for row in again.rows)


def test_damaged_or_later_exports_are_told(tmp_path):
    workdir = write(tmp_path / "run", (c := settings("finetune")), parameters(c))
    out = tmp_path / "out"
    export.export(workdir, "safetensors", out)
    with pytest.raises(CheckpointError, match="leave model.heads out"):
        importers.read(out, **{"model.heads": 2})
    told = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(told | {"format": 2}))
    with pytest.raises(CheckpointError, match="format 2.*update av_mae"):
        importers.read(out)
    (out / "config.json").write_text(json.dumps(told))
    (out / "model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        importers.read(out)


def test_the_model_that_comes_with_the_project_reconstructs():
    """models/digits: small, read by `av_mae.load`, and better than the mean picture."""
    folder = Path(__file__).resolve().parents[1] / "models" / "digits"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6
    assert "digits" in (folder / "README.md").read_text()
    model, rng = av_mae.load(folder), np.random.default_rng(0)
    errors = []
    for scan in digits.scans("test")[0][:8]:
        frames = np.repeat(digits.picture(scan, rng)[..., None], 3, axis=-1)
        clip = clips.Clip(frames=frames, fps=float(digits.FPS), sound=None)
        errors.append(model.reconstruct(clip, ratio=0.5, seed=0).error["rgb"])
    assert np.mean(errors) < 0.75  # of a variance of 1; the mean picture leaves 0.78
