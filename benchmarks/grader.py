"""How many submissions a second: the sandbox against one fresh interpreter for each, and what a submission costs in the sandbox.

    python -m benchmarks.grader

Same submissions, both with two in flight, in alternating rounds; the median round counts. The other
side is as lean as it can be (`python -I -S`, only the imports that the submissions find in scope, no
confinement at all), so the ratio understates what a confined process per submission would cost.
CPU time and page faults of a submission are those of all processes, the asking one included.
Exits with 1 if the ratio is below 6.
"""

import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

from benchmarks.measure import cpu_seconds, page_faults
from grpo_routing.env.sandbox import Sandbox, Submission

IN_FLIGHT = 2
ROUNDS = 5
PER_ROUND = {"sandbox": 300, "subprocess": 40}
TARGET = 6.0

PROGRAM = """
class Solution:
    def longest(self, nums: List[int], k: int) -> int:
        counts, left, best = defaultdict(int), 0, 0
        for right, value in enumerate(nums):
            counts[value] += 1
            while len(counts) > k:
                counts[nums[left]] -= 1
                if not counts[nums[left]]:
                    del counts[nums[left]]
                left += 1
            best = max(best, right - left + 1)
        return best
"""
CALLS = tuple(([(7 * i * i + seed) % 11 for i in range(40)], 3) for seed in range(5))

BASELINE = """
import bisect, collections, functools, heapq, itertools, json, math, sys
from typing import *
from collections import *
from itertools import *
from functools import *
from heapq import *
from bisect import *
code, method, calls = json.load(sys.stdin)
scope = dict(globals())
exec(compile(code, "submission", "exec"), scope)
bound = getattr(scope["Solution"](), method)
print(json.dumps([bound(*arguments) for arguments in calls]))
"""


def sandbox_round(box: Sandbox, submission: Submission) -> tuple[float, list]:
    """(submissions per second, returns of the last one)"""
    count = PER_ROUND["sandbox"]
    started = time.perf_counter()
    outcomes = box.run_many([submission] * count)
    rate = count / (time.perf_counter() - started)
    return rate, [one.value for one in outcomes[-1].returns]


def subprocess_round(submission: Submission) -> tuple[float, list]:
    count = PER_ROUND["subprocess"]
    request = json.dumps([submission.code, submission.method, submission.calls])

    def one(_: int) -> str:
        command = [sys.executable, "-I", "-S", "-c", BASELINE]
        return subprocess.run(command, input=request, capture_output=True, text=True, check=True).stdout

    started = time.perf_counter()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        outputs = list(pool.map(one, range(count)))
    return count / (time.perf_counter() - started), json.loads(outputs[-1])


def own_seconds(submission: Submission) -> float:
    """CPU seconds of the submission's code and calls themselves, in this process, when it is compiled for each anew as there."""
    count, started = PER_ROUND["sandbox"], time.process_time()
    for _ in range(count):
        scope: dict = {"List": list, "defaultdict": defaultdict}
        exec(compile(submission.code, "submission", "exec"), scope)
        for arguments in submission.calls:
            getattr(scope["Solution"](), submission.method)(*arguments)
    return (time.process_time() - started) / count


def main() -> int:
    submission = Submission(PROGRAM, "longest", CALLS)
    rates: dict[str, list[float]] = {"sandbox": [], "subprocess": []}
    seconds, faults, own = [], [], own_seconds(submission)
    with Sandbox(IN_FLIGHT, wall_seconds=5.0, cpu_seconds=5, memory_mb=512, minimum="seccomp") as box:
        print(f"layers       {box.layers['description']}")
        for _ in range(ROUNDS):
            spent, faulted = cpu_seconds(), page_faults()
            fast, returns = sandbox_round(box, submission)
            seconds.append((cpu_seconds() - spent) / PER_ROUND["sandbox"])
            faults.append((page_faults() - faulted) / PER_ROUND["sandbox"])
            slow, expected = subprocess_round(submission)
            if returns != expected:
                raise SystemExit(f"the two sides disagree: {returns} and {expected}.")
            rates["sandbox"].append(fast)
            rates["subprocess"].append(slow)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, median in medians.items():
        low, high = min(rates[name]), max(rates[name])
        print(f"{name:12} {median:6.1f} submissions/s   (rounds {low:.1f} to {high:.1f})")
    print(f"a submission {1e3 * statistics.median(seconds):6.2f} CPU ms, of which its own code takes {1e3 * own:.2f}; "
          f"{statistics.median(faults):.0f} page faults")
    ratio = medians["sandbox"] / medians["subprocess"]
    print(f"ratio        {ratio:6.1f}   (target {TARGET:.0f})")
    return 0 if ratio >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
