"""Files that new programs would write natively, while others have them open through Elgate: nothing is out of order, and
nothing old comes back."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from programs import Program, start_as_anybody, wait_until

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


def test_a_file_that_is_native_can_be_opened_again_behind_a_restart(
    elgate_daemon: ChildDaemon, stack: ExitStack
) -> None:
    path = elgate_daemon.route_dir / "file"
    program = stack.enter_context(Program(elgate_daemon))
    program.do(f"path = {str(path)!r}")
    program.do("fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)")
    program.do("os.write(fd, b'one,')")
    program.do("os.write(fd, b'x' * 2_000_000)")
    elgate_daemon.kill()
    elgate_daemon.start()
    program.do("other = os.open(path, os.O_WRONLY | os.O_APPEND)")
    program.do("os.write(fd, b'two,'); os.write(other, b'three,'); os.write(fd, b'four')")
    assert path.read_bytes() == b"one," + b"x" * 2_000_000 + b"two,three,four"


def test_a_look_by_a_reader_finds_that_others_have_made_the_file_native(
    elgate_daemon: ChildDaemon, stack: ExitStack
) -> None:
    path = elgate_daemon.route_dir / "file"
    one, other = (stack.enter_context(Program(elgate_daemon)) for _ in range(2))
    for program in (one, other):
        program.do(f"path = {str(path)!r}")
        program.do("fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)")
        program.do("os.write(fd, b'one,')")
    one.do("reader = os.open(path, os.O_RDONLY)")
    other.do("os.write(fd, b'x' * 2_000_000)")
    one.do("assert os.fstat(reader).st_size == 2_000_008")
    one.do("os.write(fd, b'two'); assert os.pread(reader, 10, 2_000_004) == b'xxxxtwo'")


def test_who_has_closed_what_it_wrote_goes_on_reading_behind_a_restart(
    elgate_daemon: ChildDaemon, stack: ExitStack
) -> None:
    path = elgate_daemon.route_dir / "file"
    program = stack.enter_context(Program(elgate_daemon))
    program.do(f"path = {str(path)!r}; fd = os.open(path, os.O_WRONLY | os.O_CREAT); os.write(fd, b'one')")
    program.do("reader = os.open(path, os.O_RDONLY); os.close(fd)")
    elgate_daemon.kill()
    elgate_daemon.start()
    program.do("assert os.pread(reader, 10, 0) == b'one'; os.fsync(reader)")


def test_a_rename_that_fails_changes_nothing(elgate_daemon: ChildDaemon, stack: ExitStack) -> None:
    path = elgate_daemon.route_dir / "file"
    program = stack.enter_context(Program(elgate_daemon))
    program.do(f"path = {str(path)!r}; fd = os.open(path, os.O_WRONLY | os.O_CREAT); os.write(fd, b'one')")
    assert program.errno_of("os.rename(path + '-absent', path)") == errno.ENOENT
    program.do("before = elgate.status()['routed_operations']; os.write(fd, b'two')")
    program.do("assert elgate.status()['routed_operations'] == before + 1")
    assert not elgate_daemon.events("file_went_native")


MOVE_THE_DIRECTORY = (
    "old, new = map(os.path.dirname, (path, outside)); os.rename(old, new + '/d'); outside = new + '/d/file'"
)


@pytest.mark.parametrize("way", ["os.rename(path, outside)", "os.link(path, outside)", MOVE_THE_DIRECTORY])
@pytest.mark.parametrize("killed", [False, True], ids=["", "killed"])
def test_a_file_that_gets_a_name_outside_is_native_for_all(
    elgate_daemon: ChildDaemon, stack: ExitStack, way: str, killed: bool
) -> None:
    daemon = elgate_daemon
    (daemon.route_dir / "d").mkdir()
    (daemon.directory / "outside").mkdir()
    path, outside = daemon.route_dir / "d" / "file", daemon.directory / "outside" / "file"
    writer, mover = (stack.enter_context(Program(daemon)) for _ in range(2))
    for program in (writer, mover):
        program.do(f"path, outside = {str(path)!r}, {str(outside)!r}")
    writer.do("fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)")
    writer.do("os.write(fd, b'x' * 70_000)")
    mover.do(way)
    mover.do("fd = os.open(outside, os.O_RDWR | os.O_APPEND)")
    expected = b"x" * 70_000
    for number in range(20):
        writer.do(f"os.write(fd, b'{number},')")
        mover.do(f"os.write(fd, b'{number};')")
        expected += b"%d,%d;" % (number, number)
        mover.do(f"assert os.pread(fd, 100_000, 0) == {expected!r}")
    mover.do("os.pwrite(fd, b'', 0); os.ftruncate(fd, 3)")
    if killed:
        daemon.kill()
        daemon.start()
    mover.do("assert os.pread(fd, 100, 0) == b'xxx'")
    assert not daemon.events("records_quarantined")


def test_a_truncate_by_another_programs_path_has_its_place_in_the_order(
    elgate_daemon: ChildDaemon, stack: ExitStack
) -> None:
    path = elgate_daemon.route_dir / "file"
    writer, other = (stack.enter_context(Program(elgate_daemon)) for _ in range(2))
    writer.do(f"fd = os.open({str(path)!r}, os.O_RDWR | os.O_CREAT)")
    for number in range(50):
        writer.do("os.pwrite(fd, b'x' * 9000, 0)")
        other.do(f"os.truncate({str(path)!r}, {number})")
        writer.do(f"assert os.fstat(fd).st_size == {number}")
    assert not elgate_daemon.events("foreign_truncate")
    assert not elgate_daemon.events("file_went_native")


def test_a_file_that_loses_its_name_behind_a_restart_stays_open_for_who_has_it(
    elgate_daemon_stopped: ChildDaemon, stack: ExitStack
) -> None:
    """As it is with an old log, which is removed while the program that has it open says nothing."""
    daemon = elgate_daemon_stopped
    start_as_anybody(daemon)  # who could not find it by its handle
    path = daemon.route_dir / "file"
    program, other = (stack.enter_context(Program(daemon)) for _ in range(2))
    program.do(f"fd = os.open({str(path)!r}, os.O_RDWR | os.O_APPEND | os.O_CREAT)")
    program.do("os.write(fd, b'one,')")
    wait_until(lambda: path.read_bytes() == b"one,", "it is in the file")
    program.do("os.fsync(fd)")
    daemon.kill()
    start_as_anybody(daemon)
    other.do(f"os.unlink({str(path)!r})")
    wait_until(lambda: not list(daemon.route_dir.iterdir()), "its name is gone")
    daemon.kill()
    start_as_anybody(daemon)
    program.do("os.write(fd, b'two')")
    program.do("assert os.pread(fd, 10, 0) == b'one,two'; os.fsync(fd); os.close(fd)")
    assert not daemon.events("records_quarantined")


def test_without_a_daemon_nothing_of_a_marked_file_is_cut_off(elgate_daemon: ChildDaemon, stack: ExitStack) -> None:
    path = elgate_daemon.route_dir / "file"
    program = stack.enter_context(Program(elgate_daemon))
    program.do(f"fd = os.open({str(path)!r}, os.O_WRONLY | os.O_CREAT); os.write(fd, b'one'); os.fsync(fd)")
    elgate_daemon.kill()
    text = "import os, sys, elgate; elgate.patch_all(); os.truncate(sys.argv[1], 1)"
    environment = {**elgate_daemon.env(), "ELGATE_FALLBACK": "passthrough", "ELGATE_RECONNECT_TIMEOUT_MS": "50"}
    command = [sys.executable, "-c", text, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "Errno 5" in done.stderr
    assert path.read_bytes() == b"one"


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
