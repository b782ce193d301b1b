# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Trees that stay where they were drafted, each in the order in which its nodes are served.

Where the host never sees a tree, how many nodes a request verifies is decided after the drafting,
and after the next batch is known. So a request keeps its nodes in the order of
`ops.select_budget`: whatever number of them is taken, from the front, is a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Protocol

import torch

from echo_vllm.trees.forest import ROOT
from echo_vllm.trees.pool import NO_CANDIDATE, CandidatePool, best_first

FILLER_TIER = 1 << 30
"""Of places behind a tree's last node, which are served when nothing else is left."""


class Pool(Protocol):
    """A pool of candidates, whatever their kind; see `CandidatePool`."""

    @property
    def path_logprobs(self) -> torch.Tensor: ...

    def depths(self) -> torch.Tensor: ...

    def tree_of(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class RankedTrees:
    """The trees of R requests, n places each; a parent stands before its children.

    Attributes:
        token_ids: [R, n] int64; 0 behind the last node.
        parents: [R, n] int32, a place in the same row, or ROOT.
        tiers: [R, n] int32, rising; FILLER_TIER behind the last node.
        scores: [R, n] float32, falling in each tier; 0 behind the last node.
        depths: [R, n] int32, from 1; 0 behind the last node.
        path_logprobs: [R, n] float32; NO_CANDIDATE behind the last node.
        columns: [R, n] int64, of the pool that the nodes are from; any behind the last node.
    """

    token_ids: torch.Tensor
    parents: torch.Tensor
    tiers: torch.Tensor
    scores: torch.Tensor
    depths: torch.Tensor
    path_logprobs: torch.Tensor
    columns: torch.Tensor

    @cached_property
    def sizes(self) -> torch.Tensor:
        """[R] int32, nodes of each tree."""
        return (self.tiers < FILLER_TIER).sum(1, dtype=torch.int32)

    @classmethod
    def of(cls, pool: CandidatePool, columns: torch.Tensor) -> RankedTrees:
        """Trees of one tier whose columns [R, n] are all nodes, in their order."""
        token_ids, parents = pool.tree_of(columns)
        tiers = torch.zeros_like(parents)
        return cls(
            token_ids,
            parents,
            tiers,
            tiers.to(torch.float32),
            pool.depths().to(torch.int32)[columns],
            pool.path_logprobs.gather(1, columns),
            columns,
        )

    @classmethod
    def best(
        cls,
        pool: Pool,
        scores: torch.Tensor,
        tiers: torch.Tensor,
        most: int,
        depths: torch.Tensor | None = None,
    ) -> RankedTrees:
        """Each request's `most` best candidates, or as many as there are.

        Args:
            pool: of the candidates.
            scores, tiers: [R, P] as `ops.select_budget` takes them.
            most: n, but for a pool that has fewer columns.
            depths: [R, P] int32, of the columns; None takes those of the pool's levels.
        """
        exists = scores > NO_CANDIDATE
        tiers = tiers.masked_fill(~exists, FILLER_TIER)
        order = best_first(scores)
        order = order.gather(1, tiers.gather(1, order).argsort(dim=1, stable=True))
        columns = order[:, :most]
        token_ids, parents = pool.tree_of(columns)
        is_node = exists.gather(1, columns)
        if depths is None:
            depths = pool.depths().to(torch.int32).expand_as(scores)
        return cls(
            token_ids.masked_fill(~is_node, 0),
            parents.masked_fill(~is_node, ROOT),
            tiers.gather(1, columns),
            scores.gather(1, columns).masked_fill(~is_node, 0.0),
            depths.gather(1, columns).masked_fill(~is_node, 0),
            pool.path_logprobs.gather(1, columns).masked_fill(~is_node, NO_CANDIDATE),
            columns,
        )

    @classmethod
    def together(cls, parts: Sequence[RankedTrees]) -> RankedTrees:
        """The trees of some requests, then those of others, each with as many places as any."""
        if len(parts) == 1:
            return parts[0]
        most = max(part.columns.shape[1] for part in parts)
        behind = {
            **dict.fromkeys((field.name for field in fields(cls)), 0.0),
            "parents": ROOT,
            "tiers": FILLER_TIER,
            "path_logprobs": NO_CANDIDATE,
        }

        def padded(part: RankedTrees, name: str) -> torch.Tensor:
            values: torch.Tensor = getattr(part, name)
            missing = most - values.shape[1]
            return torch.nn.functional.pad(values, (0, missing), value=behind[name])

        return cls(*(torch.cat([padded(part, name) for part in parts]) for name in behind))
