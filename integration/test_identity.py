"""What may happen to a file beside Elgate, or to its name, each followed by a kill of the daemon and by a power cut:
the right bytes are in it afterwards, or the documented receipt says where they are."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from disks import Ext4, needs_root
from programs import Program, start_as_anybody, wait_until

from elgate.daemon.child import ChildDaemon

pytestmark = needs_root

IMAGE_BYTES = 256 << 20
MIB = 1 << 20


class World:
    """One file system, the daemon's log and files on it, and programs that write through it."""

    def __init__(self, image: Ext4, daemon: ChildDaemon, stack: ExitStack) -> None:
        self.image = image
        self.daemon = daemon
        self.stack = stack
        # May it open files by their handles, as root's daemon may?
        self.as_root = False
        self.started = False
        self.programs: list[Program] = []

    @property
    def files(self) -> Path:
        return self.daemon.route_dir

    def program(self) -> Program:
        program = Program(self.daemon)
        self.programs.append(program)
        self.stack.callback(program.process.wait)
        self.stack.callback(program.process.kill)
        return program

    def start(self) -> None:
        if self.as_root:
            self.daemon.start()
        else:
            start_as_anybody(self.daemon)

    def end(self, ending: str) -> None:
        """The daemon dies, or everything does."""
        for directory in (self.files, self.files / "a", self.files / "b"):
            sync(directory)  # names are not what is looked at here
        if ending == "cut":
            self.image.cut_power()
            for program in self.programs:
                program.process.kill()
                program.process.wait()
            self.daemon.kill()
            self.image.unmount()
            self.image.mount()
            self.daemon.ring_path.unlink()
        else:
            self.daemon.kill()


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write(program: Program, path: Path, content: bytes, flags: str = "0", name: str = "fd") -> None:
    program.do(f"{name} = os.open({str(path)!r}, os.O_WRONLY | os.O_CREAT | {flags})")
    program.do(f"os.write({name}, {content!r})")
    program.do(f"os.fsync({name})")


def append_natively(path: Path, content: bytes) -> None:
    with open(path, "ab", buffering=0) as file:
        file.write(content)
        os.fsync(file.fileno())


# What happens, and what is to be found then, by path; None: nothing.
Found = dict[Path, "bytes | None"]
SCENARIOS: list[Callable[[World], Found]] = []


def scenario(function: Callable[[World], Found]) -> Callable[[World], Found]:
    SCENARIOS.append(function)
    return function


@scenario
def renamed_by_the_program_that_has_it_open(world: World) -> Found:
    old, new = world.files / "a" / "file", world.files / "b" / "file"
    program = world.program()
    write(program, old, b"one ")
    program.do(f"os.rename({str(old)!r}, {str(new)!r})")
    program.do("os.write(fd, b'two'); os.fsync(fd)")
    return {old: None, new: b"one two"}


@scenario
def renamed_by_another_program(world: World) -> Found:
    old, new = world.files / "a" / "file", world.files / "b" / "file"
    write(world.program(), old, b"content")
    world.program().do(f"shutil.move({str(old)!r}, {str(new)!r})")
    return {old: None, new: b"content"}


@scenario
def renamed_in_its_directory_without_elgate(world: World) -> Found:
    old, new = world.files / "a" / "file", world.files / "a" / "renamed"
    write(world.program(), old, b"content")
    os.rename(old, new)
    old.write_bytes(b"another")
    sync(old)
    return {old: b"another", new: b"content"}


@scenario
def renamed_into_another_directory_without_elgate_beside_a_daemon_of_root(world: World) -> Found:
    world.as_root = True
    old, new = world.files / "a" / "file", world.files / "b" / "file"
    write(world.program(), old, b"content")
    os.rename(old, new)
    return {new: b"content"}


