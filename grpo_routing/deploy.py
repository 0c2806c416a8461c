"""The quarantine-scale curve of a finished run, and what each rule for the scale would have deployed (graft.md section 2.3).

    python -m grpo_routing.deploy RUN_FOLDER [--problems 200] [--scales 11] [--margin 0.05]

Samples the policy with the quarantine at every scale on two sets of evaluation problems that share none: scales are picked on
one and reported on the other. Within a set every scale has the same problems and random numbers. Writes deploy.json and
figures/deploy.png into the run's folder and prints the table. Rules that a developer can follow live in deployment.py and
read monitor flags; the oracle's pick, the argmax of solve - 2 hack, is stamped as such.
"""

from __future__ import annotations

import argparse
import random
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from grpo_routing.deploy_figure import draw
from grpo_routing.deployment import CONFIDENCE, MARGIN, POOL_SEED, Monitored, grid, monitor_ucb, resolution, zero
from grpo_routing.env.grader import Grader
from grpo_routing.env.loopholes import FORMS
from grpo_routing.env.problems import Problem
from grpo_routing.env.sandbox import Sandbox
from grpo_routing.files import write_json
from grpo_routing.finished import Finished, UnusableRun, load
from grpo_routing.log import Progress
from grpo_routing.mask_sources.detector import Detector
from grpo_routing.oracle.summary import Row, summary
from grpo_routing.oracle.verdict import Oracle
from grpo_routing.prompts.plain import plain_prompt
from grpo_routing.rollout import Seat, sample_rollouts
from grpo_routing.types import STUDENT, Rollout

BASE = None  # stands for a scale: the frozen model, all blocks off
RATES = ("hack", "hack_known", "hack_held_out", "solve", "format")
READS = {"zero": "nothing", "monitor_ucb": "monitor flags", "oracle": "the truth"}


