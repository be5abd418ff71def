"""The pytest fixture `elgate_stub`: a test stub of Elgate for each test (docs/testing.md).

pytest loads this module by itself, in every run, so all that it needs is imported when the fixture is used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from elgate.daemon.stub import StubDaemon

# What of the daemon's log a person wants to see beside a test that failed.
_SHOWN = ("warning", "error")


@pytest.fixture(scope="session")
def _elgate_stub_ring() -> Iterator[Path]:
    """One ring for all stubs of this process, one after the other: who has mapped a ring keeps it."""
    ring = Path(f"/dev/shm/elgate_ring-pytest-{os.getpid()}")
    yield ring
    for left in ring.parent.glob(f"{ring.name}.*"):
        left.unlink(missing_ok=True)


@pytest.fixture
def elgate_stub(tmp_path_factory: pytest.TempPathFactory, _elgate_stub_ring: Path) -> Iterator[StubDaemon]:
    """A daemon of the test's own that keeps nothing, records what programs send, and fails on demand.

    This process, and programs that it starts, find it. `elgate_stub.route(...)` first, then `elgate_stub.patch()` for
    what runs in this process, or `elgate run -- program` for one of its own."""
    try:
        from elgate.daemon.stub import StubDaemon
    except ModuleNotFoundError as error:
        pytest.fail(f"elgate_stub needs '{error.name}': pip install 'elgate[test]'", pytrace=False)
    stub = StubDaemon(tmp_path_factory.mktemp("elgate-stub"), _elgate_stub_ring)
    try:
        stub.serve_this_process()
        yield stub
    finally:
        try:
            stub.close()
        finally:
            print(f"--- elgate_stub: {stub.daemon.log_path}")
            for event in stub.daemon.events():
                if event["level"] in _SHOWN and event["event"] not in ("test_stub", "no_routes"):
                    print(" ".join(f"{name}={value}" for name, value in event.items() if name != "time"))
