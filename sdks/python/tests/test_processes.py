"""Signals, forks, threads, and the end of a process."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.mark.parametrize("kind", ["buffered", "text", "random"])
def test_a_signal_handler_that_raises_never_doubles_what_is_written(
    kind: str, run_python: Run, elgate_daemon: Any
) -> None:
    """BufferedWriter forgets what it has handed over by the count that write returns: see _file.py."""
    path = elgate_daemon.route_dir / "file"
    seed = random.randrange(1 << 32)
    print("seed", seed)
    arguments = {"buffered": "'wb', 64", "text": "'w', 64", "random": "'w+b', 64"}[kind]
    run_python(
        f"""
        import random, signal, elgate
        assert elgate.patch_all()
        dice = random.Random({seed})

        class Interrupt(Exception):
            pass

        raised = 0

        def handler(number, frame):
            global raised
            raised += 1
            raise Interrupt

        signal.signal(signal.SIGALRM, handler)
        file = open({str(path)!r}, {arguments})
        number = 0

        def until_interrupted():
            global number
            signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-5, 3e-4))
            for _ in range(100_000):
                line = "%09d\\n" % number
                number += 1
                file.write(line if "b" not in file.mode else line.encode())
                if dice.random() < 0.3:
                    file.flush()
            raise AssertionError("an exception of the handler has been swallowed")

        while raised < 400:
            try:
                until_interrupted()
            except Interrupt:
                pass
        signal.setitimer(signal.ITIMER_REAL, 0)
        file.close()
        """,
        env=elgate_daemon.env(),
    )
    lines = path.read_bytes().splitlines(keepends=True)
    assert all(len(line) == 10 for line in lines)
    numbers = [int(line) for line in lines]
    assert numbers == sorted(set(numbers)), "a record twice, or out of order"


WAITS = {
    "fsync": "os.fsync(file.fileno())",
    "read": "os.pread(file.fileno(), 10, 0)",
    "full ring": "while True: file.write(b'%0100000d\\n' % next(number))",
    "close": "file.close()",
    "large write": "file.write(bytes(2 << 20))",
    "ack": "elgate.append({path!r}, b'').wait('durable')",
}


@pytest.mark.parametrize("wait", WAITS)
def test_a_wait_ends_when_a_signal_handler_raises(wait: str, run_python: Run, elgate_daemon: Any) -> None:
    """Whatever is waited for: here a daemon that is stopped, and that goes on when the handler has run."""
    path = elgate_daemon.route_dir / "file"
    run_python(
        STOPPED_DAEMON.format(pid=elgate_daemon.pid)
        + f"""
import contextlib, itertools, elgate
assert elgate.patch_all()
elgate.append({str(path)!r}, b"")
number = itertools.count(1)
file = open({str(path)!r}, "r+b", buffering=0)
file.write(b"%0100000d\\n" % 0)
os.fsync(file.fileno())

class Interrupt(Exception):
    pass

calls = 0
def handler(signum, frame):
    global calls
    assert state_of({elgate_daemon.pid}) == "T"
    calls += 1
    if calls == 4:
        raise Interrupt  # the first ones let the wait go on

signal.signal(signal.SIGALRM, handler)
stop_daemon()
file.write(b"%0100000d\\n" % next(number))
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
try:
    {WAITS[wait].format(path=str(path))}
except Interrupt:
    pass
else:
    raise AssertionError("it did not wait, or swallowed the exception")
finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.kill({elgate_daemon.pid}, signal.SIGCONT)
written = next(number)
with contextlib.suppress(ValueError):  # the one that was closed
    os.fsync(file.fileno())
