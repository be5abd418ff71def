"""The test stub: what it records, what it makes fail, and that a program cannot tell it from a real daemon."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from formats import ENUMERATIONS, RING
from programs import Program, wait_until
from rawclient import SLOTS, RawClient

from elgate.daemon.child import ChildDaemon
from elgate.daemon.stub import Operation, Stub, StubDaemon, StubError

Start = Callable[[], Program]


@pytest.fixture
def directory(elgate_stub: StubDaemon, tmp_path: Path) -> Path:
    elgate_stub.route("orders", f"{tmp_path}/**")
    return tmp_path


@pytest.fixture
def start(elgate_stub: StubDaemon) -> Iterator[Start]:
    """Starts a program that is driven by lines."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(Program(elgate_stub.daemon))


def opened(start: Start, path: Path, flags: str = "os.O_WRONLY | os.O_CREAT") -> Program:
    program = start()
    program.do(f"fd = os.open({str(path)!r}, {flags})")
    return program


def kinds(operations: list[Operation]) -> list[str]:
    return [operation.kind for operation in operations]


# ---- what is recorded ---------------------------------------------------------------------------------------------


def test_operations_are_recorded_in_order_with_what_they_say(
    elgate_stub: StubDaemon, directory: Path, start: Start
) -> None:
    path = directory / "a"
    program = opened(start, path)
    program.do("os.write(fd, b'hello'); os.fsync(fd); os.pwrite(fd, b'J', 0); os.fdatasync(fd); os.ftruncate(fd, 3)")
    program.do("os.posix_fallocate(fd, 0, 10); os.close(fd)")
    operations = elgate_stub.operations()
    assert kinds(operations) == [
        "open", "write", "fsync", "write", "fsync", "truncate", "allocate", "close",
    ]  # fmt: skip
    _, first, _, second, _, truncate, allocate, _ = operations
    assert (first.offset, first.length, first.data, first.append) == (0, 5, b"hello", False)
    assert (second.offset, second.length, second.data) == (0, 1, b"J")
    assert truncate.offset == 3
    assert (allocate.offset, allocate.length, allocate.keep_size) == (0, 10, False)
    assert {operation.path for operation in operations} == {path}
    assert {operation.route for operation in operations} == {"orders"}
    assert {operation.pid for operation in operations} == {program.process.pid}
    assert first.thread == program.process.pid and first.errno == 0
    assert path.read_bytes() == b"Jel" + bytes(7)


def test_appends_are_recorded_where_they_went(elgate_stub: StubDaemon, directory: Path, start: Start) -> None:
    path = directory / "a"
    path.write_bytes(b"before")
    program = opened(start, path, "os.O_WRONLY | os.O_APPEND")
    program.do("os.write(fd, b'one'); os.write(fd, b'two')")
    writes = elgate_stub.operations("write", path=path)
    assert [(write.offset, write.data, write.append) for write in writes] == [(6, b"one", True), (9, b"two", True)]


def test_each_way_to_ask_for_durability_is_an_fsync(elgate_stub: StubDaemon, directory: Path, start: Start) -> None:
    program = opened(start, directory / "a", "os.O_WRONLY | os.O_CREAT | os.O_DSYNC")
    program.do("os.write(fd, b'x')")
    assert kinds(elgate_stub.operations()) == ["open", "write", "fsync"]
    elgate_stub.forget()
    program.do(f"ack = elgate.append({str(directory / 'b')!r}, b'x')")
    assert kinds(elgate_stub.operations()) == ["open", "write"]
    program.do("ack.wait('durable')")
    assert kinds(elgate_stub.operations()) == ["open", "write", "fsync"]


@pytest.mark.parametrize("flush", ["group", "none", {"interval": "5ms"}])
def test_an_fsync_is_seen_in_every_flush_mode(
    elgate_stub: StubDaemon, tmp_path: Path, start: Start, flush: object
) -> None:
    elgate_stub.route("orders", f"{tmp_path}/**", flush=flush)
    program = opened(start, tmp_path / "a")
    program.do("os.write(fd, b'x')")
    assert kinds(elgate_stub.operations()) == ["open", "write"]
    program.do("os.fsync(fd); os.fsync(fd)")
    assert kinds(elgate_stub.operations()) == ["open", "write", "fsync", "fsync"]


