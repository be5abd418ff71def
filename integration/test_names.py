"""Files that get another name, or lose it, while the log has something for them: a replay finds each of them, also
where its daemon may open nothing by a handle (anybody but root), and misses none that was removed."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from formats import ENUMERATIONS
from programs import Program, cursor_of, start_as_anybody, wait_until
from rawclient import RawClient

from elgate.daemon.child import ChildDaemon

# Without a checkpoint, everything is in the log; and a daemon is killed before it lets go of anything.
pytestmark = pytest.mark.elgate(wal={"checkpoint_interval": "10min"})


@pytest.fixture
def daemon(elgate_daemon_stopped: ChildDaemon) -> ChildDaemon:
    start_as_anybody(elgate_daemon_stopped)
    for name in ("a", "b"):
        (elgate_daemon_stopped.route_dir / name).mkdir()
    return elgate_daemon_stopped


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def program(daemon: ChildDaemon, stack: ExitStack) -> Program:
    return stack.enter_context(Program(daemon))


@pytest.fixture
def other(daemon: ChildDaemon, stack: ExitStack) -> Program:
    return stack.enter_context(Program(daemon))


def write(program: Program, path: Path, content: bytes, name: str = "fd") -> None:
    program.do(f"{name} = os.open({str(path)!r}, os.O_WRONLY | os.O_CREAT)")
    program.do(f"os.write({name}, {content!r})")
    program.do(f"os.fsync({name})")


def crash(daemon: ChildDaemon, *lost: Path) -> None:
    """Kills the daemon; what the page cache had of `lost` is gone, as with a power cut. Starts it again."""
    daemon.kill()
    for path in lost:
        os.truncate(path, 0)
    start_as_anybody(daemon)


def replayed(daemon: ChildDaemon) -> dict[str, int]:
    """What its last start said of that. (It says it when it serves already.)"""
    starts = len(daemon.events("starting"))
    daemon.wait_for_event("log_replayed", count=starts - 1)
    return {name: daemon.events("log_replayed")[-1][name] for name in ("records", "quarantined", "of_removed_files")}


# ---- renamed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["os.rename", "os.replace", "shutil.move"])
def test_a_file_that_is_renamed_is_found_in_another_directory(daemon: ChildDaemon, program: Program, call: str) -> None:
    old, new = daemon.route_dir / "a" / "file", daemon.route_dir / "b" / "file"
    write(program, old, b"content")
    program.do(f"{call}({str(old)!r}, {str(new)!r})")
    crash(daemon, new)
    assert new.read_bytes() == b"content"
    assert replayed(daemon) == {"records": 1, "quarantined": 0, "of_removed_files": 0}


def test_also_by_a_process_that_does_not_have_it_open(daemon: ChildDaemon, program: Program, other: Program) -> None:
    old, new = daemon.route_dir / "a" / "file", daemon.route_dir / "b" / "file"
    write(program, old, b"content")
    other.do(f"os.chdir({str(old.parent)!r})")
    other.do(f"target = os.open({str(new.parent)!r}, os.O_RDONLY)")
    other.do("os.rename('file', 'file', dst_dir_fd=target)")
    crash(daemon, new)
    assert new.read_bytes() == b"content"
    assert replayed(daemon)["quarantined"] == 0


def test_again_and_again_and_what_is_written_in_between(daemon: ChildDaemon, program: Program) -> None:
    path = daemon.route_dir / "a" / "0"
    write(program, path, b"0")
    for number in range(1, 100):
        new = daemon.route_dir / "ab"[number % 2] / str(number)
        program.do(f"os.rename({str(path)!r}, {str(new)!r})")
        program.do(f"os.write(fd, b'{number % 10}')")
        path = new
    program.do("os.fsync(fd)")
    crash(daemon, path)
    assert path.read_bytes() == b"0123456789" * 10
    assert replayed(daemon)["quarantined"] == 0


def test_a_rename_that_does_not_happen_changes_nothing(daemon: ChildDaemon, program: Program) -> None:
    old, new = daemon.route_dir / "a" / "file", daemon.route_dir / "b"
    write(program, old, b"content")
    assert program.errno_of(f"os.rename({str(old)!r}, {str(new)!r})") == errno.EISDIR
    crash(daemon, old)
    assert old.read_bytes() == b"content"
    assert replayed(daemon)["quarantined"] == 0


def test_directories_above_open_files(daemon: ChildDaemon, program: Program, other: Program) -> None:
    deep = daemon.route_dir / "a" / "deep"
    deep.mkdir()
    for number in range(20):
        write(program, deep / str(number), b"%d" % number, f"fd{number}")
    write(program, daemon.route_dir / "b" / "beside", b"beside")
    other.do(f"os.rename({str(deep)!r}, {str(daemon.route_dir / 'b' / 'moved')!r})")
    other.do(f"os.rename({str(daemon.route_dir / 'b')!r}, {str(daemon.route_dir / 'c')!r})")
    moved = daemon.route_dir / "c" / "moved"
    crash(daemon, daemon.route_dir / "c" / "beside", *(moved / str(number) for number in range(20)))
    assert [(moved / str(number)).read_bytes() for number in range(20)] == [b"%d" % number for number in range(20)]
    assert (daemon.route_dir / "c" / "beside").read_bytes() == b"beside"
    assert replayed(daemon)["quarantined"] == 0


def test_a_rename_by_a_program_without_elgate_is_seen_by_the_next_checkpoint(
    daemon: ChildDaemon, program: Program
) -> None:
    old, new = daemon.route_dir / "a" / "file", daemon.route_dir / "b" / "file"
    write(program, old, b"content")
    subprocess.run(["mv", old, new], check=True)
    # So many bytes that a checkpoint is due, whatever the time is.
    program.do(f"filler = os.open({str(daemon.route_dir / 'filler')!r}, os.O_WRONLY | os.O_CREAT)")

    def is_checkpointed() -> bool:
        program.do("for _ in range(16): os.pwrite(filler, bytes(1 << 19), 0)")
        return cursor_of(daemon)[0] > 0

    wait_until(is_checkpointed, "a checkpoint")
    program.do("os.pwrite(fd, b'CON', 0); os.fsync(fd)")
    crash(daemon, new)
    assert new.read_bytes()[:3] == b"CON"
    assert replayed(daemon)["quarantined"] == 0


# ---- removed ----------------------------------------------------------------------------------------------------


def leave_behind(daemon: ChildDaemon, path: Path) -> None:
    """A file that a program which is gone has written, and that the daemon knows from its log alone. (One that is open
    goes native before it is removed.)"""
    with Program(daemon) as program:
        write(program, path, b"content")
    crash(daemon)


def test_nothing_is_missed_of_a_file_that_another_one_has_taken_the_place_of(
    daemon: ChildDaemon, program: Program
) -> None:
    path, new = daemon.route_dir / "a" / "file", daemon.route_dir / "b" / "new"
    leave_behind(daemon, path)
    write(program, new, b"new")
    program.do(f"os.replace({str(new)!r}, {str(path)!r})")
    crash(daemon, path)
    assert path.read_bytes() == b"new"
    assert replayed(daemon) == {"records": 1, "quarantined": 0, "of_removed_files": 1}
    assert not daemon.events("records_quarantined")


def test_nor_of_one_that_is_open(daemon: ChildDaemon, program: Program) -> None:
    path, new = daemon.route_dir / "a" / "file", daemon.route_dir / "b" / "new"
    write(program, path, b"old", "old")
    write(program, new, b"new", "new")
    program.do(f"os.replace({str(new)!r}, {str(path)!r})")
    program.do("os.write(old, b'and more')")
    program.do("os.fsync(old)")
    crash(daemon, path)
    assert path.read_bytes() == b"new"
    assert replayed(daemon)["quarantined"] == 0
    assert not daemon.events("records_quarantined")


def test_nor_of_one_that_is_unlinked_and_made_again(daemon: ChildDaemon, program: Program) -> None:
    path = daemon.route_dir / "a" / "file"
    leave_behind(daemon, path)
    before = path.stat().st_ino
    program.do(f"os.unlink({str(path)!r})")
    write(program, path, b"new", "new")
    print(f"inode {before}, then {path.stat().st_ino}")
    crash(daemon, path)
    assert path.read_bytes() == b"new"
    assert replayed(daemon) == {"records": 1, "quarantined": 0, "of_removed_files": 1}
    assert not daemon.events("records_quarantined")


def test_a_file_that_was_not_removed_after_all_is_missed(daemon: ChildDaemon, program: Program) -> None:
    if os.geteuid() != 0:
        pytest.skip("a directory in which nothing can be removed needs root")
    path = daemon.route_dir / "a" / "file"
    leave_behind(daemon, path)
    subprocess.run(["chattr", "+i", path.parent], check=True)
    try:
        assert program.errno_of(f"os.unlink({str(path)!r})") == errno.EPERM
    finally:
        subprocess.run(["chattr", "-i", path.parent], check=True)
    daemon.kill()
    path.rename(daemon.route_dir / "b" / "elsewhere")
    start_as_anybody(daemon)
    assert replayed(daemon) == {"records": 0, "quarantined": 1, "of_removed_files": 0}


def test_nor_is_it_forgotten_with_a_program_that_ends_before_it_removes_it(daemon: ChildDaemon, other: Program) -> None:
    path = daemon.route_dir / "a" / "file"
    leave_behind(daemon, path)
    closed = len(daemon.events("session_closed"))
    client = RawClient(daemon.socket)
    client.hello()
    descriptor = os.open(path, os.O_PATH)
    change = ENUMERATIONS["ChangeName.change"]["removed"]
    client.send(client.message("ChangeName", "change_name", change=change), descriptor)
    os.close(descriptor)
    assert client.receive()[0] == "name_noted"
    client.socket.close()
    daemon.wait_for_event("session_closed", count=closed + 1)
    write(other, daemon.route_dir / "b" / "behind", b"durable behind what was logged then")
    daemon.kill()
    path.rename(daemon.route_dir / "b" / "elsewhere")
    start_as_anybody(daemon)
    assert replayed(daemon) == {"records": 1, "quarantined": 1, "of_removed_files": 0}


# ---- not logged -------------------------------------------------------------------------------------------------


def test_what_cannot_be_logged_is_not_done(daemon: ChildDaemon, program: Program) -> None:
    old, new = daemon.route_dir / "a" / "file", daemon.route_dir / "b" / "file"
    removed = daemon.route_dir / "a" / "removed"
    leave_behind(daemon, removed)
    write(program, old, b"content")
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    assert program.errno_of(f"os.rename({str(old)!r}, {str(new)!r})") == errno.EFBIG
    assert program.errno_of(f"os.unlink({str(removed)!r})") == errno.EFBIG
    assert old.exists() and removed.exists() and not new.exists()
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    daemon.wait_for_event("log_recovered")
    program.do(f"os.rename({str(old)!r}, {str(new)!r})")
    crash(daemon, new)
    assert new.read_bytes() == b"content"
    assert replayed(daemon)["quarantined"] == 0
