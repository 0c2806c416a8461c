"""Mini-SGTM: forget one of two synthetic languages when part of its text is unlabelled (SGTM, Shilov et al. 2025, arXiv:2512.05648,
sections 3 and 4; GR, Cloud et al. 2024, arXiv:2410.04332).

    theta_Q: one head and 16 MLP units of each layer (queries, keys, values, columns of W_O; rows of W_1, b_1, columns of W_2)
    label of the step                SGTM                     GR (activation)                     filter
      F flagged forget               grad of theta_D <- 0     stop-grad on D's heads and units    the step is dropped
      U unlabelled, both languages   nothing                  nothing                             nothing
      R clean retain                 forward without Q        forward without Q                   nothing
    deployed: theta_Q = 0 (filter has none); leakage = tokens of unlabelled forget text that explain its forget loss / tokens there

Two Markov sources over the same 32 tokens, told apart by a first tag. "Undiscovered" is the share of forget steps that are U.
The baselines of the leakage curve are filter runs at other shares: standard training on all retain text and n forget tokens.

Departures. Languages are synthetic, 2 layers, 700 steps. Undiscovered steps are spread evenly over training and nested across
shares instead of drawn independently; embeddings and norms are joint (the paper's TinyStories); GR is the authors' hybrid (hook
before the nonlinearity, every layer, with the R forward). One AdamW steps everything, so zeroed parameters still coast and decay.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo_routing.reproductions.leakage import leakage

TOKENS, WIDTH, LAYERS, HEADS, UNITS = 32, 64, 2, 8, 128
QUARANTINED_UNITS, SHARPNESS = 16, 1.92  # one head is quarantined, the last
STEPS, BATCH, LENGTH, WARMUP, LR, BETAS, DECAY = 700, 64, 32, 100, 3e-3, (0.9, 0.95), 0.1
CLEAN = 0.25  # share of the retain steps that are R
BASELINES = (0.0, 0.01, 0.03, 0.06, 0.10, 0.15, 0.20)  # undiscovered shares of the leakage curve
ARMS = (("sgtm", 0.2), ("gr", 0.2), ("sgtm", 0.4))
SHEET = {("sgtm", 0.2): (2.221, 2.245, 3.270, 0.38), ("gr", 0.2): (2.220, 2.228, 2.660, 0.79), ("filter", 0.2): (2.220, 2.352, 2.352, 1),
         ("sgtm", 0.4): (2.216, 2.227, 2.722, 0.40)}  # retain after, forget before, forget after, leakage


@dataclass(frozen=True)
class Result:
    """Losses of a run with and without the quarantine, and the unlabelled forget tokens that it trained on."""

    retain: float  # after deletion
    before: float  # forget, quarantine on
    after: float  # forget, quarantine deleted
    unlabelled: int


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.reproductions.two_languages")
    parser.add_argument("--seeds", type=int, default=1)
    asked = parser.parse_args(words)
    torch.set_num_threads(1)
    for seed in range(asked.seeds):
        generator = torch.Generator().manual_seed(seed)
        forget, retain = (entropy_rate(markov_source(generator)) for _ in range(2))
        print(f"seed {seed}: entropy rate of the forget language {forget:.3f}, of the retain language {retain:.3f} (spec sheet 2.19)")
        print("baselines (undiscovered share: forget tokens, forget loss, retain loss)")
        filtered = {share: train("filter", share, seed) for share in BASELINES}
        for share, result in filtered.items():
            print(f"  {share:>5.0%}: {result.unlabelled:>7} {result.after:7.3f} {result.retain:7.3f}")
        print("arm  undiscovered  retain after    forget before   forget after    leakage       ours (spec sheet)", flush=True)
        for arm, share in (*ARMS, ("filter", 0.2)):
            result = filtered[share] if arm == "filter" else train(arm, share, seed)
            sheet = SHEET[arm, share]
            ours = (result.retain, result.before, result.after, leaked(result, filtered))
            cells = "   ".join(f"{mine:.3f} ({theirs:.3f})" for mine, theirs in zip(ours, sheet))
            print(f"{arm:<8} {share:>5.0%}       {cells}", flush=True)


def leaked(result: Result, filtered: dict[float, Result]) -> float:
    curve = sorted((base.unlabelled, base.after) for base in filtered.values())
    return leakage(*zip(*curve), loss=result.after, unlabelled=result.unlabelled)


def train(arm: str, undiscovered: float, seed: int, steps: int = STEPS) -> Result:
    """One run of `sgtm`, `gr` or `filter`. The same seed gives every arm the same text, order of languages and initial weights."""
    if arm not in ("sgtm", "gr", "filter"):
        raise ValueError(f"arm must be sgtm, gr or filter; got {arm!r}")
    generator = torch.Generator().manual_seed(seed)
    sources = [markov_source(generator) for _ in range(2)]
    languages, labels = schedule(steps, undiscovered, generator)
    text = [sample(source, language, steps * BATCH, generator).view(steps, BATCH, -1) for language, source in enumerate(sources)]
    held_out = [sample(source, language, 1024, generator) for language, source in enumerate(sources)]
    torch.manual_seed(seed)
    net = Transformer()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY)
    for step, (language, label) in enumerate(zip(languages, labels)):
        if arm == "filter" and label == "F":
            continue
        optimizer.param_groups[0]["lr"] = LR * min((step + 1) / WARMUP, 1.0) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss = net.loss(text[language][step], forward_mode(arm, label))
        loss.backward()
        if arm == "sgtm" and label == "F":
            net.keep_quarantine_gradients()
        optimizer.step()
        if (step + 1) % 350 == 0:
            print(f"  seed {seed} {arm} {undiscovered:.0%}: step {step + 1}/{steps} loss {loss.item():.3f}", file=sys.stderr, flush=True)
    deployed = "on" if arm == "filter" else "off"
    with torch.no_grad():
        (before, after), (_, retain) = ([net.loss(batch, mode).item() for mode in ("on", deployed)] for batch in held_out)
    return Result(retain, before, after, BATCH * LENGTH * sum(x == 0 and y == "U" for x, y in zip(languages, labels)))


def forward_mode(arm: str, label: str) -> str:
    if arm != "filter" and label == "R":
        return "off"
    return "stop" if arm == "gr" and label == "F" else "on"


# ------------------------------------------------------------------------------------------------------------------ the text


def markov_source(generator: torch.Generator) -> Tensor:
    """Transition probabilities, [32, 32]; 1.9 to 2.2 nats a token, by the draw."""
    return (SHARPNESS * torch.randn(TOKENS, TOKENS, generator=generator)).softmax(-1)


def entropy_rate(source: Tensor) -> float:
    """Loss in nats a token of a model that knows the source."""
    stationary = torch.linalg.matrix_power(source.double(), 200)[0]
    return float(-(stationary[:, None] * source * source.log()).sum())


def sample(source: Tensor, language: int, count: int, generator: torch.Generator) -> Tensor:
    """Tag, then a uniform state, then LENGTH transitions of all sequences at once. [count, 2 + LENGTH]"""
    cumulative = source.cumsum(-1)
    states = [torch.full((count,), TOKENS + language), torch.randint(TOKENS, (count,), generator=generator)]
    for _ in range(LENGTH):
        drawn = torch.rand(count, 1, generator=generator)
        states.append((drawn > cumulative[states[-1]]).sum(-1).clamp(max=TOKENS - 1))
    return torch.stack(states, 1)


def schedule(steps: int, undiscovered: float, generator: torch.Generator) -> tuple[list[int], list[str]]:
    """Language (0 forget, 1 retain) and label of each step. Golden-ratio ranks spread a share evenly and nest the shares."""
    languages = torch.randint(2, (steps,), generator=generator).tolist()
    start, seen, labels = torch.rand(1, generator=generator).item(), [0, 0], []
    for language in languages:
        rank = (start + seen[language] * (math.sqrt(5) - 1) / 2) % 1
        seen[language] += 1
        if language == 0:
            labels.append("U" if rank < undiscovered else "F")
        else:
            labels.append("R" if rank < CLEAN else "U")
    return languages, labels


# ----------------------------------------------------------------------------------------------------------------- the model


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS + 2, WIDTH)  # tied to the output
        self.place = nn.Embedding(LENGTH + 1, WIDTH)
        for table in (self.embed, self.place):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)

    def loss(self, text: Tensor, mode: str) -> Tensor:
        """Mean over the LENGTH tokens that a transition made. text [b, 2 + LENGTH]; mode: quarantine on, off, or D stopped (GR)."""
        logits = self(text[:, :-1], mode)[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), text[:, 2:].flatten())

    def forward(self, text: Tensor, mode: str) -> Tensor:
        x = self.embed(text) + self.place.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x, mode)
        return self.norm(x) @ self.embed.weight.T

    def keep_quarantine_gradients(self) -> None:
        """SGTM after the backward of a flagged step: theta_D of every block gets no gradient; joint parameters keep theirs."""
        for block in self.blocks:
            for parameter, quarantined in block.split():
                parameter.grad *= quarantined

    @torch.no_grad()
    def delete_quarantine(self) -> None:
        for block in self.blocks:
            for parameter, quarantined in block.split():
                parameter *= ~quarantined


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, UNITS), nn.Linear(UNITS, WIDTH)
        self.register_buffer("heads", torch.arange(WIDTH) >= WIDTH - WIDTH // HEADS)  # quarantined entries of the heads' outputs
        self.register_buffer("units", torch.arange(UNITS) >= UNITS - QUARANTINED_UNITS)

    def forward(self, x: Tensor, mode: str) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # each [b, heads, T, d]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(gate(mixed, self.heads, mode))
        return x + self.down(F.gelu(gate(self.up(self.norm2(x)), self.units, mode)))

    def split(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Parameters that are theta_D or theta_Q entry by entry, with the mask of theta_Q; the biases b_O and b_2 are theta_D."""
        nothing = torch.zeros(WIDTH, dtype=torch.bool)
        return [(self.qkv.weight, self.heads.repeat(3)[:, None]), (self.out.weight, self.heads), (self.out.bias, nothing),
                (self.up.weight, self.units[:, None]), (self.up.bias, self.units), (self.down.weight, self.units),
                (self.down.bias, nothing)]


def gate(activation: Tensor, quarantined: Tensor, mode: str) -> Tensor:
    """on: as it is; off: the quarantine is zero; stop: same values, no gradient through D's entries."""
    if mode == "off":
        return torch.where(quarantined, 0.0, activation)
    return activation if mode == "on" else torch.where(quarantined, activation, activation.detach())


if __name__ == "__main__":
    main(sys.argv[1:])
