"""When records become durable that nobody waits for, and that fsync asks at once in every mode."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest

from elgate.daemon.child import ChildDaemon

# So long that nothing happens by itself while a test runs.
NEVER = "1h"
LONG = {"interval": "60s"}
AT_ONCE_S = 10.0

PROGRAM = """
import os, sys, time
import elgate
directory = sys.argv[1]

def say(*words):
    print(*words, flush=True)

def until(condition, what, limit_s=20.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, what

def registered(path):
    # A file's first record makes its identity durable, and perhaps more.
    elgate.append(path, b"first;").wait("durable", timeout=30)
"""


def routes(**flush: Any) -> list[dict[str, Any]]:
    """A route for each directory, by its flush mode."""
    return [
        {"name": name, "match": {"path": "{route_dir}/" + name + "/**"}, "flush": mode} for name, mode in flush.items()
    ]


def start(daemon: ChildDaemon, text: str, *arguments: str) -> subprocess.Popen[str]:
    for route in ("always", "group", "interval", "none", "short"):
        (daemon.route_dir / route).mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM + text, str(daemon.route_dir), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**daemon.env(), "ELGATE_FALLBACK": "wait"},
    )


def run(daemon: ChildDaemon, text: str, *arguments: str) -> list[str]:
    process = start(daemon, text, *arguments)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, daemon.log_text()[-4000:]
    return output.splitlines()


INTERVAL_S = 0.25


@pytest.mark.elgate(routes=routes(interval={"interval": "250ms"}), wal={"checkpoint_interval": NEVER})
def test_with_an_interval_records_become_durable_by_themselves_and_not_before(elgate_daemon: ChildDaemon) -> None:
    lines = run(
        elgate_daemon,
        """
path = directory + "/interval/log"
registered(path)
for _ in range(3):
    before = time.monotonic()
    ack = elgate.append(path, b"record;")
    until(lambda: ack.level != "accepted", "logged")
    assert ack.level in ("logged", "applied"), ack.level
    later = elgate.append(path, b"later;")
    until(lambda: ack.level in ("durable", "applied"), "durable")
    took = time.monotonic() - before
    # The interval is the oldest record's: what came later became durable with it.
    until(lambda: later.level in ("durable", "applied"), "durable too", limit_s=5.0)
    say(took)
""",
    )
    for line in lines:
        # Never earlier: nobody asked. How late, depends on what else the machine does.
        assert INTERVAL_S <= float(line) < INTERVAL_S + 5.0
    assert min(map(float, lines)) < 2 * INTERVAL_S, lines


@pytest.mark.elgate(
    routes=routes(none="none", short={"interval": "20ms"}, interval=LONG), wal={"checkpoint_interval": NEVER}
)
def test_without_an_interval_they_do_not_until_somebody_asks(elgate_daemon: ChildDaemon) -> None:
    run(
        elgate_daemon,
        """
for mode in ("none", "interval"):
    path = directory + "/" + mode + "/log"
    registered(path)
    registered(directory + "/short/log")
    ack = elgate.append(path, b"record;")
    ack.wait("logged", timeout=30)
    ack.wait("applied", timeout=30)
    assert ack.level == "logged", ack.level
    # Time passes, by another route's clock.
    for _ in range(10):
        other = elgate.append(directory + "/short/log", b"tick;")
        until(lambda: other.level in ("durable", "applied"), "the other route's interval")
        assert ack.level == "logged", ack.level
    ack.wait("durable", timeout=10)
    assert ack.level == "applied", ack.level
    assert open(path, "rb").read() == b"first;record;"
""",
    )


@pytest.mark.elgate(routes=routes(none="none"), wal={"checkpoint_interval": "100ms"})
def test_a_checkpoint_makes_them_durable(elgate_daemon: ChildDaemon) -> None:
    run(
        elgate_daemon,
        """
path = directory + "/none/log"
registered(path)
for _ in range(3):
    ack = elgate.append(path, b"record;")
    until(lambda: ack.level == "applied", "durable with the checkpoint")
""",
    )


@pytest.mark.elgate(
    routes=routes(always="always", group="group", interval=LONG, none="none"), wal={"checkpoint_interval": NEVER}
)
def test_in_every_mode_who_waits_for_durable_does_not_wait_for_anything_else(elgate_daemon: ChildDaemon) -> None:
    """With an interval of a minute, each of these would take that long if it did not ask."""
    began = time.monotonic()
    run(
        elgate_daemon,
        """
elgate.patch_all()
for mode in ("always", "group", "interval", "none"):
    base = directory + "/" + mode
    ack = elgate.append(base + "/append", b"x" * 100)
    ack.wait("durable", timeout=10)
    assert ack.level in ("durable", "applied"), ack.level
    fd = os.open(base + "/fsync", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for _ in range(20):
        os.write(fd, b"record;")
        os.fsync(fd)
        # Everything of the route is durable with it.
    marker = elgate.append(base + "/fsync", b"own;")
    os.write(fd, b"end;")
    os.fdatasync(fd)
    assert marker.level in ("durable", "applied"), marker.level
    sync = os.open(base + "/sync", os.O_WRONLY | os.O_CREAT | os.O_DSYNC, 0o644)
    for _ in range(20):
        os.write(sync, b"record;")
    os.close(sync)
    os.close(fd)
""",
    )
    assert time.monotonic() - began < AT_ONCE_S + 10.0
    for mode in ("always", "group", "interval", "none"):
        assert (elgate_daemon.route_dir / mode / "fsync").read_bytes() == b"record;" * 20 + b"own;end;"
        assert (elgate_daemon.route_dir / mode / "sync").read_bytes() == b"record;" * 20


@pytest.mark.elgate(routes=routes(none="none"), wal={"checkpoint_interval": NEVER})
def test_an_fsync_covers_the_records_of_another_process(elgate_daemon: ChildDaemon) -> None:
    path = str(elgate_daemon.route_dir / "none" / "log")
    writer = start(
        elgate_daemon,
        """
registered(sys.argv[2])
ack = elgate.append(sys.argv[2], b"theirs;")
ack.wait("logged", timeout=30)
assert ack.level == "logged"
say("written")
sys.stdin.readline()
say(ack.level)
""",
        path,
    )
    assert writer.stdout is not None and writer.stdin is not None
    assert writer.stdout.readline() == "written\n"
    run(
        elgate_daemon,
        """
elgate.patch_all()
fd = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)
os.write(fd, b"ours;")
os.fsync(fd)
""",
        path,
    )
    output, _ = writer.communicate("go on\n", timeout=30)
    assert output == "applied\n"


@pytest.mark.elgate(routes=routes(interval="group"), wal={"checkpoint_interval": NEVER})
def test_a_reload_changes_the_mode_of_open_files(elgate_daemon: ChildDaemon) -> None:
    process = start(
        elgate_daemon,
        """
path = directory + "/interval/log"
for _ in range(3):
    registered(path)
    ack = elgate.append(path, b"record;")
    ack.wait("logged", timeout=30)
    say(ack.level)
    sys.stdin.readline()
    ack.wait("durable", timeout=30)
say("end")
""",
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline().strip() in ("durable", "applied")
    pattern = f"{elgate_daemon.route_dir}/interval/**"
    for count, (mode, levels) in enumerate([("none", ["logged"]), ("group", ["durable", "applied"])], 1):
        elgate_daemon.write_config([{"name": "interval", "match": {"path": pattern}, "flush": mode}])
        elgate_daemon.reload()
        elgate_daemon.wait_for_event("reloaded", count=count)
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() in levels
    output, _ = process.communicate("go on\n", timeout=30)
    assert output == "end\n" and process.returncode == 0


RECORDS = 500


@pytest.mark.parametrize("victims", ["daemon", "application", "both"])
@pytest.mark.parametrize("mode", ["interval", "none"])
@pytest.mark.elgate(routes=routes(interval=LONG, none="none"), wal={"checkpoint_interval": NEVER})
def test_a_kill_between_logged_and_durable_loses_nothing(mode: str, victims: str, elgate_daemon: ChildDaemon) -> None:
    path = elgate_daemon.route_dir / mode / "log"
    process = start(
        elgate_daemon,
        f"""
path = directory + "/{mode}/log"
registered(path)
for number in range({RECORDS}):
    ack = elgate.append(path, b"%06d;" % number)
    if number % 7 == 0: # many groups
        ack.wait("logged", timeout=30)
ack.wait("logged", timeout=30)
ack.wait("applied", timeout=30)
assert ack.level == "logged", ack.level
say("logged")
sys.stdin.readline()
ack.wait("durable", timeout=30)
say(ack.level)
""",
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "logged\n"
    if victims != "application":
        elgate_daemon.kill()
    if victims != "daemon":
        process.kill()
        process.wait()
    if victims == "both":
        # Neither the ring nor the file has them any more: what comes back comes from the log.
        elgate_daemon.ring_path.unlink()
        with open(path, "r+b") as file:
            file.write(bytes(path.stat().st_size))
    if victims != "application":
        elgate_daemon.start()
    if victims == "daemon":
        output, _ = process.communicate("go on\n", timeout=30)
        assert output in ("durable\n", "applied\n")
    assert elgate_daemon.stop() == 0, elgate_daemon.log_text()[-4000:]
    expected = b"first;" + b"".join(b"%06d;" % number for number in range(RECORDS))
    assert path.read_bytes() == expected
    if victims != "application":
        assert elgate_daemon.events("log_replayed"), elgate_daemon.log_text()[-4000:]


@pytest.mark.elgate(
    routes=[
        {"name": f"r{number}", "match": {"path": "{route_dir}/" + f"r{number}/**"}, "flush": "none"}
        for number in range(40)
    ],
    wal={"checkpoint_interval": NEVER, "segment_size": "8MiB"},
)
def test_more_unsynced_routes_than_there_is_memory_for_are_synced_oldest_first(elgate_daemon: ChildDaemon) -> None:
    for number in range(40):
        (elgate_daemon.route_dir / f"r{number}").mkdir()
    run(
        elgate_daemon,
        """
acks = []
for number in range(40):
    path = f"{directory}/r{number}/log"
    registered(path)
    acks.append(elgate.append(path, b"record;"))
    acks[-1].wait("applied", timeout=30)
levels = [ack.level for ack in acks]
# 32 pieces of memory (engine/tails.zig).
assert levels == ["applied"] * 8 + ["logged"] * 32, levels
# One route's own memory is 2 MiB.
for _ in range(30):
    last = elgate.append(directory + "/r39/log", b"x" * 100_000)
last.wait("applied", timeout=30)
assert acks[39].level == "applied" and acks[38].level == "logged"
""",
    )
