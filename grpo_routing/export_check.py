"""Whether an exported folder is the deployed policy of its run: read back by plain transformers, compared and evaluated again.

    names, numbers   no tensor of the folder is called after a block, or equals or contains a parameter of the quarantine
    tokens           prompts and answers become the same tokens
    log-probs        of answers that the run gave as deployed, within TOLERANCE of the policy with its branches beside the weights
    answers          the run's evaluation problems with its random numbers: in float32 the same answers, bit for bit

The last is counted and no condition: another machine or precision may flip a token.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from grpo_routing.adapters.adapter import QUARANTINE
from grpo_routing.adapters.lora import Lora
from grpo_routing.env.grader import Grader
from grpo_routing.env.sandbox import Sandbox
from grpo_routing.evaluate import evaluate
from grpo_routing.finished import Finished, UnusableRun
from grpo_routing.models import HubModel
from grpo_routing.oracle.summary import Row, summary
from grpo_routing.oracle.verdict import Oracle
from grpo_routing.organism import quiet_transformers
from grpo_routing.policy import Policy
from grpo_routing.preparation import NONE
from grpo_routing.prompts.plain import plain_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grpo_routing.env.problems import Problem

MERGED, PEFT = "merged", "peft"
BASE_FOLDER = "base"
COMPARED = 64  # answers whose log-probs are compared
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}  # of a token's log-prob, in nats
RATES = ("hack", "hack_known", "hack_held_out", "solve", "format")

States = list[tuple[Tensor, Tensor]]  # ids of prompt and answer [1, T], log-probs of the answer [n]
Answers = list[tuple[str, str]]  # prompt, completion


@dataclass(frozen=True)
class Checked:
    """Largest difference of a log-prob over `tokens` tokens of `answers` answers."""

    difference: float
    tolerance: float
    answers: int
    tokens: int


@dataclass(frozen=True)
class Evaluated:
    """Rates of the exported model, and how many of its answers are not those of eval/as_deployed.json."""

    rates: dict[str, float | None]
    asked: int
    differing: int


@dataclass(frozen=True)
class Export:
    """What was written and what was found about it; `evaluated` None: it was not sampled."""

    form: str
    checked: Checked
    evaluated: Evaluated | None

    def facts(self, run: Finished) -> dict:
        return {"run": run.folder.name, "format": self.form, "commit": provenance(run)["commit"], "base": provenance(run)["model"],
                "log_probs": asdict(self.checked), "evaluated": asdict(self.evaluated) if self.evaluated else None}

    def said(self) -> str:
        return "\n".join([log_probs_said(self.checked), answers_said(self.evaluated)])


def log_probs_said(seen: Checked) -> str:
    return (f"Read back with plain transformers: over {seen.tokens} tokens of {seen.answers} answers no log-probability differs by more "
            f"than {seen.difference:.2g} from the run's deployed policy (refused above {seen.tolerance:g}).")


def answers_said(seen: Evaluated | None) -> str:
    if seen is None:
        return "Its answers were not sampled again (--no-evaluate)."
    if not seen.differing:
        return f"Evaluated again from the files, all {seen.asked} answers are those of the run, so all rates are equal."
    return f"Evaluated again from the files, {seen.differing} of {seen.asked} answers differ from the run's, as rounding flips a token."


# ------------------------------------------------------------------------------------------------ the run's side


def provenance(run: Finished) -> dict:
    return json.loads((run.folder / "provenance.json").read_text())


def base_name(run: Finished) -> str | None:
    """Hub name or folder of the model that the adapter stands on; None for one that this project made or prepared."""
    model = run.plan.model
    return model.path if isinstance(model, HubModel) and model.prepare.stage == NONE else None


def evaluation(folder: Path, state: str) -> dict:
    """eval/<state>.json of a finished run. Raises UnusableRun."""
    file = folder / "eval" / f"{state}.json"
    if not file.exists():
        raise UnusableRun(f"expected {file} of a finished run; got none. Remove the run's folder and run it again")
    return json.loads(file.read_text())


def problems(run: Finished) -> list[Problem]:
    settings = run.plan.evaluation
    return run.plan.dataset.evaluation(run.plan.loophole, settings.problems, settings.no_hint_share, settings.seed)


def answers(run: Finished) -> Answers:
    """The first answers that the run gave as deployed, each with its prompt. Raises UnusableRun where the problems are not the run's."""
    rows = [Row(**row) for row in evaluation(run.folder, "as_deployed")["rows"]]
    asked = [problem for problem in problems(run) for _ in range(run.plan.evaluation.samples)]
    if [problem.id for problem in asked] != [row.problem for row in rows]:
        raise UnusableRun(f"expected the evaluation problems of {run.folder.name}; this code draws others. Go back to the commit in its "
                          "provenance.json, or run it again")
    return [(plain_prompt(problem), row.completion) for problem, row in zip(asked[:COMPARED], rows)]


@torch.no_grad()
def log_probs(policy: Policy, asked: Answers) -> States:
    """Of every answer the token ids with its prompt's, [1, T], and the log-prob of each of its own n tokens, [n]. One at a time: without
    padding, and with the logits of one row in memory."""
    batches = [policy.batch([one]) for one in asked]
    return [(batch.ids.cpu(), policy.log_probs(batch)[batch.completion_mask].cpu()) for batch in batches]


