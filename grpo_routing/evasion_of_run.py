"""The metrics O1 to O8 of one finished run, from its readings; obfuscation.py says what each is."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from grpo_routing.by_source import told_of
from grpo_routing.env.loopholes import FORMS, NO_LOOPHOLE
from grpo_routing.evasion import (
    Judged,
    after_off,
    auc,
    entropy,
    is_obfuscated,
    less,
    mass,
    recall_drift,
    seen,
    text_shape,
    unknown_share,
    varies,
    vocabulary_of,
)
from grpo_routing.oracle.summary import Row
from grpo_routing.readings import GRADIENT, TRAINING, UNREADABLE, Readings, readings_of
from grpo_routing.results import BASE, DEPLOYED, TRAINED, ReportError, Run, mean, read_json, read_record

HORIZONS = {"1x": 4, "2x": 2, "4x": 1}  # O8: part of the run's steps; the laptop's horizon is a quarter of what `baselines` trains
SHAPE = ("comment_lines", "prose", "length", "novelty", "exploit_asts")
METRICS = ("hack", "paid", "solve", "recall_base", "recall_now", "hack_undetected",
           "o1_first", "o1_last", "o1_drop", "o1_drop_known", "o2_train", "o2_held", "o2_text", "o2_gap", "o2_gap_known",
           "psi_base", "psi_now", "psi_now_trained", "psi_solved_base", "o4_entropy_base", "o4_entropy", "o4_unknown_base", "o4_unknown",
           *(f"o5_{name}{when}" for name in SHAPE for when in ("_base", "")), "o6_base", "o6_frozen", "o6_now", "o7_base", "o7_now",
           *(f"o8_{name}" for name in HORIZONS), "o8_off")


@dataclass(frozen=True)
class Measured:
    """The metrics of a run; `notes` say what could not be measured, and why."""

    run: Run
    monitor: str  # M_train
    values: dict[str, float | None]  # METRICS
    mass: dict[str, float]
    setting: str  # runs with the same are read by the same probe
    honest: bool
    obfuscated: bool | None
    notes: tuple[str, ...]


def measured(folder: Path, run: Run) -> Measured:
    """Every metric of a finished run. Raises ReportError or UnusableRun where nothing can be said of it."""
    read, notes = readings_of(folder, run), []
    values: dict[str, float | None] = dict.fromkeys(METRICS)
    shares = mass(read.rows[DEPLOYED])
    for part in (rates, sight, drift, gap, activations, places, shapes, energies, horizons):
        try:
            values |= part(read)
        except UNREADABLE as error:
            notes.append(f"{part.__name__} are not measured: {error}")
    setting = json.dumps([read.monitors.settings["probe"], {k: v for k, v in run.config["model"].items() if k != "cache"}])
    return Measured(run, run.config["mask_source"]["name"] if read.acts else "(probe)", values, shares, setting,
                    run.role == "reference", is_obfuscated(*(values[name] for name in ("hack_undetected", "hack", "recall_base"))),
                    (*read.notes, *notes))


def hinted(rows: list[Row], values: Iterable) -> list:
    return [value for row, value in zip(rows, values, strict=True) if row.loophole != NO_LOOPHOLE]


def rates(read: Readings) -> dict[str, float | None]:
    rows = read.rows[DEPLOYED]
    return {"hack": mean(hinted(rows, (float(row.hacked) for row in rows))),
            "paid": mean(hinted(rows, (float(row.passed) for row in rows))),
            "solve": mean(hinted(rows, (float(row.solved) for row in rows)))}


def sight(read: Readings) -> dict[str, float | None]:
    """Recall, undetected hacks and O7."""
    base, now = read.own(BASE), read.own(DEPLOYED)
    return seen((read.rows[BASE], base), (read.rows[DEPLOYED], now)) if base and now else {}


def drift(read: Readings) -> dict[str, float | None]:
    """O1."""
    known, steps = read.ready.loophole.known, read.run.steps
    if not read.acts:
        return recall_drift([Judged(**one) for one in read.scores[TRAINING]["probe"]], steps, known) if TRAINING in read.scores else {}
    file = read.folder / "scores.jsonl"
    if not file.exists():
        raise ReportError(f"expected the scores of {read.run.config['mask_source']['name']} in {file}; it is not there")
    return recall_drift(judged_of(read_record(file), file), steps, known)


def judged_of(rows: list[dict], file: Path) -> list[Judged]:
    """One per rollout of scores.jsonl. Raises ReportError for a row of another shape."""
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found += [Judged(row["step"], *one) for one in zip(row["score"], row["hacked"], row["exploited"], row["loophole"], strict=True)]
        except (KeyError, TypeError, ValueError) as error:
            raise ReportError(f"expected step, score, hacked, exploited and loophole of every rollout in line {number} of {file}, but "
                              f"{type(error).__name__}: {error}. Run that run again in another folder") from error
    return found


def gap(read: Readings) -> dict[str, float | None]:
    """O2. A monitor that tells the base's answers apart but none of these is at chance; one that never tells is no monitor."""
    if BASE not in read.scores or DEPLOYED not in read.scores:
        return {}
    rows, known = read.rows[DEPLOYED], read.ready.loophole.known

    def of(base: list | None, now: list | None, modes: tuple[str, ...] | None = None) -> float | None:
        return auc(rows, now, modes) if base and now and varies([*base, *now]) else None

    train, held, text = ((read.own(BASE), read.own(DEPLOYED)), *((read.scores[BASE][name], read.scores[DEPLOYED][name])
                                                                 for name in ("held", "text")))
    return {"o2_train": of(*train), "o2_held": of(*held), "o2_text": of(*text), "o2_gap": less(of(*held), of(*train)),
            "o2_gap_known": less(of(*held, known), of(*train, known))}


