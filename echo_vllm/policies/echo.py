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
2. width: the level at which a request stopped, with the ancestors of its nodes;
3. everything else.

A request stops at the first level whose best node fails the gate there; between two gates the
threshold of the upper one goes on to hold. With `width_at` "anywhere" the classes 2 and 3 are one.

Inside a request only its `max_nodes` best candidates by path score take part, which is EAGLE-2's
rerank; with budget for all of them and no gate that fires, the result is the `topn` tree.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field

from echo_vllm import ops
from echo_vllm.forecast import StepCost, budget_rows
from echo_vllm.forecast.drafter_profile import DrafterProfile
from echo_vllm.forecast.plan import DraftPlan, Load
from echo_vllm.policies.base import Cut, DraftBatch, DraftPolicy
from echo_vllm.policies.elastic import Floor, GatedConfig
from echo_vllm.trees.drawn import DrawnLevel, DrawnPool
from echo_vllm.trees.forest import ROOT, DraftForest
from echo_vllm.trees.pool import (
    NO_CANDIDATE,
    CandidatePool,
    Expansion,
    best_first,
    places_in,
)
from echo_vllm.trees.ranked import FILLER_TIER, RankedTrees

REST_BELOW = 0.25
"""Nodes of the budget a request below which nobody drafts: all would catch up and draft a level for
the few that get one."""

RESUME_FROM = 0.5
"""The same to begin again."""


class EchoPolicyConfig(GatedConfig):
    """The section of `echo`."""

    policy: Literal["echo"] = Field(
        default="echo",
        description=(
            "Calibrated gates stop unsure requests early, and one budget (`k_max`) for the whole "
            "batch is spent on depth, then width."
        ),
    )
    floor: Floor = None
    share: Literal["batch", "equal"] = Field(
        default="batch",
        description=(
            "`batch` spends one budget over the batch, `equal` gives every request the same part "
            'of it, which is EAGLE-2 at the same total (a baseline). Default "batch".'
        ),
    )

    width_at: Literal["truncation", "anywhere"] = Field(
        default="truncation",
        description=(
            "Where trees are widened first with what is left of the budget: `truncation`, at the "
            "levels at which gates stopped requests, as in the paper, or `anywhere`, by score "
            'alone (an ablation). Default "truncation".'
        ),
    )

    def filled(self, num_nodes: int) -> Self:
        config = super().filled(num_nodes)
        return config.with_fields(floor=self.checked_floor(self.floor, 1, num_nodes))