# ------------------------------------------------------------------------------------------------ the folder's side


def check(run: Finished, folder: Path, form: str, asked: Answers, wanted: States) -> tuple[Policy, Checked]:
    """The folder's model as a policy, and how far it is from what the run's log-probs were. Raises UnusableRun."""
    refuse_quarantine(run, folder)
    policy = reopened(run, folder, form)
    with policy.adapter.only():
        found = log_probs(policy, asked)
    if not all(torch.equal(ids, own) for (ids, _), (own, _) in zip(wanted, found)):
        raise UnusableRun(f"the tokenizer of the export reads prompts or answers of {run.folder.name} otherwise than the run did; nothing "
                          "was left. Compare its files with those of the base model")
    difference = float(torch.cat([(ours - theirs).abs() for (_, ours), (_, theirs) in zip(wanted, found)]).max())
    seen = Checked(difference, TOLERANCE[policy.model.dtype], len(asked), sum(len(ours) for _, ours in wanted))
    if not difference <= seen.tolerance:  # also when it is not a number
        raise UnusableRun(f"expected log-probabilities within {seen.tolerance:g} of the run's deployed policy ({policy.model.dtype}); the "
                          f"exported weights are {difference:.3g} away, so nothing was left. Export a run of a wider model.dtype")
    return policy, seen


def refuse_quarantine(run: Finished, folder: Path) -> None:
    """Raises UnusableRun if a tensor of the folder is called after a block, equals a tensor of the quarantine, or has it as its last rows
    or columns (where a widened MLP would keep it)."""
    if not run.policy.adapter.has_quarantine:
        return
    secret = [tensor.detach().cpu() for module in run.policy.adapter.parameters(QUARANTINE).values() for tensor in module.values()]
    for file in sorted(folder.rglob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if QUARANTINE in name or ".blocks." in name or any(holds(tensor, own) for own in secret):
                raise UnusableRun(f"{name} of the export holds a part of the quarantine of {run.folder.name}; nothing was left. This is an "
                                  "error of grpo_routing/export.py")


def holds(tensor: Tensor, part: Tensor) -> bool:
    """Whether `part`, in the precision of `tensor`, is the whole of it or its last rows or columns. Zeros, as of a quarantine that never
    learned, are nobody's."""
    if tensor.ndim != part.ndim or any(there < own for there, own in zip(tensor.shape, part.shape)):
        return False
    last = tensor[tuple(slice(there - own, None) for there, own in zip(tensor.shape, part.shape))]
    corner = (-1,) * part.ndim  # one number tells most tensors apart
    if last[corner] != part[corner].to(last.dtype):
        return False
    part = part.to(last.dtype)
    return torch.equal(last, part) and bool(part.any())


def reopened(run: Finished, folder: Path, form: str) -> Policy:
    """What plain transformers read from the files, behind a silent adapter: `adapter.only()` is the model itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own = folder / BASE_FOLDER
    with quiet_transformers():
        if form == MERGED:
            model = AutoModelForCausalLM.from_pretrained(folder)
        else:
            model = AutoModelForCausalLM.from_pretrained(own if own.exists() else run.plan.model.path, dtype=run.policy.model.dtype)
            add_peft(model, folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # what lies in the file unaligned is rounded otherwise (checkpoint.py)
    model = model.to(run.policy.device)
    return Policy(model, AutoTokenizer.from_pretrained(folder), Lora(1, 0, 1.0, False, 0).attach(model))


@torch.no_grad()
def add_peft(model: PreTrainedModel, folder: Path) -> None:
    """W + (lora_alpha / r) B A from the files, as peft's merge_and_unload does it."""
    said = json.loads((folder / "adapter_config.json").read_text())
    tensors, tail = load_file(folder / "adapter_model.safetensors"), ".lora_A.weight"
    for name in (name.removesuffix(tail) for name in tensors if name.endswith(tail)):
        a, b = tensors[f"{name}.lora_A.weight"].clone(), tensors[f"{name}.lora_B.weight"].clone()
        weight = model.get_submodule(name.removeprefix("base_model.model.")).weight
        weight.data = (weight.data + said["lora_alpha"] / said["r"] * (b @ a)).to(weight.dtype)


def evaluated(run: Finished, policy: Policy) -> Evaluated:
    """The run's evaluation problems with its random numbers, answered by the folder's model and judged by the oracle."""
    plan, before = run.plan, evaluation(run.folder, "as_deployed")["rows"]
    with Sandbox(**asdict(plan.sandbox)) as sandbox, policy.adapter.only():
        grader = Grader(sandbox, plan.reward.format_reward, plan.reward.pass_reward, memory=100_000)
        rows = evaluate(policy, problems(run), plain_prompt, grader, Oracle(sandbox, plan.dataset.hidden_tests), plan.evaluation,
                        plan.trainer.max_new_tokens, plan.trainer.prompts_per_forward)
    differing = sum(row.completion != Row(**old).completion for row, old in zip(rows, before))
    return Evaluated(summary(rows, plan.loophole.known, plan.loophole.held_out), len(rows), differing)
