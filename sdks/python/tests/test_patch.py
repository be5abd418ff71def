"""Patching: what is replaced, what it still looks like, and what is there again afterwards. No daemon needed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

# What a program can hold of the hooked functions, seen before, under and after the patch.
SURVEY = """
import builtins, fcntl, inspect, io, _io, mmap, os, pickle, posix, socket, subprocess, sys, tarfile, _posixsubprocess
MODULES = (builtins, io, _io, os, posix, fcntl, mmap, _posixsubprocess, subprocess, tarfile)

def survey():
    # By the names in sys.modules: _io calls itself io.
    return {(key, name): value for key, module in sys.modules.items() if module in MODULES
            for name, value in vars(module).items() if callable(value)}

def capabilities():
    return {name: set(getattr(os, name)) for name in dir(os) if name.startswith("supports_")
            and isinstance(getattr(os, name), set)}

before, before_capabilities = survey(), capabilities()
import elgate
"""


def test_every_original_is_back_after_unpatch_all(run_python: Run, no_daemon: dict[str, str]) -> None:
    run_python(
        SURVEY
        + """
for _ in range(2):
    assert elgate.patch_all() is False
    changed = {key for key, value in survey().items() if before[key] is not value}
    for name in ("open write writev pwrite pwritev fsync fdatasync lseek read readv pread preadv ftruncate truncate "
                 "dup dup2 close closerange stat fstat sendfile posix_fallocate rename replace unlink remove link "
                 "posix_spawn execv execve").split():
        assert {("os", name), ("posix", name)} <= changed, name
    assert {("builtins", "open"), ("io", "open"), ("_io", "open"), ("fcntl", "fcntl"), ("fcntl", "flock"),
            ("fcntl", "lockf"), ("mmap", "mmap"), ("_posixsubprocess", "fork_exec"),
            ("tarfile", "bltn_open")} <= changed
    assert builtins.open is io.open is _io.open and os.write is posix.write
    assert "sendmsg" in vars(socket.socket)
    elgate.unpatch_all()
    elgate.unpatch_all()
    assert all(before[key] is value for key, value in survey().items())
    assert capabilities() == before_capabilities
    assert "sendmsg" not in vars(socket.socket)
""",
        env=no_daemon,
    )


def test_hooks_look_like_what_they_replace(run_python: Run, no_daemon: dict[str, str]) -> None:
    run_python(
        SURVEY
        + """
def signature(function):
    try:
        return str(inspect.signature(function))
    except ValueError:
        return None

elgate.patch_all()
for (module, name), original in before.items():
    hook = survey()[module, name]
    if hook is original or module in ("subprocess", "tarfile"):
        continue
    assert hook.__name__ == original.__name__ and hook.__qualname__ == original.__qualname__, name
    assert hook.__doc__ == original.__doc__ and hook.__module__ == original.__module__, name
    assert elgate.original(f"{module}.{name}") is original
    # These two take what the Python at hand does; lseek's third parameter (positional) was called `how` once.
    if signature(original) is not None and name not in ("chmod", "fork_exec", "lseek"):
        assert signature(hook) == signature(original), (name, signature(hook), signature(original))
assert pickle.loads(pickle.dumps(os.unlink)) is os.unlink
assert pickle.loads(pickle.dumps(open)) is open
assert os.stat in os.supports_fd and os.stat in os.supports_dir_fd and os.stat in os.supports_follow_symlinks
assert elgate.original("os.getpid") is os.getpid
try:
    elgate.original("os.no_such_thing")
except AttributeError:
    pass
else:
    raise AssertionError
