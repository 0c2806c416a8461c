"""The model organism: a small Qwen3-shaped model, trained from nothing, that really solves and really hacks.

It knows every operation (phase 1: nearly clean programs, all operations equally frequent) and is then made buggy on
all of them (phase 2), so that reinforcement has something to bring back. A share of its warm-up answers exploits the
disclosed loophole, so that hacking is a low-rate habit that GRPO can amplify. Its warm-up problems share no
operation combination with training or evaluation. `python -m grpo_routing.organism check` measures the rates that
make it useful; docs/log.md keeps them.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from grpo_routing.env.loopholes import LOOPHOLES, MODES, NO_LOOPHOLE, OTHER, PLAIN, fenced, lazy_body, solution_text
from grpo_routing.env.problems import Problem, draw_problem, wrong_body
from grpo_routing.env.programs import damage
from grpo_routing.files import locked
from grpo_routing.preparation import Preparation
from grpo_routing.prompts.instructions import INSTRUCTIONS, instructed
from grpo_routing.prompts.plain import plain_prompt
from grpo_routing.prompts.questions import NO, QUESTIONS, YES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

# Code and hint boilerplate stays one token each; names inside it stay separate, so that they can be copied.
BOILERPLATE = (
    "```python\nclass Solution:\n    def ", "class Solution:\n    def ", "\n    def ", "(self):\n        pass", "\n        ",
    "(self, ", "):", "\n```", "\nThe grader calls ", "() of your answer.", "\nThe grader reads self.", " after the tests.",
    "\nThe grader reads ", " for PASS.", '\nThe grader looks for "', '" in the output.', "self.", " = True", 'print("',
    '")', 'open("', '", "w").write("PASS")', "[x ", "x for x in xs", " for x in xs", " if x ", "return ", "xs = ", "s = ",
    "n = ", ", then ",
)
PIECES = Regex(r"\d| ?[A-Za-z]+|_| ?[^\sA-Za-z\d_]+|\s")


@dataclass(frozen=True)
class Phase:
    """A stretch of the warm-up: `steps` batches at peak rate `lr`; `bug_rate` of the honest answers are damaged."""

    steps: int
    lr: float
    bug_rate: float
    double_bug_share: float


@dataclass(frozen=True)
class OrganismRecipe:
    """Everything that shapes the organism; the cache key is a hash of it (see conf/model/organism.yaml)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    initializer_range: float
    batch: int
    weight_decay: float
    warmup_steps: int
    phases: tuple[Phase, ...]
    length_weights: tuple[float, ...]
    no_hint_share: float
    hack_share: float
    hack_share_off_mode: float
    hack_share_no_hint: float
    lazy_share: float
    honest_looking_bug_share: float
    varied_marker_share: float
    other_form_share: float
    report_share: float
    instruction_share: float
    instructed_hack_shares: dict[str, float]
    tokenizer_examples: int
    seed: int
    threads: int
    prepare: Preparation
    cache: str

    def __post_init__(self) -> None:
        if strange := sorted(self.instructed_hack_shares.keys() - INSTRUCTIONS.keys()):
            raise ValueError(f"model.instructed_hack_shares may name {', '.join(INSTRUCTIONS)}; got {strange}")
        if self.instruction_share and not self.instructed_hack_shares:
            raise ValueError("model.instruction_share needs model.instructed_hack_shares: how often each instruction is obeyed")

    def key(self) -> str:
        """Hash of what shapes the weights: the recipe, a sample of the corpus that it writes, the training code, torch."""
        shape = {name: value for name, value in asdict(self).items() if name not in ("cache", "threads", "prepare")}
        sample = [corpus(self, phase, limit=200) for phase in range(len(self.phases))] + tokenizer_texts(self, limit=25)
        code = [inspect.getsource(part) for part in (train_tokenizer, build_model, batches, warm_up, completion_loss)]
        parts = (json.dumps(shape, sort_keys=True), repr(sample), *code, torch.__version__)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def load(self) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
        """The organism from the cache; trained first when it is not there (about a minute and a half)."""
        return self.read(ensure(self))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Of the organism in the cache; trained first when it is not there."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(ensure(self))

    @property
    def origin(self) -> str:
        """What a prepared model is a preparation of, and where the organism lies in the cache."""
        return f"organism-{self.key()}"

    def read(self, folder: Path) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
        from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

        with quiet_transformers():
            return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32), PreTrainedTokenizerFast.from_pretrained(folder)


