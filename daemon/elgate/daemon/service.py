"""The daemon process: starts the engine, speaks for it, and ends in good order.

Three things run here, and all of them sleep while nothing happens: the main thread in sigwait, one thread in the
engine's event queue, and the engine's own native threads. Signals are blocked before the first thread starts and
taken by sigwait alone, so no handler ever interrupts anything.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import shutil
import signal
import threading
from pathlib import Path

from elgate.daemon.config import (
    Config,
    ConfigurationError,
    changes_that_need_a_restart,
    load,
    prepare_directories,
    stub_table_of,
)
from elgate.daemon.engine import Engine, EngineError, EngineStopped, version
from elgate.daemon.log import Log

DRAIN_LIMIT_MS = 30_000
# How long the event thread waits before it looks whether it should end. Long: an idle daemon does nothing.
EVENT_WAIT_MS = 60_000
# After the engine has stopped, its last events are still read.
EVENT_THREAD_LIMIT_S = 5.0

STUB_WARNING = (
    "runtime.mode is test_stub: this daemon is for tests of programs, and NOTHING THAT IT SERVES IS DURABLE; fsync syncs "
    "nothing, and all is lost with the machine"
)

_STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})
# From the event thread to the main thread: the engine has stopped by itself.
_ENGINE_ENDED = signal.SIGUSR2
_WAITED = _STOP_SIGNALS | {signal.SIGHUP, _ENGINE_ENDED}


class ExitCode(enum.IntEnum):
    """What the daemon's exit says to who started it."""

    OK = 0
    # The engine could not start, or failed while it ran. The last line of the log says why.
    ENGINE_FAILED = 1
    # The configuration is wrong. Starting again will not help.
    CONFIGURATION = 2
    # Another daemon serves this socket, ring or log.
    ALREADY_RUNNING = 3
    # Stopped, but not everything was drained within the limit: it is safe in ring and log, and the next start
    # finishes it.
    NOT_DRAINED = 4


