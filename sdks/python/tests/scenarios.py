# ruff: noqa: SIM115 (half of these are about files that are closed by hand, late, or not at all)
"""What programs do with files, step by step: see oracle_program.py. Every scenario runs in an empty directory of its
own, which is its working directory, and closes what it opens."""

from __future__ import annotations

import array
import fcntl
import gc
import io
import logging
import logging.handlers
import mmap
import os
import pathlib
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

Step = Callable[..., Any]

MODES = ("r", "w", "a", "x", "r+", "w+", "a+", "x+")


# --- Opening -----------------------------------------------------------------------------------------------------


def every_mode_and_layer(step: Step, here: Path) -> None:
    for there in (False, True):
        for mode in MODES:
            for suffix in ("b", "", "t"):
                for buffering in (-1, 0, 1, 16):
                    name = f"{mode}{suffix}{buffering}{there}"
                    if there:
                        Path(name).write_bytes(b"already\nhere\n")
                    file = step(open, name, mode + suffix, buffering)
                    if file is None:
                        continue
                    binary = suffix == "b"
                    raw = file if buffering == 0 else file.raw if binary else file.buffer.raw
                    step.note([type(file).__name__, raw.mode, file.mode, file.name, raw.name, raw.closefd])
                    step(file.readable), step(file.writable), step(file.seekable), step(file.isatty)
                    step(file.tell)
                    step(file.write, b"some\n" if binary else "some\n")
                    step(file.tell)
                    step(file.seek, 0)
                    step(file.read)
                    step(file.write, b"more\n" if binary else "more\n")
                    step(file.close)
                    step(file.close)
                    step(file.write, b"late" if binary else "late")
                    step(os.path.getsize, name)


