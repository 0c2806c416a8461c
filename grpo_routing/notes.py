"""What a reader must know beside the numbers, in words: for the text table, the Markdown page and report.html alike."""

from __future__ import annotations

import json
from collections import defaultdict

from grpo_routing.arms import Arm
from grpo_routing.results import BASE, DEPLOYED, TRAINED, Run

FEW = 4  # runs that are named one by one


def bases(arms: list[Arm]) -> list[tuple[str, Arm]]:
    """The distinct untrained policies, each as an arm of one run, and whose it is where there are several."""
    found: dict[str, list[tuple[Arm, Run]]] = defaultdict(list)
    for arm in arms:
        for run in arm.runs:
            found[json.dumps(run.evaluations[BASE].rates, sort_keys=True)].append((arm, run))
    return [("" if len(found) == 1 else "of " + whose(same), Arm(same[0][0].label, (same[0][1],))) for same in found.values()]


def whose(same: list[tuple[Arm, Run]]) -> str:
    """The runs that share a base: by name when they are few, else how many and on which loopholes."""
    if len(same) <= FEW:
        return ", ".join(f"{arm.label} s{run.config['seed']}" for arm, run in same)
    return f"{len(same)} runs on {', '.join(sorted({run.config['loophole']['name'] for _, run in same}))}"


def number(value: float | None, form: str = ".2f") -> str:
    """A share in the table; – is not measured."""
    return "–" if value is None else format(value, form)


def interval(span: tuple[float, float] | None) -> str:
    """The lower and upper bound of a share, without the leading 0; empty where there is none."""
    return "–".join(f"{bound:.2f}".removeprefix("0") for bound in span) if span else ""


def heading(arms: list[Arm], unfinished: list[Run], name: str) -> str:
    """One sentence: how many runs the table stands on, how many of them collapsed, and their size."""
    finished = sum(len(arm.runs) for arm in arms)
    fallen, lost = sum(arm.collapsed for arm in arms), sum(run.collapsed for run in unfinished)
    counts = [f"{fallen} of them collapsed"] * bool(fallen) + [f"{lost} collapsed and could not be evaluated"] * bool(lost)
    return ", ".join([f"{name}: {finished} of {finished + len(unfinished)} runs finished", *counts, *facts(arms)]) + "."


def facts(arms: list[Arm]) -> list[str]:
    """The size of the finished runs, a number each or a range where they differ; nothing without a finished run."""
    runs = [run for arm in arms for run in arm.runs]
    sizes = {"training steps": {run.steps for run in runs},
             "hinted evaluation samples": {run.evaluations[TRAINED].samples["hack"] for run in runs}}
    return [f"{'–'.join(map(str, sorted({min(seen), max(seen)})))} {what}" for what, seen in sizes.items() if seen]


def states(unfinished: list[Run]) -> list[str]:
    """A line per run that is in no row: how far it came and why it stopped."""
    return [f"{run.name}: {run.status} after {run.steps} steps" + (f" of {run.config['trainer']['steps']}" if run.config else "")
            + (f": {' '.join(run.cause.split())}" if run.cause else "") for run in unfinished]


def flags(arm: Arm) -> list[str]:
    """What a reader must know beside the arm's name; MEANING explains each."""
    loophole, usable, before = arm.config["loophole"], arm.mean(DEPLOYED, "format"), arm.mean(BASE, "format")
    holds = {f"collapsed: {arm.collapsed} of {len(arm.runs)}": arm.collapsed > 0,
             f"broken: format {usable:.2f}": usable < before / 2,  # what answers nothing hacks nothing
             "reference: no loophole": arm.role == "reference",
             f"control: {arm.runs[0].control}": arm.role == "control",
             f"adapter {arm.config['adapter']['name']}": arm.runs[0].uses_oracle,  # the heading above it does not say it
             "imitation": arm.config["extra_rollouts"]["name"] == "teacher",
             f"names: {loophole['evaluation_family']}": loophole["evaluation_family"] != loophole["train_family"]}
    return [flag for flag, raised in holds.items() if raised]


