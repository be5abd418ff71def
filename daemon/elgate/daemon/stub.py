"""The test stub, as a test sees it: what its program sent, and what is to go wrong. docs/testing.md shows the use.

`Stub` speaks with any daemon in the mode `test_stub`. `StubDaemon` is one of its own, which a test may kill; the pytest
fixture `elgate_stub` (pytest_stub.py) gives one to each test.
"""

from __future__ import annotations

import contextlib
import errno as errno_module
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from elgate.daemon.child import ChildDaemon, DaemonFailed
from elgate.daemon.config import TEST_STUB, check_pattern, resolve_pattern, stub_table_of
from elgate.daemon.engine import STUB_KINDS, EngineError, StubTable

# For what takes no time unless something is wrong.
LIMIT_S = 10.0

_FALLOC_FL_KEEP_SIZE = 1

# What can fail, or hang.
POINTS = ("write", "truncate", "allocate", "fsync", "log", "target_sync")


class StubError(Exception):
    """The stub cannot do what a test asks, or a test has outrun it. The message says why, and what to do."""


@dataclass(frozen=True)
class Operation:
    """One thing that a program has asked for, in the order in which the daemon took them.

    `kind`: open (with its first operation on the file), write, truncate, allocate, fsync (also fdatasync, O_SYNC, and a
    wait for "durable"), close, native (the file is written without Elgate from here on, and not seen any more), rename,
    unlink. `offset` of a truncate is the new size. `errno`: what a fault made of it, or 0.
    """

    kind: str
    path: Path
    route: str
    offset: int = 0
    length: int = 0
    data: bytes = b""
    # With O_APPEND: the daemon found the offset.
    append: bool = False
    keep_size: bool = False
    new_path: Path | None = None
    errno: int = 0
    # As the kernel says; 0 where the process is in another pid namespace. The thread is what its client says.
    pid: int = 0
    thread: int = 0
    monotonic_ns: int = 0

    def __str__(self) -> str:
        parts = [self.kind, str(self.path)]
        if self.kind == "write":
            shown = self.data if len(self.data) <= 40 else self.data[:37] + b"..."
            parts.append(f"@{self.offset} {self.length} bytes {shown!r}")
        elif self.kind in ("truncate", "allocate"):
            parts.append(f"@{self.offset}" if self.kind == "truncate" else f"@{self.offset} {self.length} bytes")
        elif self.new_path is not None:
            parts.append(f"-> {self.new_path}")
        if self.errno:
            parts.append(errno_module.errorcode.get(self.errno, str(self.errno)))
        return " ".join(parts)


class Rule:
    """A fault or a stall: in force from the moment at which it was made until `end`, or the end of a `with`."""

    def __init__(self, stub: Stub, number: int, what: str) -> None:
        self._stub = stub
        self._number = number
        self._what = what
        self._ended = False
        self._hits = 0

    @property
    def hits(self) -> int:
        """How many operations have met it."""
        return self._hits if self._ended else self._stub._table.rule_hits(self._number)

    def wait(self, hits: int = 1, limit_s: float = LIMIT_S) -> None:
        """Until so many operations have met it: one that stalls hangs by then. Raises StubError when the limit passes."""
        if self._ended:
            raise StubError(f"the {self._what} is over")
        try:
            self._stub._table.await_hits(self._number, hits, int(limit_s * 1000))
        except EngineError as error:
            raise StubError(f"the {self._what} was met {self.hits} times, not {hits}: {error}") from error

    def end(self, limit_s: float = LIMIT_S) -> None:
        """From here on all goes well again, also for files that the fault has reached: what was accepted for them is
        written when this returns. Raises StubError where that is not so within the limit."""
        if self._ended:
            return
        self._hits = self.hits
        self._ended = True
        self._stub._rules.discard(self)
        self._stub._table.remove_rule(self._number)
        self._stub._await_health(limit_s)

    def __enter__(self) -> Rule:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()


