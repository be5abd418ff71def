"""One of several programs that do to the same files what they are told, one step at a time: see test_oracle_of_many.py.

    python oracle_worker.py DIRECTORY

A line on stdin is a JSON list, the step's name and what it takes; the answer is a line, what came of it.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import elgate

elgate.patch_all()

fds: dict[str, int] = {}


def payload(text: str, count: int) -> bytes:
    return (text.encode() * (count // len(text) + 1))[:count]


def in_child(work: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_thread(work: Callable[[], Any]) -> Any:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except OSError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], OSError):
        raise results[0]
    return results[0]


class Steps:
    def open(self, name: str, path: str, flags: int) -> None:
        fds[name] = os.open(path, flags, 0o644)

    def close(self, name: str) -> None:
        os.close(fds.pop(name))

    def close_in_thread(self, name: str) -> None:
        in_thread(lambda: os.close(fds.pop(name)))

    def dup(self, name: str, copy: str) -> None:
        fds[copy] = os.dup(fds[name])

    def dup2(self, name: str, over: str) -> None:
        os.dup2(fds[name], fds[over])

    def write(self, name: str, text: str, count: int) -> int:
        return os.write(fds[name], payload(text, count))

    def write_in_thread(self, name: str, text: str, count: int) -> int:
        return in_thread(lambda: os.write(fds[name], payload(text, count)))

    def pwrite(self, name: str, text: str, count: int, offset: int) -> int:
        return os.pwrite(fds[name], payload(text, count), offset)

    def writev(self, name: str, text: str, count: int, parts: int) -> int:
        return os.writev(fds[name], [payload(text, count)] * parts)

    def pwritev(self, name: str, text: str, count: int, parts: int, offset: int) -> int:
        return os.pwritev(fds[name], [payload(text, count)] * parts, offset)

    def child_writes(self, name: str, text: str, count: int) -> int:
        return in_child(lambda: os.write(fds[name], payload(text, count)))

    def child_closes(self, name: str) -> int:
        return in_child(lambda: os.close(fds[name]))

    def child_replaces(self, name: str, path: str, text: str) -> int:
        def work() -> None:
            os.dup2(fds[name], 1)
            os.execv("/bin/sh", ["sh", "-c", f"echo {text}; echo {text} >> {path}"])

        return in_child(work)

    def program_writes(self, name: str, text: str) -> int:
        return subprocess.run(["echo", text], stdout=fds[name], check=False).returncode

    def read(self, name: str, count: int) -> str:
        return os.read(fds[name], count).hex()

    def pread(self, name: str, count: int, offset: int) -> str:
        return os.pread(fds[name], count, offset).hex()

    def lseek(self, name: str, offset: int, whence: int) -> int:
        return os.lseek(fds[name], offset, whence)

    def settle(self) -> None:
        for fd in fds.values():
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:
                os.lseek(fd, 0, os.SEEK_CUR)

    def size(self, name: str) -> int:
        return os.fstat(fds[name]).st_size

    def links(self, name: str) -> int:
        return os.fstat(fds[name]).st_nlink

    def fsync(self, name: str) -> None:
        os.fsync(fds[name])

    def ftruncate(self, name: str, length: int) -> None:
        os.ftruncate(fds[name], length)

    def truncate(self, path: str, length: int) -> None:
        os.truncate(path, length)

    def fallocate(self, name: str, offset: int, length: int) -> None:
        os.posix_fallocate(fds[name], offset, length)

    def append_mode(self, name: str, on: bool) -> None:
        flags = fcntl.fcntl(fds[name], fcntl.F_GETFL)
        fcntl.fcntl(fds[name], fcntl.F_SETFL, flags | os.O_APPEND if on else flags & ~os.O_APPEND)

    def add_under_lock(self, name: str, path: str) -> int:
        """A counter at the file's beginning, by a description of its own."""
        with open(path, "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            number = int((file.read(8) or b"0").strip() or b"0")
            file.seek(0)
            file.write(b"%8d" % (number + 1))
            fcntl.flock(file, fcntl.LOCK_UN)
            return number

    def sendfile(self, name: str, source: str, count: int) -> int:
        return os.sendfile(fds[name], fds[source], 0, count)

    def copy_range(self, name: str, source: str, count: int) -> int:
        return os.copy_file_range(fds[source], fds[name], count)

    def copyfile(self, path: str, target: str) -> None:
        shutil.copyfile(path, target)

    def read_file(self, path: str) -> str:
        with open(path, "rb") as file:
            return file.read().hex()

    def write_file(self, path: str, text: str, count: int, mode: str) -> None:
        with open(path, mode + "b") as file:
            file.write(payload(text, count))
            file.write(b"\n")

    def replace_file(self, path: str, text: str, count: int) -> None:
        with open(f"{path}.tmp", "wb") as file:
            file.write(payload(text, count))
        os.replace(f"{path}.tmp", path)

    def map_and_write(self, name: str, text: str) -> None:
        with mmap.mmap(fds[name], 0) as view:
            view[: len(text)] = text.encode()

    def rename(self, path: str, target: str) -> None:
        os.rename(path, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def link(self, path: str, target: str) -> None:
        os.link(path, target)

    def listdir(self, path: str) -> list[str]:
        return sorted(os.listdir(path))


def main() -> None:
    os.chdir(sys.argv[1])
    steps = Steps()
    print("ready", flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            result = getattr(steps, name)(*arguments)
        except OSError as error:
            result = ["raised", error.errno]
        except (ValueError, KeyError, IndexError) as error:
            result = ["raised", repr(error)]
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