def test_a_look_at_a_file_is_no_fsync(elgate_stub: StubDaemon, directory: Path, start: Start) -> None:
    path = directory / "a"
    writer, reader = opened(start, path), opened(start, path, "os.O_RDWR")
    writer.do("os.write(fd, b'one')")
    reader.do("os.write(fd, b'O'); assert os.fstat(fd).st_size == 3")  # others have it open: by way of the ring
    reader.do("assert os.pread(fd, 9, 0) == b'One'")
    assert "fsync" not in kinds(elgate_stub.operations())


def test_processes_and_threads_can_be_told_apart(elgate_stub: StubDaemon, directory: Path, start: Start) -> None:
    first, second = opened(start, directory / "a"), opened(start, directory / "b")
    first.do("os.write(fd, b'1')")
    second.do("import threading")
    second.do("t = threading.Thread(target=os.write, args=(fd, b'2')); t.start(); t.join()")
    one, two = elgate_stub.operations("write")
    assert (one.pid, one.thread) == (first.process.pid, first.process.pid)
    assert two.pid == second.process.pid and two.thread != second.process.pid


def test_names_and_files_that_go_native_are_recorded(elgate_stub: StubDaemon, directory: Path, start: Start) -> None:
    path, moved = directory / "a", directory / "b"
    program = opened(start, path, "os.O_RDWR | os.O_CREAT")
    program.do(f"os.write(fd, b'x'); os.rename({str(path)!r}, {str(moved)!r}); os.write(fd, b'y')")
    program.do(f"os.unlink({str(moved)!r})")
    # Who has a file open that loses its last name has it for itself.
    _, _, rename, write, native, unlink = elgate_stub.operations()
    assert (rename.kind, rename.path, rename.new_path) == ("rename", path, moved)
    assert (write.kind, write.path) == ("write", moved)
    assert (native.kind, unlink.kind, unlink.path) == ("native", "unlink", moved)
    program = opened(start, directory / "c", "os.O_RDWR | os.O_CREAT")
    program.do("import mmap; os.write(fd, b'x'); m = mmap.mmap(fd, 1)")
    assert kinds(elgate_stub.operations(path=directory / "c")) == ["open", "write", "native"]


def test_a_recording_that_is_full_says_so(elgate_stub: StubDaemon, directory: Path, start: Start) -> None:
    elgate_stub.record_at_most(4096)
    program = opened(start, directory / "a")
    program.do("for _ in range(4): os.write(fd, bytes(2000))")
    with pytest.raises(StubError, match=r"recording is full \(4096 bytes\): 3 operations are not in it"):
        elgate_stub.operations()
    elgate_stub.forget()
    program.do("os.write(fd, b'x')")
    assert kinds(elgate_stub.operations()) == ["write"]


def test_what_is_asked_for_must_be_a_kind_of_operation(elgate_stub: StubDaemon) -> None:
    with pytest.raises(ValueError, match="sync: no kind of operation; there are .* fsync"):
        elgate_stub.operations("sync")


# ---- what fails ---------------------------------------------------------------------------------------------------


def test_exactly_the_fsync_that_was_meant_fails(elgate_stub: StubDaemon, directory: Path, start: Start) -> None:
    program, other = opened(start, directory / "a"), opened(start, directory / "b")
    with elgate_stub.fault("fsync", errno.EIO, path=directory / "a", skip=1, times=2) as fault:
        other.do("os.write(fd, b'x'); os.fsync(fd)")
        program.do("os.write(fd, b'x')")
        results = [program.errno_of("os.fsync(fd)") for _ in range(5)]
        other.do("os.fsync(fd)")
        assert results == [0, errno.EIO, errno.EIO, 0, 0]
        assert fault.hits == 2
    failed = [operation.errno for operation in elgate_stub.operations("fsync", path=directory / "a")]
    assert failed == results
    assert fault.hits == 2


def test_an_fsync_that_failed_is_known_to_every_handle_of_the_file(
    elgate_stub: StubDaemon, directory: Path, start: Start
) -> None:
    first, second = opened(start, directory / "a"), opened(start, directory / "a")
    first.do("os.write(fd, b'x')")
    second.do("os.write(fd, b'x')")
    with elgate_stub.fault("fsync", errno.EIO, times=1):
        assert first.errno_of("os.fsync(fd)") == errno.EIO
        assert [second.errno_of("os.fsync(fd)") for _ in range(2)] == [errno.EIO, 0]
        assert first.errno_of("os.fsync(fd)") == 0