class Service:
    """One life of the daemon. `run` must be called from the main thread."""

    def __init__(
        self, config_path: Path | None, log: Log, ready_fd: int | None = None, until_stdin_ends: bool = False
    ) -> None:
        self._config_path = config_path
        self._log = log
        self._ready_fd = ready_fd
        self._until_stdin_ends = until_stdin_ends
        # Whoever has started this process is gone.
        self._is_left = False
        self._engine_ended = False

    def run(self) -> ExitCode:
        signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)
        try:
            config = load(self._config_path)
            prepare_directories(config)
        except ConfigurationError as error:
            self._log_problems("configuration_error", error)
            return ExitCode.CONFIGURATION
        self._log.write(
            "info", "starting", version=version(), pid=os.getpid(), config=config.source, wal=str(config.wal.dir)
        )
        try:
            engine = Engine.start(config, self._replay_progress)
        except EngineError as error:
            running = error.errno == errno.EBUSY
            event = "already_running" if running else "start_failed"
            self._log.write("error", event, reason=str(error), errno=errno.errorcode.get(error.errno, error.errno))
            return ExitCode.ALREADY_RUNNING if running else ExitCode.ENGINE_FAILED
        if config.is_stub:
            self._log.write(
                "warning", "test_stub", reason=STUB_WARNING, table=str(stub_table_of(config.control.socket))
            )
        events = threading.Thread(target=self._relay_events, args=(engine,), name="events", daemon=True)
        events.start()
        if self._until_stdin_ends:
            threading.Thread(target=self._watch_stdin, name="stdin", daemon=True).start()
        self._announce_ready(config)
        failed = not self._serve(engine, config)
        code = self._stop(engine, events)
        if config.is_stub:
            _leave_nothing(config, self._is_left)
        return ExitCode.ENGINE_FAILED if failed else code

    def _replay_progress(self, route: str, done_bytes: int, total_bytes: int) -> None:
        self._log.write("info", "replaying", route=route, done_bytes=done_bytes, total_bytes=total_bytes)

    def _serve(self, engine: Engine, config: Config) -> bool:
        """Returns when it is time to stop: True because somebody asked, False because the engine has ended."""
        while True:
            received = signal.sigwait(_WAITED)
            if received == signal.SIGHUP:
                config = self._reload(engine, config)
            elif received == _ENGINE_ENDED:
                # Anybody can send that signal; only the event thread sets the flag.
                if self._engine_ended:
                    self._log.write("error", "engine_ended", reason="the engine stopped by itself; see above")
                    return False
            else:
                self._log.write("info", "stopping", signal=signal.Signals(received).name, limit_ms=DRAIN_LIMIT_MS)
                return True

    def _reload(self, engine: Engine, running: Config) -> Config:
        """The new configuration if it could be put in place, else the running one, with the reason in the log."""
        kept = "reload_refused"
        if self._config_path is None:
            self._log.write("warning", kept, reason="there is no file to read again: started without --config")
            return running
        try:
            wanted = load(self._config_path)
        except ConfigurationError as error:
            self._log_problems(kept, error)
            return running
        fixed = changes_that_need_a_restart(running, wanted)
        if fixed:
            self._log.write(
                "error", kept, reason=f"{', '.join(fixed)} cannot change while the daemon runs; restart it for that"
            )
            return running
        try:
            engine.set_routes(wanted)
        except EngineError as error:
            self._log.write("error", kept, reason=str(error))
            return running
        self._log.write("info", "reloaded", routes=[route.name for route in wanted.routes])
        return wanted

    def _stop(self, engine: Engine, events: threading.Thread) -> ExitCode:
        _notify_service_manager("STOPPING=1")
        try:
            drained = engine.stop(DRAIN_LIMIT_MS)
        except EngineError as error:
            self._log.write("error", "stop_failed", reason=str(error))
            return ExitCode.ENGINE_FAILED
        events.join(EVENT_THREAD_LIMIT_S)
        counters = {name: value for name, value in engine.counters().items() if value}
        if not events.is_alive():
            engine.free()
        if not drained:
            reason = "not everything was drained within the limit; the next start finishes it from ring and log"
            self._log.write("error", "stopped", drained=False, reason=reason, counters=counters)
            return ExitCode.NOT_DRAINED
        self._log.write("info", "stopped", drained=True, counters=counters)
        return ExitCode.OK

    def _relay_events(self, engine: Engine) -> None:
        try:
            while True:
                event = engine.next_event(EVENT_WAIT_MS)
                if event is not None:
                    self._log.engine_event(event)
        except EngineStopped:
            pass
        except EngineError as error:
            self._log.write("error", "events_lost", reason=str(error))
            return
        self._engine_ended = True
        os.kill(os.getpid(), _ENGINE_ENDED)

    def _watch_stdin(self) -> None:
        try:
            while os.read(0, 4096):
                pass
        except OSError:
            pass
        self._is_left = True
        os.kill(os.getpid(), signal.SIGTERM)

    def _announce_ready(self, config: Config) -> None:
        for name in config.test.switched_on():
            self._log.write("warning", "test_setting", setting=f"test.{name}", reason="this daemon keeps nothing safe")
        if not config.routes:
            self._log.write("warning", "no_routes", reason="nothing will be offloaded; name routes in --config FILE")
        self._log.write(
            "info",
            "ready",
            socket=str(config.control.socket),
            ring=str(config.ring.path),
            routes=[route.name for route in config.routes],
        )
        _notify_service_manager("READY=1")
        if self._ready_fd is not None:
            try:
                os.write(self._ready_fd, b"ready\n")
                os.close(self._ready_fd)
            except OSError as error:
                self._log.write("warning", "ready_fd_failed", fd=self._ready_fd, reason=str(error))

    def _log_problems(self, event: str, error: ConfigurationError) -> None:
        for problem in error.problems:
            self._log.write("error", event, reason=str(problem))


def _leave_nothing(config: Config, is_left: bool) -> None:
    """What a test stub has kept is of no use to anybody; its ring, to those who have mapped it and are still there."""
    shutil.rmtree(config.wal.dir, ignore_errors=True)
    stub_table_of(config.control.socket).unlink(missing_ok=True)
    if is_left:
        socket = config.control.socket
        for path in (config.ring.path, socket.with_name(socket.name + ".lock")):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others have something there
            socket.parent.rmdir()


def _notify_service_manager(state: str) -> None:
    """systemd's sd_notify: one datagram, and no harm where nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    import socket

    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notifications:
            notifications.sendto(state.encode(), address)
    except OSError:
        pass
