"""A daemon as a child process, with everything of its own: for the demo, for benchmarks and for tests.

Its files lie in one directory, its socket in a short-named one (the kernel limits a socket's path to 107 bytes), its
ring under a name of its own in /dev/shm. `close` leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import yaml

from elgate.daemon.places import filesystem_of

READY_LIMIT_S = 30.0
STOP_LIMIT_S = 45.0


class DaemonFailed(Exception):
    """The daemon did not start, or did not stop, as it should have. The message has the end of its log."""


class ChildDaemon:
    """Start, stop and kill a daemon; its ring and log stay between lives, as they do for any daemon.

    `routes` are entries of the configuration's `routes`; by default one, `files`, for all below `route_dir`.
    `sections` replaces or adds further sections of the configuration. Not thread-safe.
    """

    def __init__(
        self,
        directory: Path,
        routes: Iterable[Mapping[str, Any]] | None = None,
        sections: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.directory = directory
        self.route_dir = directory / "files"
        self.wal_dir = directory / "wal"
        self.config_path = directory / "elgate.yaml"
        self.log_path = directory / "daemon.log"
        for path in (self.route_dir, self.wal_dir):
            path.mkdir(parents=True, exist_ok=True)
        self._socket_dir = Path(tempfile.mkdtemp(prefix="elgate-socket-", dir="/tmp"))
        self.socket = self._socket_dir / "control.sock"
        self.ring_path = Path(f"/dev/shm/elgate_ring-{uuid.uuid4().hex[:12]}")
        self.process: subprocess.Popen[bytes] | None = None
        self._ready_fd: int | None = None
        self._sections = dict(sections or {})
        self.write_config(
            routes if routes is not None else [{"name": "files", "match": {"path": f"{self.route_dir}/**"}}]
        )

    def write_config(self, routes: Iterable[Mapping[str, Any]]) -> None:
        """Writes the configuration anew; a running daemon reads it when it gets SIGHUP."""
        document: dict[str, Any] = {
            "version": 1,
            "control": {"socket": str(self.socket), "mode": "0600"},
            "ring": {"path": str(self.ring_path)},
            "wal": {"dir": str(self.wal_dir), "allow_volatile": filesystem_of(self.directory).volatile},
            "routes": [dict(route) for route in routes],
        }
        for name, section in self._sections.items():
            document[name] = {**document.get(name, {}), **section}
        self.config_path.write_text(yaml.safe_dump(document, sort_keys=False))

    def start(self, *, wait: bool = True, environment: Mapping[str, str] | None = None) -> None:
        """Starts it, and waits until it serves unless told otherwise. Raises DaemonFailed."""
        if self.process is not None and self.process.poll() is None:
            raise DaemonFailed("it is running already")
        self._close_ready_fd()
        read_fd, write_fd = os.pipe()
        try:
            with open(self.log_path, "ab") as log:
                self.process = self._spawn(
                    [
                        sys.executable, "-m", "elgate.daemon", "--config", str(self.config_path),
                        "--log-format", "json", "--ready-fd", str(write_fd),
                    ],
                    log,
                    write_fd,
                    {**os.environ, **(environment or {})},
                )  # fmt: skip
        finally:
            os.close(write_fd)
        self._ready_fd = read_fd
        if wait:
            self.wait_ready()

    def _spawn(self, command: list[str], log: IO[bytes], ready_fd: int, environment: dict[str, str]) -> Any:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(ready_fd,),
            # Ctrl-C is for the one who started it, who then ends it.
            start_new_session=True,
            env=environment,
        )

    def wait_ready(self, limit_s: float = READY_LIMIT_S) -> None:
        """Waits until the daemon serves. Raises DaemonFailed when it ends before that, or the limit passes."""
        if self._ready_fd is None:
            return
        readable, _, _ = select.select([self._ready_fd], [], [], limit_s)
        said = os.read(self._ready_fd, 64) if readable else b""
        self._close_ready_fd()
        if said != b"ready\n":
            what = "ended before it served" if readable else f"does not serve after {limit_s:g} s"
            if readable and self.process is not None:
                # Its descriptors go before it does.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(limit_s)
            raise DaemonFailed(f"the daemon {what}; its log ends:\n{self._log_end()}")

    def stop(self, limit_s: float = STOP_LIMIT_S) -> int:
        """SIGTERM; waits for its end and returns its exit code. Raises DaemonFailed when the limit passes."""
        if self.process is None:
            raise DaemonFailed("it was never started")
        self.process.terminate()
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise DaemonFailed(
                f"the daemon does not stop after {limit_s:g} s; its log ends:\n{self._log_end()}"
            ) from None

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone. Raises DaemonFailed if it was gone before."""
        if self.process is None or self.process.poll() is not None:
            raise DaemonFailed(f"nothing to kill: the daemon had ended by itself; its log ends:\n{self._log_end()}")
        self.process.kill()
        self.process.wait()

    def reload(self) -> None:
        """SIGHUP."""
        if self.process is None:
            raise DaemonFailed("it was never started")
        self.process.send_signal(signal.SIGHUP)

    @property
    def pid(self) -> int:
        """Of the present or the last life."""
        if self.process is None:
            raise DaemonFailed("it was never started")
        return self.process.pid

    def env(self) -> dict[str, str]:
        """The environment for an application that is to find this daemon, and to fail without it."""
        return {**os.environ, "ELGATE_SOCKET": str(self.socket), "ELGATE_FALLBACK": "fail"}

    def log_text(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The log's events so far, of all lives: those of one name, or all."""
        events = []
        for line in self.log_text().splitlines():
            if line.startswith("{"):
                try:
                    event = json.loads(line)
                except ValueError:
                    continue  # the line at which a life was cut off
                if name is None or event.get("event") == name:
                    events.append(event)
        return events

    def wait_for_event(self, name: str, *, count: int = 1, limit_s: float = READY_LIMIT_S) -> dict[str, Any]:
        """Waits until the log has `count` events of that name; returns the last one. Raises DaemonFailed."""
        deadline = time.monotonic() + limit_s
        while True:
            found = self.events(name)
            if len(found) >= count:
                return found[count - 1]
            if time.monotonic() > deadline:
                raise DaemonFailed(f"no event '{name}' after {limit_s:g} s; the log ends:\n{self._log_end()}")
            time.sleep(0.01)

    def close(self) -> None:
        """Ends it if it runs, and removes socket and ring (not `directory`, which is the caller's)."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._close_ready_fd()
        shutil.rmtree(self._socket_dir, ignore_errors=True)
        # A ring's shards and set-aside rings carry its name with something behind it.
        for ring in self.ring_path.parent.glob(self.ring_path.name + "*"):
            ring.unlink(missing_ok=True)

    def __enter__(self) -> ChildDaemon:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _close_ready_fd(self) -> None:
        if self._ready_fd is not None:
            os.close(self._ready_fd)
            self._ready_fd = None

    def _log_end(self) -> str:
        return "\n".join(self.log_text().splitlines()[-20:]) or "(empty)"
