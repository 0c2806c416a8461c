"""Frozen monitors that judge finished runs, and what a run's own mask source says of its last answers (baselines.md G1, G2).

    probe   psi(y, theta0), psi(y, theta): the pairs' direction in activations, fitted once on the base model. theta0 reads with all blocks
            off, theta with the policy as it stands. One ruler for every run; known loopholes only, as an arm's own would be
    held    M_held: the same machinery on pairs that the run's own source does not read, of *every* loophole: nobody trains against it, and
            what it knows reaches no training. For a run whose own source is a direction too, `text` is the one of another family
    text    naive Bayes on the answers' words (mask_sources/text_monitor.py)
    own     M_train: the mask source of the run, with the memory of its last checkpoint; a subspace scores by the gradient's cosine with the
            basis of the untrained policy, which is the frozen one

Everything here measures; no score carries a gradient.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.build import Plan, build_line
from grpo_routing.decision import unit_gradients
from grpo_routing.mask_sources.calibration import Calibration
from grpo_routing.mask_sources.direction import alignment
from grpo_routing.mask_sources.persona_activation import PersonaActivation, along
from grpo_routing.mask_sources.text_monitor import TextMonitor
from grpo_routing.mask_sources.view import Memory, StepView
from grpo_routing.oracle.summary import Row
from grpo_routing.policy import Policy
from grpo_routing.train import Line, State
from grpo_routing.types import STUDENT, Basis, Rollout, RolloutGrads, TokenBatch

CHUNK = 64  # answers per forward: a step's worth on the laptop
PAIRS = "prog.yaml"  # of probe and text monitor: the file that arms read too
HELD_PAIRS = ("prog_matched.yaml", "persona.yaml", PAIRS)  # of M_held: the first that the run's own source does not read
LAYERS, POSITION = (0, 1), "mean"  # conf/mask_source/persona_activation.yaml
UNUSED = Calibration("threshold", 0.0, 0.0, None, 0.0, 1.0, 0, 0.0)  # scores are read, nothing is flagged
FITTED = {"control": "none", "seed": 0, "calibration": UNUSED, "held_out": 0, "refresh_every": 0, "overlap_floor": 0.0,
          "when_stale": "warn"}  # every pair fits: what separates is measured on rollouts
PROBE = FITTED | {"level": "rollout", "place": "residual", "layers": LAYERS, "position": POSITION, "model": "base", "statistic": "mean"}
Scores = list[float | None]


@dataclass(frozen=True)
class Monitors:
    probe: PersonaActivation
    held: PersonaActivation
    text: TextMonitor

    @staticmethod
    def of(known: tuple[str, ...], everything: tuple[str, ...], read: set[str]) -> Monitors:
        """For a world's known loopholes and all of its loopholes; `read` are the pair files of the run's own source."""
        held = next(file for file in HELD_PAIRS if file not in read)
        return Monitors(PersonaActivation(pairs=PAIRS, known=known, **PROBE), PersonaActivation(pairs=held, known=everything, **PROBE),
                        TextMonitor(pairs=PAIRS, known=known, smoothing=1.0, pool="sum", **FITTED))

    def fit(self, policy: Policy) -> dict[str, Memory]:
        """Directions of the base model (the adapter off) and the words' weights."""
        return {"probe": self.probe.probe(policy), "held": self.held.probe(policy), "text": self.text.fit(policy)}

    def read(self, policy: Policy, memory: dict[str, Memory], answers: list[Answer]) -> dict[str, Scores]:
        """Scores by monitor; `probe_now` is read with the policy as it stands (`adapter.only(DEPLOYED)` around it: as deployed)."""
        found: dict[str, list[Tensor]] = {"probe": [], "probe_now": [], "held": []}
        for at in range(0, len(answers), CHUNK):
            tokens = TokenBatch.of([(one.prompt, one.completion) for one in answers[at : at + CHUNK]], policy.pad, policy.device)
            start, now = (states(self.probe, policy, tokens, base) for base in (True, False))  # held reads the same places as probe
            found["probe"].append(along(start, memory["probe"]))
            found["probe_now"].append(along(now, memory["probe"]))
            found["held"].append(along(start, memory["held"]))
        return {name: finite(torch.cat(parts)) for name, parts in found.items()} | {
            "text": finite(self.text.read(policy, [one.text for one in answers], memory["text"]))}

    @property
    def settings(self) -> dict:
        """What a kept reading depends on, as JSON."""
        return {name: {"pairs": monitor["pairs"], "known": list(monitor["known"])} for name, monitor in asdict(self).items()}


