"""The picture of deploy.json: rates over the quarantine's scale on the report set, and where each rule would stand."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from grpo_routing.figures import FAINT, GREY, HELD_OUT, INK, KNOWN, SOLVE, STYLE
from grpo_routing.files import write_atomic

LINES = {"hack_known": (KNOWN, "o", "hack, known"), "hack_held_out": (HELD_OUT, "D", "hack, held out"), "solve": (SOLVE, "o", "solve"),
         "monitored": (GREY, "", "monitored, with its bound")}
SHORT = {"zero": "zero", "monitor_ucb": "monitor", "oracle": "oracle (reads the truth)"}


def draw(said: dict, file: Path) -> None:
    """Write the figure; the same numbers give the same bytes."""
    from matplotlib import rc_context  # matplotlib takes a second to import; a refusal should not wait for it
    from matplotlib.figure import Figure

    curve = said["report"]["curve"]
    scales = [row["scale"] for row in curve]
    with rc_context(STYLE):
        figure = Figure(figsize=(6.6, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.fill_between(scales, [row["monitored"] for row in curve], [row["bound"] for row in curve], color=GREY, alpha=0.18, linewidth=0)
        for name, (colour, marker, words) in LINES.items():
            if all(row[name] is not None for row in curve):
                axes.plot(scales, [row[name] for row in curve], marker=marker, color=colour, markersize=4.5, linewidth=1.5, label=words)
        passed = "" if said["picks"]["monitor_ucb"]["scale"] is not None else ", no scale passes"
        axes.axhline(said["limit"], color=GREY, linewidth=1, linestyle=(0, (4, 2)), label=f"limit: base + {said['margin']:g}{passed}")
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.02, 1.02), xlabel="forward scale of the quarantine at deployment")
        axes.grid(color=FAINT, linewidth=0.6)
        marks: dict[float, list[str]] = {}
        for rule, pick in said["picks"].items():
            if pick["scale"] is not None:
                marks.setdefault(pick["scale"], []).append(SHORT[rule])
        for scale, rules in marks.items():
            axes.axvline(scale, color=INK, linewidth=0.9, linestyle=(0, (1, 1.5)), zorder=1)
            axes.annotate("\n".join(rules), (scale, 1.02), (0, 3), textcoords="offset points", fontsize=7.5, va="bottom",
                          ha="left" if scale < 0.15 else "right" if scale > 0.85 else "center")
        figure.suptitle(f"{said['run']}: report set, {curve[0]['asked']} problems", x=0.01, ha="left", fontsize=10, weight="bold")
        figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=7.5)
        data = BytesIO()
        figure.savefig(data, format="png", dpi=200, facecolor="white")
    write_atomic(file, data.getvalue())