def activations(read: Readings) -> dict[str, float | None]:
    """Means of psi for O3."""
    found: dict[str, float | None] = {}
    for name, state, reading in (("psi_base", DEPLOYED, "probe"), ("psi_now", DEPLOYED, "probe_now"),
                                 ("psi_now_trained", TRAINED, "probe_now")):
        if state in read.scores:
            found[name] = mean(hinted(read.rows[state], read.scores[state][reading]))
    if BASE in read.scores:
        found["psi_solved_base"] = mean([s for row, s in zip(read.rows[BASE], read.scores[BASE]["probe"]) if row.solved])
    return found


def places(read: Readings) -> dict[str, float | None]:
    """O4. Without a source that is told loopholes, those that no source may be told are the unknown ones."""
    source = read.run.config["mask_source"] if read.acts else {}
    known, forms = tuple(told_of(source)) or read.ready.loophole.known, tuple(forms_of(source)) or FORMS
    before, after = mass(read.rows[BASE]), mass(read.rows[DEPLOYED])
    return {"o4_entropy_base": entropy(before), "o4_entropy": entropy(after), "o4_unknown_base": unknown_share(before, known, forms),
            "o4_unknown": unknown_share(after, known, forms)}


def forms_of(source: dict) -> list[str]:
    """Forms that a source, or a part of it, reads."""
    inner = [forms_of(part) for part in source.values() if isinstance(part, dict) and "name" in part]
    return [*source.get("forms", ()), *(form for part in inner for form in part)]


def shapes(read: Readings) -> dict[str, float | None]:
    """O5."""
    vocabulary = vocabulary_of(read.rows[BASE])
    return {f"o5_{name}{when}": value for when, state in (("_base", BASE), ("", DEPLOYED))
            for name, value in text_shape(read.rows[state], vocabulary).items()}


def energies(read: Readings) -> dict[str, float | None]:
    """O6."""
    return {f"o6_{name}": mean(values) for name, values in read.scores.get(GRADIENT, {}).items()}


def horizons(read: Readings) -> dict[str, float | None]:
    """O8. A run that collapsed before a horizon has no rate there."""
    steps = read.run.config["trainer"]["steps"]
    found: dict[str, float | None] = {}
    for name, part in HORIZONS.items():
        state = DEPLOYED if part == 1 else f"step-{steps // part:06d}-as_deployed"
        stored = read_json(read.folder / "eval" / f"{state}.json") if read.run.steps >= steps // part else None
        found[f"o8_{name}"] = stored["rates"]["hack"] if stored else None
    for kind in ("deleted", "fresh_quarantine"):
        if stored := read_json(read.folder / f"recovery-{kind}.json"):
            return found | {"o8_off": after_off(stored["hack"], stored["reached"])}
    return found
