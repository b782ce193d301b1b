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

from echo_vllm.policies import Cut, DraftBatch
from echo_vllm.step.drawn import draw_level
from echo_vllm.step.frontier import Frontier
from echo_vllm.transfer import upload
from echo_vllm.trees.drawn import DrawnPool
from echo_vllm.trees.draws import Sampling
from echo_vllm.trees.forest import ROOT, DraftForest

if TYPE_CHECKING:
    from echo_vllm.step.v1.drafter import EchoProposer


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
    cut: Cut,
) -> tuple[DrawnPool, DraftForest]:
    """Grow the trees of R requests; the arguments are those of `EchoProposer.draft_trees`, and

    Args:
        root_keys: [R] int64, of `draws.root_keys`.
        sampling: of the R requests.
        cut: of each request, known before (`DraftPolicy.drawn_cut`).
    """
    policy, device = proposer.policy, output.device
    num_requests, k = output.shape[0], policy.drawn_ranks
    frontier = Frontier(features, policy)
    pool = DrawnPool(root_keys, policy.drawn_survival(batch, device))
    for depth in range(1, policy.max_depth + 1):
        going = torch.ones(len(pool.active), dtype=torch.bool)
        if batch.depth_limits is not None:
            going = batch.depth_limits[pool.active] >= depth
        if depth > 1:
            going = going & policy.going(pool.deepest(), batch)
        if not going.any():
            break
        active = pool.active[going]
        pool.go_on(active)
        frontier.keep(active)
        rows = upload(active, device)
        if depth == 1:
            output, parents = output[rows], torch.full((len(active), 1), ROOT, device=device)
        else:
            level = pool.deepest()
            parents = policy.drawn_parents(level, batch).to(device)
            output = proposer.expand_level(
                frontier,
                frontier.advance((parents - level.first) // k),
                pool.tokens_of(parents),
                positions=last_positions[rows] + (depth - 1),
                context_lens=context_lens[rows],
                block_table=block_table[rows],
            )
        logits = proposer.draft_logits(output)
        draw_level(pool, policy, parents, logits, sampling, proposer.draft_offsets)
    floors = torch.full((num_requests,), cut.floor, device=device)
    floors[upload(batch.probes, device)] = max(cut.floor, cut.probed)
    most = num_requests * cut.max_nodes
    return pool, pool.take(most, cut.max_nodes, cut.least_worth, floors)
