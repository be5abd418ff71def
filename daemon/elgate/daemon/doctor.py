"""`elgate doctor`: what this host has for Elgate, what was chosen, and the command that would improve it.

It looks, and writes nothing but a scratch file in the log's directory, which it removes again."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from elgate.daemon import places, topology
from elgate.daemon.config import MIB, TEST_STUB, Config, format_size

OK, NOTE, PROBLEM = "ok", "note", "problem"

# FUTEX_WAITV, with which the worker sleeps on all its rings at once.
KERNEL_MIN = (5, 16)
RING_BYTES = 5 << 20
BLOCK_BYTES = 4096
DURABLE_WRITES = 40
# Above this, a group commit takes long enough that its disk is worth a thought.
SLOW_WRITE_US = 2000
DESCRIPTORS_MIN = 4096
_IO_URING_SETUP = 425


@dataclass(frozen=True)
class Finding:
    """`advice`: what to do about it, as a command where there is one; empty where nothing is to be done."""

    name: str
    found: str
    verdict: str = OK
    advice: str = ""


def examine(config: Config) -> list[Finding]:
    """All findings, in the order in which a person would want to read them."""
    return [
        *mode(config),
        kernel(platform.release()),
        *processors(topology.detect()),
        *ring(config),
        *log(config),
        *targets(config),
        io_uring(config),
        descriptors(resource.getrlimit(resource.RLIMIT_NOFILE)),
    ]


def mode(config: Config) -> Iterator[Finding]:
    if config.is_stub:
        yield Finding(
            "mode", f"{TEST_STUB}: NOTHING that this daemon serves is durable", NOTE,
            "for tests of programs alone (docs/testing.md); for anything else leave runtime.mode out",
        )  # fmt: skip


def kernel(release: str) -> Finding:
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if numbers < KERNEL_MIN:
        wanted = ".".join(map(str, KERNEL_MIN))
        return Finding("kernel", release, PROBLEM, f"Elgate needs Linux {wanted} or later (futex_waitv)")
    return Finding("kernel", release)


def processors(found: topology.Topology) -> Iterator[Finding]:
    text = f"{found.cpus_allowed} of {found.cpus_online} may be used"
    if found.cpu_quota is not None:
        text += f", {found.cpu_quota:g} by the cgroup's quota"
    if found.cpus_usable < 1:
        yield Finding(
            "processors", text, NOTE, "less than one processor: durable writes will wait for time slices; raise cpu.max"
        )
    else:
        yield Finding("processors", text)
    yield Finding("memory nodes", str(found.memory_nodes))
    yield Finding("workers", "1: this version serves all routes with one")


def ring(config: Config) -> Iterator[Finding]:
    directory = config.ring.path.parent
    try:
        status = os.statvfs(directory)
    except OSError as error:
        yield Finding(
            "ring", f"{directory}: {error.strerror}", PROBLEM, "set ring.path to a directory on a tmpfs that exists"
        )
        return
    free = status.f_bavail * status.f_frsize
    text = f"{config.ring.path}, {format_size(free // MIB * MIB)} free on {places.filesystem_of(directory)}"
    if not config.ring.path.exists() and free < RING_BYTES:
        yield Finding("ring", text, PROBLEM, f"mount -o remount,size=64m {places.filesystem_of(directory).mount_point}")
    elif not places.filesystem_of(directory).type == "tmpfs":
        yield Finding(
            "ring", text, NOTE, "not on a tmpfs: its pages will be written to a disk now and then; use /dev/shm"
        )
    else:
        yield Finding("ring", text)


def log(config: Config) -> Iterator[Finding]:
    filesystem = places.filesystem_of(config.wal.dir)
    existing = next(path for path in (config.wal.dir, *config.wal.dir.parents) if path.exists())
    status = os.statvfs(existing)
    free = status.f_bavail * status.f_frsize
    text = f"{config.wal.dir} on {filesystem}, {format_size(free // MIB * MIB)} free"
    if config.is_stub:
        yield Finding("log", f"{config.wal.dir}, written and never synced")
        return
    if filesystem.volatile:
        yield Finding(
            "log",
            text,
            PROBLEM,
            "nothing there survives a power cut or the container: set wal.dir to a directory on a disk",
        )
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Finding(
            "log", text, PROBLEM, f"uid {os.geteuid()} may not write to {existing}: set wal.dir, or run as its owner"
        )
        return
    elif free < 2 * config.wal.segment_bytes:
        yield Finding(
            "log", text, PROBLEM,
            f"a route's log takes two segments of {format_size(config.wal.segment_bytes)}: free some space, or set "
            "wal.segment_size to less",
        )  # fmt: skip
    else:
        yield Finding("log", text)
    yield durable_write(existing)


def durable_write(directory: Path) -> Finding:
    """What one commit costs there at the least: the disk's own floor."""
    name = "one durable write of 4 KiB"
    try:
        with _scratch_file(directory) as path:
            samples = _durable_writes(path)
    except OSError as error:
        return Finding(
            name, f"in {directory}: {error.strerror}", PROBLEM, "set wal.dir to a directory that can be written"
        )
    middle = statistics.median(samples)
    text = f"{middle:.0f} µs (median of {len(samples)}, up to {max(samples):.0f})"
    if middle > SLOW_WRITE_US:
        return Finding(name, text, NOTE, "an fsync takes at least as long: another disk under wal.dir would be faster")
    return Finding(name, text)


