# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Trees in the order in which their nodes are served: a budget that comes later buys the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from echo_vllm import ops
from echo_vllm.policies import DraftBatch, DraftPolicy, make_policy, parse_section
from echo_vllm.trees.forest import ROOT
from echo_vllm.trees.pool import CandidatePool
from echo_vllm.trees.ranked import FILLER_TIER, RankedTrees
from tests.policies.test_policies import grow

REQUESTS, NODES = 5, 16
SECTIONS: dict[str, dict[str, Any]] = {
    "truncation": {"gates": {"1": 0.2, "2": 0.1, "4": 0.05}},
    "anywhere": {"gates": {"1": 0.3}, "width_at": "anywhere"},
    "floor": {"gates": {"1": 0.3}, "floor": 3},
    "stopped": {"gates": {"1": 0.99}, "top_k": 3, "width": 5},
}


def policy(name: str, k_max: int) -> DraftPolicy:
    section = {
        "policy": "echo",
        **SECTIONS[name],
        "k_max": max(k_max, SECTIONS[name].get("floor", 0)),
    }
    return make_policy(parse_section(section, num_speculative_tokens=NODES), NODES)


def served(trees: RankedTrees, budget: int) -> list[int]:
    """Places of each tree that a budget buys, as Model Runner V2 asks for it."""
    _, bounds = ops.select_budget(
        trees.scores,
        trees.tiers,
        trees.parents.to(torch.int64),
        trees.parents.numel(),
        trees.parents.shape[1],
        torch.tensor([budget], dtype=torch.int32),
    )
    return [int(count) for count in bounds.diff()]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", SECTIONS)
def test_a_budget_that_comes_later_buys_the_same_nodes(name: str, seed: int) -> None:
    pool = grow(policy(name, 1000), REQUESTS, seed, compacts=False)
    trees = policy(name, 1000).ranked(pool, DraftBatch.of(REQUESTS))
    for budget in range(3, int(trees.sizes.sum()) + 1, 5):
        at_once = policy(name, budget).select(pool, DraftBatch.of(REQUESTS))
        counts = served(trees, budget)
        assert counts == at_once.cu_nodes.diff().tolist()
        for request, count in enumerate(counts):
            here = slice(int(at_once.cu_nodes[request]), int(at_once.cu_nodes[request + 1]))
            assert trees.token_ids[request, :count].tolist() == at_once.token_ids[here].tolist()
            assert trees.parents[request, :count].tolist() == at_once.parents[here].tolist()


@pytest.mark.parametrize("name", SECTIONS)
def test_what_fills_a_batch_up_comes_last(name: str) -> None:
    """Whatever number the host said, the rows are as many, and no node gives way to a filler."""
    pool = grow(policy(name, 1000), REQUESTS, 3, compacts=False)
    trees = policy(name, 1000).ranked(pool, DraftBatch.of(REQUESTS))
    places, sizes = trees.parents.shape[1], trees.sizes.tolist()
    for budget in range(REQUESTS * places + 1):
        counts = served(trees, budget)
        assert sum(counts) == budget
        if budget >= sum(sizes):
            assert all(count >= size for count, size in zip(counts, sizes, strict=True))
    assert name != "stopped" or sum(sizes) < REQUESTS * places


def test_requests_without_candidates_are_all_filler() -> None:
    pool = CandidatePool(
        token_ids=torch.tensor([[5, 6, 7], [1, 2, 3]]),
        parents=torch.tensor([[-1, -1, 1], [-1, -1, 0]]),
        path_logprobs=torch.tensor([[-2.0, -1.0, -1.5], [float("-inf")] * 3]),
        level_starts=[0, 2],
        active=torch.arange(2),
    )
    tiers = torch.tensor([[1, 0, 0], [0, 0, 0]], dtype=torch.int32)
    trees = RankedTrees.best(pool, pool.path_logprobs, tiers, most=5)
    assert trees.sizes.tolist() == [3, 0]
    assert trees.token_ids.tolist() == [[6, 7, 5], [0, 0, 0]]
    assert trees.parents.tolist() == [[ROOT, 0, ROOT], [ROOT] * 3]
    assert trees.tiers.tolist() == [[0, 0, 1], [FILLER_TIER] * 3]
