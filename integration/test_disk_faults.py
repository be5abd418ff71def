"""Targets and logs on disks that fail. Each time: nothing acknowledged is lost, the daemon stays up, other routes go on,
errors are the right ones, and all is well again once the fault has ended, without a restart."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from disks import Ext4, StallingExt4, ThinExt4, needs_root, thaw_all
from formats import LOG
from programs import Appender, wait_until

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
    assert bad.do("write two") == 0
    assert bad.do("write three") == 0
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
