# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The elastic policies `echo` and `auto`: their budget, their gates, and their optimum."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_vllm.forecast import CostCurve, StepCost
from echo_vllm.forecast.plan import DraftPlan, Load
from echo_vllm.policies import DraftBatch, make_policy, parse_section
from echo_vllm.policies.cost_aware import CostAwarePolicy
from echo_vllm.policies.echo import EchoPolicy
from echo_vllm.trees.forest import ROOT, DraftForest
from echo_vllm.trees.pool import CandidatePool
from tests.policies.test_policies import grow, paths_of


def elastic(num_nodes: int, **section: Any) -> Any:
    config = parse_section(section, num_speculative_tokens=num_nodes)
    return make_policy(config, num_nodes)


def cost(free: float, slope: float = 1.0, level: float = 0.5, other: float = 0.0) -> StepCost:
    """A target forward of 10 s up to `free` rows and `slope` s a row beyond."""
    return StepCost(
        verify=CostCurve((1.0, max(2.0, free), max(2.0, free) + 1), (10.0, 10.0, 10.0 + slope)),
        draft_level=CostCurve((1.0, 101.0), (level, level + 1.0)),
        catch_up=CostCurve((1.0, 101.0), (level, level + 1.0)),
        other=other,
    )


def planned(requests: int, **plan: Any) -> DraftBatch:
    return DraftBatch(requests, requests, DraftPlan(**plan))


def nodes_of(forest: DraftForest) -> list[set[tuple[int, ...]]]:
    return [set(paths) for paths in paths_of(forest)]


@settings(max_examples=40, deadline=None)
@given(
    requests=st.integers(1, 6),
    seed=st.integers(0, 10_000),
    k_max=st.integers(0, 60),
    gates=st.dictionaries(st.integers(1, 4), st.floats(0, 0.9), max_size=3),
    share=st.sampled_from(["batch", "equal"]),
)
def test_requests_that_stay_in_the_frontier_change_no_forest(
    requests: int, seed: int, k_max: int, gates: dict[int, float], share: str
) -> None:
    """On a GPU those that a gate stops are masked, not taken out of the drafter's rows."""
    section = {"k_max": k_max, "gates": {str(d): tau for d, tau in gates.items()}, "share": share}
    policy = elastic(
        12, policy="echo", max_depth=4, top_k=2, width=3, floor=min(1, k_max), **section
    )
    batch = DraftBatch.of(requests)
    wanted = policy.select(grow(policy, requests, seed, batch), batch)
    masked = grow(policy, requests, seed, batch, compacts=False)
    found = policy.select(masked, batch)
    assert found.trees() == wanted.trees()
    assert torch.equal(found.path_logprobs, wanted.path_logprobs)
    assert len(masked.active) == requests


@settings(max_examples=60, deadline=None)
@given(
    requests=st.integers(1, 6),
    seed=st.integers(0, 10_000),
    nodes=st.integers(4, 24),
    k_max=st.integers(0, 60),
    prefill=st.integers(0, 20),
    floor=st.integers(0, 3),
    gates=st.dictionaries(st.integers(1, 4), st.floats(0, 0.9), max_size=3),
    share=st.sampled_from(["batch", "equal"]),
)
def test_echo_never_exceeds_the_budget_and_keeps_trees_whole(
    requests: int,
    seed: int,
    nodes: int,
    k_max: int,
    prefill: int,
    floor: int,
    gates: dict[int, float],
    share: str,
) -> None:
    floor = min(floor, k_max)  # More is refused.
    policy = elastic(
        nodes,
        policy="echo",
        max_depth=4,
        top_k=2,
        width=4,
        k_max=k_max,
        floor=floor,
        gates={str(d): tau for d, tau in gates.items()},
        share=share,
    )
    batch = planned(requests, prefill_tokens=prefill)
    pool = grow(policy, requests, seed, batch)
    forest = policy.select(pool, batch)
    forest.validate(max_nodes=nodes, max_depth=4)
    assert forest.num_requests == requests
    assert forest.num_nodes <= max(0, k_max - prefill)
    sizes = forest.cu_nodes.diff().tolist()
    if share == "batch" and k_max - prefill >= requests * floor:
        assert min(sizes) >= floor
    # The same again: a pure function.
    assert policy.select(pool, batch).trees() == forest.trees()
    # Gates hold: nothing stands below a level whose best path did not pass.
    for request, paths in enumerate(paths_of(forest)):
        for depth, tau in gates.items():
            best = (
                pool.path_logprobs[request, pool.level(depth)] if depth <= pool.num_levels else None
            )
            if best is not None and float(best.max().exp()) <= tau:
                assert all(len(path) <= depth for path in paths)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), small=st.integers(0, 30), more=st.integers(0, 30))
