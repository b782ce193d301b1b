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

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from echo_vllm import ops
from echo_vllm.forecast.drafter_profile import DrafterProfile
from echo_vllm.forecast.plan import DraftPlan, Load
from echo_vllm.policies.base import DraftBatch, DraftPolicy
from echo_vllm.policies.elastic import GatedConfig
from echo_vllm.policies.retrieval import (
    MISSING,
    RankTemplate,
    SuccessorTable,
    fill,
    filled_unseen,
)
from echo_vllm.trees.forest import DraftForest
from echo_vllm.trees.pool import NO_CANDIDATE, CandidatePool, Expansion
from echo_vllm.trees.ranked import RankedTrees

KEPT = {1: 8 / 60, 2: 24 / 60, 6: 40 / 60}
"""Share of the tree's places that a request keeps for drafted nodes if it stops at this depth: the
paper's checkpoints; in between on a line."""

CANDIDATES = 2
"""Retrieved candidates for each place of a tree, of which the most probable are taken."""


def kept_share(depth: int) -> float:
    """Share of its places that a request that stops at `depth` keeps for drafted nodes."""
    return float(np.interp(depth, list(KEPT), list(KEPT.values())))


class GraftConfig(GatedConfig):
    """The section of `graft`."""

    policy: Literal["graft"] = Field(
        default="graft",
        description=(
            "Gates as for `echo`; what a request that stops early leaves free of its "
            "num_speculative_tokens nodes is filled by retrieval, without a forward."
        ),
    )


class GraftPolicy(DraftPolicy):
    """Prune, then fill the freed places by retrieval. A limit on the nodes of the batch is shared
    equally by all requests."""

    Config = GraftConfig
    without_profile = "its gates are built-in values that were never measured for this head"
    not_traced = "retrieved nodes are not the draft head's"
    wants_logits = True
    has_order = True

    def __init__(
        self, config: GraftConfig, max_nodes: int, profile: DrafterProfile | None = None
    ) -> None:
        super().__init__(config, max_nodes)
        assert config.width is not None  # `filled` sets it.
        self.num_ranks = config.width
        self.k_max = config.k_max
        self.gates = config.gates_with(profile)
        self.table: SuccessorTable | None = None
        """Made with the first logits, which say how large it must be and where."""
        self.template = RankTemplate.best(CANDIDATES * max_nodes, self.max_depth)
        self._shares = torch.tensor(
            [
                kept_share(depth) if depth < self.max_depth else 1.0
                for depth in range(self.max_depth + 1)
            ]
        )

    def request_limit(self, load: Load) -> int:
        return self.equal_part(load, load.able)

    def plan(self, load: Load) -> DraftPlan:
        return DraftPlan(prefill_tokens=load.prefill_tokens)

    def observe_logits(self, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        if self.table is None:
            self.table = SuccessorTable(logits.shape[1], device=logits.device)
        self.table.observe(tokens, logits)

    def limit(self, batch: DraftBatch) -> int:
        """Nodes that each request's tree may have."""
        return self.equal_part(batch.load, batch.num_requests)

    def expand(self, depth: int, pool: CandidatePool, batch: DraftBatch) -> Expansion | None:
        going = None
        if depth - 1 in self.gates:
            best = pool.rows_of(pool.active, pool.best_of_level(depth - 1))
            going = best.exp() > self.gates[depth - 1]
        return pool.expand_best(depth, self.max_frontier, going)

    def select(self, pool: CandidatePool, batch: DraftBatch) -> DraftForest:
        limit = self.limit(batch)
        scores, tiers = self._ranks(pool, batch, limit)
        columns, cu_nodes = ops.select_budget(
            scores, tiers, pool.parents, limit * pool.num_requests, limit
        )
        forest = pool.take_ragged(columns, cu_nodes)
        if self.table is None or pool.roots is None or not pool.num_requests:
            return forest
        tokens, scores = self.table.walk(pool.roots, self.template)
        if batch.depth_limits is not None:
            depth_limits = pool.on_device(batch.depth_limits)
            depths = pool.on_device(self.template.depths)
            scores = scores.masked_fill(depths > depth_limits.unsqueeze(1), MISSING)
        return fill(forest, tokens, scores, self.template, limit)

    def ranked(self, pool: CandidatePool, batch: DraftBatch) -> RankedTrees:
        drafted = RankedTrees.best(
            pool, *self._ranks(pool, batch, self.limit(batch)), self.max_nodes
        )
        if self.table is None or pool.roots is None:
            return drafted
        tokens, scores = self.table.walk(pool.roots, self.template)
        return filled_unseen(drafted, tokens, scores, self.template, self.max_nodes)

    def _ranks(
        self, pool: CandidatePool, batch: DraftBatch, limit: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and tiers [R, P] of what each request keeps of its candidates."""
        levels = pool.first_of_levels().sum(1)
        kept = (pool.on_device(self._shares)[levels] * limit).ceil()
        if batch.depth_limits is not None:
            # A request that stopped at its own limit was not pruned: it keeps all that it drafted.
            kept[levels >= pool.on_device(batch.depth_limits)] = limit
        scores = pool.path_logprobs.masked_fill(pool.rank() >= kept.unsqueeze(1), NO_CANDIDATE)
        return scores, torch.zeros_like(scores, dtype=torch.int32)