def test_the_write_that_was_meant_is_refused_by_its_target(
    elgate_stub: StubDaemon, directory: Path, start: Start
) -> None:
    path = directory / "a"
    program = opened(start, path)
    with elgate_stub.fault("write", errno.ENOSPC, skip=1) as fault:
        program.do("os.write(fd, b'one'); os.fsync(fd)")
        program.do("os.write(fd, b'two')")
        assert program.errno_of("os.fsync(fd)") == errno.ENOSPC
        # The file takes nothing until it is mended.
        assert program.errno_of("os.write(fd, b'never')") == errno.ENOSPC
        assert path.read_bytes() == b"one"
    assert fault.hits == 1
    # What was accepted is there, as soon as the fault is over.
    assert path.read_bytes() == b"onetwo"
    program.do("os.write(fd, b'three'); os.fsync(fd)")
    assert path.read_bytes() == b"onetwothree"
    writes = elgate_stub.operations("write")
    assert [(write.data, write.errno) for write in writes] == [(b"one", 0), (b"two", errno.ENOSPC), (b"three", 0)]


def test_a_write_that_is_refused_once_is_mended_by_itself(
    elgate_stub: StubDaemon, directory: Path, start: Start
) -> None:
    path = directory / "a"
    program = opened(start, path)
    with elgate_stub.fault("write", errno.EDQUOT, times=1):
        program.do("os.write(fd, b'one')")
        assert program.errno_of("os.fsync(fd)") == errno.EDQUOT
        wait_until(lambda: path.read_bytes() == b"one", "the file is mended")
        wait_until(lambda: program.errno_of("os.fsync(fd)") == 0, "it takes operations again")


def test_a_truncate_that_is_refused_says_so_at_once(elgate_stub: StubDaemon, directory: Path, start: Start) -> None:
    path = directory / "a"
    program = opened(start, path)
    program.do("os.write(fd, b'hello')")
    with elgate_stub.fault("truncate", errno.EIO):
        assert program.errno_of("os.ftruncate(fd, 2)") == errno.EIO
        assert path.read_bytes() == b"hello"
    assert path.read_bytes() == b"he"


def test_a_log_that_fails_fails_its_route_and_no_other(
    elgate_stub: StubDaemon, directory: Path, tmp_path_factory: pytest.TempPathFactory, start: Start
) -> None:
    elsewhere = tmp_path_factory.mktemp("other")
    elgate_stub.route("other", f"{elsewhere}/**")
    program, other = opened(start, directory / "a"), opened(start, elsewhere / "a")
    program.do("os.write(fd, b'x'); os.fsync(fd)")
    with elgate_stub.fault("log", errno.EIO, route="orders") as fault:
        assert program.errno_of("os.write(fd, b'y'); os.fsync(fd)") == errno.EIO
        assert program.errno_of("os.fsync(fd)") == errno.EIO
        other.do("os.write(fd, b'x'); os.fsync(fd)")
        wait_until(lambda: fault.hits >= 4, "the log is tried again and again")
    elgate_stub.daemon.wait_for_event("log_recovered")
    # What it has not been told yet of that time: once, however often the log was tried.
    assert program.errno_of("os.fsync(fd)") in (0, errno.EIO)
    program.do("os.fsync(fd)")
    assert (directory / "a").read_bytes() == b"xy"


@pytest.mark.parametrize(
    ("on_full", "flags", "result"), [("error", "0", errno.ENOSPC), ("block", "os.O_NONBLOCK", errno.EAGAIN)]
)
def test_a_route_whose_log_is_full_refuses_writes_at_once(
    elgate_stub: StubDaemon, tmp_path: Path, start: Start, on_full: str, flags: str, result: int
) -> None:
    elgate_stub.route("orders", f"{tmp_path}/**", on_full=on_full)
    path = tmp_path / "a"
    program = opened(start, path, f"os.O_WRONLY | os.O_CREAT | {flags}")
    program.do("os.write(fd, b'one')")
    with elgate_stub.full("orders"):
        assert program.errno_of("os.write(fd, b'two')") == result
        program.do("os.fsync(fd)")
    program.do("os.write(fd, b'three'); os.fsync(fd)")
    assert path.read_bytes() == b"onethree"


