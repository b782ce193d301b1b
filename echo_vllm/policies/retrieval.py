# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Drafts out of a table: which tokens the target held likely after a token, when it last saw it.

Graft (arXiv 2605.20104) fills the places that pruning frees in a tree with tokens that cost no
forward: a table has, for every token of the vocabulary, the target's best successors, and a tree
is read from it by gathers. Every row that the target verifies renews an entry, accepted or not, so
a few steps make the table useful. It holds nothing but what the target said earlier, and so does
not touch exactness: candidates may be chosen from the past in any way.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import pairwise

import torch

from echo_vllm.transfer import download, upload
from echo_vllm.trees.forest import ROOT, DraftForest
from echo_vllm.trees.pool import CandidatePool, best_first, places_in
from echo_vllm.trees.ranked import FILLER_TIER, RankedTrees

NUM_RANKS = 8
"""Successors of a token that the table holds."""

MISSING = float("-inf")
"""Score of a retrieved node that the table does not know."""


@dataclass(frozen=True)
class RankTemplate:
    """Which successors are read: a fixed tree of ranks, wide at its best branch.

    Attributes:
        parents: per node the index of its parent, always smaller, or ROOT.
        ranks: per node its place among its parent's successors.
        level_starts: first node of every level, and the number of nodes.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    level_starts: tuple[int, ...]

    @property
    def num_nodes(self) -> int:
        return len(self.parents)

    @property
    def levels(self) -> list[slice]:
        """The nodes of depth 1, 2, ..."""
        return [slice(start, stop) for start, stop in pairwise(self.level_starts)]

    @property
    def depths(self) -> torch.Tensor:
        """[T] int64, of the nodes."""
        sizes = torch.tensor(self.level_starts).diff()
        return torch.arange(1, len(sizes) + 1).repeat_interleave(sizes)

    @classmethod
    def best(cls, num_nodes: int, max_depth: int, num_ranks: int = NUM_RANKS) -> RankTemplate:
        """The `num_nodes` most probable paths of ranks (fewer if there are no more), level by
        level, if rank r is the right one with probability 0.5 / (r + 1) ** 1.5: no more than an
        order, in which a tree gets deep where ranks are low and wide near the root."""
        weights = [0.5 / (rank + 1) ** 1.5 for rank in range(num_ranks)]
        # Entries: falling probability, then age, so that ties have an order; path; its length.
        heap: list[tuple[float, int, tuple[int, ...]]] = [(-1.0, 0, ())]
        paths: list[tuple[int, ...]] = []
        age = 0
        while heap and len(paths) <= num_nodes:  # The root is one of them.
            score, _, path = heapq.heappop(heap)
            paths.append(path)
            if len(path) < max_depth:
                for rank, weight in enumerate(weights):
                    age += 1
                    heapq.heappush(heap, (score * weight, age, (*path, rank)))
        paths = sorted(paths[1:], key=len)  # Stable: the best of a level first.
        index = {path: i for i, path in enumerate(paths)}
        depths = [len(path) for path in paths]
        starts = [depths.index(d) for d in range(1, max(depths, default=0) + 1)]
        return cls(
            parents=tuple(index.get(path[:-1], ROOT) for path in paths),
            ranks=tuple(path[-1] for path in paths),
            level_starts=(*starts, len(paths)),
        )


class SuccessorTable:
    """The target's best successors of every token, as of the last time it was asked."""

    def __init__(
        self, vocab_size: int, num_ranks: int = NUM_RANKS, device: torch.device | None = None
    ) -> None:
        """
        Args:
            vocab_size: V, of the target.
            num_ranks: k, successors a token; V * k * 8 bytes in all.
            device: of the target's logits.
        """
        self.num_ranks = num_ranks
        shape = (vocab_size, num_ranks)
        self._tokens = torch.zeros(shape, dtype=torch.int32, device=device)
        self._logprobs = torch.full(shape, MISSING, dtype=torch.float32, device=device)
        # The last template, and its parents and ranks, [T] int64 each, where they are used.
        self._moved: tuple[RankTemplate, torch.Tensor, torch.Tensor] | None = None

    def observe(self, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """Renew the entries of `tokens`.

        Args:
            tokens: [n] int, of n rows of a forward; of equal ones the last row counts.
            logits: [n, V], what the target said after each, on the table's device; not changed.
        """
        if not len(tokens):
            return
        tokens = tokens.to(torch.int64)
        successors, logprobs = _best_of(logits, min(self.num_ranks, logits.shape[1]))
        # Equal tokens all write the values of the last of them: nothing depends on the order in
        # which they are written, and no count has to come to the host.
        order = tokens.argsort(stable=True)
        last = torch.searchsorted(tokens[order], tokens, right=True) - 1
        source = order[last]
        known = successors.shape[1]  # All ranks, unless the vocabulary is smaller.
        self._tokens[:, :known][tokens] = successors[source]
        self._logprobs[:, :known][tokens] = logprobs[source]

    def walk(
        self, roots: torch.Tensor, template: RankTemplate
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read a tree for every root.

        Args:
            roots: [R] int, the tokens that the trees grow from, on the table's device.
            template: T nodes.

        Returns:
            [R, T] int64 tokens, and [R, T] float32 path log-probabilities by the table (nats),
            MISSING where it has no entry; both on the table's device.
        """
        if self._moved is None or self._moved[0] is not template:
            self._moved = (
                template,
                upload(torch.tensor(template.parents, dtype=torch.int64), roots.device),
                upload(torch.tensor(template.ranks, dtype=torch.int64), roots.device),
            )
        _, parents, ranks = self._moved
        num_requests = len(roots)
        tokens = roots.new_zeros(num_requests, template.num_nodes, dtype=torch.int64)
        scores = self._logprobs.new_full((num_requests, template.num_nodes), MISSING)
        for level in template.levels:
            if level.start == 0:
                above = roots.to(torch.int64).unsqueeze(1).expand(-1, level.stop)
                score = scores.new_zeros(num_requests, level.stop)
            else:
                above = tokens[:, parents[level]]
                score = scores[:, parents[level]]
            tokens[:, level] = self._tokens[above, ranks[level]].to(torch.int64)
            scores[:, level] = score + self._logprobs[above, ranks[level]].clamp(max=0.0)
        return tokens, scores


def _best_of(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best tokens of every row, [n, k] int32, and their log-probabilities, float32."""
    # On a CPU a few rows at a time, which fit its cache and do: half the time for a large batch.
    step = 16 if logits.device.type == "cpu" else max(1, len(logits))
    tokens, logprobs = [], []
    for part in torch.split(logits, step):
        best, ids = part.topk(k, dim=1)
        tokens.append(ids.to(torch.int32))
        logprobs.append((best - part.logsumexp(1, keepdim=True)).float())
    return torch.cat(tokens), torch.cat(logprobs)


def retrieved(
    own_tokens: torch.Tensor,
    own_parents: torch.Tensor,
    own_scores: torch.Tensor,
    tokens: torch.Tensor,
    scores: torch.Tensor,
    template: RankTemplate,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hang R retrieved trees of T nodes into R trees of W places; nothing waits for a device.

    A retrieved node that stands in the tree already is that node, and what was retrieved below it
    hangs there: no parent gets the same token twice.

    Args:
        own_tokens, own_parents: [R, W] int64, -1 and below ROOT where there is no node.
        own_scores: [R, W] float32.
        tokens, scores: [R, T], of `SuccessorTable.walk`.
        template: of the walk.

    Returns:
        [R, T] int64, each retrieved node's parent: a place in the tree, W and more for a retrieved
        one, or ROOT; and [R, T] float32, path scores, MISSING where nothing is added.
    """
    num_requests, width = own_tokens.shape
    above = upload(torch.tensor(template.parents, dtype=torch.int64), tokens.device)
    # Scores of nodes by index: the tree's, the retrieved ones, and the root at -1.
    all_scores = torch.cat([own_scores, scores, scores.new_zeros(num_requests, 1)], dim=1)
    # Per retrieved node: the index of the node that it is, and of its parent.
    index = torch.arange(width, width + template.num_nodes, device=tokens.device)
    index = index.repeat(num_requests, 1)
    parents = torch.full_like(index, ROOT)
    is_new = scores > MISSING
    for level in template.levels:
        if level.start:
            parents[:, level] = index[:, above[level]]
        same = (own_tokens.unsqueeze(1) == tokens[:, level].unsqueeze(2)) & (
            own_parents.unsqueeze(1) == parents[:, level].unsqueeze(2)
        )
        known = same.any(2)
        if width:
            index[:, level] = torch.where(known, same.int().argmax(2), index[:, level])
        is_new[:, level] &= ~known
        # A path must not gain by growing, whoever scored its parts.
        columns = slice(width + level.start, width + level.stop)
        top = all_scores.gather(1, parents[:, level] % all_scores.shape[1])
        all_scores[:, columns] = torch.minimum(all_scores[:, columns], top)
    return parents, all_scores[:, width:-1].masked_fill(~is_new, MISSING)


def fill(
    forest: DraftForest,
    tokens: torch.Tensor,
    scores: torch.Tensor,
    template: RankTemplate,
    limit: int,
) -> DraftForest:
    """The forest with the best retrieved nodes in each tree's free places, after the drafted ones,
    so that a tree that is cut loses them first.

    Args:
        forest: R trees of at most `limit` nodes, on the host.
        tokens, scores: [R, T], of `SuccessorTable.walk`, on any device.
        template: of the walk.
        limit: nodes that a tree may have.

    Returns:
        A forest without `columns`.
    """
    tokens, scores = download(tokens, scores)
    sizes = forest.cu_nodes.diff().to(torch.int64)
    num_requests, width = len(sizes), int(sizes.max()) if len(sizes) else 0
    owner = forest.request_of_node()
    place = torch.arange(forest.num_nodes) - forest.cu_nodes[:-1].to(torch.int64)[owner]

    def padded(values: torch.Tensor, missing: float) -> torch.Tensor:
        whole = values.new_full((num_requests, width), missing)
        whole[owner, place] = values
        return whole

    parents, new_scores = retrieved(
        padded(forest.token_ids.to(torch.int64), -1),
        padded(forest.parents.to(torch.int64), ROOT - 1),
        padded(forest.path_logprobs, MISSING),
        tokens,
        scores,
        template,
    )
    # Stable: among equals the earlier node, so a parent is before its children.
    order = best_first(new_scores)
    rank = places_in(order)
    is_new = (new_scores > MISSING) & (rank < (limit - sizes).unsqueeze(1))
    # Where every node will stand in its tree.
    final = torch.cat(
        [
            torch.arange(width).expand(num_requests, -1),
            sizes.unsqueeze(1) + rank,
            torch.full((num_requests, 1), ROOT),
        ],
        dim=1,
    )
    totals = sizes + is_new.sum(1)
    cu_nodes = torch.zeros(num_requests + 1, dtype=torch.int32)
    cu_nodes[1:] = totals.cumsum(0)
    start = cu_nodes[:-1].to(torch.int64)
    request, node = is_new.nonzero(as_tuple=True)
    here = torch.cat([start[owner] + place, start[request] + sizes[request] + rank[request, node]])
    depths = template.depths

    def joined(drafted: torch.Tensor, retrieved: torch.Tensor) -> torch.Tensor:
        whole = drafted.new_empty(len(here))
        whole[here] = torch.cat([drafted, retrieved.to(drafted.dtype)])
        return whole

    return DraftForest(
        token_ids=joined(forest.token_ids, tokens[request, node]),
        parents=joined(forest.parents, final[request, parents[request, node] % final.shape[1]]),
        depths=joined(forest.depths, depths[node]),
        path_logprobs=joined(forest.path_logprobs, new_scores[request, node]),
        cu_nodes=cu_nodes,
    )


def filled_unseen(
    trees: RankedTrees,
    tokens: torch.Tensor,
    scores: torch.Tensor,
    template: RankTemplate,
    most: int,
) -> RankedTrees:
    """`fill`, where the host sees no tree: `trees` of one tier, then what was retrieved.

    Args:
        trees: of R requests.
        tokens, scores, template: as for `fill`, on the trees' device.
        most: places of a tree that comes of it.
    """
    is_node = trees.tiers < FILLER_TIER
    own_parents = trees.parents.to(torch.int64)
    parents, new_scores = retrieved(
        trees.token_ids.masked_fill(~is_node, -1),
        own_parents.masked_fill(~is_node, ROOT - 1),
        trees.path_logprobs,
        tokens,
        scores,
        template,
    )
    pool = CandidatePool.empty_unseen(len(tokens), tokens.device)
    pool.token_ids = torch.cat([trees.token_ids, tokens], dim=1)
    pool.parents = torch.cat([own_parents, parents], dim=1)
    pool.path_logprobs = torch.cat([trees.path_logprobs, new_scores], dim=1)
    tiers = torch.cat([trees.tiers, torch.ones_like(new_scores, dtype=torch.int32)], dim=1)
    depths = upload(template.depths, tokens.device).to(torch.int32).expand_as(new_scores)
    return RankedTrees.best(
        pool, pool.path_logprobs, tiers, most, torch.cat([trees.depths, depths], dim=1)
    )