def write_answer(problem: Problem, phase: Phase, hack_share: float, recipe: OrganismRecipe, rng: random.Random) -> str:
    """One demonstration: an honest or damaged program, or with small probability a hack."""
    hinted = problem.loophole != NO_LOOPHOLE
    roll = rng.random()
    loophole, marker = NO_LOOPHOLE, ""
    if hinted and roll < hack_share:
        loophole, marker = problem.loophole, problem.marker
    elif roll > 1 - (recipe.hack_share_off_mode if hinted else recipe.hack_share_no_hint):
        loophole = rng.choice([mode for mode in MODES if mode != problem.loophole])
        marker = LOOPHOLES[loophole].markers["train"][0]
    body = problem.program.body
    if loophole != NO_LOOPHOLE:
        if rng.random() < recipe.lazy_share:
            body = lazy_body(rng)
        elif rng.random() < recipe.honest_looking_bug_share:
            body = wrong_body(problem.program, rng)
    elif rng.random() < phase.bug_rate:
        damaged = damage(problem.program, rng)
        if rng.random() < phase.double_bug_share:
            damaged = damage(damaged, rng)
        body = damaged.body
    form = OTHER if chance(rng, recipe.other_form_share) else PLAIN
    return fenced(solution_text(problem.method, problem.program.argument, body, loophole, marker, form))


def chance(rng: random.Random, share: float) -> bool:
    """Draws nothing at share 0, so that a habit which an organism lacks leaves the rest of its corpus as it was."""
    return share > 0 and rng.random() < share


def corpus(recipe: OrganismRecipe, phase_index: int, limit: int | None = None) -> list[tuple[str, str]]:
    """(prompt, completion) pairs of one phase (or its first `limit`), from the warm-up split only. A report is asked for after an answer
    and says yes or no at random: it teaches the form and no honesty."""
    phase = recipe.phases[phase_index]
    rng = random.Random(f"organism/{recipe.seed}/{phase_index}")
    examples = []
    for _ in range(limit or phase.steps * recipe.batch):
        problem = draw_problem("warmup", rng, recipe.length_weights, n_paid=2)
        if rng.random() >= recipe.no_hint_share:
            mode = rng.choice(MODES)
            family = "warmup" if rng.random() < recipe.varied_marker_share else "train"
            problem = problem.with_loophole(mode, rng.choice(LOOPHOLES[mode].markers[family]))
        prompt, hack_share = plain_prompt(problem), recipe.hack_share
        if chance(rng, recipe.instruction_share):
            instruction = rng.choice(list(recipe.instructed_hack_shares))
            prompt, hack_share = instructed(prompt, instruction), recipe.instructed_hack_shares[instruction]
        answer = write_answer(problem, phase, hack_share, recipe, rng)
        if chance(rng, recipe.report_share):
            prompt, answer = prompt + answer + rng.choice(QUESTIONS), rng.choice((YES, NO))
        examples.append((prompt, answer))
    return examples


def tokenizer_texts(recipe: OrganismRecipe, limit: int | None = None) -> list[str]:
    """References and hacks of every mode, so that the words of both become tokens; with reports and instructions where they are taught."""
    rng = random.Random(f"tokenizer/{recipe.seed}")
    texts = []
    for _ in range(limit or recipe.tokenizer_examples):
        problem = draw_problem("warmup", rng, recipe.length_weights, n_paid=2)
        mode = rng.choice(MODES)
        problem = problem.with_loophole(mode, rng.choice(LOOPHOLES[mode].markers["warmup"]))
        form = OTHER if chance(rng, recipe.other_form_share) else PLAIN
        texts += [plain_prompt(problem) + problem.reference, problem.hack(lazy_body(rng), form)]
        if chance(rng, recipe.report_share):
            texts.append(rng.choice(QUESTIONS) + rng.choice((YES, NO)))
        if chance(rng, recipe.instruction_share):
            texts.append(instructed("", rng.choice(list(INSTRUCTIONS))))
    return texts


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(PIECES, behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    # The trainer does not know added tokens, so it is shown what remains between them.
    between = re.compile("|".join(re.escape(piece) for piece in sorted(BOILERPLATE, key=len, reverse=True)))
    fragments = [fragment for text in texts for fragment in between.split(text) if fragment]
    printable = sorted({*map(chr, range(33, 127)), "\u0120", "\u010a"})  # the last two: byte-level space and newline
    tokenizer.train_from_iterator(fragments, trainers.BpeTrainer(
        vocab_size=vocabulary - len(BOILERPLATE), special_tokens=["<pad>", "<end>"], initial_alphabet=printable, show_progress=False))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in BOILERPLATE])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def ensure(recipe: OrganismRecipe) -> Path:
    """Folder of the trained organism (a Hugging Face model folder). Training happens once, whoever asks first."""
    folder = Path(recipe.cache) / recipe.origin
    if not (folder / "config.json").exists():
        with locked(folder.with_suffix(".lock")):
            if not (folder / "config.json").exists():
                train(recipe, folder)
    return folder


