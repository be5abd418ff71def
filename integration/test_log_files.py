"""The files of a log as they come to be and go again: what is kept below the checkpoint, for how long, and how much."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from programs import Appender, wait_until

from elgate.daemon.child import ChildDaemon

MIB = 1 << 20


@pytest.fixture
def appender(elgate_daemon_stopped: ChildDaemon) -> Iterator[Callable[[], Appender]]:
    started = []

    def start() -> Appender:
        started.append(Appender(elgate_daemon_stopped, elgate_daemon_stopped.route_dir / "file"))
        return started[-1]

    yield start
    for one in started:
        one.close()


def history(daemon: ChildDaemon) -> list[Path]:
    return sorted((daemon.wal_dir / "files" / "history").glob("*.wal"))


def log_bytes(daemon: ChildDaemon) -> int:
    sizes = 0
    for path in (daemon.wal_dir / "files").rglob("*.wal"):
        try:
            sizes += path.stat().st_size
        except FileNotFoundError:
            continue  # it just went
    return sizes


@pytest.mark.elgate(wal={"checkpoint_interval": "100ms", "max_age": "1h"})
def test_segments_below_the_checkpoint_are_kept_and_never_replayed(
    elgate_daemon: ChildDaemon, appender: Callable[[], Appender]
) -> None:
    daemon = elgate_daemon
    writer = appender()
    for _ in range(64):
        assert writer.fill("x") == 0
    wait_until(lambda: len(history(daemon)) >= 3, "segments are kept")
    kept = history(daemon)
    assert kept[0].name.startswith("00000000000000000001-")
    daemon.kill()
    # With what it holds no replay could go on.
    kept[1].write_bytes(b"somebody's mistake")
    daemon.start()
    writer.append_when_possible("behind it")
    assert writer.missing(writer.path.read_bytes()) == []
    assert daemon.stop() == 0
    replayed = sum(event["bytes"] for event in daemon.events("log_replayed"))
    assert replayed < 16 * MIB, "what the checkpoint has passed is not read again"
    assert daemon.events("log_note") == []
    assert kept[0].exists()
    # Without the wish to keep them they go.
    daemon.config_path.write_text(daemon.config_path.read_text().replace("max_age: 1h", "max_age: 0s"))
    daemon.start()
    wait_until(lambda: history(daemon) == [], "what was kept goes")
    assert daemon.stop() == 0


@pytest.mark.elgate(wal={"checkpoint_interval": "100ms", "max_age": "1h", "max_size": "48MiB"})
def test_what_is_kept_gives_way_to_what_is_written(
    elgate_daemon: ChildDaemon, appender: Callable[[], Appender]
) -> None:
    daemon = elgate_daemon
    writer = appender()
    largest = 0
    for _ in range(160):
        assert writer.fill("x") == 0
        largest = max(largest, log_bytes(daemon))
    assert 24 * MIB < largest <= 48 * MIB
    wait_until(lambda: bool(history(daemon)), "segments are kept")
    assert int(history(daemon)[0].name[:20]) > 1, "the oldest went first"


@pytest.mark.elgate(wal={"checkpoint_interval": "100ms", "max_age": "1s"})
def test_what_is_old_enough_goes_though_nothing_is_written(
    elgate_daemon: ChildDaemon, appender: Callable[[], Appender]
) -> None:
    writer = appender()
    wait_until(lambda: writer.fill("x") == 0 and history(elgate_daemon) != [], "a segment is kept")
    wait_until(lambda: history(elgate_daemon) == [], "what was kept goes")
