"""The table of a benchmark, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from elgate.daemon.bench.figures import Row


def show(machine: Mapping[str, Any], rows: Sequence[Row]) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file has no width of its own
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    # Whole names, however narrow the terminal is.
    table.add_column("metric", overflow="fold")
    for heading in ("value", "baseline", "ratio"):
        table.add_column(heading, justify="right")
    table.add_column("goal")
    table.add_column("met")
    for row in rows:
        table.add_row(
            row.metric,
            f"{_readable(row.value)} {row.unit}",
            "" if row.baseline is None else _readable(row.baseline),
            "" if row.ratio is None else f"{row.ratio:.2f}",
            row.goal,
            {True: "[green]yes", False: "[red]no", None: ""}[row.met],
        )
    console.print(table)
    for baseline in sorted({row.baseline_is for row in rows if row.baseline_is}):
        console.print(f"baseline: {baseline}", highlight=False)


def _readable(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
