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

from typing import Literal

from pydantic import Field

from echo_vllm.forecast.drafter_profile import DrafterProfile
from echo_vllm.forecast.plan import DraftPlan, Load
from echo_vllm.forecast.survival import SurvivalModel
from echo_vllm.policies.cost_aware import CostAwareConfig, CostAwarePolicy


class EvictConfig(CostAwareConfig):
    """The section of `evict`."""

    policy: Literal["evict"] = Field(
        default="evict",
        description=(
            "Trees are drafted in full, and what pays by the drafter's own probabilities is "
            "verified."
        ),
    )


class EvictPolicy(CostAwarePolicy):
    """EAGLE-2's candidates, cut where the next node costs more than it promises."""

    Config = EvictConfig

    def __init__(
        self, config: EvictConfig, max_nodes: int, profile: DrafterProfile | None = None
    ) -> None:
        super().__init__(config, max_nodes, survival=SurvivalModel.default(config.max_depth))

    def plan(self, load: Load) -> DraftPlan:
        """Without a cost, as before it is known, everything is verified."""
        costs = self.costs()
        return DraftPlan(
            prefill_tokens=load.prefill_tokens, cost=None if costs is None else costs.trees
        )
