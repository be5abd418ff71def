"""Targets and logs on disks that fail. Each time: nothing acknowledged is lost, the daemon stays up, other routes go on,
errors are the right ones, and all is well again once the fault has ended, without a restart."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from disks import Ext4, StallingExt4, ThinExt4, Tmpfs, needs_root, thaw_all
from formats import LOG
from programs import Appender, Program, wait_until

from elgate.daemon.child import ChildDaemon

pytestmark = needs_root

MIB = 1 << 20
TWO_ROUTES = [
    {"name": "bad", "match": {"path": "{route_dir}/bad/**"}},
    {"name": "good", "match": {"path": "{route_dir}/good/**"}},
]
engines = pytest.mark.parametrize("engine", ["threads", "io_uring"])


def two_routes(**wal: object) -> pytest.MarkDecorator:
    return pytest.mark.elgate(routes=TWO_ROUTES, wal={"checkpoint_interval": "100ms", **wal})


def routes_with(on_full: str) -> list[dict[str, object]]:
    return [{**TWO_ROUTES[0], "on_full": on_full}, TWO_ROUTES[1]]


def both_policies(**wal: object) -> pytest.MarkDecorator:
    wal = {"checkpoint_interval": "100ms", **wal}
    marks = {policy: pytest.mark.elgate(routes=routes_with(policy), wal=wal) for policy in ("block", "error")}
    return pytest.mark.parametrize("on_full", [pytest.param(policy, marks=mark) for policy, mark in marks.items()])


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def appender(elgate_daemon_stopped: ChildDaemon, stack: ExitStack) -> Callable[[str], Appender]:
    """Programs that end before what they write to is unmounted."""

    def start(name: str) -> Appender:
        path = elgate_daemon_stopped.route_dir / name
        path.parent.mkdir(exist_ok=True)
        started = Appender(elgate_daemon_stopped, path)
        stack.callback(started.close)
        return started

    return start


@pytest.fixture(autouse=True)
def daemon_goes_first(elgate_daemon_stopped: ChildDaemon, stack: ExitStack) -> Iterator[None]:
    yield
    thaw_all()
    # Descriptors below what is mounted.
    if elgate_daemon_stopped.process is not None and elgate_daemon_stopped.process.poll() is None:
        elgate_daemon_stopped.kill()


def cursor_of(daemon: ChildDaemon, route: str) -> int:
    """The LSN up to which the route's checkpoint says that all is in its targets."""
    raw = (daemon.wal_dir / route / "checkpoint").read_bytes()
    layout = LOG["Checkpoint"]
    base = max((0, 4096), key=lambda at: layout.get(raw, at, "sequence"))
    return layout.get(raw, base, "applied_lsn")


def start(daemon: ChildDaemon, engine: str) -> None:
    daemon.config_path.write_text(daemon.config_path.read_text() + f"disk: {{engine: {engine}}}\n")
    daemon.start()


# ---- a target whose sync fails ------------------------------------------------------------------------------------


@two_routes()
@engines
@pytest.mark.parametrize("killed", [False, True])
def test_what_a_failed_sync_lost_is_written_again_from_the_log(
    elgate_daemon_stopped: ChildDaemon, stack: ExitStack, appender: Callable[[str], Appender], engine: str, killed: bool
) -> None:
    daemon = elgate_daemon_stopped
    disk = stack.enter_context(ThinExt4(daemon.directory, daemon.route_dir / "bad", 96 * MIB))
    start(daemon, engine)
    bad, good = appender("bad/file"), appender("good/file")
    assert bad.append("first") == 0
    disk.limit(4 * MIB)
    for letter in "abcdefghijklmnop":  # the page cache takes them all; the first sync does not
        bad.fill(letter)
    failed = daemon.wait_for_event("target_sync_failed")
    assert failed["errno"] in (errno.ENOSPC, errno.EIO)
    # At once, as long as it lasts; the other route, its checkpoints too, go on.
    assert bad.append("refused") == failed["errno"]
    assert bad.append("refused too") == failed["errno"]
    assert good.append("one") == 0
    before = cursor_of(daemon, "good")
    assert good.append("two") == 0
    wait_until(lambda: cursor_of(daemon, "good") > before, "the other route's checkpoints go on")
    if killed:
        daemon.kill()
        daemon.start()
        assert good.append("three") == 0
        # Whoever meets the full disk first: the replay, or the first sync behind it.
        wait_until(
            lambda: bool(daemon.events("replay_write_failed")) or len(daemon.events("target_sync_failed")) > 1,
            "the next daemon finds the disk full",
        )
    disk.unlimit()
    bad.append_when_possible("last")
    daemon.wait_for_event("target_recovered")
    before = cursor_of(daemon, "bad")
    assert bad.append("very last") == 0
    wait_until(lambda: cursor_of(daemon, "bad") > before, "its own checkpoints go on")
    assert daemon.process is not None and daemon.process.poll() is None
    bad.close()
    assert daemon.stop() == 0
    # What the page cache has is no evidence.
    disk.unmount()
    Ext4.mount(disk)
    found = bad.path.read_bytes()
    assert bad.missing(found) == [], (len(found), found[:8], [found[i << 19] for i in range(len(found) >> 19)])