def test_more_budget_never_loses_a_node(seed: int, small: int, more: int) -> None:
    """With the same drafts, so that expected tokens cannot fall either."""
    wide = elastic(12, policy="echo", max_depth=3, top_k=2, width=4, k_max=1000, gates={})
    pool = grow(wide, 4, seed)
    trees = []
    for k_max in (small, small + more):
        policy = elastic(12, policy="echo", max_depth=3, top_k=2, width=4, k_max=k_max, gates={})
        trees.append(nodes_of(policy.select(pool, DraftBatch.of(4))))
    assert all(less <= greater for less, greater in zip(*trees, strict=True))


def test_one_request_with_a_huge_budget_is_the_topn_tree_where_no_gate_fires() -> None:
    topn = elastic(16, policy="topn", max_depth=4, top_k=4)
    for gates in ({}, {"1": 0.0, "3": 0.0}):
        echo = elastic(16, policy="echo", max_depth=4, top_k=4, width=4, k_max=9999, gates=gates)
        for seed in range(20):
            batch = DraftBatch.of(1)
            ours = echo.select(grow(echo, 1, seed), batch)
            assert nodes_of(ours) == nodes_of(topn.select(grow(topn, 1, seed), batch))


def test_permuting_requests_changes_nothing_but_ties() -> None:
    """The table drafter never ties, so a request keeps its fate in any order."""
    policy = elastic(12, policy="echo", max_depth=3, top_k=2, width=4, k_max=14, gates={"1": 0.1})
    pool = grow(policy, 5, seed=8)
    order = torch.tensor([3, 0, 4, 1, 2])
    turned = CandidatePool(
        pool.token_ids[order],
        pool.parents[order],
        pool.path_logprobs[order],
        pool.level_starts,
        pool.active,
    )
    batch = DraftBatch.of(5)
    trees = policy.select(pool, batch).trees()
    assert policy.select(turned, batch).trees() == [trees[i] for i in order.tolist()]


def test_depth_of_the_confident_comes_before_width_of_the_unsure() -> None:
    """Two requests, four nodes: the sure one's path is deepened before the other is widened."""
    policy = elastic(6, policy="echo", max_depth=3, top_k=1, width=2, k_max=4, gates={"1": 0.5})
    pool = CandidatePool.empty(2)
    batch = DraftBatch.of(2)
    logprob = {0: [0.9, 0.05], 1: [0.4, 0.35]}
    first = policy.expand(1, pool, batch)
    pool.grow(
        first, torch.tensor([[[1, 2]], [[3, 4]]]), torch.tensor([[logprob[0]], [logprob[1]]]).log()
    )
    second = policy.expand(2, pool, batch)
    assert second.requests.tolist() == [0]
    pool.grow(second, torch.tensor([[[5, 6]]]), torch.tensor([[[0.7, 0.2]]]).log())
    third = policy.expand(3, pool, batch)
    # Three of four nodes are spoken for by the levels drafted so far: one is left, for request 0.
    assert third.requests.tolist() == [0]
    pool.grow(third, torch.tensor([[[7, 8]]]), torch.tensor([[[0.9, 0.05]]]).log())
    sure, unsure = nodes_of(policy.select(pool, batch))
    assert sure == {(1,), (1, 5), (1, 5, 7)}
    assert unsure == {(3,)}


def super_tree(width_at: str, k_max: int) -> list[set[tuple[int, ...]]]:
    """The worked example of docs/policies.md: three requests, a gate at depth 1."""
    policy = elastic(
        6, policy="echo", max_depth=3, top_k=1, width=2, k_max=k_max, gates={"1": 0.5},
        width_at=width_at,
    )  # fmt: skip
    levels = [
        [[[0.90, 0.05]], [[0.70, 0.20]], [[0.40, 0.35]]],
        [[[0.81 / 0.9, 0.06 / 0.9]], [[0.42 / 0.7, 0.14 / 0.7]]],
        [[[0.60 / 0.81, 0.10 / 0.81]], [[0.10 / 0.42, 0.02 / 0.42]]],
    ]
    pool, batch = CandidatePool.empty(3), DraftBatch.of(3)
    for depth, expansion, requests in policy.levels(pool, batch):
        chances = torch.tensor(levels[depth - 1][: len(requests)])
        pool.grow(expansion, 10 * depth + torch.arange(2).expand(chances.shape), chances.log())
    return nodes_of(policy.select(pool, batch))


def test_the_worked_example_of_the_docs() -> None:
    a, b, c = super_tree("truncation", 6)
    assert a == {(10,), (10, 20), (10, 20, 30)}
    assert b == {(10,), (10, 20)}
    assert c == {(10,)}
    a, b, c = super_tree("truncation", 8)
    assert b == {(10,), (10, 20), (10, 21)}
    assert c == {(10,), (11,)}