@scenario
def put_in_the_place_of_another(world: World) -> Found:
    path, new = world.files / "a" / "file", world.files / "a" / "file.new"
    program = world.program()
    write(program, path, b"old", name="old")
    write(program, new, b"new", name="new")
    program.do("os.close(new)")
    program.do(f"os.replace({str(new)!r}, {str(path)!r})")
    program.do("os.write(old, b'to nobody'); os.fsync(old)")
    return {path: b"new", new: None}


@scenario
def unlinked_and_made_again(world: World) -> Found:
    """With the number of an earlier one, which ext4 gives to the next file once the daemon has let go of that."""
    path = world.files / "a" / "file"
    program = world.program()
    write(program, path, b"old content")
    before: set[int] = set()

    def is_again() -> bool:
        before.add(path.stat().st_ino)
        program.do(f"os.unlink({str(path)!r}); os.close(fd)")
        write(program, path, b"new")
        return path.stat().st_ino in before

    wait_until(is_again, "a number is used again")
    return {path: b"new"}


@scenario
def unlinked_without_elgate_and_made_again_by_another(world: World) -> Found:
    path = world.files / "a" / "file"
    program = world.program()
    write(program, path, b"old content")
    program.do("os.close(fd)")
    wait_until(lambda: "user.elgate" not in os.listxattr(path), "the file is let go of")
    before = path.stat().st_ino
    path.unlink()

    def is_again() -> bool:
        path.unlink(missing_ok=True)
        path.write_bytes(b"theirs")
        sync(path)
        return path.stat().st_ino == before

    wait_until(is_again, "the number is used again")
    return {path: b"theirs"}


@scenario
def truncated(world: World) -> Found:
    path = world.files / "a" / "file"
    program = world.program()
    write(program, path, b"0123456789")
    program.do("os.ftruncate(fd, 4); os.write(fd, b'ab'); os.fsync(fd)")
    return {path: b"0123" + bytes(6) + b"ab"}


@scenario
def truncated_by_its_name_after_it_was_closed(world: World) -> Found:
    path = world.files / "a" / "file"
    program = world.program()
    write(program, path, b"0123456789")
    program.do("os.close(fd)")
    wait_until(lambda: "user.elgate" not in os.listxattr(path), "the file is let go of")
    program.do(f"os.truncate({str(path)!r}, 4)")
    sync(path)
    return {path: b"0123"}


@scenario
def copied_and_cut_by_logrotate(world: World) -> Found:
    path, copy = world.files / "a" / "log", world.files / "a" / "log.1"
    program = world.program()
    write(program, path, b"before\n", "os.O_APPEND")
    shutil.copyfile(path, copy)
    sync(copy)
    os.truncate(path, 0)
    program.do("os.write(fd, b'after\\n'); os.fsync(fd)")
    return {path: b"after\n", copy: b"before\n"}


@scenario
def appended_to_without_elgate(world: World) -> Found:
    path = world.files / "a" / "log"
    program = world.program()
    write(program, path, b"ours\n", "os.O_APPEND")
    append_natively(path, b"theirs\n")
    program.do("os.write(fd, b'ours again\\n'); os.fsync(fd)")
    return {path: b"ours\ntheirs\nours again\n"}


@scenario
def written_natively_after_going_native(world: World) -> Found:
    path = world.files / "a" / "file"
    program = world.program()
    write(program, path, b"routed")
    program.do(f"os.pwrite(fd, b'N' * {2 * MIB}, 0)")
    program.do("assert os.fsync(fd) is None")
    with open(path, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"others", 0)
        os.fsync(file.fileno())
    return {path: b"others" + b"N" * (2 * MIB - 6)}


@scenario
def written_natively_after_it_was_closed(world: World) -> Found:
    path = world.files / "a" / "file"
    program = world.program()
    write(program, path, b"ours, and long\n", "os.O_APPEND")
    program.do("os.close(fd)")
    wait_until(lambda: "user.elgate" not in os.listxattr(path), "the file is let go of")
    os.truncate(path, 5)
    append_natively(path, b"theirs\n")
    return {path: b"ours,theirs\n"}


