"""The native engine (libelgate_core.so) as a Python object, through cffi's ABI mode.

What is declared is what the C header says: the build makes `core_declarations` from it.
No call is on a data path. All methods may be called from any thread, `next_event` from one only.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

TYPE_CHECKING = False
if TYPE_CHECKING:
    from elgate.daemon.config import Config, Route

# Another build of the same engine may stand in, for tests and for those who look for a fault.
LIBRARY = Path(os.environ.get("ELGATE_CORE_LIBRARY", Path(__file__).parent / "libelgate_core.so"))

ERROR_TEXT_BYTES = 4096
EVENT_BYTES = 64 << 10


class EngineError(Exception):
    """The engine refused. `errno` is what it returned, the message what it said."""

    def __init__(self, error_number: int, message: str) -> None:
        self.errno = error_number
        super().__init__(message)


class EngineStopped(Exception):
    """There will be no more events."""


try:
    from elgate.daemon.core_declarations import ffi as _ffi

    _library = _ffi.dlopen(str(LIBRARY))
except (ImportError, OSError) as error:
    raise ImportError(
        f"the native engine cannot be loaded: {error}; it is built when the package is installed, "
        f"so install it again (in a source tree: make build)"
    ) from error


def version() -> str:
    return _ffi.string(_library.elgate_core_version()).decode()


def counter_names() -> list[str]:
    return [
        _ffi.string(_library.elgate_engine_counter_name(index)).decode()
        for index in range(_library.elgate_engine_counter_count())
    ]


_FLUSH = {
    "group": _library.ELGATE_FLUSH_GROUP,
    "always": _library.ELGATE_FLUSH_ALWAYS,
    "interval": _library.ELGATE_FLUSH_INTERVAL,
    "none": _library.ELGATE_FLUSH_NONE,
}
_VISIBILITY = {
    "deferred": _library.ELGATE_VISIBILITY_DEFERRED,
    "immediate": _library.ELGATE_VISIBILITY_IMMEDIATE,
}
_ON_FULL = {"block": _library.ELGATE_ON_FULL_BLOCK, "error": _library.ELGATE_ON_FULL_ERROR}


class _Arguments:
    """C memory for one call; strings live as long as this does."""

    def __init__(self) -> None:
        self._strings: list[Any] = []

    def string(self, text: str | Path) -> Any:
        self._strings.append(_ffi.new("char[]", os.fsencode(text)))
        return self._strings[-1]

    def routes(self, config: Config) -> Any:
        routes = _ffi.new("struct elgate_route_config[]", max(len(config.routes), 1))
        for target, route in zip(routes, config.routes, strict=False):
            self._fill(target, route, config)
        return routes

    def _fill(self, target: Any, route: Route, config: Config) -> None:
        target.name = self.string(route.name)
        target.pattern = self.string(route.pattern)
        target.flush = _FLUSH[route.flush]
        target.flush_interval_ms = route.flush_interval_ms
        target.visibility = _VISIBILITY[route.visibility]
        target.on_full = _ON_FULL[route.on_full]
        target.segment_bytes = config.wal.segment_bytes
        target.log_bytes_max = config.wal.max_bytes


class Engine:
    """A running engine: `start` makes one, `stop` ends it, `free` gives its memory back. Between the last two, events
    and counters can still be read; after `free`, nothing may be called."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._event_buffer = _ffi.new("char[]", EVENT_BYTES)
        self._counter_names = counter_names()

    @classmethod
    def start(cls, config: Config, progress: Callable[[str, int, int], None] | None = None) -> Engine:
        """Takes the locks, replays the log, serves. Blocks for the replay. Raises EngineError.

        `progress` is called, by this thread, about once a second while the replay of a route's log takes long: the
        route, the bytes read, the bytes to be read.
        """
        arguments = _Arguments()
        engine_config = _ffi.new("struct elgate_engine_config *")
        engine_config.control_socket = arguments.string(config.control.socket)
        engine_config.control_mode = config.control.mode
        engine_config.control_gid = config.control.gid
        engine_config.ring_path = arguments.string(config.ring.path)
        engine_config.log_directory = arguments.string(config.wal.dir)
        if config.wal.allow_volatile:
            engine_config.flags |= _library.ELGATE_ENGINE_ALLOW_VOLATILE
        if config.test.null_sink:
            engine_config.flags |= _library.ELGATE_ENGINE_NULL_SINK
        if config.is_stub:
            from elgate.daemon.config import stub_table_of

            engine_config.stub_path = arguments.string(stub_table_of(config.control.socket))
        # The stub's faults come from the threads that write.
        if config.disk.engine == "io_uring" and not config.is_stub:
            engine_config.flags |= _library.ELGATE_ENGINE_IO_URING
        if config.ring.isolation == "per_client":
            engine_config.flags |= _library.ELGATE_ENGINE_RING_PER_CLIENT
        engine_config.log_age_max_ms = config.wal.max_age_ms
        engine_config.checkpoint_interval_ms = config.wal.checkpoint_interval_ms
        engine_config.route_count = len(config.routes)
        routes = arguments.routes(config)
        engine_config.routes = routes
        if progress is not None:
            # Kept until the call is over.
            tell = _ffi.callback(
                "void (*)(const char *, uint64_t, uint64_t)",
                lambda route, done, total: progress(_ffi.string(route).decode(), done, total),
            )
            engine_config.progress = tell
        handle = _ffi.new("struct elgate_engine **")
        error_text = _ffi.new("char[]", ERROR_TEXT_BYTES)
        result = _library.elgate_engine_start(engine_config, handle, error_text, ERROR_TEXT_BYTES)
        _raise_if_refused(result, error_text)
        return cls(handle[0])

    def set_routes(self, config: Config) -> None:
        """Swaps the routes for those of `config`. Raises EngineError; the old ones stay then."""
        arguments = _Arguments()
        routes = arguments.routes(config)
        error_text = _ffi.new("char[]", ERROR_TEXT_BYTES)
        result = _library.elgate_engine_set_routes(
            self._handle, routes, len(config.routes), error_text, ERROR_TEXT_BYTES
        )
        _raise_if_refused(result, error_text)

    def next_event(self, timeout_ms: int) -> dict[str, Any] | None:
        """Waits for the next event, without the GIL; None if none came. Raises EngineStopped."""
        length = _library.elgate_engine_next_event(self._handle, self._event_buffer, EVENT_BYTES, timeout_ms)
        if length == 0:
            return None
        if length == -errno.EPIPE:
            raise EngineStopped
        if length < 0:
            raise EngineError(-length, f"reading the engine's events failed: {os.strerror(-length)}")
        text = bytes(_ffi.buffer(self._event_buffer, length)).decode("utf-8", "replace")
        try:
            return json.loads(text)
        except ValueError:
            return {"event": "unreadable_event", "level": "error", "text": text}

    def counters(self) -> dict[str, int]:
        values = _ffi.new("uint64_t[]", max(len(self._counter_names), 1))
        result = _library.elgate_engine_counters(self._handle, values, len(self._counter_names))
        if result < 0:
            raise EngineError(-result, f"reading the engine's counters failed: {os.strerror(-result)}")
        return dict(zip(self._counter_names, values, strict=False))

    def stop(self, timeout_ms: int) -> bool:
        """Drains, writes checkpoints, closes. False where the limit passed before all was drained: the rest is
        safe in ring and log, and the next start finishes it. Raises EngineError on any other failure."""
        result = _library.elgate_engine_stop(self._handle, timeout_ms)
        if result == -errno.ETIMEDOUT:
            return False
        if result < 0:
            raise EngineError(-result, f"stopping the engine failed: {os.strerror(-result)}")
        return True

    def free(self) -> None:
        """After `stop`, and after EngineStopped has reached the reader of events."""
        handle, self._handle = self._handle, _ffi.NULL
        _library.elgate_engine_free(handle)


