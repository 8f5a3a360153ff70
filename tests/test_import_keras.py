"""Keras's VideoMAE: by the order of its variables, in .h5 files and SavedModels."""

import pytest
import videomae_files as files

from av_mae import CheckpointError, importers

KINDS = {
    "plain": {},
    "layer scale": dict(scaled=True),
    "one block": dict(depth=1),
}


@pytest.mark.parametrize("root", ["", "model_weights"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("finetuned", [False, True])
def test_keras_by_order(tmp_path, finetuned, kind, root):
    variables = files.keras(files.arrays(finetuned, **kind))
    path = files.write_h5(tmp_path / "a.h5", variables, root)
    found = importers.read(path, **files.untold(finetuned))
    files.assert_same(found, files.anchor(finetuned, **kind))


def test_keras_with_other_ends(tmp_path):
    for i, kind in enumerate((dict(learned=True), dict(pooled=False))):
        variables = files.keras(files.arrays(True, **kind))
        path = files.write_h5(tmp_path / f"{i}.h5", variables)
        files.assert_same(
            importers.read(path, **files.UNTOLD), files.anchor(True, **kind)
        )


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("finetuned", [False, True])
def test_savedmodels_have_the_same_weights(tmp_path, finetuned, functional):
    pytest.importorskip("tensorflow")
    kind = dict(learned=True) if finetuned else {}
    variables = files.keras(files.arrays(finetuned, **kind))
    path = files.write_savedmodel(tmp_path / "model", variables, functional)
    found = importers.read(path, **files.untold(finetuned))
    files.assert_same(found, files.anchor(finetuned, **kind))


def test_a_damaged_savedmodel_is_told(tmp_path):
    pytest.importorskip("tensorflow")
    (tmp_path / "variables").mkdir()
    (tmp_path / "saved_model.pb").write_bytes(b"")
    with pytest.raises(CheckpointError, match="variables cannot be read"):
        importers.read(tmp_path)


def test_keras_in_another_order_is_told(tmp_path):
    right = files.keras(files.arrays(True))
    for i, wrong in enumerate((right[:-1], right[:9], right[1:])):
        path = files.write_h5(tmp_path / f"{i}.h5", wrong)
        with pytest.raises(CheckpointError, match="order and shapes"):
            importers.read(path, **files.UNTOLD)
