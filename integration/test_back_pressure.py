"""A full ring slows its producers down, and does no more than that."""

from __future__ import annotations

import json
import subprocess
import sys

from elgate.daemon.child import ChildDaemon

FLOOD = """
import json, os, sys, time
import elgate
elgate.patch_all()
until = time.monotonic() + 1.5
with open(sys.argv[1], "ab", buffering=0) as file:
    record = b"x" * 4_000
    while time.monotonic() < until:
        file.write(record)
print(json.dumps(elgate.status()))
"""


def test_who_waits_for_space_is_woken_when_there_is_some(elgate_daemon: ChildDaemon) -> None:
    # Two, so that one's slots come free while the other sleeps.
    flooding = [
        subprocess.Popen(
            [sys.executable, "-c", FLOOD, str(elgate_daemon.route_dir / f"flood-{number}")],
            stdout=subprocess.PIPE,
            text=True,
            env=elgate_daemon.env(),
        )
        for number in range(2)
    ]
    waits = late = 0
    for process in flooding:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        status = json.loads(output)
        waits += status["full_ring_waits"]
        late += status["late_wakes"]
    assert waits > 0, "the ring was never full: this test has shown nothing"
    # A wake that is lost costs its sleeper the 100 ms that a sleep lasts at most. On a machine where nothing runs for
    # that long, one may come late by itself.
    assert late <= waits // 100, f"{late} of {waits} waits ended by themselves"
