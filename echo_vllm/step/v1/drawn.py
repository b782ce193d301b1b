# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Drafting by drawing: the trees of requests whose candidates are drawn (docs/drawn.md).

The forwards are those of `EchoProposer`. What differs is what becomes of a forward's output: a
policy gives out the slots of a level, then they are drawn, and the forest is cut by numbers that
were known before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from echo_vllm.forecast.gains import expected_gains, guess_target, reaches_of
from echo_vllm.policies import DraftBatch, DraftPolicy
from echo_vllm.step.frontier import Frontier
from echo_vllm.trees.drawn import DrawnPool
from echo_vllm.trees.draws import Draws, Sampling, draw_children
from echo_vllm.trees.forest import ROOT, DraftForest

if TYPE_CHECKING:
    from echo_vllm.step.v1.drafter import EchoProposer

LOOKED_AT = 32
"""A row's most probable tokens, from which the worth of its slots is estimated."""

_FAR = 1e9


def draw_trees(
    proposer: EchoProposer,
    *,
    output: torch.Tensor,
    features: torch.Tensor,
    context_lens: torch.Tensor,
    last_positions: torch.Tensor,
    block_table: torch.Tensor,
    root_keys: torch.Tensor,
    sampling: Sampling,
    batch: DraftBatch,
    max_nodes: int,
) -> tuple[DrawnPool, DraftForest]:
    """Grow the trees of R requests; the arguments are those of `EchoProposer.draft_trees`, and

    Args:
        root_keys: [R] int64, of `draws.root_keys`.
        sampling: of the R requests.
        max_nodes: of each request, known before (`DraftPolicy.drawn_nodes`).
    """
    policy, device = proposer.policy, output.device
    num_requests, k = output.shape[0], policy.num_ranks
    frontier = Frontier(features, policy)
    pool = DrawnPool(root_keys)
    parents = torch.full((num_requests, 1), ROOT, device=device)
    level_start = 0
    for depth in range(1, policy.max_depth + 1):
        going = torch.ones(num_requests, dtype=torch.bool)
        if batch.depth_limits is not None:
            going = batch.depth_limits >= depth
        if depth > 1:
            going = going & policy.going(depth, pool, batch)
            if not going.any():
                break
            parents = policy.drawn_parents(depth, pool).to(device)
            under = (parents - level_start) // k
            level_start += k * frontier.width
            output = proposer.expand_level(
                frontier,
                frontier.advance(under),
                pool.tokens_of(parents),
                positions=last_positions + (depth - 1),
                context_lens=context_lens,
                block_table=block_table,
            )
        elif not going.any():
            break
        logits = proposer.draft_logits(output).float()
        logits = logits.nan_to_num(nan=-_FAR, posinf=_FAR, neginf=-_FAR)
        width = parents.shape[1]
        keys = pool.keys_of(parents).flatten()
        draws = draw_children(logits, k, keys, _of_rows(sampling, width))
        gains, reaches = _estimates(policy, draws, k)
        level = pool.open(parents, gains.view(num_requests, width, k))
        widths = policy.drawn_widths(level).to(device)
        widths = widths.masked_fill(~going.to(device).unsqueeze(1), 0)
        tokens = draws.token_ids.clamp(min=0)
        offsets = proposer.draft_offsets
        if offsets is not None:
            tokens = tokens + offsets[tokens]
        pool.fill(level, widths, draws, tokens, reaches)
    return pool, pool.take(num_requests * max_nodes, max_nodes)


def _of_rows(sampling: Sampling, width: int) -> Sampling:
    """The same for `width` rows of every request."""

    def rows(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values.repeat_interleave(width)

    return Sampling(
        sampling.temperature.repeat_interleave(width),
        rows(sampling.top_k),
        rows(sampling.top_p),
        rows(sampling.min_p),
    )


def _estimates(policy: DraftPolicy, draws: Draws, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `DrawnPool.open` and `fill` want, both [rows, k]: of the draws' distributions alone, and
    of what was drawn."""
    acceptance = policy.acceptance
    if acceptance is None:  # A fixed shape: whatever is drawn, every slot stays.
        ones = torch.ones(draws.token_ids.shape, device=draws.probs.device)
        return ones, ones
    best = draws.probs.topk(min(LOOKED_AT, draws.probs.shape[1]), dim=1)
    gains = expected_gains(best.values, guess_target(best.values, acceptance), k)
    # The drawn tokens first, whether they are among the best or not.
    ids = draws.token_ids
    again = (best.indices.unsqueeze(2) == ids.unsqueeze(1)).any(2)
    drawn = draws.probs.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0)
    probs = torch.cat([drawn, best.values.masked_fill(again, 0.0)], 1)
    places = torch.arange(k, device=ids.device).expand_as(ids).masked_fill(ids < 0, -1)
    return gains, reaches_of(probs, guess_target(probs, acceptance), places)