@torch.no_grad()
def states(probe: PersonaActivation, policy: Policy, tokens: TokenBatch, base: bool) -> dict[str, Tensor]:
    """What psi(y, theta0) reads, with all blocks off, or psi(y, theta), with the policy as it stands: place -> [B, d]."""
    if base:
        return probe.activations(policy, tokens)
    return dict(zip(map(str, probe.layers), policy.hidden_at(tokens, probe.layers, probe.position)))


@dataclass(frozen=True)
class Answer:
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    text: str

    @staticmethod
    def of(policy: Policy, prompts: list[str], texts: list[str], limit: int) -> list[Answer]:
        """Answers as the policy reads them. One of `limit` tokens was cut off; a shorter one ended by itself."""
        encoded = [policy.encode(text) for text in texts]
        ended = [ids if len(ids) >= limit else (*ids, policy.end) for ids in encoded]
        return [Answer(*parts) for parts in zip(policy.encode_prompts(prompts), ended, texts, strict=True)]


# ------------------------------------------------------------------------------------------------ the run's own source


def acts(ready: Plan) -> bool:
    """Whether the mask source of a run reaches its training and says something of a rollout. One that only measures (`vanilla`) is nothing
    that the run could evade."""
    return ready.source_acts and ready.mask_source.kind in ("rollout", "subspace")


def own_scores(ready: Plan, policy: Policy, state: State, basis: Basis | None, rows: list[Row],
               answers: list[Answer], step: int, quarantine: float) -> Scores:
    """M_train's scores, of a source without any its flags. Its noise is drawn as in `step`; `quarantine` is the forward scale that the
    answers were sampled with."""
    line = build_line(ready, policy, None, None, problems=[])
    found, memory = [], state.memory
    for at in range(0, len(rows), CHUNK):
        part = slice(at, at + CHUNK)
        view = view_of(ready, line, step, at, rows[part], answers[part], basis, quarantine)
        if ready.mask_source.kind == "subspace":
            found.append(alignment(view.grads, basis))
            continue
        labels, memory = ready.mask_source.label(view, memory)
        found.append(labels.flagged if labels.scores is None else labels.scores)
    return finite(torch.cat(found))


def view_of(ready: Plan, line: Line, step: int, first: int, rows: list[Row], answers: list[Answer], basis: Basis | None,
            quarantine: float) -> StepView:
    """Judged answers as a step shows them to a source, one prompt each. Only an arm that says `uses_oracle` is shown the verdicts."""
    rollouts = [Rollout(first + at, one.prompt, one.completion, one.text, STUDENT, (), quarantine) for at, one in enumerate(answers)]
    tokens = TokenBatch.of([(one.prompt, one.completion) for one in answers], line.policy.pad, line.policy.device)
    terms = torch.tensor([[row.format_ok, row.passed] for row in rows], dtype=torch.float32, device=line.policy.device).T
    rewards = ready.reward.format_reward * terms[0] + ready.reward.pass_reward * terms[1]
    view = StepView(step, rollouts, tokens, rewards, line.policy, basis, None, None, terms)
    if line.mask_source.uses_oracle:
        view = replace(view, ceiling=lambda: torch.tensor([float(row.hacked) for row in rows]))
    if "gradients" in line.mask_source.reads or line.mask_source.kind == "subspace":
        view = replace(view, grads=unit_gradients(line, view, torch.ones_like(view.rewards)).grads[DEPLOYED])
    return view


def energy(grads: RolloutGrads, basis: Basis) -> Tensor:
    """O6: |P_V g|^2 / |g|^2 of every rollout's gradient, over all modules, [B]; nan for a gradient of zero."""
    inside = torch.stack([(grads.modules[name] @ rows.T).square().sum(1) for name, rows in basis.modules.items()]).sum(0)
    whole = grads.norms().square()
    return torch.where(whole > 0, inside / whole.clamp_min(1e-30), torch.nan)


def hack_energies(ready: Plan, policy: Policy, bases: dict[str, Basis], rows: list[Row], answers: list[Answer],
                  quarantine: float) -> dict[str, Scores]:
    """`energy` of true hacks alone, in each basis."""
    line, hacks = build_line(ready, policy, None, None, problems=[]), [at for at, row in enumerate(rows) if row.hacked]
    found: dict[str, Scores] = {name: [] for name in bases}
    for at in range(0, len(hacks), CHUNK):
        chosen = hacks[at : at + CHUNK]
        view = view_of(ready, line, 0, at, [rows[i] for i in chosen], [answers[i] for i in chosen], None, quarantine)
        for name, basis in bases.items():
            found[name] += finite(energy(view.grads, basis))
    return found


def finite(scores: Tensor) -> Scores:
    """As plain numbers, rounded as the audit rounds; None for what is not one."""
    return [round(value, 6) if math.isfinite(value) else None for value in scores.double().tolist()]
