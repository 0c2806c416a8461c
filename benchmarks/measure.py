"""What the benchmarks share: CPU seconds and page faults of this process and its children, interleaved rounds, tables."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> float:
    """User and system time of this process and everything that it started, ended or not. On a shared machine the only time that says
    something."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(map(_spent, _descendants(os.getpid())))


def page_faults() -> int:
    """Minor ones (no disk) of this process and everything that it started, ended or not."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    alive = (sum(map(int, _stat(child)[7:9])) for child in _descendants(os.getpid()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt + ended.ru_minflt + sum(alive)


def _descendants(process: int) -> list[int]:
    found = []
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            for child in map(int, file.read_text().split()):
                found += [child, *_descendants(child)]
        except OSError:
            continue  # it ended while we looked
    return found


def _spent(process: int) -> float:
    """Its own time and that of the children that it waited for."""
    return sum(map(int, _stat(process)[11:15])) / TICKS


def _stat(process: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on, each with those of the children that it waited for; none when it has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def interleaved(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of every work; each round does all of them in turn, and one round before warms up."""
    spent: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            before = cpu_seconds()
            work()
            if number:
                spent[name].append(cpu_seconds() - before)
    return {name: statistics.median(values) for name, values in spent.items()}


def table(head: list[str], rows: list[list[object]]) -> str:
    """A Markdown table; numbers with three digits."""
    def shown(value: object) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(shown, line))} |" for line in lines)