@two_routes()
@engines
def test_pages_that_somebody_holds_are_not_taken_for_written(
    elgate_daemon_stopped: ChildDaemon, stack: ExitStack, appender: Callable[[str], Appender], engine: str
) -> None:
    daemon = elgate_daemon_stopped
    disk = stack.enter_context(ThinExt4(daemon.directory, daemon.route_dir / "bad", 96 * MIB))
    start(daemon, engine)
    bad = appender("bad/file")
    assert bad.append("first") == 0
    disk.limit(MIB)
    for letter in "abcdefgh":
        bad.fill(letter)
    daemon.wait_for_event("target_sync_failed")
    # What is mapped stays in the page cache, also where the disk has never had it.
    with open(bad.path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert all(mapped[page] for page in range(0, len(mapped), mmap.PAGESIZE))
        disk.unlimit()
        held = daemon.wait_for_event("target_pages_held")
        assert held["path"] == str(bad.path)
        assert bad.append("refused") != 0
        assert not daemon.events("target_recovered")
    daemon.wait_for_event("target_recovered")
    bad.append_when_possible("last")
    assert len(daemon.events("target_pages_held")) == 1
    bad.close()
    assert daemon.stop() == 0
    disk.unmount()
    Ext4.mount(disk)
    assert bad.missing(bad.path.read_bytes()) == []


# ---- a target that is full ----------------------------------------------------------------------------------------


def fill_the_target(full: Appender, daemon: ChildDaemon) -> None:
    """Until the file system of its file, which is small, takes no more."""
    for _ in range(32):
        if full.append("x" * 4000) != 0:
            break
    daemon.wait_for_event("target_refused")


@two_routes()
def test_a_full_file_that_is_removed_gives_its_space_back(
    elgate_daemon_stopped: ChildDaemon, stack: ExitStack, appender: Callable[[str], Appender]
) -> None:
    daemon = elgate_daemon_stopped
    disk = stack.enter_context(Tmpfs(daemon.route_dir / "bad", 64 << 10))
    daemon.start()
    full = appender("bad/full")
    fill_the_target(full, daemon)
    full.close()  # its handle is released when the daemon sees the hang-up
    full.path.unlink()
    assert daemon.wait_for_event("target_removed")["path"] == str(full.path)
    wait_until(lambda: os.statvfs(disk.mount_point).f_bfree > 8, "its space is free")
    before = cursor_of(daemon, "bad")
    after = appender("bad/after")
    assert after.append("y" * 4000) == 0
    wait_until(lambda: cursor_of(daemon, "bad") > before, "checkpoints go on")


CUTS = {
    "truncate": ("os.ftruncate(fd, 0)", b""),
    "by its path": ("os.truncate(path, 0)", b""),
    "partly": ("os.ftruncate(fd, 6)", b"first "),
    "opened": ("os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))", b""),
    "by pathlib": ("open(path, 'w').close()", b""),
}
FILL = """
while True:
    os.write(fd, b"x" * 4000)
    os.fsync(fd)
"""


@two_routes()
@engines
@pytest.mark.parametrize("killed", [False, True], ids=["", "killed"])
@pytest.mark.parametrize("cut", CUTS)
def test_a_truncate_makes_room_in_a_full_file(
    elgate_daemon_stopped: ChildDaemon, stack: ExitStack, cut: str, engine: str, killed: bool
) -> None:
    daemon = elgate_daemon_stopped
    disk = stack.enter_context(Tmpfs(daemon.route_dir / "bad", 64 << 10))
    start(daemon, engine)
    program = stack.enter_context(Program(daemon))
    how, left = CUTS[cut]
    path = disk.mount_point / "file"
    program.do(f"path = {str(path)!r}")
    program.do("fd, other = (os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) for _ in range(2))")
    program.do("os.write(fd, b'first line')")
    program.do("os.write(other, b'of the other')")
    assert program.errno_of(f"exec({FILL!r})") == errno.ENOSPC
    # More, none of which is told to the one that cuts.
    program.do("elgate.status()")
    if killed:
        daemon.kill()
        daemon.start()
        program.do("os.stat('/')")
    program.do(how)
    assert path.read_bytes() == left
    if killed:
        daemon.kill()
        daemon.start()
        assert path.read_bytes() == left
    # To the other it is told once, as its sticky error, and then all is well.
    if not killed:
        assert program.errno_of("os.write(other, b'refused')") == errno.ENOSPC
    program.do("os.write(other, b'other')")
    program.do("os.write(fd, b'more')")
    program.do("os.fsync(fd)")
    assert path.read_bytes() == left + b"othermore"
    program.do("os.close(fd); os.close(other)")
    wait_until(lambda: "user.elgate" not in os.listxattr(path), "it is let go of")
    assert path.read_bytes() == left + b"othermore"


@two_routes()
def test_an_error_that_nobody_was_told_of_outlives_a_truncate(
    elgate_daemon_stopped: ChildDaemon, stack: ExitStack
) -> None:
    daemon = elgate_daemon_stopped
    disk = stack.enter_context(Tmpfs(daemon.route_dir / "bad", 64 << 10))
    daemon.start()
    program = stack.enter_context(Program(daemon))
    program.do(f"path = {str(disk.mount_point / 'file')!r}")
    program.do("fd = os.open(path, os.O_WRONLY | os.O_CREAT)")
    program.do("os.write(fd, b'x' * 100_000)")
    daemon.wait_for_event("target_refused")
    program.do("os.ftruncate(fd, 5)")
    assert (disk.mount_point / "file").read_bytes() == b"x" * 5
    daemon.wait_for_event("target_recovered")
    assert program.errno_of("os.fsync(fd)") == errno.ENOSPC
    program.do("os.fsync(fd)")
    # What grows it again needs no room either.
    program.do("os.ftruncate(fd, 1_000_000)")
    program.do("os.close(fd)")
    assert (disk.mount_point / "file").read_bytes() == b"x" * 5 + bytes(999_995)


@two_routes()
def test_a_truncate_that_leaves_more_than_there_is_room_for_is_refused(
    elgate_daemon_stopped: ChildDaemon, stack: ExitStack
) -> None:
    daemon = elgate_daemon_stopped
    disk = stack.enter_context(Tmpfs(daemon.route_dir / "bad", 64 << 10))
    daemon.start()
    program = stack.enter_context(Program(daemon))
    path = disk.mount_point / "file"
    program.do(f"fd = os.open({str(path)!r}, os.O_WRONLY | os.O_CREAT)")
    program.do("os.write(fd, b'x' * 200_000)")
    daemon.wait_for_event("target_refused")
    assert program.errno_of("os.ftruncate(fd, 150_000)") == errno.ENOSPC
    program.do("os.ftruncate(fd, 10_000)")
    program.do("os.pwrite(fd, b'y', 20_000)")
    program.do("os.fsync(fd)")
    assert path.read_bytes() == b"x" * 10_000 + bytes(10_000) + b"y"


@two_routes()
@pytest.mark.parametrize("how", ["os.unlink(path)", "os.replace(path + '.new', path)"])
def test_a_full_file_can_be_removed_whatever_is_pending(
    elgate_daemon_stopped: ChildDaemon, stack: ExitStack, how: str
) -> None:
    daemon = elgate_daemon_stopped
    disk = stack.enter_context(Tmpfs(daemon.route_dir / "bad", 64 << 10))
    daemon.start()
    program = stack.enter_context(Program(daemon))
    path = disk.mount_point / "file"
    program.do(f"path = {str(path)!r}")
    program.do("os.close(os.open(path + '.new', os.O_WRONLY | os.O_CREAT))")
    program.do("fd = os.open(path, os.O_WRONLY | os.O_CREAT)")
    program.do("os.write(fd, b'x' * 100_000)")
    daemon.wait_for_event("target_refused")
    program.do(how)
    assert not path.exists() or path.read_bytes() == b""
    assert program.errno_of("os.close(fd)") == errno.ENOSPC
    daemon.wait_for_event("target_removed")
    wait_until(lambda: os.statvfs(disk.mount_point).f_bfree > 8, "its space is free")


# ---- a target whose sync hangs ------------------------------------------------------------------------------------


@two_routes(checkpoint_interval="10min")
@engines
def test_a_fence_on_a_disk_that_hangs_holds_up_nobody_else(
    elgate_daemon_stopped: ChildDaemon, stack: ExitStack, appender: Callable[[str], Appender], engine: str
) -> None:
    daemon = elgate_daemon_stopped
    disk = stack.enter_context(StallingExt4(daemon.directory, daemon.route_dir / "bad", 64 * MIB))
    start(daemon, engine)
    bad, good = appender("bad/file"), appender("good/file")
    assert bad.append("one") == 0
    assert good.append("one") == 0
    disk.freeze()
    bad.begin("fence")
    for number in range(20):
        assert good.append(f"{number}", limit_s=5) == 0
    assert bad.answers.empty()
    disk.thaw()
    assert bad.answer() == 0
    assert bad.missing(bad.path.read_bytes()) == []


@two_routes(checkpoint_interval="10min")
@engines
def test_a_foreign_truncate_on_a_disk_that_hangs_holds_up_nobody_else(
    elgate_daemon_stopped: ChildDaemon, stack: ExitStack, appender: Callable[[str], Appender], engine: str
) -> None:
    daemon = elgate_daemon_stopped
    disk = stack.enter_context(StallingExt4(daemon.directory, daemon.route_dir / "bad", 64 * MIB))
    start(daemon, engine)
    bad, good = appender("bad/file"), appender("good/file")
    assert bad.append("one, that somebody cuts off") == 0
    assert good.append("one") == 0
    os.truncate(bad.path, 4)
    disk.freeze()
    assert bad.errno_of("write two") == 0
    assert bad.errno_of("write three") == 0
    bad.begin("sync")
    for number in range(20):
        assert good.append(f"{number}", limit_s=5) == 0
    assert bad.answers.empty()
    disk.thaw()
    assert bad.answer() == 0
    assert bad.path.read_bytes() == b"one,two\nthree\n"
    daemon.kill()
    daemon.start()
    assert bad.append("four") == 0
    assert bad.path.read_bytes() == b"one,two\nthree\nfour\n"
    assert daemon.events("foreign_truncate")


@both_policies()
def test_a_route_whose_targets_hang_holds_up_nobody_else(
    elgate_daemon_stopped: ChildDaemon, stack: ExitStack, appender: Callable[[str], Appender], on_full: str
) -> None:
    """On threads: io_uring cannot promise it (docs/architecture.md)."""
    daemon = elgate_daemon_stopped
    disk = stack.enter_context(Ext4(daemon.route_dir / "bad", daemon.directory / "bad.img", 64 * MIB))
    daemon.start()
    bad, late, good = appender("bad/file"), appender("bad/late"), appender("good/file")
    assert bad.append("one") == 0
    assert bad.errno_of("spread 10") == 0
    assert good.append("one") == 0
    disk.freeze()
    assert bad.errno_of("spread 10") == 0
    late.begin("append late")  # with which it is registered, and marked
    # One write, one group, one log buffer each: more than there are.
    accepted = 0
    while accepted < 64:
        bad.begin(f"write {accepted}")
        wait_until(lambda: not bad.answers.empty() or bool(daemon.events("route_closed")), "an answer")
        if bad.answers.empty():
            break
        if (result := bad.answer()) != 0:
            assert (on_full, result) == ("error", errno.ENOSPC)
            break
        bad.acknowledged.append(b"%d\n" % accepted)
        accepted += 1
        assert good.append(f"beside {accepted}", limit_s=5) == 0
    assert 2 <= accepted < 64
    # Its checkpoints too.
    before = cursor_of(daemon, "good")
    for number in range(200):
        assert good.append(f"{number}", limit_s=5) == 0
    wait_until(lambda: cursor_of(daemon, "good") > before, "the other route's checkpoints go on")
    assert daemon.wait_for_event("route_closed")["route"] == "bad"
    # Nor the registration of files.
    new = appender("good/new")
    for number in range(5):
        assert new.append(f"{number}", limit_s=5) == 0
    assert new.errno_of("close", limit_s=5) == 0
    assert bad.answers.empty()
    assert late.answers.empty()
    disk.thaw()
    if late.answer() != 0:
        assert on_full == "error"  # the route was still closed
        late.append_when_possible("late")
    if on_full == "block":
        assert bad.answer() == 0
        bad.acknowledged.append(b"%d\n" % accepted)
    bad.append_when_possible("last")
    daemon.wait_for_event("route_opened")
    for each in (bad, good, new):
        assert each.missing(each.path.read_bytes()) == []
    assert late.path.read_bytes() == b"late\n"
    for number in range(10):
        assert Path(f"{bad.path}-{number}").read_bytes() == 2 * b"line\n"
    assert bad.path.read_bytes() == b"".join(bad.acknowledged)


# ---- a log that is full -------------------------------------------------------------------------------------------


def fill_until_full(filler: Appender, on_full: str, daemon: ChildDaemon) -> None:
    """Until the route takes nothing more: then the last write hangs, or has been refused."""
    for _ in range(64):
        filler.begin("fill x")
        if on_full == "block":
            wait_until(lambda: not filler.answers.empty() or bool(daemon.events("route_closed")), "an answer")
            if filler.answers.empty():
                return
            assert filler.answer() == 0
        elif (result := filler.answer()) != 0:
            assert result == errno.ENOSPC
            return
        filler.acknowledged.append(b"x" * (1 << 19))
    raise AssertionError("32 MiB are in a log that has room for 16")


def finish_filling(filler: Appender, on_full: str) -> None:
    if on_full == "block":
        assert filler.answer() == 0
        filler.acknowledged.append(b"x" * (1 << 19))
    filler.append_when_possible("there is room again")


@both_policies(max_size="16MiB")
def test_a_log_that_its_targets_keep_full_is_met_at_the_write(
    elgate_daemon_stopped: ChildDaemon, stack: ExitStack, appender: Callable[[str], Appender], on_full: str
) -> None:
    daemon = elgate_daemon_stopped
    disk = stack.enter_context(Tmpfs(daemon.route_dir / "bad" / "small", 64 << 10))
    daemon.start()
    pinning, filler, good = appender("bad/small/file"), appender("bad/file"), appender("good/file")
    fill_the_target(pinning, daemon)
    fill_until_full(filler, on_full, daemon)
    for number in range(20):
        assert good.append(f"{number}", limit_s=5) == 0
    assert not daemon.events("log_failed")
    disk.resize(MIB)
    finish_filling(filler, on_full)
    daemon.wait_for_event("target_recovered")
    for each in (filler, good, pinning):
        assert each.missing(each.path.read_bytes()) == []


@both_policies()
def test_a_full_disk_is_met_at_the_write(
    elgate_daemon_stopped: ChildDaemon, stack: ExitStack, appender: Callable[[str], Appender], on_full: str
) -> None:
    daemon = elgate_daemon_stopped
    disk = stack.enter_context(Ext4(daemon.wal_dir, daemon.directory / "log.img", 64 * MIB))
    daemon.start()
    filler, good = appender("bad/file"), appender("good/file")
    assert filler.append("first") == 0
    assert good.append("first") == 0
    segments = [daemon.wal_dir / route for route in ("bad", "good")]
    wait_until(lambda: all(len(list(each.glob("*.wal"))) == 2 for each in segments), "segments ahead of need")
    with open(disk.mount_point / "filler", "wb", buffering=0) as file:
        with pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(MIB))
    # Nothing leaves the log, so that its segments are not used again.
    target = stack.enter_context(Tmpfs(daemon.route_dir / "bad" / "small", 64 << 10))
    pinning = appender("bad/small/file")
    fill_the_target(pinning, daemon)
    fill_until_full(filler, on_full, daemon)
    for number in range(20):
        assert good.append(f"{number}", limit_s=5) == 0
    assert not daemon.events("log_failed")
    if on_full == "block":
        assert daemon.wait_for_event("route_closed")["route"] == "bad"
    os.truncate(disk.mount_point / "filler", 0)
    target.resize(MIB)
    finish_filling(filler, on_full)
    daemon.wait_for_event("target_recovered")
    for each in (filler, good, pinning):
        assert each.missing(each.path.read_bytes()) == []
