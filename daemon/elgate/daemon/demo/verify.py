"""Reads the shops' journals back, natively, and holds them against what was acknowledged."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from elgate.daemon.demo.orders import RECORD_BYTES

PROBLEMS_SHOWN_MAX = 10


class Writer(NamedTuple):
    """One thread of one life of one shop. Its orders are numbered from 1, and it acknowledges them in order."""

    shop: int
    run: int
    thread: int


@dataclass
class Verdict:
    acknowledged: int = 0
    # Acknowledged, and in the journal.
    found: int = 0
    # Acknowledged, and not there.
    lost: int = 0
    # Lines that are torn, mixed up, or whose checksum does not fit.
    damaged: int = 0
    doubled: int = 0
    # Behind a later order of the same writer.
    misordered: int = 0
    # There without an acknowledgement: the one order that each killed writer had in hand. Nothing wrong with that.
    unacknowledged: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.lost == self.damaged == self.doubled == self.misordered == 0

    def add(self, other: Verdict) -> None:
        for name in ("acknowledged", "found", "lost", "damaged", "doubled", "misordered", "unacknowledged"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.problems += other.problems

    def _problem(self, text: str) -> None:
        if len(self.problems) < PROBLEMS_SHOWN_MAX:
            self.problems.append(text)


def parse_order(line: bytes) -> tuple[Writer, int] | None:
    """Writer and number of one line (with its newline), or None where it is not a whole, undamaged order."""
    if len(line) != RECORD_BYTES or line[-1:] != b"\n":
        return None
    body, _, checksum = line[:-1].rpartition(b" ")
    try:
        if int(checksum, 16) != zlib.crc32(body):
            return None
        word, shop, run, thread, sequence = body.split()[:5]
        return (Writer(int(shop), int(run), int(thread)), int(sequence)) if word == b"order" else None
    except ValueError:
        return None


def verify(directory: Path, acknowledged: Mapping[Writer, int]) -> Verdict:
    """`acknowledged`: how far each writer got; order n acknowledged means that 1 to n must be there, once."""
    verdict = Verdict(acknowledged=sum(acknowledged.values()))
    seen: dict[Writer, set[int]] = defaultdict(set)
    highest: dict[Writer, int] = defaultdict(int)
    for path in sorted(directory.glob("orders-*.log")):
        with open(path, "rb") as journal:
            for number, line in enumerate(journal, start=1):
                order = parse_order(line)
                if order is None:
                    verdict.damaged += 1
                    verdict._problem(f"{path}:{number}: damaged: {line[:RECORD_BYTES]!r}")
                    continue
                writer, sequence = order
                if sequence in seen[writer]:
                    verdict.doubled += 1
                    verdict._problem(f"{path}:{number}: order {sequence} of {writer} stands here a second time")
                elif sequence < highest[writer]:
                    verdict.misordered += 1
                    verdict._problem(f"{path}:{number}: order {sequence} of {writer} behind {highest[writer]}")
                seen[writer].add(sequence)
                highest[writer] = max(highest[writer], sequence)
    for writer, count in acknowledged.items():
        missing = [sequence for sequence in range(1, count + 1) if sequence not in seen[writer]]
        verdict.lost += len(missing)
        verdict.found += count - len(missing)
        if missing:
            verdict._problem(f"{writer}: {len(missing)} of {count} orders lost, the first one {missing[0]}")
    for writer, sequences in seen.items():
        acknowledged_count = acknowledged.get(writer, 0)
        verdict.unacknowledged += sum(1 for sequence in sequences if sequence > acknowledged_count)
    return verdict
