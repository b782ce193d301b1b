# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`chain`: one path of fixed length, the drafter's best token at every step.

The baseline that vLLM's own EAGLE-3 runs, on this project's runtime, so that a comparison with it
measures the runtime and a comparison with the trees measures the policy.
"""

from __future__ import annotations

import torch

from echo_vllm.policies.base import DraftBatch
from echo_vllm.trees.forest import DraftForest
from echo_vllm.trees.pool import CandidatePool, Expansion


class ChainPolicy:
    """A chain of `length` nodes a request."""

    num_ranks = 1
    max_frontier = 1

    def __init__(self, length: int) -> None:
        self.max_depth = length

    def expand(self, depth: int, pool: CandidatePool, batch: DraftBatch) -> Expansion:
        if depth == 1:
            return Expansion(frontier=None, children=None)
        last = torch.full((pool.num_requests, 1), pool.num_columns - 1, device=pool.device)
        return Expansion(frontier=last, children=None)

    def select(self, pool: CandidatePool, batch: DraftBatch) -> DraftForest:
        columns = torch.arange(pool.num_columns, device=pool.device)
        return pool.take(columns.expand(pool.num_requests, pool.num_columns))
