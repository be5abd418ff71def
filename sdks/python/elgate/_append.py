"""The explicit API: appends that return at once, with something to wait on."""

from __future__ import annotations

import errno
import math
import os
import threading
import time

from elgate import _native
from elgate._descriptors import (
    became_native,
    elgate_path_is_routed,
    forget,
    kept,
    native_close,
    open_descriptor,
    routed,
    tracked,
)
from elgate._file import memory_of, native_write
from elgate._native import LEVEL_NAMES, LEVELS, NATIVE, answering, ffi, library, os_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Union

    Path = Union[str, bytes, os.PathLike[str], os.PathLike[bytes]]

native_fsync = os.fsync

elgate_append = answering(library.elgate_append)
elgate_fsync = answering(library.elgate_fsync)
elgate_wait = answering(library.elgate_wait)

_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
_CLOSE_POLL_S = 0.001


class Appender:
    """One file, open for as long as this process appends to it."""

    def __init__(self, path: str | bytes) -> None:
        self.path = path
        self._closing = False
        self._closed = threading.Event()
        # What close ran into: for those who wait later.
        self._error: OSError | None = None
        # One entry for each thread that is using the descriptor: a list, because its append and pop cannot be torn.
        self._users: list[None] = []
        if _native.start() and elgate_path_is_routed(os.fsencode(path)) != 1:
            raise ValueError(
                f"elgate.append: {os.fsdecode(path)!r} is on no route of the daemon: give the path of a file on one "
                "(`elgate routes ls` shows them), or add a route"
            )
        self._fd = open_descriptor(path, _FLAGS, 0o666)
        kept.add(self._fd)

    def _acquire(self) -> bool:
        """The descriptor is not closed before `_release`. False: too late."""
        self._users.append(None)
        if self._closing:
            self._users.pop()
            return False
        return True

    def _release(self) -> None:
        self._users.pop()

    def append(self, data: Any) -> Ack | None:
        """None: it has been closed."""
        memory = data if type(data) is bytes else memory_of(data)
        if not self._acquire():
            return None
        fd = self._fd
        try:
            if fd in routed:
                ticket = ffi.new("uint64_t *")
                result = elgate_append(fd, memory, len(memory), ticket)
                if result >= 0:
                    return Ack(self, int(ticket[0]))
                if result != NATIVE:
                    raise os_error(result, self.path)
                became_native(fd)
            rest = memoryview(memory if type(memory) is bytes else ffi.buffer(memory))
            while len(rest) > 0:
                rest = rest[native_write(fd, rest) :]
            return Ack(self, None)
        finally:
            self._release()

    def wait(self, ticket: int | None, level: str, timeout: float | None) -> None:
        if not self._acquire():
            # Then everything is applied, or close has said why not.
            self._closed.wait()
            if self._error is not None:
                raise self._error
            return
        try:
            if ticket is None:
                if level == "durable":
                    native_fsync(self._fd)
                return
            result = _wait(self._fd, ticket, LEVELS[level], timeout)
        finally:
            self._release()
        if result == -errno.ETIMEDOUT:
            limit = "ELGATE_RECONNECT_TIMEOUT_MS" if timeout is None else f"{timeout} s"
            raise TimeoutError(errno.ETIMEDOUT, f"append not {level} within {limit}", self.path)
        if result < 0 and result != NATIVE:
            raise os_error(result, self.path)

    def level(self, ticket: int | None) -> str:
        if not self._acquire():
            self._closed.wait()
            if self._error is not None:
                raise self._error
            return "applied"
        try:
            if ticket is None:
                return "accepted"
            result = library.elgate_level(self._fd, ticket)
        finally:
            self._release()
        if result == NATIVE:
            return "accepted"
        if result < 0:
            raise os_error(result, self.path)
        return LEVEL_NAMES[result]

    def close(self) -> None:
        """Once: durable and applied. OSError: what could not be; it is closed in any case."""
        self._closing = True
        try:
            while self._users:
                time.sleep(_CLOSE_POLL_S)
            try:
                # Nobody can ask for it later: a route that syncs late is asked now.
                result = elgate_fsync(self._fd)
                if result == NATIVE:
                    native_fsync(self._fd)
                elif result < 0:
                    self._error = os_error(result, self.path)
                if self._fd in tracked:
                    self._error = forget(self._fd) or self._error
            except OSError as error:
                self._error = error
            finally:
                kept.discard(self._fd)
                native_close(self._fd)
        finally:
            self._closed.set()
        if self._error is not None:
            raise self._error

    def forget_parent(self) -> None:
        """In a child: the parent's other threads are not there to let go of it."""
        self._users.clear()


class Ack:
    """One append. Any thread may wait for it, as often as it likes."""

    __slots__ = ("_appender", "_ticket")

    def __init__(self, appender: Appender, ticket: int | None) -> None:
        self._appender = appender
        # None: the file is native.
        self._ticket = ticket

    @property
    def level(self) -> str:
        """The highest level that is reached together with all below it, at this moment; never waits for one, and makes
        nothing happen. On a route with `flush: interval` or `none` a record may be in its file and not durable yet:
        that is "logged". "accepted" is all that is known of a file that is native.

        OSError: the ring that held the record was replaced, or the file was closed with an error."""
        return self._appender.level(self._ticket)

    def wait(self, level: str = "durable", timeout: float | None = None) -> None:
        """Returns once the append has reached `level`:

        - "accepted": in shared memory, which survives the death of this process and of the daemon
        - "logged": written to the log, not yet synced
        - "durable": synced to stable storage
        - "applied": in the file, where every process can read it

        Waiting for "durable" asks for it, whatever the route's flush mode is. Waiting for "applied" waits for that
        alone, and with `flush: interval` or `none` it may come first.

        `timeout` in seconds; None: as long as the client waits for a daemon (ELGATE_RECONNECT_TIMEOUT_MS).
        TimeoutError: not reached yet; the append stands, and can be waited for again. OSError: the file's error."""
        if level not in LEVELS:
            raise ValueError(f"unknown level {level!r}: it must be one of {', '.join(LEVELS)}")
        self._appender.wait(self._ticket, level, timeout)


def _wait(fd: int, ticket: int, level: int, timeout: float | None) -> int:
    if timeout is None:
        return elgate_wait(fd, ticket, level, -1)
    deadline = time.monotonic() + timeout
    while True:
        left_ms = max(0, math.ceil((deadline - time.monotonic()) * 1000))
        result: int = library.elgate_wait(fd, ticket, level, left_ms)
        if result != -errno.EINTR:
            return result


_lock = threading.Lock()
_appenders: dict[str | bytes, Appender] = {}


def _renew_locks() -> None:
    global _lock
    _lock = threading.Lock()
    for appender in _appenders.values():
        appender.forget_parent()


os.register_at_fork(after_in_child=_renew_locks)


def append(path: Path, data: Any) -> Ack:
    name = os.fspath(path)
    while True:
        appender = _appenders.get(name)
        if appender is None:
            # Only absolute paths are remembered: the working directory may change.
            name = os.path.abspath(name)
            with _lock:
                appender = _appenders.get(name)
                if appender is None:
                    appender = _appenders[name] = Appender(name)
        ack = appender.append(data)
        if ack is not None:
            return ack


def close() -> None:
    """Closes all files of `append`; the first error, if any, once all are closed."""
    first: OSError | None = None
    with _lock:
        while _appenders:
            _, appender = _appenders.popitem()
            try:
                appender.close()
            except OSError as error:
                first = first or error
    if first is not None:
        raise first
