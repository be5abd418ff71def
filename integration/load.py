"""A load that notices every lost, doubled, damaged or misplaced byte: the demo's shops, driven from a test.

Each shop is an ordinary program (elgate.daemon.demo.orders) of several threads that acknowledges an order only after
its fsync has returned; what it acknowledged reaches the test through a pipe, which outlives a SIGKILL.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from elgate.daemon.child import ChildDaemon
from elgate.daemon.demo.driver import GRACE_S, PUMP_S, Shop
from elgate.daemon.demo.verify import Verdict, Writer, verify

FOREVER_S = 600.0


def seed_of_this_run() -> int:
    """From ELGATE_SEED, to run the same choices again; else a new one. Printed, so that a failure shows it."""
    seed = int(os.environ.get("ELGATE_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"ELGATE_SEED={seed}")
    return seed


class Load:
    """Shops on one directory. `close` ends what still runs."""

    def __init__(self, daemon: ChildDaemon, directory: Path, shops: int, threads: int = 4) -> None:
        self.daemon = daemon
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.everyone: list[Shop] = []
        self.alive = [self._open(number, 1) for number in range(shops)]

    def _open(self, number: int, run: int) -> Shop:
        # A daemon that is killed while a shop starts comes back: the shop waits for it.
        shop = Shop(number, run, self.directory, {**self.daemon.env(), "ELGATE_FALLBACK": "wait"})
        self.everyone.append(shop)
        shop.take_orders(FOREVER_S)
        return shop

    def acknowledged(self) -> int:
        for shop in self.everyone:
            shop.pump()
            shop.new_latencies_ns()
        return sum(sum(shop.acknowledged.values()) for shop in self.everyone)

    def wait_for(self, orders: int, limit_s: float = GRACE_S) -> None:
        """Until every living shop has acknowledged at least `orders` more."""
        self.acknowledged()
        wanted = {shop: sum(shop.acknowledged.values()) + orders for shop in self.alive}
        deadline = time.monotonic() + limit_s
        while True:
            self.acknowledged()
            late = [shop for shop, count in wanted.items() if sum(shop.acknowledged.values()) < count]
            if not late:
                return
            for shop in late:
                assert shop.process.poll() is None, f"shop {shop.number} ended by itself: {shop.process.returncode}"
            assert time.monotonic() < deadline, (
                f"shops {[shop.number for shop in late]} do not go on; the daemon's log:\n{self.daemon.log_text()[-4000:]}"
            )
            time.sleep(PUMP_S / 5)

    def kill_shop(self, victim: Shop) -> None:
        """SIGKILL, and another life of the same shop on the same files."""
        victim.kill()
        self.alive[self.alive.index(victim)] = self._open(victim.number, victim.run + 1)

    def stop(self) -> None:
        """SIGKILL for all, so that the last orders of each are in whatever state they are."""
        for shop in self.alive:
            shop.kill()
        self.alive = []

    def verify(self) -> Verdict:
        """What stands in the files, held against what was acknowledged. Reads natively."""
        self.acknowledged()
        acknowledged: dict[Writer, int] = {}
        for shop in self.everyone:
            acknowledged.update(shop.acknowledged)
        return verify(self.directory, acknowledged)

    def close(self) -> None:
        for shop in self.everyone:
            shop.close()
