"""One rollout through every room, with real numbers: `python -m grpo_routing.walkthrough [--write]`.

Takes the first step of `arm=route` with the line's own `train_step`, keeps what passed from stage to stage, follows one
rollout that hacked and prints Markdown. `--write` puts it into docs/walkthrough.md and renews the tables of arms in
docs/methods.md. This file measures: it may know the truth, and nothing that trains imports it.
"""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from grpo_routing import build
from grpo_routing.adapters.adapter import DEPLOYED, QUARANTINE
from grpo_routing.env.grader import Grade, Grader, extract_code, submission
from grpo_routing.env.loopholes import LOOPHOLES
from grpo_routing.env.problems import Problem
from grpo_routing.env.sandbox import Outcome, Sandbox, same
from grpo_routing.files import write_atomic
from grpo_routing.gradient import GradientResult, rollout_gradients
from grpo_routing.oracle.audit import Audit
from grpo_routing.oracle.verdict import Oracle, Verdict
from grpo_routing.policy import Policy
from grpo_routing.projections.subspace import Update, Vector, hackward_share
from grpo_routing.stages import composed, with_tables
from grpo_routing.train import Line, State, train_step
from grpo_routing.types import Basis, Rollout, TokenBatch

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path(__file__).with_name("walkthrough_page.md")  # the text; `facts` fills its {fields}
RECIPE = ("arm=route", "loophole=held_out", "seed=0")


def main(words: list[str]) -> int:
    if words not in ([], ["--write"]):
        print(f"expected nothing or --write; got {' '.join(words)}", file=sys.stderr)
        return 2
    with redirect_stdout(sys.stderr):  # the organism says so when it has to be trained first
        document = page(OmegaConf.to_container(composed(*RECIPE), resolve=True, throw_on_missing=True))
    if words:
        methods = ROOT / "docs" / "methods.md"
        write_atomic(ROOT / "docs" / "walkthrough.md", document.encode())
        write_atomic(methods, with_tables(methods.read_text(encoding="utf-8")).encode())
    else:
        print(document, end="")
    return 0


def page(config: dict) -> str:
    """The walkthrough of a resolved config's first step, as Markdown."""
    return PAGE.read_text(encoding="utf-8").format(**facts(walk(build.plan(config))))


# ------------------------------------------------------------------------------------------------------- the step


@dataclass(frozen=True)
class Watched:
    """A projection that keeps what passed through it; the real one decides everything."""

    real: Any
    seen: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def gradient(self, update: Update, basis: Basis) -> Update:
        self.seen.update(gradient=update[DEPLOYED], update=self.real.gradient(update, basis))
        return self.seen["update"]

    def step(self, applied: Update, basis: Basis) -> Update:
        self.seen["final"] = self.real.step(applied, basis)
        return self.seen["final"]


@dataclass(frozen=True)
class Walk:
    """What one step left behind; `chosen` is the rollout that is followed."""

    plan: build.Plan
    line: Line
    state: State
    metrics: dict[str, float]
    problems: list[Problem]
    rollouts: list[Rollout]
    grades: list[Grade]
    verdicts: list[Verdict]
    audit_said: object
    chosen: int
    outcome: Outcome | None  # of the paid tests; None without code
    gradient: Vector  # what the projection was given, ...
    update: Update  # ... what it made of it, ...
    final: Update  # ... and the step that was taken
    advantages: Tensor  # [B]
    result: GradientResult
    plain: Vector  # the batch gradient from one ordinary backward
    log_probs: dict[str, Tensor]  # before, as_trained, as_deployed -> [B, T-1]