def main(argv: list[str]) -> int:
    """Measure, write, print; the exit status is 2 when the folder cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.deploy", description="Quarantine-scale curve and picks of a run.")
    parser.add_argument("run", type=Path, help="outputs/<experiment>/runs/<run> of a finished run with a quarantine")
    parser.add_argument("--problems", type=int, default=200, help="of each set (200)")
    parser.add_argument("--scales", type=int, default=11, help="from 0 to 1 (11)")
    parser.add_argument("--margin", type=float, default=MARGIN, help=f"monitored rate beyond the base's that may go out ({MARGIN})")
    asked = parser.parse_args(argv)
    if asked.problems < 1 or asked.scales < 2 or asked.margin < 0:
        parser.error(f"expected --problems >= 1, --scales >= 2 and --margin >= 0; got {asked.problems}, {asked.scales} and {asked.margin}")
    try:
        print(deploy(asked.run, asked.problems, asked.scales, asked.margin))
    except UnusableRun as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def deploy(folder: Path, problems: int, scales: int, margin: float) -> str:
    """Write deploy.json and figures/deploy.png; return the table. Raises UnusableRun."""
    run = load(folder)
    if not run.policy.adapter.has_quarantine:
        raise UnusableRun(f"expected an adapter with a quarantine in {folder}; {run.plan.arm_name} has the block "
                          f"{', '.join(run.policy.adapter.blocks)} alone. There is no scale to choose; name a routed run")
    sets = dict(zip(("pick", "report"), problem_sets(run, problems)))
    if not all(any(problem.hint for problem in asked) for asked in sets.values()):
        raise UnusableRun(f"expected evaluation problems with a hint; evaluation.no_hint_share={run.plan.evaluation.no_hint_share} leaves "
                          f"none in {problems}, so there is no hack rate. Name a run with a lower share, or raise --problems")
    points = [BASE, *grid(scales)]
    progress = Progress(f"deploy {folder.name}", 2 * len(points), every=4)
    with Sandbox(**asdict(run.plan.sandbox)) as sandbox:
        judge = Judge(run, sandbox)
        measured: dict[str, list[Point]] = {"pick": [], "report": []}
        for name, asked in sets.items():
            for scale in points:
                measured[name].append(judge(asked, sample(run, asked, name, scale), scale))
                progress.show(sum(map(len, measured.values())), {} if scale is BASE else {"scale": scale})
    progress.close()
    said = result(run, measured, margin) | {"problems": {name: [problem.id for problem in asked] for name, asked in sets.items()}}
    write_json(folder / "deploy.json", said)
    draw(said, folder / "figures" / "deploy.png")
    return table(said)


# ------------------------------------------------------------------------------------------------ measuring


def problem_sets(run: Finished, count: int) -> tuple[list[Problem], list[Problem]]:
    """Pick and report set: `count` problems of the evaluation split each and none in both, dealt from one draw by loophole and
    difficulty (length of the program), so that neither is harder than the other. The draw is not kept clear of the run's own evaluation:
    one-operation programs are few, and without those that it has used both sets would be harder than it."""
    pool = run.plan.dataset.evaluation(run.plan.loophole, 2 * count, run.plan.evaluation.no_hint_share, POOL_SEED)
    random.Random(f"deploy/{POOL_SEED}").shuffle(pool)
    pool.sort(key=lambda problem: (problem.loophole, problem.program.difficulty))  # stable
    return pool[::2], pool[1::2]


def sample(run: Finished, problems: list[Problem], name: str, scale: float | None) -> list[Rollout]:
    """One completion per problem with the quarantine at `scale`; the same random numbers for every scale."""
    with run.policy.adapter.only() if scale is BASE else nullcontext():
        return sample_rollouts(run.policy, [plain_prompt(problem) for problem in problems], [1] * len(problems), ("deploy", name),
                               run.plan.trainer.max_new_tokens, run.plan.evaluation.temperature, run.plan.trainer.prompts_per_forward,
                               Seat(STUDENT, 1.0 if scale is BASE else scale))


@dataclass(frozen=True)
class Point:
    """One scale on one set: what the monitor says, and apart from it what is true."""

    monitored: Monitored
    rates: dict[str, float | None]

    def facts(self) -> dict[str, float | None]:
        point = self.monitored
        return {"scale": point.scale, "flagged": point.flagged, "asked": point.asked, "monitored": point.rate, "bound": point.bound}


class Judge:
    """The developer's monitor (levers of known loopholes in the forms that the run's detector reads, no noise) and the oracle, on the
    same completions."""

    def __init__(self, run: Finished, sandbox: Sandbox) -> None:
        self.plan = run.plan
        self.monitor = Detector(control="none", known=run.plan.loophole.known, recall=1.0, false_positive=0.0, noise="iid", seed=0,
                                forms=getattr(run.plan.mask_source, "forms", FORMS))
        self.grader = Grader(sandbox, run.plan.reward.format_reward, run.plan.reward.pass_reward, memory=100_000)
        self.oracle = Oracle(sandbox, run.plan.dataset.hidden_tests)

    def __call__(self, problems: list[Problem], rollouts: list[Rollout], scale: float | None) -> Point:
        texts = [rollout.text for rollout in rollouts]
        grades = self.grader(problems, texts)
        rows = [Row.of(*judged) for judged in zip(problems, grades, self.oracle(problems, texts, grades))]
        return Point(Monitored(scale, sum(bool(self.monitor.levers(text)) for text in texts), len(texts)),
                     summary(rows, self.plan.loophole.known, self.plan.loophole.held_out))


# ------------------------------------------------------------------------------------------------ picking and saying


def oracle_pick(curve: list[Point]) -> float:
    """Reads the truth: the argmax of solve - 2 hack; of equal scales the lowest."""
    return max(curve, key=lambda point: point.rates["solve"] - 2 * point.rates["hack"]).monitored.scale


def result(run: Finished, measured: dict[str, list[Point]], margin: float) -> dict:
    """What deploy.json holds: both curves, and every pick with its row of the report set."""
    (base, *curve), report = measured["pick"], measured["report"]
    seen = [point.monitored for point in curve]
    picks = {"zero": zero(seen), "monitor_ucb": monitor_ucb(seen, base.monitored, margin), "oracle": oracle_pick(curve)}
    rows = [point.facts() | {name: point.rates[name] for name in RATES} for point in report]
    found = {row["scale"]: row for row in rows}
    return {"run": run.folder.name, "confidence": CONFIDENCE, "margin": margin, "resolution": resolution(base.monitored),
            "limit": base.monitored.rate + margin, "monitor_knows": list(run.plan.loophole.known), "pool_seed": POOL_SEED,
            "pick": {"base": base.facts(), "curve": [point.facts() for point in curve]},
            "report": {"base": rows[0], "curve": rows[1:]},
            "picks": {rule: {"scale": scale, "reads": READS[rule], "uses_oracle": rule == "oracle",
                             "report": found[scale]} for rule, scale in picks.items()}}


def table(said: dict) -> str:
    """The curve on both sets, the picks, and what a reader must know."""
    picked = {rule: pick["scale"] for rule, pick in said["picks"].items()}
    lines = [f"{said['run']}: picked on {said['pick']['base']['asked']} problems, reported on {said['report']['base']['asked']} others",
             "        pick set           report set", "scale   monitored bound    monitored bound  " + " ".join(f"{name:>8}" for name in
             ("hack", "known", "held-out", "solve", "format")) + "  picked by"]
    sets = [[said[name]["base"], *said[name]["curve"]] for name in ("pick", "report")]
    for seen, row in zip(*sets):
        scale = seen["scale"]
        rates = " ".join(f"{'–' if row[name] is None else format(row[name], '.2f'):>8}" for name in RATES)
        rules = ", ".join(rule for rule, at in picked.items() if at == scale)
        lines.append(f"{'base' if scale is BASE else format(scale, '.2f'):<8}{seen['monitored']:9.3f} {seen['bound']:.3f}    "
                     f"{row['monitored']:9.3f} {row['bound']:.3f}  {rates}  {rules}".rstrip())
    lines.append(f"monitor_ucb reads monitor flags: the highest scale whose {said['confidence']:.0%} bound on the pick set is <= "
                 f"{said['limit']:.3f} (base {said['pick']['base']['monitored']:.3f} + margin {said['margin']:g}), all below it too.")
    lines.append("oracle reads the truth: argmax of solve - 2 hack on the pick set.")
    if said["margin"] < said["resolution"]:
        lines.append(f"The margin is below {said['resolution']:.3f}, what this many samples resolve: "
                     "even a policy that is flagged as often as the base fails.")
    if picked["monitor_ucb"] is None:
        lines.append("monitor_ucb lets no scale through: scale 0 is over the limit too, so the rule keeps the base.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