class StubTable:
    """What the test stub and a test share (elgate_core.h says what is what). One thread's."""

    # The longest operation is a quarter of the ring, and has a path and a route.
    _RECORD_BYTES = (1 << 20) + (16 << 10)

    def __init__(self, path: Path) -> None:
        handle = _ffi.new("struct elgate_stub **")
        result = _library.elgate_stub_open(os.fsencode(path), handle)
        if result == -errno.EPROTO:
            raise EngineError(errno.EPROTO, f"{path} is the table of another build of the test stub; start it again")
        if result < 0:
            raise EngineError(-result, f"cannot open the test stub's table {path}: {os.strerror(-result)}")
        self._handle = handle[0]
        # Aligned as records are.
        self._memory = _ffi.new("uint64_t[]", self._RECORD_BYTES // 8)
        self._buffer = _ffi.cast("char *", self._memory)

    def close(self) -> None:
        handle, self._handle = self._handle, _ffi.NULL
        if handle != _ffi.NULL:
            _library.elgate_stub_close(handle)

    def settle(self, timeout_ms: int) -> None:
        """Raises EngineError: ESRCH where no daemon serves, ETIMEDOUT."""
        _raise_stub(_library.elgate_stub_settle(self._handle, timeout_ms), "the test stub does not answer")

    def add_rule(self, point: str, err: int, skip: int, times: int, path: str | None, route: str | None) -> int:
        rule = _ffi.new("struct elgate_stub_rule *")
        rule.point = getattr(_library, f"ELGATE_STUB_AT_{point.upper()}")
        rule.err, rule.skip, rule.times = err, skip, times
        path_text = _ffi.NULL if path is None else _ffi.new("char[]", os.fsencode(path))
        route_text = _ffi.NULL if route is None else _ffi.new("char[]", os.fsencode(route))
        rule.path, rule.route = path_text, route_text
        return _raise_stub(_library.elgate_stub_add_rule(self._handle, rule), "the test stub takes no other rule")

    def remove_rule(self, number: int) -> None:
        _library.elgate_stub_remove_rule(self._handle, number)

    def rule_hits(self, number: int) -> int:
        return _library.elgate_stub_rule_hits(self._handle, number)

    def await_hits(self, number: int, hits: int, timeout_ms: int) -> None:
        """Raises EngineError: ESRCH where no daemon serves, ETIMEDOUT."""
        result = _library.elgate_stub_await_hits(self._handle, number, hits, timeout_ms)
        _raise_stub(result, f"no operation came for it within {timeout_ms} ms")

    def read(self, at: int) -> tuple[int, Any, bytes, bytes, bytes] | None:
        """The record at `at`: where the next one is, its fields, path, route, data. None: there is no more."""
        operation = _ffi.new("struct elgate_stub_operation *")
        length = _library.elgate_stub_read(self._handle, at, operation, self._buffer, self._RECORD_BYTES)
        if length == 0:
            return None
        _raise_stub(length, "the test stub's recording cannot be read")
        text = bytes(
            _ffi.buffer(operation.text, operation.path_length + operation.route_length + operation.data_length)
        )
        route_at = operation.path_length
        data_at = route_at + operation.route_length
        return at + length, operation, text[:route_at], text[route_at:data_at], text[data_at:]

    def forget(self) -> None:
        _library.elgate_stub_forget(self._handle)

    def limit(self, recording_bytes_max: int) -> None:
        _library.elgate_stub_limit(self._handle, recording_bytes_max)

    def state(self) -> dict[str, int]:
        state = _ffi.new("struct elgate_stub_state *")
        _library.elgate_stub_state(self._handle, state)
        return {name: int(getattr(state, name)) for name, _ in _ffi.typeof("struct elgate_stub_state").fields}


# By the header, what a record's kind is called.
STUB_KINDS = {
    getattr(_library, f"ELGATE_STUB_{name.upper()}"): name
    for name in (
        "session",
        "start",
        "open",
        "write",
        "truncate",
        "allocate",
        "fsync",
        "close",
        "native",
        "rename",
        "unlink",
    )
}


def _raise_stub(result: int, message: str) -> int:
    if result < 0:
        raise EngineError(-result, f"{message}: {os.strerror(-result)}")
    return result


def _raise_if_refused(result: int, error_text: Any) -> None:
    if result < 0:
        text = _ffi.string(error_text).decode("utf-8", "replace")
        raise EngineError(-result, text or os.strerror(-result))
