"""Disks that fail, by what one machine has: file systems of a test's own, mounted below its directory.

Everything here needs root. What it mounts is unmounted by `close`, also after a failure.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import pytest

BLOCK_BYTES = 4096
EXT4_IOC_SHUTDOWN = 0x8004587D
# No flush of the journal: as if the plug had been pulled.
EXT4_GOING_FLAGS_NOLOGFLUSH = 2
UNMOUNT_LIMIT_S = 30.0

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")


def thaw_all() -> None:
    """Before anything is ended that may hang: not even SIGKILL ends it."""
    for frozen in list(Ext4.frozen):
        frozen.thaw()


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


class Mounted:
    """Something that is mounted until `close`."""

    def __init__(self, mount_point: Path) -> None:
        self.mount_point = mount_point
        mount_point.mkdir(parents=True, exist_ok=True)

    def unmount(self) -> None:
        """Waits for those that still use it: a killed process's last write, a loop device."""
        deadline = time.monotonic() + UNMOUNT_LIMIT_S
        while True:
            done = subprocess.run(["umount", str(self.mount_point)], capture_output=True, text=True, check=False)
            if done.returncode == 0 or "not mounted" in done.stderr:
                return
            assert time.monotonic() < deadline, done.stderr
            time.sleep(0.02)

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.mount_point)], capture_output=True, check=False)

    def remount(self, options: str) -> None:
        run("mount", "-o", f"remount,{options}", self.mount_point)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Tmpfs(Mounted):
    """A file system that is full at `size_bytes`."""

    def __init__(self, mount_point: Path, size_bytes: int) -> None:
        super().__init__(mount_point)
        run("mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", mount_point)

    def resize(self, size_bytes: int) -> None:
        self.remount(f"size={size_bytes}")

    def fill(self) -> Path:
        """A file that takes all there is."""
        filler = self.mount_point / "filler"
        with open(filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(BLOCK_BYTES))
            except OSError:
                pass
        return filler


class Ext4(Mounted):
    """An ext4 file system in the file `image`, through a loop device."""

    frozen: ClassVar[list[Ext4]] = []

    def __init__(self, mount_point: Path, image: Path, size_bytes: int) -> None:
        super().__init__(mount_point)
        self.image = image
        with open(image, "wb") as file:
            file.truncate(size_bytes)
        run(
            "mkfs.ext4", "-q", "-b", str(BLOCK_BYTES), "-J", "size=4",
            "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", image,
        )  # fmt: skip
        self.mount()

    def mount(self) -> None:
        run("mount", "-o", "loop", self.image, self.mount_point)

    def cut_power(self) -> None:
        """What is not synced is gone; nothing works on it until it is unmounted and mounted again."""
        descriptor = os.open(self.mount_point, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH.to_bytes(4, "little"))
        finally:
            os.close(descriptor)

    def freeze(self) -> None:
        """Whoever writes to it, or syncs, hangs until `thaw`."""
        run("fsfreeze", "-f", self.mount_point)
        self.frozen.append(self)

    def thaw(self) -> None:
        if self in self.frozen:
            self.frozen.remove(self)
            run("fsfreeze", "-u", self.mount_point)

    def close(self) -> None:
        self.thaw()
        super().close()


class ThinExt4(Ext4):
    """The same in a tmpfs that is smaller than it claims to be. Once that is full, writes to the file system still
    succeed, into the page cache; a sync fails once, and the next one says that all is well, though what was lost is
    lost. What the file system needs for itself has room: it does not go read-only."""

    def __init__(self, directory: Path, mount_point: Path, size_bytes: int) -> None:
        self.memory = Tmpfs(directory / "memory", 2 * size_bytes)
        super().__init__(mount_point, self.memory.mount_point / "disk.img", size_bytes)

    def mount(self) -> None:
        self._occupy()
        super().mount()
        # A loop device takes a write of which its file took a part for done, and keeps silent about the rest (seen on
        # Linux 6.18). Of one block, there is no part.
        device = Path(run("findmnt", "-n", "-o", "SOURCE", self.mount_point).strip())
        Path("/sys/block", device.name, "queue/max_sectors_kb").write_text(str(BLOCK_BYTES // 1024))

    def _occupy(self) -> None:
        free: set[int] = set()
        for line in re.findall(r"^\s+Free blocks: (.*)$", run("dumpe2fs", self.image), re.MULTILINE):
            for part in filter(None, line.split(", ")):
                first, _, last = part.partition("-")
                free.update(range(int(first), int(last or first) + 1))
        used = [block for block in range(self.image.stat().st_size // BLOCK_BYTES) if block not in free]
        with open(self.image, "r+b", buffering=0) as file:
            for block in used:
                content = os.pread(file.fileno(), BLOCK_BYTES, block * BLOCK_BYTES)
                os.pwrite(file.fileno(), content, block * BLOCK_BYTES)

    def limit(self, data_bytes: int) -> None:
        """From now on it takes about this much more."""
        status = os.statvfs(self.memory.mount_point)
        self.memory.resize((status.f_blocks - status.f_bfree) * status.f_frsize + data_bytes)

    def unlimit(self) -> None:
        self.memory.resize(2 * self.image.stat().st_size)

    def close(self) -> None:
        super().close()
        self.memory.close()


class StallingExt4(Ext4):
    """The same on another file system that can be frozen: then its disk takes nothing more, and whoever waits for it
    hangs, while writes into the page cache go on."""

    def __init__(self, directory: Path, mount_point: Path, size_bytes: int) -> None:
        self.below = Ext4(directory / "below", directory / "below.img", 2 * size_bytes)
        super().__init__(mount_point, self.below.mount_point / "disk.img", size_bytes)

    def freeze(self) -> None:
        self.below.freeze()

    def thaw(self) -> None:
        self.below.thaw()

    def close(self) -> None:
        super().close()
        self.unmount()
        self.below.close()
