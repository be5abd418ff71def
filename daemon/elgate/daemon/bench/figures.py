"""What is measured, and what it is measured against."""

from __future__ import annotations

import json
import math
import os
import platform
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from elgate.daemon.bench.producer import REPLAY_LOG_BYTES
from elgate.daemon.child import ChildDaemon
from elgate.daemon.places import filesystem_of, scratch_directory

REPETITIONS = 5
SLICE_S = 0.6
START_DELAY_S = 0.03
IDLE_S = 10.0
# For a slice, and for what a disk that stalls makes of it.
ANSWER_LIMIT_S = 120.0
RECORD_BYTES = 128
BLOCK_BYTES = 4096
RECORD_HEADER_BYTES = 96
# On these machines a sync now and then takes a whole scheduler tick; such operations are counted, not dropped.
STALL_NS = 3_000_000
# The specification's figure, for a disk with power-loss protection.
PACED_US = 80.0
PACE_INTERVAL_NS = 100_000
# Time enough for everybody to go to sleep.
ROUND_TRIP_INTERVAL_NS = 1_000_000
# Another figure of the specification, and what it is held against here.
STREAM_BYTES_PER_S = 100_000_000
STREAM_RECORD_BYTES = 4096
STREAM_RAW_BYTES = 64 << 10
STREAM_P95_US = 250.0
KIB_RECORD_BYTES = 1024
FLUSH_INTERVAL = "5ms"


@dataclass
class Row:
    """One figure. `ratio` is value ÷ baseline; `goal` is in words, `met` what came of it (None: no goal)."""

    metric: str
    value: float
    unit: str
    baseline: float | None = None
    baseline_is: str = ""
    ratio: float | None = None
    goal: str = ""
    met: bool | None = None

    def as_document(self) -> dict[str, Any]:
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in vars(self).items()}


@dataclass
class Slice:
    """One loop by one or more producers for one slice of time."""

    operations: int
    seconds: float
    samples_ns: list[int]
    # The same, by producer.
    by_producer: Sequence[Sequence[int]] = ()

    @property
    def operations_per_s(self) -> float:
        return self.operations / self.seconds

    @property
    def mean_us(self) -> float:
        return statistics.fmean(self.samples_ns) / 1000

    def percentile_us(self, percent: float) -> float:
        ordered = sorted(self.samples_ns)
        return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)] / 1000

    @property
    def stalls(self) -> int:
        return sum(sample > STALL_NS for sample in self.samples_ns)


