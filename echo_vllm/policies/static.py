# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`static`: one tree shape for every request and step, given by child ranks (as in Medusa).

The path [0, 2] is the third-best child of the best child of the root. A shape is what EAGLE-1 and
Medusa verify; it knows nothing of how sure the drafter is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from echo_vllm.policies.base import DraftBatch
from echo_vllm.trees.forest import DraftForest
from echo_vllm.trees.pool import CandidatePool, Expansion


class StaticPolicy:
    """A fixed, prefix-closed set of child-rank paths; every node that has children is expanded."""

    def __init__(self, paths: Sequence[Sequence[int]]) -> None:
        """Args: paths: prefix-closed, without duplicates; any order."""
        shape = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
        column = {path: i for i, path in enumerate(shape)}
        self.max_depth = len(shape[-1])
        self.num_ranks = 1 + max(path[-1] for path in shape)
        inner = {path[:-1] for path in shape}
        self._frontier: list[list[int]] = []
        self._children: list[torch.Tensor] = []
        for depth in range(1, self.max_depth + 1):
            level = [path for path in shape if len(path) == depth]
            parents = [path for path in shape if len(path) == depth - 1 and path in inner]
            row = {path: i for i, path in enumerate(parents or [()])}
            self._frontier.append([column[path] for path in parents])
            self._children.append(
                torch.tensor([row[path[:-1]] * self.num_ranks + path[-1] for path in level])
            )
        self.max_frontier = max(1, *(len(columns) for columns in self._frontier))

    def expand(self, depth: int, pool: CandidatePool, batch: DraftBatch) -> Expansion:
        children = self._children[depth - 1]
        if depth == 1:
            return Expansion(frontier=None, children=children)
        columns = pool.on_device(torch.tensor(self._frontier[depth - 1]))
        return Expansion(columns.expand(pool.num_requests, len(columns)), children)

    def select(self, pool: CandidatePool, batch: DraftBatch) -> DraftForest:
        columns = torch.arange(pool.num_columns, device=pool.device)
        return pool.take(columns.expand(pool.num_requests, pool.num_columns))