def test_a_route_whose_log_is_full_lets_writers_wait(elgate_stub: StubDaemon, directory: Path, start: Start) -> None:
    program = opened(start, directory / "a")
    program.do("os.write(fd, b'one')")
    with elgate_stub.full():
        program.begin("os.write(fd, b'two')")
        with pytest.raises(AssertionError, match="no answer"):
            program.answer(0.1)
    assert program.answer() == 0


def test_a_sync_of_the_target_that_fails_fails_the_file(elgate_stub: StubDaemon, directory: Path, start: Start) -> None:
    path = directory / "a"
    program = opened(start, path)
    program.do("os.write(fd, b'one'); os.fsync(fd)")
    with elgate_stub.fault("target_sync", errno.EIO) as fault:
        program.do("os.close(fd)")  # is synced after its last close
        fault.wait()
        elgate_stub.daemon.wait_for_event("target_sync_failed")
    assert path.read_bytes() == b"one"


def test_rules_that_cannot_be_are_refused(elgate_stub: StubDaemon) -> None:
    with pytest.raises(ValueError, match="'read' cannot fail; what can: write"):
        elgate_stub.fault("read", errno.EIO)
    with pytest.raises(ValueError, match="for its whole route"):
        elgate_stub.fault("log", errno.EIO, times=1)
    with pytest.raises(ValueError, match="must be absolute"):
        elgate_stub.fault("write", errno.EIO, path="a")
    with pytest.raises(ValueError, match="errno is 0"):
        elgate_stub.fault("write", 0)
    with pytest.raises(StubError, match="takes no other rule"):
        for _ in range(65):
            elgate_stub.fault("fsync", errno.EIO, path="/nowhere")


# ---- what stalls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["fsync", "write", "log"])
def test_nothing_is_acknowledged_while_it_stalls(
    elgate_stub: StubDaemon, directory: Path, start: Start, what: str
) -> None:
    program = opened(start, directory / "a")
    program.do("os.write(fd, b'before'); os.fsync(fd)")
    with elgate_stub.stall(what) as stall:
        program.begin("os.write(fd, b'one'); os.fsync(fd)")
        stall.wait()
        with pytest.raises(AssertionError, match="no answer"):
            program.answer(0.1)
        assert elgate_stub.operations("write")[-1].data == b"one"
    assert program.answer() == 0
    assert (directory / "a").read_bytes() == b"beforeone"


def test_a_daemon_that_is_frozen_answers_when_it_goes_on(
    elgate_stub: StubDaemon, directory: Path, start: Start
) -> None:
    program = opened(start, directory / "a")
    program.do("os.write(fd, b'before'); os.fsync(fd)")
    with elgate_stub.frozen():
        program.begin("os.write(fd, b'one'); os.fsync(fd)")
        with pytest.raises(AssertionError, match="no answer"):
            program.answer(0.2)
    assert program.answer() == 0


# ---- death and return ---------------------------------------------------------------------------------------------


def test_what_was_accepted_is_done_by_the_next_daemon_and_seen_once(
    elgate_stub: StubDaemon, directory: Path, start: Start
) -> None:
    path = directory / "a"
    program = opened(start, path, "os.O_WRONLY | os.O_CREAT | os.O_APPEND")
    program.do("os.write(fd, b'0'); os.fsync(fd)")
    for number in range(1, 6):
        program.do(f"os.write(fd, b'{number}')")  # accepted, and perhaps no more
        with elgate_stub.dead():
            program.begin("os.fsync(fd)")
        assert program.answer() == 0
    assert path.read_bytes() == b"012345"
    assert b"".join(write.data for write in elgate_stub.operations("write")) == b"012345"
    program.do("os.close(fd)")
    wait_until(lambda: not os.listxattr(path), "the mark is taken off")


def test_rules_outlive_the_daemon(elgate_stub: StubDaemon, directory: Path, start: Start) -> None:
    program = opened(start, directory / "a")
    program.do("os.write(fd, b'x')")
    with elgate_stub.fault("fsync", errno.EIO, skip=1, times=1) as fault:
        program.do("os.fsync(fd)")
        # A daemon that dies before it has let go of what it answered does it once more.
        assert kinds(elgate_stub.operations()) == ["open", "write", "fsync"]
        with elgate_stub.dead():
            assert fault.hits == 0
        assert program.errno_of("os.fsync(fd)") == errno.EIO
        program.do("os.fsync(fd)")