class Stub:
    """A running daemon in the mode `test_stub`. Any thread. Raises StubError where none serves `socket`."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._rules: set[Rule] = set()
        self._reading = threading.Lock()
        try:
            self._table = StubTable(stub_table_of(socket))
        except EngineError as error:
            raise StubError(
                f"no test stub serves {socket}: {error}. Start one: elgate daemon with runtime: {{mode: {TEST_STUB}}}"
            ) from error

    def close(self) -> None:
        """Takes all rules back. The daemon goes on."""
        for rule in list(self._rules):
            self._rules.discard(rule)
            rule._ended = True
            self._table.remove_rule(rule._number)
        self._table.close()

    # ---- what the program did ---------------------------------------------------------------------------------

    def operations(self, *kinds: str, path: str | os.PathLike[str] | None = None) -> list[Operation]:
        """All that was sent until now, in the order in which the daemon took it: of these kinds, and of this file, or all.

        What one thread has sent is in its order. While the daemon hangs in a stall, what was sent behind that is not
        seen yet. Raises StubError where the recording was full: what is missing is not known then.
        """
        unknown = set(kinds) - set(STUB_KINDS.values())
        if unknown:
            raise ValueError(
                f"{', '.join(sorted(unknown))}: no kind of operation; there are {', '.join(STUB_KINDS.values())}"
            )
        self._settle()
        state = self._table.state()
        if state["dropped"]:
            raise StubError(
                f"the recording is full ({state['recording_bytes_max']} bytes): {state['dropped']} operations are not in it. "
                f"Call forget() between the parts of the test, or raise the limit: record_at_most(...)"
            )
        wanted = None if path is None else os.path.realpath(path)
        with self._reading:
            recorded = list(self._recorded())
        return [
            operation
            for operation in recorded
            if (not kinds or operation.kind in kinds) and (wanted is None or str(operation.path) == wanted)
        ]

    def _recorded(self) -> Iterator[Operation]:
        at = 0
        processes: dict[int, int] = {}
        while (record := self._table.read(at)) is not None:
            at, fields, path, route, data = record
            kind = STUB_KINDS[fields.kind]
            if kind == "start":
                processes.clear()
            elif kind == "session":
                processes[fields.session] = fields.process_id
            else:
                yield Operation(
                    kind=kind,
                    path=Path(os.fsdecode(path)),
                    route=route.decode(),
                    offset=fields.offset,
                    length=fields.length,
                    data=data if kind == "write" else b"",
                    append=kind == "write" and fields.flags != 0,
                    keep_size=kind == "allocate" and fields.flags & _FALLOC_FL_KEEP_SIZE != 0,
                    new_path=Path(os.fsdecode(data)) if kind == "rename" else None,
                    errno=fields.err,
                    pid=processes.get(fields.session, 0),
                    thread=fields.thread_id,
                    monotonic_ns=fields.time_ns,
                )

    def forget(self) -> None:
        """Empties the recording."""
        self._table.forget()
        self._settle()

    def record_at_most(self, recording_bytes: int) -> None:
        """What is recorded, with all its data, takes no more than this (64 MiB unless said). What comes behind that is
        counted, and `operations` says so."""
        self._table.limit(recording_bytes)

    # ---- what goes wrong --------------------------------------------------------------------------------------

    def fault(
        self,
        what: str,
        errno: int,
        *,
        path: str | os.PathLike[str] | None = None,
        route: str | None = None,
        skip: int = 0,
        times: int | None = None,
    ) -> Rule:
        """Makes operations fail, exactly those: behind `skip` that go well, `times` of them (None: all until the end).

        `path` is a glob as in a route; `route` a name. Without them: everywhere.

        - "fsync": the fsync fails with `errno`, once for every handle of the file.
        - "write", "truncate", "allocate": the target file refuses it with `errno`. Writes return before that, so that
          who wrote learns it by the next write, fsync or close, as with Elgate always; and the file fails, for whoever
          has it open, until it is mended.
        - "log": the disk of a route's log takes nothing. Everything on that route fails with `errno`. No `skip`, `times`
          and `path`.
        - "target_sync": a sync that the daemon makes in the background, for a checkpoint or when a file was closed.
        """
        if what not in POINTS:
            raise ValueError(f"'{what}' cannot fail; what can: {', '.join(POINTS)}")
        if not 0 < errno < 4096:
            raise ValueError(f"errno is {errno}, must be one of the module errno")
        return self._rule(f"fault of {what}", what, errno, path, route, skip, times)

    def stall(
        self,
        what: str,
        *,
        path: str | os.PathLike[str] | None = None,
        route: str | None = None,
        skip: int = 0,
    ) -> Rule:
        """From the operation behind `skip` on, they hang until the end of this.

        "fsync": the daemon hangs with it, and acknowledges nothing, whosever it is. "write" and the like: the target's
        file system hangs; the log goes on. "log": the log's disk does (no `skip`, no `path`). `wait` of what this
        returns says when something hangs.
        """
        if what not in POINTS:
            raise ValueError(f"'{what}' cannot stall; what can: {', '.join(POINTS)}")
        return self._rule(f"stall of {what}", what, 0, path, route, skip, None)

    def full(self, route: str | None = None) -> Rule:
        """The log of a route (of all) is full: its writes wait, or give EAGAIN (O_NONBLOCK) or ENOSPC (`on_full: error`)."""
        return self._rule("full log", "full", errno_module.ENOSPC, None, route, 0, None)

    def _rule(
        self,
        name: str,
        point: str,
        errno: int,
        path: str | os.PathLike[str] | None,
        route: str | None,
        skip: int,
        times: int | None,
    ) -> Rule:
        if point == "log" and (path is not None or skip or times is not None):
            raise ValueError("a log fails for its whole route, from now on: no path, skip or times")
        if skip < 0 or (times is not None and times < 1):
            raise ValueError(f"skip is {skip}, must be at least 0; times is {times}, must be at least 1, or None")
        pattern = None
        if path is not None:
            pattern = os.fspath(path)
            wrong = check_pattern(pattern)
            if wrong is not None:
                raise ValueError(f"path '{pattern}': {wrong}")
            pattern = resolve_pattern(pattern)
        try:
            number = self._table.add_rule(point, errno, skip, times or 0, pattern, route)
        except EngineError as error:
            raise StubError(str(error)) from error
        rule = Rule(self, number, name)
        self._rules.add(rule)
        self._settle()
        return rule

    def _settle(self) -> None:
        try:
            self._table.settle(int(LIMIT_S * 1000))
        except EngineError as error:
            # What is recorded stays, and rules are in force when it is back.
            if error.errno != errno_module.ESRCH:
                raise StubError(str(error)) from error

    def _await_health(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        self._settle()
        while (state := self._table.state())["failing"] and state["served"] and not self._rules:
            if time.monotonic() > deadline:
                raise StubError(
                    f"{state['failing']} files or routes still fail {limit_s:g} s after the fault has ended: something "
                    f"else is wrong with them (the daemon's log says what)"
                )
            self._settle()
            time.sleep(0.001)


class _Spawned:
    """A child process of its own session, started past Elgate's hooks: theirs wait for all that this process has pending,
    and so for the very daemon that is to be started. As much of subprocess.Popen as `ChildDaemon` uses."""

    def __init__(self, command: list[str], log_fd: int, ready_fd: int, environment: dict[str, str]) -> None:
        import elgate

        spawn = elgate.original("os.posix_spawn")
        self.args = command
        self.returncode: int | None = None
        # It ends with this process, whatever becomes of that: nobody else has the other end.
        end, self._lifeline = os.pipe()
        actions = [
            (os.POSIX_SPAWN_DUP2, end, 0),
            (os.POSIX_SPAWN_DUP2, log_fd, 1),
            (os.POSIX_SPAWN_DUP2, log_fd, 2),
        ]
        os.set_inheritable(ready_fd, True)
        try:
            self.pid: int = spawn(
                command[0], [*command, "--until-stdin-ends"], environment, file_actions=actions, setsid=True
            )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(end)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid == self.pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                os.close(self._lifeline)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.001)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _StubChild(ChildDaemon):
    def _spawn(self, command: list[str], log: IO[bytes], ready_fd: int, environment: dict[str, str]) -> Any:
        return _Spawned(command, log.fileno(), ready_fd, environment)


class StubDaemon(Stub):
    """A test stub of its own, in `directory`. `close` leaves nothing behind, and no file marked."""

    def __init__(self, directory: Path, ring: Path | None = None) -> None:
        sections: dict[str, Any] = {"runtime": {"mode": TEST_STUB}}
        if ring is not None:
            sections["ring"] = {"path": str(ring)}
        self._routes: dict[str, dict[str, Any]] = {}
        self._environment_before: dict[str, str | None] = {}
        self._is_stopped = False
        self.daemon = _StubChild(directory, routes=(), sections=sections)
        try:
            self.daemon.start()
            super().__init__(self.daemon.socket)
        except BaseException:
            self.daemon.close()
            raise

    def route(
        self, name: str, path: str | os.PathLike[str], *, flush: Any = "group", visibility: str = "deferred",
        on_full: str = "block",
    ) -> None:  # fmt: skip
        """Adds a route, as in the configuration, or replaces the one of that name. In force for files that are opened
        from now on."""
        self._routes[name] = {
            "name": name, "match": {"path": os.fspath(path)}, "flush": flush, "visibility": visibility, "on_full": on_full,
        }  # fmt: skip
        self.daemon.write_config(self._routes.values())
        if self.daemon.process is not None and self.daemon.process.poll() is not None:
            return  # dead: with its next life
        done, refused = len(self.daemon.events("reloaded")), len(self.daemon.events("reload_refused"))
        self.daemon.reload()
        deadline = time.monotonic() + LIMIT_S
        while len(self.daemon.events("reloaded")) == done:
            problems = self.daemon.events("reload_refused")[refused:]
            if problems:
                raise StubError(f"route {name}: " + "; ".join(str(problem["reason"]) for problem in problems))
            if time.monotonic() > deadline:
                raise StubError(f"route {name}: the daemon does not take it up:\n{self.daemon.log_text()}")
            time.sleep(0.001)

    # ---- who uses it ------------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """For a program of its own: `subprocess.run(["elgate", "run", "--", ...], env=stub.environment())`."""
        return self.daemon.env()

    def serve_this_process(self) -> None:
        """Sets ELGATE_SOCKET and ELGATE_FALLBACK in this process, for itself and for programs that it starts."""
        for name in ("ELGATE_SOCKET", "ELGATE_FALLBACK", "ELGATE_DISABLE"):
            self._environment_before.setdefault(name, os.environ.get(name))
        os.environ.update({name: self.environment()[name] for name in ("ELGATE_SOCKET", "ELGATE_FALLBACK")})
        os.environ.pop("ELGATE_DISABLE", None)

    def patch(self) -> None:
        """`elgate.patch_all()` in this process, until `close`. Warns of modules of the program that were imported with
        `from os import write` and the like before: what they do is not seen."""
        import elgate

        self.serve_this_process()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            elgate.patch_all()
        for warning in caught:
            text = _without_test_tools(str(warning.message))
            if text is not None:
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _leave_this_process(self) -> None:
        native = sys.modules.get("elgate._native")
        try:
            if native is not None and self._environment_before:
                import elgate

                try:
                    elgate.close()
                    elgate.unpatch_all()
                finally:
                    with contextlib.suppress(OSError):
                        native.stop()
        finally:
            for name, value in self._environment_before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            self._environment_before.clear()

    # ---- death and stillness ----------------------------------------------------------------------------------

    def kill(self) -> None:
        """SIGKILL. Recording, rules, ring and log stay for the next life."""
        self.daemon.kill()

    def start(self) -> None:
        """After `kill`: it comes back, and does what had been accepted."""
        self.daemon.start()

    @contextlib.contextmanager
    def dead(self) -> Iterator[None]:
        """It is dead meanwhile."""
        self.kill()
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """The whole daemon stands still meanwhile (SIGSTOP): it looks alive, and answers nobody."""
        os.kill(self.daemon.pid, signal.SIGSTOP)
        self._is_stopped = True
        # The last of its threads, too.
        os.waitid(os.P_PID, self.daemon.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        try:
            yield
        finally:
            self._thaw()

    def _thaw(self) -> None:
        if self._is_stopped:
            self._is_stopped = False
            os.kill(self.daemon.pid, signal.SIGCONT)

    def close(self) -> None:
        """Hooks are taken back, files of this process go native, and the daemon ends. OSError: a file could not; all the
        rest is done then."""
        self._thaw()
        for rule in list(self._rules):
            rule._ended = True
            self._table.remove_rule(rule._number)
        self._rules.clear()
        try:
            process = self.daemon.process
            if process is not None and process.poll() is not None:
                # It takes the marks off what it had taken.
                self.daemon.start()
            try:
                self._leave_this_process()
            finally:
                self.daemon.stop(LIMIT_S)
        except DaemonFailed as error:
            raise StubError(str(error)) from error
        finally:
            super().close()
            self.daemon.close()


# What holds functions of os, and is none of the program's.
_TEST_TOOLS = ("_pytest", "pytest", "py", "pluggy", "execnet", "xdist", "coverage")


def _without_test_tools(warning: str) -> str | None:
    """patch_all's warning, without the modules that pytest itself is made of; None where no other is left."""
    before, colon, rest = warning.partition("had been imported: ")
    names, stay, advice = rest.partition(". They stay native")
    if not colon or not stay:
        return warning
    others = [name for name in names.split(", ") if name.split(".")[0] not in _TEST_TOOLS]
    return f"{before}{colon}{', '.join(others)}{stay}{advice}" if others else None


__all__ = ["POINTS", "Operation", "Rule", "Stub", "StubDaemon", "StubError"]
