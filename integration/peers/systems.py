"""The systems: how each is set up, what its clients are, and why so.

Each is a context that yields how to run a round. Every one is given what a good engineer would give it for this job:
many clients, each of which waits until its small record is durable.
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elgate.daemon.bench.figures import BLOCK_BYTES, Producers, Slice, installed_daemon

from .measured import CLIENT_COUNTS, PAYLOAD_BYTES, ROUND_S, PeerFailed, Place, Round, Run, System
from .processes import Clients, compiled, output_of, server, unprivileged


@contextmanager
def elgate(place: Place) -> Iterator[Run]:
    with (
        installed_daemon() as daemon,
        Producers("elgate", max(CLIENT_COUNTS), daemon.route_dir, daemon.env()) as producers,
    ):
        yield lambda clients: Round.of(producers.run("write_fsync", PAYLOAD_BYTES, clients, ROUND_S))


@contextmanager
def native(place: Place) -> Iterator[Run]:
    with Producers("native", max(CLIENT_COUNTS), place.directory, dict(os.environ)) as producers:
        yield lambda clients: Round.of(producers.run("native", PAYLOAD_BYTES, clients, ROUND_S))


@contextmanager
def raw(place: Place) -> Iterator[Run]:
    with Producers("native", 1, place.directory, dict(os.environ)) as producers:
        yield lambda clients: Round.of(producers.run("raw", BLOCK_BYTES, clients, ROUND_S))


@contextmanager
def sqlite(place: Place) -> Iterator[Run]:
    program = compiled("sqlite", "sqlite3", place.directory)
    with Clients([program, place.directory / "database", "own"], max(CLIENT_COUNTS), place.directory) as clients:
        yield lambda count: Round.of(clients.run(count, 1))


@contextmanager
def sqlite_one_writer(place: Place) -> Iterator[Run]:
    program = compiled("sqlite", "sqlite3", place.directory)
    with Clients([program, place.directory / "database", "writer"], 1, place.directory) as clients:
        yield lambda count: Round.of(clients.run(1, count))


@contextmanager
def rocksdb(place: Place) -> Iterator[Run]:
    program = compiled("rocksdb", "rocksdb", place.directory)
    with Clients([program, place.directory / "database"], 1, place.directory) as clients:
        yield lambda count: Round.of(clients.run(1, count))


POSTGRESQL_USER = "postgres"
POSTGRESQL_SETTINGS = {
    "listen_addresses": "''",
    "max_connections": "50",
    # Without a standby the log holds less, and goes past the page cache with open_datasync: the fastest way here.
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "wal_sync_method": "open_datasync",
    # No checkpoint and no vacuum in the middle of a run.
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "30min",
    "autovacuum": "off",
    "fsync": "on",
    "synchronous_commit": "on",
}


@contextmanager
def postgresql(place: Place) -> Iterator[Run]:
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), default=None)
    if programs is None:
        raise PeerFailed("PostgreSQL is not installed")
    # It refuses to run as root.
    options = unprivileged(POSTGRESQL_USER)
    if options:
        for directory in (place.directory, place.socket_directory):
            shutil.chown(directory, POSTGRESQL_USER, POSTGRESQL_USER)
    options["cwd"] = place.directory
    data = place.directory / "data"
    output_of(
        [programs / "initdb", "--pgdata", data, "--username", POSTGRESQL_USER, "--auth", "trust", "--no-sync",
         "--locale", "C", "--encoding", "UTF8"],
        **options,
    )  # fmt: skip
    with open(data / "postgresql.conf", "a") as configuration:
        settings = {**POSTGRESQL_SETTINGS, "unix_socket_directories": f"'{place.socket_directory}'"}
        configuration.writelines(f"{name} = {value}\n" for name, value in settings.items())
    to_server: list[str | Path] = ["--host", place.socket_directory, "--username", POSTGRESQL_USER]
    script = place.directory / "insert.sql"
    script.write_text("INSERT INTO record (payload) VALUES (:payload);\n")

    def run(clients: int) -> Round:
        log = place.directory / "transactions"
        said = output_of(
            [
                programs / "pgbench", *to_server, "--no-vacuum", "--protocol", "prepared",
                "--client", str(clients), "--jobs", "1", "--time", str(ROUND_S),
                "--define", f"payload={'e' * PAYLOAD_BYTES}", "--file", script,
                # A line for one of five transactions: for each, it would be two to four percent of the time.
                "--log", "--log-prefix", log, "--sampling-rate", "0.2",
                "postgres",
            ]
        )  # fmt: skip
        rate = next(float(line.split()[2]) for line in said.splitlines() if line.startswith("tps = "))
        latencies_us: list[int] = []
        for path in place.directory.glob(f"{log.name}.*"):
            latencies_us.extend(int(line.split()[2]) for line in path.read_text().splitlines())
            path.unlink()
        return Round.of(Slice(round(rate * ROUND_S), ROUND_S, [latency * 1000 for latency in latencies_us]))

    with server(
        [programs / "postgres", "-D", data],
        place.directory / "log",
        [programs / "pg_isready", *to_server],
        signal.SIGINT,
        **options,
    ):
        output_of(
            [programs / "psql", *to_server, "--quiet", "--command", "CREATE TABLE record (payload text NOT NULL)"]
        )
        yield run


@contextmanager
def redis(place: Place) -> Iterator[Run]:
    socket = place.socket_directory / "redis.sock"
    # Debian's redis-tools has the server too, under another of its names, without a service that would be started.
    executable = shutil.which("redis-server") or shutil.which("redis-check-rdb")
    if executable is None:
        raise PeerFailed("Redis is not installed")
    rates: dict[int, float] = {}

    def benchmark(clients: int, requests: int) -> list[float]:
        said = output_of(
            [
                "redis-benchmark", "-s", socket, "-c", str(clients), "-n", str(requests), "--csv",
                "RPUSH", "records", "e" * PAYLOAD_BYTES,
            ]
        )  # fmt: skip
        # rps, and then in ms: mean, least, p50, p95, p99, most.
        return [float(figure) for figure in list(csv.reader(said.splitlines()))[-1][1:]]

    def run(clients: int) -> Round:
        # It takes a number of requests, not a time: that which took a round the last time.
        if clients not in rates:
            rates[clients] = benchmark(clients, 1000 * clients)[0]
        rate, mean, _, p50, p95, p99, _ = benchmark(clients, max(round(rates[clients] * ROUND_S), 100))
        rates[clients] = rate
        return Round(rate, *(1000 * figure for figure in (mean, p50, p95, p99)))

    with server(
        [
            "redis-server", "--port", "0", "--unixsocket", socket, "--dir", place.directory,
            "--appendonly", "yes", "--appendfsync", "always",
            # No snapshot, and no rewriting of the log, in the middle of a run.
            "--save", "", "--auto-aof-rewrite-percentage", "0",
        ],
        place.directory / "log",
        ["redis-cli", "-s", socket, "ping"],
        executable=executable,
    ):  # fmt: skip
        yield run


ELGATE = System("elgate", "Elgate", None, elgate)
PEERS = (
    System("sqlite", "SQLite, a process per client", "libsqlite3-0", sqlite),
    System(
        "sqlite_one_writer",
        "SQLite, one writer thread for all",
        "libsqlite3-0",
        sqlite_one_writer,
        across_processes=False,
    ),
    System("postgresql", "PostgreSQL", "postgresql-[0-9]*", postgresql),
    System("redis", "Redis", "redis-tools", redis),
    System("rocksdb", "RocksDB", "librocksdb-dev", rocksdb, across_processes=False),
)
BASELINES = (
    System("native", "write + fdatasync, a file per client", None, native),
    System("raw_loop", "one raw durable write of 4 KiB after the other", None, raw, client_counts=(1,)),
)
