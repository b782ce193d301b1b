# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What drawn children are worth: expected before they are drawn, and estimated afterwards.

Both ask with what probability recursive rejection (docs/drawn.md) would accept, if the target's
distribution were a guess p made from q by calibration. With the residuals' closed form
max(p - C q, 0) a parent's children take a few operations each over its most probable tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from echo_vllm.ops.argmax import best_of_rows
from echo_vllm.trees.draws import EXHAUSTED, Draws

LOOKED_AT = 32
"""A row's most probable tokens, from which the worth of its slots is estimated."""


def usual_acceptance(logprobs: torch.Tensor) -> torch.Tensor:
    """How probably a target takes a token of this draft log-probability, for any head.

    Only the shape of trees depends on it. Heads are too sure of themselves, and less so of what
    they think improbable.
    """
    return 0.7 * (0.6 * logprobs).exp()


def guess_target(
    draft_probs: torch.Tensor, curve: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """[..., n] float64, the target's distribution as calibration has it, summing to 1 at most.

    Args:
        draft_probs: [..., n], q of some tokens.
        curve: how probably the target takes a token of this draft log-probability, elementwise.
    """
    guess = curve(draft_probs.log().float()).double().masked_fill(draft_probs <= 0, 0.0)
    return guess / guess.sum(-1, keepdim=True).clamp(min=1.0)


def expected_gains(draft_probs: torch.Tensor, guess: torch.Tensor, k: int) -> torch.Tensor:
    """Before drawing: the probability that the r-th child is the accepted one, r = 1 .. k.

    The first is exactly the sum of min(p, q). From the second on what was drawn before is taken by
    its expectation, so these are estimates.

    Args:
        draft_probs: [..., n], q, or its most probable tokens; what is missing counts as no gain.
        guess: [..., n] float64, p of the same tokens; what is missing from 1 is elsewhere.
        k: children.

    Returns:
        [..., k] float32. They may rise: a q that is too sure of one token gains by getting it over
        with.
    """
    q = draft_probs.double()
    elsewhere = (1.0 - guess.sum(-1, keepdim=True)).clamp(min=0.0)
    unseen = (1.0 - q.sum(-1, keepdim=True)).clamp(min=0.0)
    still = torch.ones_like(q)  # the probability that a token is not drawn yet
    scale = torch.zeros_like(elsewhere)
    reach = torch.ones_like(elsewhere)
    gains = []
    for _ in range(k):
        rest = (guess - scale * q).clamp(min=0.0)
        total = rest.sum(-1, keepdim=True) + elsewhere
        left = (q * still).sum(-1, keepdim=True) + unseen
        possible = (left > EXHAUSTED) & (total > 0)
        draft, target = q * still / left.clamp(min=EXHAUSTED), rest / total.clamp(min=EXHAUSTED)
        accepted = torch.minimum(draft, target).sum(-1, keepdim=True) * possible
        gains.append(reach * accepted)
        reach = reach * (1.0 - accepted).clamp(min=0.0)
        rejected = (draft - target).clamp(min=0.0)
        share = rejected / (rejected.sum(-1, keepdim=True) + unseen).clamp(min=EXHAUSTED)
        still = (still - share).clamp(min=0.0)
        scale = scale + total / left.clamp(min=EXHAUSTED)
    return torch.cat(gains, -1).float()


def reaches_of(
    draft_probs: torch.Tensor, guess: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    """After drawing: the probability that each drawn child is the accepted one.

    Args:
        draft_probs: [rows, n], q.
        guess: [rows, n] float64, p of the same tokens.
        token_ids: [rows, k] int64, which of the n tokens were drawn, in their order; -1: none.

    Returns:
        [rows, k] float32.
    """
    q = draft_probs.double()
    there = token_ids >= 0
    drawn = q.gather(1, token_ids.clamp(min=0)).masked_fill(~there, 0.0)
    wanted = guess.gather(1, token_ids.clamp(min=0))
    elsewhere = (1.0 - guess.sum(1)).clamp(min=0.0)
    scale = torch.zeros_like(elsewhere)
    left = torch.ones_like(elsewhere)
    reach = torch.ones_like(elsewhere)
    found = []
    for rank in range(token_ids.shape[1]):
        total = (guess - scale.unsqueeze(1) * q).clamp(min=0.0).sum(1) + elsewhere
        left = torch.maximum(left, drawn[:, rank])
        draft = (drawn[:, rank] / left.clamp(min=EXHAUSTED)).clamp(min=EXHAUSTED)
        target = (wanted[:, rank] - scale * drawn[:, rank]).clamp(min=0.0)
        chance = (target / total.clamp(min=EXHAUSTED) / draft).clamp(max=1.0)
        chance = chance.masked_fill(~there[:, rank], 0.0)
        found.append(reach * chance)
        reach = reach * (1.0 - chance)
        scale = torch.where(there[:, rank], scale + total / left.clamp(min=EXHAUSTED), scale)
        left = left - drawn[:, rank]
    return torch.stack(found, 1).float()


def gains_and_reaches(
    draws: Draws, curve: Callable[[torch.Tensor], torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `DrawnPool.open` and `fill` want of some rows' draws, both [rows, k]: of the draws'
    distributions alone, and of what was drawn.

    Args:
        draws: as said.
        curve: of `guess_target`; None for a shape that is fixed: whatever is drawn, every slot
            stays.
    """
    ids, k = draws.token_ids, draws.token_ids.shape[1]
    if curve is None:
        ones = torch.ones(ids.shape, device=draws.probs.device)
        return ones, ones
    best, indices = best_of_rows(draws.probs, LOOKED_AT)
    # A row that is not finite has no children, and nothing to expect of them.
    gains = expected_gains(best, guess_target(best, curve), k).nan_to_num(0.0)
    # The drawn tokens first, whether they are among the best or not.
    again = (indices.unsqueeze(2) == ids.unsqueeze(1)).any(2)
    drawn = draws.probs.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0)
    probs = torch.cat([drawn, best.masked_fill(again, 0.0)], 1)
    places = torch.arange(k, device=ids.device).expand_as(ids).masked_fill(ids < 0, -1)
    return gains, reaches_of(probs, guess_target(probs, curve), places)
