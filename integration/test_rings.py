"""Rings beside the shared one: other users', each client's own, and those that come back from clients whose daemon has
lost them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rawclient import RawClient

from elgate.daemon.child import ChildDaemon

LIMIT_S = 20.0
NOBODY = 65534

PER_CLIENT = pytest.mark.elgate(ring={"isolation": "per_client"})


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not so after {LIMIT_S:g} s"
        time.sleep(0.002)


PRELUDE = """
import os, sys
import elgate
assert elgate.patch_all()
def say(*words): print(*words, flush=True)
def hear(): return sys.stdin.readline().strip()
"""


class Program:
    """A program that talks with the test by lines."""

    def __init__(self, daemon: ChildDaemon, text: str, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + text, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**daemon.env(), "ELGATE_FALLBACK": "wait"},
        )

    def heard(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, word: str = "go on") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def ends(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(LIMIT_S) == 0


def as_nobody(daemon: ChildDaemon, function: Callable[[], None]) -> int:
    """Forks a process of another user, which runs `function` through Elgate; its pid."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update({**daemon.env(), "ELGATE_FALLBACK": "fail"})
        import elgate
        from elgate import _patch  # noqa: F401 (what it imports may be where that user cannot read)

        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        assert elgate.patch_all()
        function()
        elgate.unpatch_all()
        code = 0
    finally:
        os._exit(code)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user as well")
@pytest.mark.elgate(control={"mode": "0666"})
def test_another_user_has_a_ring_of_its_own(elgate_daemon: ChildDaemon) -> None:
    daemon = elgate_daemon
    for directory in (daemon.socket.parent, daemon.directory, daemon.route_dir):
        directory.chmod(0o755)
    shared = daemon.route_dir / "shared"
    shared.touch()
    shared.chmod(0o666)
    theirs = daemon.route_dir / "theirs"
    theirs.mkdir()
    os.chown(theirs, NOBODY, NOBODY)

    def write() -> None:
        with open(shared, "a") as file, open(theirs / "log", "w") as own:
            for number in range(500):
                file.write(f"nobody {number}\n")
                own.write(f"{number}\n")
                file.flush()
                own.flush()
                os.fsync(own.fileno())

    child = as_nobody(daemon, write)
    ours = Program(
        daemon,
        """
with open(sys.argv[1], "a") as file:
    for number in range(500):
        file.write(f"root {number}\\n")
        file.flush()
        if number % 10 == 0:
            os.fsync(file.fileno())
say("done")
""",
        shared,
    )
    assert ours.heard() == "done"
    ours.ends()
    assert os.waitpid(child, 0)[1] == 0
    lines = shared.read_text().splitlines()
    for who in ("nobody", "root"):
        assert [line for line in lines if line.startswith(who)] == [f"{who} {number}" for number in range(500)]
    assert len(lines) == 1000
    assert (theirs / "log").read_text() == "".join(f"{number}\n" for number in range(500))
    opened = daemon.events("ring_opened")
    assert [event["uid"] for event in opened] == [NOBODY]
    assert {(event["uid"], event["ring"]) for event in daemon.events("session_opened")} == {(0, 0), (NOBODY, 1)}
    daemon.wait_for_event("ring_closed")
    daemon.kill()
    daemon.start()
    assert shared.read_text().splitlines() == lines


@PER_CLIENT
def test_each_client_has_a_ring_of_its_own_and_gives_it_back(elgate_daemon: ChildDaemon) -> None:
    """More clients, one after the other, than there can be rings; half of them are killed."""
    daemon = elgate_daemon
    text = """
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
for number in range(20):
    os.write(fd, b"%s %d\\n" % (sys.argv[2].encode(), number))
say("written")
hear()
"""
    path = daemon.route_dir / "log"
    count = 140
    for first in range(0, count, 7):
        clients = [Program(daemon, text, path, number) for number in range(first, first + 7)]
        for number, client in enumerate(clients):
            assert client.heard() == "written"
            if number % 2:
                client.process.kill()
                client.process.wait()
            else:
                client.ends()
    daemon.wait_for_event("ring_closed", count=count)
    assert len(daemon.events("ring_opened")) == count
    lines = path.read_text().splitlines()
    assert sorted(lines) == sorted(f"{client} {number}" for client in range(count) for number in range(20))
    for client in range(count):
        own = [line for line in lines if line.startswith(f"{client} ")]
        assert own == [f"{client} {number}" for number in range(20)]


