"""The slot for comparisons: differences that were worked out elsewhere, rendered as they come. Nothing is computed here but places."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from grpo_routing.html.svg import marker, right, tag


@dataclass(frozen=True)
class Compared:
    """One difference of a rate, arm minus `against`, in [-1, 1] with its interval. `p` and `verdict` are None where there is none;
    `note` says what a reader must know, say which correction."""

    arm: str
    against: str
    rate: str
    difference: float
    low: float
    high: float
    p: float | None = None
    verdict: str | None = None  # confirmed, falsified, undecided
    note: str = ""

    @property
    def picture(self) -> Markup:
        """The interval on an axis from -1 to 1, with zero in the middle."""
        low, here, high = (right((value + 1) / 2) for value in (self.low, self.difference, self.high))
        return tag("svg", tag("line", x1="0", x2="100%", y1="50%", y2="50%", class_="rail"),
                   tag("line", x1="50%", x2="50%", y1="0", y2="100%", class_="goal"),
                   tag("line", x1=low, x2=high, y1="50%", y2="50%", class_="whisker"), marker("disc", here, "50%", "mean"),
                   class_="strip ink", aria_hidden="true")
