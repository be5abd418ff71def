"""What is measured of a system, and the rounds in which it is done."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from elgate.daemon.bench.figures import Slice

CLIENT_COUNTS = (1, 8, 32)
# In whole seconds: pgbench takes no other.
ROUND_S = 2
PAYLOAD_BYTES = 128


class PeerFailed(Exception):
    """One system cannot be measured; the message says why. The others can."""


@dataclass(frozen=True)
class Round:
    """One system under a number of clients for one round. Latencies are those of whole operations: from before the
    record is handed over until its acknowledgement."""

    operations_per_s: float
    mean_us: float
    p50_us: float
    p95_us: float
    p99_us: float

    @classmethod
    def of(cls, measured: Slice) -> Round:
        if not measured.samples_ns:
            raise PeerFailed("not one operation was acknowledged in a round")
        return cls(
            measured.operations_per_s,
            measured.mean_us,
            *(measured.percentile_us(percent) for percent in (50, 95, 99)),
        )


# Runs so many clients at once for a round.
Run = Callable[[int], Round]


@dataclass(frozen=True)
class Place:
    """Where one system keeps what is its own."""

    # On the disk that is measured.
    directory: Path
    # Short: the kernel limits a socket's path to 107 bytes.
    socket_directory: Path


@dataclass(frozen=True)
class System:
    """`name` is for metrics, `title` for people. `package` is the Debian package whose version is its version (a pattern;
    of several that match, the last one). `across_processes`: its clients are, or could be, programs of their own; else
    they are threads of one program.
    """

    name: str
    title: str
    package: str | None
    start: Callable[[Place], AbstractContextManager[Run]]
    across_processes: bool = True
    client_counts: tuple[int, ...] = CLIENT_COUNTS


# The rounds of each system with each number of clients.
Measured = dict[tuple[System, int], list[Round]]


def median(rounds: Sequence[Round], figure: str) -> float:
    return float(statistics.median(getattr(one, figure) for one in rounds))


def measure(
    systems: Sequence[System], rounds: int, directory: Path, sockets: Path, say: Callable[[str], None]
) -> tuple[Measured, dict[str, str]]:
    """All rounds of all systems that can be measured, and for the others, by name, why not."""
    measured: Measured = {}
    failures: dict[str, str] = {}
    running: dict[System, tuple[Run, ExitStack]] = {}

    def failed(system: System, error: Exception) -> None:
        # Whatever it was: the others are still worth measuring.
        failures.setdefault(system.name, str(error) or repr(error))
        say(f"{system.title} FAILED: {failures[system.name]}")

    def stop(system: System) -> None:
        _, stack = running.pop(system)
        try:
            stack.close()
        except Exception as error:
            failed(system, error)

    try:
        for system in systems:
            say(f"starting {system.title}")
            stack = ExitStack()
            place = Place(directory / system.name, sockets / system.name)
            place.directory.mkdir()
            place.socket_directory.mkdir()
            try:
                run = stack.enter_context(system.start(place))
                running[system] = run, stack
                for clients in system.client_counts:  # files made and grown, caches warm
                    run(clients)
            except Exception as error:
                failed(system, error)
                if system in running:
                    stop(system)
        for number in range(rounds):
            for clients in CLIENT_COUNTS:
                # Each round another one begins, so that nobody always comes behind the same neighbour.
                for system in [*systems[number % len(systems) :], *systems[: number % len(systems)]]:
                    if system not in running or clients not in system.client_counts:
                        continue
                    say(f"round {number + 1} of {rounds}, {clients} clients: {system.title}")
                    try:
                        result: Round = running[system][0](clients)
                        measured.setdefault((system, clients), []).append(result)
                    except Exception as error:
                        failed(system, error)
                        stop(system)
    finally:
        for system in list(running):
            stop(system)
    # Of a system that failed half way, nothing is shown.
    return {cell: results for cell, results in measured.items() if cell[0].name not in failures}, failures
