"""Runs the demo: orders.py natively and through Elgate side by side, then under SIGKILL, and reads it all back."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from elgate.daemon.child import ChildDaemon, DaemonFailed
from elgate.daemon.demo import orders
from elgate.daemon.demo.verify import Verdict, Writer, verify
from elgate.daemon.places import filesystem_of, scratch_directory

SHOPS = 4
THREADS = 4
ROUNDS = 5
ROUND_S = 1.5
WARM_UP_S = 0.3
# The crash phase: who is killed in turn, each after so many seconds of undisturbed work, and so many more at its end.
VICTIMS = ("shop", "daemon", "daemon")
UNDISTURBED_S = 1.5
# In the crash phase shops get their work in slices, two ahead: it lasts until all has happened, however long that is.
SLICE_S = 0.5
SLICES_AHEAD = 2
# Orders that each shop must take after a kill before it counts as going on.
GOING_ON_ORDERS = 50

# Acknowledgements are fetched this often, not one by one: the driver must not take the processor from the shops.
PUMP_S = 0.05
# More than a shop writes in PUMP_S.
PIPE_BYTES = 1 << 20
# How long a shop may take beyond its time. Longer than a client waits for a daemon that is gone.
GRACE_S = 40.0


class DemoFailed(Exception):
    """The demo could not be carried through; nothing is said about lost orders."""


class Shop:
    """One process of orders.py, and what it has acknowledged. What it said before a SIGKILL stays in the pipe."""

    def __init__(self, number: int, run: int, directory: Path, environment: Mapping[str, str] | None) -> None:
        """`environment`: of a run through Elgate, or None for a native run."""
        self.number, self.run = number, run
        program = [orders.__file__, str(directory), str(number), str(run), str(THREADS)]
        through = ["-m", "elgate.run"] if environment is not None else []
        self.process = subprocess.Popen(
            [sys.executable, *through, *program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment) if environment is not None else {**os.environ, "ELGATE_DISABLE": "1"},
            # Ctrl-C is for the driver, which then ends its shops.
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._input, self._output = self.process.stdin, self.process.stdout
        os.set_blocking(self._output.fileno(), False)
        fcntl.fcntl(self._output.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._said = bytearray()
        self._parsed_bytes = 0
        self._answers = 0
        self._answers_expected = 1  # "ready"
        # Lines that it has said: nearly all of them acknowledgements.
        self.lines = 0
        self.acknowledged: dict[Writer, int] = {}

    def take_orders(self, seconds: float) -> None:
        self._input.write(b"%f\n" % seconds)
        self._input.flush()
        self._answers_expected += 1

    def keep_busy(self) -> None:
        while self._answers_expected - self._answers < SLICES_AHEAD:
            self.take_orders(SLICE_S)

    def pump(self) -> None:
        """Fetches what the shop has said so far."""
        before = len(self._said)
        while True:
            try:
                said = os.read(self._output.fileno(), PIPE_BYTES)
            except BlockingIOError:
                break
            if not said:
                break
            self._said += said
        self._answers += self._said.count(b"done\n", before) + self._said.count(b"ready\n", before)
        self.lines += self._said.count(b"\n", before)

    @property
    def answered(self) -> bool:
        return self._answers >= self._answers_expected

    def new_latencies_ns(self) -> list[int]:
        """Takes in the acknowledgements since the last call, and gives their latencies."""
        latencies = []
        said = self._said[self._parsed_bytes :]
        for line in said.splitlines():
            if line.startswith(b"A "):
                _, thread, sequence, took_ns = line.split()
                writer = Writer(self.number, self.run, int(thread))
                if int(sequence) != self.acknowledged.get(writer, 0) + 1:
                    raise DemoFailed(f"{writer} acknowledged {sequence.decode()} out of turn")
                self.acknowledged[writer] = int(sequence)
                latencies.append(int(took_ns))
        self._parsed_bytes += len(said)
        return latencies

    def kill(self) -> None:
        """SIGKILL; what it had acknowledged is fetched from the pipe."""
        self.process.kill()
        self.process.wait()
        self.pump()

    def finish(self) -> None:
        """Ends it in good order and waits for that."""
        self._input.close()
        try:
            code = self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"shop {self.number} does not end after {GRACE_S:g} s") from None
        self.pump()
        if code != 0:
            raise DemoFailed(f"shop {self.number} ended with exit code {code}; see what it said above")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._input.close()
        self._output.close()


def wait_for_answers(shops: Sequence[Shop], limit_s: float) -> None:
    """Pumps until each shop has answered. Raises DemoFailed when one ends before, or the limit passes."""
    deadline = time.monotonic() + limit_s
    while True:
        ended = [shop for shop in shops if shop.process.poll() is not None]
        for shop in shops:
            shop.pump()
        if all(shop.answered for shop in shops):
            return
        for shop in ended:
            if not shop.answered:
                raise DemoFailed(f"shop {shop.number} ended with exit code {shop.process.returncode}; see above")
        if time.monotonic() > deadline:
            silent = [shop.number for shop in shops if not shop.answered]
            raise DemoFailed(f"shops {silent} have not answered after {limit_s:g} s")
        time.sleep(PUMP_S)


@dataclass
class Measurement:
    """Rounds of one kind: native, or through Elgate."""

    operations_per_s: list[float] = field(default_factory=list)
    latencies_ns: list[int] = field(default_factory=list)

    def run_round(self, shops: Sequence[Shop]) -> float:
        for shop in shops:
            shop.take_orders(ROUND_S)
        wait_for_answers(shops, ROUND_S + GRACE_S)
        latencies = [latency for shop in shops for latency in shop.new_latencies_ns()]
        self.latencies_ns += latencies
        self.operations_per_s.append(len(latencies) / ROUND_S)
        return self.operations_per_s[-1]

    def as_document(self) -> dict[str, float]:
        ordered = sorted(self.latencies_ns)
        return {
            "operations_per_s": round(statistics.median(self.operations_per_s)),
            **{f"p{percent}_us": round(_percentile(ordered, percent) / 1000, 1) for percent in (50, 95, 99)},
        }


def _percentile(ordered: Sequence[int], percent: int) -> int:
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]


class Demo:
    """One run, in a directory of its own."""

    def __init__(self, directory: Path, console: Console) -> None:
        self.directory = directory
        self.console = console
        self.native, self.through = Measurement(), Measurement()
        self.verdict = Verdict()
        self.kills = {"shop": 0, "daemon": 0}
        self._shops: list[Shop] = []
        self._daemon = ChildDaemon(directory / "elgate")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def run(self) -> None:
        self._measure()
        self._crash()

    def close(self) -> None:
        for shop in self._shops:
            shop.close()
        self._daemon.close()

    def _open_shops(self, directory: Path, environment: Mapping[str, str] | None) -> list[Shop]:
        directory.mkdir(exist_ok=True)
        shops = [Shop(number, 1, directory, environment) for number in range(SHOPS)]
        self._shops += shops
        return shops

    def _measure(self) -> None:
        """Native and Elgate in turn, so that whatever else the machine does falls on both."""
        self.say(
            f"\n[bold]1. Side by side[/bold]: {SHOPS} processes of {THREADS} threads, an fsync per order, "
            f"{ROUNDS} rounds of {ROUND_S:g} s each"
        )
        self._daemon.start()
        native_directory = self.directory / "native"
        routed_directory = self._daemon.route_dir / "measured"
        native_shops = self._open_shops(native_directory, None)
        routed_shops = self._open_shops(routed_directory, self._daemon.env())
        wait_for_answers(self._shops, GRACE_S)
        for shops in (native_shops, routed_shops):
            for shop in shops:
                shop.take_orders(WARM_UP_S)
            wait_for_answers(shops, WARM_UP_S + GRACE_S)
            for shop in shops:
                shop.new_latencies_ns()
        for number in range(1, ROUNDS + 1):
            native = self.native.run_round(native_shops)
            through = self.through.run_round(routed_shops)
            self.say(
                f"   round {number}   native {native:>8,.0f} op/s    elgate {through:>8,.0f} op/s    "
                f"{through / native:.2f} ×"
            )
        for shop in native_shops + routed_shops:
            shop.finish()
        self._stop_daemon(at_least_records=sum(sum(shop.acknowledged.values()) for shop in routed_shops))
        self._verify(native_directory, native_shops)
        self._verify(routed_directory, routed_shops)

    def _crash(self) -> None:
        self.say("\n[bold]2. Under SIGKILL[/bold]: the same load, while a shop and, twice, the daemon are killed")
        self._daemon.start()
        directory = self._daemon.route_dir / "killed"
        alive = self._open_shops(directory, self._daemon.env())
        gone: list[Shop] = []
        wait_for_answers(alive, GRACE_S)
        begin_s = time.monotonic()
        for victim in VICTIMS:
            self._work_until(alive, time.monotonic() + UNDISTURBED_S)
            if victim == "shop":
                gone.append(self._kill_a_shop(alive, directory, begin_s))
            else:
                self._kill_the_daemon(begin_s)
            self._wait_until_all_go_on(alive, victim)
        self._work_until(alive, time.monotonic() + UNDISTURBED_S)
        wait_for_answers(alive, SLICES_AHEAD * SLICE_S + GRACE_S)
        for shop in alive:
            shop.finish()
        self._stop_daemon(at_least_records=SHOPS * GOING_ON_ORDERS)
        self._verify(directory, alive + gone)

    def _kill_a_shop(self, alive: list[Shop], directory: Path, begin_s: float) -> Shop:
        """Kills one, puts its successor in its place, and returns it."""
        victim = alive[0]
        victim.kill()
        killed_s = time.monotonic() - begin_s
        self.kills["shop"] += 1
        successor = Shop(victim.number, victim.run + 1, directory, self._daemon.env())
        self._shops.append(successor)
        alive[0] = successor
        self.say(
            f"   {killed_s:4.1f} s   shop {victim.number} killed (pid {victim.process.pid}), "
            f"opened again (pid {successor.process.pid})"
        )
        return victim

    def _kill_the_daemon(self, begin_s: float) -> None:
        old_pid = self._daemon.pid
        self._daemon.kill()
        killed_s = time.monotonic()
        self.kills["daemon"] += 1
        self._daemon.start()
        self.say(
            f"   {killed_s - begin_s:4.1f} s   daemon killed (pid {old_pid}), back after "
            f"{time.monotonic() - killed_s:.1f} s (pid {self._daemon.pid})"
        )

    def _wait_until_all_go_on(self, shops: Sequence[Shop], killed: str) -> None:
        """New orders acknowledged by every shop, or the rest of this phase would show nothing."""
        began_s = time.monotonic()
        for shop in shops:
            shop.pump()
        goals = {shop: shop.lines + GOING_ON_ORDERS for shop in shops}
        while any(shop.lines < goal for shop, goal in goals.items()):
            if time.monotonic() > began_s + GRACE_S:
                stuck = [shop.number for shop, goal in goals.items() if shop.lines < goal]
                raise DemoFailed(f"shops {stuck} did not go on within {GRACE_S:g} s after the {killed} was killed")
            self._work_until(shops, time.monotonic() + PUMP_S)
        self.say(f"            all shops go on after {time.monotonic() - began_s:.1f} s")

    def _work_until(self, shops: Sequence[Shop], until_s: float) -> None:
        while True:
            for shop in shops:
                if shop.process.poll() is not None:
                    raise DemoFailed(f"shop {shop.number} ended with exit code {shop.process.returncode}; see above")
                shop.pump()
                shop.keep_busy()
            if time.monotonic() >= until_s:
                return
            time.sleep(PUMP_S)

    def _stop_daemon(self, at_least_records: int) -> None:
        """Stops it and makes sure that the orders really went through it: else all of this would show nothing."""
        code = self._daemon.stop()
        if code != 0:
            raise DemoFailed(f"the daemon ended with exit code {code}; its log: {self._daemon.log_path}")
        records = self._daemon.events("stopped")[-1]["counters"].get("records_total", 0)
        if records < at_least_records:
            raise DemoFailed(
                f"the daemon saw {records} records, the shops wrote {at_least_records}: "
                f"they did not go through Elgate; its log: {self._daemon.log_path}"
            )

    def _verify(self, directory: Path, shops: Sequence[Shop]) -> None:
        acknowledged: dict[Writer, int] = {}
        for shop in shops:
            shop.new_latencies_ns()
            acknowledged.update(shop.acknowledged)
        self.verdict.add(verify(directory, acknowledged))


def _machine() -> str:
    memory_gib = psutil.virtual_memory().total / (1 << 30)
    return f"{psutil.cpu_count()} CPUs, {memory_gib:.0f} GiB, Linux {platform.release()}, {platform.machine()}"


def _show_results(console: Console, demo: Demo, native: Mapping[str, float], through: Mapping[str, float]) -> None:
    speed = Table(box=box.SIMPLE_HEAD, title="An order acknowledged after its fsync", title_justify="left")
    speed.add_column("")
    for heading in ("op/s", "p50 µs", "p95 µs", "p99 µs"):
        speed.add_column(heading, justify="right")
    for name, values in (("native", native), ("elgate", through)):
        speed.add_row(name, *(f"{value:,.0f}" for value in values.values()))
    console.print(speed)
    verdict = demo.verdict
    records = Table(box=box.SIMPLE_HEAD, title="Orders read back from the journals", title_justify="left")
    for heading in ("acknowledged", "found", "lost", "damaged", "doubled", "out of order"):
        records.add_column(heading, justify="right")
    counts = (verdict.acknowledged, verdict.found, verdict.lost, verdict.damaged, verdict.doubled, verdict.misordered)
    records.add_row(*(f"{count:,}" for count in counts))
    console.print(records)
    for problem in verdict.problems:
        console.print(f"   {problem}", markup=False, highlight=False)


def run_demo(directory: Path | None, *, keep: bool, as_json: bool) -> int:
    """Runs the demo and shows what came of it. Returns the exit code: 1 if any acknowledged order was lost or
    damaged, or the demo could not be carried through."""
    console = Console(soft_wrap=True)
    began_s = time.monotonic()
    if directory is None:
        directory = scratch_directory("elgate-demo-")
    else:
        try:
            directory.mkdir(parents=True)
        except OSError as error:
            console.print(f"elgate demo: cannot make {directory}: {error.strerror}", style="red", markup=False)
            return 1
    directory = directory.resolve()
    filesystem = filesystem_of(directory)
    console.print(f"elgate demo in {directory} ({filesystem}); {_machine()}", highlight=False)
    if filesystem.volatile:
        console.print(
            f"No disk to write to was found, only {filesystem.type}: it does not survive a power cut, and its fsync "
            f"costs nothing, so the figures below say little.",
            style="yellow",
        )
    demo = Demo(directory, console)
    failure: str | None = None
    try:
        demo.run()
    except (DemoFailed, DaemonFailed) as error:
        failure = str(error)
    finally:
        demo.close()
        ok = failure is None and demo.verdict.ok
        # KeyboardInterrupt comes through here too, and leaves nothing behind.
        interrupted = failure is None and sys.exc_info()[0] is not None
        if not keep and (ok or interrupted):
            shutil.rmtree(directory, ignore_errors=True)
    document: dict[str, Any] = {"ok": ok, "seconds": round(time.monotonic() - began_s, 1)}
    if failure is None:
        native, through = demo.native.as_document(), demo.through.as_document()
        ratio = round(through["operations_per_s"] / native["operations_per_s"], 2)
        console.print()
        _show_results(console, demo, native, through)
        kept = f"\nFiles and logs are in {directory}" if keep or not ok else ""
        summary = (
            f"[green]Nothing was lost; {ratio} × native." if ok else "[red]Acknowledged orders are lost or damaged."
        )
        console.print(
            f"{summary}[/] {demo.kills['shop']} shop and {demo.kills['daemon']} daemon kills, "
            f"{document['seconds']:.0f} s.{kept}",
            highlight=False,
        )
        verdict = vars(demo.verdict)
        document |= {"ratio": ratio, "native": native, "elgate": through, "kills": demo.kills, **verdict}
    else:
        console.print(f"elgate demo: {failure}\nFiles and logs are in {directory}", style="red", markup=False)
        document["failure"] = failure
    document |= {"filesystem": filesystem.type, "volatile": filesystem.volatile, "directory": str(directory)}
    if as_json:
        # Not through rich: one line, whatever the terminal's width.
        print(json.dumps(document), flush=True)
    return 0 if ok else 1
