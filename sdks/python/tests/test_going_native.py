"""What makes a file native, that it is said, and that it stays so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

# Each uses the routed `file` (open "w+b", unbuffered), its `path`, and a native `other`; the reason is the header's.
CAUSES = {
    "mmap": ("mmap.mmap(file.fileno(), 0).close()", "MAPPED"),
    "mmap of a reader": ("reader = open(path); mmap.mmap(reader.fileno(), 0, prot=mmap.PROT_READ).close()", "MAPPED"),
    "sendfile into it": ("os.sendfile(file.fileno(), other, 0, 3)", "KERNEL_COPY"),
    "copy_file_range into it": ("os.copy_file_range(other, file.fileno(), 3)", "KERNEL_COPY"),
    "a second name": ("os.link(path, path + '.second')", "LINKED"),
    "stdout of a child": ("subprocess.call(['true'], stdout=file)", "PASSED_ON"),
    "pass_fds": ("subprocess.call(['true'], pass_fds=[file.fileno()])", "PASSED_ON"),
    "inheritable": ("os.set_inheritable(file.fileno(), True); subprocess.call(['true'], close_fds=False)", "PASSED_ON"),
    "posix_spawn": (
        "os.waitpid(os.posix_spawn('/bin/true', ['true'], {},"
        " file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), 1)]), 0)",
        "PASSED_ON",
    ),
    "send_fds": ("socket.send_fds(socket.socketpair()[0], [b'x'], [file.fileno()])", "PASSED_ON"),
    "O_DIRECT set later": ("fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT)", "DIRECT"),
    "O_DIRECT beside it": ("os.close(os.open(path, os.O_WRONLY | os.O_DIRECT))", "DIRECT"),
    "an unknown flag of pwritev": ("os.pwritev(file.fileno(), [b'x'], 0, os.RWF_HIPRI)", "UNSUPPORTED"),
    "a write too large for the ring": ("file.write(bytes(2 << 20))", "LARGE_WRITE"),
}


def _reasons() -> dict[str, int]:
    header = (Path(__file__).parents[3] / "core/include/elgate_client.h").read_text()
    return {name: int(value) for name, value in re.findall(r"#define ELGATE_REASON_(\w+) (\d+)", header)}


@pytest.mark.parametrize("cause", CAUSES)
def test_it_is_drained_counted_and_native_from_then_on(cause: str, run_python: Run, elgate_daemon: Any) -> None:
    statement, reason = CAUSES[cause]
    run_python(
        f"""
        import fcntl, mmap, os, socket, subprocess
        import elgate
        assert elgate.patch_all()
        path = {str(elgate_daemon.route_dir / "file")!r}
        with open({str(elgate_daemon.directory / "other")!r}, "wb") as file:
            file.write(b"abc")
        other = os.open(file.name, os.O_RDONLY)
        file = open(path, "w+b", 0)
        second = open(path, "ab", 0)
        file.write(b"x" * 4096)
        second.write(b"y" * 4096)
        before = elgate.status()
        assert before["native_fallbacks"] == 0 and before["routed_operations"] == 2, before
        try:
            {statement}
        except OSError as error:
            print("the operation itself failed:", error)
        after = elgate.status()
        assert after["native_fallbacks"] >= 1, after
        assert after["last_fallback_reason"] == 100 + {_reasons()[reason]}, after
        # All that was written is there for everybody, also past the hooks.
        fd = elgate.original("os.open")(path, os.O_RDONLY)
        assert elgate.original("os.pread")(fd, 8192, 0)[4:] .startswith(b"x" * 4092)
        fcntl.fcntl(file, fcntl.F_SETFL, 0)
        file.seek(0)
        file.write(b"native")
        assert elgate.original("os.pread")(fd, 6, 0) == b"native"
        second.write(b"tail")
        size = elgate.original("os.fstat")(fd).st_size
        assert elgate.original("os.pread")(fd, 4, size - 4) == b"tail"
        assert elgate.status()["routed_operations"] == after["routed_operations"], "it was to stay native"
        file.close()
        second.close()
        """,
        env=elgate_daemon.env(),
    )


def test_descriptors_that_are_not_passed_on_stay_routed(run_python: Run, elgate_daemon: Any) -> None:
    run_python(
        f"""
        import os, subprocess, elgate
        assert elgate.patch_all()
        path = {str(elgate_daemon.route_dir / "file")!r}
        file = open(path, "wb", 0)
        file.write(b"before ")
        # The child sees all that was written: it has been drained.
        assert subprocess.check_output(["cat", path]) == b"before "
        file.write(b"after")
        status = elgate.status()
        assert status["native_fallbacks"] == 0 and status["routed_operations"] == 2, status
        """,
        env=elgate_daemon.env(),
    )


def test_a_failed_exec_leaves_the_program_as_it_was(run_python: Run, elgate_daemon: Any) -> None:
    result = run_python(
        f"""
        import os, elgate
        assert elgate.patch_all()
        file = open({str(elgate_daemon.route_dir / "file")!r}, "wb", 0)
        file.write(b"before ")
        try:
            os.execvp("no-such-program", ["x"])
        except FileNotFoundError:
            pass
        file.write(b"after")
        assert elgate.status()["routed_operations"] == 2
        os.execv("/bin/cat", ["cat", file.name])
        """,
        env=elgate_daemon.env(),
    )
    assert result.stdout == "before after"


def test_a_file_with_two_names_is_never_routed(run_python: Run, elgate_daemon: Any) -> None:
    path = elgate_daemon.route_dir / "file"
    path.write_bytes(b"")
    (elgate_daemon.directory / "second").hardlink_to(path)
    run_python(
        f"""
        import elgate
        assert elgate.patch_all()
        with open({str(path)!r}, "w") as file:
            assert type(file.buffer.raw).__module__ != "elgate._file"
            file.write("native")
        status = elgate.status()
        assert status["native_fallbacks"] == 1 and status["routed_operations"] == 0, status
        """,
        env=elgate_daemon.env(),
    )
    assert path.read_bytes() == b"native"


def test_a_sync_before_the_first_write_leaves_a_file_routed(run_python: Run, elgate_daemon: Any) -> None:
    run_python(
        f"""
        import os, elgate
        assert elgate.patch_all()
        for sync in os.fsync, os.fdatasync:
            with open({str(elgate_daemon.route_dir / "file")!r}, "ab", buffering=0) as file:
                sync(file.fileno())
                before = elgate.status()["routed_bytes"]
                file.write(b"routed")
                assert elgate.status()["routed_bytes"] == before + 6, elgate.status()
        """,
        env=elgate_daemon.env(),
    )
