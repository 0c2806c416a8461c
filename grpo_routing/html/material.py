"""What every section of the page reads: the runs of an experiment, and its arms with the numbers that they have on this page."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from grpo_routing.arms import Arm, group
from grpo_routing.notes import flags
from grpo_routing.results import BASE, DEPLOYED, TRAINED, Run, read_runs

ORACLE = "oracle"
KINDS = {  # how an arm is drawn -> (shape, words of the legend)
    "vanilla": ("square", "vanilla GRPO"), "method": ("disc", "method"), "control": ("diamond", "control"),
    "imitation": ("cross", "imitation"), "reference": ("triangle", "reference: no loophole pays"), ORACLE: ("star", "reads the oracle"),
    BASE: ("plus", "untrained base")}
WORDS = {BASE: "untrained", TRAINED: "as trained", DEPLOYED: "as deployed"}


@dataclass(frozen=True)
class Entry:
    """An arm on the page. Its number is its name in every picture; `reference` is the no-loophole arm of its setting."""

    number: int
    arm: Arm
    reference: Arm | None

    @property
    def kind(self) -> str:
        return ORACLE if self.arm.runs[0].uses_oracle else self.arm.role

    @property
    def flags(self) -> list[str]:
        return flags(self.arm)

    @property
    def warnings(self) -> list[str]:
        """The flags of an arm that a reader could take for a success and should not."""
        return [flag for flag in self.flags if flag.startswith(("broken", "collapsed"))]

    @property
    def broken(self) -> bool:
        """Whether a low hack rate is a loss of ability."""
        return any(flag.startswith("broken") for flag in self.flags)

    @property
    def states(self) -> dict[str, str]:
        """State of the policy -> words; one for an arm whose two states are one policy."""
        return {DEPLOYED: "trained = deployed"} if self.arm.same_policy else {state: WORDS[state] for state in (TRAINED, DEPLOYED)}


@dataclass(frozen=True)
class Material:
    """`folder` is outputs/<experiment> as the reader named it, for the commands on the page."""

    folder: Path
    runs: tuple[Run, ...]
    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def arms(self) -> list[Arm]:
        return [entry.arm for entry in self.entries]

    @property
    def unfinished(self) -> list[Run]:
        return [run for run in self.runs if not run.finished]

    @property
    def counts(self) -> dict[str, int]:
        """Status -> runs."""
        return dict(Counter(run.status for run in self.runs).most_common())

    def vanilla(self, entry: Entry) -> Arm | None:
        """The vanilla that trained in the same setting; the marker family of evaluation, last in it, does not touch training."""
        alike = [arm for arm in self.arms if arm.role == "vanilla" and arm.setting[:2] == entry.arm.setting[:2] and arm is not entry.arm]
        return alike[0] if alike else None


def gather(folder: Path, runs: list[Run]) -> Material:
    """Numbers follow the order of the table."""
    arms = group(runs)
    references = {arm.setting: arm for arm in reversed(arms) if arm.role == "reference"}
    return Material(folder, tuple(runs), tuple(Entry(number, arm, references.get(arm.setting)) for number, arm in enumerate(arms, 1)))


def read(folder: Path) -> Material:
    """Raises ReportError when the folder is no experiment, or where a file is damaged."""
    return gather(folder, read_runs(folder))