class Producers:
    """Processes that wait for loops to run; kept over a whole benchmark, so that no start-up is measured."""

    def __init__(self, through: str, count: int, directory: Path, environment: dict[str, str]) -> None:
        self._directory = directory
        self._through = through
        directory.mkdir(parents=True, exist_ok=True)
        self._scratch = Path(tempfile.mkdtemp(prefix="elgate-bench-", dir="/tmp"))
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "elgate.daemon.bench.producer", through],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
            )
            for _ in range(count)
        ]
        for process in self._processes:
            if self._answer(process) != "ready":
                raise RuntimeError("a producer did not start; see its message above")

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        # One line at a time, so that nothing of it is buffered here.
        if not select.select([process.stdout], [], [], ANSWER_LIMIT_S)[0]:
            raise RuntimeError(f"a producer did not answer within {ANSWER_LIMIT_S:g} s")
        return process.stdout.readline().strip()

    def run(
        self,
        loop: str,
        length_bytes: int,
        count: int = 1,
        seconds: float = SLICE_S,
        path: Path | None = None,
        interval_ns: int = 0,
    ) -> Slice:
        """The loop in the first `count` processes at once, each on a file of its own (or, one alone, on `path`).
        `interval_ns`: of the paced loops."""
        start_ns = time.monotonic_ns() + int(START_DELAY_S * 1e9)
        chosen = self._processes[:count]
        for number, process in enumerate(chosen):
            order = {
                "loop": loop,
                "path": str(path or self._directory / f"{'raw' if loop.startswith('raw') else 'file'}-{number}"),
                "interval_ns": interval_ns,
                "length_bytes": length_bytes,
                "start_ns": start_ns,
                "until_ns": start_ns + int(seconds * 1e9),
                "samples_path": str(self._scratch / str(number)),
            }
            assert process.stdin is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        answers = [self._answer(process) for process in chosen]
        if not all(answers):
            raise RuntimeError(f"a producer of the {loop} loop ended; see its message above")
        took_s = seconds
        by_producer = []
        if loop.endswith("flood"):
            took_s = (time.monotonic_ns() - start_ns) / 1e9  # until all of it was applied
        else:
            for number, answer in enumerate(answers):
                samples = array("Q")
                with open(self._scratch / str(number), "rb") as file:
                    samples.fromfile(file, int(answer))
                by_producer.append(samples.tolist())
        return Slice(sum(map(int, answers)), took_s, [one for each in by_producer for one in each], by_producer)

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            process.wait(60)
            assert process.stdout is not None
            process.stdout.close()
        shutil.rmtree(self._scratch)

    def __enter__(self) -> Producers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def installed_daemon(
    sections: dict[str, dict[str, Any]] | None = None, flush: Any = "group", elsewhere: Path | None = None
) -> Iterator[ChildDaemon]:
    """The installed daemon in a scratch directory on a real disk, with everything on that it always has on. `elsewhere`:
    a second route, for what lies in that directory."""
    directory = scratch_directory("elgate-bench-")
    try:
        with ChildDaemon(directory, sections=sections) as daemon:
            routes = {"files": daemon.route_dir, "elsewhere": elsewhere}
            daemon.write_config(
                {"name": name, "match": {"path": f"{path}/**"}, "flush": flush} for name, path in routes.items() if path
            )
            daemon.start()
            yield daemon
            daemon.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _median(slices: Sequence[Slice], figure: Callable[[Slice], float]) -> float:
    return statistics.median(figure(one) for one in slices)


def machine(directory: Path) -> dict[str, Any]:
    return {
        "cpus": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "filesystem": filesystem_of(directory).type,
        "load_before": round(os.getloadavg()[0], 2),
    }


def ring(say: Callable[[str], None]) -> tuple[dict[str, Any], list[Row]]:
    """What accepting an operation costs, the drain alone, and an idle daemon."""
    rows: list[Row] = []
    with installed_daemon() as daemon:
        facts = machine(daemon.directory)
        native_directory = daemon.directory / "native"
        with (
            Producers("elgate", 2, daemon.route_dir, daemon.env()) as through,
            Producers("native", 2, native_directory, dict(os.environ)) as native,
        ):
            for length in (RECORD_BYTES, BLOCK_BYTES):
                accepts, writes = [], []
                for repetition in range(REPETITIONS):
                    say(f"accept {length} B: {repetition + 1} of {REPETITIONS}")
                    accepts.append(through.run("accept", length))
                    writes.append(native.run("page_cache", length))
                value = _median(accepts, lambda s: s.percentile_us(50) * 1000)
                baseline = _median(writes, lambda s: s.percentile_us(50) * 1000)
                limit = 200 if length == RECORD_BYTES else None
                rows.append(
                    Row(
                        f"accept_{length}B_p50", value, "ns", baseline, "write() of the same size to the page cache",
                        value / baseline,
                        "at most 200 ns, and less than half of the write()" if limit else "",
                        value <= limit and value < baseline / 2 if limit else None,
                    )
                )  # fmt: skip
            rows += _accept_beside(say, through, native)
        rows.append(_fairness(say, daemon))
        say(f"idle daemon: {IDLE_S:g} s")
        assert daemon.process is not None
        process = psutil.Process(daemon.process.pid)
        before = process.cpu_times()
        time.sleep(IDLE_S)
        after = process.cpu_times()
        percent = (after.user + after.system - before.user - before.system) / IDLE_S * 100
        rows.append(Row("idle_daemon_cpu", percent, "% of one core", goal="under 0.5", met=percent < 0.5))
    with installed_daemon({"test": {"null_sink": True}}) as daemon:
        with Producers("elgate", 2, daemon.route_dir, daemon.env()) as through:
            for count in (1, 2):
                drains = []
                for repetition in range(REPETITIONS):
                    say(f"drain into a null sink, {count} producers: {repetition + 1} of {REPETITIONS}")
                    drains.append(through.run("flood", RECORD_BYTES, count))
                rows.append(
                    Row(f"null_sink_drain_{count}_producers", _median(drains, lambda s: s.operations_per_s), "op/s")
                )
            with Producers("native", 1, daemon.directory / "native", dict(os.environ)) as native:
                rows.append(_wake(say, through, native))
    return facts, rows


