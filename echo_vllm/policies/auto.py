# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`auto`: as many nodes as pay for themselves, batch-wide.

The batch budget is not given, it is chosen (`cost_aware`), with calibrated probabilities of
acceptance that are corrected while serving.

How deep to draft is decided in the same currency. A request goes one level deeper if the tokens
that the level is expected to add are worth more than the time that drafting and verifying it
takes, at the current price of a second in tokens; a level is drafted if all requests that go on
pay together for what it costs whoever goes on. Whether to draft at all, and down to which level,
is in the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field

from echo_vllm.forecast.drafter_profile import DrafterProfile
from echo_vllm.forecast.forecaster import Forecaster
from echo_vllm.forecast.plan import DraftPlan, Load
from echo_vllm.forecast.survival import SurvivalModel
from echo_vllm.policies.base import DraftBatch, Observation
from echo_vllm.policies.cost_aware import CostAwareConfig, CostAwarePolicy
from echo_vllm.policies.elastic import Floor, Profile
from echo_vllm.transfer import download
from echo_vllm.trees.forest import DraftForest
from echo_vllm.trees.pool import NO_CANDIDATE, CandidatePool, Expansion

Sample = tuple[list[float], list[int], list[int]]
"""Path log-probabilities, depths and least widths of a draft's best candidates."""

DEFAULT_GROWTH = 0.6
"""Without a profile: how often an accepted node has an accepted child."""


class AutoConfig(CostAwareConfig):
    """The section of `auto`."""

    policy: Literal["auto"] = Field(
        default="auto",
        description=(
            "As `echo`, but the budget is what maximises the predicted tokens per second, and may "
            "be nothing. The default policy."
        ),
    )
    floor: Floor = None
    profile: Profile = None

    def filled(self, num_nodes: int) -> Self:
        config = super().filled(num_nodes)
        return config.with_fields(floor=self.checked_floor(self.floor, 0, num_nodes))


