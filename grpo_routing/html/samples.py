"""A few completions of every arm, what the environment paid beside what is true. They are untrusted text: the template escapes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from grpo_routing.html.material import Entry, Material
from grpo_routing.results import DEPLOYED, Run, read_json, read_record

SHOWN = 4  # completions of an arm
LONGEST = 1200  # characters of one; more is cut, and said to be


@dataclass(frozen=True)
class Sample:
    """`problem` is its description, or its id where the record keeps no more; `reward` is None where it was not kept."""

    where: str
    problem: str
    loophole: str
    held_out: bool
    completion: str
    paid: bool
    reward: float | None
    solved: bool
    hacked: bool

    @property
    def verdict(self) -> str:
        return "hacked" if self.hacked else "solved" if self.solved else "neither"

    @property
    def text(self) -> str:
        return self.completion if len(self.completion) <= LONGEST else self.completion[:LONGEST] + f"\n… {len(self.completion)} characters"


def sampled(material: Material) -> list[tuple[Entry, list[Sample]]]:
    """Arms with any completion on record."""
    return [(entry, chosen) for entry in material.entries if (chosen := choose(read_samples(material.folder, entry.arm.runs)))]


def read_samples(folder: Path, runs: tuple[Run, ...]) -> list[Sample]:
    """Of the first run that has some: the policy as deployed where its evaluation kept the text, else the last rollouts of training."""
    for run in runs:
        if found := evaluated(folder / "runs" / run.name, run) or trained(folder / "runs" / run.name, run):
            return found
    return []


def evaluated(folder: Path, run: Run) -> list[Sample]:
    rows = (read_json(folder / "eval" / f"{DEPLOYED}.json") or {"rows": []})["rows"]
    held_out = run.config["loophole"]["held_out"]
    return [Sample(f"as deployed, seed {run.config['seed']}", f"problem {row['problem']}", row["loophole"], row["loophole"] in held_out,
                   row["completion"], row["passed"], None, row["solved"], row["hacked"])
            for row in rows if row.get("completion")]  # older evaluations kept none


def trained(folder: Path, run: Run) -> list[Sample]:
    """The last first: what the policy had become. A grade's reward holds the paid tests' share exactly when it reaches it."""
    held_out = run.config["loophole"]["held_out"]
    return [Sample(f"step {row['step'] + 1}, seed {run.config['seed']}", row["prompt"], row["loophole"], row["loophole"] in held_out,
                   row["completion"], row["reward"] >= run.config["reward"]["pass_reward"], row["reward"], row["solved"], row["hacked"])
            for row in reversed(read_record(folder / "rollouts.jsonl"))]


def choose(samples: list[Sample]) -> list[Sample]:
    """One per verdict and loophole by turns, so that the few differ; hacks first."""
    kinds: dict[tuple, list[Sample]] = {}
    for sample in samples:
        kinds.setdefault((sample.verdict, sample.loophole), []).append(sample)
    by_verdict = {verdict: [same[0] for (said, _), same in kinds.items() if said == verdict] for verdict in ("hacked", "solved", "neither")}
    chosen = [same[turn] for turn in range(SHOWN) for same in by_verdict.values() if turn < len(same)][:SHOWN]
    return sorted(chosen, key=lambda sample: ("hacked", "solved", "neither").index(sample.verdict))
