"""What was measured as rows, as the tables of docs/benchmarks.md, and as its plot."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from elgate.daemon.bench.figures import Row

from .measured import CLIENT_COUNTS, ROUND_S, Measured, Round, System, median
from .systems import BASELINES, ELGATE, PEERS

DOCS = Path(__file__).parent.parent.parent / "docs"
PLOT = DOCS / "peers.svg"
PAGE = DOCS / "benchmarks.md"
BEGIN, END = "<!-- bench-peers: begin -->", "<!-- bench-peers: end -->"
# By how much Elgate is to be ahead of the best peer, by clients.
GOALS = {1: 1.0, 8: 1.3, 32: 2.0}
RATE = "operations_per_s"


@dataclass
class SpreadRow(Row):
    """A row with the least and the most of its rounds."""

    least: float | None = None
    most: float | None = None


def _clients(count: int) -> str:
    return f"{count} client{'s' if count > 1 else ''}"


def _cell_name(system: System, clients: int) -> str:
    return f"{system.name}_{_clients(clients).replace(' ', '_')}"


def _best(measured: Measured, peers: Sequence[System], clients: int) -> System | None:
    """The one with the highest median."""
    there = [peer for peer in peers if (peer, clients) in measured]
    return max(there, key=lambda peer: median(measured[peer, clients], RATE), default=None)


def _beside(measured: Measured, clients: int, peers: Sequence[System], what: str, factor: float | None) -> list[Row]:
    best = _best(measured, peers, clients)
    if best is None or (ELGATE, clients) not in measured:
        return []
    ours, theirs = median(measured[ELGATE, clients], RATE), median(measured[best, clients], RATE)
    return [
        Row(
            f"{_cell_name(ELGATE, clients)}_beside_best_{what}", ours, "op/s", theirs, best.title, ours / theirs,
            f"at least {factor:g} × the best peer" if factor else "", ours >= factor * theirs if factor else None,
        )
    ]  # fmt: skip


def rows_of(measured: Measured) -> list[Row]:
    rows: list[Row] = []
    for (system, clients), rounds in measured.items():
        name = _cell_name(system, clients)
        rates = [one.operations_per_s for one in rounds]
        row = SpreadRow(name, median(rounds, RATE), "op/s", least=min(rates), most=max(rates))
        if system != ELGATE and (ELGATE, clients) in measured:
            row.baseline = median(measured[ELGATE, clients], RATE)
            row.baseline_is = "Elgate with as many clients"
            row.ratio = row.value / row.baseline
        rows.append(row)
        for figure in ("p50", "p95", "p99"):
            latencies = [getattr(one, f"{figure}_us") for one in rounds]
            value = median(rounds, f"{figure}_us")
            rows.append(SpreadRow(f"{name}_{figure}", value, "µs", least=min(latencies), most=max(latencies)))
    across = [peer for peer in PEERS if peer.across_processes]
    for clients, factor in GOALS.items():
        rows += _beside(measured, clients, PEERS, "peer", factor)
        rows += _beside(measured, clients, across, "peer_across_processes", None)
    return rows


@cache
def version_of(system: System) -> str:
    """Of its Debian package, without Debian's own part."""
    if system.package is None:
        return ""
    query = ["dpkg-query", "--show", "--showformat", "${Version}\n", system.package]
    versions = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return versions[-1].split(":")[-1].split("-")[0].split("+")[0] if versions else ""


def _titled(system: System) -> str:
    product, comma, rest = system.title.partition(",")
    return f"{product} {version_of(system)}".strip() + comma + rest


def _table(measured: Measured, cell: Callable[[list[Round]], str]) -> list[str]:
    lines = [f"| | {' | '.join(map(_clients, CLIENT_COUNTS))} |", f"|---|{'---:|' * len(CLIENT_COUNTS)}"]
    for system in (ELGATE, *PEERS, *BASELINES):
        cells = [measured.get((system, clients)) for clients in CLIENT_COUNTS]
        if any(cells):
            lines.append(f"| {_titled(system)} | {' | '.join(cell(rounds) if rounds else '' for rounds in cells)} |")
    return lines


