"""`python -m elgate.daemon` is `elgate daemon`."""

import sys

from elgate.daemon.cli import main

if __name__ == "__main__":
    sys.exit(main(["daemon", *sys.argv[1:]]))
