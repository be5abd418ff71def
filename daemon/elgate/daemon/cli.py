"""The `elgate` command's entry. Kept apart from the commands, so that it runs where their libraries are missing and
can say so: the SDK alone pulls in none of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

EXTRA_MISSING = """\
elgate: the command line and the daemon need '{module}', which is not installed.
What applications need is installed without it. For the rest, in a clone of Elgate's repository:
    {python} -m pip install '.[daemon]'"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    try:
        import click  # noqa: F401
        import psutil  # noqa: F401
        import rich  # noqa: F401
        import yaml  # noqa: F401
    except ModuleNotFoundError as error:
        print(EXTRA_MISSING.format(module=error.name, python=sys.executable), file=sys.stderr)
        return 1
    from elgate.daemon.commands import elgate

    # Click's own handling of usage errors, of a closed pipe and of Ctrl-C ends in SystemExit.
    return elgate.main(args=None if arguments is None else list(arguments), prog_name="elgate") or 0
