# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Requests that stop at a depth of their own, because they may emit no more tokens than that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from echo_vllm.forecast import CostCurve, StepCost
from echo_vllm.forecast.plan import DraftPlan
from echo_vllm.policies import DraftBatch, DraftPolicy
from echo_vllm.trees.forest import DraftForest
from tests.policies.test_policies import VOCAB, grow, paths_of, policy_of

LIMITS = [3, 1, 4, 2, 1, 4]
TREE = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0, 0]]
COST = StepCost(
    verify=CostCurve((1.0, 64.0, 65.0), (1.0, 1.0, 1.02)),
    draft_level=CostCurve((1.0,), (0.01,)),
    catch_up=CostCurve((1.0,), (0.01,)),
)
PLAN = DraftPlan(cost=COST, price=1.0)

SECTIONS: dict[str, dict[str, Any]] = {
    "chain": {"num_nodes": 4},
    "static": {"num_nodes": 9, "tree": TREE},
    "topn": {"num_nodes": 12, "max_depth": 4, "top_k": 3},
    "echo": {"num_nodes": 12, "max_depth": 4, "top_k": 3, "k_max": 40, "gates": {"2": 0.001}},
    "auto": {"num_nodes": 12, "max_depth": 4, "top_k": 3},
    "evict": {"num_nodes": 12, "max_depth": 4, "top_k": 3},
    "graft": {"num_nodes": 12, "max_depth": 4, "top_k": 3, "gates": {"1": 0.2}},
}


def policy_that_knows(name: str) -> DraftPolicy:
    section = dict(SECTIONS[name])
    policy = policy_of(section.pop("num_nodes"), policy=name, **section)
    logits = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
    policy.observe_logits(torch.arange(VOCAB), 2 * logits)
    return policy


def drafted(policy: DraftPolicy, limits: list[int] | None, compacts: bool) -> DraftForest:
    batch = DraftBatch.of(len(LIMITS))
    batch = replace(batch, plan=PLAN, depth_limits=None if limits is None else torch.tensor(limits))
    pool = grow(policy, len(LIMITS), seed=4, batch=batch, compacts=compacts)
    pool.roots = torch.arange(len(LIMITS))
    return policy.select(pool, batch)


@pytest.mark.parametrize("compacts", [True, False])
@pytest.mark.parametrize("name", SECTIONS)
def test_no_request_gets_a_node_beyond_its_depth(name: str, compacts: bool) -> None:
    policy = policy_that_knows(name)
    forest = drafted(policy, LIMITS, compacts)
    forest.validate(max_nodes=policy.max_nodes, max_depth=4)
    assert torch.isfinite(forest.path_logprobs).all()
    for paths, limit in zip(paths_of(forest), LIMITS, strict=True):
        assert paths
        assert max(map(len, paths)) <= limit
    assert max(len(path) for paths in paths_of(forest) for path in paths) > 2


@pytest.mark.parametrize("name", ["chain", "static", "topn"])
def test_what_a_limit_leaves_is_the_tree_without_it_cut(name: str) -> None:
    policy = policy_that_knows(name)
    whole = paths_of(drafted(policy, None, compacts=True))
    cut = paths_of(drafted(policy, LIMITS, compacts=True))
    for paths, other, limit in zip(cut, whole, LIMITS, strict=True):
        assert {path for path in other if len(path) <= limit} <= paths.keys()
        if name != "topn":  # Whose places are taken by shallower candidates.
            assert len(paths) == sum(len(path) <= limit for path in other)


def test_all_requests_may_stop_at_once() -> None:
    for name in SECTIONS:
        policy = policy_that_knows(name)
        forest = drafted(policy, [1] * len(LIMITS), compacts=True)
        assert max(forest.depths.tolist()) == 1, name
