"""A training state on disk: safetensors + JSON, written at a step boundary under a temporary name, then renamed.

A killed and resumed run equals an uninterrupted one bit for bit on the CPU: all randomness is named by step, so the
parameters, the optimizer's moments, the fitted basis and the mask source's memory are the whole state.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from grpo_routing.adapters.adapter import Adapter
from grpo_routing.files import write_atomic, write_json
from grpo_routing.mask_sources.direction import Fit
from grpo_routing.train import State
from grpo_routing.types import Basis, Trusted


class UnusableRun(ValueError):
    """The folder cannot be used; the message says what was expected, what came and what to do."""


def save_checkpoint(folder: Path, adapter: Adapter, state: State, kept: int = 2) -> None:
    """`kept` 2 leaves the newest, and the one before it in case the newest is damaged; 0 leaves all."""
    place = folder / f"step-{state.step:06d}"
    part = folder / f".{place.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tensors = {f"adapter/{key}": value for key, value in adapter.state().items()}
    tensors |= {f"optimizer/{key}": value for key, value in state.optimizer.state().items()}
    if state.fit:
        tensors |= {f"basis/{name}": rows for name, rows in state.fit.basis.modules.items()}
        if isinstance(state.fit.basis, Trusted):
            tensors |= {f"trusted/{name}": weights for name, weights in state.fit.basis.weights.items()}
    tensors |= {f"memory/{name}": value for name, value in state.memory.items()}
    write_atomic(part / "state.safetensors", save({key: value.contiguous() for key, value in tensors.items()}))
    overlap = None if math.isnan(state.fit_overlap) else state.fit_overlap
    write_json(part / "state.json", {"step": state.step, "facts": state.fit.facts if state.fit else None, "fit_overlap": overlap,
                                     "rank": getattr(state.fit.basis, "rank", None) if state.fit else None})
    shutil.rmtree(place, ignore_errors=True)
    part.rename(place)
    write_atomic(folder / "latest", place.name.encode())
    for old in sorted(folder.glob("step-*"))[:-kept] if kept else []:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, adapter: Adapter, state: State) -> bool:
    """Bring adapter and state back to the newest checkpoint; False when there is none. Raises UnusableRun."""
    if not (folder / "latest").exists():
        return False
    place = folder / (folder / "latest").read_text()
    tensors, facts = load_file(place / "state.safetensors"), json.loads((place / "state.json").read_text())

    def part(prefix: str) -> dict:
        # Copies: a tensor that lies in the file unaligned is rounded otherwise than the one that was saved.
        return {key[len(prefix) :]: value.clone() for key, value in tensors.items() if key.startswith(prefix)}

    saved = part("adapter/")
    refuse_precision(saved, adapter, place)
    adapter.load_state(saved)
    state.optimizer.load_state(part("optimizer/"))
    state.step, state.memory = facts["step"], part("memory/")
    if facts["facts"] is not None:
        basis = part("basis/")
        state.fit = Fit(Basis(basis) if facts["rank"] is None else Trusted(basis, part("trusted/"), facts["rank"]), facts["facts"])
    state.fit_overlap = math.nan if facts["fit_overlap"] is None else facts["fit_overlap"]
    return True


def refuse_precision(saved: dict[str, Tensor], adapter: Adapter, place: Path) -> None:
    """Older code kept adapter parameters in a base's half precision, where small steps are lost. Widened they would be those of a run that
    no code computes from its start."""
    for key, own in adapter.state().items():
        if key in saved and saved[key].dtype != own.dtype:
            came, expected = (str(tensor.dtype).removeprefix("torch.") for tensor in (saved[key], own))
            raise UnusableRun(f"expected adapter parameters in {expected}; those of {place} are in {came}, by code that kept them in the "
                              "base's precision. Remove the run's folder and run it again, or go back to the commit in its provenance.json")
