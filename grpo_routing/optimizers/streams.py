"""The check that every stream of `split_moment` arrived: nothing may turn it into plain AdamW unseen (graft.md T31)."""

from __future__ import annotations

from grpo_routing.projections.subspace import Update


def check_streams(update: Update, natural: Update | None, participation: dict[str, float] | None, exponent: float) -> None:
    """Nothing may fall back to plain AdamW unseen (T31). The unmasked gradients are demanded whatever the setting, so that
    a control with second_moment=routed differs from its arm in that word alone."""
    for block, routed in update.items():
        captured = natural[block] if natural is not None and block in natural else {}
        if missing := sorted(routed.keys() - captured.keys()):
            raise RuntimeError(f"split_moment needs the unmasked gradient of every module in the update; block {block!r} lacks "
                               f"{len(missing)} of {len(routed)} ({', '.join(missing[:3])}). Capture it in the gradient pass "
                               "(needs_natural) and hand it to step(natural=), or choose optimizer=adamw.")
        if exponent and (participation is None or block not in participation):
            raise RuntimeError(f"optimizer.participation={exponent} needs the share of rollouts that train block {block!r}; got "
                               "none. Hand it to step(participation=), or set optimizer.participation=0.")
        if exponent and not 0 < participation[block] <= 1:
            raise ValueError(f"the share of rollouts that train block {block!r} must lie in (0, 1]; got {participation[block]}. "
                             "Leave the block out of the update when no rollout trains it.")
