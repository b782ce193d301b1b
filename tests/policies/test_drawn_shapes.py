# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What policies say of trees of drawn candidates, before and while they are drawn."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from echo_vllm.forecast import CostCurve, StepCost
from echo_vllm.forecast.drafter_profile import DrawnDepth, DrawnProfile
from echo_vllm.forecast.plan import DraftPlan
from echo_vllm.policies import Cut, DraftBatch, DraftPolicy, draws_of, make_policy, parse_section
from echo_vllm.policies.auto import AutoPolicy
from echo_vllm.trees.drawn import DrawnLevel, DrawnPool
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
            parents = policy.drawn_parents(pool.deepest(), DraftBatch.of(requests))
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
    assert policy.drawn_cut(DraftBatch.of(3)) == Cut(6)
    assert policy.drawn_cut(DraftBatch.of(8)) == Cut(2)
    assert policy.drawn_cut(DraftBatch(8, 8, DraftPlan(prefill_tokens=12))) == Cut(1)
    assert policy_of(6, policy="topn", max_depth=2).drawn_cut(DraftBatch.of(99)) == Cut(6)


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
    assert draws_of(section) == (policy in ("chain", "topn", "echo", "auto"))
    default = parse_section({"policy": policy}, num_speculative_tokens=4)
    assert default.candidates == "auto"
    best = parse_section({"policy": policy, "candidates": "best"}, num_speculative_tokens=4)
    assert not draws_of(best)


COST = StepCost(
    verify=CostCurve((1.0, 101.0), (1.0, 2.0)),
    draft_level=CostCurve((1.0, 41.0), (0.1, 0.5)),
    catch_up=CostCurve((1.0, 41.0), (0.1, 0.5)),
)


def level_of(promises: list[list[float]]) -> DrawnLevel:
    return DrawnLevel(1, torch.arange(len(promises)), 0, torch.tensor(promises))


def test_auto_knows_where_trees_end_before_anything_is_drawn() -> None:
    policy = policy_of(12, policy="auto", max_depth=3, k_max=20, floor=1)
    plan = DraftPlan(least_worth=0.2, nodes=2.5, prefill_tokens=4)
    batch = DraftBatch(4, 4, plan)
    assert policy.drawn_cut(batch) == Cut(4, least_worth=0.2, floor=1, probed=2)
    assert policy.drawn_rows(batch, 3) == 12, "under a hard limit, what there may be"
    free = policy_of(12, policy="auto", max_depth=3)
    assert free.drawn_cut(batch).max_nodes == 12
    assert free.drawn_rows(batch, 3) == 9, "otherwise what is expected"
    assert free.drawn_ranks == 4


def test_auto_goes_deeper_where_the_best_node_promises_its_share_of_the_level() -> None:
    policy = policy_of(12, policy="auto", max_depth=3, top_k=2)
    promises = [[0.9, 0.1], [0.3, 0.3], [0.04, 0.04], [0.0, 0.0]]
    # Four requests have two rows each: 0.17 s, 0.0425 s a request.
    plan = DraftPlan(cost=COST, price=2.0, growth=(0.5, 0.5), least_worth=0.05)
    batch = DraftBatch(4, 4, plan)
    assert policy.going(level_of(promises), batch).tolist() == [True, True, False, False]
    dear = replace(batch, plan=replace(plan, price=6.0))
    assert policy.going(level_of(promises), dear).tolist() == [True, False, False, False]
    shallow = replace(batch, plan=replace(plan, max_depth=1))
    assert not policy.going(level_of(promises), shallow).any()
    probes = replace(shallow, probes=torch.tensor([3]))
    assert policy.going(level_of(promises), probes).tolist() == [False, False, False, True]
    # Whoever is left of the level is named by the level, not by its place.
    rest = DrawnLevel(1, torch.tensor([1, 3]), 0, torch.tensor([[0.0], [0.0]]))
    assert policy.going(rest, probes).tolist() == [False, True]


def test_auto_says_of_each_kind_what_was_accepted() -> None:
    profile = DrawnProfile(
        temperature=1.0,
        depths=(
            DrawnDepth(
                depth=1,
                samples=9,
                acceptance=0.5,
                survival_logprobs=(-2.0, 0.0),
                survival_probs=(0.1, 0.6),
                ece_before=0.1,
                ece_after=0.0,
            ),
        ),
    )
    policy = policy_of(4, policy="auto", max_depth=1, top_k=4)
    assert isinstance(policy, AutoPolicy)
    policy.drawn_model = profile.survival()
    verified = DraftForest.from_parents([[1, 2], [3]], [[-1, -1], [-1]], [[0.0, -2.0], [-1.0]])
    accepted = torch.tensor([1, 0])
    pool = drawn(policy_of(4, policy="static", tree=[[0], [1], [2], [3]]))
    found = policy.report_drawn(
        verified=verified, num_accepted=accepted, pool=pool, probes=torch.tensor([1])
    )
    assert found["predicted"] == pytest.approx([0.6 + 0.1 + 0.35], abs=0.01)
    assert found["accepted"] == [1]
    ((scores, depths, widths),) = found["samples"]
    assert (scores, depths, widths) == ([0.0] * 4, [1] * 4, [1] * 4)
    best = policy.report(verified=verified, num_accepted=accepted, pool=None, probes=torch.empty(0))
    assert best["predicted"] == pytest.approx([1 + math.exp(-2) + math.exp(-1)])
