"""What a run will take: XLA's memory, the line through two batches, the words."""

import logging
import math

import pytest
import synthetic

from av_mae import ConfigError, flops, peaks, plan


def test_the_largest_batch_is_where_the_line_meets_the_memory():
    found = plan.Plan(None, base=2e9, per_clip=1e8, devices=4)
    assert found.largest(10e9) == 4 * 70
    assert found.largest(1e9) == 0


def test_time_of_a_run():
    config = synthetic.tiny("digits/pretrain", steps=0, epochs=10.0)
    assert plan.run_seconds(config, 300, 3.0) == 1000
    assert math.isnan(plan.run_seconds(config, 0, 3.0))
    config.steps, config.batch_size, config.compute.accumulate = 5, 4, 3
    assert plan.run_seconds(config, 0, 3.0) == 20
    assert [plan.days(x) for x in (90, 7200, 180_000)] == [
        *("1.5 minutes", "2.0 hours", "2.1 days")
    ]


@pytest.mark.slow
def test_a_dry_run_compiles_and_says_it(caplog):
    """More clips take more memory; what is said is what was counted."""
    config = synthetic.tiny("digits/pretrain", batch_size=4)
    with synthetic.quick(), caplog.at_level(logging.INFO, "av_mae"):
        plan.dry_run(config, 1000, "H100")
        found = plan.make(config)
    assert found.per_clip > 0 and found.memory.total > found.memory.temporary > 0
    # The state lies where it lay; nearly nothing is returned beside it.
    assert found.memory.outputs - found.memory.aliased < found.memory.arguments / 10
    text = caplog.text
    # Of the two batch sizes that are compiled, the log is of the config's.
    assert "4 clips per update" in text and "2 clips per update" not in text
    once = flops.per_clip(config) / 1e9
    assert f"training step: {once:.1f} GFLOP a clip" in text
    assert f"largest batch {found.largest(peaks.named('H100').memory)};" in text
    with pytest.raises(ConfigError, match="device is 'abacus'"):
        plan.dry_run(config, 0, "abacus")
