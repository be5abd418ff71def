"""Fixtures for every test of the project. Each test gets a daemon, a directory, a ring and a socket of its own, so
that tests run in any order and side by side."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elgate.daemon.child import ChildDaemon
from elgate.daemon.places import scratch_directory


@pytest.fixture
def disk_dir() -> Iterator[Path]:
    """A directory of the test's own, on a real disk where this machine has one (tmp_path may be on tmpfs)."""
    directory = scratch_directory("elgate-test-")
    yield directory
    shutil.rmtree(directory)


def _marked(request: pytest.FixtureRequest) -> dict[str, Any]:
    marker = request.node.get_closest_marker("elgate")
    return dict(marker.kwargs) if marker is not None else {}


@pytest.fixture
def elgate_daemon_stopped(request: pytest.FixtureRequest, disk_dir: Path) -> Iterator[ChildDaemon]:
    """As `elgate_daemon`, but not started yet."""
    arguments = _marked(request)
    routes = arguments.pop("routes", None)
    # A log's segments are zero-written ahead; tests need not write 64 MiB each.
    arguments["wal"] = {"segment_size": "8MiB", **arguments.get("wal", {})}
    with ChildDaemon(disk_dir, sections=arguments) as daemon:
        if routes is not None:
            daemon.write_config(
                [
                    {**route, "match": {"path": route["match"]["path"].replace("{route_dir}", str(daemon.route_dir))}}
                    for route in routes
                ]
            )
        yield daemon
        # Only shown for a test that failed.
        print(f"--- {daemon.log_path}\n{daemon.log_text()}")


@pytest.fixture
def elgate_daemon(elgate_daemon_stopped: ChildDaemon) -> ChildDaemon:
    """A running daemon with one route, `files`, for all below its `route_dir`.

    A marker changes its configuration: `{route_dir}` in a route's path is replaced, other sections are merged.

        @pytest.mark.elgate(routes=[{"name": "a", "match": {"path": "{route_dir}/a/**"}, "flush": "always"}])
    """
    elgate_daemon_stopped.start()
    return elgate_daemon_stopped