def _accept_beside(say: Callable[[str], None], through: Producers, native: Producers) -> list[Row]:
    """The same by two producers at once, and by one that leaves the daemon time to go to sleep."""
    rows = []
    together, writes = [], []
    for repetition in range(REPETITIONS):
        say(f"accept by 2 producers: {repetition + 1} of {REPETITIONS}")
        together.append(through.run("accept", RECORD_BYTES, 2))
        writes.append(native.run("page_cache", RECORD_BYTES, 2))
    value = _median(together, lambda s: s.percentile_us(50) * 1000)
    baseline = _median(writes, lambda s: s.percentile_us(50) * 1000)
    rows.append(
        Row(
            f"accept_{RECORD_BYTES}B_2_producers_p50", value, "ns", baseline, "write() by 2 processes to the page cache",
            value / baseline, "at most 200 ns", value <= 200,
        )
    )  # fmt: skip
    for per_s in (100_000, 5_000):
        paced = []
        for repetition in range(REPETITIONS):
            say(f"accept, {per_s:,} a second: {repetition + 1} of {REPETITIONS}")
            paced.append(through.run("append_paced", RECORD_BYTES, interval_ns=10**9 // per_s))
        for percent in (50, 99):
            value = _median(paced, lambda s, percent=percent: s.percentile_us(percent) * 1000)  # type: ignore[misc]
            rows.append(Row(f"accept_{RECORD_BYTES}B_{per_s // 1000}k_a_second_p{percent}", value, "ns"))
    return rows


def _fairness(say: Callable[[str], None], daemon: ChildDaemon) -> Row:
    """Producers that together fill the ring, and so wait for space most of the time: what an append takes each of them."""
    count, means = 8, []
    with Producers("elgate", count, daemon.route_dir / "fairness", daemon.env()) as through:
        through.run("append_times", RECORD_BYTES, count, 0.2)
        for repetition in range(REPETITIONS):
            say(f"{count} producers in a full ring: {repetition + 1} of {REPETITIONS}")
            slice_ = through.run("append_times", RECORD_BYTES, count)
            means.append([statistics.fmean(samples) / 1000 for samples in slice_.by_producer])
    slowest, median = sorted(
        ((max(each), statistics.median(each)) for each in means), key=lambda pair: pair[0] / pair[1]
    )[REPETITIONS // 2]
    return Row(
        f"full_ring_slowest_of_{count}_producers_mean", slowest, "µs", median, "the median of the producers",
        slowest / median, "at most 10 × the median", slowest <= 10 * median,
    )  # fmt: skip


def _wake(say: Callable[[str], None], through: Producers, native: Producers) -> Row:
    trips, futexes = [], []
    for repetition in range(REPETITIONS):
        say(f"there and back: {repetition + 1} of {REPETITIONS}")
        trips.append(through.run("round_trip", RECORD_BYTES, interval_ns=ROUND_TRIP_INTERVAL_NS))
        futexes.append(native.run("futex_round_trip", RECORD_BYTES, interval_ns=ROUND_TRIP_INTERVAL_NS))
    value = _median(trips, lambda s: s.percentile_us(50))
    baseline = _median(futexes, lambda s: s.percentile_us(50))
    return Row(
        "round_trip_p50", value, "µs", baseline, "two threads that wake each other by futexes", value / baseline,
        "at most 2 × the futexes", value <= 2 * baseline,
    )  # fmt: skip


def wal(say: Callable[[str], None]) -> tuple[dict[str, Any], list[Row]]:
    """Durable appends by 1, 8 and 32 producers, beside the disk's own floor and the native way."""
    rows: list[Row] = []
    counts = (1, 8, 32)
    with installed_daemon() as daemon:
        facts = machine(daemon.directory)
        native_directory = daemon.directory / "native"
        raws: list[Slice] = []
        natives: dict[int, list[Slice]] = {count: [] for count in counts}
        durables: dict[int, list[Slice]] = {count: [] for count in counts}
        say("starting 65 producers")
        with (
            Producers("elgate", max(counts), daemon.route_dir, daemon.env()) as through,
            Producers("native", max(counts), native_directory, dict(os.environ)) as native,
        ):
            for count in counts:  # files made, registered and grown; segments made
                native.run("native", RECORD_BYTES, count, 0.3)
                through.run("durable", RECORD_BYTES, count, 0.3)
            native.run("raw", BLOCK_BYTES, 1, 0.1)
            for repetition in range(REPETITIONS):
                for count in counts:
                    say(f"durable appends, {count} producers: {repetition + 1} of {REPETITIONS}")
                    raws.append(native.run("raw", BLOCK_BYTES))
                    durables[count].append(through.run("durable", RECORD_BYTES, count))
                    natives[count].append(native.run("native", RECORD_BYTES, count))
    raw_mean = _median(raws, lambda s: s.mean_us)
    raw_operations = _median(raws, lambda s: s.operations_per_s)
    raw_is = "raw loop: one preallocated O_DIRECT RWF_DSYNC write of 4 KiB after the other"
    rows.append(Row("raw_loop_mean", raw_mean, "µs"))
    rows.append(Row("raw_loop", raw_operations, "op/s"))
    for count in counts:
        slices = durables[count]
        prefix = f"durable_{count}_producer{'s' if count > 1 else ''}"
        mean = _median(slices, lambda s: s.mean_us)
        single = count == 1
        rows.append(
            Row(
                f"{prefix}_mean", mean, "µs", raw_mean, raw_is, mean / raw_mean,
                "at most 1.3 × the raw loop" if single else "", mean <= 1.3 * raw_mean if single else None,
            )
        )  # fmt: skip
        for percent in (50, 95, 99):
            value = _median(slices, lambda s, percent=percent: s.percentile_us(percent))  # type: ignore[misc]
            base = _median(raws, lambda s, percent=percent: s.percentile_us(percent))  # type: ignore[misc]
            rows.append(Row(f"{prefix}_p{percent}", value, "µs", base, raw_is, value / base))
        operations = _median(slices, lambda s: s.operations_per_s)
        many = count == 32
        rows.append(
            Row(
                f"{prefix}", operations, "op/s", raw_operations, raw_is, operations / raw_operations,
                "at least 7 × the raw loop" if many else "", operations >= 7 * raw_operations if many else None,
            )
        )  # fmt: skip
        native_operations = _median(natives[count], lambda s: s.operations_per_s)
        rows.append(
            Row(
                f"{prefix}_beside_native", operations, "op/s", native_operations,
                f"write + fdatasync by {count} processes on growing files", operations / native_operations,
                "at least 1.8 × native" if many else "", operations >= 1.8 * native_operations if many else None,
            )
        )  # fmt: skip
        rows.append(
            Row(
                f"{prefix}_stalls", sum(s.stalls for s in slices) / max(sum(s.operations for s in slices), 1) * 100,
                "% of operations over 3 ms",
                sum(s.stalls for s in raws) / max(sum(s.operations for s in raws), 1) * 100, raw_is,
            )
        )  # fmt: skip
    rows.append(_replay_row(say, "replay", BLOCK_BYTES))
    rows.append(_replay_row(say, f"replay_{RECORD_BYTES}B", RECORD_BYTES))
    rows.append(_replay_applied_row(say))
    rows += paced(say)
    rows += stream(say)
    rows += larger_records(say)
    rows += beside_a_spinner(say)
    rows += beside_a_frozen_disk(say)
    return facts, rows


def _read_through(directory: Path) -> float:
    """MB/s of reading all files of a directory from the page cache."""
    buffer = memoryview(bytearray(1 << 20))
    total, begin = 0, time.monotonic()
    for path in sorted(directory.glob("*.wal")):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total / (time.monotonic() - begin) / 1e6


def _replay_row(say: Callable[[str], None], metric: str, length_bytes: int) -> Row:
    """A log in the page cache, as a start reads it: checked three times over, each record delivered twice."""
    say(f"replay of a log with records of {length_bytes} B")
    directory = scratch_directory("elgate-replay-")
    try:
        with Producers("native", 1, directory, dict(os.environ)) as native:
            log = directory / "log"
            slice_ = native.run("replay", length_bytes, 1, path=log)
            # The first one brings it into the page cache.
            value = REPLAY_LOG_BYTES / statistics.median(slice_.samples_ns[1:]) * 1e3
            baseline = statistics.median(_read_through(log) for _ in range(3))
            return Row(
                metric, value, "MB/s of log", baseline, "read() of the same files from the page cache, once",
                value / baseline, "at least 500", value >= 500,
            )  # fmt: skip
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _replay_applied_row(say: Callable[[str], None]) -> Row:
    """The start of a daemon that was killed: its log is replayed, and applied to the files."""
    rates = []
    with installed_daemon({"wal": {"checkpoint_interval": "10min"}}) as daemon:
        for repetition in range(3):
            say(f"replay into files: {repetition + 1} of 3")
            with Producers("elgate", 1, daemon.route_dir, daemon.env()) as through:
                through.run("flood", RECORD_BYTES, 1, 0.5)
                daemon.kill()
            daemon.start()
            event = daemon.wait_for_event("log_replayed", count=repetition + 1)
            log_bytes = event["bytes"] + event["records"] * RECORD_HEADER_BYTES
            rates.append(log_bytes / max(event["milliseconds"], 1) / 1e3)
    value = statistics.median(rates)
    return Row("replay_applied_128B", value, "MB/s of log")


def paced(say: Callable[[str], None]) -> list[Row]:
    """10,000 records a second by one producer: until they are logged, where the log syncs every few ms, and until they
    are durable, where it syncs each group."""
    rows = []
    with installed_daemon() as grouped, installed_daemon(flush={"interval": FLUSH_INTERVAL}) as interval:
        native_directory = grouped.directory / "native"
        raws: list[Slice] = []
        slices: dict[str, list[Slice]] = {"logged": [], "durable": []}
        with (
            Producers("elgate", 1, grouped.route_dir, grouped.env()) as to_durable,
            Producers("elgate", 1, interval.route_dir, interval.env()) as to_logged,
            Producers("native", 1, native_directory, dict(os.environ)) as native,
        ):
            through = {"logged": to_logged, "durable": to_durable}
            for level, producers in through.items():
                producers.run(f"paced_{level}", RECORD_BYTES, 1, 0.3, interval_ns=PACE_INTERVAL_NS)
            native.run("raw", BLOCK_BYTES, 1, 0.1)
            for repetition in range(REPETITIONS):
                say(f"10,000 records a second: {repetition + 1} of {REPETITIONS}")
                raws.append(native.run("raw", BLOCK_BYTES))
                for level, producers in through.items():
                    slices[level].append(producers.run(f"paced_{level}", RECORD_BYTES, interval_ns=PACE_INTERVAL_NS))
    raw_mean = _median(raws, lambda s: s.mean_us)
    raw_is = "raw loop: one durable write of 4 KiB after the other, in the same minute"
    for level, allowed in (("logged", None), ("durable", 1.6)):
        mean = _median(slices[level], lambda s: s.mean_us)
        name = f"paced_10k_{level}"
        if allowed is None:
            goal, met = f"at most {PACED_US:g} µs", mean <= PACED_US
        else:
            goal, met = f"at most {allowed} × the raw loop", mean <= allowed * raw_mean
        rows.append(Row(f"{name}_mean", mean, "µs", raw_mean, raw_is, mean / raw_mean, goal, met))
        rows.append(
            Row(f"{name}_mean_beside_80us", mean, "µs", PACED_US, "the specification's figure", mean / PACED_US)
        )
        for percent in (50, 99):
            value = _median(slices[level], lambda s, percent=percent: s.percentile_us(percent))  # type: ignore[misc]
            rows.append(Row(f"{name}_p{percent}", value, "µs"))
        rows.append(Row(name, _median(slices[level], lambda s: s.operations_per_s), "op/s"))
    return rows


def stream(say: Callable[[str], None]) -> list[Row]:
    """100 MB/s of 4 KiB records by one producer, until each is durable, beside raw writes of 64 KiB at the same rate."""
    with installed_daemon() as daemon:
        raws, slices = [], []
        with (
            Producers("elgate", 1, daemon.route_dir, daemon.env()) as through,
            Producers("native", 1, daemon.directory / "native", dict(os.environ)) as native,
        ):
            interval_ns = STREAM_RECORD_BYTES * 10**9 // STREAM_BYTES_PER_S
            raw_interval_ns = STREAM_RAW_BYTES * 10**9 // STREAM_BYTES_PER_S
            through.run("paced_durable", STREAM_RECORD_BYTES, 1, 0.3, interval_ns=interval_ns)
            native.run("raw_paced", STREAM_RAW_BYTES, 1, 0.3, interval_ns=raw_interval_ns)
            for repetition in range(REPETITIONS):
                say(f"100 MB/s: {repetition + 1} of {REPETITIONS}")
                raws.append(native.run("raw_paced", STREAM_RAW_BYTES, interval_ns=raw_interval_ns))
                slices.append(through.run("paced_durable", STREAM_RECORD_BYTES, interval_ns=interval_ns))
    p95 = _median(slices, lambda s: s.percentile_us(95))
    raw_p95 = _median(raws, lambda s: s.percentile_us(95))
    rate = _median(slices, lambda s: s.operations_per_s) * STREAM_RECORD_BYTES / 1e6
    raw_is = "raw durable writes of 64 KiB, paced at 100 MB/s, in the same minute"
    return [
        Row(
            "stream_100MBs_p95", p95, "µs", raw_p95, raw_is, p95 / raw_p95,
            "at most 1.25 × the raw writes", p95 <= 1.25 * raw_p95,
        ),
        Row("stream_100MBs_p95_beside_250us", p95, "µs", STREAM_P95_US, "the specification's figure", p95 / STREAM_P95_US),
        Row("stream_100MBs_reached", rate, "MB/s"),
    ]  # fmt: skip


def larger_records(say: Callable[[str], None]) -> list[Row]:
    """32 producers once more, with records of 1 KiB."""
    count = 32
    with installed_daemon() as daemon:
        raws, natives, durables = [], [], []
        with (
            Producers("elgate", count, daemon.route_dir, daemon.env()) as through,
            Producers("native", count, daemon.directory / "native", dict(os.environ)) as native,
        ):
            native.run("native", KIB_RECORD_BYTES, count, 0.3)
            through.run("durable", KIB_RECORD_BYTES, count, 0.3)
            native.run("raw", BLOCK_BYTES, 1, 0.1)
            for repetition in range(REPETITIONS):
                say(f"durable appends of 1 KiB, {count} producers: {repetition + 1} of {REPETITIONS}")
                raws.append(native.run("raw", BLOCK_BYTES))
                durables.append(through.run("durable", KIB_RECORD_BYTES, count))
                natives.append(native.run("native", KIB_RECORD_BYTES, count))
    operations = _median(durables, lambda s: s.operations_per_s)
    raw = _median(raws, lambda s: s.operations_per_s)
    native_operations = _median(natives, lambda s: s.operations_per_s)
    name = f"durable_1KiB_{count}_producers"
    return [
        Row(
            name, operations, "op/s", raw, "raw loop: one durable write of 4 KiB after the other", operations / raw,
            "at least 8 × the raw loop", operations >= 8 * raw,
        ),
        Row(
            f"{name}_beside_native", operations, "op/s", native_operations,
            f"write + fdatasync by {count} processes on growing files", operations / native_operations,
            "at least 2 × native", operations >= 2 * native_operations,
        ),
    ]  # fmt: skip


@contextmanager
def _spinner(cpu: int) -> Iterator[None]:
    """A neighbour that computes without end on one processor, in a session (and so a scheduling group) of its own."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        os.sched_setaffinity(process.pid, {cpu})
        yield
    finally:
        process.kill()
        process.wait()


def beside_a_spinner(say: Callable[[str], None]) -> list[Row]:
    """One producer's durable appends beside a spinning neighbour on each of two processors, and without one."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    alone: list[Slice] = []
    beside: dict[int, list[Slice]] = {cpu: [] for cpu in cpus}
    with installed_daemon() as daemon, Producers("elgate", 1, daemon.route_dir, daemon.env()) as through:
        through.run("durable", RECORD_BYTES, 1, 0.3)
        for repetition in range(REPETITIONS):
            say(f"beside a spinning neighbour: {repetition + 1} of {REPETITIONS}")
            alone.append(through.run("durable", RECORD_BYTES))
            for cpu in cpus:
                with _spinner(cpu):
                    beside[cpu].append(through.run("durable", RECORD_BYTES))
    mean = _median(alone, lambda s: s.mean_us)
    rows = []
    for number, cpu in enumerate(cpus):
        value = _median(beside[cpu], lambda s: s.mean_us)
        rows.append(
            Row(
                f"durable_1_producer_beside_spinner_{number}_mean", value, "µs", mean, "the same, without the neighbour",
                value / mean, "at most 2 × without it", value <= 2 * mean,
            )
        )  # fmt: skip
    return rows


@contextmanager
def _disk_of_its_own(directory: Path) -> Iterator[Path]:
    """A small ext4 file system in a file, mounted. Root alone can do that."""
    image, mount_point = directory / "disk.img", directory / "mnt"
    mount_point.mkdir()
    with open(image, "wb") as file:
        file.truncate(256 << 20)
    for command in (["mkfs.ext4", "-q", image], ["mount", "-o", "loop", image, mount_point]):
        subprocess.run(command, check=True, capture_output=True)
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", mount_point], check=True, capture_output=True)


def beside_a_frozen_disk(say: Callable[[str], None]) -> list[Row]:
    """4 producers' durable appends while another route's disk hangs and its producer has sent all that it may."""
    if os.geteuid() != 0:
        say("beside a frozen disk: left out, since only root can mount and freeze one")
        return []
    count = 4
    alone, beside = [], []
    directory = scratch_directory("elgate-frozen-")
    try:
        with (
            _disk_of_its_own(directory) as mount_point,
            installed_daemon(elsewhere=mount_point) as daemon,
            Producers("elgate", count, daemon.route_dir, daemon.env()) as through,
            Producers("elgate", 1, mount_point, daemon.env()) as stuck,
        ):
            through.run("durable", RECORD_BYTES, count, 0.3)
            stuck.run("flood", RECORD_BYTES, 1, 0.1)
            for repetition in range(REPETITIONS):
                say(f"beside a frozen disk: {repetition + 1} of {REPETITIONS}")
                alone.append(through.run("durable", RECORD_BYTES, count))
                subprocess.run(["fsfreeze", "-f", mount_point], check=True)
                try:
                    # Ends when the disk thaws: it waits until all is applied.
                    flood = threading.Thread(target=stuck.run, args=("flood", RECORD_BYTES, 1, SLICE_S))
                    flood.start()
                    time.sleep(START_DELAY_S)
                    beside.append(through.run("durable", RECORD_BYTES, count))
                finally:
                    subprocess.run(["fsfreeze", "-u", mount_point], check=True)
                flood.join()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    before = "the same, with nothing frozen"
    rate, rate_before = (_median(slices, lambda s: s.operations_per_s) for slices in (beside, alone))
    mean, mean_before = (_median(slices, lambda s: s.mean_us) for slices in (beside, alone))
    name = f"durable_{count}_producers_beside_frozen_disk"
    return [
        Row(name, rate, "op/s", rate_before, before, rate / rate_before, "at least 0.8 of it", rate >= 0.8 * rate_before),
        Row(
            f"{name}_mean", mean, "µs", mean_before, before, mean / mean_before,
            "at most 1.25 × it", mean <= 1.25 * mean_before,
        ),
    ]  # fmt: skip


AGES_MS = {
    "durable_age_below_500us_total": 0.5,
    "durable_age_below_1ms_total": 1.0,
    "durable_age_below_2ms_total": 2.0,
    "durable_age_below_4ms_total": 4.0,
    "durable_age_below_8ms_total": 8.0,
    "durable_age_below_16ms_total": 16.0,
    "durable_age_below_64ms_total": 64.0,
    "durable_age_above_64ms_total": math.inf,
}


def _age_below_ms(counters: Mapping[str, int], percent: float) -> float:
    """What so many percent of the groups' oldest records were not older than when they became durable."""
    total = sum(counters.get(name, 0) for name in AGES_MS)
    seen = 0
    for name, age_ms in AGES_MS.items():
        seen += counters.get(name, 0)
        if seen >= total * percent / 100:
            return age_ms
    raise RuntimeError("the daemon has counted no ages")


def disk(say: Callable[[str], None]) -> tuple[dict[str, Any], list[Row]]:
    """Nobody waits: how fast records become durable and are applied, beside plain writes to the page cache."""
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    for length in (RECORD_BYTES, BLOCK_BYTES):
        with installed_daemon() as daemon:
            facts = facts or machine(daemon.directory)
            floods, writes = [], []
            with (
                Producers("elgate", 2, daemon.route_dir, daemon.env()) as through,
                Producers("native", 2, daemon.directory / "native", dict(os.environ)) as native,
            ):
                for repetition in range(REPETITIONS):
                    say(f"durable and applied, nobody waits, {length} B: {repetition + 1} of {REPETITIONS}")
                    floods.append(through.run("flood", length, 2))
                    writes.append(native.run("page_cache_flood", length, 2))
            daemon.stop()
            counters = daemon.events("stopped")[-1]["counters"]
        value = _median(floods, lambda s: s.operations_per_s)
        baseline = _median(writes, lambda s: s.operations_per_s)
        small = length == RECORD_BYTES
        rows.append(
            Row(
                f"durable_and_applied_{length}B", value, "op/s", baseline,
                "write() to the page cache by 2 processes, not durable", value / baseline,
                "at least 1,000,000 op/s" if small else "", value >= 1e6 if small else None,
            )
        )  # fmt: skip
        for percent in (50, 99):
            age_ms = _age_below_ms(counters, percent)
            asked = small and percent == 99
            rows.append(
                Row(
                    f"oldest_undurable_{length}B_p{percent}", age_ms, "ms, or less",
                    goal="at most 4 ms" if asked else "", met=age_ms <= 4 if asked else None,
                )
            )  # fmt: skip
        rows.append(
            Row(f"oldest_undurable_{length}B_above_64ms", counters.get("durable_age_above_64ms_total", 0), "groups")
        )
    return facts, rows


BENCHES: dict[str, Callable[[Callable[[str], None]], tuple[dict[str, Any], list[Row]]]] = {
    "ring": ring,
    "wal": wal,
    "disk": disk,
}
