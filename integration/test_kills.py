"""SIGKILL, at random and at every named step: nothing acknowledged is lost, nothing stands twice or damaged."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from load import Load, seed_of_this_run

from elgate.daemon.child import ChildDaemon, DaemonFailed

# So that checkpoints, and what comes with them, happen in the middle of everything.
pytestmark = pytest.mark.elgate(wal={"checkpoint_interval": "100ms"})

KILLS = 50
ENGINE_STEPS = [
    "collected",
    "applying",
    "committed",
    "published",
    "released",
    "marked",
    "targets_synced",
    "cursor_written",
]


@pytest.fixture
def load(elgate_daemon: ChildDaemon) -> Iterator[Load]:
    load = Load(elgate_daemon, elgate_daemon.route_dir / "orders", shops=3)
    yield load
    load.close()


def check(load: Load, daemon: ChildDaemon) -> None:
    load.stop()
    assert daemon.stop() == 0, daemon.log_text()[-4000:]
    verdict = load.verify()
    assert verdict.acknowledged > 0
    assert verdict.ok, (verdict, daemon.log_text()[-4000:])
    # It did go through Elgate: a program that merely went native has shown nothing.
    assert not daemon.events("file_stays_native")
    assert not daemon.events("file_went_native")
    assert not daemon.events("slot_damaged")


def test_fifty_kills_at_random_lose_and_damage_nothing(elgate_daemon: ChildDaemon, load: Load) -> None:
    kill_at_random(elgate_daemon, load, KILLS)


@pytest.mark.elgate(wal={"checkpoint_interval": "100ms"}, disk={"engine": "io_uring"})
def test_nor_do_kills_with_the_other_disk_engine(elgate_daemon: ChildDaemon, load: Load) -> None:
    kill_at_random(elgate_daemon, load, KILLS // 2)


def files_route(flush: Any) -> list[dict[str, Any]]:
    return [{"name": "files", "match": {"path": "{route_dir}/**"}, "flush": flush}]


@pytest.mark.elgate(wal={"checkpoint_interval": "100ms"}, routes=files_route({"interval": "5ms"}))
def test_nor_do_kills_while_records_wait_for_their_interval(elgate_daemon: ChildDaemon, load: Load) -> None:
    kill_at_random(elgate_daemon, load, KILLS // 4)


@pytest.mark.elgate(wal={"checkpoint_interval": "100ms"}, routes=files_route("none"))
def test_nor_do_kills_while_records_are_durable_when_asked_alone(elgate_daemon: ChildDaemon, load: Load) -> None:
    kill_at_random(elgate_daemon, load, KILLS // 4)


def kill_at_random(elgate_daemon: ChildDaemon, load: Load, count: int) -> None:
    choices = random.Random(seed_of_this_run())
    # As many of the one as of the other.
    kills = ["daemon", "application"] * (count // 2)
    choices.shuffle(kills)
    for killed in kills:
        load.wait_for(choices.randrange(1, 40))
        if killed == "daemon":
            elgate_daemon.kill()
            elgate_daemon.start()
        else:
            load.kill_shop(choices.choice(load.alive))
    load.wait_for(20)
    check(load, elgate_daemon)


@pytest.mark.parametrize("step", ENGINE_STEPS)
def test_a_daemon_killed_at_each_step_loses_nothing(
    step: str, elgate_daemon_stopped: ChildDaemon, core_test_build: Path
) -> None:
    choices = random.Random(seed_of_this_run())
    daemon = elgate_daemon_stopped
    # Registration and checkpoints are passed rarely, the others with every batch.
    passes = (
        choices.randrange(0, 5) if step in ("marked", "targets_synced", "cursor_written") else choices.randrange(300)
    )
    with_doors = {"ELGATE_CORE_LIBRARY": str(core_test_build)}
    daemon.start(environment={**with_doors, "ELGATE_KILL_AT": f"{step}:{passes}"})
    load = Load(daemon, daemon.route_dir / "orders", shops=2)
    try:
        assert daemon.process is not None
        code = daemon.process.wait(60)
        assert code == -signal.SIGKILL, f"step {step} was not hit: exit code {code}\n{daemon.log_text()[-4000:]}"
        daemon.start(environment=with_doors)
        load.wait_for(50)
        check(load, daemon)
    finally:
        load.close()


def test_killed_again_while_it_replays(elgate_daemon: ChildDaemon, load: Load) -> None:
    """A replay that is cut short is done again by the next start."""
    choices = random.Random(seed_of_this_run())
    load.wait_for(200)
    for _ in range(8):
        elgate_daemon.kill()
        elgate_daemon.start(wait=False)
        try:
            elgate_daemon.wait_ready(choices.random() * 0.6)
        except DaemonFailed:
            continue  # not ready yet: killed in the middle of its start
    elgate_daemon.kill()
    elgate_daemon.start()
    load.wait_for(50)
    check(load, elgate_daemon)
