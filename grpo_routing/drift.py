"""How far update directions drift: TDGA's diagnostic (routing.md §3.2), of any run that keeps its checkpoints.

    CCA_k(U_t, U_s) = mean of the singular values of U_t^T U_s,   U_t the top-k left singular vectors of W_t - W_0

1: the same directions; for random ones of rank 1 in d dimensions about sqrt(2 / (pi d)). Its claim: a clean run keeps its dominant
directions, one that starts to hack turns them.

    python -m grpo_routing.drift outputs/X/runs/RUN --first 20 --last 60     # trainer.checkpoints_kept=0
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def left_directions(update: Tensor, k: int) -> Tensor:
    """Top-k left singular vectors of an update [d_out, d_in], [d_out, k]."""
    return torch.linalg.svd(update.double(), full_matrices=False)[0][:, :k]


def canonical(one: Tensor, other: Tensor) -> float:
    """CCA_k of two frames [d, k] with orthonormal columns; the mean is over the smaller k."""
    return float(torch.linalg.svdvals(one.double().T @ other.double()).mean())


def updates(folder: Path) -> dict[str, Tensor]:
    """Deployed update of every module in a LoRA checkpoint, up to its scale. Raises ValueError for another adapter."""
    state = load_file(folder / "state.safetensors")
    found = {}
    for key, value in state.items():
        if key.startswith("adapter/deployed/") and key.endswith("/B"):
            found[key.removeprefix("adapter/deployed/").removesuffix("/B")] = value @ state[key.removesuffix("B") + "A"]
    if not found:
        raise ValueError(f"{folder} holds no LoRA of the deployed block")
    return found


def between(run: Path, first: int, last: int, ranks: tuple[int, ...]) -> dict[str, dict[int, float]]:
    """Module -> k -> CCA_k between two checkpoints. Raises FileNotFoundError with those that there are."""
    folders = [run / "checkpoints" / f"step-{step:06d}" for step in (first, last)]
    for folder in folders:
        if not folder.is_dir():
            kept = ", ".join(sorted(path.name for path in (run / "checkpoints").glob("step-*"))) or "none"
            raise FileNotFoundError(f"no {folder}; the run kept {kept}. Train with trainer.checkpoints_kept=0 to keep all")
    one, other = (updates(folder) for folder in folders)
    return {name: {k: canonical(left_directions(one[name], k), left_directions(other[name], k)) for k in ranks} for name in one}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="grpo_routing.drift", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--first", type=int, default=20)
    parser.add_argument("--last", type=int, default=60)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5])
    asked = parser.parse_args(arguments)
    try:
        found = between(asked.run, asked.first, asked.last, tuple(asked.k))
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{'module':44}" + "".join(f"  CCA_{k:<4}" for k in asked.k))
    for name, values in found.items():
        print(f"{name:44}" + "".join(f"  {values[k]:8.3f}" for k in asked.k))
    for word, reduce in (("mean", lambda v: sum(v) / len(v)), ("worst", min)):
        print(f"{word:44}" + "".join(f"  {reduce([values[k] for values in found.values()]):8.3f}" for k in asked.k))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
