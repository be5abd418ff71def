"""One process of a benchmark: runs the native loops (libelgate_bench.so) as its standard input says.

    python -m elgate.daemon.bench.producer elgate|native

Each line of input is a JSON object: {"loop", "path", "length_bytes", "interval_ns", "start_ns", "until_ns",
"samples_path"}; times are CLOCK_MONOTONIC, the interval that of the paced loops. The answer is a line with the number of operations; their durations go to `samples_path`, as 64-bit
integers. The process ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from array import array
from pathlib import Path
from typing import Any

import cffi

import elgate

LIBRARY = Path(__file__).parent.parent / "libelgate_bench.so"
SAMPLES_MAX = 200_000
# The clock must not be what is measured, and a block must fit the ring.
BLOCK_OPERATIONS = 64
# ELGATE_LOGGED, ELGATE_DURABLE.
PACED_LEVELS = {"paced_logged": 1, "paced_durable": 2}

_ffi = cffi.FFI()
_ffi.cdef(
    """
    int64_t elgate_bench_accept(int, size_t, uint32_t, uint64_t *, uint64_t, uint64_t);
    int64_t elgate_bench_page_cache(int, size_t, uint32_t, uint64_t *, uint64_t, uint64_t);
    int64_t elgate_bench_durable(int, size_t, uint64_t *, uint64_t, uint64_t);
    int64_t elgate_bench_paced(int, size_t, int, uint64_t, uint64_t *, uint64_t, uint64_t);
    int64_t elgate_bench_append_times(int, size_t, uint64_t *, uint64_t, uint64_t);
    int64_t elgate_bench_append_paced(int, size_t, uint64_t, uint64_t *, uint64_t, uint64_t);
    int64_t elgate_bench_round_trip(int, size_t, uint64_t, uint64_t *, uint64_t, uint64_t);
    int64_t elgate_bench_futex_round_trip(int, size_t, uint64_t, uint64_t *, uint64_t, uint64_t);
    int64_t elgate_bench_write_fsync(int, size_t, uint64_t *, uint64_t, uint64_t);
    int64_t elgate_bench_flood(int, size_t, uint64_t);
    int64_t elgate_bench_page_cache_flood(int, size_t, uint64_t);
    int64_t elgate_bench_native(int, size_t, uint64_t *, uint64_t, uint64_t);
    int64_t elgate_bench_raw_prepare(int, uint64_t);
    int64_t elgate_bench_replay(const char *, uint32_t, uint64_t, uint64_t *, uint64_t);
    int64_t elgate_bench_raw_paced(int, size_t, uint64_t, uint64_t, uint64_t *, uint64_t, uint64_t);
    int64_t elgate_bench_raw(int, size_t, uint64_t, uint64_t *, uint64_t, uint64_t);
    int elgate_start(const char *);
    int elgate_opened(int, const char *, int);
    int elgate_close(int);
    """
)

RAW_FILE_BYTES = 16 << 20
REPLAY_LOG_BYTES = 256 << 20
REPLAYS = 6


class Producer:
    def __init__(self, through: str) -> None:
        # Global, so that the loops call this very library: the one that is installed.
        client = Path(elgate.__file__).parent / "libelgate_client.so"
        self._client = _ffi.dlopen(str(client), _ffi.RTLD_NOW | _ffi.RTLD_GLOBAL)
        self._loops = _ffi.dlopen(str(LIBRARY))
        self._samples = _ffi.new("uint64_t[]", SAMPLES_MAX)
        self._open: dict[str, int] = {}
        self._routed = through == "elgate"
        if self._routed and self._client.elgate_start(b"bench") != 1:
            raise SystemExit("elgate bench: a producer could not connect to the daemon")

    def _descriptor(self, path: str) -> int:
        if path not in self._open:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            descriptor = os.open(path, flags, 0o644)
            if self._routed and self._client.elgate_opened(descriptor, os.fsencode(path), flags) != 1:
                raise SystemExit(f"elgate bench: {path} is not routed")
            self._open[path] = descriptor
        return self._open[path]

    def _raw_descriptor(self, path: str) -> int:
        if path not in self._open:
            flags = os.O_WRONLY | os.O_CREAT
            descriptor = os.open(path, flags, 0o644)
            self._check(self._loops.elgate_bench_raw_prepare(descriptor, RAW_FILE_BYTES))
            os.close(descriptor)
            self._open[path] = os.open(path, os.O_WRONLY | os.O_DIRECT)
        return self._open[path]

    @staticmethod
    def _check(result: int) -> int:
        if result < 0:
            raise SystemExit(f"elgate bench: a loop failed: {os.strerror(-result)}")
        return result

    def run(self, order: dict[str, Any]) -> int:
        loop, length, until_ns = order["loop"], order["length_bytes"], order["until_ns"]
        if loop == "replay":
            path = os.fsencode(order["path"])
            replayed = self._loops.elgate_bench_replay(path, length, REPLAY_LOG_BYTES, self._samples, REPLAYS)
            return self._store(self._check(replayed), order["samples_path"])
        raw = loop in ("raw", "raw_paced")
        descriptor = self._raw_descriptor(order["path"]) if raw else self._descriptor(order["path"])
        wait_ns = order["start_ns"] - time.monotonic_ns()
        if wait_ns > 0:
            time.sleep(wait_ns / 1e9)
        if loop.endswith("flood"):
            return self._check(getattr(self._loops, f"elgate_bench_{loop}")(descriptor, length, until_ns))
        function = getattr(self._loops, f"elgate_bench_{'paced' if loop in PACED_LEVELS else loop}")
        arguments: list[Any] = [descriptor, length]
        if loop in ("accept", "page_cache"):
            arguments.append(BLOCK_OPERATIONS)
        if loop in PACED_LEVELS:
            arguments.append(PACED_LEVELS[loop])
        if raw:
            arguments.append(RAW_FILE_BYTES)
        if order["interval_ns"]:
            arguments.append(order["interval_ns"])
        count = self._check(function(*arguments, self._samples, SAMPLES_MAX, until_ns))
        return self._store(count, order["samples_path"])

    def _store(self, count: int, path: str) -> int:
        samples = array("Q")
        samples.frombytes(_ffi.buffer(self._samples, count * 8)[:])
        with open(path, "wb") as file:
            samples.tofile(file)
        return count

    def close(self) -> None:
        for descriptor in self._open.values():
            if self._routed:
                self._client.elgate_close(descriptor)
            os.close(descriptor)


def main() -> None:
    producer = Producer(sys.argv[1])
    print("ready", flush=True)
    for line in sys.stdin:
        print(producer.run(json.loads(line)), flush=True)
    producer.close()


if __name__ == "__main__":
    main()
