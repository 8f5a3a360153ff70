"""Our own exported layout comes back as it was."""

import json

import jax
import numpy as np
import pytest
from test_export import LABELS, parameters, settings, write

from av_mae import CheckpointError, convert, export, importers, optim
from av_mae import run as runs


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
    values, theirs = runs.weights_of(out)  # as init_from takes it
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
