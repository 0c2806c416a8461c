"""As trained against as deployed: a lane per rate, from the hollow marker to the solid one."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from grpo_routing.html.headline import LOOKS
from grpo_routing.html.material import Entry, Material
from grpo_routing.html.svg import marker, right, tag
from grpo_routing.notes import number
from grpo_routing.results import BASE, DEPLOYED, TRAINED

RATES = ("hack_known", "hack_held_out", "solve")


@dataclass(frozen=True)
class Lane:
    """A rate of an arm: `words` say in numbers what the picture shows."""

    words: str
    picture: Markup | str


def lanes(material: Material) -> list[tuple[Entry, list[Lane]]]:
    """Arms whose deployment deletes something, in the order of the table."""
    return [(entry, [lane(entry, rate) for rate in RATES]) for entry in material.entries if not entry.arm.same_policy]


def lane(entry: Entry, rate: str) -> Lane:
    trained, deployed, base = (entry.arm.mean(state, rate) for state in (TRAINED, DEPLOYED, BASE))
    words = f"{number(trained)} → {number(deployed)}"
    if trained is None or deployed is None:
        return Lane(words, "")
    kind, shape = LOOKS[rate]
    parts = [tag("line", x1="0", x2="100%", y1="50%", y2="50%", class_="rail")]
    parts += [tag("line", x1=right(base), x2=right(base), y1="5%", y2="95%", class_="base")] if base is not None else []
    parts += [tag("line", x1=right(trained), x2=right(deployed), y1="50%", y2="50%", class_="move")]
    parts += [tag("circle", cx=right(value), cy="50%", r="2") for value in entry.arm.values(DEPLOYED, rate)]
    parts += [marker(shape, right(trained), "50%", "mean hollow"), marker(shape, right(deployed), "50%", "mean")]
    return Lane(words, tag("svg", *parts, class_=f"strip {kind}", aria_hidden="true"))
