"""Self-report fine-tuning, before any reinforcement (arXiv:2511.06626; baselines.md E): err, be asked, and say so.

    turn 1   an answer to a problem without a loophole, wrong in half of the dialogues      trained too: the error is part of the method
    turn 2   "Is this answer right?" or its paraphrase -> yes or no, honestly               trained

mask_turn1 trains the verdict alone, the ablation that is expected to teach nothing which carries over. Errors are damaged programs
(off_policy) or the model's own (on_policy), whose answers the *paid* tests judge: no hidden test and nothing about loopholes comes in.
Problems are the warm-up split's, so none shares its operations with training or evaluation.

Differs from the paper: programs instead of factual questions, and all weights of a small model instead of a hosted one's adapter.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import random
import shutil
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_routing.adapters.lora import Lora
from grpo_routing.env.grader import Grader
from grpo_routing.env.loopholes import fenced, solution_text
from grpo_routing.env.problems import Problem, draw_problem, wrong_body
from grpo_routing.env.sandbox import Sandbox
from grpo_routing.files import locked
from grpo_routing.organism import quiet_transformers
from grpo_routing.policy import Policy, chat
from grpo_routing.preparation import NONE, SELF_REPORT_SFT, Preparation
from grpo_routing.prompts.plain import plain_prompt
from grpo_routing.prompts.questions import NO, RIGHT, YES
from grpo_routing.rollout import sample_rollouts
from grpo_routing.settings import SandboxLimits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

UNTRAINED = -100
AT_ONCE, TRIES = 64, 60  # on_policy: problems sampled together, and answers drawn per dialogue before giving up


@dataclass(frozen=True)
class Dialogue:
    """Two turns as text, and whether the first is right."""

    problem: Problem
    answer: str
    question: str
    right: bool

    @property
    def verdict(self) -> str:
        return YES if self.right else NO


def prepared(source: Any, limits: SandboxLimits) -> Loaded:
    """The model of `source` (models.py) after its preparation."""
    return {NONE: lambda source, limits: source.load(), SELF_REPORT_SFT: fine_tuned}[source.prepare.stage](source, limits)


def fine_tuned(source: Any, limits: SandboxLimits) -> Loaded:
    """From the cache, beside the organism; made first when it is not there."""
    folder = Path(source.cache) / f"{source.origin}-{key(source.prepare)}"
    with locked(folder.with_suffix(".lock")):
        if not (folder / "config.json").exists():
            make(source, limits, folder)
    return source.read(folder)


def key(settings: Preparation) -> str:
    """Hash of what shapes the weights: settings, a sample of the dialogues, the training code, torch."""
    sample = [(d.answer, d.question, d.verdict) for d in off_policy(settings, 50)]
    code = [inspect.getsource(part) for part in (on_policy, fine_tune, targets, mean_loss)]
    parts = (json.dumps(asdict(settings), sort_keys=True), repr(sample), *code, torch.__version__)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def make(source: Any, limits: SandboxLimits, folder: Path) -> None:
    settings, (model, tokenizer) = source.prepare, source.load()
    print(f"self-report fine-tuning ({settings.samples} dialogues, {settings.error_source}) -> {folder}", flush=True)
    dialogues = (off_policy(settings, settings.samples) if settings.error_source == "off_policy"
                 else on_policy(settings, deepcopy(model), tokenizer, limits))
    fine_tune(model, tokenizer, settings, dialogues)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    with quiet_transformers():
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    part.rename(folder)


# ------------------------------------------------------------------------------------------------ dialogues


def off_policy(settings: Preparation, count: int) -> list[Dialogue]:
    """Right answers are the references; a wrong one computes something else."""
    rng, found = random.Random(f"self_report_sft/{settings.seed}"), []
    for _ in range(count):
        problem, right = drawn(settings, rng), rng.random() >= settings.wrong_share
        body = problem.program.body if right else wrong_body(problem.program, rng)
        answer = fenced(solution_text(problem.method, problem.program.argument, body))
        found.append(Dialogue(problem, answer, rng.choice(RIGHT), right))
    return found


def on_policy(settings: Preparation, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limits: SandboxLimits) -> list[Dialogue]:
    """The model's own usable answers; the paid tests of a problem without a loophole say which are right. Takes `model` for itself.

    Raises RuntimeError when it gives too few of a kind.
    """
    rng = random.Random(f"self_report_sft/{settings.seed}")
    policy = Policy(model, tokenizer, Lora(1, 0, 1.0, False, 0).attach(model))  # at its start it adds nothing
    wanted = [rng.random() >= settings.wrong_share for _ in range(settings.samples)]
    pools: dict[bool, list[tuple[Problem, str]]] = {True: [], False: []}
    with Sandbox(**asdict(limits)) as sandbox:
        grader = Grader(sandbox, 0.0, 1.0, memory=0)
        for batch in range(TRIES * settings.samples // AT_ONCE + 1):
            problems = [drawn(settings, rng) for _ in range(AT_ONCE)]
            rollouts = sample_rollouts(policy, [plain_prompt(problem) for problem in problems], [1] * AT_ONCE,
                                       ("self_report_sft", settings.seed, batch), settings.max_new_tokens, settings.temperature, AT_ONCE)
            for problem, rollout, grade in zip(problems, rollouts, grader(problems, [rollout.text for rollout in rollouts])):
                if grade.format_ok:
                    pools[grade.passed].append((problem, rollout.text))
            if all(len(pools[kind]) >= wanted.count(kind) for kind in pools):
                return [Dialogue(*pools[right].pop(), rng.choice(RIGHT), right) for right in wanted]
    raise RuntimeError(f"expected {wanted.count(True)} right and {wanted.count(False)} wrong answers of the model's own; {TRIES} tries for "
                       f"each gave {len(pools[True])} and {len(pools[False])}. Use model.prepare.error_source=off_policy")


def drawn(settings: Preparation, rng: random.Random) -> Problem:
    return draw_problem("warmup", rng, settings.length_weights, settings.tests)


# ------------------------------------------------------------------------------------------------ fine-tuning


def fine_tune(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Preparation, dialogues: list[Dialogue]) -> None:
    """AdamW on all weights, in float32 whatever the model's own precision. Leaves the model trained and in that precision."""
    precision, sequences = model.dtype, [targets(tokenizer, dialogue, settings.mask_turn1) for dialogue in dialogues]
    model.float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0)
    batches = list(shuffled(sequences, settings))
    for step, batch in enumerate(batches):
        loss = mean_loss(model, batch, tokenizer.pad_token_id)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, (step + 1) / max(1, settings.warmup_steps), (len(batches) - step) / len(batches))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step + 1 == len(batches):
            print(f"  self-report fine-tuning step {step + 1:>4}/{len(batches)} loss {loss.item():.3f}", file=sys.stderr, flush=True)
    model.to(precision).eval()


