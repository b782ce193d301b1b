# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The trees that were drafted and wait for their verification, in flat arrays on the host.

The scheduler carries a draft's tokens only, as a list whose every prefix is a tree, and may send
back a prefix of it, in another order of requests, or a step later. The model runner keeps the rest
here, one row of each array for the slot of a request.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from echo_vllm.trees.forest import ROOT, DraftForest

Ints = NDArray[np.int64]


def owners(sizes: Ints) -> tuple[Ints, Ints]:
    """Of `sizes.sum()` items, request after request: (the request, the place in it) of each."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    return owner, np.arange(len(owner)) - (np.cumsum(sizes) - sizes)[owner]


class TreeStore:
    """The last draft of every slot: up to `max_nodes` nodes each."""

    def __init__(self, num_slots: int, max_nodes: int) -> None:
        shape = (num_slots, max_nodes)
        self._token_ids = np.zeros(shape, np.int32)
        self._parents = np.zeros(shape, np.int32)
        self._depths = np.zeros(shape, np.int32)
        self._path_logprobs = np.zeros(shape, np.float32)
        self._sizes = np.zeros(num_slots, np.int64)
        self._chains = np.zeros(num_slots, np.int64)
        """Nodes of each tree before the first that is not the only child of the node before it."""

    def put(self, slots: Ints, forest: DraftForest) -> None:
        """Keep the trees of `forest`, on the host, for `slots` [R] in place of what they had."""
        sizes = forest.cu_nodes.diff().numpy().astype(np.int64)
        owner, place = owners(sizes)
        row = slots[owner]
        parents = forest.parents.numpy()
        self._token_ids[row, place] = forest.token_ids.numpy()
        self._parents[row, place] = parents
        self._depths[row, place] = forest.depths.numpy()
        self._path_logprobs[row, place] = forest.path_logprobs.numpy()
        self._sizes[slots] = sizes
        chains = sizes.copy()
        branches = parents != place - 1
        np.minimum.at(chains, owner[branches], place[branches])
        self._chains[slots] = chains

    def replace(
        self, slot: int, nodes: Sequence[int], token_ids: Sequence[int], parents: Sequence[int]
    ) -> None:
        """Keep another tree for `slot`, made of nodes of the one that it has and of new ones.

        Args:
            nodes: of each node, its place in the old tree; negative for a new one, which is as
                likely as its parent.
            token_ids, parents: of each node; a parent stands before its children.
        """
        old = self._path_logprobs[slot].tolist()
        scores: list[float] = []
        for node, parent in zip(nodes, parents, strict=True):
            inherited = 0.0 if parent == ROOT else scores[parent]
            scores.append(inherited if node < 0 else old[node])
        tree = DraftForest.from_parents([token_ids], [parents], [scores])
        self.put(np.array([slot], np.int64), tree)

    def are_chains(self, slots: Ints, sizes: Ints) -> NDArray[np.bool_]:
        """[R] bool, whether the first `sizes` nodes of each tree are one path (or none)."""
        chains: NDArray[np.bool_] = (self._chains[slots] >= sizes) | (sizes == 0)
        return chains

    def take(self, slots: Ints, sizes: Ints) -> DraftForest:
        """The forest of the first `sizes` [R] nodes of the trees of `slots` [R], on the host.

        Raises:
            ValueError: a slot has fewer nodes than that.
        """
        if (sizes > self._sizes[slots]).any():
            raise ValueError("more nodes are asked for than were drafted")
        owner, place = owners(sizes)
        row = slots[owner]
        cu_nodes = np.zeros(len(sizes) + 1, np.int32)
        np.cumsum(sizes, out=cu_nodes[1:])
        return DraftForest(
            token_ids=torch.from_numpy(self._token_ids[row, place]),
            parents=torch.from_numpy(self._parents[row, place]),
            depths=torch.from_numpy(self._depths[row, place]),
            path_logprobs=torch.from_numpy(self._path_logprobs[row, place]),
            cu_nodes=torch.from_numpy(cu_nodes),
        )
