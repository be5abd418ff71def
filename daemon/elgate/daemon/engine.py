"""The native engine (libelgate_core.so) as a Python object, through cffi's ABI mode.

What the C header says is what is declared here: the header is installed beside the library and read as it is.
No call is on a data path. All methods may be called from any thread, `next_event` from one only.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cffi

from elgate.daemon.config import Config, Route

# Another build of the same engine may stand in, for tests and for those who look for a fault.
LIBRARY = Path(os.environ.get("ELGATE_CORE_LIBRARY", Path(__file__).parent / "libelgate_core.so"))
HEADER = Path(__file__).parent / "elgate_core.h"

ERROR_TEXT_BYTES = 4096
EVENT_BYTES = 64 << 10

_ffi = cffi.FFI()


class EngineError(Exception):
    """The engine refused. `errno` is what it returned, the message what it said."""

    def __init__(self, error_number: int, message: str) -> None:
        self.errno = error_number
        super().__init__(message)


class EngineStopped(Exception):
    """There will be no more events."""


def declarations(header: str) -> str:
    """A C header without what cffi cannot read: include guards and includes. Numeric constants stay."""
    kept = [
        line
        for line in header.splitlines()
        if not line.lstrip().startswith("#") or re.match(r"\s*#\s*define\s+\w+\s+-?\d", line)
    ]
    return re.sub(r"/\*.*?\*/", "", "\n".join(kept), flags=re.DOTALL)


def _load() -> Any:
    try:
        _ffi.cdef(declarations(HEADER.read_text()))
        return _ffi.dlopen(str(LIBRARY))
    except OSError as error:
        raise ImportError(
            f"the native engine cannot be loaded: {error}; it is built when the package is installed, "
            f"so install it again (in a source tree: make build)"
        ) from error


_library = _load()


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
        if config.disk.engine == "io_uring":
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
                "void(const char *, uint64_t, uint64_t)",
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


def _raise_if_refused(result: int, error_text: Any) -> None:
    if result < 0:
        text = _ffi.string(error_text).decode("utf-8", "replace")
        raise EngineError(-result, text or os.strerror(-result))
