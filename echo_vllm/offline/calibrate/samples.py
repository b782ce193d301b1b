# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A trace as arrays: what was drafted, at which depth, how probable, and whether it was accepted.

One tree is one request in one step. A tree counts only if everything that the configuration let
it verify was verified, so that the fate of each node is known and no tree was cut by chance.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from echo_vllm.forecast.forecaster import Kind
from echo_vllm.trace_format import TraceRequest, TraceStep


@dataclass(frozen=True)
class Samples:
    """The verified nodes of S trees, N nodes of at most D depths.

    Attributes:
        request_ids: [S], the request of each tree.
        accepted_depth: [S] int64, length of the accepted path.
        accepted_rank: [S, D] int64, the accepted node's place among the verified nodes of its
            depth by path log-probability, 0 the best; -1 where none was accepted.
        confidence: [S, D] float64, c = exp(best path log-probability of the depth); 0 where the
            depth has no node.
        drafted: [S, D] bool, whether the depth has a node.
        node_tree: [N] int64, the tree of each node.
        node_depth: [N] int64, from 1.
        node_logprob: [N] float64, path log-probability in nats.
        node_child_rank: [N] int64, its place among the children of its parent, 0 the best.
        node_level_rank: [N] int64, its place among the verified nodes of its depth.
        node_accepted: [N] bool.
        node_parent_accepted: [N] bool, whether the target reached the node's parent.
        skipped: trees that were left out, because they were cut before they were verified.
        partial: trees of S whose pool had candidates that were not verified.
    """

    request_ids: tuple[str, ...]
    accepted_depth: NDArray[np.int64]
    accepted_rank: NDArray[np.int64]
    confidence: NDArray[np.float64]
    drafted: NDArray[np.bool_]
    node_tree: NDArray[np.int64]
    node_depth: NDArray[np.int64]
    node_logprob: NDArray[np.float64]
    node_child_rank: NDArray[np.int64]
    node_level_rank: NDArray[np.int64]
    node_accepted: NDArray[np.bool_]
    node_parent_accepted: NDArray[np.bool_]
    skipped: int
    partial: int

    @property
    def num_trees(self) -> int:
        return len(self.request_ids)

    @property
    def max_depth(self) -> int:
        """The deepest depth that has a node in some tree."""
        return int(self.confidence.shape[1])

    def halves(self) -> NDArray[np.bool_]:
        """[S] bool, True for the trees of every second request.

        By request, because the trees of one request are much alike: a curve fitted to some of
        them looks better on the others than it is on a new request.
        """
        order = {name: i for i, name in enumerate(sorted(set(self.request_ids)))}
        return np.array([order[name] % 2 == 1 for name in self.request_ids], dtype=np.bool_)


def collect(steps: Iterable[TraceStep], num_nodes: int, *, kind: Kind = "best") -> Samples:
    """Read the trees of a trace.

    Args:
        steps: of the trace.
        kind: of the candidates. A drawn one's `node_logprob` is what was expected of its slot.
        num_nodes: num_speculative_tokens of the trace's header. A tree with fewer verified nodes
            than this, though its pool had more, was cut by the scheduler and is skipped.

    Raises:
        ValueError: no tree is left; one sentence.
    """
    trees: list[_Tree] = []
    names: list[str] = []
    skipped = partial = 0
    for step in steps:
        for request in step.requests:
            if request.drawn != (kind == "drawn"):
                continue
            size = len(request.selected)
            if not size or size < min(request.num_candidates, num_nodes):
                skipped += 1
                continue
            trees.append(_Tree.of(request))
            names.append(request.id)
            partial += size < request.num_candidates
    if not trees:
        raise ValueError(
            f"the trace has no tree of which all {num_nodes} nodes were verified, got {skipped} "
            "that were cut; record it with policy topn, and with num_speculative_tokens as large "
            "as the pool."
        )
    depth = max(int(tree.depths[-1]) for tree in trees)
    confidence = np.zeros((len(trees), depth))
    accepted_rank = np.full((len(trees), depth), -1, dtype=np.int64)
    for row, tree in enumerate(trees):
        best = np.flatnonzero(tree.level_rank == 0)
        confidence[row, tree.depths[best] - 1] = np.exp(tree.logprobs[best])
        path = np.flatnonzero(tree.accepted)
        accepted_rank[row, tree.depths[path] - 1] = tree.level_rank[path]
    sizes = [len(tree.depths) for tree in trees]
    node_tree = np.repeat(np.arange(len(trees)), sizes)
    node_depth = np.concatenate([tree.depths for tree in trees])
    drafted = np.zeros((len(trees), depth), dtype=np.bool_)
    drafted[node_tree, node_depth - 1] = True
    return Samples(
        request_ids=tuple(names),
        accepted_depth=np.array([tree.accepted.sum() for tree in trees], dtype=np.int64),
        accepted_rank=accepted_rank,
        confidence=confidence,
        drafted=drafted,
        node_tree=node_tree,
        node_depth=node_depth,
        node_logprob=np.concatenate([tree.logprobs for tree in trees]),
        node_child_rank=np.concatenate([tree.child_rank for tree in trees]),
        node_level_rank=np.concatenate([tree.level_rank for tree in trees]),
        node_accepted=np.concatenate([tree.accepted for tree in trees]),
        node_parent_accepted=np.concatenate([tree.parent_accepted for tree in trees]),
        skipped=skipped,
        partial=partial,
    )


@dataclass(frozen=True)
class _Tree:
    """The verified nodes of one tree, [n] each, in the order of the pool (level by level)."""

    depths: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    child_rank: NDArray[np.int64]
    level_rank: NDArray[np.int64]
    accepted: NDArray[np.bool_]
    parent_accepted: NDArray[np.bool_]

    @classmethod
    def of(cls, request: TraceRequest) -> _Tree:
        nodes = np.sort(np.array(request.selected, dtype=np.int64))
        parents = np.array(request.parents, dtype=np.int64)[nodes]
        depths = request.depths()[nodes]
        logprobs = np.array(request.logprobs, dtype=np.float64)[nodes]
        return cls(
            depths=depths,
            logprobs=logprobs,
            child_rank=_ranks(parents, logprobs),
            level_rank=_ranks(depths, logprobs),
            accepted=np.isin(nodes, request.accepted),
            parent_accepted=np.isin(parents, [-1, *request.accepted]),
        )


def _ranks(groups: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.int64]:
    """[n] int64, the place of each value in its group, 0 the largest; ties in order."""
    order = np.lexsort((-values, groups))
    ordered = groups[order]
    first = np.searchsorted(ordered, ordered, side="left")
    ranks = np.empty(len(groups), dtype=np.int64)
    ranks[order] = np.arange(len(groups)) - first
    return ranks
