"""A short run of ring_fuzz.py; `make fuzz-ring` is the long one."""

from __future__ import annotations

import pytest
from load import seed_of_this_run
from ring_fuzz import fuzz

from elgate.daemon.child import ChildDaemon


@pytest.mark.elgate(ring={"isolation": "per_client"})
def test_a_ring_that_is_mutated_while_it_is_read_harms_nobody_else(elgate_daemon: ChildDaemon) -> None:
    print(fuzz(elgate_daemon, seed_of_this_run(), 300_000))