@PER_CLIENT
def test_claims_that_are_open_when_their_client_goes_keep_no_ring(elgate_daemon: ChildDaemon) -> None:
    """Of threads that live on; more of them than there can be rings."""
    daemon, count = elgate_daemon, 140
    for number in range(count):
        with RawClient(daemon.socket) as client:
            client.hello()
            client.attach(falsely=number % 2 == 0)
            client.register(daemon.route_dir / "log")
            client.put(b"open", commit=False)
            client.put(b"%d\n" % number)
    daemon.wait_for_event("ring_closed", count=count)
    written = (daemon.route_dir / "log").read_text().split()
    assert sorted(written, key=int) == [str(number) for number in range(count)]


@PER_CLIENT
def test_more_clients_than_rings_are_told_and_go_on_by_their_policy(elgate_daemon: ChildDaemon) -> None:
    daemon = elgate_daemon
    others = [RawClient(daemon.socket) for _ in range(126)]  # and the shared one
    for other in others:
        other.hello()
    text = """
import os, sys, elgate
elgate.patch_all()
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.write(fd, b"written")
print(elgate.status()["routed_operations"])
"""

    def run(fallback: str) -> subprocess.CompletedProcess[str]:
        environment = {**daemon.env(), "ELGATE_FALLBACK": fallback, "ELGATE_RECONNECT_TIMEOUT_MS": "100"}
        command = [sys.executable, "-c", text, str(daemon.route_dir / fallback)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)

    native = run("passthrough")
    assert (native.returncode, native.stdout) == (0, "0\n")
    assert "as many rings as it can" in native.stderr and "goes on without Elgate" in native.stderr
    assert (daemon.route_dir / "passthrough").read_bytes() == b"written"
    for fallback in ("fail", "wait"):
        assert run(fallback).returncode == 1
        assert not (daemon.route_dir / fallback).exists()
    assert "127 rings" in daemon.wait_for_event("ring_refused")["reason"]
    others.pop().close()
    daemon.wait_for_event("ring_closed")
    served = run("fail")
    assert (served.returncode, served.stdout) == (0, "1\n"), served.stderr
    for other in others:
        other.close()


@PER_CLIENT
def test_fsync_covers_what_others_wrote_in_their_rings(elgate_daemon: ChildDaemon) -> None:
    daemon = elgate_daemon
    path = daemon.route_dir / "log"
    writers = [
        Program(
            daemon,
            """
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT, 0o644)
place = int(sys.argv[2]) * 8
say("ready")
for number in range(1, 301):
    hear()
    os.pwrite(fd, b"%08d" % number, place)
    say("written")
""",
            path,
            place,
        )
        for place in (1, 2)
    ]
    for writer in writers:
        assert writer.heard() == "ready"
    syncer = Program(
        daemon,
        """
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT, 0o644)
os.pwrite(fd, b"0" * 8, 0)
say("ready")
while hear():
    os.fsync(fd)
    say("synced")
""",
        path,
    )
    assert syncer.heard() == "ready"
    descriptor = os.open(path, os.O_RDONLY)
    for number in range(1, 301):
        for writer in writers:
            writer.tell()
        for writer in writers:
            assert writer.heard() == "written"
        syncer.tell()
        assert syncer.heard() == "synced"
        # As another process sees it: visible, so logged durably before.
        assert os.pread(descriptor, 16, 8) == b"%08d" % number * 2
    os.close(descriptor)
    for program in (*writers, syncer):
        program.ends()


APPENDER = """
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
number = 0
def append(count):
    global number
    for _ in range(count):
        os.write(fd, b"%d\\n" % number)
        number += 1
append(10)
os.fsync(fd)
say("synced")
hear()
append(200)
say("accepted")
hear()
os.fsync(fd)
append(10)
os.fsync(fd)
say("synced")
hear()
"""


