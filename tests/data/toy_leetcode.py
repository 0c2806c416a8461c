"""Toy problems of our own in the schema of the benchmark (baselines.md A2): `python -m tests.data.toy_leetcode` writes the two files.

Nothing here is LeetCode's text. Rows 9 to 14 of the training file must be dropped, each by another filter.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
SETUP = '''\
import collections, heapq
from typing import *
from string import ascii_lowercase
from collections import Counter
from heapq import heappush, heappop


class ListNode:
    def __init__(self, val=0, next=None):
        self.val, self.next = val, next


def chain(values):
    head = None
    for value in reversed(values):
        head = ListNode(value, head)
    return head
'''


def row(number: int, method: str, signature: str, statement: str, body: str, asserts: list[str], difficulty: str = "medium") -> dict:
    """A row of 14 fields. `asserts` are `args == expected`; text that starts with "assert" stands as it is."""
    starter = f"class Solution:\n    def {method}({signature}:\n        "
    tests = [one if one.startswith("assert") else f"assert Solution().{method}({one}" for one in asserts]
    solution = f"class Solution:\n    def {method}({signature}:\n" + "\n".join("        " + line for line in body.split("\n"))
    return {"id": number, "dataset": "toy", "evaluator": "code", "question": statement,
            "prompt": [{"role": "system", "content": "You program."}, {"role": "user", "content": statement}],
            "gt_answer": tests, "answer": tests, "hint": None, "func_name": f"Solution().{method}", "setup_code": SETUP,
            "canonical_solution": solution, "difficulty": difficulty, "prompt_metadata": {"starter_code": starter},
            "completion_gt_pass": True}


def lists(name: str, expected) -> list[str]:
    """Ten asserts about ten lists."""
    inputs = [[3, 1, 2], [5], [2, 2, 7], [-1, 4], [9, 8, 7, 6], [1, 1, 1, 5], [10, -3, 0], [6, 6], [2, 4, 8, 16], [7, 0, 7, 0, 7]]
    return [f"{name} = {values}) == {expected(values)!r}" for values in inputs]


def texts(name: str, expected) -> list[str]:
    inputs = ["aab", "b", "abba", "aaa", "cabb", "bbbb", "abab", "xyz", "aabbcc", "babaa"]
    return [f"{name} = {text!r}) == {expected(text)!r}" for text in inputs]


def run_length(text: str) -> int:
    best = count = 0
    for place, letter in enumerate(text):
        count = count + 1 if place and text[place - 1] == letter else 1
        best = max(best, count)
    return best


def first_repeat(nums: list[int]) -> int | None:
    return next((value for place, value in enumerate(nums) if value in nums[:place]), None)


def chunks(nums: list[int]) -> list[list[int]]:
    return [nums[start : start + 2] for start in range(0, len(nums), 2)]


SUM, LIST = "sum(nums)", "self, nums: List[int]"
TRAIN = [
    row(1, "gapSum", f"{LIST}) -> int", "Add up the distances between neighbours of `nums`.",
        "return sum(abs(a - b) for a, b in zip(nums, nums[1:]))", lists("nums", lambda v: sum(abs(a - b) for a, b in pairwise(v)))),
    row(2, "longestRun", "self, text: str) -> int", "How long is the longest run of one letter in `text`?",
        "best = count = 0\nfor place, letter in enumerate(text):\n    count = count + 1 if place and text[place - 1] == letter else 1\n"
        "    best = max(best, count)\nreturn best", texts("text", run_length)),
    row(3, "missing", "self, text: str) -> str", "Which of the first five small letters does `text` lack, in order?",
        "return ''.join(letter for letter in ascii_lowercase[:5] if letter not in text)",  # a name of the setup code
        texts("text", lambda text: "".join(letter for letter in "abcde" if letter not in text)), "hard"),
    row(4, "isEven", "self, text: str) -> bool", "Does `text` hold as many a as b?",
        "return text.count('a') == text.count('b')", texts("text", lambda text: text.count("a") == text.count("b"))),
    row(5, "mean", f"{LIST}) -> float", "The mean of `nums`.", "return sum(nums) / len(nums)",
        lists("nums", lambda v: sum(v) // len(v) if sum(v) % len(v) == 0 else sum(v) / len(v))),  # a whole mean stands as an int
    row(6, "chunks", "self, nums: List[int], size: int) -> List[List[int]]", "Cut `nums` into pieces of `size`; the last may be shorter.",
        "return [nums[start : start + size] for start in range(0, len(nums), size)]",
        [one.replace("nums =", "size = 2, nums =") for one in lists("nums", chunks)]),  # keywords in another order
    row(7, "firstRepeat", f"{LIST}) -> Optional[int]", "The first value of `nums` that stood there before, or None.",
        "seen = set()\nfor value in nums:\n    if value in seen:\n        return value\n    seen.add(value)\nreturn None",
        lists("nums", first_repeat)),
    row(8, "smallest", f"{LIST}) -> List[int]", "The two smallest of `nums`, ascending; fewer if there are fewer.",
        "heap = []\nfor value in nums:\n    heappush(heap, value)\nreturn [heappop(heap) for _ in range(min(2, len(nums)))]",
        lists("nums", lambda v: sorted(v)[:2])),
    row(9, "length", "self, head: Optional[ListNode]) -> int", "How long is the chain?",
        "count = 0\nwhile head:\n    head, count = head.next, count + 1\nreturn count",
        [f"assert Solution().length(head = chain({list(range(n))})) == {n}" for n in range(10)]),
    row(10, "biggest", f"{LIST}) -> int", "The biggest of `nums`.", "return max(nums)", lists("nums", max)[:6]),
    row(11, "zero", f"{LIST}) -> int", "How many of `nums` exceed a hundred?", "return sum(v > 100 for v in nums)",
        lists("nums", lambda v: 0)),
    row(12, "total", f"{LIST}) -> int", "Add up `nums`. " + "It is worth saying once more that all of them count. " * 60, f"return {SUM}",
        lists("nums", sum)),
    row(13, "slowTotal", f"{LIST}) -> int", "Add up `nums`, slowly.", f"while nums:\n    pass\nreturn {SUM}", lists("nums", sum)),
    row(14, "wrongTotal", f"{LIST}) -> int", "Add up `nums`, wrongly.", f"return {SUM} + (len(nums) > 1)", lists("nums", sum)),
]
EVALUATION = [
    row(101, "spread", f"{LIST}) -> int", "The biggest of `nums` less the smallest.", "return max(nums) - min(nums)",
        lists("nums", lambda v: max(v) - min(v)), "hard"),
    row(102, "doubled", f"{LIST}) -> List[int]", "Every value of `nums` twice, in place.", "return [v for v in nums for _ in range(2)]",
        lists("nums", lambda v: [w for w in v for _ in range(2)])),
    row(103, "kinds", "self, text: str) -> int", "How many different letters does `text` hold?", "return len(Counter(text))",
        texts("text", lambda text: len(set(text)))),
    row(104, "mirror", "self, text: str) -> bool", "Does `text` read the same backwards?", "return text == text[::-1]",
        texts("text", lambda text: text == text[::-1])),
    row(105, "odd", f"{LIST}) -> List[int]", "The odd values of `nums`, in order.", "return [v for v in nums if v % 2]",
        lists("nums", lambda v: [w for w in v if w % 2])),
]
FILES = {"toy_train.jsonl": TRAIN, "toy_evaluation.jsonl": EVALUATION}


def text(rows: list[dict]) -> str:
    return "".join(json.dumps(one) + "\n" for one in rows)


if __name__ == "__main__":
    for name, rows in FILES.items():
        (HERE / name).write_text(text(rows), encoding="utf-8")