class AutoPolicy(CostAwarePolicy):
    """Budget and depth by expected tokens a second."""

    Config = AutoConfig
    without_profile = (
        "it takes the head's own probabilities for true until it has seen enough nodes"
    )
    learns = True
    may_rest = True

    def __init__(
        self, config: AutoConfig, max_nodes: int, profile: DrafterProfile | None = None
    ) -> None:
        assert config.floor is not None  # `filled` sets it.
        super().__init__(
            config,
            max_nodes,
            survival=(
                SurvivalModel.default(config.max_depth) if profile is None else profile.survival()
            ),
            floor=config.floor,
        )
        self.growth = _growth(profile, config.max_depth)
        self.forecaster = Forecaster(
            survival=self.survival,
            max_depth=self.max_depth,
            frontier=self.max_frontier,
            k_max=self.k_max,
            online=self.online,
        )

    # ---- In the scheduler's process ----

    def plan(self, load: Load) -> DraftPlan:
        return self.forecaster.plan(load, self.costs())

    def observe(self, step: Observation) -> None:
        super().observe(step)
        if step.report is None:  # A rest.
            self.forecaster.observe_acceptance([], [])
            return
        for sample in step.report["samples"]:
            self.forecaster.observe_draft(*sample)
        self.forecaster.observe_acceptance(step.report["predicted"], step.report["accepted"])

    # ---- In the worker's process ----

    def frontier_of(self, batch: DraftBatch) -> int:
        # Every request of a level has as many rows, and a probe shows what the widest trees bring.
        width = batch.plan.width
        return self.max_frontier if width is None or len(batch.probes) else width

    def expand(self, depth: int, pool: CandidatePool, batch: DraftBatch) -> Expansion | None:
        if depth == 1:
            return Expansion(frontier=None, children=None)
        requests, plan = pool.active, batch.plan
        frontier = pool.best_frontier(depth - 1, self.frontier_of(batch), requests)
        going = torch.ones(len(requests), dtype=torch.bool)
        if plan.max_depth is not None and depth > plan.max_depth:
            going[:] = False
        elif plan.cost is not None and plan.price > 0:
            going = self._pays(depth, frontier, pool, batch)
        if len(batch.probes):
            going |= torch.isin(requests, batch.probes)
        requests, frontier = requests[going], frontier[pool.on_device(going.nonzero().squeeze(1))]
        return Expansion(frontier, None, requests) if len(requests) else None

    def _pays(
        self, depth: int, frontier: torch.Tensor, pool: CandidatePool, batch: DraftBatch
    ) -> torch.Tensor:
        """[A] bool: which of the active requests are worth another level."""
        plan = batch.plan
        assert plan.cost is not None
        survival = pool.rows_of(pool.active, self.probabilities(pool, batch))
        (reached,) = download(survival.gather(1, frontier).sum(1))
        growth = (plan.growth or self.growth)[depth - 2]
        gain = reached.clamp(max=1.0).double().numpy() * growth
        num_active, width = frontier.shape
        level, verify = plan.cost.draft_level, plan.cost.verify
        # Of a whole level's costs, what one request more or less changes, and what none does.
        each = (float(level(num_active * width)) - float(level(width))) / max(1, num_active - 1)
        fixed = max(0.0, float(level(width)) - each)
        each += (float(verify(batch.rows + num_active)) - float(verify(batch.rows))) / num_active
        net = gain - plan.price * each
        order = np.argsort(-net, kind="stable")
        going = np.zeros(num_active, dtype=bool)
        if np.maximum(net, 0).sum() > plan.price * fixed:
            going[order[: int((net > 0).sum())]] = True
        return torch.from_numpy(going)

    def report(
        self,
        *,
        verified: DraftForest,
        num_accepted: torch.Tensor,
        pool: CandidatePool | None,
        probes: torch.Tensor,
    ) -> dict[str, Any]:
        """Per depth how many nodes were accepted and how many the calibration predicts of those
        verified; and what the forecast remembers of a drafting (`samples`)."""
        depths = verified.depths.to(torch.int64)
        num_levels = int(depths.max()) if len(depths) else 0
        predicted = torch.zeros(num_levels).index_add_(
            0, depths - 1, self.survival.probability(verified.path_logprobs, depths)
        )
        reached = num_accepted.unsqueeze(1) > torch.arange(num_levels)
        return {
            "predicted": predicted.tolist(),
            "accepted": reached.sum(0).tolist(),
            "samples": [] if pool is None else self.samples(pool, probes),
        }

    def samples(self, pool: CandidatePool, probes: torch.Tensor) -> list[Sample]:
        """What the forecast remembers of each probe that drafted to full depth.

        Of no other request, even if it was drafted as deep: those are the promising ones.
        """
        if pool.num_levels < self.max_depth or not len(probes):
            return []
        best = pool.rows_of(probes, pool.best_first())[:, : self.max_nodes]
        logprobs = pool.rows_of(probes, pool.path_logprobs)
        widths = least_widths(pool, probes, self.forecaster.widths)
        fields = download(
            logprobs.gather(1, best),
            pool.depths()[best],
            widths.gather(1, best),
            logprobs[:, pool.level_starts[-1]].contiguous(),
        )
        *nodes, deepest = (field.tolist() for field in fields)
        drafts = zip(*nodes, deepest, strict=True)
        return [tuple(draft) for *draft, last in drafts if last > NO_CANDIDATE]


def least_widths(
    pool: CandidatePool, requests: torch.Tensor, widths: Sequence[int]
) -> torch.Tensor:
    """[A, P] int64: the least of the rising `widths` of the frontier with which the trees of
    `requests` [A], on the host, would have each candidate; the last one where none of the others
    would."""
    scores = pool.rows_of(requests, pool.path_logprobs)
    parents = pool.rows_of(requests, pool.parents)
    least = torch.full_like(parents, widths[-1])
    for width in reversed(widths[:-1]):
        # Whether a candidate is expanded; the last column stands for the root.
        expanded = scores.new_zeros(len(scores), pool.num_columns + 1, dtype=torch.bool)
        expanded[:, -1] = True
        for depth in range(1, pool.num_levels + 1):
            level = pool.level(depth)
            exists = expanded.gather(1, parents[:, level] % expanded.shape[1])
            least[:, level].masked_fill_(exists, width)
            there = scores[:, level].masked_fill(~exists, NO_CANDIDATE)
            best = there.argsort(dim=1, descending=True, stable=True)[:, :width]
            expanded.scatter_(1, best + level.start, exists.gather(1, best))
    return least


def _growth(profile: DrafterProfile | None, max_depth: int) -> list[float]:
    """How often depth d + 1 is accepted where depth d is, for d = 1 .. max_depth - 1."""
    growth: list[float] = []
    if profile is not None:
        growth = [
            min(1.0, below.acceptance / above.acceptance) if above.acceptance > 0 else 0.0
            for above, below in pairwise(profile.depths)
        ]
    last = growth[-1] if growth else DEFAULT_GROWTH
    return (growth + [last] * max_depth)[: max_depth - 1]
