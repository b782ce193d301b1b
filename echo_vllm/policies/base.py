# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What the drafter and a policy say to each other.

The drafter grows all trees level by level. Before each level the policy names the requests that go
on, the nodes to expand (the frontier) and which of their children become candidates; after the
last level it selects the forest to verify. A policy is a pure function of the pool and of the
`DraftBatch`, which is the same on every tensor-parallel rank, so all ranks decide alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from echo_vllm.forecast.plan import DraftPlan
from echo_vllm.trees.forest import DraftForest
from echo_vllm.trees.pool import CandidatePool, Expansion

MAX_BACKLOG = 512
"""Committed tokens of one request that wait for a drafter that rests; beyond them the request
drafts no more, which bounds the memory of their features."""

MAX_WAITING = 16384
"""Committed tokens of all requests beyond which no more prompts wait for a drafter that rests."""


@dataclass(frozen=True)
class DraftBatch:
    """The batch that a drafting is for.

    Attributes:
        num_requests: R, requests that get a tree.
        num_decoding: requests that the next target forward will decode, R among them.
        plan: of this step.
        probes: [n] int64, those of the R requests that draft to full depth; on the host.
    """

    num_requests: int
    num_decoding: int
    plan: DraftPlan = field(default_factory=DraftPlan)
    probes: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @classmethod
    def of(cls, num_requests: int) -> DraftBatch:
        """A batch of which nothing else is known."""
        return cls(num_requests, num_requests)

    @property
    def rows(self) -> int:
        """Rows that the next target forward has without any draft."""
        return self.num_decoding + self.plan.prefill_tokens


class DraftPolicy(Protocol):
    """Decides what is drafted and what is verified.

    Attributes:
        max_depth: levels of the deepest tree.
        num_ranks: how many of the drafter's best tokens are asked for after every node (k).
        max_frontier: the most nodes of one request that one drafter forward expands.
    """

    max_depth: int
    num_ranks: int
    max_frontier: int

    def expand(self, depth: int, pool: CandidatePool, batch: DraftBatch) -> Expansion | None:
        """How the level `depth` (1-based) grows; called with all levels above it in the pool.

        None ends the drafting. The first level always grows.
        """
        ...

    def select(self, pool: CandidatePool, batch: DraftBatch) -> DraftForest:
        """The forest to verify: topological, ancestor-closed, any prefix of a tree a tree."""
        ...
