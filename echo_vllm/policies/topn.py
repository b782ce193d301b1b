# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`topn`: EAGLE-2's dynamic tree with an equal number of nodes for every request.

Every level expands the `top_k` nodes of the level above whose paths are most probable; at the end
the `num_nodes` most probable candidates of all levels form the tree (the rerank of EAGLE-2,
arXiv 2406.16858). A child is never more probable than its parent, so the selection is a tree.
"""

from __future__ import annotations

from echo_vllm.policies.base import DraftBatch
from echo_vllm.trees.forest import DraftForest
from echo_vllm.trees.pool import CandidatePool, Expansion


class TopNPolicy:
    """The `num_nodes` best of `top_k + (max_depth - 1) * top_k**2` candidates a request."""

    def __init__(self, num_nodes: int, max_depth: int, top_k: int) -> None:
        self.num_nodes = num_nodes
        self.max_depth = max_depth
        self.num_ranks = top_k
        self.max_frontier = top_k

    def expand(self, depth: int, pool: CandidatePool, batch: DraftBatch) -> Expansion | None:
        if depth == 1:
            return Expansion(frontier=None, children=None)
        return pool.expand_best(depth, self.max_frontier)

    def select(self, pool: CandidatePool, batch: DraftBatch) -> DraftForest:
        return pool.take(pool.best_first()[:, : self.num_nodes])
