"""report.html during a sweep: written again and again until nothing is left to wait for."""

from __future__ import annotations

import time
from pathlib import Path

from grpo_routing.analysis import analysed
from grpo_routing.html.failures import finished
from grpo_routing.html.material import read
from grpo_routing.html.page import write_page


def watch(experiment: Path, seconds: int, controls: bool = True) -> None:
    """Returns when every run is done, collapsed or failed, or when the user interrupts. The last page written here still reloads itself;
    the caller writes the final one. Raises ReportError as `read` does."""
    try:
        while True:
            material = read(experiment)
            file = write_page(material, analysed(experiment, material.runs, controls), refresh=seconds)
            counts = ", ".join(f"{count} {status}" for status, count in material.counts.items())
            print(f"{time.strftime('%H:%M:%S')} {file}: {counts}", flush=True)
            if finished(material):
                return
            time.sleep(seconds)
    except KeyboardInterrupt:
        print("interrupted; the final page follows", flush=True)
