"""The explicit API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def test_every_level_is_reached(run_python: Run, elgate_daemon: Any) -> None:
    path = elgate_daemon.route_dir / "orders"
    run_python(
        f"""
        import array, pathlib, elgate
        path = {str(path)!r}
        for level in ("accepted", "logged", "durable", "applied"):
            ack = elgate.append(path, level.encode() + b";")
            assert isinstance(ack, elgate.Ack)
            assert ack.wait(level, timeout=30) is None
            assert ack.wait(level) is None
        for data in (bytearray(b"array;"), memoryview(b"view;"), array.array("B", b"typed;"), b""):
            elgate.append(pathlib.Path(path), data).wait("applied")
        assert open(path, "rb").read() == b"accepted;logged;durable;applied;array;view;typed;"
        for data in ("text", 5, None, memoryview(b"x-y")[::2]):
            try:
                elgate.append(path, data)
            except (TypeError, BufferError):
                continue
            raise AssertionError
        try:
            ack.wait("perfect")
        except ValueError as error:
            assert str(error) == "unknown level 'perfect': it must be one of accepted, logged, durable, applied"
        status = elgate.status()
        assert status["patched"] is False and status["routed_files"] == 1, status
        elgate.close()
        elgate.close()
        assert elgate.status()["routed_files"] == 0
        ack.wait("applied")
        elgate.append(path.encode(), b"after close").wait()
        """,
        env=elgate_daemon.env(),
    )
    assert path.read_bytes().endswith(b"typed;after close")


def test_a_patched_program_reads_what_it_has_appended(run_python: Run, elgate_daemon: Any) -> None:
    run_python(
        f"""
        import os, elgate
        elgate.patch_all()
        path = {str(elgate_daemon.route_dir / "orders")!r}
        reader = None
        for number in range(100):
            elgate.append(path, b"%03d\\n" % number)
            assert os.path.getsize(path) == 4 * (number + 1)
            reader = reader or open(path, "rb")
            assert reader.readline() == b"%03d\\n" % number
        elgate.unpatch_all()
        elgate.append(path, b"still routed").wait("applied")
        assert elgate.status()["routed_operations"] == 101
        """,
        env=elgate_daemon.env(),
    )


def test_threads_append_whole_records(run_python: Run, elgate_daemon: Any) -> None:
    path = elgate_daemon.route_dir / "orders"
    run_python(
        f"""
        import threading, elgate

        def work(number):
            acks = [elgate.append({str(path)!r}, b"%d-%04d\\n" % (number, turn) * 20) for turn in range(200)]
            acks[-1].wait("durable", timeout=60)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        """,
        env=elgate_daemon.env(),
    )
    lines = path.read_bytes().splitlines()
    assert all(len(set(lines[start : start + 20])) == 1 for start in range(0, len(lines), 20))
    for number in range(4):
        own = [line for line in lines[::20] if line.startswith(b"%d-" % number)]
        assert own == [b"%d-%04d" % (number, turn) for turn in range(200)]


def test_a_path_on_no_route_is_refused(run_python: Run, elgate_daemon: Any, tmp_path: Path) -> None:
    result = run_python(
        f"import elgate; elgate.append({str(tmp_path / 'elsewhere')!r}, b'x')", env=elgate_daemon.env(), code=1
    )
    assert "ValueError: elgate.append: " in result.stderr
    assert "is on no route of the daemon" in result.stderr
    assert not (tmp_path / "elsewhere").exists()


def test_what_cannot_be_opened_raises_the_error_of_open(run_python: Run, elgate_daemon: Any) -> None:
    result = run_python(
        f"import elgate; elgate.append({str(elgate_daemon.route_dir / 'absent' / 'x')!r}, b'x')",
        env=elgate_daemon.env(),
        code=1,
    )
    assert "FileNotFoundError: [Errno 2] No such file or directory: " in result.stderr or "on no route" in result.stderr


@pytest.mark.parametrize("disable", ["0", "1"])
def test_without_a_daemon_appends_are_native(
    run_python: Run, no_daemon: dict[str, str], tmp_path: Path, disable: str
) -> None:
    run_python(
        """
        import elgate
        for level in ("accepted", "logged", "durable", "applied"):
            elgate.append("orders", level.encode()).wait(level, timeout=1)
        ack = elgate.append("orders", bytearray(b"!"))
        elgate.close()
        ack.wait()
        """,
        env={**no_daemon, "ELGATE_DISABLE": disable},
    )
    assert (tmp_path / "orders").read_bytes() == b"acceptedloggeddurableapplied!"


def test_a_wait_ends_at_its_limit_and_can_be_taken_up_again(run_python: Run, elgate_daemon: Any) -> None:
    path = elgate_daemon.route_dir / "orders"
    run_python(
        f"""
        import errno, os, signal, time, elgate
        daemon = {elgate_daemon.process.pid}
        elgate.append({str(path)!r}, b"first;").wait()
        os.kill(daemon, signal.SIGSTOP)
        try:
            ack = elgate.append({str(path)!r}, b"second;")
            started = time.monotonic()
            try:
                ack.wait("durable", timeout=0.3)
            except TimeoutError as error:
                assert error.errno == errno.ETIMEDOUT and error.filename == {str(path)!r}
                assert "append not durable within 0.3 s" in str(error)
            else:
                raise AssertionError
            assert 0.3 <= time.monotonic() - started
            # Python handles its signals meanwhile.
            class Alarm(Exception):
                pass
            def ring(number, frame):
                raise Alarm
            signal.signal(signal.SIGALRM, ring)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            try:
                ack.wait("durable", timeout=60)
            except Alarm:
                pass
            else:
                raise AssertionError
        finally:
            os.kill(daemon, signal.SIGCONT)
        ack.wait("durable", timeout=60)
        """,
        env=elgate_daemon.env(),
    )
    assert path.read_bytes() == b"first;second;"


def test_a_forked_child_appends_by_itself(run_python: Run, elgate_daemon: Any) -> None:
    path = elgate_daemon.route_dir / "orders"
    run_python(
        f"""
        import os, elgate
        elgate.append({str(path)!r}, b"parent;").wait("applied")
        child = os.fork()
        if child == 0:
            try:
                elgate.append({str(path)!r}, b"child;").wait("applied", timeout=30)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        elgate.append({str(path)!r}, b"parent again;").wait("applied")
        """,
        env=elgate_daemon.env(),
    )
    assert path.read_bytes() == b"parent;child;parent again;"
