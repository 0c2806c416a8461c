"""v_hack: the gradient that would make the model prefer the hacking persona's answer (vGROUT / grpo_proj2's extraction).

    row of a pair   grad NLL(hack) - grad NLL(clean), in the trained coordinates (dS for svd, the block for lora)
    v_hack          top-k right singular vectors of the rows, module by module, turned hack-ward (direction.py); with
                    `per_loophole` those of every loophole's own pairs, put together
    level: gradient   the basis is handed on, to project the summed gradient
    level: rollout    score = cosine (or dot product) of the rollout's own gradient with v_hack, the sum of all axes

The row equals the single-step GRPO gradient of a perfectly labelled pair (advantage +1 for the hack, -1 for the clean
answer). Reads authored pairs of *known* loopholes only: no label of a rollout, no judge, no oracle.
`advantage: unit` scores the gradient of advantage 1, so an unlucky group does not hide a hack; `live` that of the rollout's
own reward minus its group's mean, which is what training would follow.
Departure from the live loss: the NLL is a mean over tokens, the Dr.GRPO loss a sum over a constant, so short
completions weigh more here.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.mask_sources.direction import (
    Fit,
    alignment,
    completion_gradients,
    fit_basis,
    joined,
    overlap,
    pair_differences,
    random_frames,
    separation,
)
from grpo_routing.mask_sources.pair_source import DirectionSource
from grpo_routing.mask_sources.pairs import Pair, fingerprint
from grpo_routing.mask_sources.view import Memory, StepView
from grpo_routing.policy import Policy
from grpo_routing.projections.subspace import chance_share
from grpo_routing.types import Basis

OF_BASIS = ("none", "random", "shuffled", "nonhack", "inverted")
NOT_OF_THE_FIT = ("cache", "pairs", "refresh_every", "level", "calibration", "measure", "advantage", "overlap_floor", "when_stale")


@dataclass(frozen=True)
class PersonaGradient(DirectionSource):
    """Fitted with the quarantine ablated. `cache` is a folder; a fit is stored under a hash of the model, the adapter's state, the
    pairs and the settings that shape it."""

    measure: str
    advantage: str
    k: int
    per_loophole: bool
    tau: float
    floor: float
    micro_batch: int
    cache: str

    def __post_init__(self) -> None:
        choices = {"measure": ("cosine", "dot"), "advantage": ("unit", "live")}
        for name, legal in choices.items():
            if getattr(self, name) not in legal:
                raise ValueError(f"mask_source.{name} must be {' or '.join(legal)}; got {getattr(self, name)!r}")
        if self.k < 1 or not 0 <= self.tau <= 1 or not 0 <= self.floor < 1:
            raise ValueError(f"a direction needs k >= 1, tau in [0, 1] and floor in [0, 1); got {self.k}, {self.tau}, {self.floor}")
        super().__post_init__()

    @property
    def controls(self) -> tuple[str, ...]:
        return OF_BASIS if self.level == "gradient" else DirectionSource.controls

    @property
    def default_control(self) -> str:
        return "random" if self.level == "gradient" else "rate_matched"

    @property
    def reads(self) -> tuple[str, ...]:
        return ("pairs", *(("gradients",) if self.level == "rollout" else ()), *(("rewards",) if self.advantage == "live" else ()))

    def score(self, view: StepView, memory: Memory) -> tuple[Tensor, Memory]:
        held = {name.removeprefix("basis/"): rows for name, rows in memory.items() if name.startswith("basis/")}
        if not held or self.due(view.step):
            fresh = self.fit(view.policy).basis
            if held:
                memory = memory | self.refitted(torch.tensor(overlap(Basis(held), fresh)), view.step)
            held = fresh.modules
            memory = {name: value for name, value in memory.items() if not name.startswith("basis/")}
            memory |= {f"basis/{name}": rows for name, rows in held.items()}
        scores = alignment(view.grads, Basis(held), self.measure == "cosine")
        if self.advantage == "live":
            for rows in view.groups():
                scores[rows] = scores[rows] * (view.rewards[rows] - view.rewards[rows].mean())
        return scores, memory

    def fit(self, policy: Policy) -> Fit:
        """The basis for the policy as it stands, from the cache when the same fit was made before."""
        pairs = self.load()
        file = Path(self.cache) / f"{self._key(policy, pairs)}.safetensors"
        if not file.exists():
            self._store(file, self._fit(policy, pairs))
        with safe_open(file, "pt", device=str(policy.device)) as stored:
            # A copy: where a tensor lies in the file decides how it is rounded, and a checkpoint lays it elsewhere.
            rows = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118 - a safetensors handle is no dict
            return Fit(Basis(rows), json.loads(stored.metadata()["facts"]))

    def _fit(self, policy: Policy, pairs: list[Pair]) -> Fit:
        reserved = self.reserved(len(pairs))
        with policy.adapter.only(DEPLOYED):
            differences = self.differences(policy, pairs)
        fit_rows = [row for row in range(len(pairs)) if row not in reserved]
        basis = self._span(differences, fit_rows, [pair.loophole for pair in pairs])
        if self.control == "haar" or (self.control == "random" and self.level == "gradient"):
            basis = random_frames(basis, self.seed)
        if self.control == "inverted" and self.level == "gradient":  # by score, a rollout's own sign is turned
            basis = Basis({name: -rows for name, rows in basis.modules.items()})
        facts = {"pairs": float(len(fit_rows)), "modules": float(len(basis.modules)), "chance": chance_share(basis)}
        if reserved:
            facts["separation_held_out"] = separation({name: d[reserved] for name, d in differences.items()}, basis)
        return Fit(basis, facts)

    def _span(self, differences: dict[str, Tensor], rows: list[int], loopholes: list[str]) -> Basis:
        def of(part: list[int]) -> Basis:
            return fit_basis({name: own[part] for name, own in differences.items()}, self.k, self.tau, self.floor)

        if not self.per_loophole:
            return of(rows)
        parts = [[row for row in rows if loopholes[row] == loophole] for loophole in dict.fromkeys(loopholes)]
        return joined([of(part) for part in parts if part])

    def differences(self, policy: Policy, pairs: list[Pair]) -> dict[str, Tensor]:
        """One row per pair and module, [N, D]."""
        if self.control != "shuffled":
            return pair_differences(policy, pairs, self.first, "clean", self.micro_batch)
        order = self.dealt(len(pairs))
        grads = completion_gradients(policy, [(pair.prompt, text) for pair in pairs for text in (pair.hack, pair.clean)], self.micro_batch)
        return {name: g[order[: len(pairs)]] - g[order[len(pairs) :]] for name, g in grads.items()}

    def _key(self, policy: Policy, pairs: list[Pair]) -> str:
        settings = {name: value for name, value in asdict(self).items() if name not in NOT_OF_THE_FIT}
        # The number of threads changes the rounding, and a cached fit must be the one that this run would have made.
        state = (policy.fingerprint, policy.adapter.fingerprint(), torch.get_num_threads())
        key = (state, fingerprint(pairs), settings, self.kind)
        return hashlib.sha256(repr(key).encode()).hexdigest()[:24]

    @staticmethod
    def _store(file: Path, fit: Fit) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        save_file({name: rows.contiguous() for name, rows in fit.basis.modules.items()}, part, {"facts": json.dumps(fit.facts)})
        part.rename(file)
