# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The super-tree: the draft trees of all requests of a batch, in flat tensors.

A policy builds a forest, the scheduler sends back a prefix of every tree, and the model runner
verifies what came back. This module knows neither vLLM nor any policy; it holds the data, its
invariants, and the few operations that keep them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from echo_vllm.transfer import upload

ROOT = -1
"""Parent index of a node that hangs directly under the root."""


@dataclass(frozen=True)
class DraftForest:
    """The draft trees of `R` requests, `T` nodes in all, request after request.

    The root of a tree is the request's last sampled token; it is not a node. A node's parent is
    the index of another node *of the same request*, or `ROOT`.

    Attributes:
        token_ids: [T] int32, in the target's vocabulary.
        parents: [T] int32, index inside the request; always smaller than the node's own index,
            so that any prefix of a request's nodes is a tree.
        depths: [T] int32, distance from the root, at least 1.
        path_logprobs: [T] float32, the draft's log-probability of the path from the root
            to the node (nats).
        cu_nodes: [R + 1] int32, request i owns the nodes cu_nodes[i]:cu_nodes[i + 1].
        columns: [T] int64, which candidates of the drafter's pool the nodes are; None for a forest
            that was not selected from a pool.

    The tensors are on the host, except in a copy that `to` made for the operators.
    """

    token_ids: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    path_logprobs: torch.Tensor
    cu_nodes: torch.Tensor
    columns: torch.Tensor | None = None

    @property
    def num_requests(self) -> int:
        return self.cu_nodes.shape[0] - 1

    @property
    def num_nodes(self) -> int:
        return self.token_ids.shape[0]

    @classmethod
    def empty(cls, num_requests: int) -> DraftForest:
        """A forest of `num_requests` trees without nodes."""
        return cls(
            token_ids=torch.empty(0, dtype=torch.int32),
            parents=torch.empty(0, dtype=torch.int32),
            depths=torch.empty(0, dtype=torch.int32),
            path_logprobs=torch.empty(0, dtype=torch.float32),
            cu_nodes=torch.zeros(num_requests + 1, dtype=torch.int32),
        )

    @classmethod
    def from_parents(
        cls,
        token_ids: Sequence[Sequence[int]],
        parents: Sequence[Sequence[int]],
        path_logprobs: Sequence[Sequence[float]] | None = None,
    ) -> DraftForest:
        """Build a forest from one token list and one parent list a request.

        Without `path_logprobs` every path gets 0, i.e. no score.
        """
        depths: list[int] = []
        for tree in parents:
            own: list[int] = []
            for parent in tree:
                own.append(1 if parent == ROOT else own[parent] + 1)
            depths.extend(own)
        sizes = [len(tree) for tree in parents]
        cu_nodes = torch.zeros(len(sizes) + 1, dtype=torch.int32)
        cu_nodes[1:] = torch.tensor(sizes, dtype=torch.int32).cumsum(0)
        scores = (
            [x for tree in path_logprobs for x in tree] if path_logprobs else [0.0] * sum(sizes)
        )
        return cls(
            token_ids=torch.tensor([t for tree in token_ids for t in tree], dtype=torch.int32),
            parents=torch.tensor([p for tree in parents for p in tree], dtype=torch.int32),
            depths=torch.tensor(depths, dtype=torch.int32),
            path_logprobs=torch.tensor(scores, dtype=torch.float32),
            cu_nodes=cu_nodes,
        )

    def to(self, device: torch.device) -> DraftForest:
        """The same forest on `device`, in one transfer that nobody waits for; without `columns`."""
        if device.type == "cpu":
            return self
        scores = self.path_logprobs.view(torch.int32)
        fields = (self.token_ids, self.parents, self.depths, scores, self.cu_nodes)
        packed = upload(torch.cat(fields), device)
        sizes = [len(field) for field in fields]
        token_ids, parents, depths, scores, cu_nodes = packed.split_with_sizes(sizes)
        return DraftForest(token_ids, parents, depths, scores.view(torch.float32), cu_nodes)

    def request_of_node(self) -> torch.Tensor:
        """[T] int64, the request that owns each node."""
        sizes = (self.cu_nodes[1:] - self.cu_nodes[:-1]).to(torch.int64)
        return torch.repeat_interleave(torch.arange(self.num_requests), sizes)

    def keep(self, mask: torch.Tensor) -> DraftForest:
        """The forest of the nodes where `mask` ([T] bool) is set, in the same order.

        Raises:
            ValueError: the mask drops an ancestor of a node that it keeps.
        """
        start = self.cu_nodes[:-1].to(torch.int64)[self.request_of_node()]
        parents = self.parents.to(torch.int64)
        has_parent = parents != ROOT
        parent_rows = (start + parents)[has_parent]
        kept = mask.clone()
        kept[has_parent] &= mask[parent_rows]
        if not torch.equal(kept, mask):
            raise ValueError("a kept node has an ancestor that is not kept")
        # Old flat index -> new index inside the request.
        rank = torch.zeros(self.num_nodes + 1, dtype=torch.int64)
        rank[1:] = mask.cumsum(0)
        new_index = rank[:-1] - rank[start]
        new_parents = torch.full_like(parents, ROOT)
        new_parents[has_parent] = new_index[parent_rows]
        return DraftForest(
            token_ids=self.token_ids[mask],
            parents=new_parents[mask].to(torch.int32),
            depths=self.depths[mask],
            path_logprobs=self.path_logprobs[mask],
            cu_nodes=rank[self.cu_nodes.to(torch.int64)].to(torch.int32),
            columns=None if self.columns is None else self.columns[mask],
        )

    def prefix(self, num_nodes: torch.Tensor) -> DraftForest:
        """The forest of the first `num_nodes[i]` nodes of every request i."""
        start = self.cu_nodes[:-1][self.request_of_node()]
        index = torch.arange(self.num_nodes) - start
        return self.keep(index < num_nodes[self.request_of_node()])

    @classmethod
    def joined(cls, parts: Sequence[tuple[torch.Tensor, DraftForest]]) -> DraftForest:
        """One forest of several, on the host; `columns` are those of each one's own pool.

        Args:
            parts: the places ([r] int64) of a forest's r trees in the whole, and the forest; each
                place from 0 on stands in one of them.
        """
        owner = torch.cat([places[forest.request_of_node()] for places, forest in parts])
        order = owner.argsort(stable=True)
        columns = [forest.columns for _, forest in parts if forest.num_nodes]
        cu_nodes = torch.zeros(1 + sum(len(places) for places, _ in parts), dtype=torch.int32)
        cu_nodes[1:] = torch.bincount(owner, minlength=len(cu_nodes) - 1).cumsum(0)
        return cls(
            token_ids=torch.cat([forest.token_ids for _, forest in parts])[order],
            parents=torch.cat([forest.parents for _, forest in parts])[order],
            depths=torch.cat([forest.depths for _, forest in parts])[order],
            path_logprobs=torch.cat([forest.path_logprobs for _, forest in parts])[order],
            cu_nodes=cu_nodes,
            columns=_joined_columns(columns, order),
        )

    def trees(self) -> list[tuple[list[int], list[int]]]:
        """`(token ids, parents)` of every request, as lists."""
        tokens, parents, cu = self.token_ids.tolist(), self.parents.tolist(), self.cu_nodes.tolist()
        return [(tokens[a:b], parents[a:b]) for a, b in itertools.pairwise(cu)]

    def validate(self, *, max_nodes: int, max_depth: int) -> None:
        """Check every invariant that verification and truncation rely on.

        Args:
            max_nodes: the most nodes that one request may have.
            max_depth: the greatest depth that a node may have.

        Raises:
            ValueError: names the invariant, the request and the node.
        """
        cu = self.cu_nodes.tolist()
        if cu[0] != 0 or cu[-1] != self.num_nodes:
            raise ValueError(f"cu_nodes runs from {cu[0]} to {cu[-1]}, not 0 to {self.num_nodes}")
        for name in ("parents", "depths", "path_logprobs"):
            if getattr(self, name).shape != (self.num_nodes,):
                raise ValueError(f"{name} does not have one entry a node")
        tokens, parents = self.token_ids.tolist(), self.parents.tolist()
        depths, scores = self.depths.tolist(), self.path_logprobs.tolist()
        for request, (start, stop) in enumerate(itertools.pairwise(cu)):
            if stop < start:
                raise ValueError(f"cu_nodes falls at request {request}")
            if stop - start > max_nodes:
                raise ValueError(f"request {request} has {stop - start} nodes, over {max_nodes}")
            siblings: set[tuple[int, int]] = set()
            for node in range(stop - start):
                where = f"request {request}, node {node}"
                row, parent = start + node, parents[start + node]
                if not ROOT <= parent < node:
                    raise ValueError(f"{where}: parent {parent} does not precede the node")
                above = 0 if parent == ROOT else depths[start + parent]
                if depths[row] != above + 1:
                    raise ValueError(f"{where}: depth {depths[row]} under depth {above}")
                if depths[row] > max_depth:
                    raise ValueError(f"{where}: depth {depths[row]} is over {max_depth}")
                top = 0.0 if parent == ROOT else scores[start + parent]
                if not scores[row] <= top:
                    raise ValueError(f"{where}: path score rises from {top} to {scores[row]}")
                if (parent, tokens[row]) in siblings:
                    raise ValueError(f"{where}: token {tokens[row]} stands twice under one parent")
                siblings.add((parent, tokens[row]))


def _joined_columns(
    columns: Sequence[torch.Tensor | None], order: torch.Tensor
) -> torch.Tensor | None:
    known = [each for each in columns if each is not None]
    return torch.cat(known)[order] if known and len(known) == len(columns) else None
