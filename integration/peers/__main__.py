"""Elgate beside its peers, on the same disk in the same run: rounds in turn, medians, least and most.

    python -m peers [--json] [--docs] [--rounds N] [--only NAME …]

Exits with 1 when a system could not be measured (the others are, and the message says why); a goal that is missed is
shown as such and is no error.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from elgate.daemon.bench.figures import machine
from elgate.daemon.places import scratch_directory

from .measured import measure
from .report import rows_of, tables, version_of, write_docs
from .systems import BASELINES, ELGATE, PEERS

ROUNDS = 5


def say(text: str) -> None:
    print(f"bench-peers: {text}", file=sys.stderr, flush=True)


def main() -> int:
    systems = [*BASELINES, ELGATE, *PEERS]
    parser = argparse.ArgumentParser(prog="python -m peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    parser.add_argument(
        "--docs",
        action="store_true",
        help="write the tables and the plot of docs/benchmarks.md anew, if nothing failed",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", nargs="+", choices=[system.name for system in systems], help="for a quick look")
    arguments = parser.parse_args()
    chosen = [system for system in systems if arguments.only is None or system.name in arguments.only]

    directory = scratch_directory("elgate-peers-")
    sockets = Path(tempfile.mkdtemp(prefix="elgate-peers-", dir="/tmp"))
    try:
        for private in (directory, sockets):
            private.chmod(0o711)  # a server that runs as another user finds its own directory below
        facts = machine(directory)
        measured, failures = measure(chosen, arguments.rounds, directory, sockets, say)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.rmtree(sockets, ignore_errors=True)

    rows = rows_of(measured)
    print(tables(facts, measured))
    for name, why in failures.items():
        print(f"NOT MEASURED: {name}: {why}")
    if arguments.docs and not failures:
        write_docs(facts, measured)
    if arguments.json:
        document = {
            "machine": facts,
            "rows": [row.as_document() for row in rows],
            "versions": {system.name: version_of(system) for system in chosen if system.package},
            "failures": failures,
        }
        print(json.dumps(document))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
