"""Programs that are started for a benchmark, and ended by their pid."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from elgate.daemon.bench.figures import START_DELAY_S, Slice

from .measured import ROUND_S, PeerFailed

CLIENTS = Path(__file__).parent / "clients"
# For whatever takes no measurable time when all is well.
LIMIT_S = 60


def output_of(command: Sequence[str | Path], **options: object) -> str:
    """Runs a command to its end and returns its stdout. Raises PeerFailed with what it said."""
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S, check=False, **options
        )  # type: ignore[call-overload]
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerFailed(str(error)) from error
    if result.returncode != 0:
        raise PeerFailed(f"{command[0]} ended with {result.returncode}: {(result.stderr or result.stdout).strip()}")
    return str(result.stdout)


@contextmanager
def server(
    command: Sequence[str | Path],
    log: Path,
    ping: Sequence[str | Path],
    stop_signal: int = signal.SIGTERM,
    **options: object,
) -> Iterator[None]:
    """A server as long as the context lasts; entered when the command `ping` succeeds."""
    with open(log, "ab") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # As Elgate's daemon: Ctrl-C is for the one who started it, who then ends it. It is also a scheduling
                # group of its own (autogroup), as a service is.
                start_new_session=True,
                **options,
            )  # type: ignore[call-overload]
        except OSError as error:
            raise PeerFailed(str(error)) from error
    try:
        deadline = time.monotonic() + LIMIT_S
        while subprocess.run(ping, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode != 0:
            if process.poll() is not None or time.monotonic() > deadline:
                raise PeerFailed(f"{command[0]} does not serve; its log ends:\n{_end_of(log)}")
            time.sleep(0.05)
        yield
    finally:
        process.send_signal(stop_signal)
        try:
            process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-10:])


def compiled(name: str, library: str, directory: Path) -> Path:
    """clients/`name`.c as a program, linked with a system's library."""
    program = directory / f"{name}-client"
    output_of(
        [
            sys.executable, "-m", "ziglang", "cc", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror",
            CLIENTS / "client.c", CLIENTS / f"{name}.c", "-o", program, f"-l{library}",
        ]
    )  # fmt: skip
    return program


class Clients:
    """Processes of a compiled client (clients/client.h says how they are spoken to), each with as many threads as an
    order says."""

    def __init__(self, command: Sequence[str | Path], processes: int, directory: Path) -> None:
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            # One after the other: the first one makes what the others open.
            for _ in range(processes):
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                self._processes.append(process)
                self._answer(process)
        except PeerFailed:
            self.close()
            raise

    @staticmethod
    def _answer(process: subprocess.Popen[bytes]) -> str:
        # One line per order, so that nothing can lie in the buffer when it is not readable.
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], LIMIT_S)
        answer = process.stdout.readline().decode().strip() if readable else ""
        if not answer:
            raise PeerFailed("a client ended; see its message above" if readable else "a client does not answer")
        return answer

    def run(self, processes: int, threads: int) -> Slice:
        """So many threads in each of the first `processes` for one round."""
        start_ns = time.monotonic_ns() + int(START_DELAY_S * 1e9)
        until_ns = start_ns + ROUND_S * 1_000_000_000
        chosen = self._processes[:processes]
        for number, process in enumerate(chosen):
            assert process.stdin is not None
            process.stdin.write(f"{threads} {start_ns} {until_ns} {self._directory / f'samples-{number}'}\n".encode())
            process.stdin.flush()
        counts = [int(self._answer(process)) for process in chosen]
        samples = array("Q")
        for number, count in enumerate(counts):
            with open(self._directory / f"samples-{number}", "rb") as file:
                samples.fromfile(file, count)
        return Slice(sum(counts), ROUND_S, samples.tolist())

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.close()
                process.wait(LIMIT_S)
            except (OSError, subprocess.TimeoutExpired):
                process.kill()
                process.wait()
            process.stdout.close()

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def unprivileged(name: str) -> dict[str, object]:
    """The options of subprocess that start a program as this user, where we are root; as ourselves otherwise."""
    return {"user": name, "group": name, "extra_groups": []} if os.geteuid() == 0 else {}