class EchoPolicy(DraftPolicy):
    """Gates, then one selection under the batch's budget."""

    Config = EchoPolicyConfig
    without_profile = "its gates are built-in values that were never measured for this head"
    may_rest = True
    draws = True
    has_order = True

    def __init__(
        self, config: EchoPolicyConfig, max_nodes: int, profile: DrafterProfile | None = None
    ) -> None:
        super().__init__(config, max_nodes)
        assert config.width is not None  # `filled` sets both.
        assert config.floor is not None
        self.num_ranks = config.width
        self.k_max = config.k_max
        self.needs_cost = self.k_max is None
        self.floor = config.floor
        self.share = config.share
        self.width_at = config.width_at
        self.gates = config.gates_with(profile)
        self._max_rows: float | None = None
        self._rests = False
        # Per depth, the threshold of the last gate at or above it.
        last = 0.0
        self._taus = []
        for depth in range(1, self.max_depth + 1):
            last = self.gates.get(depth, last)
            self._taus.append(last)

    def set_cost(self, cost: StepCost) -> None:
        self._max_rows = budget_rows(cost.verify)

    def batch_limit(self, load: Load) -> int | None:
        return self._limit(load, self._max_rows)

    def _limit(self, load: Load, max_rows: float | None) -> int | None:
        """Nodes that a step of this load has room for (K_max); None where that is not known."""
        if self.k_max is None and max_rows is not None:
            return max(0, int(max_rows) - load.rows)
        return super().batch_limit(load)

    def request_limit(self, load: Load) -> int:
        return self.max_nodes if self.share == "batch" else self.equal_part(load, load.able)

    def budget(self, batch: DraftBatch) -> int:
        """Nodes that the trees of the batch may have in all."""
        limit = self._limit(batch.load, batch.plan.max_rows)
        most = batch.num_requests * self.max_nodes
        return most if limit is None else min(most, limit)

    def plan(self, load: Load) -> DraftPlan:
        """Where the next step has no budget to speak of, nobody drafts."""
        if load.able:
            self._rests = not self._pays(load)
        rests = self._rests and load.num_decoding > 0
        return DraftPlan(
            max_depth=0 if rests else None,
            prefill_tokens=load.prefill_tokens,
            max_rows=self._max_rows,
            reads_prompts=not rests,
        )

    def _pays(self, load: Load) -> bool:
        """Whether the budget is worth drafting for. After a rest it must have as many nodes, up to
        the horizon, as there are tokens to catch up with."""
        limit = self.batch_limit(load)
        if limit is None:
            return True
        if self.share == "equal" or load.num_drawn == load.able:
            limit -= limit % load.able  # What gives no request a node is of no use to anyone.
        if not self._rests:
            return limit >= REST_BELOW * load.able and limit > 0
        return limit >= RESUME_FROM * load.able and limit * load.steps_ahead >= load.waiting

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
        scores, tiers = self._ranks(pool, limit)
        columns, cu_nodes = ops.select_budget(scores, tiers, pool.parents, budget, limit)
        return pool.take_ragged(columns, cu_nodes)

    def ranked(self, pool: CandidatePool, batch: DraftBatch) -> RankedTrees:
        return RankedTrees.best(pool, *self._ranks(pool, self.max_nodes), self.max_nodes)

    def _ranks(self, pool: CandidatePool, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and tiers [R, P] of the `limit` best candidates of each request."""
        rank = pool.rank()
        scores = pool.path_logprobs.masked_fill(rank >= limit, NO_CANDIDATE)
        # The k-th best of a request never comes before its parent: floors are ancestor-closed.
        tiers = torch.where(self._is_depth(pool), 1, 2)
        if self.width_at == "truncation":
            tiers += (tiers > 1) & ~self._is_width(pool)
        return scores, tiers.masked_fill(rank < self.floor, 0).to(torch.int32)

    def drawn_cut(self, batch: DraftBatch) -> Cut:
        """An equal part of the budget: one that went by promise would tie a request's nodes to what
        is drawn for others, and a scheduler that compares sizes would tie them to its own."""
        return Cut(min(self.max_nodes, self.budget(batch) // max(1, batch.num_requests)))

    def promising(self, level: DrawnLevel, batch: DraftBatch) -> torch.Tensor | None:
        """A gate asks what the best node of its level promises."""
        if level.depth not in self.gates:
            return None
        return level.promises.amax(1) > self.gates[level.depth]

    def drawn_ranked(self, pool: DrawnPool, batch: DraftBatch, cut: Cut) -> RankedTrees:
        """The floor; an equal part of the budget, beside what depth takes of the best candidates;
        then what is left of it, by worth. A place in the order of worth is known before its token.
        """
        places = places_in(best_first(pool.worths))
        last = 3 if self.width_at == "truncation" else 2
        tiers = torch.where(places < cut.max_nodes, 1, last).masked_fill(places < self.floor, 0)
        trees = RankedTrees.best(pool, pool.worths, tiers.to(torch.int32), self.max_nodes)
        # As path scores are; behind the last node is a score of 0 as ever.
        is_node = trees.tiers < FILLER_TIER
        return replace(trees, scores=torch.where(is_node, trees.scores.log(), 0.0))

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

    def _is_width(self, pool: CandidatePool) -> torch.Tensor:
        """[R, P] bool: candidates of the level at which their request stopped, and their
        ancestors."""
        marked = torch.zeros_like(pool.parents, dtype=torch.bool)
        passed = torch.ones(pool.num_requests, 1, dtype=torch.bool, device=pool.device)
        for depth in range(1, pool.num_levels + 1):
            best = pool.best_of_level(depth).unsqueeze(1)
            # Who has no candidate here was stopped above, by a gate or for lack of budget.
            passed &= best > NO_CANDIDATE
            stops = passed & (best.exp() <= self._taus[depth - 1])
            marked[:, pool.level(depth)] = stops
            passed &= ~stops
        for depth in range(pool.num_levels, 1, -1):
            level = pool.level(depth)
            mark_parents(marked, pool.parents[:, level], level)
        return marked


def mark_parents(marked: torch.Tensor, parents: torch.Tensor, level: slice) -> None:
    """Mark, in place, the parents [R, C] of the marked columns of a level; no ROOT among them.

    A request without candidates in the level has ROOT there, and no marks.
    """
    upward = marked[:, level] & (parents != ROOT)
    # Counted, since a GPU scatters no maxima of truth values.
    counts = torch.zeros(marked.shape, dtype=torch.int32, device=marked.device)
    counts.scatter_add_(1, parents.clamp(min=0), upward.int())
    marked |= counts > 0