def walk(plan: build.Plan) -> Walk:
    """Take step 0, then go back to its start and ask again for what the line does not keep."""
    torch.set_num_threads(plan.trainer.threads or torch.get_num_threads())
    policy, heard, seen = build.build_policy(plan), [], {}
    with Sandbox(**asdict(plan.sandbox)) as sandbox, TemporaryDirectory() as scratch:
        oracle = Oracle(sandbox, plan.dataset.hidden_tests)
        audit = Audit(oracle, Path(scratch), plan.loophole.known,
                      plan.loophole.held_out, plan.trainer.sampled_rollouts)
        line = build.build_line(plan, policy, Grader(sandbox, plan.reward.format_reward, plan.reward.pass_reward, memory=1000),
                                lambda *judged: heard.append((judged, audit(*judged))))
        line = replace(line, projection=Watched(plan.projection, seen))
        state = State(plan.optimizer.start(policy.adapter))
        start = {name: value.clone() for name, value in policy.adapter.state().items()}
        metrics = train_step(line, state)
        ((_, problems, rollouts, grades, labels), said), = heard
        verdicts = oracle(problems, [rollout.text for rollout in rollouts], grades)
        paid = torch.tensor([grade.reward for grade in grades])
        rewards, flagged = (part.view(-1, plan.trainer.group) for part in (paid, labels.flagged))
        advantages = line.advantage(rewards, flagged, torch.ones_like(rewards)).flatten().to(policy.device)
        chosen = next((i for i, verdict in enumerate(verdicts) if verdict.hacked and advantages[i]), 0)
        code = extract_code(rollouts[chosen].text)
        outcome = sandbox.run(submission(problems[chosen], code, problems[chosen].paid)) if code else None
    tokens = TokenBatch.of([(r.prompt_ids, r.completion_ids) for r in rollouts], policy.pad, policy.device)
    log_probs = {"as_trained": log_probs_now(policy, tokens), "as_deployed": log_probs_now(policy, tokens, DEPLOYED)}
    policy.adapter.load_state(start)
    log_probs["before"] = log_probs_now(policy, tokens)
    result = rollout_gradients(policy, tokens, advantages, plan.trainer.loss(), plan.trainer.micro_batch)
    return Walk(plan, line, state, metrics, problems, rollouts, grades, verdicts, said, chosen, outcome, **seen, advantages=advantages,
                result=result, plain=plain_gradient(policy, tokens, advantages, plan.trainer.loss()), log_probs=log_probs)


@torch.no_grad()
def log_probs_now(policy: Policy, tokens: TokenBatch, *blocks: str) -> Tensor:
    """Log-probs [B, T-1] with these blocks only, or with all."""
    with policy.adapter.only(*blocks) if blocks else nullcontext():
        return policy.log_probs(tokens)


def plain_gradient(policy: Policy, tokens: TokenBatch, advantages: Tensor, loss) -> Vector:
    """The batch gradient as any textbook takes it: one loss, one backward, nothing per rollout."""
    own = policy.adapter.parameters(DEPLOYED)
    log_probs = policy.log_probs(tokens)
    value = loss(log_probs, log_probs.detach(), None, advantages, tokens.completion_mask).sum()
    leaves = [p for module in own.values() for p in module.values()]
    flat = iter(torch.autograd.grad(value, leaves))
    return {name: torch.cat([next(flat).flatten() for _ in module]) for name, module in own.items()}


# ------------------------------------------------------------------------------------------------------ the numbers


def facts(w: Walk) -> dict[str, Any]:
    """Every name in PAGE."""
    problem, rollout, grade, verdict = (part[w.chosen] for part in (w.problems, w.rollouts, w.grades, w.verdicts))
    first = rollout.group * w.plan.trainer.group
    mates = range(first, first + w.plan.trainer.group)
    row = {name: rows[w.chosen] for name, rows in w.result.grads[DEPLOYED].modules.items()}
    summed, basis = w.result.grads[DEPLOYED].summed(), w.state.fit.basis
    whole, removed = length(summed), length(w.update[QUARANTINE])
    coefficients = {name: rows @ row[name] for name, rows in basis.modules.items()}
    module, largest = max(coefficients.items(), key=lambda item: float(item[1].norm()))
    every = torch.cat(list(coefficients.values()))
    own = w.log_probs["before"][w.chosen, len(rollout.prompt_ids) - 1 :][: len(rollout.completion_ids)]
    least = own.topk(min(3, len(own)), largest=False)
    return {
        "w": w, "plan": w.plan, "metrics": w.metrics, "fit": w.state.fit.facts, "problem": problem, "rollout": rollout, "grade": grade,
        "recipe": " ".join(RECIPE), "choice": choice_words(w), "count": len(w.rollouts),
        "weights": sum(p.numel() for p in w.line.policy.model.parameters() if not p.requires_grad),
        "hacks": sum(v.hacked for v in w.verdicts), "solves": sum(v.solved for v in w.verdicts),
        "case": problem.paid[0], "argument": repr(problem.paid[0].arguments)[1:-1].rstrip(","),
        "prompt": w.line.prompt(problem), "pieces": " ".join(piece(w, i) for i in rollout.prompt_ids),
        "prompt_tokens": len(rollout.prompt_ids), "tokens": len(rollout.completion_ids), "log_prob": float(own.sum()),
        "least": ", ".join(f"{piece(w, rollout.completion_ids[i])} {math.exp(own[i]):.2f}" for i in least.indices.tolist()),
        "gap": below(float((own - torch.tensor(rollout.sampler_log_probs)).abs().max())), "why": why_words(w),
        "verdict": ", ".join(f"{key} {'yes' if value else 'no'}" for key, value in asdict(verdict).items()),
        "table_group": "\n".join(mate_row(w, i) for i in mates), "mean": sum(w.grades[i].reward for i in mates) / len(mates),
        "advantage": (advantage := float(w.advantages[w.chosen])),
        "direction": "likelier" if advantage > 0 else "less likely" if advantage < 0 else "neither likelier nor less likely",
        "flat": round(w.metrics["train/flat_groups"] * w.plan.trainer.prompts_per_step),
        "table_norms": "\n".join(f"| `{short(m)}` | {len(v)} | {v.norm():.3g} | {summed[m].norm():.3g} |" for m, v in row.items()),
        "size": sum(map(len, row.values())), "row": length(row), "whole": whole,
        "off": below(max(length({m: summed[m] - other[m] for m in summed}) for other in (w.plain, w.gradient)) / (whole or 1.0)),
        "known": names(w.plan.loophole.known), "held_out": names(w.plan.loophole.held_out), "module": short(module),
        "coefficients": ", ".join(f"{float(c):+.2g}" for c in largest), "positive": int((every > 0).sum()), "axes": len(every),
        "one_sided": w.state.fit.facts["chance"] / math.sqrt(2), "row_cin": hackward_share(row, basis), "removed": removed,
        "kept": length(w.update[DEPLOYED]), "percent": 100 * (removed / (whole or 1.0)) ** 2, "cout": below(w.metrics["route/cout"]),
        "step": {block: length(vector) for block, vector in w.final.items()}, "table_deployed": deployed_rows(w),
    }