def test_width_goes_to_the_levels_at_which_requests_stopped() -> None:
    """By score alone B's 0.20 at depth 1 comes before its 0.14 at depth 2, where it stopped."""
    _, b, c = super_tree("anywhere", 8)
    assert b == {(10,), (10, 20), (11,)}
    assert c == {(10,), (11,)}
    assert super_tree("anywhere", 6) == super_tree("truncation", 6)


def test_echo_rests_at_small_budgets_and_comes_back_where_it_pays_for_catching_up() -> None:
    policy = elastic(16, policy="echo", k_max=8, gates={})
    rests = [policy.plan(Load(n)).max_depth == 0 for n in (8, 32, 33, 32, 17, 16, 33)]
    #                       8 nodes for that many: a quarter each, then half of one to begin again.
    assert rests == [False, False, True, True, True, False, True]
    assert policy.plan(Load(8, waiting=8 * 400)).max_depth == 0, "8 nodes in each of 256 steps"
    ending = (8.0, 8.0, 2.0, 0.0, 0.0, 0.0, 0.0)
    assert policy.plan(Load(8, waiting=8 * 48, ahead=ending)).max_depth == 0
    assert policy.plan(Load(8, waiting=8 * 48)).max_depth is None
    assert not policy.plan(Load(33)).reads_prompts


def test_echo_rests_where_an_equal_part_of_the_budget_is_no_node() -> None:
    """Drawn candidates have equal parts, and so have all with `share: equal`; to draft what nobody
    may verify cost a fifth of a step."""
    batchwide, equal = (
        elastic(16, policy="echo", k_max=12, gates={}, share=share) for share in ("batch", "equal")
    )
    assert batchwide.plan(Load(16)).max_depth is None
    assert batchwide.plan(Load(16, num_drawn=15)).max_depth is None, "one may have all of them"
    assert batchwide.plan(Load(16, num_drawn=16)).max_depth == 0
    assert batchwide.plan(Load(12, num_drawn=12)).max_depth is None
    assert equal.plan(Load(16)).max_depth == 0
    assert equal.plan(Load(12)).max_depth is None


def test_echo_counts_requests_that_may_have_a_tree() -> None:
    policy = elastic(16, policy="echo", k_max=8, gates={})
    assert policy.plan(Load(40)).max_depth == 0
    assert policy.plan(Load(40, num_drafting=(8,))).max_depth is None


def test_a_gated_request_leaves_the_frontier_and_keeps_its_layer() -> None:
    policy = elastic(8, policy="echo", max_depth=3, top_k=2, width=4, k_max=99, gates={"1": 0.5})
    pool = CandidatePool.empty(1)
    batch = DraftBatch.of(1)
    pool.grow(
        policy.expand(1, pool, batch),
        torch.tensor([[[1, 2, 3, 4]]]),
        torch.tensor([[[0.3, 0.2, 0.1, 0.05]]]).log(),
    )
    assert policy.expand(2, pool, batch) is None
    # What depth would have taken widens the tree at the layer that failed.
    assert nodes_of(policy.select(pool, batch)) == [{(1,), (2,), (3,), (4,)}]


def brute_force(policy: CostAwarePolicy, pool: CandidatePool, batch: DraftBatch) -> float:
    """The best tokens a second of every ancestor-closed forest of the pool."""
    probabilities = policy.probabilities(pool, batch)
    each: list[list[tuple[int, float]]] = []
    for request in range(pool.num_requests):
        columns = [c for c in range(pool.num_columns) if pool.path_logprobs[request, c] > -math.inf]
        found = []
        for size in range(len(columns) + 1):
            for chosen in itertools.combinations(columns, size):
                kept = set(chosen)
                parents = {int(pool.parents[request, c]) for c in chosen} - {ROOT}
                if parents <= kept and size <= policy.max_nodes:
                    found.append((size, sum(float(probabilities[request, c]) for c in chosen)))
        each.append(found)
    best = 0.0
    for choice in itertools.product(*each):
        nodes = sum(size for size, _ in choice)
        tokens = batch.num_decoding + sum(gain for _, gain in choice)
        best = max(best, tokens / float(policy.seconds(np.array([nodes]), pool, batch)[0]))
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("free", [2, 4, 7, 50])
@pytest.mark.parametrize("name", ["auto", "evict"])
def test_the_selection_is_the_optimum_of_its_objective(name: str, seed: int, free: int) -> None:
    policy = elastic(5, policy=name, max_depth=2, top_k=2, width=2)
    batch = planned(2, cost=cost(free, slope=2.0), price=0.0)
    pool = grow(policy, 2, seed, batch)
    forest = policy.select(pool, batch)
    forest.validate(max_nodes=5, max_depth=2)
    gains = policy.probabilities(pool, batch)
    cu = forest.cu_nodes.tolist()
    assert forest.columns is not None
    gain = sum(
        float(gains[request, column])
        for request in range(2)
        for column in forest.columns[cu[request] : cu[request + 1]].tolist()
    )
    seconds = float(policy.seconds(np.array([forest.num_nodes]), pool, batch)[0])
    assert (2 + gain) / seconds == pytest.approx(brute_force(policy, pool, batch), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    requests=st.integers(1, 6),
    seed=st.integers(0, 10_000),
    k_max=st.none() | st.integers(0, 30),
    free=st.integers(1, 60),
    price=st.floats(0, 2),
    floor=st.integers(0, 2),
)
def test_auto_keeps_the_invariants(
    requests: int, seed: int, k_max: int | None, free: int, price: float, floor: int
) -> None:
    floor = floor if k_max is None else min(floor, k_max)  # More is refused.
    policy = elastic(12, policy="auto", max_depth=4, top_k=2, width=4, k_max=k_max, floor=floor)
    batch = planned(requests, cost=cost(free), price=price)
    pool = grow(policy, requests, seed, batch)
    forest = policy.select(pool, batch)
    forest.validate(max_nodes=12, max_depth=4)
    if k_max is not None:
        assert forest.num_nodes <= k_max
    elif floor:
        assert min(forest.cu_nodes.diff().tolist()) >= floor
    probabilities = policy.probabilities(pool, batch)
    parents = pool.parents
    above = torch.cat([probabilities, torch.ones(requests, 1)], dim=1).gather(
        1, torch.where(parents == ROOT, pool.num_columns, parents)
    )
    assert bool((probabilities <= above).all())