@scenario
def closed_and_left_alone(world: World) -> Found:
    """Nobody has asked for a sync: the release does."""
    path = world.files / "a" / "file"
    program = world.program()
    program.do(f"fd = os.open({str(path)!r}, os.O_WRONLY | os.O_CREAT); os.write(fd, b'content'); os.close(fd)")
    wait_until(lambda: "user.elgate" not in os.listxattr(path), "the file is let go of")
    return {path: b"content"}


@scenario
def in_a_directory_that_is_renamed(world: World) -> Found:
    deep = world.files / "a" / "deep"
    deep.mkdir()
    write(world.program(), deep / "file", b"content")
    world.program().do(f"os.rename({str(deep)!r}, {str(world.files / 'b' / 'moved')!r})")
    return {world.files / "b" / "moved" / "file": b"content"}


WITHOUT_DAEMON = """
import os, sys
import elgate
elgate.patch_all()
try:
    os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
except OSError as error:
    print(error.errno)
else:
    print("opened")
"""


@scenario
def met_by_a_program_before_the_daemon_is_back(world: World) -> Found:
    path = world.files / "a" / "file"
    write(world.program(), path, b"content")
    world.started = True
    return {path: b"content"}


@pytest.fixture
def world(disk_dir: Path) -> Iterator[World]:
    with (
        Ext4(disk_dir / "mnt", disk_dir / "disk.img", IMAGE_BYTES) as image,
        ChildDaemon(
            image.mount_point / "elgate", sections={"wal": {"segment_size": "8MiB", "checkpoint_interval": "10min"}}
        ) as daemon,
        ExitStack() as stack,
    ):
        # Not on the disk that goes away.
        daemon.log_path = disk_dir / "daemon.log"
        for name in ("a", "b"):
            (daemon.route_dir / name).mkdir()
        yield World(image, daemon, stack)
        print(f"--- {daemon.log_path}\n{daemon.log_text()}")


@pytest.mark.parametrize("flush", ["group", "none"])
@pytest.mark.parametrize("ending", ["kill", "cut"])
@pytest.mark.parametrize("happens", SCENARIOS, ids=lambda happens: happens.__name__)
def test_the_right_bytes_are_there(happens: Callable[[World], Found], ending: str, flush: str, world: World) -> None:
    daemon = world.daemon
    daemon.write_config([{"name": "files", "match": {"path": f"{world.files}/**"}, "flush": flush}])
    os.sync()
    world.start()
    expected = happens(world)
    world.end(ending)
    if world.started:
        # It is marked: nobody may write past what the log has for it.
        (path,) = expected
        environment = {**daemon.env(), "ELGATE_FALLBACK": "passthrough", "ELGATE_RECONNECT_TIMEOUT_MS": "50"}
        command = [sys.executable, "-c", WITHOUT_DAEMON, str(path)]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert said == f"{errno.EIO}\n"
    world.start()
    for path, content in expected.items():
        assert (path.read_bytes() if path.exists() else None) == content, path
    daemon.stop()
    assert not daemon.events("records_quarantined")
    for path, content in expected.items():
        assert (path.read_bytes() if path.exists() else None) == content, path


@pytest.mark.parametrize("ending", ["kill", "cut"])
def test_what_cannot_be_found_is_kept_and_said(ending: str, world: World) -> None:
    """Renamed into another directory by a program without Elgate, beside a daemon that is not root's."""
    daemon = world.daemon
    os.sync()
    world.start()
    old, new = world.files / "a" / "file", world.files / "b" / "file"
    write(world.program(), old, b"content")
    os.rename(old, new)
    world.end(ending)
    world.start()
    kept = daemon.wait_for_event("records_quarantined")
    assert kept["path"] == str(old) and "not there" in kept["reason"]
    assert b"content" in Path(kept["kept_in"]).read_bytes()