def test_a_program_without_its_daemon_waits_for_it(elgate_stub: StubDaemon, directory: Path, start: Start) -> None:
    program = opened(start, directory / "a")
    program.do("os.write(fd, b'x'); os.fsync(fd)")
    elgate_stub.kill()
    program.begin("os.write(fd, b'y'); os.fsync(fd)")
    with pytest.raises(AssertionError, match="no answer"):
        program.answer(0.2)
    assert kinds(elgate_stub.operations())[-1] in ("fsync", "write")
    elgate_stub.start()
    assert program.answer() == 0


# ---- that it cannot be taken for the real thing, and leaves nothing behind ----------------------------------------


def test_no_file_stays_marked_whatever_becomes_of_program_and_daemon(tmp_path: Path) -> None:
    path = tmp_path / "files" / "a"
    path.parent.mkdir()
    stub = StubDaemon(tmp_path / "stub")
    try:
        stub.route("files", f"{path.parent}/**")
        with Program(stub.daemon) as program:
            program.do(f"fd = os.open({str(path)!r}, os.O_WRONLY | os.O_CREAT); os.write(fd, b'x'); os.fsync(fd)")
            assert os.listxattr(path) == ["user.elgate"]
            stub.kill()
            stub.close()  # while the program has it open
            assert os.listxattr(path) == []
    finally:
        stub.daemon.close()
    assert not (tmp_path / "stub" / "wal.stub").exists()
    assert not stub.daemon.socket.parent.exists()
    assert not list(Path("/dev/shm").glob(f"{stub.daemon.ring_path.name}*"))


def test_what_this_process_cannot_give_back_does_not_keep_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import elgate
    import elgate._native

    monkeypatch.delenv("ELGATE_SOCKET", raising=False)
    stub = StubDaemon(tmp_path)
    stub.serve_this_process()
    assert os.environ["ELGATE_SOCKET"] == str(stub.socket)

    def cannot() -> None:
        raise OSError(errno.EIO, "a file cannot go native")

    monkeypatch.setattr(elgate, "unpatch_all", cannot)
    with pytest.raises(OSError, match="cannot go native"):
        stub.close()
    assert "ELGATE_SOCKET" not in os.environ
    assert stub.daemon.events("stopped")[-1]["drained"] is True
    assert not stub.socket.parent.exists()


def test_it_says_loudly_that_it_keeps_nothing(elgate_stub: StubDaemon, directory: Path, start: Start) -> None:
    (said,) = elgate_stub.daemon.events("test_stub")
    assert said["level"] == "warning" and "NOTHING THAT IT SERVES IS DURABLE" in said["reason"]
    start().do("assert elgate.status()['test_stub'] == 1")
    status = subprocess.run(
        [Path(sys.executable).with_name("elgate"), "status"],
        env=elgate_stub.environment(),
        text=True,
        capture_output=True,
    )
    assert "TEST STUB" in status.stdout and "nothing is durable" in status.stdout, status


def test_it_leaves_a_real_daemons_ring_log_and_files_alone(elgate_daemon: ChildDaemon) -> None:
    path = elgate_daemon.route_dir / "a"
    with Program(elgate_daemon) as program:
        program.do(f"fd = os.open({str(path)!r}, os.O_WRONLY | os.O_CREAT); os.write(fd, b'x'); os.fsync(fd)")
        elgate_daemon.kill()
    before = {file: file.read_bytes() for file in elgate_daemon.wal_dir.rglob("*") if file.is_file()}
    ring = elgate_daemon.ring_path.read_bytes()
    text = elgate_daemon.config_path.read_text()
    elgate_daemon.config_path.write_text(text + "runtime: {mode: test_stub}\n")
    elgate_daemon.start()
    with Program(elgate_daemon) as program:
        # The real log may hold more for it.
        assert program.errno_of(f"fd = os.open({str(path)!r}, os.O_WRONLY); os.write(fd, b'y')") == errno.EBUSY
    assert elgate_daemon.stop() == 0
    assert {file: file.read_bytes() for file in elgate_daemon.wal_dir.rglob("*") if file.is_file()} == before
    assert elgate_daemon.ring_path.read_bytes() == ring
    elgate_daemon.config_path.write_text(text)
    elgate_daemon.start()
    assert path.read_bytes() == b"x"


