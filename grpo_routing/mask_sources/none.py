"""No mask source: nothing is marked, nothing is measured along a direction."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NoSource:
    kind = "none"
    reads = ()
    uses_oracle = False
    refresh_every = 0