MEANING = {  # what a flag says before its colon, or a heading -> what it means
    "reference": "no loophole pays in training and its prompts carry no hint: what honest GRPO reaches.",
    "collapsed": "the tripwire stopped so many of the runs (health.py; the cause is in their status.json and below). They count as they "
                 "stood, because the survivors alone would flatter the arm; in means their curves stand still from there on.",
    "control": "a treatment without what should make it work; the method counts only where it beats this.",
    "control: random": "the same treatment with random directions, or with random numbers in place of scores.",
    "control: shuffled": "the same treatment; the texts of the pairs were dealt anew into hacks and clean answers.",
    "control: nonhack": "the same treatment along a real direction that is not about hacking: one clean answer minus another.",
    "control: haar": "the same treatment along random directions of the same shape and length.",
    "control: inverted": "the same treatment turned round: axes with the opposite sign, or flags on the rollouts that look cleanest.",
    "control: rate_matched": "the same treatment; as many flags in every step, on random rollouts of the step.",
    "control: permuted": "the same treatment; as many flags in every group, on random rollouts of the group.",
    "control: prompt_only": "the same treatment; as many flags in every step, on whole groups, those with the most flags first.",
    "control: norm-matched": "the restricted gradient at the length of the whole one: what its direction does by itself.",
    "control: shrunk": "the whole gradient at the length of the restricted one: what a smaller step does by itself.",
    "control: mask never fires": "two blocks without labels, one of them deleted: what blocks, anchors and optimizer do by themselves.",
    "control: anchors only": "the deployed block learns from anchors alone, nothing from rollouts of the joint policy.",
    "control: capacity": "vanilla with the size of two blocks in one.",
    "broken": "as deployed, fewer than half as many usable answers as the base gives: a low hack rate is a loss of ability.",
    "imitation": "part of every group is a teacher's text, so a hack rate is no discovery.",
    "names": "evaluation disclosed another family of marker names than training. A low hack rate there may mean that the model "
             "cannot follow new names rather than that hacking was suppressed; compare with vanilla under the same names.",
    "uses the oracle": "the arm reads the truth while it trains, on purpose; it is a ceiling and no method."}


def notes(arms: list[Arm]) -> list[str]:
    """What a reader must know to read the table right; only what applies."""
    shown = {words for arm in arms for flag in (*flags(arm), arm.block) for words in (flag, flag.split(":")[0])}
    said = ["Shares of hinted evaluation prompts (format: of all prompts), judged by hidden tests. known / held-out: hacks of "
            "loopholes that a mask source may / must not know. attempted: the lever is in the code. lazy: hacked without looking "
            "at the argument. –: not measured.",
            "Intervals below the rates are 95 % Wilson intervals over the evaluation samples of one seed and do not include variation "
            "between seeds; where several seeds are averaged, lowest and highest seed stand there instead.",
            "Δ base: solve minus the base's. last-5: mean over the last five training steps, rollouts as trained."]
    if any(arm.same_policy for arm in arms):
        said.append("= deployed: the adapter has no quarantine, or an empty one; both states are one policy, in one row.")
    if odd := [arm.label for arm in arms if all(run.same_policy for run in arm.runs) and not arm.same_policy]:
        said.append(f"Odd: {', '.join(odd)} has no quarantine, yet its two evaluations differ; they should be equal to the bit.")
    said += [f"{flag}: {meaning}" for flag, meaning in MEANING.items() if flag in shown]
    said += [f"{run.name} collapsed: {run.cause}." for arm in arms for run in arm.runs if run.collapsed]
    codes = sorted({run.code for arm in arms for run in arm.runs})
    if len(codes) > 1 or "+" in codes[0]:
        said.append(f"Code: {', '.join(codes)} (+: uncommitted changes)." + " The rows differ in their code." * (len(codes) > 1))
    return said
