# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The selection that `auto` and `evict` share: as many nodes, batch-wide, as pay for themselves.

With nodes taken in the order of their probability of acceptance, the number K of them is chosen
that maximises

    (decoding requests + sum of the K best probabilities) / predicted step time(K)

which for a step time that depends on the number of rows alone is the best of all ancestor-closed
selections, because a node is never more probable than its parent.

Where the host never sees a tree, K is chosen before the probabilities are known that it will meet.
So the device says of every drafting what the best nodes of it come to (`gain_curve`), and K is what
would have been best for the last few of them, at the load and the costs of now; which nodes they
are is decided by the probabilities of now (`ranked`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from echo_vllm import ops
from echo_vllm.config import SECTION, EchoConfigError
from echo_vllm.forecast import Costs, Hinge, OnlineCost, StepCost
from echo_vllm.forecast.forecaster import PROBED_NODES
from echo_vllm.forecast.plan import DraftPlan, Load
from echo_vllm.forecast.survival import SurvivalModel
from echo_vllm.policies.base import DraftBatch, DraftPolicy, Observation
from echo_vllm.policies.elastic import ElasticConfig
from echo_vllm.transfer import download
from echo_vllm.trees.forest import ROOT, DraftForest
from echo_vllm.trees.pool import NO_CANDIDATE, CandidatePool
from echo_vllm.trees.ranked import FILLER_TIER, RankedTrees

HEARD_TREES = 8
"""Trees after which what was heard of earlier ones counts half: one tree says little of the next,
and a large batch needs no memory."""

TOTALS = 128
"""Numbers of nodes that are priced for a batch."""

UNSETTLED = 2
"""Plain steps behind others that are no measure of plain decoding."""


class CostAwareConfig(ElasticConfig):
    """The section of a policy that weighs tokens against time."""

    gamma: float | None = Field(
        default=None,
        ge=0,
        le=1000,
        description=(
            "With `k_max`: replace the measured cost of a forward by the hinge T * (1 + gamma * "
            "max(0, rows - k_max)), T being the time of one row. Range 0 to 1000. Default null: "
            "the measured cost."
        ),
    )
    online: bool = Field(
        default=True,
        description=(
            "Correct the cost model, and for `auto` the calibration, by what is observed while "
            "serving. Default true."
        ),
    )

    def filled(self, num_nodes: int) -> Self:
        if self.gamma is not None and self.k_max is None:
            raise EchoConfigError(
                f"{SECTION}.gamma needs {SECTION}.k_max, the rows at which the hinge begins, got "
                f"gamma {self.gamma} alone; set k_max too, or remove gamma."
            )
        return super().filled(num_nodes)


class CostAwarePolicy(DraftPolicy):
    """Selects by expected tokens a second; how trees grow is the subclass's matter."""

    has_order = True
    needs_cost = True

    def __init__(
        self, config: CostAwareConfig, max_nodes: int, *, survival: SurvivalModel, floor: int = 0
    ) -> None:
        """
        Args:
            config, max_nodes: as for `DraftPolicy`.
            survival: probability of acceptance of a candidate.
            floor: nodes that every request gets, whether they pay or not.
        """
        super().__init__(config, max_nodes)
        assert config.width is not None  # `filled` sets it.
        self.num_ranks = config.width
        self.k_max = config.k_max
        self.gamma = config.gamma
        self.online = config.online
        self.survival = survival
        self.floor = floor
        self._cost: OnlineCost | None = None
        self._rests = 0
        """Steps that rested, up to now."""
        self._moved: dict[SurvivalModel, SurvivalModel] = {}
        """Models with their tables on the worker's device, where they stay."""
        # Of draftings that nobody saw: what k nodes a tree come to, and what the last one ran.
        self._gains: NDArray[np.float64] | None = None
        self._levels: Sequence[int] = ()

    # ---- In the scheduler's process ----

    def set_cost(self, cost: StepCost) -> None:
        if self.gamma is not None and self.k_max is not None:
            hinge = Hinge(float(self.k_max), self.gamma, float(cost.verify(1)))
            cost = StepCost(hinge.to_curve(), cost.draft_level, cost.catch_up, cost.other)
        self._cost = OnlineCost(cost)

    def costs(self) -> Costs | None:
        return None if self._cost is None else self._cost.costs()

    def num_nodes_of(
        self, load: Load, sizes: Sequence[int], plan: DraftPlan, num_probes: int
    ) -> int:
        """The number with the most expected tokens a second, and no less than all floors; before
        anything was heard of a drafting, as many as the plan expects."""
        most = super().num_nodes_of(load, sizes, plan, num_probes)
        if plan.max_rows is not None:
            most = min(most, max(0, int(plan.max_rows) - load.rows))
        count = len(sizes)
        of_probes = max(self.floor, PROBED_NODES) - self.floor
        least = min(most, count * self.floor + num_probes * of_probes)
        if plan.cost is None or not most:
            return most
        if self._gains is None:
            return max(least, min(most, round(plan.nodes * count)))
        totals = np.unique(np.linspace(least, most, TOTALS).round())
        places = np.arange(len(self._gains))
        gains = count * np.interp(totals / max(1, count), places, self._gains)
        seconds = plan.cost.step(load.rows + totals, self._levels, count)
        return int(totals[np.argmax((load.num_decoding + gains) / seconds)])

    def observe(self, step: Observation) -> None:
        num_trees, *gains = (step.report or {}).get("gains", [0.0])
        if num_trees:
            self._hear(num_trees, np.array(gains))
            self._levels = step.level_rows
        if self._cost is None or not self.online:
            return
        if step.committed:
            self._cost.observe_draft(step.level_rows, step.committed, step.draft_s)
        trees = step.num_nodes > 0
        self._rests = self._rests + 1 if step.rested else 0
        # The first plain steps behind others are not what a row of them is; and a step may have no
        # tree and yet be no plain one: it samples as if there were some.
        if not trees and self.may_rest and self._rests <= UNSETTLED:
            return
        if self.gamma is None:  # Else the user says what a target forward costs.
            if step.other_s is not None and (step.committed or not trees):
                seconds = step.verify_s + step.draft_s + step.other_s
                self._cost.observe_step(
                    step.rows, step.level_rows, step.committed, seconds, trees=trees
                )
            self._cost.observe_verify(step.rows, step.verify_s)
        if step.other_s is not None:
            self._cost.observe_other(step.other_s, trees=trees)

    def _hear(self, num_trees: float, gains: NDArray[np.float64]) -> None:
        """`gain_curve` of a drafting."""
        if self._gains is not None:
            keep = 0.5 ** (num_trees / HEARD_TREES)
            gains = keep * self._gains + (1 - keep) * gains
        self._gains = gains

    # ---- In the worker's process ----

    def frontier_of(self, batch: DraftBatch) -> int:
        """Nodes of a request that the drafter expands of a level."""
        return self.max_frontier

    def _survival_on(
        self, device: torch.device, model: SurvivalModel | None = None
    ) -> SurvivalModel:
        """A model, by default that of the best candidates, with its table on `device`."""
        model = model or self.survival
        if model not in self._moved or self._moved[model].device != device:
            self._moved[model] = model.to(device)
        return self._moved[model]

    def probabilities(self, pool: CandidatePool, batch: DraftBatch) -> torch.Tensor:
        """[R, P] float32 in 0..1: how probably each candidate is accepted; never above its
        parent's, and 0 where there is no candidate."""
        key = (id(self), batch.plan.factors)
        survival = pool.path_logprobs[:, :0]
        if pool.memo is not None and pool.memo[0] == key:
            survival = pool.memo[1]
        done = survival.shape[1]
        if done == pool.num_columns:
            return survival
        model = self._survival_on(pool.device)
        if batch.plan.factors:
            model = model.with_factors(pool.on_device(torch.tensor(batch.plan.factors)))
        new = model.probability(pool.path_logprobs[:, done:], pool.depths()[done:])
        survival = torch.cat([survival, new], dim=1)
        for depth in range(1, pool.num_levels + 1):
            level = pool.level(depth)
            if level.start < done or depth == 1:
                continue
            parents = pool.parents[:, level]
            above = survival.gather(1, parents.clamp(min=0)).masked_fill(parents == ROOT, 0.0)
            survival[:, level] = torch.minimum(survival[:, level], above)
        pool.memo = (key, survival)
        return survival

    def select(self, pool: CandidatePool, batch: DraftBatch) -> DraftForest:
        scores, tiers = self._ranks(pool, batch)
        budget = self.budget(scores, tiers, pool, batch)
        columns, cu_nodes = ops.select_budget(scores, tiers, pool.parents, budget, self.max_nodes)
        return pool.take_ragged(columns, cu_nodes)

    def ranked(self, pool: CandidatePool, batch: DraftBatch) -> RankedTrees:
        return RankedTrees.best(pool, *self._ranks(pool, batch), self.max_nodes)

    def _ranks(self, pool: CandidatePool, batch: DraftBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and tiers [R, P] of the `max_nodes` best candidates of each request."""
        rank = pool.rank()
        exists = (pool.path_logprobs > NO_CANDIDATE) & (rank < self.max_nodes)
        scores = self.probabilities(pool, batch).masked_fill(~exists, NO_CANDIDATE)
        floors = torch.full((pool.num_requests, 1), self.floor)
        if len(batch.probes):
            # Whatever they are thought to be worth: an estimate that nobody tests stays wrong.
            floors[batch.probes] = max(self.floor, PROBED_NODES)
        return scores, torch.where(rank < pool.on_device(floors), 0, 1).to(torch.int32)

    def notes_of_drafted(
        self, pool: CandidatePool | None, trees: RankedTrees, probes: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return (gain_curve(trees, self.max_nodes),)

    def report_of_notes(
        self, verified: Sequence[NDArray[Any]], drafted: Sequence[NDArray[Any]]
    ) -> dict[str, Any] | None:
        return {"gains": drafted[0].tolist()} if drafted else None

    def budget(
        self, scores: torch.Tensor, tiers: torch.Tensor, pool: CandidatePool, batch: DraftBatch
    ) -> int:
        """The number of nodes with the most expected tokens a second; the fewest among equals."""
        scores, tiers = download(scores, tiers)
        exists = scores > NO_CANDIDATE
        first = scores[exists & (tiers == 0)]
        most = int(exists.sum())
        if (limit := self.batch_limit(batch.load)) is not None:
            most = min(most, limit)
        if batch.plan.max_rows is not None:
            most = min(most, max(0, int(batch.plan.max_rows) - batch.rows))
        if batch.plan.cost is None:
            return most
        rest = scores[exists & (tiers > 0)].sort(descending=True).values
        gains = torch.cat([first.sort(descending=True).values, rest]).double().numpy()[:most]
        least = min(len(first), most)
        tokens = batch.num_decoding + np.concatenate([[0.0], np.cumsum(gains)])
        seconds = self.seconds(np.arange(most + 1), pool, batch)
        return least + int(np.argmax((tokens / seconds)[least:]))

    def seconds(self, num_nodes: np.ndarray, pool: CandidatePool, batch: DraftBatch) -> np.ndarray:
        """Predicted time of a step that verifies `num_nodes` nodes, with the drafting that led to
        this pool."""
        cost = batch.plan.cost
        assert cost is not None
        width = self.frontier_of(batch)
        levels = [size * width for size in pool.level_sizes()[1:]]
        return cost.step(batch.rows + num_nodes, levels, pool.num_requests)


def gain_curve(trees: RankedTrees, max_nodes: int) -> torch.Tensor:
    """[2 + max_nodes] float32, of trees whose scores are probabilities: how many trees have nodes,
    then for k = 0 .. max_nodes what the best k nodes a tree, over all of them, come to together,
    in accepted tokens a tree. Nothing waits for the device."""
    is_node = trees.tiers < FILLER_TIER
    num_trees = is_node.any(1).sum()
    best = trees.scores.masked_fill(~is_node, 0.0).flatten().sort(descending=True).values
    sums = torch.cat([best.new_zeros(1), best.cumsum(0)])
    places = torch.arange(1 + max_nodes, device=best.device) * num_trees
    gains = sums[places.clamp(max=len(best))] / num_trees.clamp(min=1)
    return torch.cat([num_trees.to(gains.dtype).view(1), gains])
