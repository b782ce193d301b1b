# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What policies say of trees of drawn candidates, before and while they are drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from echo_vllm.forecast.plan import DraftPlan
from echo_vllm.policies import DraftBatch, DraftPolicy, draws_of, make_policy, parse_section
from echo_vllm.trees.drawn import DrawnPool
from echo_vllm.trees.draws import Sampling, draw_children, root_keys
from echo_vllm.trees.forest import ROOT, DraftForest

VOCAB = 9


def policy_of(num_nodes: int, **section: Any) -> DraftPolicy:
    return make_policy(parse_section(section, num_speculative_tokens=num_nodes), num_nodes)


def drawn(policy: DraftPolicy, requests: int = 2) -> DrawnPool:
    """A pool of all levels that a policy with a fixed shape wants."""
    pool, k = DrawnPool(root_keys(torch.arange(requests), torch.zeros(requests).long())), 0
    parents, k = torch.full((requests, 1), ROOT), policy.num_ranks
    for depth in range(1, policy.max_depth + 1):
        if depth > 1:
            parents = policy.drawn_parents(depth, pool)
        rows = parents.numel()
        sampling = Sampling(torch.ones(rows))
        keys = pool.keys_of(parents).flatten()
        draws = draw_children(torch.zeros(rows, VOCAB), k, keys, sampling)
        level = pool.open(parents, torch.ones(*parents.shape, k))
        ones = torch.ones(rows, k)
        pool.fill(level, policy.drawn_widths(level), draws, draws.token_ids, ones)
    return pool


@pytest.mark.parametrize(
    ("tree", "parents"),
    [
        ([[0], [1], [2], [0, 0], [1, 0], [1, 1], [1, 1, 0]], [-1, -1, -1, 0, 1, 1, 5]),
        # Ranks that the shape leaves out: the next draw takes their place.
        ([[0], [2], [2, 1], [2, 3]], [-1, -1, 1, 1]),
        ([[0], [0, 0], [0, 0, 0]], [-1, 0, 1]),
    ],
    ids=["ragged", "holes", "path"],
)
def test_a_fixed_shape_is_drawn_as_given(tree: list[list[int]], parents: list[int]) -> None:
    policy = policy_of(8, policy="static", tree=tree)
    forest = drawn(policy).take(16, 8)
    forest.validate(max_nodes=8, max_depth=3)
    assert [own for _, own in forest.trees()] == [parents, parents]


def test_the_budget_is_shared_before_anything_is_drawn() -> None:
    policy = policy_of(6, policy="echo", k_max=20, max_depth=2)
    assert policy.drawn_nodes(DraftBatch.of(3)) == 6
    assert policy.drawn_nodes(DraftBatch.of(8)) == 2
    assert policy.drawn_nodes(DraftBatch(8, 8, DraftPlan(prefill_tokens=12))) == 1
    assert policy_of(6, policy="topn", max_depth=2).drawn_nodes(DraftBatch.of(99)) == 6


def test_what_others_have_is_not_left_for_the_best_candidates() -> None:
    batch = DraftBatch(
        4, 5, DraftPlan(prefill_tokens=3), torch.tensor([1, 2]), torch.tensor([9, 8, 7, 6])
    )
    some = batch.of_some(np.array([0, 2]), other_nodes=7)
    assert (some.num_requests, some.num_decoding, some.plan.prefill_tokens) == (2, 5, 10)
    assert some.probes.tolist() == [1]
    assert some.depth_limits is not None
    assert some.depth_limits.tolist() == [9, 7]


def test_forests_of_both_kinds_become_one() -> None:
    first = DraftForest.from_parents([[1, 2], []], [[-1, 0], []], [[-1.0, -2.0], []])
    second = DraftForest.from_parents([[5], [6, 7]], [[-1], [-1, -1]])
    joined = DraftForest.joined([(torch.tensor([1, 3]), first), (torch.tensor([0, 2]), second)])
    assert joined.trees() == [([5], [-1]), ([1, 2], [-1, 0]), ([6, 7], [-1, -1]), ([], [])]
    assert joined.path_logprobs.tolist() == [0.0, -1.0, -2.0, 0.0, 0.0]
    joined.validate(max_nodes=2, max_depth=2)


@pytest.mark.parametrize("policy", ["chain", "topn", "echo", "auto", "evict", "graft"])
def test_auto_draws_where_the_policy_can(policy: str) -> None:
    section = parse_section({"policy": policy, "candidates": "auto"}, num_speculative_tokens=4)
    assert draws_of(section) == (policy in ("chain", "topn", "echo"))
    best = parse_section({"policy": policy}, num_speculative_tokens=4)
    assert not draws_of(best)
