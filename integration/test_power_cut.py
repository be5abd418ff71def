"""A power cut: an ext4 image on a loop device is shut down under load (nothing that is not synced survives), mounted
again, and the daemon started on an empty /dev/shm. Everything acknowledged must be there.

The same test must fail on a build that leaves its syncs out: a SIGKILL alone never shows a missing one. That is
shown with a log written through the page cache: what goes around it is on the image at once, synced or not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disks import Ext4, needs_root
from load import Load

from elgate.daemon.child import ChildDaemon
from elgate.daemon.demo.verify import Verdict

pytestmark = needs_root

IMAGE_BYTES = 512 << 20


@pytest.fixture
def image(disk_dir: Path) -> Iterator[Ext4]:
    with Ext4(disk_dir / "mnt", disk_dir / "disk.img", IMAGE_BYTES) as image:
        yield image


def run_into_a_power_cut(image: Ext4, environment: dict[str, str], flush: Any) -> tuple[Verdict, ChildDaemon]:
    with ChildDaemon(image.mount_point / "elgate") as daemon:
        daemon.write_config([{"name": "files", "match": {"path": f"{daemon.route_dir}/**"}, "flush": flush}])
        # The log file of the daemon itself must not lie on the disk that goes away.
        daemon.log_path = image.image.parent / "daemon.log"
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
    flush: str, log: str, image: Ext4, core_test_build: Path
) -> None:
    environment = {"ELGATE_CORE_LIBRARY": str(core_test_build)}
    if log == "buffered":
        environment["ELGATE_LOG_BUFFERED"] = "1"
    verdict, daemon = run_into_a_power_cut(image, environment, FLUSH_MODES[flush])
    assert verdict.acknowledged >= 600
    assert verdict.ok, (verdict, daemon.log_text()[-4000:])
    assert daemon.events("log_replayed"), "nothing was replayed: the cut came when all was in the files already"


@pytest.mark.parametrize("flush", ["group", "none"])
def test_the_power_cut_test_sees_a_missing_sync(flush: str, image: Ext4, core_test_build: Path) -> None:
    environment = {"ELGATE_CORE_LIBRARY": str(core_test_build), "ELGATE_LOG_BUFFERED": "1", "ELGATE_NO_SYNC": "1"}
    verdict, _ = run_into_a_power_cut(image, environment, flush)
    assert verdict.acknowledged >= 600
    assert verdict.lost > 0, "commits without RWF_DSYNC and fdatasync, and the test saw nothing"
