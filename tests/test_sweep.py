"""The grid, its table, and a sweep as a user runs it, resumed."""

import json
import re
import time

import pytest
import toy

from av_mae import UserError, sweep


def test_cells_are_all_combinations_and_pretrainings_are_shared(tmp_path):
    grid = [("pretrain.mask.rgb.ratio", ["0.5", "0.9"]), ("probe", ["full", "linear"])]
    common = (("pretrain.steps", "3"), ("steps", "2"))
    found = sweep.cells("f.py", grid, 2, tmp_path, common, "p.py")
    assert len({cell.runs[1].folder for cell in found}) == len(found) == 8
    assert len({cell.runs[0] for cell in found}) == 4  # 2 ratios, 2 seeds
    before, run = found[-1].runs
    assert before.command() == [
        *("--config=p.py", f"--workdir={before.folder}", "--config.steps=3"),
        *("--config.mask.rgb.ratio=0.9", "--config.seed=1"),
    ]
    assert run.command() == [
        *("--config=f.py", f"--workdir={run.folder}", "--config.steps=2"),
        "--config.probe=linear",
        f"--config.init_from.checkpoint_path={before.folder}",
        "--config.seed=1",
    ]
    assert [cell.seed for cell in found] == [0] * 4 + [1] * 4
    with pytest.raises(UserError, match="give --pretrain=CONFIG"):
        sweep.cells("f.py", grid, 1, tmp_path)


def test_pretrainings_come_first_and_once(tmp_path):
    grid = [("pretrain.mask.rgb.ratio", ["0.5", "0.9"]), ("probe", ["full", "linear"])]
    found = sweep.cells("f.py", grid, 2, tmp_path, (), "p.py")
    order = list(sweep._in_order(found))
    assert [x for x in order if isinstance(x, sweep.Cell)] == found
    first = [found[0].runs[0], found[2].runs[0], *found[:4]]
    assert order[:6] == first and len(order) == 12


def test_a_folder_of_another_command_is_refused(tmp_path):
    (cell,) = sweep.cells("f.py", [("probe", ["full"])], 1, tmp_path)
    cell.runs[0].folder.mkdir(parents=True)
    file = cell.runs[0].folder / "result.json"
    result = {"command": cell.runs[0].command(), "result": {"top_1": 1.0}}
    file.write_text(json.dumps(result))
    trainings = sweep.Trainings(tmp_path)
    assert trainings.result(cell) == {"top_1": 1.0}  # and nothing was trained
    (other,) = sweep.cells("g.py", [("probe", ["full"])], 1, tmp_path)
    with pytest.raises(UserError, match="a run of another command.*--config=f.py"):
        trainings.result(other)


def test_a_word_that_is_no_field_is_named():
    text = toy.run("-m", "av_mae.sweep", "--config=x", "--workdir=y", "--sed=1", code=2)
    assert "error: what is '--sed=1'? Fields are given as --config.seed=1." in text


@pytest.mark.slow
def test_a_sweep_of_pretrainings_and_finetunings(tmp_path):
    """Two at a time, one setting that does not exist; the second time is free."""
    toy.write_folder(tmp_path / "clips", 8)
    split = "--split=train=0.5,validation=0.5"
    toy.run("-m", "data.prepare", tmp_path / "clips", "--out", tmp_path / "set", split)
    data = tmp_path / "set"
    command = (
        *("-m", "av_mae.sweep", "--config=configs/folder/finetune.py:smoke"),
        *("--pretrain=configs/folder/pretrain.py:smoke", "--workdir", tmp_path / "w"),
        *("--grid", "pretrain.mask.rgb.kind=tube,none,random", "--jobs=2"),
        *(f"--config.data.dir={data}", f"--pretrain.data.dir={data}"),
        *("--config.steps=2", "--pretrain.steps=2"),
    )
    text = toy.run(*command)
    rows = json.loads((tmp_path / "w" / "table.json").read_text())["rows"]
    assert [row["seeds"] for row in rows] == [[0], [], [0]]
    assert 0 <= rows[0]["metrics"]["top_1"]["mean"] <= 1
    assert "mask.rgb.kind is 'none'" in rows[1]["failed"]
    table = (tmp_path / "w" / "table.md").read_text()
    assert table in text and "failed: mask.rgb.kind is 'none'" in table
    (log,) = (tmp_path / "w" / "runs").rglob("*kind=tube/seed 0/log.txt")
    before = tmp_path / "w" / "pretrain" / "mask.rgb.kind=tube" / "seed 0"
    assert re.search(rf"^init_from {re.escape(str(before))}$", log.read_text(), re.M)
    times = lambda: {p: p.stat().st_mtime_ns for p in (tmp_path / "w").rglob("*.*")}
    before = times()
    assert table in toy.run(*command)
    changed = {p for p, time in times().items() if time != before.get(p)}
    refused = tmp_path / "w" / "pretrain" / "mask.rgb.kind=none" / "seed 0" / "log.txt"
    assert refused in changed  # tried again, for what it lacked may be there by now
    others = {path.name for path in changed if path.parent != refused.parent}
    assert others <= {"table.md", "table.json"}


@pytest.mark.slow
def test_a_stopped_sweep_goes_on(tmp_path):
    """SIGTERM ends the trainings of both processes, which save; then they go on."""
    toy.write_folder(tmp_path / "clips", 8)
    split = "--split=train=0.5,validation=0.5"
    toy.run("-m", "data.prepare", tmp_path / "clips", "--out", tmp_path / "set", split)
    command = (
        *("-m", "av_mae.sweep", "--config=configs/folder/pretrain.py:smoke"),
        *("--workdir", tmp_path / "w", "--seeds=2", "--jobs=2"),
        *(f"--config.data.dir={tmp_path / 'set'}", "--config.steps=150"),
        "--config.log.every_steps=1",
    )
    metrics = [tmp_path / f"w/runs/all/seed {i}/metrics.jsonl" for i in range(2)]
    with toy.start(*command) as process:
        while not all(path.exists() and path.stat().st_size for path in metrics):
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        assert "give the command again" in toy.finish(process, code=2)
    steps = [json.loads(x.read_text().splitlines()[-1])["step"] for x in metrics]
    assert max(steps) < 150 and not list((tmp_path / "w").rglob("result.json"))
    toy.run(*command)
    (row,) = json.loads((tmp_path / "w" / "table.json").read_text())["rows"]
    assert row["seeds"] == [0, 1] and "differences" not in row
    for path, step in zip(metrics, steps, strict=True):
        log = (path.parent / "log.txt").read_text()
        assert f"resuming {path.parent} at step {step}" in log
