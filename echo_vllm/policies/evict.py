# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`evict`: every tree is drafted in full, and the part of it that pays is verified.

EVICT (arXiv 2605.00342) is made for mixtures of experts, where each row of a forward may wake
experts that no other row needs, so that a forward's time keeps rising with its rows. Nodes are
ordered by the drafter's own path probability, and the prefix is verified that maximises expected
tokens over measured step time. Nothing is trained or tuned. The paper does this for one request;
here one prefix is chosen for the whole batch.

Against `auto` it lacks calibration, the choice of depth and the choice not to draft.
"""

from __future__ import annotations

from echo_vllm.forecast import StepCost
from echo_vllm.forecast.plan import DraftPlan
from echo_vllm.forecast.survival import SurvivalModel
from echo_vllm.policies.base import DraftBatch
from echo_vllm.policies.cost_aware import CostAwarePolicy
from echo_vllm.trees.pool import CandidatePool, Expansion


class EvictPolicy(CostAwarePolicy):
    """EAGLE-2's candidates, cut where the next node costs more than it promises."""

    def __init__(
        self, *, max_nodes: int, max_depth: int, top_k: int, width: int, k_max: int | None
    ) -> None:
        """
        Args:
            max_nodes, max_depth, top_k, width, k_max: as for `CostAwarePolicy`.
        """
        super().__init__(
            max_nodes=max_nodes,
            max_depth=max_depth,
            top_k=top_k,
            width=width,
            survival=SurvivalModel.default(max_depth),
            k_max=k_max,
            floor=0,
        )

    def plan(self, prefill_tokens: int, cost: StepCost | None) -> DraftPlan:
        """The plan of a drafting; without a cost, as before it is known, everything is verified."""
        return DraftPlan(prefill_tokens=prefill_tokens, cost=cost)

    def expand(self, depth: int, pool: CandidatePool, batch: DraftBatch) -> Expansion | None:
        if depth == 1:
            return Expansion(frontier=None, children=None)
        return pool.expand_best(depth, self.max_frontier)