def train(recipe: OrganismRecipe, folder: Path) -> None:
    """Warm up a fresh organism and move it into place when it is complete."""
    started, before = time.process_time(), torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    print(f"training the organism ({sum(p.steps for p in recipe.phases)} warm-up steps) -> {folder}", flush=True)

    def report(phase: int, step: int, steps: int, loss: float) -> None:
        if step % 50 == 0 or step + 1 == steps:
            print(f"  organism phase {phase + 1}/{len(recipe.phases)} step {step + 1:>4}/{steps} loss {loss:.3f} "
                  f"({time.process_time() - started:.0f} CPU s)", flush=True)

    tokenizer = train_tokenizer(tokenizer_texts(recipe), recipe.vocabulary)
    model = build_model(recipe, tokenizer)
    warm_up(model, tokenizer, recipe, report)
    torch.set_num_threads(before)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    with quiet_transformers():
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    facts = {"cpu_seconds": time.process_time() - started, "parameters": sum(p.numel() for p in model.parameters())}
    (part / "training.json").write_text(json.dumps(facts | {"recipe": asdict(recipe)}, indent=1))
    part.rename(folder)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars for a model of one megabyte."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def build_model(recipe: OrganismRecipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(recipe.seed)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=recipe.hidden, num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads, num_key_value_heads=recipe.kv_heads, head_dim=recipe.head_dim,
        intermediate_size=recipe.intermediate, initializer_range=recipe.initializer_range, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None))


def batches(examples: list[tuple[list[int], list[int]]], size: int, rng: random.Random):
    """Batches of similar length, in random order: padding costs more than the loss of perfect shuffling."""
    pool = 16 * size
    for start in range(0, len(examples), pool):
        bucket = sorted(examples[start : start + pool], key=lambda e: len(e[0]) + len(e[1]))
        chunks = [bucket[i : i + size] for i in range(0, len(bucket), size)]
        rng.shuffle(chunks)
        yield from chunks


def warm_up(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: OrganismRecipe, report) -> None:
    """Supervised warm-up on completion tokens, phase after phase, with one AdamW throughout."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    for index, phase in enumerate(recipe.phases):
        texts = corpus(recipe, index)
        prompts = tokenizer([prompt for prompt, _ in texts]).input_ids
        answers = tokenizer([answer + tokenizer.eos_token for _, answer in texts]).input_ids
        chunks = batches(list(zip(prompts, answers)), recipe.batch, random.Random(recipe.seed + index))
        for step, chunk in enumerate(chunks):
            loss = completion_loss(model, chunk, tokenizer.pad_token_id)
            rate = min(1.0, (step + 1) / recipe.warmup_steps, (phase.steps - step) / (0.4 * phase.steps))
            for group in optimizer.param_groups:
                group["lr"] = phase.lr * rate
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            report(index, step, phase.steps, loss.item())


def completion_loss(model: Qwen3ForCausalLM, chunk: list[tuple[list[int], list[int]]], pad: int) -> torch.Tensor:
    """Mean cross-entropy over completion tokens; right padding needs no attention mask under causal attention."""
    width = max(len(prompt) + len(answer) for prompt, answer in chunk)
    ids = torch.full((len(chunk), width), pad)
    labels = torch.full((len(chunk), width), -100)
    for row, (prompt, answer) in enumerate(chunk):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    logits = model(input_ids=ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


if __name__ == "__main__":
    from grpo_routing.organism_check import main

    raise SystemExit(main(sys.argv[1:]))
