# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What the drafter and a policy say to each other.

The drafter grows all trees level by level. Before each level the policy names the nodes to expand
(the frontier) and which of their children become candidates; after the last level it selects the
forest to verify. Shapes depend on the policy alone, never on the data, so that the same loop can
run inside fixed-size device buffers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from echo_vllm.forest import ROOT, DraftForest


@dataclass(frozen=True)
class Expansion:
    """How one level of candidates grows out of the frontier.

    Attributes:
        frontier: [R, W] int64, columns of the pool to expand; the root is not in the pool, so the
            first level has no frontier (None) and grows out of the root.
        children: [C] int64, which of the W * k (frontier row, rank) pairs become candidates, as
            `row * k + rank`; None means all of them. For the first level W is 1.
    """

    frontier: torch.Tensor | None
    children: torch.Tensor | None


@dataclass
class CandidatePool:
    """All candidates drafted for `R` requests so far, one row a request, level after level.

    Attributes:
        token_ids: [R, P] int64, in the target's vocabulary.
        parents: [R, P] int64, column of the parent in this pool, or ROOT.
        path_logprobs: [R, P] float32.
        level_starts: the first column of every level; the level of depth d has the columns
            level_starts[d - 1] up to the next start.
    """

    token_ids: torch.Tensor
    parents: torch.Tensor
    path_logprobs: torch.Tensor
    level_starts: list[int]

    @classmethod
    def empty(cls, num_requests: int) -> CandidatePool:
        return cls(
            token_ids=torch.empty(num_requests, 0, dtype=torch.int64),
            parents=torch.empty(num_requests, 0, dtype=torch.int64),
            path_logprobs=torch.empty(num_requests, 0, dtype=torch.float32),
            level_starts=[],
        )

    @property
    def num_requests(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_columns(self) -> int:
        return self.token_ids.shape[1]

    def grow(
        self, expansion: Expansion, token_ids: torch.Tensor, logprobs: torch.Tensor
    ) -> torch.Tensor:
        """Append the children of the frontier as the next level.

        Args:
            expansion: what the policy asked for.
            token_ids: [R, W, k] int64, the drafter's k best tokens after each frontier node.
            logprobs: [R, W, k] float32, their log-probabilities given the path.

        Returns:
            [C] or [W * k] int64, the frontier row that each new column hangs under.
        """
        num_requests, width, k = token_ids.shape
        if expansion.frontier is None:
            parents = torch.full((num_requests, 1), ROOT, dtype=torch.int64)
            above = torch.zeros(num_requests, 1)
        else:
            parents = expansion.frontier
            above = self.path_logprobs.gather(1, parents)
        # A probability above 1 can only be rounding; a path must never gain by growing.
        scores = (above.unsqueeze(2) + logprobs.clamp(max=0.0)).reshape(num_requests, width * k)
        tokens = token_ids.reshape(num_requests, width * k)
        rows = torch.arange(width).repeat_interleave(k)
        if expansion.children is not None:
            scores = scores[:, expansion.children]
            tokens = tokens[:, expansion.children]
            rows = rows[expansion.children]
        self.level_starts.append(self.num_columns)
        self.token_ids = torch.cat([self.token_ids, tokens], dim=1)
        self.parents = torch.cat([self.parents, parents[:, rows]], dim=1)
        self.path_logprobs = torch.cat([self.path_logprobs, scores], dim=1)
        return rows

    def level(self, depth: int) -> slice:
        """The columns of one depth."""
        stops = [*self.level_starts[1:], self.num_columns]
        return slice(self.level_starts[depth - 1], stops[depth - 1])

    def depths(self) -> torch.Tensor:
        """[P] int64, the depth of every column."""
        starts = torch.tensor([*self.level_starts, self.num_columns])
        return torch.arange(1, len(starts)).repeat_interleave(starts.diff())

    def take(self, columns: torch.Tensor) -> DraftForest:
        """The forest of the columns [R, n] of every request, in that order.

        The caller's columns must hold the parent of each of their nodes, before the node.
        """
        num_requests, size = columns.shape
        position = torch.full((num_requests, self.num_columns + 1), ROOT, dtype=torch.int64)
        position.scatter_(1, columns, torch.arange(size).expand(num_requests, size))
        # The extra last column stands for the root: index -1 finds it.
        parents = self.parents.gather(1, columns)
        parents = torch.where(parents == ROOT, self.num_columns, parents)
        return DraftForest(
            token_ids=self.token_ids.gather(1, columns).flatten().to(torch.int32),
            parents=position.gather(1, parents).flatten().to(torch.int32),
            depths=self.depths()[columns].flatten().to(torch.int32),
            path_logprobs=self.path_logprobs.gather(1, columns).flatten(),
            cu_nodes=torch.arange(num_requests + 1, dtype=torch.int32) * size,
        )


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

    def expand(self, depth: int, pool: CandidatePool) -> Expansion:
        """How the level `depth` (1-based) grows; called with all levels above it in the pool."""
        ...

    def select(self, pool: CandidatePool) -> DraftForest:
        """The forest to verify: topological, ancestor-closed, any prefix of a tree a tree."""
        ...