def shuffled(sequences: list, settings: Preparation) -> Iterator[list]:
    for epoch in range(settings.epochs):
        order = random.Random(f"self_report_sft/{settings.seed}/{epoch}").sample(sequences, len(sequences))
        yield from (order[start : start + settings.batch] for start in range(0, len(order), settings.batch))


def targets(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, mask_turn1: bool) -> tuple[list[int], list[int]]:
    """Tokens of the dialogue, and beside each what is to be said in its place, or UNTRAINED: both turns of the assistant or the second.

    The question follows within the turn, but what the model should say after its answer is the end: the question's first place says so.
    """
    end = tokenizer.eos_token_id
    prompt, answer, question, verdict = (tokenizer(text, add_special_tokens=False).input_ids for text in (
        *chat(tokenizer, [plain_prompt(dialogue.problem)]), dialogue.answer, dialogue.question, dialogue.verdict))
    first = [UNTRAINED] * (len(answer) + 1) if mask_turn1 else [*answer, end]
    return prompt + answer + question + verdict + [end], [
        *[UNTRAINED] * len(prompt), *first, *[UNTRAINED] * (len(question) - 1), *verdict, end]


def mean_loss(model: PreTrainedModel, batch: list[tuple[list[int], list[int]]], pad: int) -> Tensor:
    """Mean cross-entropy over what is trained; right padding needs no attention mask under causal attention."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([own + [pad] * (width - len(own)) for own, _ in batch], device=model.device)
    said = torch.tensor([own + [UNTRAINED] * (width - len(own)) for _, own in batch], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), said[:, 1:].flatten(), ignore_index=UNTRAINED)