def numbers(count: int) -> str:
    return "".join(f"{number}\n" for number in range(count))


@pytest.mark.parametrize("case", [pytest.param("per_client", marks=PER_CLIENT), "shm_cleared"])
def test_what_was_accepted_while_no_daemon_had_the_ring_is_done_by_the_next(
    elgate_daemon: ChildDaemon, case: str
) -> None:
    daemon = elgate_daemon
    paths = [daemon.route_dir / f"log-{number}" for number in range(2)]
    clients = [Program(daemon, APPENDER, path) for path in paths]
    for client in clients:
        assert client.heard() == "synced"
    daemon.kill()
    for client in clients:
        client.tell()
    for client in clients:
        assert client.heard() == "accepted"
    if case == "shm_cleared":
        daemon.ring_path.unlink()
    # One of them is stopped meanwhile, and comes later.
    clients[1].process.send_signal(signal.SIGSTOP)
    daemon.start()
    clients[0].tell()
    assert clients[0].heard() == "synced"
    assert paths[0].read_text() == numbers(220)
    clients[1].process.send_signal(signal.SIGCONT)
    clients[1].tell()
    assert clients[1].heard() == "synced"
    assert paths[1].read_text() == numbers(220)
    for client in clients:
        client.ends()
    assert daemon.stop() == 0
    assert daemon.events("stopped")[-1]["counters"]["rings_adopted_total"] == (2 if case == "per_client" else 1)
    assert not daemon.events("ring_not_taken_back")
    assert not daemon.events("records_quarantined")


LATE = """
path = sys.argv[1]
fds = [os.open(f"{path}-{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) for number in range(3)]
def append(text):
    for fd in fds:
        os.write(fd, text)
append(b"one,")
for fd in fds: os.fsync(fd)
say("synced")
hear()
append(b"two,")
say("accepted")
hear()
%s
hear()
"""
LATE_WAYS = {
    "goes on": "append(b'three,'); [os.fsync(fd) for fd in fds]; say('synced')",
    "syncs": "[os.fsync(fd) for fd in fds]; append(b'three,'); [os.fsync(fd) for fd in fds]; say('synced')",
    "closes": "[os.close(fd) for fd in fds]; say('closed')",
    # It wants more than there is room for, in one of them, before it says a word of the others.
    "floods": "[os.write(fds[2], b'x' * 4000) for _ in range(3000)]; os.fsync(fds[2]); say('synced')",
    "ends": "say('ends'); sys.exit()",
}


@pytest.mark.elgate(ring={"isolation": "per_client"}, wal={"checkpoint_interval": "100ms"})
@pytest.mark.parametrize("how", LATE_WAYS)
@pytest.mark.parametrize("lives", [1, 2])
def test_a_ring_that_comes_back_when_its_files_are_let_go_of_is_finished(
    elgate_daemon: ChildDaemon, how: str, lives: int
) -> None:
    daemon = elgate_daemon
    path = daemon.route_dir / "log"
    paths = [Path(f"{path}-{number}") for number in range(3)]
    client = Program(daemon, LATE % LATE_WAYS[how], path)
    assert client.heard() == "synced"
    daemon.kill()
    client.tell()
    assert client.heard() == "accepted"
    for _ in range(lives):
        if daemon.process is not None and daemon.process.poll() is None:
            assert daemon.stop() == 0
        daemon.start()
        wait_until(lambda: not any("user.elgate" in os.listxattr(each) for each in paths), "they are let go of")
    client.tell()
    assert client.heard() in ("synced", "closed", "ends")
    expected = {"goes on": b"one,two,three,", "syncs": b"one,two,three,"}.get(how, b"one,two,")
    if how == "ends":
        assert client.process.wait(LIMIT_S) == 0
    for each in paths[:2] if how == "floods" else paths:
        if how == "floods":
            wait_until(lambda each=each: each.read_bytes() == expected, "the others are finished too")
        assert each.read_bytes() == expected
    if how == "floods":
        assert paths[2].read_bytes() == b"one,two," + b"x" * 12_000_000
    client.process.kill()
    client.process.wait()
    assert not daemon.events("records_quarantined")
    assert daemon.stop() == 0
    daemon.start()
    for each in paths[:2]:
        assert each.read_bytes() == expected