""",
        env=no_daemon,
    )


def test_hooks_stand_in_classes_as_builtin_functions_do(run_python: Run, no_daemon: dict[str, str]) -> None:
    run_python(
        """
        import os, elgate
        elgate.patch_all()

        class Cleaner:
            unlink = os.unlink
            write = os.write
            open = open

        reader, writer = os.pipe()
        assert Cleaner().write(writer, b"x") == 1
        with Cleaner().open("left-behind", "w"):
            pass
        Cleaner().unlink("left-behind")
        assert os.path.exists("left-behind") is False
        """,
        env=no_daemon,
    )


def test_files_off_any_route_have_the_native_types(run_python: Run, no_daemon: dict[str, str]) -> None:
    run_python(
        """
        import io, elgate
        native = io.FileIO
        elgate.patch_all()
        for mode in ("w", "r", "a", "r+", "wb", "rb"):
            with open("file", mode) as file:
                raw = file.raw if "b" in mode else file.buffer.raw
                assert type(raw) is native is io.FileIO, mode
        """,
        env=no_daemon,
    )


def test_wrong_numbers_of_arguments_are_type_errors(run_python: Run, no_daemon: dict[str, str]) -> None:
    run_python(
        """
        import mmap, os, elgate
        elgate.patch_all()
        for call in (lambda: open(), lambda: os.write(1), lambda: os.write(fd=1, data=b""), lambda: os.open("x"),
                     lambda: os.rename("x"), lambda: os.close(), lambda: open("x", wrong=1), lambda: mmap.mmap()):
            try:
                call()
            except TypeError:
                continue
            raise AssertionError
        """,
        env=no_daemon,
    )


def test_patching_too_late_names_who_holds_originals(
    run_python: Run, no_daemon: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "early.py").write_text("from os import write as put, getpid\nsave = open\n")
    result = run_python(
        """
        import bz2, subprocess, tarfile, tokenize
        from os import fsync
        import early
        import elgate
        elgate.patch_all()
        assert tarfile.bltn_open is open and bz2._builtin_open is open
        """,
        env=no_daemon,
    )
    assert "program.py:6: RuntimeWarning: elgate.patch_all() came after" in result.stderr
    assert "__main__.fsync (os.fsync), early.put (os.write), early.save (builtins.open)." in result.stderr
    for silent in ("tarfile", "subprocess", "getpid"):
        assert silent not in result.stderr


def test_patching_in_time_warns_of_nothing(run_python: Run, no_daemon: dict[str, str]) -> None:
    result = run_python(
        """
        import asyncio, logging.handlers, multiprocessing.connection, pathlib, pty, shutil, sqlite3, tempfile, unittest
        import elgate
        elgate.patch_all()
        import bz2, tarfile
        assert tarfile.bltn_open is open
        elgate.unpatch_all()
        assert tarfile.bltn_open is open
        assert type(open) is type(len)
        """,
        env=no_daemon,
    )
    assert "Warning" not in result.stderr


def test_without_a_daemon_everything_is_native_and_said_once(run_python: Run, no_daemon: dict[str, str]) -> None:
    result = run_python(
        """
        import os, elgate
        assert elgate.patch_all() is False
        assert elgate.patch_all() is False
        with open("file", "w") as file:
            file.write("text")
        assert open("file").read() == "text"
        status = elgate.status()
        assert status["patched"] is True and status["connected"] == 0 and status["disabled"] == 1
        assert status["routed_operations"] == 0
        """,
        env=no_daemon,
    )
    assert len(result.stderr.splitlines()) == 1
    assert no_daemon["ELGATE_SOCKET"] in result.stderr


def test_fallback_fail_says_what_to_do(run_python: Run, no_daemon: dict[str, str]) -> None:
    result = run_python("import elgate; elgate.patch_all()", env={**no_daemon, "ELGATE_FALLBACK": "fail"}, code=1)
    assert "elgate: cannot connect to the daemon" in result.stderr
    assert "ELGATE_FALLBACK=fail" in result.stderr


def test_disabled_hooks_nothing_and_loads_nothing(run_python: Run, no_daemon: dict[str, str]) -> None:
    result = run_python(
        """
        import os, sys
        before = open, os.write, os.close
        import elgate
        assert elgate.patch_all() is False
        assert (open, os.write, os.close) == before
        assert "_cffi_backend" not in sys.modules
        elgate.unpatch_all()
        elgate.close()
        assert elgate.original("os.write") is os.write
        """,
        env={**no_daemon, "ELGATE_DISABLE": "1"},
    )
    assert result.stderr == ""


def test_importing_elgate_loads_nothing(run_python: Run, no_daemon: dict[str, str]) -> None:
    run_python("import sys, elgate; assert '_cffi_backend' not in sys.modules", env=no_daemon)


def test_hooking_loads_nothing_that_takes_long(run_python: Run, no_daemon: dict[str, str]) -> None:
    run_python(
        """
        import sys
        before = set(sys.modules)
        import elgate
        elgate.patch_all()
        assert not (set(sys.modules) - before) & {"cffi", "pycparser", "typing", "pkgutil", "dataclasses"}
        """,
        env=no_daemon,
    )


def test_warnings_of_open_point_at_the_caller(run_python: Run, no_daemon: dict[str, str]) -> None:
    result = run_python(
        """
        import elgate
        elgate.patch_all()
        open("file", "wb", 1).close()
        open("file", "w").close()
        """,
        env={**no_daemon, "PYTHONWARNDEFAULTENCODING": "1"},
    )
    assert "program.py:4: RuntimeWarning: line buffering (buffering=1)" in result.stderr
    if hasattr(__import__("io"), "text_encoding"):
        assert "program.py:5: EncodingWarning" in result.stderr
    assert "elgate/_file.py" not in result.stderr


def test_unpatch_all_leaves_open_files_native_and_whole(run_python: Run, elgate_daemon: Any) -> None:
    path = elgate_daemon.route_dir / "file"
    run_python(
        f"""
        import os, elgate
        assert elgate.patch_all()
        path = {str(path)!r}
        file = open(path, "w")
        fd = os.open(path + ".fd", os.O_WRONLY | os.O_CREAT)
        file.write("routed ")
        file.flush()
        os.write(fd, b"routed ")
        elgate.unpatch_all()
        assert open(path).read() == "routed "
        file.write("native")
        file.close()
        os.write(fd, b"native")
        os.close(fd)
        operations = elgate.status()["routed_operations"]
        assert operations >= 2
        with open(path + ".after", "w") as other:
            other.write("x")
        assert elgate.status()["routed_operations"] == operations
        assert elgate.patch_all()
        with open(path + ".again", "w") as other:
            other.write("x")
        assert elgate.status()["routed_operations"] > operations
        """,
        env=elgate_daemon.env(),
    )
    assert path.read_text() == Path(f"{path}.fd").read_text() == "routed native"


def test_a_file_with_records_in_a_log_is_not_written_without_its_daemon(run_python: Run, elgate_daemon: Any) -> None:
    path = elgate_daemon.route_dir / "file"
    run_python(
        f"""
        import os, elgate
        assert elgate.patch_all()
        file = open({str(path)!r}, "wb", 0)
        file.write(b"accepted")
        os.fsync(file.fileno())
        os.kill(os.getpid(), 9)
        """,
        env=elgate_daemon.env(),
        code=-9,
    )
    elgate_daemon.kill()
    environment = {**elgate_daemon.env(), "ELGATE_FALLBACK": "passthrough", "ELGATE_RECONNECT_TIMEOUT_MS": "50"}
    run_python(
        f"""
        import errno, os, elgate
        assert elgate.patch_all() is False
        path = {str(path)!r}
        assert open(path, "rb").read() == b"accepted"
        for attempt in (
            lambda: open(path, "w"),
            lambda: open(path, "a"),
            lambda: os.open(path, os.O_WRONLY | os.O_TRUNC),
        ):
            try:
                attempt()
            except OSError as error:
                assert error.errno == errno.EIO and error.filename == path
            else:
                raise AssertionError
        assert open(path, "rb").read() == b"accepted"
        with open(path + ".other", "w") as other:
            other.write("native")
        """,
        env=environment,
    )
    assert stat.S_ISREG(os.stat(f"{path}.other").st_mode)


@pytest.mark.parametrize("missing", ["libelgate_client.so", "_client_declarations.py"])
def test_a_missing_native_part_is_named(
    run_python: Run, no_daemon: dict[str, str], tmp_path: Path, missing: str
) -> None:
    import elgate

    package = tmp_path / "copy" / "elgate"
    package.mkdir(parents=True)
    for source in Path(elgate.__file__).parent.iterdir():
        if source.is_file() and source.name != missing:
            (package / source.name).write_bytes(source.read_bytes())
    result = run_python(
        "import sys; sys.path.insert(0, sys.argv[1]); import elgate; elgate.patch_all()",
        tmp_path / "copy",
        env=no_daemon,
        code=1,
    )
    assert "ImportError" in result.stderr
    assert f"{package / missing} missing" in result.stderr
    assert "make build" in result.stderr


@pytest.mark.parametrize(
    ("value", "disabled"),
    [
        ("", False),
        ("0", False),
        ("false", False),
        ("No", False),
        ("1", True),
        ("true", True),
        ("YES", True),
        ("2", True),
    ],
)
def test_what_switches_elgate_off(value: str, disabled: bool, run_python: Run, elgate_daemon: Any) -> None:
    result = run_python(
        """
        import elgate
        connected = elgate.patch_all()
        print(connected, elgate.status()["patched"])
        """,
        env={**elgate_daemon.env(), "ELGATE_DISABLE": value},
    )
    assert result.stdout.split()[:2] == [str(not disabled)] * 2
    assert ("Taken as yes" in result.stderr) == (value == "2")


@pytest.mark.parametrize("fallback", ["passthrough", "fail"])
def test_a_socket_path_that_is_too_long_is_named(fallback: str, run_python: Run, no_daemon: dict[str, str]) -> None:
    path = "/tmp/" + "long/" * 30 + "control.sock"
    result = run_python(
        "import elgate; elgate.patch_all()",
        env={**no_daemon, "ELGATE_SOCKET": path, "ELGATE_FALLBACK": fallback},
        code=1 if fallback == "fail" else 0,
    )
    assert path in result.stderr