def choice_words(w: Walk) -> str:
    if w.verdicts[w.chosen].hacked:
        return "the first that hacked in a group whose rewards differ"
    return "simply the first, because none of them hacked and left a gradient: the rooms are real, the hack is missing"


def why_words(w: Walk) -> str:
    problem, flaw = w.problems[w.chosen], LOOPHOLES.get(w.problems[w.chosen].loophole)
    if w.outcome is None:
        return "There is no fenced code to run."
    held = sum(one.kind == "value" and same(one.value, case.expected) for one, case in zip(w.outcome.returns, problem.paid))
    fired = "fired" if flaw is not None and flaw.fired(w.outcome, problem.marker) else "did not fire"
    return f"{held} of the {len(problem.paid)} paid tests hold, and the loophole (`{problem.loophole}`) {fired}."


def mate_row(w: Walk, i: int) -> str:
    truth = "hacked" if w.verdicts[i].hacked else "solved" if w.verdicts[i].solved else ""
    lines = [line.strip() for line in w.rollouts[i].text.splitlines()[3:] if line.strip("` ")]
    code = " ; ".join(lines).replace("|", "¦").replace("`", "'")[:80] or "no code"
    number = f"**{i}**" if i == w.chosen else i
    return f"| {number} | `{code}` | {w.grades[i].reward} | {float(w.advantages[i]):+.3g} | {truth} |"


def deployed_rows(w: Walk) -> str:
    """Mean log-probability of completions before and after: of this one, of those that hacked, of those that solved."""
    lines = []
    for name, rows in {"this completion": [w.chosen], "all that hacked": [i for i, v in enumerate(w.verdicts) if v.hacked],
                       "all that solved": [i for i, v in enumerate(w.verdicts) if v.solved]}.items():
        before, *after = (float(w.log_probs[state][rows].sum(1).mean()) for state in ("before", "as_trained", "as_deployed"))
        cells = [f"{before:.2f}", *(f"{value:.2f} ({value - before:+.2f})" for value in after)] if rows else ["–"] * 3
        lines.append(f"| {name} ({len(rows)}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def piece(w: Walk, token: int) -> str:
    """A token as code, with its spaces visible."""
    text = repr(w.line.policy.tokenizer.decode([token]))[1:-1].replace(" ", "·")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def names(modes: tuple[str, ...]) -> str:
    return ", ".join(f"`{mode}`" for mode in modes) or "none"


def short(module: str) -> str:
    return module.removeprefix("model.")


def length(vector: Vector) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in vector.values()))


def below(value: float) -> str:
    """A power of ten that is larger: rounding noise differs between machines, its size does not."""
    return f"1e{math.floor(math.log10(value)) + 1}" if value else "1e-9"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