def test_a_stub_can_be_attached_to(elgate_stub: StubDaemon, directory: Path, start: Start) -> None:
    other = Stub(elgate_stub.socket)
    program = opened(start, directory / "a")
    with other.fault("fsync", errno.EIO, times=1):
        program.do("os.write(fd, b'x')")
        assert program.errno_of("os.fsync(fd)") == errno.EIO
    assert kinds(other.operations()) == ["open", "write", "fsync"]
    other.close()
    program.do("os.fsync(fd)")


def test_there_must_be_a_stub_to_attach_to(elgate_daemon: ChildDaemon) -> None:
    with pytest.raises(StubError, match="no test stub serves .*runtime: {mode: test_stub}"):
        Stub(elgate_daemon.socket)


# ---- the fixture, in a pytest of its own --------------------------------------------------------------------------


def run_pytest(directory: Path, source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (directory / "test_it.py").write_text(textwrap.dedent(source))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, "test_it.py"],
        cwd=directory, text=True, capture_output=True, check=False, timeout=100,
    )  # fmt: skip


IN_PROCESS = """
    import errno, os
    import pytest

    @pytest.mark.parametrize("number", range(4))
    def test_in_this_process(elgate_stub, tmp_path, number):
        elgate_stub.route("orders", f"{tmp_path}/**")
        elgate_stub.patch()
        path = tmp_path / "orders.log"
        with open(path, "ab") as file:
            file.write(b"one")
            file.flush()
            os.fsync(file.fileno())
            assert [str(o).split()[0] for o in elgate_stub.operations()] == ["open", "write", "fsync"]
            with elgate_stub.fault("fsync", errno.EIO, times=1), pytest.raises(OSError) as raised:
                os.fsync(file.fileno())
            assert raised.value.errno == errno.EIO
            with elgate_stub.dead():
                file.write(b"two")
                file.flush()
            os.fsync(file.fileno())
        assert elgate_stub.operations()[-1].kind == "close"
        assert elgate_stub.operations("open")[0].pid == os.getpid()
        assert path.read_bytes() == b"onetwo"

    def test_that_leaves_a_file_open(elgate_stub, tmp_path):
        elgate_stub.route("orders", f"{tmp_path}/**")
        elgate_stub.patch()
        global left, left_path
        left_path = tmp_path / "left"
        left = os.open(left_path, os.O_WRONLY | os.O_CREAT)
        os.write(left, b"x")
        other = os.open(left_path, os.O_WRONLY)
        os.write(other, b"x")
        with elgate_stub.fault("fsync", errno.EIO, times=1), pytest.raises(OSError):
            os.fsync(other)  # which the first one has not been told yet
        elgate_stub.kill()
        assert "a test may fail" == 0

    def test_that_comes_behind():
        assert os.write is os.__dict__["write"] and "elgate" not in repr(os.write)
        assert "ELGATE_SOCKET" not in os.environ
        assert os.listxattr(left_path) == []
        os.write(left, b"y")
        os.close(left)
        assert left_path.read_bytes() == b"xy"
"""


def test_the_fixture_serves_its_own_process_and_cleans_up_behind_it(tmp_path: Path) -> None:
    environment = os.environ.copy()
    result = run_pytest(tmp_path, IN_PROCESS, "-q")
    assert "1 failed, 5 passed in " in result.stdout, result.stdout + result.stderr
    assert "elgate_stub: /" in result.stdout
    assert not list(Path("/dev/shm").glob("elgate_ring-pytest-*.stub")) or environment.get("PYTEST_XDIST_WORKER")


