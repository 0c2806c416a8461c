"""`python -m grpo_routing.pairs check FILE [group=option …]`: does a pair file separate, on this model? (check.py)

FILE ships in grpo_routing/pairs or is yours; the words after it compose the config as for `python -m grpo_routing`. Pairs of
loopholes that the config does not know are left aside. The exit status is 2 when the file or the config cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout

from grpo_routing.build import ConfigError, build_policy
from grpo_routing.composed import planned
from grpo_routing.mask_sources.pairs import PairFileError
from grpo_routing.pairs.check import report, usable_pairs


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.pairs", description="Does a pair file separate, on this model?")
    parser.add_argument("command", choices=["check"])
    parser.add_argument("file", help="a file of yours, or the name of one that ships")
    parser.add_argument("overrides", nargs="*", help="group=option or group.key=value, as for python -m grpo_routing")
    asked = parser.parse_args(words)
    try:
        plan = planned(asked.overrides)
        pairs = usable_pairs(asked.file, plan.loophole.known)
    except (PairFileError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    with redirect_stdout(sys.stderr):  # the organism says so when it has to be trained first
        policy = build_policy(plan)
    print(report(asked.file, policy, pairs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
