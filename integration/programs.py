"""An ordinary program that a test drives line by line."""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from formats import LOG

from elgate.daemon.child import ChildDaemon

LIMIT_S = 20.0

PR_CAPBSET_DROP = 24
CAP_DAC_READ_SEARCH = 2


def start_as_anybody(daemon: ChildDaemon) -> None:
    """Starts it without the right to open files by their handles, which root alone has. (The bounding set is a
    thread's own, and goes to what the thread starts.)"""
    failed: list[BaseException] = []

    def start() -> None:
        try:
            assert os.geteuid() != 0 or ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_READ_SEARCH, 0, 0, 0) == 0
            daemon.start()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


APPENDER = """
import os, sys
import elgate
assert elgate.patch_all()
descriptor, path, others = None, None, []
for line in sys.stdin:
    word, _, argument = line.rstrip("\\n").partition(" ")
    try:
        if word == "open":
            path = argument
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        elif word == "write":
            os.write(descriptor, argument.encode() + b"\\n")
        elif word == "append":
            os.write(descriptor, argument.encode() + b"\\n")
            os.fsync(descriptor)
        elif word == "fill":
            os.write(descriptor, argument.encode() * (1 << 19))
            os.fsync(descriptor)
        elif word == "spread":  # a line into each of so many files beside it
            while len(others) < int(argument):
                others.append(os.open(f"{path}-{len(others)}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644))
            for other in others:
                os.write(other, b"line\\n")
        elif word == "sync":
            os.fsync(descriptor)
        elif word == "fence":
            os.pwrite(descriptor, b"L" * (2 << 20), 0)
        elif word == "close":
            os.close(descriptor)
        print("done", flush=True)
    except OSError as error:
        print(error.errno, flush=True)
"""


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not so after {limit_s:g} s"
        time.sleep(0.002)


def cursor_of(daemon: ChildDaemon) -> tuple[int, int]:
    """applied_lsn and durable_lsn of the newer block of the checkpoint."""
    raw = (daemon.wal_dir / "files" / "checkpoint").read_bytes()
    layout = LOG["Checkpoint"]
    base = max((0, 4096), key=lambda at: layout.get(raw, at, "sequence"))
    return layout.get(raw, base, "applied_lsn"), layout.get(raw, base, "durable_lsn")


class Driven:
    """A program that does one line after the other, and answers `done` or an errno to each."""

    def __init__(self, daemon: ChildDaemon, source: str, name: str) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-c", source],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**daemon.env(), "ELGATE_FALLBACK": "wait"},
        )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line.strip())

    def begin(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self, limit_s: float = LIMIT_S) -> int:
        """0, or the errno."""
        try:
            said = self.answers.get(timeout=limit_s)
        except queue.Empty:
            raise AssertionError(f"{self.name}: no answer after {limit_s:g} s") from None
        return 0 if said == "done" else int(said)

    def errno_of(self, line: str, limit_s: float = LIMIT_S) -> int:
        """0, or that of the OSError that it raised."""
        self.begin(line)
        return self.answer(limit_s)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Appender(Driven):
    """Appends lines to one file. What is acknowledged is in `acknowledged`, in order."""

    def __init__(self, daemon: ChildDaemon, path: Path) -> None:
        super().__init__(daemon, APPENDER, path.name)
        self.path = path
        self.acknowledged: list[bytes] = []
        assert self.errno_of(f"open {path}") == 0

    def append(self, text: str, limit_s: float = LIMIT_S) -> int:
        """One line, and an fsync: 0, or the errno of either."""
        result = self.errno_of(f"append {text}", limit_s)
        if result == 0:
            self.acknowledged.append(text.encode() + b"\n")
        return result

    def fill(self, letter: str) -> int:
        """Half a MiB of one letter, and an fsync."""
        result = self.errno_of(f"fill {letter}")
        if result == 0:
            self.acknowledged.append(letter.encode() * (1 << 19))
        return result

    def append_when_possible(self, text: str, limit_s: float = LIMIT_S) -> None:
        deadline = time.monotonic() + limit_s
        while (result := self.append(text)) != 0:
            assert time.monotonic() < deadline, f"{self.path.name}: {errno.errorcode[result]} after {limit_s:g} s still"
            time.sleep(0.02)

    def missing(self, found: bytes) -> list[bytes]:
        """What was acknowledged and is not in the file, in order. (Something refused may be there too.)"""
        missing, at = [], 0
        for piece in self.acknowledged:
            where = found.find(piece, at)
            if where < 0:
                missing.append(piece[:16])
            else:
                at = where + len(piece)
        return missing


PROGRAM = """
import os, shutil, sys
import elgate
assert elgate.patch_all()
names = {"os": os, "shutil": shutil, "elgate": elgate}
for line in sys.stdin:
    try:
        exec(line, names)
        print("done", flush=True)
    except OSError as error:
        print(error.errno, flush=True)
"""


class Program(Driven):
    """Does what it is told, a line of Python at a time; `os`, `shutil` and `elgate` are at hand, and names last."""

    def __init__(self, daemon: ChildDaemon) -> None:
        super().__init__(daemon, PROGRAM, "program")

    def do(self, line: str) -> None:
        result = self.errno_of(line)
        assert result == 0, f"{line}: {errno.errorcode[result]}"

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