@PER_CLIENT
def test_what_is_for_descriptors_that_are_gone_is_kept_in_the_quarantine(elgate_daemon: ChildDaemon) -> None:
    daemon = elgate_daemon
    path = daemon.route_dir / "log"
    behind_its_back = """
import ctypes
for fd in fds: ctypes.CDLL(None).close(fd)
fd = os.open(path + "-other", os.O_WRONLY | os.O_CREAT)
os.write(fd, b"x")
os.fsync(fd)
say("synced")
"""
    client = Program(daemon, LATE % behind_its_back, path)
    assert client.heard() == "synced"
    daemon.kill()
    client.tell()
    assert client.heard() == "accepted"
    daemon.start()
    wait_until(lambda: "user.elgate" not in os.listxattr(f"{path}-2"), "they are let go of")
    client.tell()
    assert client.heard() == "synced"
    assert Path(f"{path}-other").read_bytes() == b"x"
    assert not daemon.events("records_quarantined")
    client.ends()
    daemon.wait_for_event("ring_closed")
    assert len(daemon.events("records_quarantined")) == 3
    (kept,) = {event["kept_in"].rpartition("/")[0] for event in daemon.events("records_quarantined")}
    assert sum(file.read_bytes().endswith(b"two,") for file in Path(kept).iterdir()) == 3
    assert daemon.stop() == 0


@PER_CLIENT
@pytest.mark.parametrize("step", ["collected", "applying", "committed", "published", "released"])
def test_a_kill_at_a_step_doubles_nothing_in_a_ring_that_is_handed_back(
    elgate_daemon_stopped: ChildDaemon, core_test_build: Path, step: str
) -> None:
    daemon = elgate_daemon_stopped
    environment = {"ELGATE_CORE_LIBRARY": str(core_test_build), "ELGATE_KILL_AT": f"{step}:20"}
    daemon.start(environment=environment)
    path = daemon.route_dir / "log"
    client = Program(
        daemon,
        """
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
for number in range(400):
    os.write(fd, b"%d\\n" % number)
    if number % 4 == 3:
        os.fsync(fd)
say("synced")
hear()
""",
        path,
    )
    assert daemon.process is not None
    assert daemon.process.wait(LIMIT_S) == -signal.SIGKILL
    daemon.start()
    assert client.heard() == "synced"
    client.ends()
    assert path.read_text() == numbers(400)
    assert daemon.stop() == 0
    assert daemon.events("stopped")[-1]["counters"]["rings_adopted_total"] == 1


@pytest.mark.parametrize("length", [0, 4096, 200_000])
def test_a_client_that_cuts_the_ring_short_does_not_take_the_daemon_down(
    elgate_daemon: ChildDaemon, length: int
) -> None:
    daemon = elgate_daemon
    text = """
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
os.write(fd, b"before\\n")
os.fsync(fd)
say("synced")
hear()
"""
    before = Program(daemon, text, daemon.route_dir / "before")
    assert before.heard() == "synced"
    os.truncate(daemon.ring_path, length)
    # The worker looks at its ring ten times a second.
    daemon.wait_for_event("ring_lost")
    after = Program(daemon, text, daemon.route_dir / "after")
    assert after.heard() == "synced"
    after.ends()
    before.process.kill()
    before.process.wait()
    for name in ("before", "after"):
        assert (daemon.route_dir / name).read_text() == "before\n"
    assert daemon.ring_path.stat().st_size > length
    assert daemon.stop() == 0
    daemon.start()
    again = Program(daemon, text, daemon.route_dir / "after")
    assert again.heard() == "synced"
    again.ends()
    assert (daemon.route_dir / "after").read_text() == "before\nbefore\n"
