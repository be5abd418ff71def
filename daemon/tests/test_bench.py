"""What the benchmarks measure is for docs/benchmarks.md; here it is only shown that they do."""

from __future__ import annotations

import pytest

from elgate.daemon.bench import figures


def test_each_row_has_a_value_and_a_goal_that_was_held_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "REPETITIONS", 1)
    monkeypatch.setattr(figures, "IDLE_S", 0.1)
    monkeypatch.setattr(figures.Producers.run, "__defaults__", (1, 0.05, None, 0))
    said: list[str] = []
    facts, rows = figures.ring(said.append)
    assert facts["cpus"] > 0
    assert said
    assert len({row.metric for row in rows}) == len(rows) > 10
    for row in rows:
        assert row.value >= 0 and (row.value > 0 or row.metric == "idle_daemon_cpu"), row
        assert (row.met is None) == (row.goal == ""), row
        assert (row.ratio is None) == (row.baseline is None), row
