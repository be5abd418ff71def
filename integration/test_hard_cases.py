"""Each test here is one way to lose, double or misplace an acknowledged byte, or to hang, that was open once."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from formats import ENUMERATIONS, state_word
from programs import cursor_of
from rawclient import SLOTS, RawClient

from elgate.daemon.child import ChildDaemon

LIMIT_S = 15.0


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not so after {limit_s:g} s"
        time.sleep(0.002)


# The robust mutex of a row is on this thread's list: its memory must outlive the test.
KEPT: list[RawClient] = []


def raw_client(daemon: ChildDaemon, name: str) -> RawClient:
    client = RawClient(daemon.socket)
    KEPT.append(client)
    client.hello()
    client.attach()
    client.register(daemon.route_dir / name)
    return client


def program(daemon: ChildDaemon, text: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, sys, threading\nimport elgate\nassert elgate.patch_all()\n" + text,
            *arguments,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**daemon.env(), "ELGATE_FALLBACK": "wait"},
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def say(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(word + "\n")
    process.stdin.flush()


# ---- a thread that attaches by a row left over from before a restart ---------------------------------------------

THREAD_PER_WRITE = """
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
def in_a_thread(line):
    def body():
        os.write(fd, line)
        os.fsync(fd)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
in_a_thread(b"first\\n")
print("ready", flush=True)
sys.stdin.readline()
in_a_thread(b"second\\n")
print("acknowledged", flush=True)
sys.stdin.readline()
"""


def test_a_new_thread_after_a_restart_writes_under_no_stale_lease(elgate_daemon: ChildDaemon) -> None:
    path = elgate_daemon.route_dir / "threads.log"
    application = program(elgate_daemon, THREAD_PER_WRITE, str(path))
    assert said(application) == "ready"
    elgate_daemon.kill()
    elgate_daemon.start()
    say(application, "go on")
    assert said(application) == "acknowledged"
    assert not elgate_daemon.events("slot_damaged"), elgate_daemon.events("slot_damaged")
    assert path.read_bytes() == b"first\nsecond\n"
    application.kill()
    application.wait()


# ---- a target that refuses ----------------------------------------------------------------------------------------

MIB = 1 << 20
FAR = 32 * MIB


def limit_file_size(daemon: ChildDaemon, size_bytes: int) -> None:
    """From here on the daemon's writes beyond this fail with EFBIG: a disk that is full, at will."""
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))


WRITE_FAR_AND_CLOSE = f"""
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT, 0o644)
os.pwrite(fd, b"near", 0)
os.fsync(fd)
print("near", flush=True)
sys.stdin.readline()
os.pwrite(fd, b"far", {FAR})
for _ in range(3):
    try:
        os.fsync(fd)
    except OSError:
        pass
try:
    os.close(fd)
except OSError:
    pass
print("closed", flush=True)
sys.stdin.readline()
"""


@pytest.mark.elgate(wal={"checkpoint_interval": "100ms"})
def test_what_a_target_refused_is_applied_after_a_restart_though_its_file_was_closed(
    elgate_daemon: ChildDaemon,
) -> None:
    daemon = elgate_daemon
    path = daemon.route_dir / "refused"
    application = program(daemon, WRITE_FAR_AND_CLOSE, str(path))
    assert said(application) == "near"
    limit_file_size(daemon, 16 * MIB)
    say(application, "go on")
    assert said(application) == "closed"
    application.kill()
    application.wait()
    daemon.wait_for_event("target_refused")
    time.sleep(1.0)  # ten checkpoint intervals: for what must not happen there is no condition to wait for
    daemon.kill()
    daemon.start()
    assert not daemon.events("records_quarantined"), daemon.events("records_quarantined")
    assert path.read_bytes()[FAR:] == b"far"


FILL_MANY = f"""
for number in range(20):
    fd = os.open(f"{{sys.argv[1]}}/full-{{number}}", os.O_WRONLY | os.O_CREAT, 0o644)
    os.pwrite(fd, b"far", {FAR})
    try:
        os.fsync(fd)
    except OSError:
        pass
print("full", flush=True)
fd = os.open(f"{{sys.argv[1]}}/healthy", os.O_WRONLY | os.O_CREAT, 0o644)
os.write(fd, b"healthy")
os.fsync(fd)
print("healthy", flush=True)
sys.stdin.readline()
"""


