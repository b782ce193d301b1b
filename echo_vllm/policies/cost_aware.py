# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The selection that `auto` and `evict` share: as many nodes, batch-wide, as pay for themselves.

With nodes taken in the order of their probability of acceptance, the number K of them is chosen
that maximises

    (decoding requests + sum of the K best probabilities) / predicted step time(K)

which for a step time that depends on the number of rows alone is the best of all ancestor-closed
selections, because a node is never more probable than its parent.
"""

from __future__ import annotations

import numpy as np
import torch

from echo_vllm import ops
from echo_vllm.forecast.survival import SurvivalModel
from echo_vllm.policies.base import DraftBatch
from echo_vllm.transfer import download
from echo_vllm.trees.forest import ROOT, DraftForest
from echo_vllm.trees.pool import NO_CANDIDATE, CandidatePool

PROBED_NODES = 2
"""Nodes of a probe that are verified in any case."""


class CostAwarePolicy:
    """Selects by expected tokens a second; how trees grow is the subclass's matter."""

    def __init__(
        self,
        *,
        max_nodes: int,
        max_depth: int,
        top_k: int,
        width: int,
        survival: SurvivalModel,
        k_max: int | None,
        floor: int,
    ) -> None:
        """
        Args:
            max_nodes, max_depth, top_k, width: as for `EchoPolicy`.
            survival: probability of acceptance of a candidate.
            k_max: an upper limit on the nodes of the batch, None for no limit but max_nodes each.
            floor: nodes that every request gets, whether they pay or not.
        """
        self.max_nodes = max_nodes
        self.max_depth = max_depth
        self.num_ranks = width
        self.max_frontier = top_k
        self.survival = survival
        self.k_max = k_max
        self.floor = floor
        self._moved: tuple[SurvivalModel, torch.device, SurvivalModel] | None = None

    def _survival_on(self, device: torch.device) -> SurvivalModel:
        """The model with its table on `device`, where it stays."""
        if self._moved is None or self._moved[:2] != (self.survival, device):
            self._moved = self.survival, device, self.survival.to(device)
        return self._moved[2]

    def probabilities(self, pool: CandidatePool, batch: DraftBatch) -> torch.Tensor:
        """[R, P] float32 in 0..1: how probably each candidate is accepted; never above its
        parent's, and 0 where there is no candidate."""
        key = (id(self), batch.plan.factors)
        found = pool.path_logprobs[:, :0]
        if pool.memo is not None and pool.memo[0] == key:
            found = pool.memo[1]
        done = found.shape[1]
        if done == pool.num_columns:
            return found
        model = self._survival_on(pool.device)
        if batch.plan.factors:
            model = model.with_factors(pool.on_device(torch.tensor(batch.plan.factors)))
        new = model.probability(pool.path_logprobs[:, done:], pool.depths()[done:])
        found = torch.cat([found, new], dim=1)
        for depth in range(1, pool.num_levels + 1):
            level = pool.level(depth)
            if level.start < done or depth == 1:
                continue
            parents = pool.parents[:, level]
            above = found.gather(1, parents.clamp(min=0)).masked_fill(parents == ROOT, 0.0)
            found[:, level] = torch.minimum(found[:, level], above)
        pool.memo = (key, found)
        return found

    def select(self, pool: CandidatePool, batch: DraftBatch) -> DraftForest:
        rank = pool.rank()
        found = self.probabilities(pool, batch)
        exists = (pool.path_logprobs > NO_CANDIDATE) & (rank < self.max_nodes)
        scores = found.masked_fill(~exists, NO_CANDIDATE)
        floors = rank.new_full((pool.num_requests, 1), self.floor)
        if len(batch.probes):
            # Whatever they are thought to be worth: an estimate that nobody tests stays wrong.
            floors[pool.on_device(batch.probes)] = max(self.floor, PROBED_NODES)
        tiers = torch.where(rank < floors, 0, 1).to(torch.int32)
        budget = self.budget(scores, tiers, pool, batch)
        columns, cu_nodes = ops.select_budget(scores, tiers, pool.parents, budget, self.max_nodes)
        return pool.take_ragged(columns, cu_nodes)

    def budget(
        self, scores: torch.Tensor, tiers: torch.Tensor, pool: CandidatePool, batch: DraftBatch
    ) -> int:
        """The number of nodes with the most expected tokens a second; the fewest among equals."""
        scores, tiers = download(scores, tiers)
        exists = scores > NO_CANDIDATE
        first = scores[exists & (tiers == 0)]
        most = int(exists.sum())
        if self.k_max is not None:
            most = min(most, max(0, self.k_max - batch.plan.prefill_tokens))
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
        levels = [size * self.max_frontier for size in pool.level_sizes()[1:]]
        return cost.step(batch.rows + num_nodes, levels, pool.num_requests)