elgate.close()
lines = open({str(path)!r}, "rb").read().splitlines()
assert all(len(line) == 100000 for line in lines)
# The one whose write was interrupted is not in it, and never counted.
assert [int(line[-9:]) for line in lines] == list(range(written - ({wait!r} == "full ring"))), (written, len(lines))
""",
        env=elgate_daemon.env(),
    )


def test_signals_do_not_prolong_the_wait_for_a_daemon_that_is_gone(run_python: Run, elgate_daemon: Any) -> None:
    path = elgate_daemon.route_dir / "file"
    run_python(
        f"""
        import os, signal, elgate
        assert elgate.patch_all()
        file = open({str(path)!r}, "wb", buffering=0)
        file.write(b"before")
        os.kill({elgate_daemon.pid}, signal.SIGKILL)
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        try:
            os.fsync(file.fileno())
        except OSError as error:
            assert error.errno == 5, error
        else:
            raise AssertionError("durable, without a daemon")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        """,
        env={**elgate_daemon.env(), "ELGATE_RECONNECT_TIMEOUT_MS": "1000"},
    )


ENDINGS = {
    "closed": "file.close()",
    "not closed": "",
    "held by a module": "import json; json.file = file",
    "held by builtins": "import builtins; builtins.file = file",
    "held by sys": "import sys; sys.file = file",
    "in a cycle": "cycle = [file]; cycle.append(cycle); del file, cycle",
    "held by a function": "def holder(): return file\nimport json; json.holder = holder",
    "sys.stdout": "import sys; sys.stdout = file",
    "sys.exit": "import sys; sys.exit(0)",
    "exit handler": "import atexit; atexit.register(file.write, '')",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_buffered_at_the_end_of_a_process_arrives_as_it_would(
    ending: str, run_python: Run, elgate_daemon: Any
) -> None:
    written = []
    native_path = elgate_daemon.directory / "native"
    for path, extra in ((native_path, {"ELGATE_DISABLE": "1"}), (elgate_daemon.route_dir / "file", {})):
        run_python(
            f"""
