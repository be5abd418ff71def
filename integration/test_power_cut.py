"""A power cut: an ext4 image on a loop device is shut down under load (nothing that is not synced survives), mounted
again, and the daemon started on an empty /dev/shm. Everything acknowledged must be there.

The same test must fail on a build that leaves its syncs out: a SIGKILL alone never shows a missing one. That is
shown with a log written through the page cache: what goes around it is on the image at once, synced or not.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from load import Load

from elgate.daemon.child import ChildDaemon
from elgate.daemon.demo.verify import Verdict

EXT4_IOC_SHUTDOWN = 0x8004587D
# No flush of the journal: as if the plug had been pulled.
EXT4_GOING_FLAGS_NOLOGFLUSH = 2

IMAGE_BYTES = 512 << 20
UNMOUNT_LIMIT_S = 30


class Image:
    """An ext4 file system in a file, mounted through a loop device."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "disk.img"
        self.mount_point = directory / "mnt"
        self.mount_point.mkdir()
        with open(self.path, "wb") as image:
            image.truncate(IMAGE_BYTES)
        # An uninitialised inode table would be written in the background, later than the test.
        subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", self.path], check=True)
        self.mounted = False

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self.path, self.mount_point], check=True)
        self.mounted = True

    def cut_power(self) -> None:
        descriptor = os.open(self.mount_point, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH.to_bytes(4, "little"))
        finally:
            os.close(descriptor)

    def unmount(self) -> None:
        if not self.mounted:
            return
        # A killed daemon's io_uring holds the log's lock until its last write has landed, or been refused.
        deadline = time.monotonic() + UNMOUNT_LIMIT_S
        while True:
            tried = subprocess.run(["umount", self.mount_point], capture_output=True, text=True, check=False)
            if tried.returncode == 0:
                break
            assert time.monotonic() < deadline, tried.stderr
            time.sleep(0.02)
        self.mounted = False


@pytest.fixture
def image(disk_dir: Path) -> Iterator[Image]:
    if os.geteuid() != 0:
        pytest.skip("mounting an image needs root")
    for tool in ("mkfs.ext4", "mount", "umount"):
        assert shutil.which(tool, path=os.environ["PATH"] + ":/sbin:/usr/sbin"), (
            f"{tool} is missing: install e2fsprogs and mount"
        )
    image = Image(disk_dir)
    image.mount()
    yield image
    image.unmount()


def run_into_a_power_cut(image: Image, environment: dict[str, str], flush: Any) -> tuple[Verdict, ChildDaemon]:
    with ChildDaemon(image.mount_point / "elgate") as daemon:
        daemon.write_config([{"name": "files", "match": {"path": f"{daemon.route_dir}/**"}, "flush": flush}])
        # The log file of the daemon itself must not lie on the disk that goes away.
        daemon.log_path = image.path.parent / "daemon.log"
        # What the test itself has put there is to survive; everything from here on is Elgate's to keep.
        os.sync()
        daemon.start(environment=environment)
        load = Load(daemon, daemon.route_dir / "orders", shops=2)
        try:
            load.wait_for(300)
            image.cut_power()
            load.stop()
            daemon.kill()
            image.unmount()
            image.mount()
            daemon.ring_path.unlink()
            daemon.start(environment=environment)
            assert daemon.stop() == 0, daemon.log_text()[-4000:]
            return load.verify(), daemon
        finally:
            load.close()


# With an interval of a minute nothing is durable but what an fsync has asked for.
FLUSH_MODES = {"always": "always", "group": "group", "interval": {"interval": "60s"}, "none": "none"}


@pytest.mark.parametrize(
    ("flush", "log"),
    [("group", "direct"), *((flush, "buffered") for flush in FLUSH_MODES), ("interval", "direct"), ("none", "direct")],
)
def test_a_power_cut_loses_nothing_that_was_acknowledged(
    flush: str, log: str, image: Image, core_test_build: Path
) -> None:
    environment = {"ELGATE_CORE_LIBRARY": str(core_test_build)}
    if log == "buffered":
        environment["ELGATE_LOG_BUFFERED"] = "1"
    verdict, daemon = run_into_a_power_cut(image, environment, FLUSH_MODES[flush])
    assert verdict.acknowledged >= 600
    assert verdict.ok, (verdict, daemon.log_text()[-4000:])
    assert daemon.events("log_replayed"), "nothing was replayed: the cut came when all was in the files already"


@pytest.mark.parametrize("flush", ["group", "none"])
def test_the_power_cut_test_sees_a_missing_sync(flush: str, image: Image, core_test_build: Path) -> None:
    environment = {"ELGATE_CORE_LIBRARY": str(core_test_build), "ELGATE_LOG_BUFFERED": "1", "ELGATE_NO_SYNC": "1"}
    verdict, _ = run_into_a_power_cut(image, environment, flush)
    assert verdict.acknowledged >= 600
    assert verdict.lost > 0, "commits without RWF_DSYNC and fdatasync, and the test saw nothing"
