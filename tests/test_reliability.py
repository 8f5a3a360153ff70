"""The page of what was tried says what the tests noted, and what was not tried."""

import functools
import json
from pathlib import Path

import pages
import reliability

ROOT = Path(__file__).resolve().parents[1]


load = functools.partial(pages.load, "reliability")


def test_the_page_is_up_to_date():
    page = load()
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert text == page.page(page.read()), "run `python docs/reliability.py`"


def test_what_is_noted_is_told_and_the_rest_is_open(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    monkeypatch.delenv(reliability.RECORD, raising=False)
    reliability.record("damaged media file", 16, "nothing")
    assert not path.exists()
    monkeypatch.setenv(reliability.RECORD, str(path))
    reliability.record("damaged media file", 2000, "fine", seed=3)
    reliability.record("random broken config", 40, "refused")
    reliability.record("random broken config", 41, "refused")
    rows = json.loads(path.read_text())
    assert {name: row["times"] for name, row in rows.items()} == {
        "damaged media file": 2000,
        "random broken config": 41,
    }
    name = "test_what_is_noted_is_told_and_the_rest_is_open"
    assert rows["damaged media file"]["test"] == f"tests/test_reliability.py::{name}"
    text = load().page(rows)
    row = (
        f"| damaged media file | 2,000 | 3 | fine | tests/test_reliability.py {name} |"
    )
    assert row in text
    assert "random broken config (41 of 500)" in text
    assert "damaged media file (" not in text


def test_every_fault_of_the_page_is_noted_by_a_test():
    sources = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")
    )
    for fault in load().FAULTS:
        kind = fault.split(":")[0]
        assert f'record("{kind}' in sources or f'record(f"{kind}' in sources, fault
