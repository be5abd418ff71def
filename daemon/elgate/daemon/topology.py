"""What this process may use of the machine: processors (affinity and cgroup quota respected) and memory nodes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

NODES = Path("/sys/devices/system/node")
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Topology:
    """`cpu_quota`: processors' worth of time that the cgroup grants; None: no limit. `memory_nodes`: at least 1."""

    cpus_online: int
    cpus_allowed: int
    cpu_quota: float | None
    memory_nodes: int

    @property
    def cpus_usable(self) -> float:
        return self.cpus_allowed if self.cpu_quota is None else min(self.cpus_allowed, self.cpu_quota)


def detect() -> Topology:
    """Looks at /proc and /sys; what is not there counts as no limit."""
    return Topology(
        cpus_online=os.cpu_count() or 1,
        cpus_allowed=len(os.sched_getaffinity(0)),
        cpu_quota=cpu_quota(Path("/proc/self/cgroup"), CGROUPS),
        memory_nodes=max(sum(1 for _ in NODES.glob("node[0-9]*")), 1),
    )


def cpu_quota(membership: Path, mounted: Path) -> float | None:
    """The tightest limit on the way from this process's cgroup to the root: `cpu.max` of version 2, or quota and
    period of version 1."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        roots = [mounted] if not controllers else [mounted / controllers, mounted / "cpu"]
        for root in roots:
            place = root / path.lstrip("/")
            for directory in (place, *place.parents):
                limits += _limit_in(directory)
                if directory == root:
                    break
    return min(limits, default=None)


def _limit_in(directory: Path) -> list[float]:
    try:
        quota, period = (directory / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (directory / "cpu.cfs_quota_us").read_text().strip()
            period = (directory / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return []
    try:
        return [int(quota) / int(period)] if int(quota) > 0 else []
    except (ValueError, ZeroDivisionError):
        return []  # "max"