def test_evict_drafts_in_full_and_cuts_what_does_not_pay() -> None:
    policy = elastic(12, policy="evict", max_depth=4, top_k=2, width=4)
    sizes = []
    for free, slope in ((100, 0.0), (6, 1.0), (2, 500.0)):
        batch = planned(3, cost=cost(free, slope=slope))
        pool = grow(policy, 3, 1, batch)
        assert pool.num_levels == 4
        forest = policy.select(pool, batch)
        forest.validate(max_nodes=12, max_depth=4)
        sizes.append(forest.num_nodes)
    assert sizes[0] == 36
    assert 0 < sizes[1] < 36
    assert sizes[2] == 0
    # Before a cost is known everything is verified; k_max is a limit all the same.
    assert policy.select(pool, planned(3)).num_nodes == 36
    limited = elastic(12, policy="evict", max_depth=4, top_k=2, width=4, k_max=20)
    assert limited.select(pool, planned(3, prefill_tokens=3)).num_nodes == 17


def test_a_dear_second_stops_deeper_levels_and_probes_go_on() -> None:
    policy = elastic(12, policy="auto", max_depth=4, top_k=2, width=4)
    cheap, dear = (planned(3, cost=cost(50), price=price) for price in (0.01, 50.0))
    assert grow(policy, 3, 1, cheap).num_levels == 4
    assert grow(policy, 3, 1, dear).num_levels == 1
    probing = DraftBatch(3, 3, dear.plan, torch.tensor([1]))
    pool = grow(policy, 3, 1, probing)
    assert pool.num_levels == 4
    assert pool.active.tolist() == [1]
    limited = planned(3, cost=cost(50), price=0.01, max_depth=2)
    assert grow(policy, 3, 1, limited).num_levels == 2


def test_a_plan_travels() -> None:
    plan = DraftPlan(3, 2, 7, 11, 40.5, 12.25, cost(8), (1.0, 0.5))
    assert DraftPlan.from_dict(plan.to_dict()) == plan
    assert DraftPlan.from_dict(DraftPlan().to_dict()) == DraftPlan()
    assert DraftPlan(probes=2, turn=3).probed(5) == [1, 2]
    assert DraftPlan(probes=9).probed(2) == [0, 1]


def test_echo_takes_its_budget_from_the_hinge() -> None:
    policy = elastic(16, policy="echo", max_depth=3, top_k=2, floor=1)
    assert isinstance(policy, EchoPolicy)
    assert policy.budget(planned(4, max_rows=40.0)) == 36
    assert policy.budget(planned(4, max_rows=40.0, prefill_tokens=30)) == 6
    assert policy.budget(planned(4, max_rows=2.0)) == 0
    assert policy.budget(planned(4)) == 64


def test_equal_shares_draft_no_level_that_nobody_can_keep() -> None:
    policy = elastic(12, policy="echo", max_depth=4, top_k=2, share="equal", gates={}, k_max=9)
    for requests, levels in ((1, 4), (3, 3), (4, 2), (10, 1)):
        batch = planned(requests)
        pool = grow(policy, requests, 1, batch)
        assert pool.num_levels == levels
        assert max(policy.select(pool, batch).cu_nodes.diff().tolist()) == min(12, 9 // requests)
