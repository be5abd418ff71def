"""Programs that do not go through Elgate, on files that are routed at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import LIMIT_S

from elgate.daemon.child import ChildDaemon

LINES = 3000

# Appends its lines as fast as it can, once it is told to, a sync now and then; without a number of lines, until it is
# told to end.
APPENDER = """
import itertools, os, select, sys
path, name, lines, sync_every = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
os.write(fd, b"%s open\\n" % name.encode())
print("ready", flush=True)
sys.stdin.readline()
for number in range(lines) if lines else itertools.count():
    if not lines and number % 50 == 0 and select.select([sys.stdin], [], [], 0)[0]:
        break
    os.write(fd, b"%s %06d %s\\n" % (name.encode(), number, b"x" * (number % 90)))
    if sync_every and number % sync_every == 0:
        os.fsync(fd)
os.fsync(fd)
os.close(fd)
print("done", number + (lines > 0), flush=True)
sys.stdin.readline()
"""


def appender(
    path: Path, name: str, env: dict[str, str], *, hooked: bool, sync_every: int, lines: int = LINES
) -> subprocess.Popen[str]:
    source = ("import elgate\nassert elgate.patch_all()\n" if hooked else "") + APPENDER
    arguments = [str(path), name, str(lines), str(sync_every)]
    process = subprocess.Popen(
        [sys.executable, "-c", source, *arguments], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def go(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


def end(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.communicate("end\n", timeout=LIMIT_S)
        assert process.returncode == 0


def stop(*processes: subprocess.Popen[str]) -> list[int]:
    """Of those that go on until they are told to end: how many lines each has written."""
    go(*processes)
    counts = []
    for process in processes:
        assert process.stdout is not None
        counts.append(int(process.stdout.readline().removeprefix("done ")))
    end(*processes)
    return counts


def lines_of(name: str, lines: int = LINES) -> list[bytes]:
    return [b"%s open" % name.encode()] + [
        b"%s %06d %s" % (name.encode(), number, b"x" * (number % 90)) for number in range(lines)
    ]


ENGINES = [pytest.param(name, marks=pytest.mark.elgate(disk={"engine": name})) for name in ("threads", "io_uring")]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sync_every", [0, 7], ids=["unsynced", "synced"])
def test_appenders_beside_elgate_lose_nothing_and_take_nothing(
    sync_every: int, engine: str, elgate_daemon: ChildDaemon
) -> None:
    daemon = elgate_daemon
    path = daemon.route_dir / "shared.log"
    processes = [
        appender(path, "ours", daemon.env(), hooked=True, sync_every=sync_every),
        appender(path, "also", daemon.env(), hooked=True, sync_every=sync_every),
        appender(path, "theirs", dict(os.environ), hooked=False, sync_every=0),
    ]
    go(*processes)
    end(*processes)
    found = path.read_bytes().splitlines()
    for name in ("ours", "also", "theirs"):
        assert [line for line in found if line.startswith(name.encode() + b" ")] == lines_of(name)
    assert len(found) == 3 * (LINES + 1)


def test_a_killed_daemon_replays_nothing_over_what_others_have_appended(elgate_daemon: ChildDaemon) -> None:
    path = elgate_daemon.route_dir / "shared.log"
    processes = [
        appender(path, "ours", elgate_daemon.env(), hooked=True, sync_every=7, lines=0),
        appender(path, "theirs", dict(os.environ), hooked=False, sync_every=0, lines=0),
    ]
    go(*processes)
    elgate_daemon.wait_for_event("foreign_append")
    elgate_daemon.wait_for_event("file_went_native")
    elgate_daemon.kill()
    elgate_daemon.start()
    counts = stop(*processes)
    found = path.read_bytes().splitlines()
    for name, count in zip(("ours", "theirs"), counts, strict=True):
        assert [line for line in found if line.startswith(name.encode() + b" ")] == lines_of(name, count)
    assert len(found) == sum(counts) + 2


@pytest.mark.parametrize("kill", [False, True], ids=["", "killed"])
def test_a_file_that_is_cut_while_it_is_appended_to_has_no_holes(kill: bool, elgate_daemon: ChildDaemon) -> None:
    """As logrotate does it with copytruncate."""
    path = elgate_daemon.route_dir / "rotated.log"
    ours = appender(path, "ours", elgate_daemon.env(), hooked=True, sync_every=50)
    go(ours)
    size = 0
    while size < 20_000:
        size = path.stat().st_size
    os.truncate(path, 0)
    assert ours.stdout is not None and ours.stdout.readline() == f"done {LINES}\n"
    if kill:
        elgate_daemon.kill()
        elgate_daemon.start()
    end(ours)
    found = path.read_bytes().splitlines()
    assert found == lines_of("ours")[-len(found) :], "not the end of what was written"
    print(f"cut at {size} bytes, {len(found)} lines behind")