import elgate
elgate.patch_all()
file = open({str(path)!r}, "w")
file.write("in the buffer")
{ENDINGS[ending]}
""",
            env={**elgate_daemon.env(), **extra},
        )
        written.append(path.read_text())
    if ending != "in a cycle":  # where the native file may be finalized before the layers over it are flushed
        assert written[0] == "in the buffer"
    assert written[1] == "in the buffer"


def test_the_next_program_sees_everything(run_python: Run, elgate_daemon: Any) -> None:
    """Also what was written through descriptors that nobody closed: the end of a process is a close."""
    path = elgate_daemon.route_dir / "file"
    for number in range(5):
        run_python(
            f"""
            import os, elgate
            elgate.patch_all()
            fd = os.open({str(path)!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            for turn in range(1000):
                os.write(fd, b"{number}:%03d\\n" % turn)
            """,
            env=elgate_daemon.env(),
        )
        assert path.stat().st_size == (number + 1) * 6000


def test_close_waits_until_others_can_read(run_python: Run, elgate_daemon: Any) -> None:
    path = elgate_daemon.route_dir / "file"
    run_python(
        f"""
        import os, elgate
        elgate.patch_all()
        native_open, native_stat = elgate.original("builtins.open"), elgate.original("os.stat")
        for number in range(50):
            with open({str(path)!r}, "w") as file:
                file.write("x" * number)
            assert native_stat({str(path)!r}).st_size == number
            fd = os.open({str(path)!r}, os.O_WRONLY | os.O_APPEND)
            os.write(fd, b"y")
            os.close(fd)
            with native_open({str(path)!r}) as reader:
                assert reader.read() == "x" * number + "y"
        """,
        env=elgate_daemon.env(),
    )


def test_children_of_a_threaded_program_start_anew(run_python: Run, elgate_daemon: Any) -> None:
    run_python(
        f"""
        import os, threading, elgate
        assert elgate.patch_all()
        directory = {str(elgate_daemon.route_dir)!r}
        stop = threading.Event()

        def churn(number):
            while not stop.is_set():
                with open(f"{{directory}}/churn-{{number}}", "w") as file:
                    file.write("x")

        threads = [threading.Thread(target=churn, args=(number,)) for number in range(2)]
        [thread.start() for thread in threads]
        try:
            for number in range(10):
                child = os.fork()
                if child == 0:
                    try:
                        with open(f"{{directory}}/child-{{number}}", "w") as file:
                            file.write("child")
                        assert elgate.status()["connected"] == 1
                        os._exit(0)
                    finally:
                        os._exit(1)
                assert os.waitpid(child, 0)[1] == 0
                assert open(f"{{directory}}/child-{{number}}").read() == "child"
        finally:
            stop.set()
            [thread.join() for thread in threads]
        """,
        env=elgate_daemon.env(),
    )


def test_a_killed_program_loses_nothing_it_has_written(run_python: Run, elgate_daemon: Any) -> None:
    path = elgate_daemon.route_dir / "file"
    result = run_python(
        f"""
        import os, elgate
        elgate.patch_all()
        file = open({str(path)!r}, "wb", 0)
        for number in range(1000):
            file.write(b"%03d\\n" % number)
        os.fsync(file.fileno())
        print("synced", flush=True)
        os.kill(os.getpid(), 9)
        """,
        env=elgate_daemon.env(),
        code=-9,
    )
    assert result.stdout == "synced\n"
    assert path.read_bytes() == b"".join(b"%03d\n" % number for number in range(1000))


def test_a_daemon_that_comes_back_is_found_again(run_python: Run, elgate_daemon: Any) -> None:
    path = elgate_daemon.route_dir / "file"
    result = run_python(
        f"""
        import os, signal, sys, elgate
        assert elgate.patch_all()
        file = open({str(path)!r}, "wb", 0)
        file.write(b"before,")
        os.fsync(file.fileno())
        os.kill({elgate_daemon.process.pid}, signal.SIGKILL)
        try:
            file.write(b"without,")
            os.fsync(file.fileno())
        except OSError as error:
            print(type(error).__name__, error.errno)
        try:
            file.close()
        except OSError as error:
            print("close", error.errno)
        assert file.closed
        """,
        env={**elgate_daemon.env(), "ELGATE_RECONNECT_TIMEOUT_MS": "100"},
    )
    assert result.stdout.startswith("OSError 5\n")
    elgate_daemon.start()
    run_python(
        f"""
        import os, elgate
        assert elgate.patch_all()
        with open({str(path)!r}, "ab") as file:
            os.fsync(file.fileno())
            file.write(b"again")
        """,
        env=elgate_daemon.env(),
    )
    # What was accepted before the daemon died is applied by the next one.
    assert Path(path).read_bytes() in (b"before,without,again", b"before,again")


# A daemon that is stopped applies nothing: what a child has written is not in the file when it is at its end, and not
# only by chance. It goes on once the child waits for it, or is gone without.
STOPPED_DAEMON = """
import os, signal
def state_of(pid):
    return open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()[0]
def stop_daemon():
    os.kill({pid}, signal.SIGSTOP)
    while state_of({pid}) != "T":
        pass
def go_on_when_awaited_by(child):
    while (state := state_of(child)) not in "SZ":
        pass
    if state == "S":
        os.kill({pid}, signal.SIGCONT)
"""


def test_who_waits_for_a_worker_of_multiprocessing_sees_what_it_has_logged(run_python: Run, elgate_daemon: Any) -> None:
    path = elgate_daemon.route_dir / "log"
    run_python(
        STOPPED_DAEMON.format(pid=elgate_daemon.pid)
        + f"""
import logging, multiprocessing, elgate
assert elgate.patch_all()
context = multiprocessing.get_context("fork")
def work(ready, go, done):
    logger = logging.getLogger("worker")
    logger.addHandler(logging.FileHandler({str(path)!r}))
    logger.error("first")  # registers the file
    ready.set()
    go.wait()
    logger.error("second")
    done.set()

events = [context.Event() for _ in range(3)]
child = context.Process(target=work, args=events)
child.start()
ready, go, done = events
ready.wait()
stop_daemon()
go.set()
done.wait()
go_on_when_awaited_by(child.pid)
child.join()
assert child.exitcode == 0
assert open({str(path)!r}).read() == "first\\nsecond\\n"
""",
        env=elgate_daemon.env(),
    )


def test_who_waits_for_a_child_that_ends_by_exit_sees_what_it_has_written(run_python: Run, elgate_daemon: Any) -> None:
    path = elgate_daemon.route_dir / "file"
    run_python(
        STOPPED_DAEMON.format(pid=elgate_daemon.pid)
        + f"""
import elgate
assert elgate.patch_all()
fd = os.open({str(path)!r}, os.O_RDWR | os.O_CREAT)
child = os.fork()
if child == 0:
    os.write(fd, b"first,")
    stop_daemon()
    os.write(fd, b"second")
    os._exit(7)
while state_of({elgate_daemon.pid}) != "T":
    pass
go_on_when_awaited_by(child)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert elgate.original("os.pread")(fd, 100, 0) == b"first,second"
try:
    os._exit("no number")
except TypeError:
    os._exit(0)
""",
        env=elgate_daemon.env(),
    )


def test_an_exit_at_once_does_not_wait_for_a_daemon_that_is_gone(run_python: Run, elgate_daemon: Any) -> None:
    path = elgate_daemon.route_dir / "file"
    began = time.monotonic()
    run_python(
        f"""
        import os, signal, elgate
        from elgate import _hooks
        assert elgate.patch_all() and _hooks._EXIT_LIMIT_MS == 5000
        _hooks._EXIT_LIMIT_MS = 200
        fd = os.open({str(path)!r}, os.O_RDWR | os.O_CREAT)
        os.write(fd, b"first,")
        os.kill({elgate_daemon.pid}, signal.SIGKILL)
        os.write(fd, b"second")
        os._exit(3)
        """,
        env={**elgate_daemon.env(), "ELGATE_RECONNECT_TIMEOUT_MS": "60000"},
        code=3,
    )
    assert time.monotonic() - began < 30
    elgate_daemon.start()
    elgate_daemon.stop()
    assert path.read_bytes() == b"first,second"


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the user needs root")
@pytest.mark.parametrize("fallback", ["passthrough", "fail"])
def test_a_child_that_becomes_a_user_who_is_not_served_goes_on_natively(
    fallback: str, run_python: Run, elgate_daemon: Any
) -> None:
    directory = elgate_daemon.route_dir
    for path in (directory, directory.parent):
        path.chmod(0o755)
    result = run_python(
        f"""
        import os, sys, time, elgate
        assert elgate.patch_all()
        directory = {str(directory)!r}
        fresh = os.open(directory + "/fresh", os.O_WRONLY | os.O_CREAT)
        marked = os.open(directory + "/marked", os.O_WRONLY | os.O_CREAT)
        os.chmod(directory + "/marked", 0o666)
        os.mkdir(directory + "/own")
        os.chown(directory + "/own", 65534, 65534)
        os.write(marked, b"parent")
        def outcome(function, *arguments):
            try:
                return function(*arguments)
            except OSError as error:
                return error.errno
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            print(outcome(os.write, fresh, b"child"))
            print(outcome(os.write, fresh, b"child"))
            print(outcome(os.write, marked, b"child"))
            print(outcome(os.open, directory + "/marked", os.O_WRONLY))
            print(outcome(lambda: os.write(os.open(directory + "/own/file", os.O_WRONLY | os.O_CREAT), b"mine")))
            print(elgate.status()["native_fallbacks"] > 0)
            sys.stdout.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        os.write(marked, b"parent")
        """,
        # Longer than anybody waits for this test.
        env={**elgate_daemon.env(), "ELGATE_FALLBACK": fallback, "ELGATE_RECONNECT_TIMEOUT_MS": "600000"},
    )
    if fallback == "fail":
        assert result.stdout.split() == ["5", "5", "5", "5", "5", "False"]
        return
    assert result.stdout.split() == ["5", "5", "5", "5", "4", "True"]
    assert result.stderr.count("does not serve uid 65534 (ACCES)") == 1, result.stderr
    assert result.stderr.count("/marked carries the mark") == 1
    assert (directory / "fresh").read_bytes() == b"childchild"
    assert (directory / "marked").read_bytes() == b"parentparent"


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the user needs root")
def test_a_program_of_a_user_who_is_not_served_is_told_why(run_python: Run, elgate_daemon: Any) -> None:
    elgate_daemon.route_dir.chmod(0o777)
    elgate_daemon.route_dir.parent.chmod(0o755)
    path = elgate_daemon.route_dir / "file"
    result = run_python(
        f"""
        import os, elgate
        from elgate import _native, _patch  # before the interpreter is another user's
        os.setuid(65534)
        assert not elgate.patch_all()
        with open({str(path)!r}, "w") as file:
            file.write("native")
        os.setxattr({str(path)!r}, "user.elgate", b"x" * 32)
        try:
            open({str(path)!r}, "a")
        except OSError as error:
            print(error.errno)
        """,
        env={**elgate_daemon.env(), "ELGATE_FALLBACK": "passthrough", "ELGATE_RECONNECT_TIMEOUT_MS": "600000"},
    )
    assert result.stdout == "5\n"
    assert "does not serve uid 65534 (ACCES)" in result.stderr
    assert f"{path} carries the mark" in result.stderr
