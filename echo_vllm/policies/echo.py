# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`echo`: sparse confidence gates and a batch-wide budget (ECHO, arXiv 2604.09603).

Depth is elastic: at a gate depth d a request goes on only if its best path there is more probable
than the gate's threshold, `exp(max path log-probability) > tau_d`; one that fails keeps the
candidates of that depth and is not drafted further. Width is elastic: what the gates leave of the
batch's budget widens trees. The budget is a hard limit on the nodes of the whole batch.

One sort decides who gets the budget. Nodes are served in this order, each class by path score over
the whole batch:

0. the floor: the best `floor` nodes of every request, so that nobody starves;
1. depth: the best node of every level that passed its gate, with its ancestors;
2. width: everything else.

Inside a request only its `max_nodes` best candidates by path score take part, which is EAGLE-2's
rerank; with budget for all of them and no gate that fires, the result is the `topn` tree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from echo_vllm import ops
from echo_vllm.forecast.plan import DraftPlan
from echo_vllm.policies.base import DraftBatch
from echo_vllm.trees.forest import ROOT, DraftForest
from echo_vllm.trees.pool import NO_CANDIDATE, CandidatePool, Expansion


class EchoPolicy:
    """Gates, then one selection under the batch's budget."""

    def __init__(
        self,
        *,
        max_nodes: int,
        max_depth: int,
        top_k: int,
        width: int,
        gates: Mapping[int, float],
        k_max: int | None,
        floor: int,
        share: str,
    ) -> None:
        """
        Args:
            max_nodes: the most nodes of one request (N).
            max_depth: levels of the deepest tree.
            top_k: nodes of a level that are expanded.
            width: children considered after every node, at least top_k.
            gates: depth -> threshold on the probability of the best path of that depth.
            k_max: the most nodes of the batch; None takes it from the plan's cost model.
            floor: nodes that every request gets first.
            share: "batch" for one budget; "equal" gives every request the same part of it, which
                is EAGLE-2 at the same total, or this policy without its scheduler.
        """
        self.max_nodes = max_nodes
        self.max_depth = max_depth
        self.num_ranks = width
        self.max_frontier = top_k
        self.gates = dict(gates)
        self.k_max = k_max
        self.floor = floor
        self.share = share
        # Per depth, the threshold of the last gate at or above it.
        last = 0.0
        self._taus = []
        for depth in range(1, max_depth + 1):
            last = self.gates.get(depth, last)
            self._taus.append(last)

    def budget(self, batch: DraftBatch) -> int:
        """Nodes that the trees of the batch may have in all (K_max of this step)."""
        plan = batch.plan
        most = batch.num_requests * self.max_nodes
        if self.k_max is not None:
            return max(0, min(most, self.k_max - plan.prefill_tokens))
        if plan.max_rows is None:
            return most
        return max(0, min(most, int(plan.max_rows) - batch.rows))

    def plan(self, num_decoding: int, prefill_tokens: int, max_rows: float | None) -> DraftPlan:
        """The plan of a drafting; where the next step has no budget, nobody drafts."""
        plan = DraftPlan(prefill_tokens=prefill_tokens, max_rows=max_rows)
        if num_decoding and not self.budget(DraftBatch(num_decoding, num_decoding, plan)):
            plan = replace(plan, max_depth=0)
        return plan

    def expand(self, depth: int, pool: CandidatePool, batch: DraftBatch) -> Expansion | None:
        if depth == 1:
            return Expansion(frontier=None, children=None)
        best = pool.rows_of(pool.active, pool.best_of_level(depth - 1))
        going = torch.ones_like(best, dtype=torch.bool)
        if depth - 1 in self.gates:
            going = best.exp() > self.gates[depth - 1]
        if self.share == "batch":
            # Every level of a request takes a node at least: drafting more levels than there is
            # budget for would be for nothing. The most confident go first, ties by request.
            left = self.budget(batch) - pool.first_of_levels().sum()
            order = best.masked_fill(~going, NO_CANDIDATE).argsort(descending=True, stable=True)
            rank = torch.empty_like(order)
            rank[order] = torch.arange(len(order), device=order.device)
            going &= rank < left
        elif depth > self.budget(batch) // max(1, pool.num_requests):
            return None  # A path of that many levels is more than anyone's part.
        return pool.expand_best(depth, self.max_frontier, going)

    def select(self, pool: CandidatePool, batch: DraftBatch) -> DraftForest:
        budget, limit = self.budget(batch), self.max_nodes
        if self.share == "equal":
            limit = min(limit, budget // max(1, pool.num_requests))
        rank = pool.rank()
        scores = pool.path_logprobs.masked_fill(rank >= limit, NO_CANDIDATE)
        # The k-th best of a request never comes before its parent: floors are ancestor-closed.
        tiers = torch.where(self._is_depth(pool), 1, 2)
        tiers = tiers.masked_fill(rank < self.floor, 0).to(torch.int32)
        columns, cu_nodes = ops.select_budget(scores, tiers, pool.parents, budget, limit)
        return pool.take_ragged(columns, cu_nodes)

    def _is_depth(self, pool: CandidatePool) -> torch.Tensor:
        """[R, P] bool: the best node of a level that passed its gate, or an ancestor of one."""
        marked = torch.zeros_like(pool.parents, dtype=torch.bool)
        for depth in range(pool.num_levels, 0, -1):
            level = pool.level(depth)
            best, place = pool.path_logprobs[:, level].max(1, keepdim=True)
            # A gate of 0 lets every candidate pass, but not the lack of one.
            passed = best.exp() > self._taus[depth - 1]
            place += level.start
            marked.scatter_(1, place, marked.gather(1, place) | passed)
            if depth > 1:
                mark_parents(marked, pool.parents[:, level], level)
        return marked


def mark_parents(marked: torch.Tensor, parents: torch.Tensor, level: slice) -> None:
    """Mark, in place, the parents [R, C] of the marked columns of a level; no ROOT among them.

    A request without candidates in the level has ROOT there, and no marks.
    """
    wanted = marked[:, level] & (parents != ROOT)
    # Counted, since a GPU scatters no maxima of truth values.
    counts = torch.zeros(marked.shape, dtype=torch.int32, device=marked.device)
    counts.scatter_add_(1, parents.clamp(min=0), wanted.int())
    marked |= counts > 0
