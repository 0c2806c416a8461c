"""Negative controls: what a source says, with its meaning taken out. `mask_source.control` is the one word that differs.

Of every source that labels rollouts; as many flags in every step as the source's own, and as many trusted rollouts:

    rate_matched   on rollouts drawn at random from the whole step
    permuted       on rollouts drawn at random from the same prompt: says that the prompt matters, not the answer
    inverted       on rollouts that the source did not flag, as far as there are any
    prompt_only    on whole prompts, those with the most flags first: what the source knows about prompts alone

Of every source that scores: `random`, draws in place of scores, and `inverted`, the scores turned round, each through the same calibration
(so under a rule that is no fixed share the count is another). Sources that read pairs add
their own (direction.py). A mask source means nothing beside a vanilla run alone; in earlier work a random direction often
did as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_routing.mask_sources.view import StepView
from grpo_routing.rollout import uniforms
from grpo_routing.types import Labels

OF_LABELS = ("none", "rate_matched", "permuted", "inverted", "prompt_only")


def controlled(control: str, labels: Labels, view: StepView, seed: int) -> Labels:
    """The labels of the step as the control gives them: the same ones, dealt to other rollouts."""
    if control not in OF_LABELS[1:]:
        return labels  # none, or a control that was applied to the scores or the pairs
    return labels.at(ORDERS[control](labels, draws(control, view, seed), view))


def draws(control: str, view: StepView, seed: int) -> Tensor:
    """One number in [0, 1) per rollout, by name, [B]."""
    return uniforms([(control, seed, *name) for name in view.names()], 1)[:, 0]


def ranked(labels: Labels) -> Tensor:
    """Rows from the highest flag to the trusted."""
    return (labels.flagged.double() - labels.trusted.double()).cpu().argsort(descending=True, stable=True)


def rate_matched(labels: Labels, noise: Tensor, view: StepView) -> Tensor:
    """The highest flags to the smallest draws: nothing of the source but how many there are reaches the run."""
    order = torch.empty(len(noise), dtype=torch.long)
    order[noise.argsort()] = ranked(labels)
    return order


def permuted(labels: Labels, noise: Tensor, view: StepView) -> Tensor:
    order = torch.arange(len(noise))
    for rows in view.groups():
        own = torch.tensor(rows)
        order[own[noise[own].argsort()]] = own[ranked(Labels(labels.flagged[own], labels.trusted[own]))]
    return order


def inverted(labels: Labels, noise: Tensor, view: StepView) -> Tensor:
    """The rollout with the k-th lowest flag gets the label of the one with the k-th highest; ties by draw."""
    flags = labels.flagged.double().cpu()
    ranked = (flags + 1e-9 * noise).argsort()  # lowest first
    order = torch.empty_like(ranked)
    order[ranked] = (flags + 1e-9 * noise).argsort(descending=True)
    return order


def prompt_only(labels: Labels, noise: Tensor, view: StepView) -> Tensor:
    """Highest flags to the prompts with the most of them; within a prompt by draw."""
    flags = labels.flagged.double().cpu()
    worth = torch.zeros(len(flags), dtype=torch.double)
    for rows in view.groups():
        worth[rows] = flags[rows].mean() + 1e-6 * noise[rows[0]]  # ties between prompts by draw
    takers = (worth + 1e-9 * noise).argsort(descending=True)
    order = torch.empty_like(takers)
    order[takers] = flags.argsort(descending=True, stable=True)
    return order


ORDERS = {"rate_matched": rate_matched, "permuted": permuted, "inverted": inverted, "prompt_only": prompt_only}