def test_files_on_a_full_disk_do_not_hold_up_others(elgate_daemon: ChildDaemon) -> None:
    limit_file_size(elgate_daemon, 16 * MIB)
    application = program(elgate_daemon, FILL_MANY, str(elgate_daemon.route_dir))
    try:
        got: list[str] = []
        threading.Thread(target=lambda: [got.append(said(application)) for _ in range(2)], daemon=True).start()
        wait_until(lambda: got == ["full", "healthy"], f"others go on ({got})", 6)
    finally:
        application.kill()


APPEND_ON_DEMAND = """
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
for line in sys.stdin:
    word = line.strip()
    if word == "sync":
        os.fsync(fd)
    elif word == "other":
        other = os.open(sys.argv[1] + "-other", os.O_WRONLY | os.O_CREAT, 0o644)
        os.write(other, b"x")
        os.fsync(other)
    elif word.startswith("!"):
        os.write(fd, word[1:].encode() + b"\\n")
    else:
        os.write(fd, word.encode() + b"\\n")
        os.fsync(fd)
    print("done", flush=True)
"""


@pytest.mark.elgate(wal={"checkpoint_interval": "10min"})
def test_an_append_does_not_take_the_place_of_what_a_replay_could_not_write(elgate_daemon: ChildDaemon) -> None:
    daemon = elgate_daemon
    small = daemon.route_dir / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)], check=True)
    try:
        path = small / "journal"
        application = program(daemon, APPEND_ON_DEMAND, str(path))
        say(application, "1" * 8000)
        assert said(application) == "done"
        daemon.kill()
        os.truncate(path, 0)  # the page cache is no evidence: as after a power cut
        with open(small / "filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass
        daemon.start()
        daemon.wait_for_event("replay_write_failed")
        (small / "filler").unlink()
        say(application, "two")
        answer = said(application)
        application.kill()
        application.wait()
        daemon.kill()
        daemon.start()
        found = path.read_bytes()
        daemon.kill()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
    assert found == b"1" * 8000 + b"\n" + (b"two\n" if answer == "done" else b""), found[:8]


# ---- a log that fails ---------------------------------------------------------------------------------------------


@pytest.mark.elgate(wal={"checkpoint_interval": "100ms"})
def test_no_checkpoint_covers_records_that_a_failed_commit_never_made_durable(elgate_daemon: ChildDaemon) -> None:
    daemon = elgate_daemon
    client = raw_client(daemon, "raw.log")
    path = daemon.route_dir / "raw.log"
    first = client.put(b"first\n")
    wait_until(lambda: client.applied() > first, "applied")
    limit_file_size(daemon, 4096)
    claims = [client.put(b"unlogged\n", commit=False) for _ in range(50)]
    for position in reversed(claims):
        client.set_word(position, "committed", 1)
    client.ring_doorbell()
    daemon.wait_for_event("log_failed")
    limit_file_size(daemon, resource.RLIM_INFINITY)
    daemon.wait_for_event("log_recovered")
    wait_until(lambda: cursor_of(daemon)[0] > 0, "a checkpoint")
    cursor = cursor_of(daemon)
    size_before = path.stat().st_size
    for number in range(20):
        position = client.put(b"acknowledged %d\n" % number)
        wait_until(lambda position=position: client.applied() > position, "applied")
    assert daemon.process is not None and daemon.process.poll() is None
    daemon.kill()
    whole = path.read_bytes()
    if cursor_of(daemon) == cursor:  # no checkpoint has synced them since
        os.truncate(path, size_before)  # the page cache is no evidence: as after a power cut
    daemon.start()
    assert path.read_bytes()[size_before:] == whole[size_before:]
    assert cursor[0] <= cursor[1], f"the cursor stands at LSN {cursor[0]}, durable are {cursor[1]}"


@pytest.mark.elgate(wal={"checkpoint_interval": "10min"})
def test_an_fsync_after_a_restart_knows_of_what_the_daemon_before_could_not_log(elgate_daemon: ChildDaemon) -> None:
    daemon = elgate_daemon
    path = daemon.route_dir / "journal"
    application = program(daemon, APPEND_ON_DEMAND, str(path))
    say(application, "one")
    assert said(application) == "done"
    limit_file_size(daemon, 4096)
    say(application, "!two")
    assert said(application) == "done"
    daemon.wait_for_event("log_failed")
    daemon.kill()
    daemon.start()
    say(application, "other")  # by which the program notices that it is another daemon
    assert said(application) == "done"
    say(application, "sync")
    answer = said(application)
    application.kill()
    application.wait()
    daemon.kill()
    os.truncate(path, len("one\n"))  # the page cache is no evidence: as after a power cut
    daemon.start()
    if answer == "done":  # the fsync has returned 0
        assert path.read_bytes() == b"one\ntwo\n"


FENCE_THAT_FAILS = """
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT, 0o644)
os.pwrite(fd, b"AAAA", 0)
os.fsync(fd)
print("routed", flush=True)
sys.stdin.readline()
try:
    os.pwrite(fd, b"L" * (2 << 20), 4096)
    print("written", flush=True)
except OSError as error:
    print("refused", error.errno, flush=True)
sys.stdin.readline()
os.pwrite(fd, b"BBBB", 0)
os.fsync(fd)
print("acknowledged", flush=True)
sys.stdin.readline()
"""


@pytest.mark.elgate(wal={"checkpoint_interval": "10min"})
def test_a_fence_that_was_not_logged_leaves_the_file_routed(elgate_daemon: ChildDaemon) -> None:
    daemon = elgate_daemon
    path = daemon.route_dir / "fenced"
    application = program(daemon, FENCE_THAT_FAILS, str(path))
    assert said(application) == "routed"
    limit_file_size(daemon, 4096)
    say(application, "go on")
    assert said(application).startswith("refused")
    limit_file_size(daemon, resource.RLIM_INFINITY)
    daemon.wait_for_event("log_recovered")
    say(application, "go on")
    assert said(application) == "acknowledged"
    application.kill()
    application.wait()
    assert path.read_bytes()[:4] == b"BBBB"
    daemon.kill()
    daemon.start()
    assert path.read_bytes()[:4] == b"BBBB"


HAMMER = """
import elgate
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT, 0o644)
count = 0
def write():
    global count
    count += 1
    os.pwrite(fd, b"%08d" % count, 0)
write()
print("routed", flush=True)
os.set_blocking(0, False)
while sys.stdin.readline() == "":
    write()
while not elgate.status()["native_bytes"]:
    write()
for _ in range(10):
    write()
print("%08d" % count, flush=True)
os.set_blocking(0, True)
sys.stdin.readline()
"""

MAPPER = """
import mmap
fd = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(fd, 8)
print("mapped", flush=True)
sys.stdin.readline()
"""

LATE_WRITER = """
import elgate
fd = os.open(sys.argv[1], os.O_WRONLY)
os.pwrite(fd, b"late", 0)
os.close(fd)
print(elgate.status()["native_bytes"], flush=True)
sys.stdin.readline()
"""


@pytest.mark.elgate(wal={"checkpoint_interval": "10min"})
@pytest.mark.parametrize("attempt", range(3))
def test_no_record_of_another_process_stands_behind_a_fence(elgate_daemon: ChildDaemon, attempt: int) -> None:
    """One process writes without a pause while another one maps the file: what it wrote before the mapping must not be
    replayed over what it wrote after."""
    daemon = elgate_daemon
    path = daemon.route_dir / f"mapped-{attempt}"
    hammer = program(daemon, HAMMER, str(path))
    assert said(hammer) == "routed"
    mapper = program(daemon, MAPPER, str(path))
    assert said(mapper) == "mapped"
    say(hammer, "stop")
    last = said(hammer)
    # As long as somebody has it open natively, it is native for whoever comes.
    late = program(daemon, LATE_WRITER, str(path))
    assert said(late) == "4"
    for application in (hammer, mapper, late):
        say(application, "end")
        assert application.wait(LIMIT_S) == 0
    assert path.read_bytes() == b"late" + last[4:].encode()
    daemon.kill()
    daemon.start()
    assert path.read_bytes() == b"late" + last[4:].encode()
    # And routed again, since nobody has it open any more.
    late = program(daemon, LATE_WRITER, str(path))
    assert said(late) == "0"
    say(late, "end")
    assert late.wait(LIMIT_S) == 0


GIVE_AWAY = """
import subprocess
file = open(sys.argv[1], "ab", 0)
child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
print("given away", flush=True)
for line in sys.stdin:
    child.stdin.write(line.encode())
    child.stdin.flush()
child.stdin.close()
child.wait()
"""

APPEND_AND_COUNT = """
import elgate
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
for number in range(100):
    os.write(fd, b"ours\\n")
print(elgate.status()["native_bytes"], flush=True)
sys.stdin.readline()
"""


def test_a_file_given_to_a_child_before_its_first_write_is_native_for_everybody(elgate_daemon: ChildDaemon) -> None:
    daemon = elgate_daemon
    path = daemon.route_dir / "given.log"
    giver = program(daemon, GIVE_AWAY, str(path))
    assert said(giver) == "given away"
    other = program(daemon, APPEND_AND_COUNT, str(path))
    assert said(other) == "5"  # and the rest goes by without asking
    say(giver, "theirs")
    wait_until(lambda: b"theirs" in path.read_bytes(), "the child writes")
    for application in (giver, other):
        assert application.stdin is not None
        application.stdin.close()
        assert application.wait(LIMIT_S) == 0
    assert path.read_bytes() == b"ours\n" * 100 + b"theirs\n"
    # Nobody has it open any more.
    wait_until(lambda: len(daemon.events("session_closed")) == 2, "both are gone")
    late = program(daemon, APPEND_AND_COUNT, str(path))
    assert said(late) == "0"
    say(late, "end")
    assert late.wait(LIMIT_S) == 0


# ---- the ring -----------------------------------------------------------------------------------------------------


def take_row_message(client: RawClient) -> None:
    """Wakes the worker, whatever becomes of the daemon."""
    try:
        client.ring_doorbell()
    except (OSError, AssertionError, StopIteration):
        pass


def test_appends_after_a_kill_do_not_take_the_place_of_one_that_has_its_offset(
    elgate_daemon_stopped: ChildDaemon, core_test_build: Path
) -> None:
    """An open claim is passed, the append behind it gets its offset, the daemon is killed before it logs it; then the
    owner of the open claim commits."""
    daemon = elgate_daemon_stopped
    daemon.start(environment={"ELGATE_CORE_LIBRARY": str(core_test_build), "ELGATE_KILL_AT": "collected:0"})
    client = raw_client(daemon, "raw.log")
    passed = client.put(b"passed\n", commit=False)
    behind = client.put(b"behind\n", commit=False)
    client.set_word(behind, "committed", 1)
    take_row_message(client)
    assert daemon.process is not None
    assert daemon.process.wait(20) == -9
    client.set_word(passed, "committed_passed", 1)
    daemon.start()
    wait_until(lambda: client.tail() > behind, "both are taken")
    assert daemon.stop() == 0
    found = (daemon.route_dir / "raw.log").read_bytes()
    assert sorted(found.split(b"\n")[:-1]) == [b"behind", b"passed"], found


def test_a_passed_claim_after_a_barrier_moves_no_position_back(
    elgate_daemon_stopped: ChildDaemon, core_test_build: Path
) -> None:
    daemon = elgate_daemon_stopped
    daemon.start(environment={"ELGATE_CORE_LIBRARY": str(core_test_build)})
    client = raw_client(daemon, "raw.log")
    first = client.put(b"first\n")
    wait_until(lambda: client.applied() > first, "applied")
    passed = client.put(b"passed\n", commit=False)
    barrier = client.put(b"", operation=ENUMERATIONS["SlotHeader.operation"]["barrier"])
    wait_until(lambda: client.applied() > barrier, "the barrier is answered")
    client.set_word(passed, "committed_passed", 1)
    take_row_message(client)
    assert daemon.process is not None
    wait_until(lambda: client.tail() > barrier or daemon.process.poll() is not None, "it is taken")
    assert daemon.process.poll() is None, daemon.log_text()[-2000:]


WRITE_ONE = """
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT, 0o644)
os.write(fd, b"x")
os.fsync(fd)
print("done", flush=True)
sys.stdin.readline()
"""


@pytest.mark.elgate(
    routes=[
        {"name": "a", "match": {"path": "{route_dir}/a/**"}},
        {"name": "b", "match": {"path": "{route_dir}/b/**"}},
    ]
)
def test_one_stopped_producer_leaves_the_rest_of_the_ring_to_others(elgate_daemon: ChildDaemon) -> None:
    """A claim of the greatest length that stays open: three quarters of the ring are free."""
    for name in ("a", "b"):
        (elgate_daemon.route_dir / name).mkdir()
    application = program(elgate_daemon, APPEND_ON_DEMAND, str(elgate_daemon.route_dir / "b" / "other"))
    say(application, "one")
    assert said(application) == "done"
    client = raw_client(elgate_daemon, "a/raw.log")
    position = client.put(b"x")
    wait_until(lambda: client.applied() > position, "applied")
    wait_until(lambda: client.sole_route() == client.route, "route a has the ring to itself")
    client.put(bytes(1048512), commit=False)
    say(application, "two")
    got: list[str] = []
    threading.Thread(target=lambda: got.append(said(application)), daemon=True).start()
    try:
        wait_until(lambda: got == ["done"], "the other program goes on", 5)
    finally:
        application.kill()


ROUND_THE_RING = """
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
number = 0
while sys.stdin.readline():
    for _ in range(4096):
        os.write(fd, b"%07d\\n" % number)
        number += 1
        if number % 64 == 0:
            os.fsync(fd)
    print("done", flush=True)
"""


@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.elgate(wal={"checkpoint_interval": "10min"})
def test_others_go_round_and_round_past_a_claim_that_stays_open(elgate_daemon: ChildDaemon, kill: bool) -> None:
    daemon = elgate_daemon
    client = raw_client(daemon, "raw.log")
    positions = [client.put(b"stopped\n", commit=False), client.put(b"x" * 9000 + b"\n", commit=False)]
    path = daemon.route_dir / "other.log"
    other = program(daemon, ROUND_THE_RING, str(path))
    for turn in range(2):
        say(other, "go")
        assert said(other) == "done"
        if kill and turn == 0:
            daemon.kill()
            daemon.start()
    for position, span in zip(positions, (1, 3), strict=True):
        client.set_word(position, "committed_passed", span)
        wait_until(lambda at=position: client.lap(at) != at // SLOTS, "the slots are given back")
    say(other, "go")
    assert said(other) == "done"
    other.kill()
    other.wait()
    assert daemon.stop() == 0
    assert path.read_bytes() == b"".join(b"%07d\n" % number for number in range(3 * 4096))
    assert (daemon.route_dir / "raw.log").read_bytes() == b"stopped\n" + b"x" * 9000 + b"\n"
    counters = daemon.events("stopped")[-1]["counters"]
    assert counters.get("slots_damaged_total", 0) == 0
    if not kill:
        assert counters["spans_left_behind_total"] == 2


WRITE_WAIT_CLOSE = """
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT, 0o644)
os.write(fd, b"x")
os.fsync(fd)
print("written", flush=True)
sys.stdin.readline()
os.close(fd)
print("closed", flush=True)
sys.stdin.readline()
"""


@pytest.mark.elgate(wal={"checkpoint_interval": "100ms"})
def test_a_file_that_is_closed_after_its_checkpoint_is_let_go_of(elgate_daemon: ChildDaemon) -> None:
    path = elgate_daemon.route_dir / "idle"
    application = program(elgate_daemon, WRITE_WAIT_CLOSE, str(path))
    assert said(application) == "written"
    wait_until(lambda: cursor_of(elgate_daemon)[0] > 0, "a checkpoint")
    say(application, "close")
    assert said(application) == "closed"
    application.kill()
    wait_until(lambda: "user.elgate" not in os.listxattr(path), "the attribute is taken off", 5)


def test_a_file_opened_while_the_daemon_drains_waits_for_the_next_one(elgate_daemon: ChildDaemon) -> None:
    daemon = elgate_daemon
    client = raw_client(daemon, "raw.log")
    client.put(b"open\n", commit=False)
    client.put(b"behind\n")  # the open claim is passed now: the daemon drains until its limit
    application = program(
        daemon, "print('here', flush=True)\nsys.stdin.readline()\n" + WRITE_ONE, str(daemon.route_dir / "late")
    )
    assert said(application) == "here"
    assert daemon.process is not None
    daemon.process.terminate()
    daemon.wait_for_event("stopping")
    say(application, "go")
    with pytest.raises(subprocess.TimeoutExpired):
        application.wait(1)  # EIO ends it
    application.kill()


def test_a_damaged_record_does_not_hold_a_passed_barrier_for_ever(elgate_daemon: ChildDaemon) -> None:
    daemon = elgate_daemon
    client = raw_client(daemon, "raw.log")
    damaged = client.put(b"damaged\n", commit=False, payload_checksum=1)
    barrier = client.put(b"", commit=False, operation=ENUMERATIONS["SlotHeader.operation"]["barrier"])
    behind = client.put(b"behind\n")
    wait_until(lambda: client.applied() > behind, "the open claims are passed")
    words = b"".join(
        state_word("committed_passed", 1, client.row, position // SLOTS).to_bytes(8, "little")
        for position in (damaged, barrier)
    )
    client.ring[client.word_offset(damaged) : client.word_offset(damaged) + 16] = words
    wait_until(lambda: client.tail() > behind, "all slots are released", 3)


def test_a_route_that_a_reload_adds_works(elgate_daemon_stopped: ChildDaemon, core_test_build: Path) -> None:
    daemon = elgate_daemon_stopped
    daemon.start(environment={"ELGATE_CORE_LIBRARY": str(core_test_build)})
    new = daemon.directory / "new"
    new.mkdir()
    daemon.write_config(
        [
            {"name": "files", "match": {"path": f"{daemon.route_dir}/**"}},
            {"name": "added", "match": {"path": f"{new}/**"}},
        ]
    )
    daemon.reload()
    daemon.wait_for_event("routes_changed")
    application = program(daemon, WRITE_ONE, str(new / "file"))
    assert said(application) == "done"
    assert daemon.process is not None and daemon.process.poll() is None, daemon.log_text()[-3000:]
    application.kill()


@pytest.mark.parametrize("free", range(4))
def test_a_daemon_without_descriptors_says_so(elgate_daemon: ChildDaemon, free: int) -> None:
    """Whatever it was doing when it found none: a file is refused with the limit as the reason."""
    daemon = elgate_daemon
    child = program(
        daemon,
        """
print("ready", flush=True)
for number in range(2):
    sys.stdin.readline()
    fd = os.open(f"{sys.argv[1]}/file-{number}", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"x")
    print(elgate.status()["native_fallbacks"], flush=True)
""",
        str(daemon.route_dir),
    )
    assert said(child) == "ready"
    used = {int(name) for name in os.listdir(f"/proc/{daemon.pid}/fd")}
    limit = max(n for n in range(len(used) + free + 2) if n - len([fd for fd in used if fd < n]) == free)
    soft, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (limit, hard))
    say(child, "go on")
    assert said(child) == ("1" if free < 3 else "0")
    # A connection that cannot be accepted is hung up on, and keeps nothing busy.
    if free == 0:
        late = RawClient(daemon.socket)
        assert late.receive() == ("", b"")
        refused_at = daemon.wait_for_event("descriptors_exhausted", count=2)
        assert "RLIMIT_NOFILE" in refused_at["hint"]
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (soft, hard))
    say(child, "go on")
    assert said(child) == ("1" if free < 3 else "0")
    child.communicate(timeout=LIMIT_S)
    if 0 < free < 3:
        (event,) = daemon.events("file_stays_native")
        assert (event["reason"], event["errno"]) == ("limit_reached", 24)
        assert "RLIMIT_NOFILE" in event["hint"]


@pytest.mark.skipif(os.geteuid() != 0, reason="an immutable file needs root")
def test_a_file_that_cannot_be_marked_is_refused_for_what_it_is(elgate_daemon: ChildDaemon) -> None:
    path = elgate_daemon.route_dir / "file"
    path.write_bytes(b"")
    client = RawClient(elgate_daemon.socket)
    client.hello()
    descriptor = os.open(path, os.O_WRONLY)
    try:
        subprocess.run(["chattr", "+i", path], check=True)
        client.send(client.message("RegisterFile", "register_file"), descriptor)
        assert client.refusal() == "cannot_reopen"
    finally:
        subprocess.run(["chattr", "-i", path], check=True)
        os.close(descriptor)


def test_a_daemon_that_drains_is_not_asked_again_and_again(elgate_daemon: ChildDaemon) -> None:
    """It drains for as long as its log takes nothing; a client that waits for the next daemon keeps its session."""
    daemon = elgate_daemon
    holder = raw_client(daemon, "held")
    first = holder.put(b"x")
    wait_until(lambda: holder.applied() > first, "applied")
    limit_file_size(daemon, 4096)
    holder.put(b"y")
    daemon.wait_for_event("log_failed")
    child = program(
        daemon,
        """
print("ready", flush=True)
sys.stdin.readline()
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.write(fd, b"x")
os.fsync(fd)
print("written", elgate.status()["native_fallbacks"], flush=True)
""",
        str(daemon.route_dir / "file"),
    )
    assert said(child) == "ready"
    daemon.process.terminate()
    daemon.wait_for_event("stopping")
    opened = len(daemon.events("session_opened"))
    asked = time.monotonic()
    say(child, "go on")
    # That nothing happens takes a while to be seen: it was fifty times a second.
    while time.monotonic() < asked + 0.7:
        assert daemon.process.poll() is None
        assert len(daemon.events("session_opened")) == opened
    assert daemon.events("file_stays_native") == []
    daemon.kill()
    daemon.start()
    assert said(child) == "written 0"
    child.communicate(timeout=LIMIT_S)
