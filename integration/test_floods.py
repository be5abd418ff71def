"""Programs that write faster than a disk: they are slowed down, and that is all. What they wrote is there, once, in order,
whatever is killed; and what they were told is durable survives a power cut."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from disks import Ext4, needs_root
from load import seed_of_this_run

from elgate.daemon.child import ChildDaemon

RECORD_BYTES = 100
LIMIT_S = 60.0

# Says how many records are durable, now and then; at its end what the client counted.
FLOOD = """
import json, os, sys, time
import elgate
elgate.patch_all()
path, records, synced_every, rest = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), b"-" * int(sys.argv[4])
with open(path, "ab", buffering=0) as file:
    for number in range(1, records + 1):
        file.write(b"%099d\\n%b" % (number, rest))
        if number % synced_every == 0:
            os.fsync(file.fileno())
            print(number, flush=True)
    os.fsync(file.fileno())
print(json.dumps(elgate.status()), flush=True)
"""


class Flood:
    def __init__(self, daemon: ChildDaemon, path: Path, records: int, synced_every: int, rest_bytes: int = 0) -> None:
        self.path = path
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-c", FLOOD, str(path), str(records), str(synced_every), str(rest_bytes)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**daemon.env(), "ELGATE_FALLBACK": "wait"},
        )
        self.said = threading.Condition()
        self.listener = threading.Thread(target=self._listen)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self.said:
                self.lines.append(line)
                self.said.notify_all()

    def wait_for_more(self, lines: int) -> None:
        with self.said:
            wanted = len(self.lines) + lines
            assert self.said.wait_for(lambda: len(self.lines) >= wanted, LIMIT_S), "it wrote no more"

    def end(self) -> dict[str, int]:
        code = self.process.wait(LIMIT_S)
        self.listener.join()
        assert self.process.stderr is not None
        assert code == 0, self.process.stderr.read()[-4000:]
        status: dict[str, int] = json.loads(self.lines.pop())
        return status

    def durable(self) -> int:
        return int(self.lines[-1])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.listener.join()


def check(path: Path, at_least: int) -> int:
    """How many records are in the file: these and no others, in their order."""
    found = path.read_bytes()
    count, rest = divmod(len(found), RECORD_BYTES)
    assert rest == 0
    assert found == b"".join(b"%099d\n" % number for number in range(1, count + 1))
    assert count >= at_least, f"{at_least} were durable, {count} are there"
    return count


def test_who_waits_for_space_is_woken_when_there_is_some(elgate_daemon: ChildDaemon) -> None:
    # Two, so that one's slots come free while the other sleeps.
    floods = [
        Flood(elgate_daemon, elgate_daemon.route_dir / f"flood-{number}", 30_000, 1 << 60, 3_900) for number in range(2)
    ]
    states = [flood.end() for flood in floods]
    waits = sum(status["full_ring_waits"] for status in states)
    late = sum(status["late_wakes"] for status in states)
    assert waits > 0, "the ring was never full: this test has shown nothing"
    # A wake that is lost costs its sleeper the 100 ms that a sleep lasts at most. On a machine where nothing runs for
    # that long, one may come late by itself.
    assert late <= waits // 100, f"{late} of {waits} waits ended by themselves"


@pytest.mark.parametrize("flush", ["group", "none"])
def test_kills_of_the_daemon_lose_nothing_of_a_flood(elgate_daemon: ChildDaemon, flush: str) -> None:
    choices = random.Random(seed_of_this_run())
    route = {"name": "files", "match": {"path": f"{elgate_daemon.route_dir}/**"}, "flush": flush}
    elgate_daemon.stop()
    elgate_daemon.write_config([route])
    elgate_daemon.start()
    kills, synced_every = 8, 4_000
    flood = Flood(elgate_daemon, elgate_daemon.route_dir / "flood", 400_000, synced_every)
    try:
        for _ in range(kills):
            flood.wait_for_more(choices.randrange(1, 6))
            elgate_daemon.kill()
            elgate_daemon.start()
        flood.end()
    finally:
        flood.kill()
    assert elgate_daemon.stop() == 0, elgate_daemon.log_text()[-4000:]
    assert check(flood.path, flood.durable()) == 400_000
    assert not elgate_daemon.events("file_went_native")
    assert not elgate_daemon.events("slot_damaged")
    assert elgate_daemon.events("stopped")[-1]["counters"]["syncs_total"] > 0, "each group was durable by itself"


@needs_root
def test_a_power_cut_in_a_flood_takes_only_what_was_not_durable(disk_dir: Path) -> None:
    choices = random.Random(seed_of_this_run())
    with Ext4(disk_dir / "mnt", disk_dir / "disk.img", 512 << 20) as image:
        with ChildDaemon(image.mount_point / "elgate") as daemon:
            # The log file of the daemon itself must not lie on the disk that goes away.
            daemon.log_path = disk_dir / "daemon.log"
            os.sync()
            daemon.start()
            flood = Flood(daemon, daemon.route_dir / "flood", 1 << 60, 5_000)
            try:
                flood.wait_for_more(choices.randrange(5, 15))
                image.cut_power()
                # It may go on into the ring for as long as that has room.
                daemon.kill()
            finally:
                flood.kill()
            image.unmount()
            image.mount()
            daemon.ring_path.unlink()
            daemon.start()
            assert daemon.stop() == 0, daemon.log_text()[-4000:]
            check(flood.path, flood.durable())
            assert daemon.events("log_replayed"), "nothing was replayed: all was in the file already"