def wrong_arguments_of_open(step: Step, here: Path) -> None:
    os.mkdir("directory")
    Path("file").write_bytes(b"x")
    os.symlink("loop", "loop")
    for arguments in (
        ("file", ""), ("file", "z"), ("file", "rw"), ("file", "rr"), ("file", "wt+b"), ("file", "+"), ("file", "bw"),
        ("file", "w", 0), ("file", "wb", -5), ("file", "wb", 1), ("file", "w", -1, "no-such-encoding"),
        ("file", "wb", -1, "utf-8"), ("file", "wb", -1, None, "strict"), ("file", "wb", -1, None, None, "\n"),
        ("file", "w", -1, None, None, "bad"), ("file", "w", -1, None, "no-such-handler"),
        ("file", "w", -1, None, None, None, False), ("file", 5), (5.5, "w"), (None, "w"), ([], "w"),
        ("absent/file", "w"), ("absent", "r"), ("absent", "r+"), ("directory", "w"), ("directory", "r"),
        ("directory/", "w"), ("file/x", "w"), ("loop", "w"), ("a\0b", "w"), (b"a\0b", "w"), ("", "w"), ("file", "x"),
        ("x" * 256, "w"), ("x/" * 2048, "w"), (999_999, "w"), (-1, "w"), (2**70, "w"), (b"file", "ab"),
        ("\udcff", "wb"),
    ):  # fmt: skip
        file = step(open, *arguments)
        if file is not None:
            step(file.close)
    step(os.open, "absent", os.O_WRONLY)
    step(os.open, "directory", os.O_WRONLY)
    step(os.open, "file", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    step(os.open, "file", "w")
    step(os.open, 1.5, os.O_WRONLY)
    step(os.open, "a\0b", os.O_WRONLY)
    step(os.open, "file", os.O_WRONLY, dir_fd=999_999)
    step(os.open, "file", os.O_WRONLY | os.O_DIRECTORY)


def paths_of_every_kind(step: Step, here: Path) -> None:
    class Pathy:
        def __fspath__(self) -> str:
            return "pathy"

    os.mkdir("sub")
    os.symlink("sub", "linked")
    os.symlink("sub/through", "dangling")
    for name in (
        "plain",
        b"bytes",
        pathlib.Path("path"),
        Pathy(),
        here / "absolute",
        "linked/a",
        "sub/../sub/b",
        "dangling",
    ):
        with open(name, "wb") as file:
            step.note(file.name)
            file.write(b"data")
    directory = os.open("sub", os.O_RDONLY | os.O_DIRECTORY)
    fd = os.open("relative", os.O_WRONLY | os.O_CREAT, dir_fd=directory)
    os.write(fd, b"relative")
    step(os.stat, "relative", dir_fd=directory)
    os.close(fd)
    with open("by-opener", "w", opener=lambda path, flags: os.open(path, flags, 0o600, dir_fd=directory)) as file:
        step.note([file.name, stat.S_IMODE(os.fstat(file.fileno()).st_mode), os.get_inheritable(file.fileno())])
        file.write("x")
    step(open, "x", "w", opener=lambda path, flags: -1)
    step(open, "x", "w", opener=lambda path, flags: "fd")
    step(open, "x", "w", opener=lambda path, flags: 1 / 0)
    step(os.unlink, "relative", dir_fd=directory)
    os.close(directory)
    path = Path("through-pathlib")
    step(path.write_text, "text\n")
    step(path.read_text)
    step(path.write_bytes, b"bytes")
    with path.open("a") as file:
        file.write("more")
        file.flush()
        step(lambda: path.stat().st_size)
    step(path.read_bytes)


def creation_mode_and_truncation(step: Step, here: Path) -> None:
    before = os.umask(0o027)
    try:
        for opening in (
            lambda: open("a", "w").close(),
            lambda: os.close(os.open("b", os.O_CREAT | os.O_WRONLY, 0o666)),
        ):
            opening()
        os.close(os.open("c", os.O_CREAT | os.O_WRONLY | os.O_TRUNC))
        for name in "abc":
            step(lambda name=name: stat.S_IMODE(os.stat(name).st_mode))
    finally:
        os.umask(before)
    with open("a", "wb") as first:
        first.write(b"0123456789" * 100)
        first.flush()
        # Truncated while the first still has it open, with writes that may be pending.
        with open("a", "wb") as second:
            step(os.path.getsize, "a")
            second.write(b"new")
        first.write(b"END")
    step(os.path.getsize, "a")
    fd = os.open("a", os.O_RDWR | os.O_TRUNC)
    step(os.fstat, fd)
    os.write(fd, b"xy")
    os.close(fd)
    os.utime("a", (1, 1))
    open("a", "w").close()
    step(lambda: os.stat("a").st_mtime > 1)
    os.utime("a", (1, 1))
    open("a", "w").close()
    step(lambda: os.stat("a").st_mtime > 1)
    os.mkfifo("fifo")
    reader = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
    with open("fifo", "wb", 0) as fifo:
        step(fifo.write, b"through a fifo")
    step(os.read, reader, 100)
    os.close(reader)


def descriptors_as_files(step: Step, here: Path) -> None:
    fd = os.open("a", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"first\n")
    for mode in ("w", "wb", "ab", "r+b"):
        with open(fd, mode, closefd=False) as file:
            step.note([type(file).__name__, file.name, file.mode])
            step(file.write, b"x" if "b" in mode else "x")
            step(file.flush)
            step(file.tell)
    with os.fdopen(os.dup(fd), "r+") as file:
        step(file.seek, 0)
        step(file.read)
        step(file.write, "end")
    step(open, fd, "z")
    step(open, fd, "w", -1, "no-such-encoding", closefd=False)
    raw = io.FileIO(fd, "r+", closefd=False)
    step(raw.seek, 0, 2)
    step(raw.write, b"raw")
    step(raw.close)
    step(os.lseek, fd, 0, os.SEEK_SET)
    step(os.read, fd, 100)
    step(open, fd, "w", -1, "no-such-encoding")  # closes it
    step(os.close, fd)
    step(open, fd, "w")


# --- File objects --------------------------------------------------------------------------------------------------


def raw_file_objects(step: Step, here: Path) -> None:
    with open("a", "w+b", 0) as file:
        for data in (
            b"bytes",
            bytearray(b"array"),
            memoryview(b"view"),
            array.array("i", [1, 2]),
            b"",
            memoryview(b"abcdef")[::2],
            memoryview(b"abcd").cast("H"),
            "text",
            5,
            None,
        ):
            step(file.write, data)
        step(file.writelines, [b"1", b"2"])
        step(file.tell)
        for arguments in ((0,), (-3, 2), (2, 1), (-100, 1), (0, 9), ("x",), (1.5,), (0, 4), (0, 3)):
            step(file.seek, *arguments)
        step(file.seek, 0)
        step(file.read, 5)
        step(file.readline)
        step(file.readinto, bytearray(4))
        step(file.readall)
        step(file.read, "x")
        for size in (3, None, 10, -1, "x", 2**70, True):
            step(file.truncate, size)
            step(file.tell)
            step(lambda: os.fstat(file.fileno()).st_size)
        step(file.detach if hasattr(file, "detach") else lambda: None)
    for operation in (
        file.tell,
        file.fileno,
        file.readall,
        file.truncate,
        file.flush,
        lambda: file.write(b"x"),
        lambda: file.seek(0),
        lambda: file.readinto(bytearray(1)),
        file.readable,
    ):
        step(operation)
    with open("a", "rb", 0) as file:
        step(file.write, b"x")
        step(file.truncate, 1)
        step(file.read)
    with open("a", "wb", 0) as file:
        step(file.read)
        step(file.readinto, bytearray(1))
        step(file.readall)


def buffered_and_text_layers(step: Step, here: Path) -> None:
    with open("a", "w+b") as file:
        for size in (1, 10, 8191, 8192, 8193, 100_000):
            step(file.write, bytes(range(256)) * (size // 256) + b"x" * (size % 256))
            step(file.tell)
        step(file.seek, 5)
        step(file.read, 3)
        step(file.write, b"OVER")
        step(file.tell)
        step(file.peek, 1) if hasattr(file, "peek") else None
        step(file.read, 4)
        step(file.truncate)
        step(file.seek, 0, 2)
    with open("t", "w+", encoding="utf-16", newline="\r\n") as file:
        step(file.write, "žluťoučký\nkůň\n")
        step(file.tell)
        step(file.seek, 0)
        step(file.readlines)
        step(file.write, "konec")
    with open("t", "a", encoding="utf-16") as file:
        step(file.tell)
        step(file.write, "dodatek")
    with open("l", "w", 1) as file:
        step(file.write, "no newline")
        step(os.path.getsize, "l")
        step(file.write, " and one\n")
        step(os.path.getsize, "l")
        print("printed", file=file)
        step(os.path.getsize, "l")
        step.note(file.line_buffering)
    with open("a", "r+b") as file:
        step(file.seek, 0)
        step(file.read, 1)
        step(file.write, b"!")
        step(file.flush)
        step(file.seek, 0, 1)


def files_that_nobody_closes(step: Step, here: Path) -> None:
    def leave(*arguments: Any) -> None:
        file = open(*arguments)
        file.write("data" if "b" not in arguments[1] else b"data")

    for arguments in (("a", "wb", 0), ("b", "wb"), ("c", "w"), ("d", "a+")):
        step(leave, *arguments)
        gc.collect()
        step(os.path.getsize, arguments[0])


def append_mode(step: Step, here: Path) -> None:
    with open("a", "ab") as one, open("a", "ab", 0) as other:
        for turn in range(20):
            one.write(b"one %d\n" % turn)
            if turn % 3 == 0:
                one.flush()
            other.write(b"other %d\n" % turn)
            if turn % 5 == 0:
                step(one.tell), step(other.tell)
    fd = os.open("a", os.O_RDWR | os.O_APPEND)
    step(os.lseek, fd, 0, os.SEEK_CUR)
    step(os.write, fd, b"tail")
    step(os.lseek, fd, 0, os.SEEK_CUR)
    step(os.lseek, fd, 3, os.SEEK_SET)
    step(os.write, fd, b"tail")
    step(os.lseek, fd, -2, os.SEEK_CUR)
    step(os.read, fd, 10)
    step(os.write, fd, b"more")
    step(os.lseek, fd, 5, os.SEEK_SET)
    step(os.read, fd, 4)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    step(fcntl.fcntl, fd, fcntl.F_SETFL, flags & ~os.O_APPEND)
    step(os.lseek, fd, 0, os.SEEK_SET)
    step(os.write, fd, b"HEAD")
    step(os.lseek, fd, 0, os.SEEK_CUR)
    step(fcntl.fcntl, fd, fcntl.F_SETFL, flags)
    step(os.write, fd, b"TAIL")
    # The kernel appends these as well, and leaves the offset where it is.
    step(os.pwrite, fd, b"nowhere else", 2)
    step(os.lseek, fd, 0, os.SEEK_CUR)
    step(os.write, fd, b"and on")
    step(os.pwritev, fd, [b"nowhere", b"else"], 0)
    step(os.lseek, fd, 0, os.SEEK_CUR)
    step(os.pwrite, fd, b"", 2)
    step(os.write, fd, b"")
    step(os.lseek, fd, 0, os.SEEK_CUR)
    os.close(fd)


def appends_beside_others(step: Step, here: Path) -> None:
    """The same file with and without O_APPEND, through one process."""
    append = os.open("a", os.O_RDWR | os.O_APPEND | os.O_CREAT)
    plain = os.open("a", os.O_RDWR)
    for turn in range(12):
        step(os.write, append, b"append %d\n" % turn)
        step(os.write, plain, b"plain %d\n" % turn)
        if turn % 4 == 3:
            step(os.ftruncate, (append, plain)[turn % 3 == 0], 20 + turn)
            step(os.lseek, append, -3, os.SEEK_CUR)
            step(os.read, append, 10)
            step(os.pread, plain, 1000, 0)
    os.close(append), os.close(plain)


def far_away(step: Step, here: Path) -> None:
    fd = os.open("a", os.O_RDWR | os.O_CREAT)
    for offset in (2**31 - 3, 2**32 - 3, 2**33):
        step(os.pwrite, fd, b"far away", offset)
        step(os.pread, fd, 20, offset - 5)
        step(os.lseek, fd, offset + 3, os.SEEK_SET)
        step(os.write, fd, b"AWAY")
        step(os.lseek, fd, 0, os.SEEK_CUR)
    step(os.fstat, fd)
    step(os.lseek, fd, 0, os.SEEK_END)
    step(os.truncate, "a", 2**32)
    step(os.pread, fd, 20, 2**32 - 6)
    append = os.open("a", os.O_WRONLY | os.O_APPEND)
    step(os.write, append, b"appended")
    step(os.lseek, append, 0, os.SEEK_CUR)
    os.close(append)
    step(os.pwrite, fd, b"x", 2**63 - 1)
    step(os.ftruncate, fd, 2**62)
    step(os.ftruncate, fd, 10)
    os.close(fd)


def handlers_and_threads(step: Step, here: Path) -> None:
    """Writes and closes in signal handlers, and threads that close each other's descriptors."""
    import signal

    fds = [os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND) for name in "ab"]

    def handler(number: int, frame: Any) -> None:
        os.write(fds[0], b"in the handler\n")
        if number == signal.SIGUSR2:
            os.close(fds[1])

    before = [signal.signal(number, handler) for number in (signal.SIGUSR1, signal.SIGUSR2)]
    for turn in range(20):
        os.write(fds[0], b"%d\n" % turn)
        os.write(fds[1], b"%d\n" % turn)
        if turn % 5 == 0:
            signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR2)
    step(os.write, fds[1], b"closed")
    step(os.pread, fds[0], 1000, 0)
    for number, old in zip((signal.SIGUSR1, signal.SIGUSR2), before, strict=True):
        signal.signal(number, old)
    for _ in range(20):
        other = os.open("c", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def close(fd: int = other) -> None:
            os.write(fd, b"by the thread\n")
            os.close(fd)

        os.write(other, b"by the one who opened it\n")
        thread = threading.Thread(target=close)
        thread.start()
        thread.join()
        step(os.write, other, b"x")
    os.close(fds[0])


# --- Descriptors -----------------------------------------------------------------------------------------------------


def every_way_to_write(step: Step, here: Path) -> None:
    fd = os.open("a", os.O_RDWR | os.O_CREAT, 0o644)
    for data in (
        b"bytes",
        bytearray(b"array"),
        memoryview(b"view"),
        array.array("H", [1, 2]),
        b"",
        memoryview(b"abcdef")[::2],
        "text",
        5,
        None,
    ):
        step(os.write, fd, data)
        step(os.pwrite, fd, data, 3)
        step(os.writev, fd, [data])
        step(os.pwritev, fd, [b"-", data], 7)
    step(os.writev, fd, [])
    step(os.writev, fd, (b"tuple", b"of", bytearray(b"many")))
    step(os.writev, fd, 5)
    step(os.writev, fd, [b"x"] * 1025)
    step(os.writev, fd, [b"x"] * 1024)
    for offset in (-1, 2**62, 2**70, "x", 1.5, None):
        step(os.pwrite, fd, b"", offset)
        step(os.pwritev, fd, [b""], offset)
    if hasattr(os, "RWF_DSYNC"):
        step(os.pwritev, fd, [b"synced"], 1, os.RWF_DSYNC)
    step(os.lseek, fd, 0, os.SEEK_CUR)
    step(os.fsync, fd)
    step(os.fdatasync, fd)
    with open(fd, "rb", closefd=False) as file:
        step(os.fsync, file)
    step(os.fsync, "x")
    step(os.ftruncate, fd, 10)
    step(os.write, fd, b"behind the end")
    for length in (-1, 2**70, "x"):
        step(os.ftruncate, fd, length)
        step(os.truncate, "a", length)
    step(os.truncate, "a", 12)
    step(os.truncate, fd, 11)
    step(os.truncate, "absent", 1)
    step(os.truncate, ".", 1)
    step(os.posix_fallocate, fd, 5, 100)
    step(os.posix_fallocate, fd, 0, 0)
    step(os.posix_fallocate, fd, -1, 5)
    step(os.fstat, fd)
    step(os.write, True + fd - 1, b"an int that is a bool's sum")
    step(os.write, 1.5, b"x")
    step(os.write, [], b"x")
    step(os.write, 999_999, b"x")
    step(os.write, -1, b"x")
    step(os.write, 2**70, b"x")
    step(os.close, fd=fd)
    step(os.close, fd)
    step(os.write, fd, b"closed")
    step(os.fsync, fd)


def every_way_to_look(step: Step, here: Path) -> None:
    fd = os.open("a", os.O_RDWR | os.O_CREAT)
    reader = os.open("a", os.O_RDONLY)
    file = open("a", "rb")
    unbuffered = open("a", "rb", 0)
    os.symlink("a", "link")
    written = 0
    looks: list[Callable[[], Any]] = [
        lambda: os.pread(fd, 1000, 0),
        lambda: os.pread(reader, 1000, 0),
        lambda: os.read(reader, 1000),
        lambda: file.read(),
        lambda: unbuffered.read(),
        lambda: unbuffered.readall(),
        lambda: os.readv(reader, [bytearray(3), bytearray(100)]),
        lambda: os.preadv(reader, [bytearray(3)], 2),
        lambda: os.stat("a"),
        lambda: os.stat(fd),
        lambda: os.fstat(reader),
        lambda: os.stat("link"),
        lambda: os.lstat("a"),
        lambda: os.path.getsize("a"),
        lambda: Path("a").stat(),
        lambda: Path("a").read_bytes(),
        lambda: open("a").read(),
        lambda: os.lseek(reader, 0, os.SEEK_END),
        lambda: os.lseek(fd, 0, os.SEEK_END),
        lambda: os.lseek(fd, 0, os.SEEK_DATA),
        lambda: file.seek(0, 2),
        lambda: unbuffered.seek(0, 2),
        lambda: shutil.copyfile("a", "copy") and Path("copy").read_bytes(),
        lambda: shutil.copy2("a", "copy2") and os.stat("copy2"),
    ]
    for look in looks:
        os.lseek(fd, written, os.SEEK_SET)
        written += os.write(fd, b"%d," % written)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step(look)
    for descriptor in (fd, reader):
        os.close(descriptor)
    file.close(), unbuffered.close()


def duplicates(step: Step, here: Path) -> None:
    fd = os.open("a", os.O_RDWR | os.O_CREAT)
    copies = [os.dup(fd), fcntl.fcntl(fd, fcntl.F_DUPFD, 50), fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 60)]
    target = os.open("other", os.O_RDWR | os.O_CREAT)
    os.write(target, b"pending when its number is taken")
    step(lambda: os.dup2(fd, target) == target)
    step(os.get_inheritable, target)
    step(os.dup2, 999_999, target)
    step(os.dup2, fd, -1)
    step(os.dup2, fd, fd)
    step(os.dup, 999_999)
    for number, copy in enumerate([*copies, target, fd]):
        os.write(copy, b"through %d\n" % number)
        step(os.lseek, fd, 0, os.SEEK_CUR)
    os.close(fd)
    for number, copy in enumerate([*copies, target]):
        os.write(copy, b"again %d\n" % number)
        step(os.pread, copy, 1000, 0)
        os.close(copy)
    low = os.open("range", os.O_WRONLY | os.O_CREAT)
    high = fcntl.fcntl(low, fcntl.F_DUPFD, 70)
    os.write(high, b"closed in a range")
    os.closerange(low, low + 1)
    os.closerange(high, high + 1)
    step(os.write, high, b"x")


def numbers_that_come_back(step: Step, here: Path) -> None:
    """C code closes what it was given, and the number comes back as something else."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open("a", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"first")
    copy = os.dup(fd)
    libc.close(copy)
    left, right = socket.socketpair()
    step.note(copy in (left.fileno(), right.fileno()))
    step(os.write, left.fileno(), b"through the socket")
    step(os.read, right.fileno(), 100)
    left.close(), right.close()
    libc.close(fd)
    ends = os.pipe()
    step.note(fd in ends)
    step(os.write, ends[1], b"through the pipe")
    step(os.read, ends[0], 100)
    os.close(ends[0]), os.close(ends[1])
    # Each of these gets the number of a descriptor of "a", and is written to through it.
    outside = str(here.parent.parent / f"outside-{os.getpid()}").encode()
    takers: list[Callable[[], int]] = [
        lambda: os.open("b", os.O_RDWR | os.O_CREAT),
        lambda: os.open(outside, os.O_RDWR | os.O_CREAT),
        lambda: os.memfd_create("memory"),
        lambda: os.dup(elsewhere),
    ]
    elsewhere = os.open(outside, os.O_RDWR | os.O_CREAT)
    for take in takers:
        fd = os.open("a", os.O_WRONLY | os.O_APPEND)
        os.write(fd, b"to a,")
        libc.close(fd)
        other = take()
        step.note(fd == other)
        step(os.write, other, b"not to a")
        step(os.pread, other, 100, 0)
        os.close(other)
    # Nobody is told of these; only a duplicate is looked at again.
    fd = os.open("a", os.O_WRONLY)
    copy = os.dup(fd)
    os.write(copy, b"to a,")
    libc.close(copy)
    other = libc.open(outside, os.O_RDWR | os.O_TRUNC)
    step.note(copy == other)
    step(os.write, other, b"by C")
    step(os.pread, other, 100, 0)
    for descriptor in (fd, other, elsewhere):
        os.close(descriptor)
    os.unlink(outside)
    fd = os.open("a", os.O_WRONLY)
    os.fsync(fd)  # a barrier for what went through the numbers that are gone
    os.close(fd)


def the_kernel_copies(step: Step, here: Path) -> None:
    source = os.open("source", os.O_RDWR | os.O_CREAT)
    target = os.open("target", os.O_RDWR | os.O_CREAT)
    os.write(source, b"0123456789" * 10)
    os.write(target, b"here before ")
    step(os.sendfile, target, source, 0, 20)
    step(os.sendfile, out_fd=target, in_fd=source, offset=50, count=5)
    os.write(target, b" and after")
    step(os.lseek, target, 0, os.SEEK_CUR)
    os.lseek(source, 0, os.SEEK_SET)
    if hasattr(os, "copy_file_range"):
        os.pwrite(source, b"ABC", 0)
        step(os.copy_file_range, source, target, 10)
        step(os.copy_file_range, source, target, 10, offset_src=5, offset_dst=100)
    if hasattr(os, "splice"):
        ends = os.pipe()
        os.pwrite(source, b"XYZ", 0)
        step(os.splice, source, ends[1], 10, 0)
        step(os.splice, ends[0], target, 10)
        os.close(ends[0]), os.close(ends[1])
    os.close(source), os.close(target)
    with open("big", "wb") as big:
        big.write(os.urandom(0) + bytes(range(256)) * 4096)
        big.flush()
        step(shutil.copyfile, "big", "big2")
    left, right = socket.socketpair()
    with open("source", "rb") as file:
        step(left.sendfile, file)
    left.close()
    step(right.recv, 1000)
    right.close()


def names_and_times(step: Step, here: Path) -> None:
    def written(name: str, data: bytes) -> Any:
        file = open(name, "ab", 0)
        file.write(data)
        return file

    file = written("a", b"a")
    step(os.rename, "a", "b")
    file.write(b" after the rename")
    step(os.replace, "b", "c")
    other = written("d", b"d")
    step(os.rename, "c", "d")
    file.write(b" over the other")
    other.write(b"no name any more")
    step(lambda: os.fstat(other.fileno()).st_nlink)
    step(os.link, "d", "e")
    file.write(b" with two names")
    step(os.path.getsize, "e")
    step(os.unlink, "d")
    step(os.remove, "e")
    step(lambda: os.fstat(file.fileno()))
    file.close(), other.close()
    file = written("t", b"timed")
    step(os.utime, "t", (1000, 2000))
    step(os.utime, file.fileno(), ns=(3_000_000_000, 4_000_000_000))
    step(lambda: os.stat("t").st_mtime_ns)
    step(os.chmod, "t", 0o640)
    step(os.fchmod, file.fileno(), 0o600)
    step(os.chown, "t", os.getuid(), -1)
    file.close()
    step(lambda: os.stat("t").st_mtime_ns)
    for call in (os.rename, os.replace, os.link):
        step(call, "absent", "x")
        step(call, 1, 2)
    for call in (os.unlink, os.remove):
        step(call, "absent")


def locks_and_flags(step: Step, here: Path) -> None:
    with open("a", "w+b", 0) as file:
        file.write(b"x" * 100)
        step(fcntl.flock, file, fcntl.LOCK_EX)
        step(fcntl.flock, file.fileno(), fcntl.LOCK_UN)
        step(fcntl.lockf, file, fcntl.LOCK_EX, 10, 5)
        step(fcntl.lockf, file, fcntl.LOCK_UN)
        step(os.lockf, file.fileno(), os.F_LOCK, 5)
        step(fcntl.fcntl, file, fcntl.F_GETFD)
        step(fcntl.fcntl, file, 9999)
        step(fcntl.fcntl, "x", fcntl.F_GETFD)
        step(os.set_blocking, file.fileno(), False)
        step(file.write, b"not blocking")
        step(os.get_blocking, file.fileno())
        step(os.set_blocking, file.fileno(), True)
        step(fcntl.ioctl, file, 0x5413, b"\0" * 8)  # TIOCGWINSZ: not for files


def synchronous_files(step: Step, here: Path) -> None:
    for flag in (os.O_SYNC, os.O_DSYNC):
        fd = os.open("a", os.O_WRONLY | os.O_CREAT | flag)
        step(os.write, fd, b"synchronous")
        step(os.pwrite, fd, b"S", 0)
        os.close(fd)


# --- Going native ----------------------------------------------------------------------------------------------------


def mapped_files(step: Step, here: Path) -> None:
    file = open("a", "w+b", 0)
    file.write(b"0123456789" * 500)
    with mmap.mmap(file.fileno(), 0) as view:
        step.note([type(view).__name__, isinstance(view, mmap.mmap), repr(view)[:10], len(view)])
        file.seek(0)
        file.write(b"written")
        step(lambda: view[:10])
        view[0:4] = b"VIEW"
        step(os.pread, file.fileno(), 10, 0)
    file.write(b" afterwards")
    file.close()
    with open("a", "ab") as file:
        file.write(b" and again")
    with open("a", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        step(lambda: view[-10:])
        with open("a", "r+b", 0) as writer:
            writer.write(b"seen")
            step(lambda: view[:4])

    class Named(mmap.mmap):
        name = "subclass"

    anonymous = Named(-1, 10)
    step.note(
        [anonymous.name, isinstance(anonymous, mmap.mmap), issubclass(Named, mmap.mmap), isinstance(5, mmap.mmap)]
    )
    anonymous.close()
    step(mmap.mmap, 999_999, 10)


def other_programs_write(step: Step, here: Path) -> None:
    with open("out", "wb") as file:
        file.write(b"from the parent\n")
        file.flush()
        step(subprocess.call, ["echo", "from the child"], stdout=file)
        file.write(b"from the parent again\n")
        file.flush()
        step(subprocess.call, ["sh", "-c", f"echo by number >&{file.fileno()}"], pass_fds=[file.fileno()])
    step(subprocess.check_output, ["cat", "out"])
    fd = os.open("spawned", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"before\n")
    child = os.posix_spawn("/bin/echo", ["echo", "spawned"], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, fd, 1)])
    os.waitpid(child, 0)
    os.write(fd, b"after\n")
    os.close(fd)
    fd = os.open("inherited", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"before\n")
    os.set_inheritable(fd, True)
    step(subprocess.call, ["sh", "-c", f"echo child >&{fd}"], close_fds=False)
    os.write(fd, b"after\n")
    os.close(fd)
    saved = os.dup(1)
    fd = os.open("stdout", os.O_WRONLY | os.O_CREAT)
    os.dup2(fd, 1)
    os.write(1, b"redirected\n")
    subprocess.call(["echo", "and the child"])
    os.write(1, b"back\n")
    os.dup2(saved, 1)
    os.close(saved), os.close(fd)
    step(subprocess.Popen, ["/absent/program"], stdout=None)


def descriptors_that_are_sent(step: Step, here: Path) -> None:
    left, right = socket.socketpair()
    with open("a", "wb", 0) as file:
        file.write(b"mine,")
        step(socket.send_fds, left, [b"x"], [file.fileno()])
        message, fds, _, _ = socket.recv_fds(right, 10, 5)
        step.note(message)
        os.write(fds[0], b"theirs,")
        file.write(b"mine")
        os.close(fds[0])
    step(left.sendmsg, [b"without"])
    step(left.sendmsg, [b"with"], [])
    step(right.recv, 100)
    left.close(), right.close()


def forked_children(step: Step, here: Path) -> None:
    def child(work: Callable[[], None]) -> int:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    fd = os.open("a", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"parent,")

    def in_child() -> None:
        assert os.pread(fd, 100, 0) == b"parent,"
        os.write(fd, b"child,")
        with open("own", "w") as file:
            file.write("of the child")
        os.close(fd)

    step(child, in_child)
    os.write(fd, b"parent again")
    step(os.pread, fd, 100, 0)
    step(lambda: Path("own").read_text())
    os.close(fd)
    with open("buffered", "w") as file:
        file.write("in the buffer ")
        file.flush()
        step(child, lambda: (file.write("of the child "), file.close()))
        file.write("of the parent")


# --- The standard library on top --------------------------------------------------------------------------------


def the_standard_library(step: Step, here: Path) -> None:
    import bz2
    import csv
    import gzip
    import lzma
    import pickle
    import sqlite3
    import tarfile
    import zipfile

    logger = logging.Logger("orders")
    handler = logging.handlers.RotatingFileHandler("log", maxBytes=200, backupCount=2)
    logger.addHandler(handler)
    for number in range(30):
        logger.warning("order %d", number)
    handler.close()
    watched = logging.handlers.WatchedFileHandler("watched")
    watched.emit(logging.makeLogRecord({"msg": "one"}))
    os.rename("watched", "moved")
    watched.emit(logging.makeLogRecord({"msg": "two"}))
    watched.close()
    for module in (bz2, lzma):
        with module.open(f"{module.__name__}", "wb") as file:
            file.write(b"compressed" * 1000)
        with module.open(f"{module.__name__}", "rb") as file:
            step(lambda: len(file.read()))
    with open("gzip", "wb") as plain, gzip.GzipFile("", "wb", 9, plain, 0) as file:
        file.write(b"compressed" * 1000)
    with open("rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([[1, "a"], [2, "b"]])
    with open("pickled", "wb") as file:
        pickle.dump({"a": list(range(1000))}, file, 4)
    with zipfile.ZipFile("z.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo("member"), b"data")
    with zipfile.ZipFile("z.zip", "a") as archive:
        archive.writestr(zipfile.ZipInfo("second"), b"data")
        step(archive.namelist)
    with tarfile.open("t.tar", "w") as archive:
        information = tarfile.TarInfo("member")
        information.size = 4
        archive.addfile(information, io.BytesIO(b"data"))
    step(lambda: tarfile.open("t.tar").getnames())
    with tempfile.NamedTemporaryFile(dir=".", delete=False) as file:
        file.write(b"temporary")
        name = file.name
    os.rename(name, "temporary")
    with tempfile.TemporaryFile(dir=".") as file:
        file.write(b"unnamed")
        file.seek(0)
        step(file.read)
    connection = sqlite3.connect("db")
    connection.execute("create table t (a)")
    connection.execute("insert into t values (1)")
    connection.commit()
    step(lambda: connection.execute("select * from t").fetchall())
    connection.close()
    os.unlink("db")
    step(shutil.move, "rows.csv", "moved.csv")


def many_threads(step: Step, here: Path) -> None:
    with open("shared", "ab", 0) as shared:

        def work(number: int) -> None:
            with open(f"own-{number}", "w") as own:
                for turn in range(200):
                    shared.write(b"%d:%d\n" % (number, turn))
                    own.write(f"{turn}\n")
                    if turn % 50 == 0:
                        own.flush()
                        assert os.path.getsize(f"own-{number}") == own.tell()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = sorted(Path("shared").read_bytes().split())
    step.note(lines == sorted(b"%d:%d" % (number, turn) for number in range(4) for turn in range(200)))
    os.unlink("shared")  # the order of its lines is free


def big_writes(step: Step, here: Path) -> None:
    with open("a", "wb", 0) as file:
        for size in (4032, 4033, 65536, 1_048_512, 1_048_513, 5_000_000):
            step(file.write, (b"%07d\n" % size) * (size // 8 + 1))
            step(file.tell)
    with open("b", "ab", 0) as file:
        step(file.write, b"small")
        step(file.write, b"x" * 3_000_000)
        step(file.write, b"small")
        step(file.tell)
    fd = os.open("c", os.O_WRONLY | os.O_CREAT)
    step(os.writev, fd, [b"y" * 700_000] * 4)
    step(os.pwrite, fd, b"z" * 2_000_000, 100)
    step(os.lseek, fd, 0, os.SEEK_CUR)
    os.close(fd)


SCENARIOS = [
    name
    for name, value in list(globals().items())
    if getattr(value, "__module__", None) == __name__
    and callable(value)
    and list(getattr(value, "__annotations__", ())) == ["step", "here", "return"]
]
