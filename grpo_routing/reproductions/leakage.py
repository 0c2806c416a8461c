"""Leakage: how many unlabelled forget tokens reached what is deployed (SGTM, Shilov et al. 2025, arXiv:2512.05648, section 4.3 and
definition G.1), and the token weight of gradient routing (GR, Cloud et al. 2024, arXiv:2410.04332, appendix C and table 3).

    curve     loss(n) of standard models trained on all retain data and n forget tokens
    n*        the n at which the curve has the loss of the routed model after deletion; linear between its two neighbours
    leakage   n* / N_U, N_U the unlabelled forget tokens of the routed run; 1 for filtering by construction

    w_t = 1 - sigmoid(r - 1 / r - 4)        r = frequency of token t in forget text / in retain text

Differs from the papers: definition G.1 prints the forget set where the retain set is meant. The formula of w_t stands only in
the authors' code; it gives their table 3. Losses are uncalibrated, as in section 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

CURVE = ((0, 4.704), (1_900, 4.503), (15_000, 3.661), (138_000, 2.352))  # forget tokens, forget loss: mini-SGTM of the spec sheet
RUNS = (("SGTM 20 %", 138_000, 3.270, 0.38), ("SGTM 40 %", 276_000, 2.722, 0.40), ("GR 20 %", 138_000, 2.660, 0.79),
        ("filter 20 %", 138_000, 2.352, 1.0))  # name, unlabelled forget tokens, loss after deletion, leakage of the spec sheet
TOKENS = ((73.1 / 18.7, 0.586), (1.0, 0.982), (1 / 3.9, 1.000))  # r, w_t of the spec sheet


def main() -> None:
    print("leakage on the coarse curve of the spec sheet   n*       ours   spec sheet")
    tokens, losses = zip(*CURVE)
    for name, unlabelled, loss, expected in RUNS:
        print(f"  {name:<40} {equivalent_tokens(tokens, losses, loss):>9.0f} "
              f"{leakage(tokens, losses, loss, unlabelled):9.3f} {expected:9.2f}")
    print("weight of a token by its ratio of frequencies         ours   spec sheet")
    for ratio, expected in TOKENS:
        print(f"  r = {ratio:<46.3f} {token_weight(ratio):9.3f} {expected:9.3f}")


def leakage(tokens: Sequence[float], losses: Sequence[float], loss: float, unlabelled: float) -> float:
    """Share of the unlabelled forget tokens that the deployed model behaves as if it had trained on."""
    if unlabelled <= 0:
        raise ValueError(f"leakage divides by the unlabelled forget tokens, which must be > 0; got {unlabelled}. "
                         "A run with every forget token labelled has no leakage to measure")
    return equivalent_tokens(tokens, losses, loss) / unlabelled


def equivalent_tokens(tokens: Sequence[float], losses: Sequence[float], loss: float) -> float:
    """n*: the forget tokens at which a standard model reaches `loss`. Needs a curve of rising tokens and falling losses."""
    check_curve(tokens, losses)
    if not losses[-1] <= loss <= losses[0]:
        raise ValueError(f"the loss must lie on the curve, between {losses[-1]:g} and {losses[0]:g}; got {loss:g}. "
                         f"Train baselines on {'fewer' if loss > losses[0] else 'more'} forget tokens")
    after = next(index for index in range(1, len(losses)) if losses[index] <= loss)
    low, high = tokens[after - 1], tokens[after]
    way = (losses[after - 1] - loss) / (losses[after - 1] - losses[after])
    return high if way == 1 else low + (high - low) * way


def check_curve(tokens: Sequence[float], losses: Sequence[float]) -> None:
    if len(tokens) != len(losses) or len(tokens) < 2:
        raise ValueError(f"a curve needs at least two points, one loss for each token count; got {len(tokens)} token counts and "
                         f"{len(losses)} losses. Train more baselines")
    for index in range(1, len(tokens)):
        if not (tokens[index] > tokens[index - 1] and losses[index] < losses[index - 1]):
            raise ValueError("a curve must rise in tokens and fall in loss, or its inverse is not unique; got "
                             f"({tokens[index - 1]:g}, {losses[index - 1]:g}) before ({tokens[index]:g}, {losses[index]:g}). "
                             "Sort the points, or average more seeds")


def token_weight(ratio: float) -> float:
    """w_t of a token that is `ratio` times as frequent in forget text as in retain text; 1 leaves the token alone, 0 routes it.

    The authors count every token once more in forget and 20 times more in retain text before they divide.
    """
    if not ratio > 0:
        raise ValueError(f"a ratio of frequencies must be > 0; got {ratio}. Add the counts that the docstring names")
    return 1 / (1 + math.exp(min(ratio - 1 / ratio - 4, 700.0)))  # 1 - sigmoid(x) = sigmoid(-x); 700: exp stays finite


if __name__ == "__main__":
    main()
