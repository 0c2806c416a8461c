"""The table of a sweep: a line per run, live with `watch`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from launchers.actions import finished, retry
from launchers.plan import SweepPlan, read_plan
from launchers.status import RunStatus, counts, statuses

WIDTH = 140  # columns of a table that no terminal reads
NEWS = ("running", "failed", "lost", "stopped", "collapsed", "queued", "planned", "cancelled", "done")  # what a short screen shows first
QUIET = 600  # seconds without a sign of life after which a running run says so


def heading(plan: SweepPlan, found: list[RunStatus], remark: str) -> str:
    return f"{plan.root}: {counts(found)}" + (f"\nSLURM did not answer, this is what the files say: {remark}" if remark else "")


def table(found: list[RunStatus]) -> Table:
    made = Table(box=None, pad_edge=False, header_style="")
    for column, justify in (("run", "left"), ("state", "left"), ("step", "right"), ("hack", "right"), ("left", "right"), ("turns", "right"),
                            ("job", "left"), ("why", "left")):
        made.add_column(column, justify=justify, overflow="fold" if column == "why" else "ellipsis", no_wrap=column != "why")
    for one in found:
        made.add_row(*cells(one))
    return made


def cells(one: RunStatus) -> tuple[str, ...]:
    why = ": ".join(part for part in (one.cause.replace("_", " "), one.detail) if part)
    if one.silent is not None and one.silent > QUIET:
        why = f"no sign of life for {span(one.silent)}"
    return (one.entry.folder, one.state, f"{one.step}/{one.entry.steps}", "–" if one.hack is None else f"{one.hack:.2f}",
            span(one.left) if one.left is not None else "", str(one.turns or ""), one.job, why[:200])


def span(seconds: float) -> str:
    """A time to read: 40 s, 12 min, 3.5 h."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show(plan: SweepPlan, found: list[RunStatus], remark: str) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH, color_system=None)
    console.print(heading(plan, found, remark), highlight=False, markup=False, soft_wrap=True)
    console.print(table(found), highlight=False, markup=False)


def watch(plan: SweepPlan, again: bool, say: Callable[[str], None]) -> list[RunStatus]:
    """Show the sweep until nothing is queued or running; with `again`, start what failed within launcher.retries. A terminal gets a
    live table, a pipe a line whenever the counts change. It looks every launcher.poll_seconds and no faster."""
    root, before = plan.root, ""
    console = Console()
    with Live(console=console, auto_refresh=False, transient=True) if sys.stdout.isatty() else _NoLive() as live:
        while True:
            plan = read_plan(root)
            found, remark = statuses(plan)
            live.update(screen(plan, found, remark, console.height), refresh=True)
            if not sys.stdout.isatty() and (line := f"{root}: {remark or counts(found)}") != before:
                say(line)
                before = line
            if finished(found) and not remark and not (again and retry(plan, [], {}, False, lambda line: None)):
                return found
            time.sleep(plan.settings.poll_seconds)


def screen(plan: SweepPlan, found: list[RunStatus], remark: str, lines: int) -> Group:
    """The live table of a terminal of so many lines. Where it is too short, runs under way and runs that went wrong come first."""
    top = heading(plan, found, remark)
    room = max(1, lines - top.count("\n") - 4)  # heading, columns, the line below, the cursor's
    if len(found) <= room:
        return Group(top, table(found))
    shown = sorted(found, key=lambda one: NEWS.index(one.state))[:room]
    return Group(top, table(shown), f"and {len(found) - room} more; python -m launchers status lists them all")


class _NoLive:
    """Stands in for rich's Live where no terminal looks."""

    def __enter__(self) -> _NoLive:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, *_: object, **__: object) -> None:
        pass
