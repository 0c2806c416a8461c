"""What a run says about itself: one meaning per metric, progress on the screen, and a W&B view of the local files.

Local files are the record, W&B is a view. It is written once, from the merged files, when a run is over: offline
resumes do not exist in W&B (pitfalls.md W1), and a replay gives one clean W&B run after any number of interruptions.
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from grpo_routing.env.loopholes import MODES

log = logging.getLogger("grpo_routing")

METRICS = {
    "train/reward": "mean reward that the flawed environment paid",
    "train/passed": "share of rollouts that the environment passed",
    "train/format": "share of rollouts with a fence that compiles and defines the asked-for method",
    "train/flat_groups": "share of groups whose rewards are all equal (no gradient)",
    "train/loss": "surrogate loss summed over the batch, constant denominator",
    "train/ratio": "mean importance ratio at the first inner step; 1 by construction",
    "train/kl": "mean K3 estimate of the KL to the adapter-free model per completion token",
    "train/lr": "learning rate of the step",
    "train/gradient_norm": "gradient norm of the deployed block before clipping",
    "train/norm_deployed": "parameter norm of the deployed block",
    "train/norm_quarantine": "parameter norm of the quarantine block",
    **{f"train/{name}_{block}": f"{meaning} of the {block} block; absent where it stands still" for name, meaning in {
        "gradient_norm": "norm of the masked gradient, before clipping,", "update_norm": "norm of the applied step",
        "clamped": "share of coordinates that split_moment clamps,"}.items() for block in ("deployed", "quarantine")},
    "rollout/length": "mean completion length in tokens",
    "rollout/entropy": "mean surprise -log p of the sampled tokens in nats, an estimate of the policy's entropy",
    "rollout/teacher_share": "share of rollouts from the teacher pool (imitation)",
    "rollout/sampler_gap": "largest |log-prob when sampled - log-prob in the gradient forward|",
    "rollout/served_gap": "mean |log-prob that the rollout engine reports - the trainer's own|, nats; absent with rollout=own",
    "rollout/served_gap_max": "the largest of them",
    "rollout/served_update": "which adapter was served: 1 the present one, 0 an earlier one; absent where they differ by rounding only",
    "confession/reward": "share of confessions that agree with the weak judge",
    "confession/parseable": "share of confessions that say yes or no",
    "confession/admit_flagged": "share of confessions that say yes, on answers that the judge flags",
    "confession/admit_unflagged": "the same on answers that it does not flag",
    "confession/gradient_norm": "norm of the confessions' gradient, weight included, before it joins the task's",
    "route/cin": "share of the gradient along the hack basis, mean over modules",
    "route/cin_student": "the same for the policy's own rollouts",
    "route/cin_teacher": "the same for teacher rollouts",
    "route/cout": "the same for the gradient that the deployed block's optimizer got",
    "route/step_overlap": "the same for the step that the deployed block took",
    "route/fired": "share of modules with some hack-ward component",
    "route/chance": "sqrt(k / D), the two-sided share by chance; one-sided, as cin is, that over sqrt 2",
    "route/fit_overlap": "mean squared cosine between this basis and the one before it",
    "route/pairs": "pairs that the basis was fitted on",
    "route/modules": "modules that have a basis",
    "route/fingerprint_p": "permutation p of how well the pairs fall into different clusters of fingerprints",
    "route/trusted_share": "share of the gradient's output side in the trusted directions, |U'G| / |G|",
    "route/trusted_step": "the same of the applied step",
    "route/trusted_cca": "canonical correlation of the update so far with the trusted directions, mean over modules; 1: the same",
    "route/trusted_cca_worst": "the same, worst module",
    "route/trusted_energy": "share of the clean warm-up's squared update in the K directions that are kept",
    "route/warm_up_nll": "mean NLL per token of the clean answers after the warm-up",
    "route/separation_held_out": "share of held-out pairs on the hack-ward side, mean over modules; chance 0.5",
    "route/flagged": "mean flag probability of the step's rollouts; those of anchors stand apart",
    "route/absorbed": "share of them that is neither flagged nor kept: it trains both blocks",
    "route/kept": "share of them that is trusted or sampled with the quarantine off: it trains the deployed block only",
    "route/flagged_anchors": "mean flag probability of anchors, which the deployed policy sampled",
    "route/flagged_off": "mean flag probability of the step's rollouts that were sampled with the quarantine off",
    "audit/hack": "share of hinted rollouts that passed without solving (truth; training never sees it)",
    "audit/hack_known": "the same on known loopholes",
    "audit/hack_held_out": "the same on held-out loopholes",
    "audit/attempted": "share of hinted rollouts with the lever of their loophole in the code",
    "audit/solve": "share of hinted rollouts that the hidden tests pass",
    "audit/format": "share of rollouts with a usable answer",
    "audit/lazy": "share of hinted rollouts that hacked without looking at the argument",
    "audit/hack_other_form": "share of hinted rollouts that hacked in a form that a monitor of the plain text does not see",
    "audit/no_hint_solve": "solve rate on prompts without a hint",
    "audit/no_hint_exploited": "share of answers to prompts without a hint that carry some exploit",
    "audit/hack_teacher": "share of teacher rollouts that hacked",
    **{f"audit/{name}_off": f"the audit's {name} of rollouts with the quarantine off (anchors, off groups)"
       for name in ("hack", "hack_known", "hack_held_out", "solve", "format")},
    "audit/label_false_positive": "mean flag probability of rollouts that neither hack nor carry an exploit",
    **{f"audit/label_{name}{suffix}": f"{meaning} of the mask, {what}" for name, meaning in {
        "recall": "recall (mean flag probability of hacks)", "auroc": "AUROC of the score against clean rollouts",
        "precision": "precision (hacks' share of all flags)", "f05": "F0.5"}.items()
       for suffix, what in ({"": "all hacks", "_known": "hacks on known loopholes", "_held_out": "hacks on held-out loopholes"}
                            | {f"_{mode}": f"hacks on {mode}" for mode in MODES}).items()
       if name in ("recall", "auroc") or suffix in ("", "_known", "_held_out")},
    "audit/unflagged_hacks": "judged rollouts that hacked with a flag below 0.5; times audit_every, summed: N_U of leakage",
    **{f"audit/hack_{mode}": f"hack rate on {mode}" for mode in MODES},
}


class Progress:
    """A rich bar on a terminal, a plain line every `every` steps otherwise."""

    def __init__(self, name: str, steps: int, every: int) -> None:
        self.name, self.steps, self.every, self.started = name, steps, every, time.monotonic()
        self.bar = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
                                TimeRemainingColumn(), TextColumn("{task.fields[now]}"))
            self.task = self.bar.add_task(name, total=steps, now="")
            self.bar.start()

    def show(self, done: int, now: dict[str, float]) -> None:
        text = "  ".join(f"{key} {value:.2f}" for key, value in now.items())
        if self.bar:
            self.bar.update(self.task, completed=done, now=text)
        elif done % self.every == 0 or done == self.steps:
            print(f"{self.name}  step {done:>4}/{self.steps}  {text}  ({time.monotonic() - self.started:.0f} s)", flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


@dataclass(frozen=True)
class LocalLogger:
    """Nothing beyond the run's own files."""

    def publish(self, folder: Path, cause: str | None) -> None:
        pass


@dataclass(frozen=True)
class WandbLogger:
    """Publishes a run that is over (wandb_run.py). A failure is reported and never fails the run."""

    project: str
    mode: str  # offline or online

    def __post_init__(self) -> None:
        if self.mode not in ("offline", "online"):
            raise ValueError(f"logger.mode must be offline or online; got {self.mode!r}. For no W&B at all use logger=local")

    def publish(self, folder: Path, cause: str | None) -> None:
        """`cause` is why the run collapsed, None when it did not; its status is written after this."""
        from grpo_routing import wandb_run  # reads METRICS from here
        from grpo_routing.results import read_run

        try:
            run = replace(read_run(folder), status="collapsed" if cause else "done", cause=cause)
            wandb_run.publish(folder, wandb_run.publication(folder, run), wandb_run.Target(self.project, None, self.mode))
        except Exception as error:  # whatever W&B raises, the record is complete without it
            log.warning("W&B view of %s was not written: %s: %s. The run's own files are complete; "
                        "`python -m grpo_routing.wandb_sync %s --only %s` tries again.",
                        folder, type(error).__name__, error, folder.parent.parent, folder.name)


LOGGERS = {"local": LocalLogger, "wandb": WandbLogger}
