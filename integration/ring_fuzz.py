"""A client that mutates its live ring, by seed, while the daemon reads it and an honest program works beside it in a ring
of its own. The daemon must live, hold up nobody, lose nothing of the honest one's, and stop in good order.

`make fuzz-ring` runs it for as many mutations as MUTATIONS says (10 million), or once more with SEED.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import struct
import sys
import threading
import time
from pathlib import Path

from formats import ENUMERATIONS, RING, state_word
from programs import Appender, wait_until
from rawclient import PRODUCER_ROWS, SLOT_BYTES, SLOTS, SLOTS_OFFSET, STATE_WORDS, RawClient

from elgate.daemon.child import ChildDaemon
from elgate.daemon.places import scratch_directory

ROWS_END = PRODUCER_ROWS + 1024 * RING["ProducerRow"].size
HEADER_WORDS = ("head", "tail", "doorbell", "space_sequence", "space_waiters", "late_wakes")
HEADER_FIELDS = tuple(RING["Header"].fields)
STATES = tuple(ENUMERATIONS["StateWord.state"])
# A state word has 40 bits for the lap.
POSITIONS_END = SLOTS << 39
SLOT_FIELDS = tuple(RING["SlotHeader"].fields.values())
EXTREMES = (0, 1, 2, 0x7F, 0xFF, 0xFFFF, 1 << 20, (1 << 31) - 1, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
# Of an honest append, while all this goes on.
APPEND_LIMIT_S = 20.0


class Vandal:
    """One session after the other: the daemon may end any of them, and never more than that."""

    def __init__(self, daemon: ChildDaemon, seed: int) -> None:
        self.daemon = daemon
        self.choices = random.Random(seed)
        self.mutations = 0
        self.sessions = 0
        self.records = 0
        self.client: RawClient | None = None
        self.old: list[bytes] = []

    def run(self, mutations: int) -> None:
        while self.mutations < mutations:
            with contextlib.suppress(OSError, AssertionError):
                self.client = self.connect()
                for _ in range(self.choices.randrange(1, 200)):
                    self.records_come()
                    self.mutate(min(500, mutations - self.mutations))
                    if self.choices.random() < 0.2:
                        self.client.ring_doorbell()
                    if self.mutations >= mutations:
                        break
            assert self.daemon.process is not None and self.daemon.process.poll() is None, "the daemon has died"
            if self.client is not None:
                self.client.close()
                self.client = None

    def connect(self) -> RawClient:
        client = RawClient(self.daemon.socket)
        try:
            client.hello()
            # The C library would follow what is mutated here.
            client.attach(falsely=True)
            client.register(self.daemon.route_dir / "vandal")
        except BaseException:
            client.close()
            raise
        self.sessions += 1
        return client

    def records_come(self) -> None:
        """Good ones, for a start, and some that are false in one thing."""
        assert self.client is not None
        for _ in range(self.choices.randrange(4)):
            head = self.client.head
            if head % SLOTS > SLOTS - 4 or head >= POSITIONS_END:
                RING["Header"].set(self.client.ring, 0, "head", (head + 4) % POSITIONS_END)
                continue
            false = {}
            if self.choices.random() < 0.3:
                name = self.choices.choice(list(RING["SlotHeader"].fields))
                size = RING["SlotHeader"].fields[name][1]
                if size <= 8:
                    false[name] = self.choices.choice(EXTREMES) % (1 << 8 * size)
            self.client.put(bytes(self.choices.randrange(3000)), commit=self.choices.random() < 0.9, **false)
            self.records += 1
            if len(self.old) < 64:
                slot = SLOTS_OFFSET + head % SLOTS * SLOT_BYTES
                self.old.append(self.client.ring[slot : slot + 64])

    def mutate(self, count: int) -> None:
        assert self.client is not None
        ring, choices = self.client.ring, self.choices
        below, draw = choices.randrange, choices.random
        near = self.client.head
        self.mutations += count
        for _ in range(count):
            drawn = draw()
            # Where something is under way, or anywhere.
            position = (near + below(-8, 4)) % POSITIONS_END if drawn * 10 % 1 < 0.7 else below(SLOTS)
            if drawn < 0.3:
                owner = self.client.row if draw() < 0.5 else below(1100)
                word = state_word(
                    STATES[below(len(STATES))], below(300), owner, max(position // SLOTS + below(-1, 2), 0)
                )
                struct.pack_into("<Q", ring, STATE_WORDS + position % SLOTS * 8, word)
            elif drawn < 0.45:
                ring[STATE_WORDS + position % SLOTS * 8 + below(8)] = below(256)
            elif drawn < 0.65:
                offset, size = SLOT_FIELDS[below(len(SLOT_FIELDS))]
                value = EXTREMES[below(len(EXTREMES))] if draw() < 0.5 else below(1 << 8 * min(size, 8))
                at = SLOTS_OFFSET + position % SLOTS * SLOT_BYTES + offset
                ring[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
            elif drawn < 0.75:
                ring[SLOTS_OFFSET + position % SLOTS * SLOT_BYTES + below(SLOT_BYTES)] = below(256)
            elif drawn < 0.8 and self.old:
                at = SLOTS_OFFSET + position % SLOTS * SLOT_BYTES
                ring[at : at + 64] = self.old[below(len(self.old))]
            elif drawn < 0.9:
                offset, size = RING["Header"].fields[HEADER_WORDS[below(len(HEADER_WORDS))]]
                value = near + below(-2000, 2000) if draw() < 0.7 else EXTREMES[below(len(EXTREMES))]
                ring[offset : offset + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
            elif drawn < 0.98:
                ring[below(PRODUCER_ROWS, ROWS_END)] = below(256)
            else:
                offset, size = RING["Header"].fields[HEADER_FIELDS[below(len(HEADER_FIELDS))]]
                ring[offset + below(size)] = below(256)


class Honest:
    """Appends a line at a time, each with an fsync, until it is told to end."""

    def __init__(self, daemon: ChildDaemon) -> None:
        self.writer = Appender(daemon, daemon.route_dir / "honest")
        self.problem: str | None = None
        self.slowest_s = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        number = 0
        while not self._ended.is_set() and self.problem is None:
            begun = time.monotonic()
            try:
                errno = self.writer.append(f"line {number}", APPEND_LIMIT_S)
            except AssertionError as error:
                self.problem = str(error)
                return
            if errno != 0:
                self.problem = f"line {number}: errno {errno}"
            self.slowest_s = max(self.slowest_s, time.monotonic() - begun)
            number += 1
            self._ended.wait(0.002)

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        self.writer.close()
        assert self.problem is None, self.problem
        assert len(self.writer.acknowledged) > 0
        assert self.writer.path.read_bytes() == b"".join(self.writer.acknowledged)


def fuzz(daemon: ChildDaemon, seed: int, mutations: int) -> str:
    """The daemon runs, with `ring.isolation: per_client`. Returns what to tell."""
    honest = Honest(daemon)
    vandal = Vandal(daemon, seed)
    vandal.run(mutations)

    def rings(event: str) -> int:
        return daemon.log_text().count(f'"event": "{event}"')

    wait_until(lambda: rings("ring_closed") == rings("ring_opened") - 1, "all its rings are given up")
    honest.end()
    # Whoever comes now finds all in order.
    last = Appender(daemon, daemon.route_dir / "last")
    assert last.append("all is well") == 0
    last.close()
    assert daemon.stop() == 0, daemon.log_text()[-3000:]
    assert vandal.sessions > 0 and vandal.records > 0
    return (
        f"{vandal.mutations} mutations, {vandal.records} records, {vandal.sessions} sessions; beside them "
        f"{len(honest.writer.acknowledged)} honest appends, the slowest took {honest.slowest_s * 1000:.0f} ms"
    )


def main() -> None:
    seed = int(os.environ.get("SEED") or random.SystemRandom().randrange(1 << 32))
    mutations = int(os.environ.get("MUTATIONS") or 10_000_000)
    print(f"SEED={seed}", flush=True)
    directory: Path = scratch_directory("elgate-fuzz-ring-")
    sections = {"wal": {"segment_size": "8MiB"}, "ring": {"isolation": "per_client"}}
    with ChildDaemon(directory, sections=sections) as daemon:
        daemon.start()
        print(fuzz(daemon, seed, mutations))
    shutil.rmtree(directory)  # kept where it failed: the daemon's log is in it


if __name__ == "__main__":
    sys.exit(main())
