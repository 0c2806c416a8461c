"""One planned run, from nothing but its folder: `python -m grpo_routing.worker outputs/<experiment>/runs/<run>`.

What it computes is in the folder's config.yaml, frozen when the sweep was planned; nothing is composed here. Exit codes:
0 done or collapsed, 143 stopped at a step boundary with a checkpoint, 75 another process runs it, 2 refused, else failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpo_routing.build import ConfigError
from grpo_routing.files import Held
from grpo_routing.folder import frozen
from grpo_routing.run import run

PATIENCE = 20.0  # seconds for a process of the same run that is about to end, say because its job was requeued
HELD = 75


def main(argv: list[str]) -> int:
    if len(argv) != 1 or not (Path(argv[0]) / "config.yaml").exists():
        print(f"expected one run folder with config.yaml; got {' '.join(argv) or 'nothing'}. Plan the sweep first", file=sys.stderr)
        return 2
    folder = Path(argv[0])
    try:
        run(frozen(folder), folder, PATIENCE)
    except ConfigError as error:
        print(f"config refused:\n{error}\nIf older code froze it, finish the sweep with that code; plan.json two folders up names its "
              "commit", file=sys.stderr)
        return 2
    except Held as error:
        print(error, file=sys.stderr)
        return HELD
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
