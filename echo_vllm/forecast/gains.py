# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What drawn children are worth: expected before they are drawn, and estimated afterwards.

The target's distribution is not known, only how often a drawn token is accepted that the drafter
gave the probability q: h(q), a curve that rises. So a parent whose drafter is sure promises more
than one whose drafter is not, and a child that is drawn after rejections less than the first one.
Estimates decide about the shape of trees, never about what comes out (docs/drawn.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from echo_vllm.ops.argmax import best_of_rows
from echo_vllm.trees.draws import (
    EXHAUSTED,
    Draws,
    Sampling,
    draw_by_kernel,
    draw_children,
    has_kernel,
)

LOOKED_AT = 32
"""A row's most probable tokens, from which the worth of its slots is estimated."""

AFTER_REJECTIONS = (1.0, 0.5, 0.4, 0.35, 0.3)
"""Of h, what is left for the first child, the second, and so on: where a target rejected a token
its residual is where the drafter did not look."""

Curve = Callable[[torch.Tensor], torch.Tensor]
"""How probably a drawn token is accepted, by the probability that it was drawn with, elementwise
and not falling."""


@dataclass(frozen=True)
class PowerCurve:
    """scale * q ** exponent."""

    scale: float
    exponent: float

    def __call__(self, draft_probs: torch.Tensor) -> torch.Tensor:
        return self.scale * draft_probs**self.exponent


usual_acceptance = PowerCurve(0.9, 0.4)
"""For any head; measured on the demo's at temperature 1, where the first child of a row is accepted
0.27 of the time if its q is 0.006, 0.44 at 0.14, 0.66 at 0.39, 0.85 at 0.78."""


def expected_gains(draft_probs: torch.Tensor, curve: Curve, k: int) -> torch.Tensor:
    """Before drawing: the probability that the r-th child is the accepted one, r = 1 .. k.

    What was drawn before is taken by its expectation.

    Args:
        draft_probs: [..., n], q, or its most probable tokens; what is missing counts as no gain.
        curve: as said.
        k: children.

    Returns:
        [..., k] float32.
    """
    q = draft_probs.double()
    unseen = (1.0 - q.sum(-1, keepdim=True)).clamp(min=0.0)
    still = torch.ones_like(q)  # the probability that a token is not drawn yet
    reach = torch.ones_like(unseen)
    gains = []
    for rank in range(k):
        left = (q * still).sum(-1, keepdim=True) + unseen
        draft = q * still / left.clamp(min=EXHAUSTED)
        chances = curve(draft) * _after(rank)
        accepted = (draft * chances).sum(-1, keepdim=True) * (left > EXHAUSTED)
        gains.append(reach * accepted)
        reach = reach * (1.0 - accepted)
        rejected = draft * (1.0 - chances)
        share = rejected / (rejected.sum(-1, keepdim=True) + unseen).clamp(min=EXHAUSTED)
        still = (still - share).clamp(min=0.0)
    return torch.cat(gains, -1).float()


def reaches_of(drawn_probs: torch.Tensor, curve: Curve) -> torch.Tensor:
    """After drawing: the probability that each drawn child is the accepted one, [rows, k] float32.

    Args:
        drawn_probs: [rows, k], q of what was drawn, in its order; 0 where nothing was.
        curve: as said.
    """
    drawn = drawn_probs.double()
    left = 1.0 - (drawn.cumsum(1) - drawn)
    draft = (drawn / left.clamp(min=EXHAUSTED)).clamp(max=1.0)
    chances = curve(draft)
    for rank in range(drawn.shape[1]):
        chances[:, rank] *= _after(rank)
    chances = chances.masked_fill(drawn <= 0, 0.0)
    before = torch.cat([torch.ones_like(draft[:, :1]), (1.0 - chances)[:, :-1].cumprod(1)], 1)
    return (before * chances).float()


def draw_and_weigh(
    logits: torch.Tensor, k: int, keys: torch.Tensor, sampling: Sampling, curve: Curve | None
) -> tuple[Draws, torch.Tensor, torch.Tensor]:
    """`draw_children` of some rows, and their `gains_and_reaches`."""
    if isinstance(curve, PowerCurve) and has_kernel(logits):
        return draw_by_kernel(logits, k, keys, sampling, (curve.scale, curve.exponent))
    draws = draw_children(logits, k, keys, sampling)
    return draws, *gains_and_reaches(draws, curve)


def gains_and_reaches(draws: Draws, curve: Curve | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What `DrawnPool.open` and `fill` want of some rows' draws, both [rows, k]: of the draws'
    distributions alone, and of what was drawn.

    Args:
        draws: as said.
        curve: as said; None for a shape that is fixed: whatever is drawn, every slot stays.
    """
    ids = draws.token_ids
    if curve is None:
        ones = torch.ones(ids.shape, device=draws.probs.device)
        return ones, ones
    best, _ = best_of_rows(draws.probs, LOOKED_AT)
    # A row that is not finite has no children, and nothing to expect of them.
    gains = expected_gains(best, curve, ids.shape[1]).nan_to_num(0.0)
    drawn = draws.probs.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0)
    return gains, reaches_of(drawn, curve)


def _after(rank: int) -> float:
    return AFTER_REJECTIONS[min(rank, len(AFTER_REJECTIONS) - 1)]