def _rates(rounds: list[Round]) -> str:
    rates = [one.operations_per_s for one in rounds]
    return f"{median(rounds, RATE):,.0f} ({min(rates):,.0f}–{max(rates):,.0f})"


def _latencies(rounds: list[Round]) -> str:
    return " / ".join(f"{median(rounds, figure):,.0f}" for figure in ("p50_us", "p95_us", "p99_us"))


def tables(facts: Mapping[str, Any], measured: Measured) -> str:
    """For people, and for Markdown."""
    rows = {row.metric: row for row in rows_of(measured)}
    rounds = max((len(results) for results in measured.values()), default=0)
    lines = [
        ", ".join(f"{name} {value}" for name, value in facts.items()),
        "",
        f"Durable records per second: median of {rounds} round{'s' if rounds > 1 else ''} of {ROUND_S} s (least–most).",
        "",
        *_table(measured, _rates),
        "",
        "Latency of one record in µs: p50 / p95 / p99, medians of the rounds.",
        "",
        *_table(measured, _latencies),
        "",
        "| clients | best peer | Elgate is at | goal | met | best peer for clients in processes of their own | Elgate is at |",
        "|---:|---|---:|---:|---|---|---:|",
    ]
    for clients, factor in GOALS.items():
        best = rows.get(f"{_cell_name(ELGATE, clients)}_beside_best_peer")
        across = rows.get(f"{_cell_name(ELGATE, clients)}_beside_best_peer_across_processes")
        if best is not None:
            line = f"| {clients} | {best.baseline_is} | {best.ratio:.2f} × | ≥ {factor:g} × | {'yes' if best.met else 'no'} |"
            lines.append(f"{line} {across.baseline_is} | {across.ratio:.2f} × |" if across else f"{line} | |")
    return "\n".join(lines)


def plot(measured: Measured, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    # Text stays text, and the same figures give the same bytes.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "elgate", "font.family": "sans-serif"})
    from matplotlib import pyplot

    # From the top down; the raw loop has one client only and stands in the table.
    systems = [ELGATE, *PEERS, BASELINES[0]][::-1]
    figure, panels = pyplot.subplots(1, len(CLIENT_COUNTS), figsize=(11, 3.2), sharey=True, layout="constrained")
    for panel, clients in zip(panels, CLIENT_COUNTS, strict=True):
        for place, system in enumerate(systems):
            rounds = measured.get((system, clients))
            if rounds is None:
                continue
            rates = [one.operations_per_s / 1000 for one in rounds]
            middle = median(rounds, RATE) / 1000
            colour = "#1f6feb" if system == ELGATE else "#d0d7de" if system in BASELINES else "#8c959f"
            panel.barh(place, middle, color=colour, height=0.7)
            panel.plot([min(rates), max(rates)], [place, place], color="#24292f", linewidth=1)
            panel.text(max(rates), place, f" {middle:,.1f}", va="center", ha="left", fontsize=9)
        panel.set_title(_clients(clients), fontsize=10)
        panel.margins(x=0.2)
        panel.set_xlim(left=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_yticks(range(len(systems)), [_titled(system) for system in systems])
        panel.tick_params(axis="y", length=0)
    figure.supxlabel("thousands of durable 128-byte records per second (bar: median, line: least to most)", fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write_docs(facts: Mapping[str, Any], measured: Measured) -> None:
    """The plot, and what stands between the markers in docs/benchmarks.md."""
    page = PAGE.read_text()
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE} has no {BEGIN} … {END}, where the tables belong")
    plot(measured, PLOT)
    picture = f"![Durable records per second, by system and number of clients]({PLOT.name})"
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables(facts, measured)}\n\n{picture}\n\n{END}{after}")
