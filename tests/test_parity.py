"""The page of parity: what is recorded comes into it, and nothing else."""

import parity
import pytest


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("AV_MAE_PARITY", str(tmp_path))
    return tmp_path


def test_recorded_cases_become_rows(folder):
    parity.record("Scenic pretraining", "a", outputs=1e-6, loss=2e-7)
    parity.record("Scenic pretraining", "b", outputs=3e-6, gradients=None)
    parity.record("Scenic pretraining", "b", outputs=2e-6)  # run twice
    parity.record("something new", "c")
    known, new = parity.rows(parity.read(folder))
    assert (known.folder, known.cases) == ("scenic/pretrain", 2)
    assert known.worst == {"outputs": 3e-6, "loss": 2e-7}
    assert new == parity.Row("", "something new", 1, {})
    text = parity.page(parity.read(folder))
    assert "| 2 | 3.0e-06 | 2.0e-07 |  |" in text and "3 cases." in text
    left = " ".join(text.split("Not run: ")[1].split())
    assert parity.FAMILIES["avmaskenhancer"].text in left


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("AV_MAE_PARITY", raising=False)
    monkeypatch.chdir(tmp_path)
    parity.record("Scenic pretraining", "a", outputs=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_files_that_record_are_found():
    names = {path.name for path in parity.files()}
    assert {"test_autoencoder.py", "test_pretrain.py", "test_videomae.py"} <= names
    assert not names & {"test_loop.py", "parity.py", "scenic_pretrain.py"}
