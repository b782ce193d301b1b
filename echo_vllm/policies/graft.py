# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`graft`: unsure requests draft less, and a table of successors fills what that leaves free.

Graft (arXiv 2605.20104) prunes by the same signal as ECHO: at a gate a request whose best path is
not probable enough stops drafting and keeps only its best nodes, the fewer the earlier it stopped.
The places of its tree that are left are filled by retrieval (`retrieval`), under the same root.
Every tree keeps its size; a request that passes all gates has a drafted tree and nothing else.

The one policy with a memory of its own: the table. It learns from the target's logits, which all
tensor-parallel ranks have, so it is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from echo_vllm import ops
from echo_vllm.policies.base import DraftBatch
from echo_vllm.policies.retrieval import RankTemplate, SuccessorTable, fill
from echo_vllm.trees.forest import DraftForest
from echo_vllm.trees.pool import NO_CANDIDATE, CandidatePool, Expansion

KEPT = {1: 8 / 60, 2: 24 / 60, 6: 40 / 60}
"""Share of the tree's places that a request keeps for drafted nodes if it stops at this depth: the
paper's checkpoints; in between on a line."""

CANDIDATES = 2
"""Retrieved candidates for each place of a tree, of which the most probable are taken."""


def kept_share(depth: int) -> float:
    """Share of its places that a request that stops at `depth` keeps for drafted nodes."""
    return float(np.interp(depth, list(KEPT), list(KEPT.values())))


class GraftPolicy:
    """Prune, then fill the freed places by retrieval."""

    def __init__(
        self,
        *,
        max_nodes: int,
        max_depth: int,
        top_k: int,
        width: int,
        gates: Mapping[int, float],
        k_max: int | None,
    ) -> None:
        """
        Args:
            max_nodes: nodes of every tree (N).
            max_depth: levels of the deepest tree, drafted or retrieved.
            top_k, width, gates: as for `EchoPolicy`.
            k_max: the most nodes of the batch, which all requests share equally; None for N each.
        """
        self.max_nodes = max_nodes
        self.max_depth = max_depth
        self.num_ranks = width
        self.max_frontier = top_k
        self.gates = dict(gates)
        self.k_max = k_max
        self.table: SuccessorTable | None = None
        """Made with the first logits, which say how large it must be and where."""
        self.template = RankTemplate.best(CANDIDATES * max_nodes, max_depth)
        self._shares = torch.tensor(
            [kept_share(depth) if depth < max_depth else 1.0 for depth in range(max_depth + 1)]
        )

    def observe(self, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """Learn from a forward of the target: [n] tokens and the [n, V] logits after them."""
        if self.table is None:
            self.table = SuccessorTable(logits.shape[1], device=logits.device)
        self.table.observe(tokens, logits)

    def limit(self, batch: DraftBatch) -> int:
        """Nodes that each request's tree may have."""
        if self.k_max is None:
            return self.max_nodes
        budget = max(0, self.k_max - batch.plan.prefill_tokens)
        return min(self.max_nodes, budget // max(1, batch.num_requests))

    def expand(self, depth: int, pool: CandidatePool, batch: DraftBatch) -> Expansion | None:
        if depth == 1:
            return Expansion(frontier=None, children=None)
        going = None
        if depth - 1 in self.gates:
            best = pool.rows_of(pool.active, pool.best_of_level(depth - 1))
            going = best.exp() > self.gates[depth - 1]
        return pool.expand_best(depth, self.max_frontier, going)

    def select(self, pool: CandidatePool, batch: DraftBatch) -> DraftForest:
        limit = self.limit(batch)
        reached = pool.first_of_levels().sum(1)
        kept = (pool.on_device(self._shares)[reached] * limit).ceil()
        scores = pool.path_logprobs.masked_fill(pool.rank() >= kept.unsqueeze(1), NO_CANDIDATE)
        tiers = torch.zeros_like(scores, dtype=torch.int32)
        columns, cu_nodes = ops.select_budget(
            scores, tiers, pool.parents, limit * pool.num_requests, limit
        )
        forest = pool.take_ragged(columns, cu_nodes)
        if self.table is None or pool.roots is None or not pool.num_requests:
            return forest
        return fill(forest, *self.table.walk(pool.roots, self.template), self.template, limit)