LEFT_BEHIND = """
    import os, signal

    def test_that_kills_its_process(elgate_stub, tmp_path):
        elgate_stub.route("orders", f"{tmp_path}/**")
        elgate_stub.patch()
        file = os.open(tmp_path / "left", os.O_WRONLY | os.O_CREAT)
        os.write(file, b"x")
        os.fsync(file)
        daemon = elgate_stub.daemon
        print("daemon", daemon.pid, daemon.directory, daemon.socket.parent, tmp_path / "left", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_stub_ends_with_the_process_that_it_was_for(tmp_path: Path) -> None:
    result = run_pytest(tmp_path, LEFT_BEHIND, "-q", "-s")
    assert result.returncode == -signal.SIGKILL, result.stdout + result.stderr
    _, pid, directory, sockets, left = result.stdout[result.stdout.index("daemon ") :].split()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the daemon has ended")
    assert not (Path(directory) / "wal.stub").exists() and not Path(sockets).exists()
    assert os.listxattr(left) == []


def test_an_fsync_that_its_program_has_to_send_again_is_one(elgate_stub: StubDaemon, directory: Path) -> None:
    barrier = ENUMERATIONS["SlotHeader.operation"]["barrier"]
    with RawClient(elgate_stub.socket) as client, elgate_stub.fault("fsync", errno.EIO) as fault:
        client.hello()
        client.attach()
        client.register(directory / "a")
        passed = client.put(b"", commit=False, operation=barrier)
        client.put(b"behind")
        assert kinds(elgate_stub.operations()) == ["open", "write"]
        client.set_word(passed, "committed_passed", 1)
        client.ring_doorbell()
        wait_until(lambda: client.lap(passed) != passed // SLOTS, "its slot is given back")
        client.put(b"", operation=barrier)
        assert kinds(elgate_stub.operations()) == ["open", "write", "fsync"]
        assert fault.hits == 1


def test_an_operation_that_two_daemons_meet_is_one(elgate_stub: StubDaemon, directory: Path) -> None:
    barrier = ENUMERATIONS["SlotHeader.operation"]["barrier"]
    with RawClient(elgate_stub.socket) as client, elgate_stub.fault("fsync", errno.EIO) as fault:
        client.hello()
        client.attach()
        client.register(directory / "a")
        client.put(b"x")
        position = client.put(b"", operation=barrier)
        expected = elgate_stub.operations()
        assert kinds(expected) == ["open", "write", "fsync"]
        elgate_stub.kill()
        # As if it had died before it gave the slot back.
        client.set_word(position, "committed", 1)
        RING["Header"].set(client.ring, 0, "tail", position)
        elgate_stub.start()
        assert elgate_stub.operations() == expected
        assert fault.hits == 1


def test_an_fsync_that_threads_make_it_send_again_counts_once(
    elgate_stub: StubDaemon, directory: Path, start: Start
) -> None:
    program = opened(start, directory / "a", "os.O_WRONLY | os.O_CREAT | os.O_APPEND")
    program.do("import threading; failed = []; calls = [lambda: os.write(fd, b'x'), lambda: os.fsync(fd)]")
    program.do(
        "exec('def work():\\n for call in 100 * calls:\\n  try: call()\\n"
        "  except OSError as error: failed.append(error.errno)')"
    )

    def run_threads() -> None:
        program.do("threads = [threading.Thread(target=work) for _ in range(4)]")
        program.do("for thread in threads: thread.start()")
        program.do("for thread in threads: thread.join()")

    run_threads()
    assert len(elgate_stub.operations("write")) == 400
    # One that the daemon has passed is sent again: that makes no two of it.
    assert 53 <= len(elgate_stub.operations("fsync")) <= 400
    elgate_stub.forget()
    with elgate_stub.fault("fsync", errno.EIO, skip=50, times=3) as fault:
        run_threads()
        assert fault.hits == 3
    assert sum(fsync.errno != 0 for fsync in elgate_stub.operations("fsync")) == 3
    # What one thread's fsync has met, the next call of any of them may be told.
    program.do(f"assert 1 <= len(failed) <= 3 and set(failed) == {{{errno.EIO}}}, failed")


def test_the_example_of_the_documentation_works(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "testing.md").read_text()
    example = text.partition("```python\n")[2].partition("```")[0]
    count = example.count("\ndef test_")
    result = run_pytest(tmp_path, example, "-q", "-W", "error")
    assert count >= 5 and f"{count} passed" in result.stdout, result.stdout + result.stderr


SIDE_BY_SIDE = """
    import os, subprocess, sys
    import pytest

    PROGRAM = "import elgate, os; assert elgate.patch_all(); f = os.open('a', os.O_WRONLY | os.O_CREAT); os.write(f, b'x'); os.fsync(f)"

    @pytest.mark.parametrize("number", range(6))
    def test_with_a_program(elgate_stub, tmp_path, number):
        elgate_stub.route("orders", f"{tmp_path}/**")
        subprocess.run([sys.executable, "-c", PROGRAM], check=True, cwd=tmp_path)
        # What the end of the program says comes in a message of its own.
        assert [operation.kind for operation in elgate_stub.operations()][:3] == ["open", "write", "fsync"]
"""


def test_stubs_stand_side_by_side(tmp_path: Path) -> None:
    result = run_pytest(tmp_path, SIDE_BY_SIDE, "-q", "-n", "2")
    assert "6 passed" in result.stdout, result.stdout + result.stderr
