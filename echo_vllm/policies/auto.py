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

import numpy as np
import torch

from echo_vllm.forecast.forecaster import Forecaster
from echo_vllm.forecast.survival import SurvivalModel
from echo_vllm.policies.base import DraftBatch
from echo_vllm.policies.cost_aware import CostAwarePolicy
from echo_vllm.transfer import download
from echo_vllm.trees.pool import CandidatePool, Expansion


class AutoPolicy(CostAwarePolicy):
    """Budget and depth by expected tokens a second."""

    def __init__(
        self,
        *,
        max_nodes: int,
        max_depth: int,
        top_k: int,
        width: int,
        survival: SurvivalModel,
        growth: Sequence[float],
        k_max: int | None,
        floor: int,
    ) -> None:
        """
        Args:
            max_nodes, max_depth, top_k, width, k_max, floor: as for `CostAwarePolicy`.
            survival: calibrated probability of acceptance of a candidate.
            growth: per depth d = 1, 2, ...: how often some node of depth d + 1 is accepted, given
                that one of depth d is.
        """
        super().__init__(
            max_nodes=max_nodes,
            max_depth=max_depth,
            top_k=top_k,
            width=width,
            survival=survival,
            k_max=k_max,
            floor=floor,
        )
        self.growth = list(growth)

    def forecaster(self, *, online: bool) -> Forecaster:
        """What decides this policy's plans."""
        return Forecaster(
            survival=self.survival,
            max_depth=self.max_depth,
            frontier=self.max_frontier,
            k_max=self.k_max,
            online=online,
        )

    def expand(self, depth: int, pool: CandidatePool, batch: DraftBatch) -> Expansion | None:
        if depth == 1:
            return Expansion(frontier=None, children=None)
        requests, plan = pool.active, batch.plan
        frontier = pool.best_frontier(depth - 1, self.max_frontier, requests)
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
        found = pool.rows_of(pool.active, self.probabilities(pool, batch))
        (reached,) = download(found.gather(1, frontier).sum(1))
        gain = reached.clamp(max=1.0).double().numpy() * self.growth[depth - 2]
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

    def samples(
        self, pool: CandidatePool, probes: torch.Tensor
    ) -> list[tuple[list[float], list[int]]]:
        """What the forecast remembers of a drafting: path log-probabilities and depths of the best
        candidates of its probes.

        Of no other request, even if it was drafted to full depth: those are the promising ones.
        """
        if pool.num_levels < self.max_depth or not len(probes):
            return []
        best = pool.rows_of(probes, pool.best_first())[:, : self.max_nodes]
        logprobs = pool.rows_of(probes, pool.path_logprobs).gather(1, best)
        logprobs, depths = download(logprobs, pool.depths()[best])
        return list(zip(logprobs.tolist(), depths.tolist(), strict=True))