@contextlib.contextmanager
def _scratch_file(directory: Path) -> Iterator[str]:
    fd, path = tempfile.mkstemp(prefix=".elgate-doctor-", dir=directory)
    os.close(fd)
    try:
        yield path
    finally:
        os.unlink(path)


def _durable_writes(path: str) -> list[float]:
    """Microseconds each. Past the page cache where the file system has that, as the log does."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_DSYNC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.open(path, os.O_WRONLY | os.O_DSYNC)
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as block:  # aligned
            os.posix_fallocate(fd, 0, BLOCK_BYTES * DURABLE_WRITES)
            for number in range(DURABLE_WRITES):
                os.pwrite(fd, block, number * BLOCK_BYTES)
            samples = []
            for number in range(DURABLE_WRITES):
                begun_ns = time.monotonic_ns()
                os.pwrite(fd, block, number * BLOCK_BYTES)
                samples.append((time.monotonic_ns() - begun_ns) / 1000)
            return samples
    finally:
        os.close(fd)


def targets(config: Config) -> Iterator[Finding]:
    if not config.routes:
        yield Finding("routes", "none", NOTE, "nothing is offloaded without one: name routes in --config FILE")
    for route in config.routes:
        name = f"route {route.name}"
        fixed = Path(route.pattern.split("*")[0].split("?")[0])
        wanted = fixed if route.pattern.startswith(f"{fixed}/") or fixed.is_dir() else fixed.parent
        directory = next(path for path in (wanted, *wanted.parents) if path.is_dir())
        text = f"{route.pattern} on {places.filesystem_of(directory)}"
        if directory != wanted:
            yield Finding(name, text, NOTE, f"mkdir -p {wanted}")
        elif not os.access(directory, os.W_OK | os.X_OK):
            yield Finding(
                name, text, PROBLEM, f"uid {os.geteuid()} may not write there, and files it cannot open stay native"
            )
        elif not _takes_attributes(directory):
            yield Finding(
                name, text, PROBLEM,
                "its file system takes no extended attributes of users (user.*), by which files are known again: they "
                "stay native there",
            )  # fmt: skip
        else:
            yield Finding(name, text)


def _takes_attributes(directory: Path) -> bool:
    try:
        with _scratch_file(directory) as path:
            os.setxattr(path, "user.elgate_doctor", b"x")
    except OSError:
        return False
    return True


def io_uring(config: Config) -> Finding:
    """Whether a ring of io_uring may be set up: old kernels, a sysctl and container profiles say no."""
    parameters = ctypes.create_string_buffer(120)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(ctypes.c_long(_IO_URING_SETUP), ctypes.c_uint(1), parameters)
    if fd >= 0:
        os.close(fd)
        return Finding("io_uring", f"available (disk.engine: {config.disk.engine})")
    why = os.strerror(ctypes.get_errno())
    if config.disk.engine != "io_uring":
        return Finding("io_uring", f"not available ({why}), and not asked for")
    return Finding(
        "io_uring", f"not available ({why})", PROBLEM,
        "set disk.engine: threads, or allow it: sysctl kernel.io_uring_disabled=0, and the container's seccomp profile",
    )  # fmt: skip


def descriptors(limit: tuple[int, int]) -> Finding:
    soft, hard = limit
    text = f"{soft} may be open"
    if soft != resource.RLIM_INFINITY and soft < DESCRIPTORS_MIN:
        return Finding(
            "descriptors", text, NOTE, f"the daemon takes two for each open routed file: ulimit -n {min(hard, 65536)}"
        )
    return Finding("descriptors", text)


def show(findings: list[Finding]) -> None:
    """The table for people."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    marks = {OK: "[green]ok", NOTE: "[yellow]note", PROBLEM: "[red]problem"}
    for finding in findings:
        table.add_row(f"{marks[finding.verdict]}[/] {finding.name}", finding.found, finding.advice)
    Console().print(table)
