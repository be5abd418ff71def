"""The `elgate` command's entry. Kept apart from the commands, so that it runs where their libraries are missing and
can say so: the SDK alone pulls in none of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

EXTRA_MISSING = """\
elgate: the command line and the daemon need '{module}', which is not installed.
What applications need is installed without it. For the rest, in a clone of Elgate's repository:
    {python} -m pip install '.[daemon]'"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    for module in ("click", "psutil", "rich", "yaml"):
        if find_spec(module) is None:
            print(EXTRA_MISSING.format(module=module, python=sys.executable), file=sys.stderr)
            return 1
    from elgate.daemon.commands import elgate

    # Click's own handling of usage errors, of a closed pipe and of Ctrl-C ends in SystemExit.
    return elgate.main(args=None if arguments is None else list(arguments), prog_name="elgate") or 0
