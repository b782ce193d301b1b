# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`topn`: EAGLE-2's dynamic tree with an equal number of nodes for every request.

Every level expands the `top_k` nodes of the level above whose paths are most probable; at the end
the N most probable candidates of all levels form the tree (the rerank of EAGLE-2, arXiv
2406.16858). A child is never more probable than its parent, so the selection is a tree.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from echo_vllm.config import EchoConfig
from echo_vllm.policies.base import DraftBatch, DraftPolicy
from echo_vllm.trees.forest import DraftForest
from echo_vllm.trees.pool import CandidatePool


class TopNConfig(EchoConfig):
    """The section of `topn`."""

    policy: Literal["topn"] = Field(
        default="topn",
        description=(
            "The num_speculative_tokens best nodes by path score of a tree grown level by level."
        ),
    )


class TopNPolicy(DraftPolicy):
    """The N best of `top_k + (max_depth - 1) * top_k**2` candidates a request."""

    Config = TopNConfig
    draws = True
    has_fixed_size = True

    @property
    def num_nodes(self) -> int:
        candidates = self.num_ranks + (self.max_depth - 1) * self.max_frontier * self.num_ranks
        return min(self.max_nodes, candidates)

    def columns(self, pool: CandidatePool) -> torch.Tensor:
        return pool.best_first()[:, : self.max_nodes]

    def select(self, pool: CandidatePool, batch: DraftBatch) -> DraftForest:
        return pool.take(self.columns(pool))
