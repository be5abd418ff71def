"""An ordinary program that takes orders and must not lose one.

Nothing in it knows how its files become durable: it opens, writes, flushes and calls os.fsync, as any careful program
does. Each of its threads keeps a journal of its own. Only when fsync has returned is an order acknowledged: a line on
standard output.

    python orders.py DIRECTORY SHOP RUN THREADS

SHOP and RUN are numbers that go into every order: RUN is another one after each restart, so that the orders of two
lives of one shop can be told apart. Every line on standard input is a number of seconds to take orders for; the
program answers with "ready" once at its start, with "A thread sequence nanoseconds" for each acknowledged order, and
with "done" after each line. It ends at the end of its input.
"""

import os
import sys
import threading
import time
import zlib

RECORD_BYTES = 128


def order_line(shop: int, run: int, thread: int, sequence: int) -> str:
    """One order: 127 characters and a newline, the last field a checksum of all that stands before it."""
    amount_cents = (sequence * 7919 + thread * 104729) % 1_000_000
    body = f"order {shop:03} {run:05} {thread:03} {sequence:010} EUR {amount_cents / 100:>10.2f} "
    body = body.ljust(RECORD_BYTES - 10, ".")
    return f"{body} {zlib.crc32(body.encode()):08x}\n"


class Till:
    """What one thread of the shop works at, with its own journal."""

    def __init__(self, directory: str, shop: int, run: int, number: int) -> None:
        self.shop, self.run_number, self.number = shop, run, number
        self.journal = open(os.path.join(directory, f"orders-{shop:03}-{number:03}.log"), "a")  # noqa: SIM115
        self.sequence = 0

    def take_orders(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            self.sequence += 1
            line = order_line(self.shop, self.run_number, self.number, self.sequence)
            start_ns = time.perf_counter_ns()
            self.journal.write(line)
            self.journal.flush()
            os.fsync(self.journal.fileno())
            took_ns = time.perf_counter_ns() - start_ns
            os.write(sys.stdout.fileno(), b"A %d %d %d\n" % (self.number, self.sequence, took_ns))


def main() -> int:
    directory, shop, run, thread_count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    tills = [Till(directory, shop, run, number) for number in range(thread_count)]
    failures = []

    def work(till: Till, until_s: float) -> None:
        try:
            till.take_orders(until_s)
        except OSError as error:
            failures.append(error)

    os.write(sys.stdout.fileno(), b"ready\n")
    for line in sys.stdin:
        until_s = time.monotonic() + float(line)
        threads = [threading.Thread(target=work, args=(till, until_s)) for till in tills]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            print(f"orders: shop {shop} cannot keep its journal: {failures[0]}", file=sys.stderr)
            return 1
        os.write(sys.stdout.fileno(), b"done\n")
    for till in tills:
        till.journal.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
