"""Processes that read what others write: what a write has returned for, every look at the file shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[..., Any]

COUNTERS = {
    "pread and pwrite": """
fd = os.open(path, os.O_RDWR)
def increment():
    count = int(os.pread(fd, 20, 0))
    assert os.pwrite(fd, b"%020d" % (count + 1), 0) == 20
""",
    "a file that stays open": """
file = open(path, "r+b", 0)
def increment():
    file.seek(0)
    count = int(file.read(20))
    file.seek(0)
    file.write(b"%020d" % (count + 1))
""",
    "a reader beside the writer": """
reader, writer = open(path, "rb", 0), open(path, "r+b", 0)
def increment():
    reader.seek(0)
    count = int(reader.read(20))
    writer.seek(0)
    writer.write(b"%020d" % (count + 1))
""",
    "open, read, write": """
def increment():
    with open(path) as file:
        count = int(file.read())
    with open(path, "r+") as file:
        file.write("%020d" % (count + 1))
""",
    "the size": """
fd = os.open(path, os.O_WRONLY)
def increment():
    os.pwrite(fd, b"x", os.fstat(fd).st_size)
""",
    "the end": """
fd = os.open(path, os.O_RDWR)
def increment():
    os.lseek(fd, 0, os.SEEK_END)
    os.write(fd, b"x")
""",
    "the size by its path": """
fd = os.open(path, os.O_WRONLY)
def increment():
    os.pwrite(fd, b"x", os.stat(path).st_size)
""",
}

LOCKS = {
    "multiprocessing": "lock = context.Lock()",
    "flock": """
class Lock:
    def __enter__(self):
        self.fd = os.open(path + "-lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(self.fd, fcntl.LOCK_EX)
    def __exit__(self, *exception):
        os.close(self.fd)
lock = Lock()
""",
}


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("counter", COUNTERS)
def test_processes_that_count_in_a_file_under_a_lock_miss_nothing(
    counter: str, lock: str, run_python: Run, elgate_daemon: Any
) -> None:
    path = elgate_daemon.route_dir / "counter"
    path.write_text("" if "x" in COUNTERS[counter] else f"{0:020}")
    # The lock file is on no route: a lock on a routed file waits for what is pending anyway.
    locks = LOCKS[lock].replace('path + "-lock"', repr(str(elgate_daemon.directory / "lock")))
    run_python(
        f"""
import fcntl, multiprocessing, os, elgate
assert elgate.patch_all()
path = {str(path)!r}
context = multiprocessing.get_context("fork")
{locks}
def work(barrier):
{_indented(COUNTERS[counter])}
    barrier.wait()
    for _ in range(200):
        with lock:
            increment()
    assert elgate.status()["native_fallbacks"] == 0

barrier = context.Barrier(3)
children = [context.Process(target=work, args=(barrier,)) for _ in range(3)]
[child.start() for child in children]
[child.join() for child in children]
assert [child.exitcode for child in children] == [0, 0, 0]
""",
        env=elgate_daemon.env(),
    )
    text = path.read_text()
    assert (len(text) if "x" in text else int(text)) == 600


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


LOOKS = {
    "read": "os.lseek(fd, 0, os.SEEK_SET) == 0 and len(os.read(fd, 1 << 20)) == size",
    "pread": "len(os.pread(fd, 1 << 20, 0)) == size",
    "fstat": "os.fstat(fd).st_size == size",
    "lseek": "os.lseek(fd, 0, os.SEEK_END) == size",
    "a file object": "file.seek(0) == 0 and len(file.read()) == size",
    "stat": "os.stat(path).st_size == size",
    "an open": "len(open(path, 'rb').read()) == size",
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_process_that_only_reads_sees_what_another_has_written(
    look: str, run_python: Run, elgate_daemon: Any
) -> None:
    """The daemon is held for a moment between write and look: without a wait, the look would come too early."""
    path = elgate_daemon.route_dir / "file"
    run_python(
        f"""
        import os, signal, elgate
        assert elgate.patch_all()
        path = {str(path)!r}

        def state_of(pid):
            with elgate.original("builtins.open")(f"/proc/{{pid}}/stat") as status:
                return status.read().rpartition(")")[2].split()[0]

        to_writer, to_reader = os.pipe(), os.pipe()
        if os.fork() == 0:
            os.close(to_writer[1])  # so that it ends with the reader
            writer = os.open(path, os.O_WRONLY | os.O_CREAT)
            for turn in range(21):
                if turn == 20:
                    os.kill({elgate_daemon.pid}, signal.SIGSTOP)
                    while state_of({elgate_daemon.pid}) != "T":
                        pass
                os.write(writer, b"x" * 1000)
                os.write(to_reader[1], b"!")
                if not os.read(to_writer[0], 1):
                    break
            os._exit(0)
        os.read(to_reader[0], 1)
        fd = os.open(path, os.O_RDONLY)
        file = open(path, "rb", 0)
        for turn in range(20):
            size = (turn + 1) * 1000
            assert {LOOKS[look]}, turn
            os.write(to_writer[1], b"!")
            os.read(to_reader[0], 1)
        size = 21_000
        go_on = os.fork()
        if go_on == 0:
            while state_of(os.getppid()) not in "SZ":
                pass
            os.kill({elgate_daemon.pid}, signal.SIGCONT)
            elgate.original("os._exit")(0)
        assert {LOOKS[look]}
        """,
        env=elgate_daemon.env(),
    )


def test_a_process_that_is_alone_with_its_file_reads_it_without_a_daemon(run_python: Run, elgate_daemon: Any) -> None:
    path = elgate_daemon.route_dir / "file"
    result = run_python(
        f"""
        import os, signal, elgate
        assert elgate.patch_all()
        fd = os.open({str(path)!r}, os.O_RDWR | os.O_CREAT)
        os.write(fd, b"hello")
        assert os.pread(fd, 10, 0) == b"hello"
        os.kill({elgate_daemon.pid}, signal.SIGKILL)
        assert os.pread(fd, 10, 0) == b"hello"
        """,
        env={**elgate_daemon.env(), "ELGATE_RECONNECT_TIMEOUT_MS": "100"},
    )
    assert result.stderr == ""


def test_a_look_is_answered_with_the_error_of_what_cannot_be_shown(run_python: Run, elgate_daemon: Any) -> None:
    path = elgate_daemon.route_dir / "file"
    result = run_python(
        f"""
        import os, signal, elgate
        assert elgate.patch_all()
        path = {str(path)!r}
        with open(path, "wb") as file:
            file.write(b"hello")
        writer = os.open(path, os.O_WRONLY)
        os.pwrite(writer, b"H", 0)
        os.fsync(writer)
        to_child, to_parent = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            fd = os.open(path, os.O_RDONLY)
            os.close(writer)
            assert os.pread(fd, 10, 0) == b"Hello"
            os.write(to_parent[1], b"!")
            os.read(to_child[0], 1)
            try:
                os.pread(fd, 10, 0)
            except OSError as error:
                print(error.errno, flush=True)
            os._exit(0)
        os.read(to_parent[0], 1)
        os.kill({elgate_daemon.pid}, signal.SIGKILL)
        os.write(to_child[1], b"!")
        os.waitpid(child, 0)
        """,
        env={**elgate_daemon.env(), "ELGATE_RECONNECT_TIMEOUT_MS": "100"},
    )
    assert result.stdout == "5\n"
