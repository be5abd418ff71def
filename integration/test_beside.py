"""Files that new programs would write natively, while others have them open through Elgate: nothing is out of order, and
nothing old comes back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from programs import Program, wait_until

from elgate.daemon.child import ChildDaemon

pytestmark = pytest.mark.elgate(wal={"checkpoint_interval": "10min"})
TURNS = 100


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def link(daemon: ChildDaemon, path: Path) -> None:
    os.link(path, daemon.directory / "another name")


def remove_the_route(daemon: ChildDaemon, path: Path) -> None:
    daemon.write_config([])
    daemon.reload()
    daemon.wait_for_event("reloaded")


def move_the_route(daemon: ChildDaemon, path: Path) -> None:
    daemon.write_config([{"name": "files", "match": {"path": f"{daemon.route_dir}/elsewhere/**"}}])
    daemon.reload()
    daemon.wait_for_event("reloaded")


def rename_the_route(daemon: ChildDaemon, path: Path) -> None:
    daemon.write_config([{"name": "other", "match": {"path": f"{daemon.route_dir}/**"}}])
    daemon.reload()
    daemon.wait_for_event("reloaded")


CHANGES = [link, remove_the_route, move_the_route, rename_the_route]
changes = pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
Change = Callable[[ChildDaemon, Path], None]


@changes
def test_who_comes_later_writes_behind_those_who_were_there(
    elgate_daemon: ChildDaemon, stack: ExitStack, change: Change
) -> None:
    daemon = elgate_daemon
    path = daemon.route_dir / "file"
    before, later = (stack.enter_context(Program(daemon)) for _ in range(2))
    open_it = f"fd = os.open({str(path)!r}, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)"
    before.do(open_it)
    before.do("os.write(fd, b'first\\n')")
    change(daemon, path)
    later.do(open_it)
    reader = stack.enter_context(Program(daemon))
    reader.do(f"fd = os.open({str(path)!r}, os.O_RDONLY)")
    expected = b"first\n"
    for turn in range(TURNS):
        for program, name in ((before, b"before"), (later, b"later")):
            line = b"%s %d %s\n" % (name, turn, b"x" * (turn * 37 % 5000))
            program.do(f"os.write(fd, {line!r})")
            expected += line
        reader.do(f"assert os.fstat(fd).st_size == {len(expected)}, os.fstat(fd).st_size")
    for program in (before, later):
        program.do(f"assert os.pread(fd, 1 << 20, 0) == {expected!r}")
        program.do("os.fsync(fd)")
    # In one process too.
    before.do(f"other = os.open({str(path)!r}, os.O_WRONLY | os.O_APPEND)")
    before.do("os.write(fd, b'one,'); os.write(other, b'two,'); os.write(fd, b'three'); os.fsync(other)")
    expected += b"one,two,three"
    assert path.read_bytes() == expected
    daemon.kill()
    daemon.start()
    assert path.read_bytes() == expected
    assert not daemon.events("records_quarantined")


@changes
def test_what_later_ones_have_written_is_not_overwritten_by_a_replay(
    elgate_daemon: ChildDaemon, stack: ExitStack, change: Change
) -> None:
    daemon = elgate_daemon
    path = daemon.route_dir / "file"
    before, later = (stack.enter_context(Program(daemon)) for _ in range(2))
    open_it = f"fd = os.open({str(path)!r}, os.O_RDWR | os.O_CREAT, 0o644)"
    before.do(open_it)
    before.do("os.pwrite(fd, b'old', 0)")
    change(daemon, path)
    later.do(open_it)
    later.do("os.pwrite(fd, b'new', 0)")
    later.do("os.fsync(fd)")
    daemon.kill()
    daemon.start()
    assert path.read_bytes() == b"new"
    later.do("os.pwrite(fd, b'newer', 0)")
    later.do("os.close(fd)")
    assert path.read_bytes() == b"newer"


def test_a_child_that_inherits_a_file_without_a_name_keeps_the_order(
    elgate_daemon: ChildDaemon, stack: ExitStack
) -> None:
    path = elgate_daemon.route_dir / "file"
    program = stack.enter_context(Program(elgate_daemon))
    program.do(f"fd = os.open({str(path)!r}, os.O_RDWR | os.O_APPEND | os.O_CREAT)")
    program.do("os.write(fd, b'first,')")
    path.unlink()
    program.do("say = lambda text: os.write(fd, text)")
    program.do("child = lambda: say(b'child,') and os._exit(0)")
    program.do("pid = os.fork() or child(); os.waitpid(pid, 0); say(b'x' * 9000); say(b'parent,')")
    program.do("pid = os.fork() or child(); os.waitpid(pid, 0); say(b'last')")
    expected = b"first,child," + b"x" * 9000 + b"parent,child,last"
    program.do(f"assert os.pread(fd, 20_000, 0) == {expected!r}")
    went = elgate_daemon.wait_for_event("file_went_native")
    assert (went["reason"], went["errno"]) == ("no_name", 0)


@pytest.mark.parametrize("change", [remove_the_route, move_the_route])
def test_a_file_of_a_removed_route_is_anybodys_once_all_have_closed_it(
    elgate_daemon: ChildDaemon, stack: ExitStack, change: Change
) -> None:
    daemon = elgate_daemon
    path = daemon.route_dir / "file"
    program = stack.enter_context(Program(daemon))
    program.do(f"path = {str(path)!r}")
    program.do("fd = os.open(path, os.O_WRONLY | os.O_CREAT)")
    program.do("os.write(fd, b'one')")
    change(daemon, path)
    # Others of the route that nobody has open are native at once, and nobody is warned.
    program.do("before = elgate.status()['native_fallbacks']")
    program.do("other = os.open(path + '-2', os.O_WRONLY | os.O_CREAT); os.write(other, b'x')")
    assert "user.elgate" not in os.listxattr(f"{path}-2")
    program.do("assert elgate.status()['native_fallbacks'] == before")
    program.do("os.close(fd)")
    wait_until(lambda: "user.elgate" not in os.listxattr(path), "it is let go of")
    program.do("fd = os.open(path, os.O_WRONLY | os.O_APPEND); os.write(fd, b'two'); os.fsync(fd)")
    assert "user.elgate" not in os.listxattr(path)
    assert path.read_bytes() == b"onetwo"
    program.do("assert not os.path.exists('/proc/self/fd/999'); os.close(fd)")
