"""How the benchmark against peers counts, with systems made up: none of the real ones is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from peers.measured import CLIENT_COUNTS, PeerFailed, Place, Round, Run, System, measure
from peers.report import rows_of, tables
from peers.systems import ELGATE, PEERS


def rounds(*rates: float) -> list[Round]:
    return [Round(rate, 1e6 / rate, 1e6 / rate, 2e6 / rate, 3e6 / rate) for rate in rates]


def system(name: str, fails_at: str = "") -> System:
    @contextmanager
    def start(place: Place) -> Iterator[Run]:
        if fails_at == "start":
            raise PeerFailed("it is not installed")
        runs: list[int] = []

        def run(clients: int) -> Round:
            runs.append(clients)
            # The first of each number of clients warms up.
            if fails_at == "round" and len(runs) > len(CLIENT_COUNTS) + 1:
                raise OSError("its disk is full")
            return rounds(1000.0 * clients)[0]

        yield run
        if fails_at == "stop":
            raise PeerFailed("it does not end")

    return System(name, name.capitalize(), None, start)


@pytest.mark.parametrize("fails_at", ["start", "round", "stop"])
def test_a_system_that_fails_is_named_and_hides_no_other(fails_at: str, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "sockets").mkdir()
    sound, broken = system("sound"), system("broken", fails_at)
    said: list[str] = []

    measured, failures = measure([broken, sound], 3, tmp_path / "disk", tmp_path / "sockets", said.append)

    assert list(failures) == ["broken"]
    assert any("Broken FAILED" in line for line in said)
    assert {cell: len(results) for cell, results in measured.items()} == {(sound, n): 3 for n in CLIENT_COUNTS}


def test_the_goal_is_held_against_the_best_peer_and_its_median() -> None:
    in_one_process = next(peer for peer in PEERS if not peer.across_processes)
    across, slow = [peer for peer in PEERS if peer.across_processes][:2]
    measured = {
        (ELGATE, 32): rounds(90_000, 100_000, 110_000),
        (in_one_process, 32): rounds(30_000, 60_000, 70_000),
        # Its best round is the best of all; its median is not.
        (across, 32): rounds(40_000, 50_000, 200_000),
        (slow, 32): rounds(10_000, 10_000, 10_000),
    }

    rows = {row.metric: row for row in rows_of(measured)}

    goal = rows["elgate_32_clients_beside_best_peer"]
    assert (goal.value, goal.baseline, goal.baseline_is) == (100_000, 60_000, in_one_process.title)
    assert goal.goal and goal.met is False
    beside = rows["elgate_32_clients_beside_best_peer_across_processes"]
    assert (beside.baseline_is, beside.ratio, beside.met) == (across.title, 2.0, None)
    document = rows[f"{across.name}_32_clients"].as_document()
    assert (document["value"], document["least"], document["most"]) == (50_000, 40_000, 200_000)
    assert "elgate_8_clients_beside_best_peer" not in rows


def test_tables_show_what_there_is() -> None:
    text = tables({"cpus": 2}, {(ELGATE, 1): rounds(8000, 9000, 10_000)})

    assert "| Elgate | 9,000 (8,000–10,000) |  |  |" in text
    assert "| Elgate | 111 / 222 / 333 |  |  |" in text
